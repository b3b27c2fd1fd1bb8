"""Steps in place on tensors that a graph makes, as steps that give new tensors, so that they can be part of a match.

`logits.div_(t)` becomes `logits.div(t)`, and what reads `logits` behind it reads that. AOTAutograd does the same to all
writes later; here it is done to those where it takes no more than to read another node.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from . import _torch
from .emit import same_layout
from .graph_terms import INPLACE_FLAG, call_name, value_of
from .regions import Region, regions

_OPERATORS = {getattr(operator, f"i{name}"): getattr(operator, name) for name in ("add", "sub", "mul", "truediv")}
_METHODS = frozenset(
    (
        *("add", "sub", "mul", "div", "neg", "square", "sqrt", "tanh", "sigmoid", "relu"),
        *("clamp", "clamp_min", "clamp_max"),
    )
)
_WIDE = frozenset({"exp", "pow", "reciprocal", "rsqrt"})
"""Those that autocast computes in float32 when they give a new tensor, and not in place."""

_FUNCTIONS = frozenset({torch.nn.functional.silu, torch.nn.functional.relu, torch.nn.functional.mish})
"""Those that take `inplace`."""

_VIEWS = frozenset(
    (
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "t", "contiguous"),
        *("getitem", "select", "narrow", "movedim", "swapaxes", "view_as", "reshape_as", "dropout"),
        *("to", "type", "type_as", "float", "half", "bfloat16"),
    )
)
"""Calls that give a view, or the tensor itself, through which gradients flow as through a copy: not `detach`."""


def outplaced(graph: fx.Graph, region: Region) -> None:
    """Rewrites what steps in place it can. The graph is entered with the given modes on; nodes keep their names."""
    steps = [node for node in graph.nodes if _is_step(node)]
    if not steps:
        return
    position = {node: i for i, node in enumerate(graph.nodes)}
    region_of = regions(graph, region)
    sharing: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        for storage in {_torch.storage_key(t) for t in _tensors(value_of(node))}:
            sharing.setdefault(storage, []).append(node)
    made: set[fx.Node] = set()
    for step in steps:
        x = step.args[0]
        aliases = [n for n in sharing[_torch.storage_key(value_of(x))] if position[n] < position[step]]
        alone = all(_reads_nothing(n, position[step], position) for n in aliases if n is not x)
        local = all(n in made or _is_local(n, aliases) for n in aliases)
        here = region_of[step]
        same = not here.is_transformed and all(region_of[n] == here for n in aliases)
        if alone and local and same and _has_one_dtype(step, here) and _outplace(step):
            made.add(step)
            for user in [u for u in x.users if position[u] > position[step]]:
                user.replace_input_with(x, step)


def _is_step(node: fx.Node) -> bool:
    return (
        _plain(node) is not None
        and isinstance(node.args[0], fx.Node)
        and isinstance(value_of(node.args[0]), torch.Tensor)
    )


def _plain(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """The call that gives what this one writes into its first argument: target, arguments."""
    args, kwargs, target = node.args, dict(node.kwargs), node.target
    if not args or "out" in kwargs:
        return None
    if node.op == "call_method":
        return (target[:-1], args, kwargs) if target.endswith("_") and target[:-1] in _METHODS | _WIDE else None
    if node.op != "call_function":
        return None
    if target in _OPERATORS:
        return _OPERATORS[target], args, kwargs
    if target not in _FUNCTIONS:
        return None
    at = INPLACE_FLAG[target.__name__]
    written = kwargs.pop("inplace", False) or (len(args) > at and args[at])
    return (target, args[:at], kwargs) if written else None


def _tensors(value: Any) -> list[torch.Tensor]:
    return [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, torch.Tensor)]


def _reads_nothing(alias: fx.Node, limit: int, position: dict[fx.Node, int]) -> bool:
    """Whether nobody behind a place reads memory through an alias of it."""
    return all(position[user] <= limit for user in alias.users)


def _is_local(node: fx.Node, aliases: list[fx.Node]) -> bool:
    """Whether a node makes its memory, or gives a view of some."""
    if node.op not in ("call_function", "call_method"):
        return False
    return call_name(node.target) in _VIEWS or not any(i in aliases for i in node.all_input_nodes)


def _has_one_dtype(step: fx.Node, region: Region) -> bool:
    """Whether autocast, as the graph has it, gives a new tensor the dtype that the step keeps."""
    wide = step.op == "call_method" and step.target[:-1] in _WIDE
    return not (wide and region.autocast) or value_of(step.args[0]).dtype is torch.float32


def _outplace(step: fx.Node) -> bool:
    """Makes of a step in place the call that gives a new tensor, if that is of the same kind and layout.

    What is recorded of the value stays, as does what is recorded of views of it: that their memory is shared is then
    taken for true where it no longer is, which forbids more than it need.
    """
    before, old = (step.target, step.args, step.kwargs), value_of(step.args[0])
    step.target, step.args, step.kwargs = _plain(step)
    try:
        new = _torch.run_on_fakes(step, value_of)
    except Exception:  # dtypes that it takes in place alone
        new = None
    if new is not None and new.dtype is old.dtype and _torch.same_sizes(new.shape, old.shape) and same_layout(new, old):
        return True
    step.target, step.args, step.kwargs = before
    return False
