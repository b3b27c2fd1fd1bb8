"""Whole layers, and products that are linear layers."""

from __future__ import annotations

from typing import Any

import torch

from ..terms import Term, same, size
from .base import Call, NotCanonical, cast, rule
from .views import permute


@rule("linear")
def linear(c: Call, x: Term, weight: Term, bias: Any = None) -> Term:
    given = [t for t in (x, weight, bias) if isinstance(t, Term) and t.is_float]
    if c.dtype in (torch.float32, torch.float64) and any(t.dtype not in (None, c.dtype) for t in given):
        raise NotCanonical("is not taken of two dtypes")  # by eager neither; autocast makes them half precision
    if c.dtype is not None and x.is_float:  # under autocast, those that have another dtype are cast
        x, weight = cast(c, x, c.dtype), cast(c, weight, c.dtype)
        bias = cast(c, bias, c.dtype) if isinstance(bias, Term) else bias
    return c("linear", x, weight, bias)


@rule("matmul", "mm")
def _matmul(c: Call, x: Term, other: Term) -> Term:
    two_d = (other.op == "permute" and other.args[1] == (-1, -2)) if other.shape is None else len(other.shape) == 2
    if not two_d or (x.shape is not None and len(x.shape) < 2):
        raise NotCanonical("is not a product with a matrix")
    return linear(c, x, permute(c, other, (-1, -2)))  # x @ w.T -> linear(x, w)


@rule("addmm")
def _addmm(c: Call, bias: Term, x: Term, y: Term, *, beta: Any = 1, alpha: Any = 1) -> Term:
    if not (same(beta, 1) and same(alpha, 1)) or bias.shape is None or len(bias.shape) != 1:
        raise NotCanonical("is not a linear layer")
    return linear(c, x, permute(c, y, (-1, -2)), bias)


@rule("einsum")
def _einsum(c: Call, equation: Any, *operands: Any) -> Term:
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        raise NotCanonical("is not a linear layer")
    left, out = equation.replace(" ", "").split("->")
    x_dims, w_dims = left.split(",")
    rows, k = x_dims[:-1], x_dims[-1:]
    if len(w_dims) == 2 and k in w_dims and w_dims.replace(k, "") not in rows and out == rows + w_dims.replace(k, ""):
        w = operands[1]
        return linear(c, operands[0], w if w_dims[1] == k else permute(c, w, (-1, -2)))  # bth,vh->btv
    raise NotCanonical("is not a linear layer")


@rule("embedding")
def embedding(
    c: Call,
    ids: Term,
    weight: Term,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: Any = 2.0,
    scale_grad_by_freq: Any = False,
    sparse: Any = False,
) -> Term:
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise NotCanonical("renormalises the table, or has a gradient of another kind")
    if ids.dtype is not None and ids.dtype.is_floating_point:
        raise NotCanonical("is torch.embedding, whose first argument is the table")
    return c("embedding", ids, weight, padding_idx)


@rule("rms_norm")
def _rms_norm(c: Call, x: Term, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Term:
    shape = tuple(normalized_shape)
    if len(shape) != 1 or not same(shape[0], size(x, -1)):
        raise NotCanonical("normalizes more than the last dimension")
    return c("rms_norm", x, weight, torch.finfo(torch.float32).eps if eps is None else eps)
