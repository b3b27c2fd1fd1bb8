"""Arithmetic, activations and reductions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..terms import Term, same, size
from .base import RULES, Call, NotCanonical, cast, elementwise, infer_dtype, is_tensor, neg, negated, negative_dim, rule
from .losses import is_logsumexp, is_maximum, logsumexp_with_maximum, loss_of_picked, unshifted
from .rows import is_rowwise, is_scale
from .sums import plus_squares, scaled_sum, sum_of_rows
from .written_out import unit_of, written_out_gelu


@rule("mul", "multiply")
def mul(c: Call, x: Any, other: Any) -> Term:
    y = other
    if not is_tensor(x):
        x, y = y, x
    if not isinstance(y, Term):
        if same(y, -1):
            return neg(c, x)  # x * -1 -> -x
        if same(y, 1) and _keeps_dtype(c, x):
            return x  # x * 1.0 -> x
        return _product(c, x, y)
    if x is y:
        return elementwise(c, "square", x)  # x * x -> square(x)
    for a, b in ((x, y), (y, x)):
        if b.op == "sigmoid" and b.args[0] is a:
            return elementwise(c, "silu", a)  # x * sigmoid(x) -> silu(x)
    return _product(c, y, x) if is_scale(x, y) else _product(c, x, y)


def _product(c: Call, x: Term, y: Any) -> Term:
    if (total := scaled_sum(c, x, y)) is not None:
        return total
    if (capped := _capped(c, x, y)) is not None:
        return capped
    if (unit := unit_of(c, x, y)) is not None:
        return unit
    product = elementwise(c, "mul", x, y)
    found = written_out_gelu(product)
    return product if found is None else elementwise(c, "gelu", *found)


def _capped(c: Call, x: Term, y: Any) -> Term | None:
    """tanh(z * k) * y -> tanh(z / y) * y, if k is 1 / y"""
    if x.op != "tanh" or not isinstance(y, (int, float)) or x.args[0].op != "mul":
        return None
    z, k = x.args[0].args
    if not isinstance(k, (int, float)) or not math.isclose(k * y, 1, rel_tol=torch.finfo(torch.float32).eps):
        return None
    argument = c.step("mul", z, c.terms.make("reciprocal", (y,)), like=x.args[0])
    return elementwise(c, "mul", c.step("tanh", argument, like=x), y)


def _keeps_dtype(c: Call, x: Term) -> bool:
    """Whether the call's result has the dtype of x: not 1.0 times integers."""
    return c.dtype is None or c.dtype is x.dtype


@rule("div", "divide", "true_divide", "truediv")
def div(c: Call, x: Any, other: Any, *, rounding_mode: str | None = None) -> Term:
    y = other
    if rounding_mode is not None:
        raise NotCanonical("rounds")
    if isinstance(y, Term):
        inverse = reciprocal(Call(c.terms, y.dtype, y.shape), y)
        return inverse if same(x, 1) else mul(c, x, inverse)  # x / y -> x * reciprocal(y)
    if x.op == "sum" and isinstance(x.args[1], int) and same(y, size(x.args[0], x.args[1])):
        return c("mean", *x.args)  # sum(x) / n -> mean(x)
    if same(y, 1) and _keeps_dtype(c, x):
        return x  # x / 1 -> x
    return _product(c, x, c.terms.make("reciprocal", (y,)))


@rule("reciprocal")
def reciprocal(c: Call, x: Term) -> Term:
    if x.op == "sqrt":
        return elementwise(c, "rsqrt", x.args[0])  # 1 / sqrt(x) -> rsqrt(x)
    if x.op == "add" and same(x.args[1], 1) and x.args[0].op == "exp":
        if (opposite := negated(c, x.args[0].args[0])) is not None:
            return elementwise(c, "sigmoid", opposite)  # 1 / (1 + exp(-x)) -> sigmoid(x)
    return elementwise(c, "reciprocal", x)


@rule("add")
def add(c: Call, x: Any, other: Any, *, alpha: Any = 1) -> Term:
    y = other
    if not same(alpha, 1):
        raise NotCanonical("scales an operand")
    if not isinstance(x, Term):
        x, y = y, x
    if isinstance(y, Term):
        for a, b in ((x, y), (y, x)):
            if b.op == "neg":
                return sub(c, a, b.args[0])  # x + (-y) -> x - y
            if a.op == "linear" and a.args[2] is None and b.op == "leaf" and b.shape is not None and len(b.shape) == 1:
                return c("linear", *a.args[:2], b)  # linear(x, w) + b -> linear(x, w, b)
        if (total := plus_squares(c, x, y)) is not None:
            return total
        for a, b in ((x, y), (y, x)):
            if (lse := logsumexp_with_maximum(c, a, b)) is not None:
                return lse  # logsumexp(z - max(z)) + max(z) -> logsumexp(z)
    return elementwise(c, "add", x, y)


@rule("addcmul")
def _addcmul(c: Call, x: Term, y: Term, z: Term, *, value: Any = 1) -> Term:
    if not (same(value, 1) or same(value, -1)):
        raise NotCanonical("scales a product")
    if c.shape is not None and not (same(y.shape, c.shape) or same(z.shape, c.shape)):
        raise NotCanonical("broadcasts a product")
    if c.dtype in (torch.bfloat16, torch.float16):
        raise NotCanonical("does not round the product")
    product = mul(Call(c.terms, infer_dtype("mul", (y, z)), c.shape), y, z)
    return add(c, x, product) if same(value, 1) else sub(c, x, product)  # x + y * z, x - y * z


@rule("sub", "subtract")
def sub(c: Call, x: Any, other: Any, *, alpha: Any = 1) -> Term:
    if not same(alpha, 1):
        raise NotCanonical("scales an operand")
    for picked, total in ((x, other), (other, x)):
        if (loss := loss_of_picked(c, picked, total)) is not None:
            return neg(c, loss) if picked is x else loss  # z[y] - logsumexp(z) -> -cross_entropy(z, y)
    if is_tensor(x) and is_tensor(other):
        if x.op.startswith("sum_of_") and other.op.startswith("sum_of_"):
            return add(c, x, neg(Call(c.terms, other.dtype, other.shape), other))
        if is_logsumexp(c, other, x):
            return elementwise(c, "log_softmax", unshifted(c, x), -1)  # x - logsumexp(x) -> log_softmax(x)
        if is_rowwise(x) and same(c.dtype, x.dtype) and is_maximum(other, x):
            return elementwise(c, "shifted", x, other)  # x - max(x)
    return elementwise(c, "sub", x, other)


@rule("rsub")
def _rsub(c: Call, x: Any, other: Any, *, alpha: Any = 1) -> Term:
    return sub(c, other, x, alpha=alpha)


@rule("pow")
def pow_(c: Call, x: Any, exponent: Any) -> Term:
    if isinstance(x, Term) and isinstance(exponent, (int, float)):
        for value, canonical in ((2, "square"), (0.5, "sqrt"), (-0.5, "rsqrt"), (-1, "reciprocal")):
            if exponent == value:
                return RULES[canonical](c, x)
    return elementwise(c, "pow", x, exponent)


@rule("square")
def square(c: Call, x: Term) -> Term:
    if x.op == "sqrt":
        return x.args[0]  # square(norm(x)) -> sum(square(x))
    return elementwise(c, "square", x)


def _unary(op: str) -> Callable[..., Term]:
    def apply(c: Call, x: Term, inplace: bool = False) -> Term:
        return elementwise(c, op, x)

    return apply


for _name in ("sqrt", "rsqrt", "exp", "tanh", "erf", "sigmoid", "silu", "relu", "softplus", "mish", "abs"):
    RULES[_name] = _unary(_name)


RULES["swish"] = RULES["silu"]


RULES["absolute"] = RULES["abs"]


@rule("clamp", "clip")
def clamp(c: Call, x: Term, min: Any = None, max: Any = None) -> Term:
    if is_tensor(min) or is_tensor(max):
        raise NotCanonical("has bounds that are tensors")
    min, max = None if same(min, -math.inf) else min, None if same(max, math.inf) else max
    if min is None and max is None:
        return x  # clamp(x, -inf, inf) -> x
    opposite = min.args[0] if isinstance(min, Term) and min.op == "neg" else None
    if same(-min, max) if isinstance(min, (int, float)) else opposite is not None and opposite is max:
        min = "-max"  # clamp(x, -3, 3) -> the same in a pattern that does not know the number
    return elementwise(c, "clamp", x, min, max)


@rule("clamp_min")
def _clamp_min(c: Call, x: Term, min: Any) -> Term:
    return clamp(c, x, min)


@rule("clamp_max")
def _clamp_max(c: Call, x: Term, max: Any) -> Term:
    return clamp(c, x, None, max)


@rule("gelu")
def _gelu(c: Call, x: Term, approximate: str = "none") -> Term:
    return elementwise(c, "gelu", x, approximate)


def _reduce(c: Call, op: str, x: Term, dim: Any, keepdim: Any, dtype: Any) -> Term:
    if dim is None:
        if op in ("sum", "mean") and not keepdim and (total := sum_of_rows(c, x, mean=op == "mean")) is not None:
            return total
        raise NotCanonical("reduces every dimension")
    dims = tuple(sorted(negative_dim(x, d) for d in (dim if isinstance(dim, (tuple, list)) else (dim,))))
    if dtype is not None:
        x = cast(c, x, dtype)
    return elementwise(c, op, x, dims[0] if len(dims) == 1 else dims, bool(keepdim))


@rule("mean")
def mean(c: Call, x: Term, dim: Any = None, keepdim: Any = False, *, dtype: Any = None) -> Term:
    return _reduce(c, "mean", x, dim, keepdim, dtype)


@rule("sum")
def sum_(c: Call, x: Term, dim: Any = None, keepdim: Any = False, *, dtype: Any = None) -> Term:
    return _reduce(c, "sum", x, dim, keepdim, dtype)


@rule("dot", "vdot")
def _dot(c: Call, x: Term, y: Term) -> Term:
    total = sum_of_rows(c, c.step("mul", x, y, like=x), mean=False)
    if total is None:
        raise NotCanonical("is not taken of the losses of rows")
    return total  # dot(x, y) -> sum(x * y)


@rule("norm", "vector_norm", "linalg_vector_norm")
def norm(c: Call, x: Term, p: Any = 2, dim: Any = None, keepdim: Any = False, *, ord: Any = None, dtype: Any = None):
    if not (same(p, 2) or p is None) or not (ord is None or same(ord, 2)):
        raise NotCanonical("is not the 2-norm")
    inner = Call(c.terms, c.dtype, c.shape)
    x = cast(c, x, c.dtype) if c.dtype is not None and x.is_float else x  # by autocast
    squares = c.step("square", x, like=x)
    return elementwise(c, "sqrt", _reduce(inner, "sum", squares, dim, keepdim, dtype))  # norm(x) -> sqrt(sum(x^2))


@rule("normalize")
def _normalize(c: Call, x: Term, p: Any = 2.0, dim: Any = 1, eps: Any = 1e-12, out: Any = None) -> Term:
    if out is not None or not isinstance(dim, int):
        raise NotCanonical("writes its result somewhere, or normalises several dimensions at once")
    length = norm(Call(c.terms, x.dtype if c.dtype is None else c.dtype), x, p, dim, True)
    return mul(c, x, c.step("reciprocal", c.step("clamp", length, eps, None, like=length), like=length))
