"""What `predicate.py` says about the positions of a tensor, computed for all of them at once and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from liger_compile import _torch, handed, mask_code
from liger_compile import predicate as p
from liger_compile.elements import attended
from liger_compile.graph_terms import SAID, GraphTerms
from liger_compile.terms import Term
from liger_compile.views import settle

DEFAULTS = (None, None, None, None, 0.0, False)
"""Of the first arguments of `scaled_dot_product_attention`."""


def tabulate(value: p.Value, shape: tuple[int, ...], names: str, load: Callable[[Term], Tensor]) -> Tensor:
    """The tensor of that shape which holds `value` everywhere; `load` gives tensors that the value reads."""
    axes = {}
    for i, (name, n) in enumerate(zip(names, shape, strict=True)):
        axes[name] = torch.arange(n).view([-1 if j == i else 1 for j in range(len(shape))])

    def number(v: p.Linear) -> Any:
        return sum((n * atom(a).long() for a, n in v.terms), torch.tensor(v.const))

    def atom(a: p.Atom) -> Any:
        match a:
            case p.Index():
                return axes[a.name]
            case p.Element():
                tensor = load(a.tensor)  # an alternative that is not taken may stand outside
                return tensor[tuple(number(i).clamp(0, n - 1) for i, n in zip(a.index, tensor.shape, strict=True))]
            case p.Quotient():
                return number(a.of) // a.by
            case p.Remainder():
                return number(a.of) % a.by
        raise AssertionError(f"no value for {a!r}")

    def of(v: p.Value) -> Any:
        match v:
            case bool() | float():
                return torch.tensor(v)
            case p.Linear():
                return number(v)
            case p.AtLeast():
                return number(v.of) >= 0
            case p.Zero():
                return number(v.of) == 0
            case p.Truth():
                return atom(v.of)
            case p.Not():
                return ~of(v.of)
            case p.All() | p.Any():
                parts = [of(b) for b in v.of]
                result = parts[0]
                for part in parts[1:]:
                    result = result & part if isinstance(v, p.All) else result | part
                return result
            case p.Choice():
                yes, no = of(v.yes), of(v.no)
                return torch.where(of(v.condition), yes, no)
        raise AssertionError(f"no value for {v!r}")

    return of(value).expand(shape)


@dataclass(frozen=True)
class Attention:
    """What became of the mask of one call of `scaled_dot_product_attention`."""

    outcome: str
    """"right" or "wrong", "unread"; "causal" or "none" where there is no mask."""
    says: str = ""
    """The predicate that was read, or why none was."""


def attentions(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> list[Attention]:
    """Runs a graph and compares each attention mask, element by element, with what is read of it."""
    gm = _torch.copy_module(gm)
    settle(gm.graph)
    gm.recompile()
    view = GraphTerms.view(gm.graph)
    values: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            values[node] = super().run_node(node)
            return values[node]

    def one(node: fx.Node) -> Attention:
        _, _, _, mask, _, causal = (*node.args, *DEFAULTS[len(node.args) :])
        mask, causal = node.kwargs.get("attn_mask", mask), node.kwargs.get("is_causal", causal)
        if mask is None:
            return Attention("causal" if causal else "none")
        if mask.op == "placeholder" and SAID not in mask.meta:
            return Attention("unread", "the mask is made in another graph")
        actual = values[mask]
        try:
            says = attended(view, view.of[mask])
            again = says if isinstance(says, bool) else computed(says, actual.shape)
        except p.Unread as error:
            return Attention("unread", str(error))
        allowed = actual if actual.dtype is torch.bool else actual > torch.finfo(actual.dtype).min
        names = "bhqk"[4 - actual.ndim :]
        read = tabulate(says, tuple(actual.shape), names, lambda term: values[view.carriers[term][0]])
        right = torch.equal(read, allowed) and torch.equal(torch.as_tensor(again).expand(actual.shape), allowed)
        return Attention("right" if right else "wrong", repr(says))

    def computed(says: p.Bool, shape: torch.Size) -> Tensor:
        """By the code that is made of it."""
        code = mask_code.write(view, says)
        tensors = [values[view.carriers[t][0]] for t in code.tensors]
        positions = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
        missing = [torch.tensor(0)] * (4 - len(shape))
        return mask_code.function(code.source, len(tensors))(*missing, *positions, *tensors)

    with torch.no_grad(), torch.random.fork_rng():  # dropout draws numbers that the model is to draw
        Recorder(gm).run(*inputs)
        return [one(node) for node in gm.graph.nodes if node.target is torch.nn.functional.scaled_dot_product_attention]


def comparing(
    found: list[Attention], then: Callable[[fx.GraphModule], Callable[..., Any]] = lambda gm: gm
) -> Callable[..., Any]:
    """A backend that notes the `attentions` of every graph and runs what `then` makes of it."""

    def compiler(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        compiled = then(gm)

        def run(*inputs: Any) -> Any:
            found.extend(attentions(gm, inputs))
            return compiled(*inputs)

        return run

    return partial(handed.compiled, compiler=compiler)
