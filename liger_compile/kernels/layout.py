"""Addressing tensors by rows: what the kernels' launchers share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _torch


def collapse(shape: Sequence[int], *strides: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """The fewest dimensions that address several tensors of one shape: (sizes, each tensor's strides)."""
    sizes: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    for dim in range(len(shape) - 1, -1, -1):
        if shape[dim] == 1:
            continue
        if sizes and all(s[dim] == k[0] * sizes[0] for s, k in zip(strides, kept, strict=True)):
            sizes[0] *= shape[dim]
            continue
        sizes.insert(0, shape[dim])
        for s, k in zip(strides, kept, strict=True):
            k.insert(0, s[dim])
    return sizes, kept


def rows(*tensors: Tensor, dims: int) -> tuple[list[int], list[list[int]]] | None:
    """Sizes and strides of all dimensions but the last, as exactly `dims`; None if they need more, or if a last
    dimension is not contiguous."""
    if any(t.stride(-1) != 1 and t.shape[-1] > 1 for t in tensors):
        return None
    sizes, strides = collapse(tensors[0].shape[:-1], *(t.stride()[:-1] for t in tensors))
    if len(sizes) > dims:
        return None
    missing = dims - len(sizes)
    return [1] * missing + sizes, [[0] * missing + s for s in strides]


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; a small number where kernels are only interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def unit(*sizes: int) -> int:
    """The most elements, up to 8, that all of several sizes are multiples of; a compiler may not know all of them."""
    return next((n for n in (8, 4, 2) if all(_torch.constant(size % n) == 0 for size in sizes)), 1)


def least(a: int, b: int) -> int:
    """The lesser of two sizes, either of which a compiler may not know yet."""
    return torch.sym_min(a, b)


def alike(*sizes: Sequence[int]) -> bool:
    """Whether several sizes are the same; a compiler may not know them, so that they cannot be members of a set."""
    return all(a == b for each in sizes[1:] for a, b in zip(sizes[0], each, strict=True))
