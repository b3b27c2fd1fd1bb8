"""The canonical form of each call, as a table of small functions.

A rule is named after the operation, takes the call's arguments as torch does, and returns a Term, or a tuple of Terms
for calls with several results. Equations are in the comments: `left -> right` reads "left is written as right".
Rules only look at values; no graph is changed by them.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import _torch
from .terms import Expr, PatternError, Term, Terms, arith, same, size


class NotCanonical(Exception):
    """This use of the operation has no canonical form; it becomes a generic term."""


@dataclass
class Call:
    """One call on its way to canonical form. `dtype` and `shape` are the result's, None in a pattern."""

    terms: Terms
    dtype: torch.dtype | None = None
    shape: tuple[Any, ...] | None = None
    parts: tuple[torch.Tensor, ...] = ()  # the results' values, for calls with several

    def __call__(self, op: str, *args: Any) -> Term:
        """The call's own result."""
        return self.terms.make(op, args, self.dtype or _infer_dtype(op, args), self.shape)

    def step(self, op: str, *args: Any, like: Term | None = None, dtype: Any = None, shape: Any = None) -> Term:
        """A value on the way: of `like`'s dtype and shape unless said otherwise."""
        if like is not None:
            dtype, shape = dtype or like.dtype, shape if shape is not None else like.shape
        return self.terms.make(op, args, dtype or _infer_dtype(op, args), shape)


def _infer_dtype(op: str, args: tuple[Any, ...]) -> torch.dtype | None:
    """The dtype of an arithmetic result, where all operands' dtypes are known."""
    dtypes = [a.dtype for a in args if isinstance(a, Term) and not a.is_number]
    if not dtypes or None in dtypes:
        return None
    result = dtypes[0]
    for d in dtypes[1:]:
        result = torch.promote_types(result, d)
    return result


RULES: dict[str, Callable[..., Any]] = {}


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            RULES[name] = fn
        return fn

    return add


# ---- casts --------------------------------------------------------------------------------------------------------


ROUNDED_ONCE = {"silu", "gelu", "sigmoid", "relu"}
"""Of half precision these are computed in float32 and rounded, with their gradients."""


def cast(c: Call, x: Term, dtype: Any) -> Term:
    if x.dtype is not None and same(x.dtype, dtype):
        return x  # x.to(x.dtype) -> x
    if x.op == "cast" and same(x.args[0].dtype, dtype) and _is_upcast(x.args[0].dtype, x.dtype):
        return x.args[0]  # x.to(wider).to(x.dtype) -> x
    if x.op in ROUNDED_ONCE and x.dtype is torch.float32 and widens(x.args[0]):
        narrow = x.args[0].args[0]
        if same(narrow.dtype, dtype):
            return c.step(x.op, narrow, *x.args[1:], like=narrow)  # silu(x.float()).to(x.dtype) -> silu(x)
    known = dtype if isinstance(dtype, torch.dtype) else None
    return c.terms.make("cast", (x, dtype), known, x.shape)


def _is_upcast(narrow: torch.dtype | None, wide: torch.dtype | None) -> bool:
    """Whether every value of `narrow` is one of `wide`. Unknown dtypes count as narrower than float32."""
    if narrow is None:
        return wide is torch.float32
    if wide is None or not (narrow.is_floating_point and wide.is_floating_point):
        return False
    return narrow is not wide and torch.promote_types(narrow, wide) is wide


def _through_cast(c: Call, x: Term, move: Callable[[Term], Term]) -> Term:
    """Upcasts are kept outermost: moving data and casting it commute.

    Casts that round stay where they are, so that what they made is read as it is, not made again.
    """
    if widens(x):
        return cast(c, move(x.args[0]), x.args[1])
    return move(x)


def widens(x: Term) -> bool:
    return x.op == "cast" and _is_upcast(x.args[0].dtype, x.dtype)


@rule("to", "type", "_to_copy")
def _to(c: Call, x: Term, *args: Any, dtype: Any = None, device: Any = None, other: Any = None, **_: Any) -> Term:
    for a in (*args, other):
        if isinstance(a, (torch.dtype, Expr)):
            dtype = a
        elif isinstance(a, Term):
            dtype = a.dtype or Expr("dtype", (a,))
        elif isinstance(a, (str, torch.device)):
            device = a
    if device is not None and c.shape is None:
        raise NotCanonical("moves between devices")
    if c.dtype is not None:
        dtype = c.dtype
    return x if dtype is None else cast(c, x, dtype)


@rule("type_as")
def _type_as(c: Call, x: Term, other: Term) -> Term:
    return cast(c, x, c.dtype or other.dtype or Expr("dtype", (other,)))


for _name, _dtype in {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
    "bool": torch.bool,
    "int": torch.int32,
    "long": torch.int64,
}.items():
    RULES[_name] = lambda c, x, dtype=_dtype, **_: cast(c, x, dtype)


@rule("contiguous", "clone", "alias", "positive")
def _identity(c: Call, x: Term, *args: Any, **kwargs: Any) -> Term:
    return x


@rule("dropout")
def _dropout(c: Call, x: Term, p: float = 0.5, training: bool = True, inplace: bool = False) -> Term:
    if isinstance(p, (int, float)) and (p == 0 or training is False):
        return x
    raise NotCanonical("drops values")


# ---- element-wise arithmetic --------------------------------------------------------------------------------------


def elementwise(c: Call, op: str, *args: Any) -> Term:
    """An operation whose result has its operands' promoted dtype. Autocast's silent casts become visible ones."""
    if c.dtype is not None and c.dtype.is_floating_point:
        # numbers and 0-dim tensors do not promote
        operands = tuple(a for a in args if isinstance(a, Term) and not a.is_number and a.shape != ())
        if all(t.is_float for t in operands) and _infer_dtype(op, operands) not in (None, c.dtype):
            # rsqrt(x) under autocast -> rsqrt(cast(x, float32))
            args = tuple(cast(c, a, c.dtype) if a in operands else a for a in args)
    return c(op, *_drop_promoted_upcast(args))


def _drop_promoted_upcast(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """cast(x, f32) * y:f32 -> x * y, since type promotion does the cast."""
    if len(args) != 2 or not all(_is_tensor(a) for a in args):
        return args
    for i, j in ((0, 1), (1, 0)):
        x, y = args[i], args[j]
        if x.op == "cast" and y.op != "cast" and y.dtype is not None and same(x.dtype, y.dtype):
            if _is_upcast(x.args[0].dtype, x.dtype) and (y.shape is None or len(y.shape) > 0):
                out = list(args)
                out[i] = x.args[0]
                return tuple(out)
    return args


@rule("mul", "multiply")
def mul(c: Call, x: Any, other: Any) -> Term:
    y = other
    if not _is_tensor(x):
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
    return _product(c, y, x) if _is_scale(x, y) else _product(c, x, y)


def _product(c: Call, x: Term, y: Any) -> Term:
    if (unit := _unit(c, x, y)) is not None:
        return unit
    product = elementwise(c, "mul", x, y)
    found = _written_out_gelu(product)
    return product if found is None else elementwise(c, "gelu", *found)


_GELU = {
    "tanh": ("tanh", {(1,): math.sqrt(2 / math.pi), (3,): math.sqrt(2 / math.pi) * 0.044715}),
    "erf": ("none", {(1,): math.sqrt(0.5)}),
}
"""By the function in a GELU: which approximation it is, and the function's argument as a polynomial."""


def _written_out_gelu(product: Term) -> tuple[Term, str] | None:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) -> x, "tanh", and the like with erf(x / sqrt(2))."""
    factors = list(_factors(product))
    for gate in factors:
        if gate.op == "add" and same(gate.args[1], 1) and gate.args[0].op in _GELU:
            function = gate.args[0]
            approximate, argument = _GELU[function.op]
            for x in factors:
                if _is_polynomial(product, {(1, 1): 0.5}, x, gate) and _is_polynomial(function.args[0], argument, x):
                    return x, approximate
    return None


def _unit(c: Call, x: Term, y: Any) -> Term | None:
    """x / max(norm(x), eps) * scale -> unit(x, "floor", eps, scale), and with "outside" x / (norm(x) + eps) * scale.

    The norm is that of the last dimension, or so many times it; numbers among the factors go into the scale.
    """
    if not _is_tensor(y):
        if x.op == "unit" and (times := _times(x.args[3], y)) is not None:
            return c("unit", *x.args[:3], times)  # (x / norm(x)) * k
        if x.op == "mul":
            for unit, weight in (x.args, reversed(x.args)):
                if isinstance(unit, Term) and unit.op == "unit" and _is_tensor(weight):
                    scaled = _unit(Call(c.terms, unit.dtype, unit.shape), unit, y)
                    return None if scaled is None else elementwise(c, "mul", scaled, weight)  # x / norm(x) * w * k
        return None
    for whole, inverse in ((x, y), (y, x)):
        found = _guarded(inverse.args[0]) if inverse.op == "reciprocal" and _is_tensor(inverse.args[0]) else None
        if found is None:
            continue
        normed, guard, eps, scale = found
        row, times = _without_number(_unwidened(whole))
        if _unwidened(row) is _unwidened(normed) and times > 0:
            return c("unit", whole if times == 1 else row, guard, eps, _times(scale, times))
    return None


def _guarded(x: Term) -> tuple[Term, str, Any, Any] | None:
    """row, guard, eps, 1 / k of k max(norm(row), eps), or of k (norm(row) + eps), where k > 0."""
    if not (x.op == "add" or (x.op == "clamp" and x.args[2] is None)) or _is_tensor(x.args[1]):
        return None
    length, times = _without_number(_unwidened(x.args[0]))
    if length.op != "sqrt" or length.args[0].op not in ("sum", "mean") or times <= 0:
        return None
    squares, dim, keepdim = length.args[0].args
    squares = _unwidened(squares)
    if squares.op != "square" or dim != -1 or not keepdim:
        return None
    row, eps = squares.args[0], x.args[1]
    if length.args[0].op == "mean":
        if not isinstance(size(row, -1), int):
            return None
        times *= size(row, -1) ** -0.5
    if times != 1 and not isinstance(eps, (int, float)):
        return None
    return row, "floor" if x.op == "clamp" else "outside", eps if times == 1 else eps / times, 1 / times


def _without_number(x: Term) -> tuple[Term, float]:
    """y, k where x is y times a number k."""
    times = 1.0
    while x.op == "mul" and (k := _times(times, x.args[1])) is not None and isinstance(k, float):
        x, times = x.args[0], k
    return x, times


def _times(scale: Any, k: Any) -> Any:
    """scale * k of numbers, one of which is 1 if the other is not known before the graph runs; else None."""
    if isinstance(k, Term) and k.op == "reciprocal" and isinstance(k.args[0], (int, float)) and k.args[0] != 0:
        k = 1 / k.args[0]
    if isinstance(k, (int, float)) and isinstance(scale, (int, float)):
        return float(scale * k)
    return k if same(scale, 1) and not _is_tensor(k) else None


def _factors(product: Term) -> Iterator[Term]:
    """What a product is made of, products among that."""
    for factor in product.args:
        if isinstance(factor, Term):
            yield factor
            if factor.op == "mul":
                yield from _factors(factor)


Polynomial = dict[tuple[int, ...], float]
"""Coefficients by the powers of each symbol."""


def _is_polynomial(value: Any, expected: Polynomial, *symbols: Term) -> bool:
    """Whether a value is a polynomial in some terms, its coefficients equal but for what float32 rounds off."""
    found, eps = _polynomial(value, symbols), torch.finfo(torch.float32).eps
    if found is None or found.keys() != expected.keys():
        return False
    return all(math.isclose(found[powers], expected[powers], rel_tol=eps) for powers in expected)


def _polynomial(value: Any, symbols: tuple[Term, ...]) -> Polynomial | None:
    if isinstance(value, (int, float)):
        return {(0,) * len(symbols): value}
    if not isinstance(value, Term):
        return None
    value = _unwidened(value)
    if any(value is _unwidened(s) for s in symbols):
        return {tuple(int(value is _unwidened(s)) for s in symbols): 1}
    if value.op == "reciprocal" and isinstance(value.args[0], (int, float)) and value.args[0] != 0:
        return {(0,) * len(symbols): 1 / value.args[0]}
    if value.op not in ("add", "mul", "square", "pow") or (value.op == "pow" and not same(value.args[1], 3)):
        return None
    operands = {"square": value.args * 2, "pow": value.args[:1] * 3}.get(value.op, value.args)
    parts = [_polynomial(operand, symbols) for operand in operands]
    if None in parts:
        return None
    return functools.reduce(_sum_of if value.op == "add" else _product_of, parts)


def _sum_of(a: Polynomial, b: Polynomial) -> Polynomial:
    return {powers: a.get(powers, 0) + b.get(powers, 0) for powers in a.keys() | b.keys()}


def _product_of(a: Polynomial, b: Polynomial) -> Polynomial:
    product: Polynomial = {}
    for (m, p), (n, q) in itertools.product(a.items(), b.items()):
        powers = tuple(map(operator.add, m, n))
        product[powers] = product.get(powers, 0) + p * q
    return product


def _unwidened(x: Term) -> Term:
    while widens(x):
        x = x.args[0]
    return x


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
    return elementwise(c, "add", x, y)


@rule("addcmul")
def _addcmul(c: Call, x: Term, y: Term, z: Term, *, value: Any = 1) -> Term:
    if not (same(value, 1) or same(value, -1)):
        raise NotCanonical("scales a product")
    if c.shape is not None and not (same(y.shape, c.shape) or same(z.shape, c.shape)):
        raise NotCanonical("broadcasts a product")
    if c.dtype in (torch.bfloat16, torch.float16):
        raise NotCanonical("does not round the product")
    product = mul(Call(c.terms, _infer_dtype("mul", (y, z)), c.shape), y, z)
    return add(c, x, product) if same(value, 1) else sub(c, x, product)  # x + y * z, x - y * z


@rule("sub", "subtract")
def sub(c: Call, x: Any, other: Any, *, alpha: Any = 1) -> Term:
    if not same(alpha, 1):
        raise NotCanonical("scales an operand")
    for picked, total in ((x, other), (other, x)):
        if (loss := _loss_of_picked(c, picked, total)) is not None:
            return neg(c, loss) if picked is x else loss  # z[y] - logsumexp(z) -> -cross_entropy(z, y)
    if _is_tensor(x) and _is_tensor(other):
        if _is_logsumexp(c, other, x):
            return elementwise(c, "log_softmax", _unshifted(c, x), -1)  # x - logsumexp(x) -> log_softmax(x)
        if _is_rowwise(x) and same(c.dtype, x.dtype) and _is_maximum(other, x):
            return elementwise(c, "shifted", x, other)  # x - max(x)
    return elementwise(c, "sub", x, other)


@rule("rsub")
def _rsub(c: Call, x: Any, other: Any, *, alpha: Any = 1) -> Term:
    return sub(c, other, x, alpha=alpha)


@rule("neg", "negative")
def neg(c: Call, x: Term) -> Term:
    if x.op == "neg":
        return x.args[0]
    return _through_cast(c, x, lambda y: c.step("neg", y, like=y))


def negated(c: Call, x: Any) -> Term | None:
    """y, if x is -y, perhaps cast to a wider dtype."""
    if not isinstance(x, Term):
        return None
    if widens(x) and x.args[0].op == "neg":
        return cast(c, x.args[0].args[0], x.args[1])
    return x.args[0] if x.op == "neg" else None


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
    if _is_tensor(min) or _is_tensor(max):
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


# ---- reductions ---------------------------------------------------------------------------------------------------


def _reduce(c: Call, op: str, x: Term, dim: Any, keepdim: Any, dtype: Any) -> Term:
    if dim is None:
        raise NotCanonical("reduces every dimension")
    dims = tuple(sorted(_negative(x, d) for d in (dim if isinstance(dim, (tuple, list)) else (dim,))))
    if dtype is not None:
        x = cast(c, x, dtype)
    return elementwise(c, op, x, dims[0] if len(dims) == 1 else dims, bool(keepdim))


@rule("mean")
def mean(c: Call, x: Term, dim: Any = None, keepdim: Any = False, *, dtype: Any = None) -> Term:
    return _reduce(c, "mean", x, dim, keepdim, dtype)


@rule("sum")
def sum_(c: Call, x: Term, dim: Any = None, keepdim: Any = False, *, dtype: Any = None) -> Term:
    return _reduce(c, "sum", x, dim, keepdim, dtype)


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


@rule("log_softmax")
def _log_softmax(c: Call, x: Term, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None) -> Term:
    if dim is None:
        raise NotCanonical("has no dimension")
    return elementwise(c, "log_softmax", x if dtype is None else cast(c, x, dtype), _negative(x, dim))


@rule("log")
def _log(c: Call, x: Term) -> Term:
    exponentials = _unwidened(x.args[0]) if x.op == "sum" and x.args[1] == -1 else x
    if exponentials.op != "exp" or not _has_rows(_unwidened(exponentials.args[0])):
        raise NotCanonical("is not taken of a sum of exponentials of a linear layer's outputs")
    return _logsumexp(c, exponentials.args[0], -1)  # log(sum(exp(x))) -> logsumexp(x)


@rule("max")
def _max(c: Call, x: Term, dim: Any = None, keepdim: Any = False) -> tuple[Any, ...]:
    """The values are those of `amax`; of the indices nothing is known."""
    if not c.parts or not isinstance(dim, int):
        raise NotCanonical("is not taken over one dimension")
    values = c.parts[0]
    args = ("amax", x, (_negative(x, dim),), keepdim)
    return c.terms.make("call", args, values.dtype, tuple(values.shape)), None


@rule("logsumexp")
def _logsumexp(c: Call, x: Term, dim: Any, keepdim: Any = False) -> Term:
    """That of each row, in the shape it is given in the end."""
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        (dim,) = dim
    if _negative(x, dim) != -1 or (x.shape is not None and len(x.shape) < 2):
        raise NotCanonical("is not taken of rows")
    return _of_flat(c, "logsumexp", x if c.shape is None else _flat_rows(c, x), -1)


# ---- moving data --------------------------------------------------------------------------------------------------


def _negative(x: Term, dim: Any) -> int:
    if not isinstance(dim, int):
        raise NotCanonical("has a dimension that is not a number")
    if dim < 0:
        return dim
    if x.shape is None:
        raise PatternError("counts dimensions from the front: in a pattern, count from the back (dim=-1)")
    return dim - len(x.shape)


def slice_(c: Call, x: Term, dim: int, lo: Any, hi: Any, step: Any = 1) -> Term:
    """x[..., lo:hi:step, ...] with 0 <= lo <= hi <= size."""
    if widens(x):
        return _through_cast(c, x, lambda y: slice_(c, y, dim, lo, hi, step))
    if same(lo, 0) and same(step, 1) and same(hi, size(x, dim)):
        return x  # x[:] -> x
    if not same(step, 1):  # the end is right behind the last element: x[0:8:2] -> x[0:7:2]
        last = arith("mul", arith("floordiv", arith("sub", arith("sub", hi, lo), 1), step), step)
        hi = arith("add", arith("add", lo, last), 1)
    if x.op == "expand" and same(hi, arith("add", lo, 1)) and _is_repeated(x, dim):
        shape = (*x.shape[:dim], 1, *x.shape[len(x.shape) + dim + 1 :])
        return _expand(Call(c.terms, x.dtype, shape), x.args[0])
    if x.op == "slice" and x.args[1] == dim and x.args[4] == 1:
        inner, _, start, _, _ = x.args
        return slice_(c, inner, dim, arith("add", start, lo), arith("add", start, hi), step)  # x[a:][b:c] -> x[a+b:a+c]
    if x.op == "slice" and dim < x.args[1]:  # nested slices in the order of their dimensions
        return slice_(c, slice_(c, x.args[0], dim, lo, hi, step), *x.args[1:])
    if dim != -1 and _has_rows(x):
        return _of_rows(c, x, lambda y: slice_(c, y, dim, lo, hi, step))
    shape = None
    if x.shape is not None:
        extent = hi - lo if step == 1 else -((lo - hi) // step)
        shape = (*x.shape[:dim], extent, *x.shape[len(x.shape) + dim + 1 :])
    return c.step("slice", x, dim, lo, hi, step, dtype=x.dtype, shape=shape)


def _is_repeated(expanded: Term, dim: int) -> bool:
    """Whether all elements along a dimension are the same one."""
    shape = expanded.args[0].shape
    return -dim > len(shape) or same(shape[dim], 1)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Term) and not value.is_number


def _is_rowwise(x: Term) -> bool:
    """Whether x is a linear layer's output, perhaps scaled or capped, or columns of it: a row depends on one row of
    the input."""
    while x.op == "tanh" or _is_scaled(x) or widens(x) or _is_columns(x):
        x = x.args[0].args[0] if _is_scaled_sigmoid(x) else x.args[0]
    return x.op == "linear"


def _is_scaled_sigmoid(x: Term) -> bool:
    return x.op == "mul" and x.args[0].op == "sigmoid" and isinstance(x.args[1], (int, float))


def _is_scaled(x: Term) -> bool:
    """Whether this is a product with a number, in a tensor or not, or with a number for each class."""
    return x.op == "mul" and (not _is_tensor(x.args[1]) or _is_scale(x.args[1], x.args[0]))


def _is_scale(scale: Term, x: Term) -> bool:
    known = x.op in ("linear", "cast") and scale.shape is not None and scale.is_float and _is_rowwise(x)
    return known and (_is_one_number(scale) or same(scale.shape, x.shape[-1:]))


def _is_one_number(scale: Term) -> bool:
    return same(scale.shape, ()) or same(scale.shape, (1,))


def _is_columns(x: Term) -> bool:
    return x.op == "slice" and x.args[1] == -1 and x.args[4] == 1


def _has_rows(x: Term) -> bool:
    """Whether rows of x are those of the linear layer's input. Less a number for each row they are too, but columns
    are not."""
    return _is_rowwise(x.args[0] if x.op == "shifted" or (x.op == "log_softmax" and x.args[1] == -1) else x)


def _of_rows(c: Call, x: Term, move: Callable[[Term], Term]) -> Term:
    """Rows of a linear layer's output -> the output of those rows."""
    inner, *rest = x.args
    if x.op == "linear":
        moved = move(inner)
        return c.terms.make("linear", (moved, *rest), x.dtype, (*moved.shape[:-1], x.shape[-1]))
    moved = _of_rows(c, inner, move)
    return c.terms.make(x.op, (moved, *rest), x.dtype, (*moved.shape[:-1], x.shape[-1]))


def select(c: Call, x: Term, dim: int, index: Any) -> Term:
    """x[..., index, ...], with the dimension dropped."""
    if widens(x):
        return _through_cast(c, x, lambda y: select(c, y, dim, index))
    if x.op == "reshape" and x.shape is not None and len(x.shape) > 1:
        whole, shape = x.args[0], x.shape
        if dim == -1 and isinstance(shape[-1], int) and isinstance(shape[-2], int):
            whole = reshape_to(c, whole, (*shape[:-2], shape[-2] * shape[-1]))
        if whole.shape is not None and dim in (-1, -2) and len(shape) == len(whole.shape) + 1:
            if same(shape[:-2], whole.shape[:-1]) and isinstance(shape[-1], int) and isinstance(shape[-2], int):
                k, d = shape[-2:]
                if dim == -2:  # x.view(.., k, d)[..., i, :] -> x[..., i*d:(i+1)*d]
                    return slice_(c, whole, -1, index * d, (index + 1) * d)
                return slice_(c, whole, -1, index, k * d, d)  # x.view(.., k, d)[..., i] -> x[..., i::d]
    shape = None if x.shape is None else (*x.shape[:dim], *x.shape[len(x.shape) + dim + 1 :])
    return c.step("select", x, dim, index, dtype=x.dtype, shape=shape)


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
            out = _unsqueeze(c, out, i - len(behind))
    return out


@rule("slice")
def _aten_slice(c: Call, x: Term, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Term:
    dim = _negative(x, dim)
    end = None if isinstance(end, int) and end > 2**62 else end
    return slice_(c, x, dim, *_bounds(x, dim, slice(start, end, step)))


@rule("select")
def _select(c: Call, x: Term, dim: int, index: Any) -> Term:
    dim = _negative(x, dim)
    return select(c, x, dim, arith("add", size(x, dim), index) if isinstance(index, int) and index < 0 else index)


@rule("narrow")
def _narrow(c: Call, x: Term, dim: int, start: Any, length: Any) -> Term:
    return slice_(c, x, _negative(x, dim), start, arith("add", start, length))


def _pieces(c: Call, x: Term, dim: int, sizes: Any) -> tuple[Term, ...]:
    out, lo = [], 0
    for n in sizes:
        out.append(slice_(c, x, dim, lo, arith("add", lo, n)))
        lo = arith("add", lo, n)
    return tuple(out)


@rule("tensor_split", "split", "split_with_sizes")
def _split(c: Call, x: Term, split: Any, dim: int = 0) -> tuple[Term, ...]:
    dim = _negative(x, dim)
    if c.parts:
        return _pieces(c, x, dim, [p.shape[dim] for p in c.parts])
    if isinstance(split, (tuple, list)):
        return _pieces(c, x, dim, split)
    raise PatternError("splits into pieces of one size: in a pattern, use chunk(2, -1) or slices")


@rule("chunk")
def _chunk(c: Call, x: Term, chunks: int, dim: int = 0) -> tuple[Term, ...]:
    if c.parts:
        return _split(c, x, chunks, dim)
    dim = _negative(x, dim)
    n = size(x, dim)
    if chunks != 2:
        raise PatternError("splits into more than two pieces: in a pattern, use slices")
    half = arith("floordiv", n, 2)
    return slice_(c, x, dim, 0, half), slice_(c, x, dim, half, n)


@rule("unbind")
def _unbind(c: Call, x: Term, dim: int = 0) -> tuple[Term, ...]:
    dim = _negative(x, dim)
    if not c.parts:
        raise PatternError("has an unknown number of pieces: in a pattern, use x[..., i]")
    return tuple(select(c, x, dim, i) for i in range(len(c.parts)))


def reshape_to(c: Call, x: Term, shape: Any) -> Term:
    """The same elements in another shape; the graph's result shape says which."""
    shape = tuple(shape)
    if widens(x):
        return _through_cast(c, x, lambda y: reshape_to(c, y, shape))
    if x.shape is not None and same(x.shape, shape):
        return x
    if x.op == "reshape":
        return reshape_to(c, x.args[0], shape)
    if (repeated := _repeated(c, x, shape)) is not None:
        return repeated
    if x.op == "stack" and x.args[1] == -1 and same(shape[:-1], x.shape[:-2]):
        return c.step("interleave", x.args[0], like=x, shape=shape)  # stack((x, y), -1).flatten(-2)
    if x.op in ("mean", "sum") and x.args[2] is False and isinstance(x.args[1], int):
        inner, dim, _ = x.args  # mean(x, dim).unsqueeze(dim) -> mean(x, dim, keepdim=True)
        if inner.shape is not None and same(shape, (*inner.shape[:dim], 1, *inner.shape[len(inner.shape) + dim + 1 :])):
            return c.step(x.op, inner, dim, True, dtype=x.dtype, shape=shape)
    if shape and x.shape and same(shape[-1], x.shape[-1]) and _has_rows(x):
        return _of_rows(c, x, lambda y: reshape_to(c, y, (*shape[:-1], y.shape[-1])))
    if x.op in _OF_EACH and x.shape != () and not any(map(_is_tensor, x.args[1:])):
        inner = reshape_to(c, x.args[0], shape)
        if inner.op != "reshape":  # rsqrt(mean(x, dim) + eps).unsqueeze(dim) -> rsqrt(mean(x, dim, keepdim=True) + eps)
            return c.step(x.op, inner, *x.args[1:], dtype=x.dtype, shape=shape)
    return c.step("reshape", x, shape, dtype=x.dtype, shape=shape)


_OF_EACH = {"rsqrt", "sqrt", "add", "clamp", "reciprocal"}
"""Element by element, here of a tensor and numbers."""


def _repeated(c: Call, x: Term, shape: tuple[Any, ...]) -> Term | None:
    """x[.., h, None, ..].expand(.., h, n, ..).reshape(.., h * n, ..) -> repeat(x, n), as `repeat_interleave` does."""
    if x.op != "expand" or x.shape is None or x.args[0].shape is None or len(x.args[0].shape) != len(x.shape):
        return None
    inner, rank = x.args[0].shape, len(x.shape)
    new = [d for d in range(1, rank) if not same(inner[d], x.shape[d])]
    if len(new) != 1 or not isinstance(n := x.shape[new[0]], int) or not same(inner[new[0]], 1):
        return None
    d = new[0]
    if not same(shape, (*x.shape[: d - 1], x.shape[d - 1] * n, *x.shape[d + 1 :])):
        return None
    whole = reshape_to(c, x.args[0], (*inner[:d], *inner[d + 1 :]))
    return c.step("repeat", whole, d - rank, n, dtype=x.dtype, shape=shape)


@rule("gather")
def _gather(c: Call, x: Term, dim: Any, index: Term, *, sparse_grad: Any = False) -> Term:
    """One element of each row of log-probabilities, or of a linear layer's outputs."""
    if _negative(x, dim) != -1 or sparse_grad:
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
    return _picked(c, x, index)


def _picked(c: Call, x: Term, index: Term) -> Term:
    """One element of each row of x; `index` has one dimension."""
    narrow = _unwidened(x)
    if not _has_rows(narrow):
        raise NotCanonical("takes no log-probabilities, and no outputs of a linear layer")
    if narrow.op == "log_softmax":  # log_softmax(z)[y] -> -cross_entropy(z, y), cast or not
        rows = narrow if c.shape is None else _flat_rows(c, narrow)
        return neg(c, _loss_of_rows(c, rows.args[0], index))
    if widens(x):
        return _through_cast(c, x, lambda y: _picked(replace(c, dtype=y.dtype), y, index))
    return _of_flat(c, "pick", x if c.shape is None else _flat_rows(c, x), index)


def _looked_up(c: Call, x: Term, items: list[Any]) -> Term:
    """x[arange(n), index], where a negative index counts from the end."""
    if x.shape is None or len(x.shape) != 2 or len(items) != 2 or not isinstance(items[1], Term):
        raise NotCanonical("indexes with data")
    positions, index = items
    if index.dtype not in (torch.int64, torch.int32) or len(index.shape) != 1 or not _has_rows(_unwidened(x)):
        raise NotCanonical("indexes with data")
    n, classes = x.shape
    if not (_counts_to(positions, n) and _torch.known_equal(index.shape[0], n)):
        raise NotCanonical("takes elements of some rows")
    index = cast(c, index, torch.int64)
    return _picked(c, x, c.terms.make("from_end", (index, classes), index.dtype, index.shape))


def _counts_to(positions: Any, n: Any) -> bool:
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


@rule("take_along_dim")
def _take_along_dim(c: Call, x: Term, indices: Term, dim: Any = None) -> Term:
    if indices.shape is not None and not same(indices.shape, c.shape):
        raise NotCanonical("broadcasts its index")
    return _gather(c, x, dim, indices)


def _loss_of_picked(c: Call, picked: Any, total: Any) -> Term | None:
    """logsumexp(z) - z[y] -> cross_entropy(z, y)"""
    if not (_is_tensor(picked) and _is_tensor(total)):
        return None
    z, lse = _flat(picked), _flat(total)
    if z.op != "pick" or lse.op != "logsumexp" or not same(picked.shape, total.shape):
        return None
    if z.args[0] is not _unwidened(lse.args[0]):
        return None
    return _loss_of_rows(c, _unshifted(c, lse.args[0]), z.args[1])


def _flat(x: Term) -> Term:
    """What `_of_flat` has given a shape, and a cast perhaps a wider dtype."""
    x = _unwidened(x)
    return x.args[0] if x.op == "reshape" else x


def _is_logsumexp(c: Call, total: Term, x: Term) -> bool:
    """Whether this is that of each row of x, which broadcasts."""
    lse, x = _flat(total), _unwidened(x)
    if c.shape is None or lse.op != "logsumexp" or not _has_rows(x):
        return False
    return same(total.shape, (*x.shape[:-1], 1)) and _unwidened(lse.args[0]) is _flat_rows(c, x)


def _is_maximum(m: Term, x: Term) -> bool:
    """Whether this is the maximum of each row of x, which broadcasts."""
    rows = None if x.shape is None else (*x.shape[:-1], 1)
    if rows is None or not same(m.shape, rows):
        return False
    while m.op == "reshape" or _is_detach(m):
        m = m.args[1] if m.op == "call" else m.args[0]
    return m.op == "call" and m.args[0] == "amax" and m.args[1] is x and m.args[2] in (-1, (-1,))


def _is_detach(m: Term) -> bool:
    return m.op == "call" and m.args[0] == "detach"


def _unshifted(c: Call, x: Term) -> Term:
    """Less the rows' maxima -> as it is, for what does not change if a number is added to a row.

    Neither do gradients. Of L(x - m), with sum_j dL/dz_j = 0 as L does not change, m gets -sum_j dL/dz_j = 0 and hands
    nothing on to x, detached or not, and x gets dL/dz itself.
    """
    if widens(x):
        return cast(c, _unshifted(c, x.args[0]), x.args[1])
    return x.args[0] if x.op == "shifted" else x


def _loss_of_rows(c: Call, rows: Term, target: Term) -> Term:
    return _of_flat(c, "cross_entropy", _head(c, rows), target, None, NONE_IGNORED, "none", 0.0)


def _of_flat(c: Call, op: str, rows: Term, *args: Any) -> Term:
    """An operation with one result for each of [n, C] rows, in the shape of the call's result."""
    if c.shape is None:
        return elementwise(c, op, rows, *args)
    return reshape_to(c, elementwise(Call(c.terms, c.dtype, rows.shape[:1]), op, rows, *args), c.shape)


@rule("repeat_interleave")
def _repeat_interleave(c: Call, x: Term, repeats: Any, dim: Any = None, *, output_size: Any = None) -> Term:
    if dim is None or _is_tensor(repeats):
        raise NotCanonical("repeats by numbers that are data")
    return _through_cast(c, x, lambda y: c.step("repeat", y, _negative(y, dim), repeats, dtype=y.dtype, shape=c.shape))


def _pattern_view(c: Call, x: Term, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Term:
    """In a pattern the shape after a view follows from the operand's, once that is known."""
    return _through_cast(c, x, lambda y: c.step("reshape", y, Expr("shape", (y, change)), dtype=y.dtype))


@rule("unsqueeze")
def _unsqueeze(c: Call, x: Term, dim: int) -> Term:
    if c.shape is not None:
        return reshape_to(c, x, c.shape)
    if dim >= 0:
        raise PatternError("counts dimensions from the front: in a pattern, count from the back (dim=-1)")
    if x.op in ("mean", "sum") and x.args[2] is False and x.args[1] == dim:
        return c.step(x.op, x.args[0], dim, True, dtype=x.dtype)
    return _pattern_view(c, x, lambda s: (*s[: len(s) + dim + 1], 1, *s[len(s) + dim + 1 :]))


@rule("squeeze")
def _squeeze(c: Call, x: Term, dim: Any = None) -> Term:
    if c.shape is not None:
        return reshape_to(c, x, c.shape)
    if not isinstance(dim, int) or dim >= 0:
        raise PatternError("drops unknown dimensions: in a pattern, name one from the back (dim=-1)")
    return _pattern_view(c, x, lambda s: (*s[: len(s) + dim], *s[len(s) + dim + 1 :]))


@rule("flatten")
def _flatten(c: Call, x: Term, start_dim: int = 0, end_dim: int = -1) -> Term:
    if c.shape is not None:
        return reshape_to(c, x, c.shape)
    if (start_dim, end_dim) != (-2, -1):
        raise PatternError("flattens dimensions that a pattern cannot know: in a pattern, use flatten(-2)")
    if widens(x):
        return _through_cast(c, x, lambda y: _flatten(c, y, start_dim, end_dim))
    if x.op == "stack" and x.args[1] == -1:
        return c.step("interleave", x.args[0], dtype=x.dtype)
    return _pattern_view(c, x, lambda s: (*s[:-2], s[-2] * s[-1]))


def _in_pairs(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*shape[:-1], shape[-1] // 2, 2)


@rule("unflatten")
def _unflatten(c: Call, x: Term, dim: int, sizes: Any) -> Term:
    if c.shape is not None:
        return reshape_to(c, x, c.shape)
    if dim == -1 and isinstance(sizes, Term):
        return c.step("reshape", x, sizes, dtype=x.dtype)  # in a pattern, an operand: the whole shape is bound to it
    if dim != -1 or tuple(sizes) != (-1, 2):
        raise PatternError("gives a shape that a pattern cannot know: in a pattern, use unflatten(-1, (-1, 2))")
    return _pattern_view(c, x, _in_pairs)


@rule("view_as_complex")
def _view_as_complex(c: Call, x: Term) -> Term:
    """view_as_complex(x.float().unflatten(-1, (-1, 2))) -> complex(x)"""
    if x.shape is not None:
        x = reshape_to(c, x, (*x.shape[:-2], x.shape[-2] * 2))
    x = x.args[0] if widens(x) and x.dtype is torch.float32 else x
    if c.shape is None:
        shape = x.args[1] if x.op == "reshape" else None
        if not isinstance(shape, Expr) or shape.args[1] is not _in_pairs:
            raise PatternError("makes complex numbers of an unknown shape: in a pattern, use x.unflatten(-1, (-1, 2))")
        x = x.args[0]
    return c.step("complex", x, dtype=c.dtype, shape=c.shape)


@rule("view", "reshape", "view_as", "reshape_as", "_unsafe_view", "ravel")
def _reshape(c: Call, x: Term, *args: Any, **kwargs: Any) -> Term:
    if any(isinstance(a, torch.dtype) for a in args):
        raise NotCanonical("reinterprets the bits")
    if c.shape is None:
        if len(args) == 1 and isinstance(args[0], Term):
            return c.step("reshape", x, args[0], dtype=x.dtype)  # in a pattern, an operand: the whole shape
        raise PatternError("gives a shape that a pattern cannot know: write the pattern without it")
    return reshape_to(c, x, c.shape)


@rule("expand", "expand_as", "broadcast_to")
def _expand(c: Call, x: Term, *args: Any, **kwargs: Any) -> Term:
    if c.shape is None:
        raise PatternError("gives a shape that a pattern cannot know: operands broadcast without it")
    if x.shape is not None and same(x.shape, c.shape):
        return x
    return _through_cast(c, x, lambda y: c.step("expand", y, c.shape, dtype=y.dtype, shape=c.shape))


@rule("broadcast_tensors")
def _broadcast_tensors(c: Call, *tensors: Any) -> tuple[Term, ...]:
    tensors = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors
    if not c.parts:
        raise PatternError("gives shapes that a pattern cannot know: operands broadcast without it")
    return tuple(_expand(Call(c.terms, v.dtype, tuple(v.shape)), t) for t, v in zip(tensors, c.parts, strict=True))


def permute(c: Call, x: Term, order: tuple[int, ...]) -> Term:
    """`order` names, for each of the last dimensions of the result, the negative dimension it comes from."""
    if widens(x):
        return _through_cast(c, x, lambda y: permute(c, y, order))
    if x.op == "permute":
        inner = x.args[1]
        n = max(len(order), len(inner))
        first = tuple(range(-n, -len(inner))) + inner
        then = tuple(range(-n, -len(order))) + order
        return permute(c, x.args[0], tuple(first[i] for i in then))
    while order and order[0] == -len(order):
        order = order[1:]
    if not order:
        return x
    if order[-1] == -1 and _has_rows(x):
        return _of_rows(c, x, lambda y: permute(c, y, order))
    if x.op == "log_softmax":  # log_softmax(x, dim).permute(order) -> log_softmax(x.permute(order), dim')
        inner, dim = permute(c, x.args[0], order), x.args[1]
        return c.terms.make("log_softmax", (inner, _moved(dim, order)), x.dtype, inner.shape)
    shape = None
    if x.shape is not None:
        shape = (*x.shape[: len(x.shape) - len(order)], *(x.shape[i] for i in order))
    if x.op == "repeat":  # repeat(x, dim, n).permute(order) -> repeat(x.permute(order), dim', n)
        inner, dim, n = x.args
        return c.step("repeat", permute(c, inner, order), _moved(dim, order), n, dtype=x.dtype, shape=shape)
    return c.step("permute", x, order, dtype=x.dtype, shape=shape)


def _moved(dim: int, order: tuple[int, ...]) -> int:
    """Where a dimension is behind `permute`."""
    return order.index(dim) - len(order) if dim in order else dim


@rule("transpose", "swapaxes", "swapdims")
def _transpose(c: Call, x: Term, dim0: int, dim1: int) -> Term:
    a, b = _negative(x, dim0), _negative(x, dim1)
    order = list(range(min(a, b), 0))
    order[a], order[b] = b, a
    return permute(c, x, tuple(order))


@rule("t")
def _t(c: Call, x: Term) -> Term:
    if x.shape is not None and len(x.shape) < 2:
        return x
    return permute(c, x, (-1, -2))


@rule("permute")
def _permute(c: Call, x: Term, *dims: Any) -> Term:
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return permute(c, x, tuple(_negative(x, d) for d in dims))


@rule("movedim", "moveaxis")
def _movedim(c: Call, x: Term, source: Any, destination: Any) -> Term:
    if not isinstance(source, int) or not isinstance(destination, int):
        raise NotCanonical("moves several dimensions")
    return _move_dim(c, x, _negative(x, source), _negative(x, destination))


def _move_dim(c: Call, x: Term, source: int, destination: int) -> Term:
    n = max(-source, -destination)
    order = [d for d in range(-n, 0) if d != source]
    order.insert(destination + n, source)
    return permute(c, x, tuple(order))


@rule("cat", "concat", "concatenate")
def cat(c: Call, tensors: Any, dim: int = 0) -> Term:
    parts = tuple(p for p in tensors if not same(p.shape, (0,))) or tuple(tensors)  # such a part may lack dimensions
    dim = _negative(parts[0], dim)
    inner = {p.args[0].dtype for p in parts if p.op == "cast"}
    if all(widens(p) for p in parts) and len(inner) == 1:  # cat(cast(x), cast(y)) -> cast(cat(x, y))
        whole = c.step("cat", tuple(p.args[0] for p in parts), dim, dtype=inner.pop(), shape=c.shape)
        return cast(c, whole, parts[0].args[1])
    return c.step("cat", parts, dim, dtype=c.dtype or _infer_dtype("cat", parts), shape=c.shape)


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
    inner = {p.args[0].dtype for p in parts if p.op == "cast"}
    if all(widens(p) for p in parts) and len(inner) == 1:  # stack(cast(x), cast(y)) -> cast(stack(x, y))
        whole = c.step("stack", tuple(p.args[0] for p in parts), dim, dtype=inner.pop(), shape=c.shape)
        return cast(c, whole, parts[0].args[1])
    return c.step("stack", parts, dim, dtype=c.dtype or _infer_dtype("stack", parts), shape=c.shape)


# ---- products -----------------------------------------------------------------------------------------------------


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


# ---- whole layers -------------------------------------------------------------------------------------------------


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


NONE_IGNORED = torch.iinfo(torch.int64).min
"""The ignore_index of losses that have none: a label that cannot be looked up."""


def _rows(c: Call, x: Term) -> Term:
    """[N, C, d...] or [N, C] logits as rows [n, C]."""
    if x.shape is None or len(x.shape) == 2:
        return x
    if len(x.shape) < 2:
        raise NotCanonical("has no batch")
    return _flat_rows(c, _move_dim(c, x, 1 - len(x.shape), -1))


def _flat_rows(c: Call, x: Term) -> Term:
    return reshape_to(c, x, (math.prod(x.shape[:-1]), x.shape[-1]))


def _by_tanh(c: Call, x: Term) -> Term:
    """2 a sigmoid(b z) -> a tanh((a b / 2 z) / a), which is less by a everywhere, and so the same to a loss of rows."""
    (logits, b), a = _without_number(x.args[0].args[0]), x.args[1] / 2
    if not math.isclose(a * b, 2):
        logits = c.step("mul", logits, a * b / 2, like=logits)
    argument = c.step("mul", logits, c.terms.make("reciprocal", (a,)), like=logits)
    return c.step("mul", c.step("tanh", argument, like=argument), a, like=x)


def _head(c: Call, x: Term) -> Term:
    """Some columns of a linear layer's output -> the output of a linear layer with some rows of its weight; scaled by
    class, with scaled rows of it; scaled by a tensor of one number, with scaled inputs. What is scaled is rounded then,
    and the outputs are not."""
    if x.op == "mul" and _is_tensor(x.args[1]):
        layer, scale = _unwidened(_head(c, x.args[0])), x.args[1]
        if layer.op != "linear":
            return x
        rows, weight, bias = layer.args
        if _is_one_number(scale):
            rows, bias = (_scaled(c, t, scale) for t in (rows, bias))
        else:
            weight, bias = (_scaled(c, t, scale) for t in (weight, bias))
        return cast(c, c.terms.make("linear", (rows, weight, bias), layer.dtype, x.shape), x.dtype)
    if _is_scaled_sigmoid(x):
        return _head(c, _by_tanh(c, x))
    if x.op in ("cast", "mul", "tanh") and isinstance(x.args[0], Term):
        inner = _head(c, x.args[0])
        return x if inner is x.args[0] else c.terms.make(x.op, (inner, *x.args[1:]), x.dtype, x.shape)
    if not (_is_columns(x) and _is_rowwise(x.args[0])):
        return x
    inner, _, lo, hi, _ = x.args
    if inner.op != "linear":  # past what is done to each element
        part = _head(c, slice_(c, inner.args[0], -1, lo, hi))
        rest = [slice_(c, a, -1, lo, hi) if _is_tensor(a) else a for a in inner.args[1:]]
        return _head(c, c.terms.make(inner.op, (part, *rest), inner.dtype, x.shape))
    rows, weight, bias = inner.args
    weight = slice_(c, weight, -2, lo, hi)
    bias = slice_(c, bias, -1, lo, hi) if isinstance(bias, Term) else bias
    return c.terms.make("linear", (rows, weight, bias), x.dtype, x.shape)


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
