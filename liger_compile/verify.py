"""`liger.verify`: each replacement runs beside the code that it replaces, forward and backward.

Both are compared with that code in float64. The first result or gradient that is further off than rounding explains
raises `VerificationError`, which names the pattern and its place in the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .graph_terms import GraphTerms, call_name
from .lazy import autocast_state
from .legality import Site
from .report import Place

FACTOR = 2.0
"""How many times the error of the code that is replaced is still no fault: kernels add in other orders."""


class Unverified(Exception):
    """Why a replacement and the code it replaces cannot be compared."""


class VerificationError(RuntimeError):
    """A replacement computes something else than the code that it replaces."""


def beside(
    gm: fx.GraphModule, view: GraphTerms, site: Site, inserted: Sequence[fx.Node], results: list[fx.Node]
) -> list[fx.Node]:
    """Puts a replacement and the code that it replaces into one call that compares them; returns its results.

    Raises `Unverified` if the two cannot be compared; the graph is then as it was.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    operands = _read_by(inserted)
    replaced = sorted(
        {*site.interior, *site.outputs} | _derived((*site.interior, *site.outputs), operands, order), key=order.get
    )
    if not all(view.is_pure(node) or _is_certain(node) for node in replaced):
        raise Unverified("it draws random numbers, or writes")
    if any(view.region[node] != view.region[site.before] for node in replaced):
        raise Unverified("it runs under several kinds of autocast")
    read = operands | _read_by(replaced)
    if any(order[node] >= order[site.before] for node in read):
        raise Unverified("it reads what is computed behind the first of its results")
    label = _label(site)
    modules = [_extract(gm, nodes, read, out) for nodes, out in ((replaced, site.outputs), (inserted, results))]
    name = f"verify_{sum(n.startswith('verify_') for n, _ in gm.named_children())}"
    gm.add_submodule(name, Verifier(label, [n.name for n in read], *modules))
    with gm.graph.inserting_before(site.before):
        call = gm.graph.call_module(name, tuple(read))
        made = [call] if len(results) == 1 else [gm.graph.call_function(_item, (call, i)) for i in range(len(results))]
    for new, old in zip(made, results, strict=True):
        new.meta = dict(old.meta)
    for node in reversed(inserted):
        gm.graph.erase_node(node)
    return made


def _read_by(nodes: Iterable[fx.Node]) -> dict[fx.Node, None]:
    own = set(nodes)
    return dict.fromkeys(i for node in nodes for i in node.all_input_nodes if i not in own)


def _derived(nodes: Iterable[fx.Node], operands: dict[fx.Node, None], order: dict[fx.Node, int]) -> set[fx.Node]:
    """What lies between the operands and `nodes`: views that others read too, through which gradients flow back."""
    first = min((order[o] for o in operands), default=0)
    known: dict[fx.Node, bool] = dict.fromkeys(operands, True)

    def hangs(node: fx.Node) -> bool:
        if node not in known:
            known[node] = order[node] > first and max(map(hangs, node.all_input_nodes), default=False)  # all are noted
        return known[node]

    for node in _read_by(nodes):
        hangs(node)
    return {node for node, does in known.items() if does and node not in operands}


def _item(results: Sequence[Tensor], i: int) -> Tensor:
    return results[i]


def _is_certain(node: fx.Node) -> bool:
    """Whether an attention draws no random numbers, though the operation may."""
    attends = node.op == "call_function" and call_name(node.target) == "scaled_dot_product_attention"
    dropout = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
    return attends and isinstance(dropout, (int, float)) and dropout == 0


def _label(site: Site) -> str:
    place = Place.of(site.outputs[0])
    where = f" in {place.module}" if place.module else ""
    return f"{site.match.pattern.name}{where}" + (f" ({place.source})" if place.source else "")


def _extract(
    gm: fx.GraphModule, nodes: Sequence[fx.Node], inputs: dict[fx.Node, None], results: Sequence[fx.Node]
) -> fx.GraphModule:
    """Some nodes as a module of their own, which returns a tuple."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[r] for r in results))
    return fx.GraphModule(gm, graph)


# ---- at run time ---------------------------------------------------------------------------------------------------


class Verifier(nn.Module):
    """A replacement, `after`, that is compared with the code it replaces, `before`, whenever it is called."""

    def __init__(self, label: str, names: list[str], before: fx.GraphModule, after: fx.GraphModule) -> None:
        super().__init__()
        self.label, self.names, self.before, self.after = label, names, before, after

    def forward(self, *inputs: Any) -> Any:
        if any(isinstance(i, Tensor) and (i.is_meta or type(i) not in (Tensor, nn.Parameter)) for i in inputs):
            results = self.after(*inputs)  # a compiler is tracing, or it is explained: there are no values to compare
        else:
            results = _Verified.apply(self, *inputs)
        return results[0] if len(results) == 1 else results

    def compare(self, run: Callable[[Callable[..., Any], bool], Sequence[Any]], names: Sequence[str]) -> Sequence[Any]:
        """The results of `after`, if they are as close to float64's as those of `before`.

        `run(function, wide)` runs one of them, on operands in float64 if `wide`.
        """
        made, replaced, exact = run(self.after, False), run(self.before, False), run(_Wide(self.before).run, True)
        for name, *values in zip(names, made, replaced, exact, strict=True):
            if all(isinstance(v, Tensor) and v.is_floating_point() for v in values):
                self._check(name, *values)
        return made

    def _check(self, name: str, made: Tensor, replaced: Tensor, exact: Tensor) -> None:
        found = f"{self.label}: {name} {list(made.shape)} {made.dtype}"
        advice = f'; options={{"liger.disable": ["{self.label.split()[0]}"]}} leaves it alone'
        if made.shape != replaced.shape or made.dtype is not replaced.dtype:
            raise VerificationError(f"{found} should be {list(replaced.shape)} {replaced.dtype}{advice}")
        ours, theirs = _error(made, exact), _error(replaced, exact)
        eps = torch.finfo(made.dtype).eps
        if not ours <= max(FACTOR * theirs, 8 * eps if eps < 1e-6 else eps):
            raise VerificationError(f"{found} is off by {ours:.1e}, what it replaces by {theirs:.1e}{advice}")


def _error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact|| over what is finite; infinite if other elements are not."""
    value, exact = value.double(), exact.double()
    finite = exact.isfinite() & (exact.abs() <= torch.finfo(torch.float32).max)
    if not torch.equal(value.isfinite() & finite, finite):
        return float("inf")
    value, exact = torch.where(finite, value, 0), torch.where(finite, exact, 0)
    scale = exact.norm()
    return float((value - exact).norm() / (scale if scale > 0 else 1))


class _Verified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, verifier: Verifier, *inputs: Any) -> Any:
        ctx.verifier = verifier
        ctx.tensors = [isinstance(i, Tensor) for i in inputs]
        ctx.rest = [None if isinstance(i, Tensor) else i for i in inputs]
        ctx.save_for_backward(*(i for i in inputs if isinstance(i, Tensor)))
        devices = {i.device.type for i in inputs if isinstance(i, Tensor)}
        ctx.autocast = [state for d in devices if (state := autocast_state(d)) is not None]
        ctx.set_materialize_grads(False)

        def results(function: Callable[..., Any], wide: bool) -> Sequence[Any]:
            """As in training: without a gradient in sight, a replacement may take another way."""
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                made = function(*_own(inputs, ctx.needs_input_grad[1:], wide))
            return [m.detach() for m in made]

        return tuple(verifier.compare(results, [f"result {i}" for i in range(_results(verifier.before))]))

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
        verifier: Verifier = ctx.verifier
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if t else r for t, r in zip(ctx.tensors, ctx.rest, strict=True)]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]

        def gradients(function: Callable[..., Any], wide: bool) -> Sequence[Any]:
            own = _own(inputs, ctx.needs_input_grad[1:], wide)
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.enable_grad())
                for state in ctx.autocast:
                    stack.enter_context(torch.autocast(**state))
                results = function(*own)
            pairs = [(r, g) for r, g in zip(results, incoming, strict=True) if g is not None and r.requires_grad]
            if not pairs:
                return [None] * len(wanted)
            results, given = zip(*((r, g.to(r.dtype)) for r, g in pairs), strict=True)
            return torch.autograd.grad(results, [own[i] for i in wanted], given, allow_unused=True)

        names = [f"the gradient of {verifier.names[i]}" for i in wanted]
        found = dict(zip(wanted, verifier.compare(gradients, names), strict=True))
        return None, *(found.get(i) for i in range(len(inputs)))


def _own(inputs: Sequence[Any], needed: Sequence[bool], wide: bool) -> list[Any]:
    """The inputs with a gradient history of their own."""
    made = [_widened(i) if wide else i for i in inputs]
    return [m.detach().requires_grad_(n) if isinstance(m, Tensor) else m for m, n in zip(made, needed, strict=True)]


def _results(module: fx.GraphModule) -> int:
    return len(next(n for n in module.graph.nodes if n.op == "output").args[0])


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


class _Wide(fx.Interpreter):
    """Runs a graph in float64, whatever dtypes it names."""

    def run_node(self, n: fx.Node) -> Any:
        return _widened(super().run_node(n))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(target, *fx.node.map_aggregate((args, kwargs), _widened))

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = "double" if target in ("float", "half", "bfloat16") else target
        return super().call_method(target, *fx.node.map_aggregate((args, kwargs), _widened))
