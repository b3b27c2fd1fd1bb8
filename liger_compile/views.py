"""Calls that change the shape of a tensor in place, as calls that give another tensor.

Dynamo records one example value for all that a variable is during its life, of the shape that it has in the end: of
`a = torch.ones(4, 6)`, `b = a + 1`, `a.unsqueeze_(1)` it says that `a` is [4, 1, 6], from the first call on.
"""

from __future__ import annotations

import torch
from torch import fx

from . import _torch
from .graph_terms import value_of

_IN_PLACE = frozenset({"unsqueeze_", "squeeze_", "transpose_", "t_", "swapaxes_", "swapdims_"})


def settle(graph: fx.Graph) -> None:
    """Writes `a.unsqueeze_(1)` as `a.unsqueeze(1)`, which is read instead of `a` from there on, and records the shape
    that each has."""
    made: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if isinstance(value_of(node), torch.Tensor):
            made.setdefault(id(value_of(node)), []).append(node)
    for nodes in made.values():
        if nodes[0].op in ("call_function", "call_method") and any(map(_is_view, nodes)):
            _settle(graph, nodes)


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target in _IN_PLACE


def _settle(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Does so for the nodes that are one tensor."""
    value = _as_made(nodes[0])
    instead: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        _read_instead(node, instead)
        if node in nodes:
            if _is_view(node):
                node.target = node.target.removesuffix("_")
                value = _torch.run_on_fakes(node, value_of)
                instead = dict.fromkeys(nodes[: nodes.index(node)], node)
            _record(node, value)


def _read_instead(node: fx.Node, instead: dict[fx.Node, fx.Node]) -> None:
    node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda n: instead.get(n, n))


def _as_made(node: fx.Node) -> torch.Tensor:
    """The example value of a tensor before its shape was changed, on the storage that it has."""
    last, first = value_of(node), _torch.run_on_fakes(node, value_of)
    with torch.no_grad():
        return last.as_strided(first.shape, first.stride(), first.storage_offset())


def _record(node: fx.Node, value: torch.Tensor) -> None:
    name = "example_value" if "example_value" in node.meta else "val"
    node.meta[name] = value.requires_grad_(value_of(node).requires_grad)
