"""Elements and parts by an index."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import _torch
from ..terms import PatternError, Term, arith, same, size
from .base import Call, NotCanonical, cast, negative_dim, rule, unwidened
from .losses import counts_to, pick
from .rows import has_rows
from .views import reshape_to, select, slice_, unsqueeze


def _bounds(x: Term, dim: int, part: slice) -> tuple[Any, Any, Any]:
    """The bounds of a slice, from the front and within the extent."""
    n = size(x, dim)
    step = 1 if part.step is None else part.step
    if not isinstance(step, int) or step < 1:
        raise NotCanonical("has a step that is not a positive number")

    def bound(value: Any, default: Any) -> Any:
        if value is None:
            return default
        if isinstance(value, int) and isinstance(n, int):
            return max(0, min(n, value + n if value < 0 else value))
        if isinstance(value, int) and value < 0:
            return arith("add", n, value)
        return value

    return bound(part.start, 0), bound(part.stop, n), step


@rule("getitem")
def getitem(c: Call, x: Any, index: Any) -> Any:
    if isinstance(x, tuple):
        return x[index]
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(i, (Term, list, bool, range, torch.Tensor)) for i in items):
        return _looked_up(c, x, items)
    taken = sum(i is not None and i is not Ellipsis for i in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    at = items.index(Ellipsis)
    tail = [i for i in items[at + 1 :] if i is not None]
    if x.shape is not None:
        items[at : at + 1] = [slice(None)] * (len(x.shape) - taken)
        dims = range(-len(x.shape), 0)
    else:
        if any(i is not None and i != slice(None) for i in items[:at]) or None in items[:at]:
            raise PatternError("indexes from the front: in a pattern, index from the back (x[..., i])")
        items = items[at + 1 :]
        dims = range(-len(tail), 0)
    named = list(zip(dims, [i for i in items if i is not None], strict=True))
    out = x
    for dim, item in named:
        if isinstance(item, slice):
            out = slice_(c, out, dim, *_bounds(x, dim, item))
    for dim, item in named:  # ascending: a dropped dimension leaves those behind it in place
        if not isinstance(item, slice):
            negative = isinstance(item, int) and item < 0
            out = select(c, out, dim, arith("add", size(x, dim), item) if negative else item)
    if None in items:
        if c.shape is not None:
            return reshape_to(c, out, c.shape)
        behind = [i for i in items if i is None or isinstance(i, slice)]
        for i in [i for i, item in enumerate(behind) if item is None]:
            out = unsqueeze(c, out, i - len(behind))
    return out


@rule("slice")
def _aten_slice(c: Call, x: Term, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Term:
    dim = negative_dim(x, dim)
    end = None if isinstance(end, int) and end > 2**62 else end
    return slice_(c, x, dim, *_bounds(x, dim, slice(start, end, step)))


@rule("select")
def _select(c: Call, x: Term, dim: int, index: Any) -> Term:
    dim = negative_dim(x, dim)
    return select(c, x, dim, arith("add", size(x, dim), index) if isinstance(index, int) and index < 0 else index)


@rule("narrow")
def _narrow(c: Call, x: Term, dim: int, start: Any, length: Any) -> Term:
    return slice_(c, x, negative_dim(x, dim), start, arith("add", start, length))


@rule("gather")
def _gather(c: Call, x: Term, dim: Any, index: Term, *, sparse_grad: Any = False) -> Term:
    """One element of each row of log-probabilities, or of a linear layer's outputs."""
    if negative_dim(x, dim) != -1 or sparse_grad:
        raise NotCanonical("takes more than one element of each row")
    if c.shape is None:
        if index.op != "reshape":
            raise PatternError("takes elements by an index that is not index.unsqueeze(-1)")
        index = index.args[0]
    else:
        rows = x.shape[:-1]
        if not rows or len(index.shape) != len(x.shape) or not same(index.shape[-1], 1):
            raise NotCanonical("takes more than one element of each row")
        if not all(map(_torch.known_equal, index.shape, rows)):  # asked last: it guards sizes
            raise NotCanonical("takes elements of some rows")
        index = reshape_to(c, index, (math.prod(rows),))
    return pick(c, x, index)


def _looked_up(c: Call, x: Term, items: list[Any]) -> Term:
    """x[arange(n), index], where a negative index counts from the end."""
    if x.shape is None or len(x.shape) != 2 or len(items) != 2 or not isinstance(items[1], Term):
        raise NotCanonical("indexes with data")
    positions, index = items
    if index.dtype not in (torch.int64, torch.int32) or len(index.shape) != 1 or not has_rows(unwidened(x)):
        raise NotCanonical("indexes with data")
    n, classes = x.shape
    if not (counts_to(positions, n) and _torch.known_equal(index.shape[0], n)):
        raise NotCanonical("takes elements of some rows")
    index = cast(c, index, torch.int64)
    return pick(c, x, c.terms.make("from_end", (index, classes), index.dtype, index.shape))


@rule("take_along_dim")
def _take_along_dim(c: Call, x: Term, indices: Term, dim: Any = None) -> Term:
    if indices.shape is not None and not same(indices.shape, c.shape):
        raise NotCanonical("broadcasts its index")
    return _gather(c, x, dim, indices)
