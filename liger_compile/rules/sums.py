"""Sums over rows: of their losses, or of the squares of their log-sum-exp, each times a weight.

A number is made of them, so that their gradients are known when they are computed.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..terms import Term, same
from .base import Call, cast, is_tensor, widens
from .losses import logsumexp_of_head
from .rows import flat, is_losses
from .written_out import times_number

DEPTH = 12
"""How many steps there may be between the rows and their sum."""


def sum_of_rows(c: Call, x: Term, mean: bool) -> Term | None:
    """sum(x) -> sum_of_losses(losses, weights, factor), or sum_of_squares(lse, weights, factor), or both added, if x is
    made of these by steps that twice as much of them makes twice as large. Rows and weights are flat."""
    factor = _share(x.shape) if mean else 1.0
    return None if factor is None or not leads_to_rows(x) else _total(c, x, None, factor)


def scaled_sum(c: Call, x: Term, y: Any) -> Term | None:
    """sum_of_losses(losses, weights, factor) * y -> one of other weights or another factor, if y is one number."""
    if is_tensor(y) and y.op.startswith("sum_of_"):
        x, y = y, x
    if not x.op.startswith("sum_of_"):
        return None
    rows, weights, factor = x.args
    if is_tensor(y):
        if c.shape is None or not same(y.shape, ()):
            return None
        weights = _reshaped(c, _product(c, weights, y, rows.shape), rows.shape, rows.shape)
    else:
        factor = times_number(factor, y)
    return None if factor is None else c(x.op, rows, weights, factor)


def plus_squares(c: Call, x: Term, y: Term) -> Term | None:
    """loss + sum_of_squares(..) -> plus_squares(loss, sum_of_squares(..)), to be found among all sums"""
    x, y = (y, x) if x.op == "sum_of_squares" else (x, y)
    return c("plus_squares", _as_sum_of_losses(c, x), y) if y.op == "sum_of_squares" else None


def _as_sum_of_losses(c: Call, x: Term) -> Term:
    """k cross_entropy(z, y, "sum") -> sum_of_losses(.., k)"""
    scaled = x.op == "mul" and isinstance(x.args[0], Term)
    loss = x.args[0] if scaled else x
    if loss.op != "cross_entropy" or loss.args[4] != "sum":
        return x
    logits, *rest, _, smoothing = loss.args
    rows = c.step("cross_entropy", logits, *rest, "none", smoothing, like=loss, shape=logits.shape[:1])
    total = c.step("sum_of_losses", rows, None, 1.0, like=loss)
    return (scaled_sum(Call(c.terms, x.dtype, x.shape), total, x.args[1]) or x) if scaled else total


def leads_to_rows(x: Term, depth: int = DEPTH) -> bool:
    """Whether there are losses of rows, or squares, behind steps of that kind."""
    return _rows(x) is not None or (depth > 0 and any(leads_to_rows(a, depth - 1) for a in _linear_in(x)))


def _rows(x: Term) -> tuple[str, Term] | None:
    """The name of their sum and the flat rows, if that is what x is, in any shape."""
    if is_losses(x):
        return "sum_of_losses", x
    if x.op == "square" and (lse := flat(x.args[0])).op == "logsumexp":
        return "sum_of_squares", lse
    return None


def _linear_in(x: Term) -> list[Term]:
    """What x would be twice of if that were twice as large, and everything else as it is."""
    if x.op in ("neg", "reshape") or widens(x) or (x.op in ("sum", "mean") and isinstance(x.args[1], int)):
        return [x.args[0]]
    if x.op in ("mul", "add"):
        return [a for a in x.args if is_tensor(a)]
    if x.op == "call" and x.args[0] == "where" and len(x.args) == 4 and same(x.args[3], 0):
        return [x.args[2]] if is_tensor(x.args[2]) else []
    if x.op == "call" and x.args[0] == "masked_fill" and same(x.args[3], 0):
        return [x.args[1]]
    return []


def _total(c: Call, x: Term, weights: Term | None, factor: float) -> Term | None:
    """factor * sum(weights * x)"""
    if (found := _rows(x)) is not None:
        op, rows = found
        rows = logsumexp_of_head(c, rows) if op == "sum_of_squares" else rows
        return c(op, rows, _reshaped(c, weights, x.shape, rows.shape), factor)
    inner = [a for a in _linear_in(x) if leads_to_rows(a)]
    if x.op in ("mul", "add", "call") and not all(same(x.shape, a.shape) for a in inner):
        return None  # each of them is taken several times
    if x.op == "add":
        parts = [_total(c, a, weights, factor) for a in inner]
        if len(parts) != 2 or None in parts:
            return None
        return plus_squares(c, *parts) or c("add", *parts)
    if x.op == "neg":
        factor = -factor
    elif x.op in ("mul", "call"):
        other = _weight_in(c, x, inner[0])
        if is_tensor(other):
            weights = _product(c, weights, other, x.shape)
        else:
            factor = times_number(factor, other)
    elif x.op in ("sum", "mean"):
        share = _share((inner[0].shape[x.args[1]],)) if x.op == "mean" else 1.0
        factor = None if share is None else factor * share
        if not x.args[2]:
            weights = _reshaped(c, weights, x.shape, _kept(inner[0].shape, x.args[1]))
    elif x.op == "reshape":
        weights = _reshaped(c, weights, x.shape, inner[0].shape)
    return _total(c, inner[0], weights, factor) if isinstance(factor, (int, float)) else None


def _share(shape: tuple[Any, ...] | None) -> float | None:
    """One over the number of elements, where that is known."""
    count = None if shape is None else math.prod(shape)
    return 1 / count if isinstance(count, int) and count else None


def _kept(shape: tuple[Any, ...], dim: int) -> tuple[Any, ...]:
    """A shape with a dimension of one element."""
    return (*shape[:dim], 1, *shape[len(shape) + dim + 1 :])


def _weight_in(c: Call, step: Term, inner: Term) -> Any:
    """What one step multiplies with."""
    if step.op == "mul":
        return next(a for a in step.args if a is not inner)
    mask = step.args[1] if step.args[0] == "where" else c.step("not", step.args[2], like=step.args[2])
    return cast(c, mask, torch.float32)


def _product(c: Call, a: Term | None, b: Term, shape: Any) -> Term:
    if a is None:
        return b
    return c.step("mul", *(_reshaped(c, x, shape, shape) for x in (a, b)), shape=shape)


def _reshaped(c: Call, x: Term | None, expanded: Any, shape: Any) -> Term | None:
    """x as what broadcasts to a shape, in another of as many elements. As it stands: in its canonical form, what it is
    made of might be in no graph."""
    if x is None or c.shape is None:
        return x
    for op, wanted in (("expand", expanded), ("reshape", shape)):
        if not same(x.shape, wanted):
            x = c.step(op, x, wanted, dtype=x.dtype, shape=wanted)
    return x
