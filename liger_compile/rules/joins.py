"""Calls that make one tensor of several."""

from __future__ import annotations

from typing import Any

from ..terms import Term, same
from .base import Call, NotCanonical, cast, infer_dtype, negative_dim, rule, widens
from .losses import joined_losses


@rule("cat", "concat", "concatenate")
def cat(c: Call, tensors: Any, dim: int = 0) -> Term:
    parts = tuple(p for p in tensors if not same(p.shape, (0,))) or tuple(tensors)  # such a part may lack dimensions
    if c.shape is not None and len(c.shape) == 1 and (losses := joined_losses(c, parts)) is not None:
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
    if dim == -2 and c.shape is not None and len(c.shape) == 2 and (losses := joined_losses(c, parts)) is not None:
        return losses
    inner = {p.args[0].dtype for p in parts if p.op == "cast"}
    if all(widens(p) for p in parts) and len(inner) == 1:  # stack(cast(x), cast(y)) -> cast(stack(x, y))
        whole = c.step("stack", tuple(p.args[0] for p in parts), dim, dtype=inner.pop(), shape=c.shape)
        return cast(c, whole, parts[0].args[1])
    return c.step("stack", parts, dim, dtype=c.dtype or infer_dtype("stack", parts), shape=c.shape)
