"""The modes that the nodes of a graph run under: whether gradients are recorded, autocast, functorch's transforms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from . import _torch

Context = tuple[Callable[..., Any], tuple[Any, ...]]
"""The call that enters a mode, and its arguments."""


@dataclass(frozen=True)
class Region:
    """The modes a node runs under, outermost first."""

    grad: bool = True
    contexts: tuple[Context, ...] = ()

    @property
    def autocast(self) -> tuple[Context, ...]:
        return tuple(c for c in self.contexts if _is_autocast(c))

    @property
    def is_transformed(self) -> bool:
        """By functorch: whether a tensor may stand for several (vmap), or be something else than it seems (grad)."""
        return any("nesting" in enter.__name__ for enter, _ in self.contexts)

    def without_autocast(self) -> Region:
        return dataclasses.replace(self, contexts=tuple(c for c in self.contexts if not _is_autocast(c)))


def _is_autocast(context: Context) -> bool:
    return context[0] is _torch.autocast_calls()[0]


def regions(graph: fx.Graph, region: Region) -> dict[fx.Node, Region]:
    """The modes that each node runs under, of a graph that is entered with the given ones on."""
    found = {}
    for node in graph.nodes:
        region = found[node] = _region_after(node, region)
    return found


def _region_after(node: fx.Node, region: Region) -> Region:
    """Follows the calls by which Dynamo enters and leaves grad modes, autocast and functorch levels."""
    if node.op != "call_function":
        return region
    name = getattr(node.target, "__name__", "")
    if name == "_set_grad_enabled":
        return Region(bool(node.args[0]), region.contexts)
    if name.startswith("_enter_") or name.endswith("_increment_nesting"):
        return Region(region.grad, (*region.contexts, (node.target, node.args)))
    if name.startswith("_exit_") or name.endswith("_decrement_nesting"):
        return Region(region.grad, region.contexts[:-1])
    return region


def copy_under_autocast(
    nodes: Iterable[fx.Node], region_of: Mapping[fx.Node, Region], graph: fx.Graph, copies: dict[fx.Node, fx.Node]
) -> None:
    """Copies nodes into a graph that is entered outside of them, in their order, each under the autocast that it has.

    `copies` has what they read, and gets what they become.
    """
    entered: list[tuple[Context, fx.Node]] = []

    def leave(kept: int) -> None:
        while len(entered) > kept:
            graph.call_function(_torch.autocast_calls()[1], (entered.pop()[1],))

    for node in nodes:
        wanted = region_of[node].autocast
        kept = 0
        while kept < min(len(entered), len(wanted)) and entered[kept][0] == wanted[kept]:
            kept += 1
        leave(kept)
        for context in wanted[kept:]:
            entered.append((context, graph.call_function(*context)))
        copies[node] = graph.node_copy(node, copies.__getitem__)
    leave(0)
