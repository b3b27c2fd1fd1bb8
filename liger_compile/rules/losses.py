"""Cross-entropy, log-probabilities, and what they are written out of."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from .. import _torch
from ..terms import Term, same
from .base import (
    Call,
    NotCanonical,
    cast,
    elementwise,
    is_tensor,
    neg,
    negative_dim,
    rule,
    through_cast,
    unwidened,
    widens,
)
from .layers import linear
from .rows import flat, has_rows, is_columns, is_one_number, is_rowwise, is_scale, is_scaled_sigmoid
from .views import move_dim, reshape_to, slice_
from .written_out import without_number


@rule("log_softmax")
def _log_softmax(c: Call, x: Term, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None) -> Term:
    if dim is None:
        raise NotCanonical("has no dimension")
    return elementwise(c, "log_softmax", x if dtype is None else cast(c, x, dtype), negative_dim(x, dim))


@rule("log")
def _log(c: Call, x: Term) -> Term:
    exponentials = unwidened(x.args[0]) if x.op == "sum" and x.args[1] == -1 else x
    if exponentials.op != "exp" or not has_rows(unwidened(exponentials.args[0])):
        raise NotCanonical("is not taken of a sum of exponentials of a linear layer's outputs")
    return _logsumexp(c, exponentials.args[0], -1)  # log(sum(exp(x))) -> logsumexp(x)


@rule("max")
def _max(c: Call, x: Term, dim: Any = None, keepdim: Any = False) -> tuple[Any, ...]:
    """The values are those of `amax`; of the indices nothing is known."""
    if not c.parts or not isinstance(dim, int):
        raise NotCanonical("is not taken over one dimension")
    values = c.parts[0]
    args = ("amax", x, (negative_dim(x, dim),), keepdim)
    return c.terms.make("call", args, values.dtype, tuple(values.shape)), None


@rule("logsumexp")
def _logsumexp(c: Call, x: Term, dim: Any, keepdim: Any = False) -> Term:
    """That of each row, in the shape it is given in the end."""
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        (dim,) = dim
    if negative_dim(x, dim) != -1 or (x.shape is not None and len(x.shape) < 2):
        raise NotCanonical("is not taken of rows")
    return _of_flat(c, "logsumexp", x if c.shape is None else _flat_rows(c, x), -1)


def pick(c: Call, x: Term, index: Term) -> Term:
    """One element of each row of x; `index` has one dimension."""
    narrow = unwidened(x)
    if not has_rows(narrow):
        raise NotCanonical("takes no log-probabilities, and no outputs of a linear layer")
    if narrow.op == "log_softmax":  # log_softmax(z)[y] -> -cross_entropy(z, y), cast or not
        rows = narrow if c.shape is None else _flat_rows(c, narrow)
        return neg(c, _loss_of_rows(c, rows.args[0], index))
    if widens(x):
        return through_cast(c, x, lambda y: pick(replace(c, dtype=y.dtype), y, index))
    return _of_flat(c, "pick", x if c.shape is None else _flat_rows(c, x), index)


def counts_to(positions: Any, n: Any) -> bool:
    """Whether this is 0, 1, .. n - 1; the size may become a guard."""
    if isinstance(positions, range):
        return positions.start == 0 and positions.step == 1 and _torch.known_equal(positions.stop, n)
    if not is_arange(positions) or positions.dtype not in (torch.int64, torch.int32):
        return False
    bounds = positions.args[1:-4]  # behind them: dtype, layout, device, pin_memory
    start, step = (bounds[0] if len(bounds) > 1 else 0), (bounds[2] if len(bounds) > 2 else 1)
    return same(start, 0) and same(step, 1) and _torch.known_equal(positions.shape[0], n)


def is_arange(x: Any) -> bool:
    return isinstance(x, Term) and x.op == "call" and x.args[0] == "arange"


def loss_of_picked(c: Call, picked: Any, total: Any) -> Term | None:
    """logsumexp(z) - z[y] -> cross_entropy(z, y)"""
    if not (is_tensor(picked) and is_tensor(total)):
        return None
    z, lse = flat(picked), flat(total)
    if z.op != "pick" or lse.op != "logsumexp" or not same(picked.shape, total.shape):
        return None
    if z.args[0] is not unwidened(lse.args[0]):
        return None
    return _loss_of_rows(c, unshifted(c, lse.args[0]), z.args[1])


def is_logsumexp(c: Call, total: Term, x: Term) -> bool:
    """Whether this is that of each row of x, which broadcasts."""
    lse, x = flat(total), unwidened(x)
    if c.shape is None or lse.op != "logsumexp" or not has_rows(x):
        return False
    return same(total.shape, (*x.shape[:-1], 1)) and unwidened(lse.args[0]) is _flat_rows(c, x)


def is_maximum(m: Term, x: Term) -> bool:
    """Whether this is the maximum of each row of x, which broadcasts."""
    rows = None if x.shape is None else (*x.shape[:-1], 1)
    if rows is None or not same(m.shape, rows):
        return False
    m = _as_made(m)
    return m.op == "call" and m.args[0] == "amax" and m.args[1] is x and m.args[2] in (-1, (-1,))


def _as_made(x: Term) -> Term:
    """A value before it was given another shape, or taken out of its history."""
    while x.op == "reshape" or _is_detach(x):
        x = x.args[1] if x.op == "call" else x.args[0]
    return x


def _is_detach(m: Term) -> bool:
    return m.op == "call" and m.args[0] == "detach"


def logsumexp_with_maximum(c: Call, lse: Term, most: Term) -> Term | None:
    """logsumexp(z - max(z)) + max(z) -> logsumexp(z)"""
    rows = flat(lse)
    if c.shape is None or rows.op != "logsumexp" or not same(lse.shape, most.shape):
        return None
    shifted = unwidened(rows.args[0])
    if shifted.op != "shifted" or _as_made(unwidened(shifted.args[1])) is not _as_made(unwidened(most)):
        return None
    return _of_flat(c, "logsumexp", unshifted(c, rows.args[0]), -1)


def unshifted(c: Call, x: Term) -> Term:
    """Less the rows' maxima -> as it is, for what does not change if a number is added to a row.

    Neither do gradients. Of L(x - m), with sum_j dL/dz_j = 0 as L does not change, m gets -sum_j dL/dz_j = 0 and hands
    nothing on to x, detached or not, and x gets dL/dz itself.
    """
    if widens(x):
        return cast(c, unshifted(c, x.args[0]), x.args[1])
    return x.args[0] if x.op == "shifted" else x


def _loss_of_rows(c: Call, rows: Term, target: Term) -> Term:
    return _of_flat(c, "cross_entropy", _head(c, rows), target, None, NONE_IGNORED, "none", 0.0)


def _of_flat(c: Call, op: str, rows: Term, *args: Any) -> Term:
    """An operation with one result for each of [n, C] rows, in the shape of the call's result."""
    if c.shape is None:
        return elementwise(c, op, rows, *args)
    return reshape_to(c, elementwise(Call(c.terms, c.dtype, rows.shape[:1]), op, rows, *args), c.shape)


NONE_IGNORED = torch.iinfo(torch.int64).min
"""The ignore_index of losses that have none: a label that cannot be looked up."""


def _rows(c: Call, x: Term) -> Term:
    """[N, C, d...] or [N, C] logits as rows [n, C]."""
    if x.shape is None or len(x.shape) == 2:
        return x
    if len(x.shape) < 2:
        raise NotCanonical("has no batch")
    return _flat_rows(c, move_dim(c, x, 1 - len(x.shape), -1))


def _flat_rows(c: Call, x: Term) -> Term:
    return reshape_to(c, x, (math.prod(x.shape[:-1]), x.shape[-1]))


def _by_tanh(c: Call, x: Term) -> Term:
    """2 a sigmoid(b z) -> a tanh((a b / 2 z) / a), which is less by a everywhere, and so the same to a loss of rows."""
    (logits, b), a = without_number(x.args[0].args[0]), x.args[1] / 2
    if not math.isclose(a * b, 2):
        logits = c.step("mul", logits, a * b / 2, like=logits)
    argument = c.step("mul", logits, c.terms.make("reciprocal", (a,)), like=logits)
    return c.step("mul", c.step("tanh", argument, like=argument), a, like=x)


def _head(c: Call, x: Term) -> Term:
    """Some columns of a linear layer's output -> the output of a linear layer with some rows of its weight; scaled by
    class, with scaled rows of it; scaled by a tensor of one number, with scaled inputs. What is scaled is rounded then,
    and the outputs are not."""
    if x.op == "mul" and is_tensor(x.args[1]):
        if not is_scale(x.args[1], x.args[0]):
            return x
        layer, scale = unwidened(_head(c, x.args[0])), x.args[1]
        if layer.op != "linear":
            return x
        rows, weight, bias = layer.args
        if is_one_number(scale):
            rows, bias = (_scaled(c, t, scale) for t in (rows, bias))
        else:
            weight, bias = (_scaled(c, t, scale) for t in (weight, bias))
        return cast(c, c.terms.make("linear", (rows, weight, bias), layer.dtype, x.shape), x.dtype)
    if is_scaled_sigmoid(x):
        return _head(c, _by_tanh(c, x))
    if x.op in ("cast", "mul", "tanh") and isinstance(x.args[0], Term):
        inner = _head(c, x.args[0])
        return x if inner is x.args[0] else c.terms.make(x.op, (inner, *x.args[1:]), x.dtype, x.shape)
    if not (is_columns(x) and is_rowwise(x.args[0])):
        return x
    inner, _, lo, hi, _ = x.args
    if inner.op != "linear":  # past what is done to each element
        part = _head(c, slice_(c, inner.args[0], -1, lo, hi))
        rest = [slice_(c, a, -1, lo, hi) if is_tensor(a) else a for a in inner.args[1:]]
        return _head(c, c.terms.make(inner.op, (part, *rest), inner.dtype, x.shape))
    rows, weight, bias = inner.args
    weight = slice_(c, weight, -2, lo, hi)
    bias = slice_(c, bias, -1, lo, hi) if isinstance(bias, Term) else bias
    return c.terms.make("linear", (rows, weight, bias), x.dtype, x.shape)


def logsumexp_of_head(c: Call, lse: Term) -> Term:
    """logsumexp(z) -> that of what the loss of z is taken of, but for a sigmoid, which is a tanh to losses alone."""
    x = lse.args[0]
    while x.op in ("cast", "mul", "tanh", "slice"):
        if is_scaled_sigmoid(x):
            return lse
        x = x.args[0]
    rows = _head(c, lse.args[0])
    return lse if rows is lse.args[0] else c.terms.make("logsumexp", (rows, *lse.args[1:]), lse.dtype, lse.shape)


def _scaled(c: Call, x: Term | None, scale: Term) -> Term | None:
    return None if x is None else c.terms.make("scaled", (x, scale), x.dtype, x.shape)


def _cross_entropy_of(c: Call, x: Term, target: Term, weight: Any, ignore_index: Any, reduction: Any, smoothing: Any):
    if target.is_float:
        return c("cross_entropy_of_probabilities", x, target, reduction)
    if target.shape is not None and len(target.shape) > 1:
        target = reshape_to(c, target, (math.prod(target.shape),))
    rows, rest = _head(c, _rows(c, x)), (target, weight, ignore_index, reduction, smoothing)
    return _of_flat(c, "cross_entropy", rows, *rest) if reduction == "none" else c("cross_entropy", rows, *rest)


@rule("cross_entropy")
def cross_entropy(
    c: Call,
    x: Term,
    target: Term,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: Any = -100,
    reduce: Any = None,
    reduction: Any = "mean",
    label_smoothing: Any = 0.0,
) -> Term:
    if size_average is not None or reduce is not None:
        raise NotCanonical("uses size_average or reduce, which torch has deprecated")
    return _cross_entropy_of(c, x, target, weight, ignore_index, reduction, label_smoothing)


_REDUCTIONS = ("none", "mean", "sum")


@rule("cross_entropy_loss")
def _aten_cross_entropy(c, x, target, weight=None, reduction=1, ignore_index=-100, label_smoothing=0.0) -> Term:
    return _cross_entropy_of(c, x, target, weight, ignore_index, _REDUCTIONS[reduction], label_smoothing)


@rule("nll_loss", "nll_loss_nd")
def _nll_loss(
    c: Call,
    x: Term,
    target: Term,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: Any = -100,
    reduce: Any = None,
    reduction: Any = "mean",
) -> Term:
    classes = 1 - len(x.shape) if x.shape is not None else -1
    if x.op != "log_softmax" or x.args[1] != classes or size_average is not None or reduce is not None:
        raise NotCanonical("is not taken of a log_softmax over the classes")
    reduction = _REDUCTIONS[reduction] if isinstance(reduction, int) else reduction
    return _cross_entropy_of(c, x.args[0], target, weight, ignore_index, reduction, 0.0)  # nll(log_softmax(x)) -> ce(x)


def _chunked_loss(c: Call, x: Term, weight: Term, target: Term, bias: Any, *rest: Any) -> Term:
    """The loss of `F.linear_cross_entropy(..., options=...)`; `rest` is what cross-entropy takes besides."""
    logits = linear(Call(c.terms, x.dtype, (*x.shape[:-1], weight.shape[0])), x, weight, bias)
    return _cross_entropy_of(c, logits, target, *rest)


@rule("_linear_cross_entropy_batch_chunked")
def _chunked(c, x, weight, target, bias, class_weight, reduction, ignore_index, smoothing, *_) -> tuple[Term, ...]:
    """Its gradients, which it also returns, are left as they are."""
    one = Call(c.terms, c.parts[0].dtype, tuple(c.parts[0].shape))
    return (_chunked_loss(one, x, weight, target, bias, class_weight, ignore_index, reduction, smoothing),)


@rule("_linear_cross_entropy_batch_chunked_no_reduction")
def _chunked_rows(c, x, weight, target, bias, class_weight, ignore_index, *_) -> Term:
    return _chunked_loss(c, x, weight, target, bias, class_weight, ignore_index, "none", 0.0)
