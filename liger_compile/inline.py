"""Ops as the kernels that they start, for a compiler that starts these itself.

Called as an op, a kernel costs the dispatcher, the launcher that lays out strides and blocks, and Triton's way from
Python to the device, each time: on small tensors more than the kernel takes. All that follows from shapes, so that it
can happen once, at compile time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import _torch
from .kernels.launch import Launch, launches_of


class NotLaunchesAlone(Exception):
    """A launcher also computes something with tensors; the message says what."""


class _OnlyMemory(TorchDispatchMode):
    """Lets nothing pass but what makes tensors without values, views, and questions about types."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        has_values = any("Tensor" in str(r.type) for r in returns) and "empty" not in func._schema.name
        if func._schema.is_mutable or (has_values and not is_view):
            raise NotLaunchesAlone(func.name())
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Program:
    """What a launcher does: the tensors that it makes, without data, and the kernels that write them."""

    made: tuple[Tensor, ...]
    """Each whole, those of the results first."""
    launches: tuple[Launch, ...]
    results: Any
    """As the launcher returns them."""


def program(launcher: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """The program of a call with tensors that have no data.

    Raises:
        NotLaunchesAlone: it does more than start kernels, or a result is an operand.
    """
    with _OnlyMemory():
        results, launches = launches_of(launcher, *args, **kwargs)
    given = {_torch.storage_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    made: dict[int, Tensor] = {}
    for t in (*tree_leaves(results), *(a for each in launches for a in each.arguments.values())):
        if isinstance(t, Tensor) and _torch.storage_key(t) not in given:
            made.setdefault(_torch.storage_key(t), t if t._base is None else t._base)
    if any(_torch.storage_key(t) in given for t in tree_leaves(results)):
        raise NotLaunchesAlone("a result that is an operand")
    return Program(tuple(made.values()), tuple(launches), results)
