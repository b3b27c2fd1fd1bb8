"""Starting kernels, or writing down which would be started: a compiler starts them with less host time than Python."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import triton.language as tl


@dataclass(frozen=True)
class Launch:
    """A kernel, and what it is started with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By the names of the kernel's parameters: tensors, numbers, None, and what is compiled in."""
    num_warps: int


_noted: ContextVar[list[Launch] | None] = ContextVar("noted launches", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """Starts `kernel` on the current stream; inside of `launches_of`, writes it down instead."""
    noted = _noted.get()
    if noted is None:
        kernel[grid](*args, **constants, num_warps=num_warps)
        return
    names = inspect.signature(kernel.fn).parameters
    constants = {k: v.value if isinstance(v, tl.constexpr) else v for k, v in constants.items()}
    arguments = dict(zip(names, args, strict=False)) | constants
    noted.append(Launch(kernel, grid, arguments, num_warps))


def launches_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[Launch]]:
    """What `function` returns, and the kernels it would start; its tensors may have no data."""
    noted: list[Launch] = []
    token = _noted.set(noted)
    try:
        return function(*args, **kwargs), noted
    finally:
        _noted.reset(token)
