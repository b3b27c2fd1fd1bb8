"""Attention masks that one graph makes and another is given.

Where Dynamo breaks a graph (FSDP's hooks, DDP's buckets, Python in between), the layers get their mask as an input, of
which nothing can be read. So what a mask says is noted when the graph that made it returns it. A graph that is given
such a tensor is compiled for what that says, and asks at each call whether the tensor still says it; if not, the graph
is compiled as any other.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from . import _torch
from .elements import positions
from .elements import read as read_element
from .graph_terms import SAID, GraphTerms, call_name, value_of
from .log import warn_once
from .predicate import Unread, Value, portable
from .terms import Term
from .views import settle

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]

ATTENTION = "scaled_dot_product_attention"


def compiled(gm: fx.GraphModule, example_inputs: Sequence[Any], compiler: Compiler) -> Callable[..., Any]:
    """A graph, compiled by `compiler`, which notes what the masks say that it returns, and knows what those say that it
    is given."""
    noting = functools.partial(_noting, compiler=compiler)
    given = _unless_it_fails(masks_given, gm, example_inputs)
    if given is None:
        return noting(gm, example_inputs)
    informed = noting(given.informed, given.examples(example_inputs))

    @functools.cache
    def general() -> Callable[..., Any]:
        return torch.compile(gm, backend=noting)

    def run(*inputs: Any) -> Any:
        said = {i: said_of(inputs[i]) for i in given.said}
        alike = all(s is not None and s.is_like(given.said[i]) for i, s in said.items())
        known = given.inputs(inputs, said) if alike else None
        return general()(*inputs) if known is None else informed(*known)

    return run


def _noting(gm: fx.GraphModule, example_inputs: Sequence[Any], compiler: Compiler) -> Callable[..., Any]:
    made = _unless_it_fails(masks_made, gm)
    if made is None:
        return compiler(gm, example_inputs)
    run = compiler(made.graph, example_inputs)

    def note(*inputs: Any) -> Any:
        results = run(*inputs)
        tensors = [*inputs, *results]
        for each in made.masks:
            mask, read = results[each.place], tuple(tensors[i] for i in each.inputs)
            if all(_torch.is_plain_tensor(t) and not t.is_inference() for t in (mask, *read)):
                _SAID[mask] = Said.by(mask, each.value, read)
        return results[: made.results]

    return note


def _unless_it_fails(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives at which no model must break."""
    try:
        return function(*args)
    except Exception as error:
        warn_once(f"masks from other graphs are not looked at: {type(error).__name__}: {error}")
        return None


@dataclass(frozen=True, eq=False)
class Said:
    """What a mask says, or integers that masks are made of, as long as neither it nor what it reads is written to."""

    value: Value
    """An element by its position, b, h, q and k or the last of these, whatever their extents, and by elements of
    `tensors`, which are named by their places."""
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def by(cls, mask: Tensor, value: Value, tensors: tuple[Tensor, ...]) -> Said:
        return cls(value, tensors, tuple(t._version for t in (mask, *tensors)))

    def holds(self, mask: Tensor) -> bool:
        return self.versions == tuple(t._version for t in (mask, *self.tensors))

    def is_like(self, other: Said) -> bool:
        """Whether a graph that is compiled for one takes the other."""
        return self.value == other.value and [*map(_kind, self.tensors)] == [*map(_kind, other.tensors)]


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


_SAID = WeakTensorKeyDictionary()
"""What masks say that compiled graphs have returned: `Said` by tensor."""


def said_of(value: Any) -> Said | None:
    said = _SAID.get(value) if isinstance(value, Tensor) else None
    return said if said is not None and said.holds(value) else None


# ---- a graph that makes masks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mask:
    """One among the results of a graph."""

    place: int
    value: Value
    inputs: tuple[int, ...]
    """The places of the tensors that it reads, among the inputs of the graph and, behind these, its results."""


@dataclass(frozen=True)
class Made:
    """A graph that returns masks which can be read."""

    masks: list[Mask]
    graph: fx.GraphModule
    """The graph, whose further results are what it computes and the masks read."""
    results: int
    """How many results the graph has without those."""


def masks_made(gm: fx.GraphModule) -> Made | None:
    """The masks that a graph returns, as far as they can be read; None if there are none."""
    results = _results(gm)
    places = [i for i, node in enumerate(results) if _may_be_mask(node)]
    if not places:
        return None
    gm = _torch.copy_module(gm)
    settle(gm.graph)
    view = GraphTerms.view(gm.graph)
    (output,) = gm.graph.find_nodes(op="output")
    known = [*gm.graph.find_nodes(op="placeholder"), *output.args[0]]
    found = []
    for i in places:
        read: list[fx.Node] = []
        mask = view.read(output.args[0][i], output)  # as it is there, which may be behind a write

        def place_of(tensor: Term, read: list[fx.Node] = read, mask: Term = mask) -> int:
            node = view.carriers[tensor][0]
            if len(tensor.shape) > 2 or view.is_written(node):
                raise Unread("reads something for every pair, or something that is written to")
            if node.op != "placeholder" and not _is_small(tensor, mask):
                raise Unread("reads what would be held for it alone")
            if node not in read:
                read.append(node)
            return read.index(node)

        with contextlib.suppress(Unread):
            value = portable(read_element(view, mask, positions(mask.shape, "bhqk"[4 - len(mask.shape) :])), place_of)
            if read and mask.dtype is not torch.bool:
                continue  # of what else is read, nothing is gained
            known += [n for n in read if n not in known]
            found.append(Mask(i, value, tuple(map(known.index, read))))
    inputs = len(gm.graph.find_nodes(op="placeholder"))
    output.args = (tuple(known[inputs:]),)
    gm.recompile()
    return Made(found, gm, len(results)) if found else None


def _is_small(tensor: Term, mask: Term) -> bool:
    """Whether a tensor is certain to have at most half as many elements as a mask."""
    known = all(isinstance(n, int) for n in (*tensor.shape, *mask.shape))
    return known and 2 * math.prod(tensor.shape) <= math.prod(mask.shape)


def _results(gm: fx.GraphModule) -> Sequence[Any]:
    (output,) = gm.graph.find_nodes(op="output")
    return output.args[0] if isinstance(output.args[0], (tuple, list)) else ()


def _may_be_mask(node: Any) -> bool:
    """Truth values for a query and a key at least; or integers that masks may be made of, such as position ids."""
    value = value_of(node) if isinstance(node, fx.Node) and node.op != "placeholder" else None
    if not isinstance(value, Tensor):
        return False
    return 2 <= value.ndim <= 4 if value.dtype is torch.bool else 1 <= value.ndim <= 2 and value.dtype in INTEGERS


INTEGERS = (torch.int64, torch.int32)


# ---- a graph that is given masks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """A graph that is given masks of which something is known."""

    said: dict[int, Said]
    """By the places of the masks among its inputs."""
    informed: fx.GraphModule
    """The graph, with that noted at the masks, and with what these read as further inputs, where it is not given it."""
    reads: tuple[tuple[int, int, int], ...]
    """(which mask, which of its tensors, the place of that among all inputs)."""

    def examples(self, given: Sequence[Any]) -> list[Any]:
        """What the informed graph is compiled with."""
        inputs = self.inputs(given, self.said)
        return [*given, *map(_torch.static_example, inputs[len(given) :])]

    def inputs(self, given: Sequence[Any], said: dict[int, Said]) -> list[Any] | None:
        """Those of the informed graph, where masks say that; None if it was not compiled for them."""
        found = list(given)
        for i, j, place in self.reads:
            if place == len(found):
                found.append(said[i].tensors[j])
            elif found[place] is not said[i].tensors[j]:  # one tensor when it was compiled, now two
                return None
        return found


def masks_given(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Given | None:
    """None if nothing is known of a graph's inputs, or it has neither attention nor masks that may read them."""
    said = {i: s for i, s in enumerate(map(said_of, example_inputs)) if s is not None} if len(_SAID) else {}
    if not said or not (_attends(gm) or any(map(_may_be_mask, _results(gm)))):
        return None
    return Given(said, *_informed(gm, example_inputs, said))


def _attends(gm: fx.GraphModule) -> bool:
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return any(n.op == "call_function" and call_name(n.target) == ATTENTION for g in graphs for n in g.nodes)


def _informed(
    gm: fx.GraphModule, example_inputs: Sequence[Any], given: dict[int, Said]
) -> tuple[fx.GraphModule, tuple[tuple[int, int, int], ...]]:
    """`Given.informed` and `Given.reads`."""
    gm = _torch.copy_module(gm)
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    places = {id(example): place for place, example in enumerate(example_inputs)}
    reads = []
    for i, said in given.items():
        for j, tensor in enumerate(said.tensors):
            if id(tensor) not in places:
                with gm.graph.inserting_after(inputs[-1]):
                    added = gm.graph.placeholder(f"{inputs[i].name}_reads_{j}")
                added._dynamo_source = None  # as of the inputs of DDP's pieces
                added.meta["example_value"] = _torch.as_fake(tensor, value_of(inputs[i]))
                places[id(tensor)] = len(inputs)
                inputs.append(added)
            reads.append((i, j, places[id(tensor)]))
        inputs[i].meta[SAID] = said.value, tuple(inputs[places[id(t)]].name for t in said.tensors)
    gm.recompile()
    return gm, tuple(reads)
