"""Sums of the losses of rows, each times a weight: a number is made of them, whose gradient is known beforehand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from ..terms import Term, same
from .base import Call, cast, is_tensor, widens
from .written_out import times_number


def sum_of_losses(c: Call, x: Term, mean: bool) -> Term | None:
    """sum(x) -> sum_of_losses(losses, weights, factor), flat, if x is losses times weights, perhaps summed in part."""
    path = down_to_losses(x)
    factor = _share(x.shape) if mean else 1.0
    if path is None or factor is None:
        return None
    weights: Term | None = None
    for step, inner in itertools.pairwise(path):
        if step.op == "neg":
            factor = -factor
        elif step.op in ("mul", "call"):
            if not same(step.shape, inner.shape):
                return None  # each loss is taken several times
            other = _weight_in(c, step, inner)
            if is_tensor(other):
                weights = _product(c, weights, other, step.shape)
            else:
                factor = times_number(factor, other)
        elif step.op in ("sum", "mean"):
            if step.op == "mean":
                share = _share((inner.shape[step.args[1]],))
                factor = None if share is None else factor * share
            if weights is not None and not step.args[2]:
                weights = _with_shape(c, weights, step.shape, _kept(inner.shape, step.args[1]))
        elif step.op == "reshape" and weights is not None:
            weights = _with_shape(c, weights, step.shape, inner.shape)
        if not isinstance(factor, (int, float)):
            return None
    losses = path[-1]
    if weights is not None and c.shape is not None:
        weights = _with_shape(c, weights, losses.shape, losses.shape)
    return c("sum_of_losses", losses, weights, factor)


def down_to_losses(x: Term, most: int = 12) -> list[Term] | None:
    """The terms from x down to the losses of rows that it is made of, one after another."""
    if x.op == "cross_entropy":
        return [x] if x.args[4] == "none" else None
    if most == 0:
        return None
    for inner in _linear_in(x):
        path = down_to_losses(inner, most - 1)
        if path is not None:
            return [x, *path]
    return None


def _linear_in(x: Term) -> list[Term]:
    """What x would be twice of if that were twice as large, and everything else as it is."""
    if x.op in ("neg", "reshape") or widens(x) or (x.op in ("sum", "mean") and isinstance(x.args[1], int)):
        return [x.args[0]]
    if x.op == "mul":
        return [a for a in x.args if is_tensor(a)]
    if x.op == "call" and x.args[0] == "where" and len(x.args) == 4 and same(x.args[3], 0):
        return [x.args[2]] if is_tensor(x.args[2]) else []
    if x.op == "call" and x.args[0] == "masked_fill" and same(x.args[3], 0):
        return [x.args[1]]
    return []


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
    return c.step("mul", *(_with_shape(c, x, shape, shape) for x in (a, b)), shape=shape)


def _with_shape(c: Call, x: Term, expanded: tuple[Any, ...], shape: tuple[Any, ...]) -> Term:
    """x as what broadcasts to a shape, in another of as many elements. As it stands: in its canonical form, what it is
    made of might be in no graph."""
    for op, wanted in (("expand", expanded), ("reshape", shape)):
        if not same(x.shape, wanted):
            x = c.step(op, x, wanted, dtype=x.dtype, shape=wanted)
    return x
