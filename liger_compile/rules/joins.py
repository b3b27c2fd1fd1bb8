"""Calls that make one tensor of several."""

from __future__ import annotations

import itertools
from typing import Any

from ..terms import Term, same
from .base import Call, NotCanonical, cast, infer_dtype, negative_dim, rule, unwidened, widens
from .rows import is_losses
from .views import reshape_to, slice_


@rule("cat", "concat", "concatenate")
def cat(c: Call, tensors: Any, dim: int = 0) -> Term:
    parts = tuple(p for p in tensors if not same(p.shape, (0,))) or tuple(tensors)  # such a part may lack dimensions
    if c.shape is not None and len(c.shape) == 1 and (losses := _joined_losses(c, parts)) is not None:
        return losses
    dim = negative_dim(parts[0], dim)
    inner = {p.args[0].dtype for p in parts if p.op == "cast"}
    if all(widens(p) for p in parts) and len(inner) == 1:  # cat(cast(x), cast(y)) -> cast(cat(x, y))
        whole = c.step("cat", tuple(p.args[0] for p in parts), dim, dtype=inner.pop(), shape=c.shape)
        return cast(c, whole, parts[0].args[1])
    return c.step("cat", parts, dim, dtype=c.dtype or infer_dtype("cat", parts), shape=c.shape)


@rule("hstack")
def _hstack(c: Call, tensors: Any) -> Term:
    ranks = {None if p.shape is None else len(p.shape) for p in tensors}
    if len(ranks) != 1 or ranks & {None, 0}:
        raise NotCanonical("joins tensors of several ranks")
    return cat(c, tensors, 0 if ranks == {1} else 1)


@rule("stack")
def _stack(c: Call, tensors: Any, dim: int = 0) -> Term:
    parts = tuple(tensors)
    if isinstance(dim, int) and dim >= 0 and parts[0].shape is not None:
        dim -= len(parts[0].shape) + 1
    if dim == -2 and c.shape is not None and len(c.shape) == 2 and (losses := _joined_losses(c, parts)) is not None:
        return losses
    inner = {p.args[0].dtype for p in parts if p.op == "cast"}
    if all(widens(p) for p in parts) and len(inner) == 1:  # stack(cast(x), cast(y)) -> cast(stack(x, y))
        whole = c.step("stack", tuple(p.args[0] for p in parts), dim, dtype=inner.pop(), shape=c.shape)
        return cast(c, whole, parts[0].args[1])
    return c.step("stack", parts, dim, dtype=c.dtype or infer_dtype("stack", parts), shape=c.shape)


# ---- losses of rows, some at a time ----------------------------------------------------------------------------------

_WITH_ROWS = {"cast": 1, "mul": 1, "tanh": 1, "neg": 1, "linear": 1, "logsumexp": 1, "cross_entropy": 2, "pick": 2}
"""How many arguments, the first ones, have the rows of the result; the others are of all rows."""


def _joined(c: Call, parts: tuple[Term, ...]) -> Term | None:
    """What the parts are slices of, or its elements along the first dimension one after another, through what is done
    to each row."""
    first = parts[0]
    if any(p.op != first.op or len(p.args) != len(first.args) for p in parts):
        return None
    if first.op in ("slice", "select"):
        return _joined_pieces(c, parts)
    with_rows = _WITH_ROWS.get(first.op, 0)
    arguments = list(zip(*(p.args for p in parts), strict=True))
    if not with_rows or not all(
        same(a, several[0]) or a is several[0] for several in arguments[with_rows:] for a in several
    ):
        return None
    rows = [_joined(c, several) for several in arguments[:with_rows]]
    if None in rows or not all(same(r.shape[0], rows[0].shape[0]) for r in rows):
        return None
    return c.terms.make(first.op, (*rows, *first.args[with_rows:]), first.dtype, (rows[0].shape[0], *first.shape[1:]))


def _is_one(several: tuple[Any, ...]) -> bool:
    return all(a is several[0] or same(a, several[0]) for a in several)


def _joined_pieces(c: Call, parts: tuple[Term, ...]) -> Term | None:
    x, dim, start = parts[0].args[:3]
    if dim != -len(x.shape) or any(p.args[0] is not x or p.args[1] != dim for p in parts):
        return None
    if parts[0].op == "select":
        if [p.args[2] for p in parts] != list(range(len(parts))) or not same(x.shape[0], len(parts)):
            return None
        return reshape_to(c, x, (x.shape[0] * x.shape[1], *x.shape[2:]))
    ends = [p.args[2:4] for p in parts]
    if any(p.args[4] != 1 for p in parts) or not all(same(a[1], b[0]) for a, b in itertools.pairwise(ends)):
        return None
    return slice_(c, x, dim, start, ends[-1][1])


def _joined_losses(c: Call, parts: tuple[Term, ...]) -> Term | None:
    """The losses of rows that were computed some at a time -> those of all rows, in the shape of the call's result."""
    if c.shape is None or len(parts) < 2 or unwidened(parts[0]).op not in ("cross_entropy", "logsumexp", "neg"):
        return None
    rows = _joined(c, parts)
    return None if rows is None or not _is_of_rows(rows) else reshape_to(c, rows, c.shape)


def _is_of_rows(x: Term) -> bool:
    x = unwidened(x.args[0] if x.op == "neg" else x)
    return x.op == "logsumexp" or is_losses(x)
