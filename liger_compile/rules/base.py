"""What every rule is made of: the call on its way, the table of rules, casts, and what is done to each element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..terms import PatternError, Term, Terms, same


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
        return self.terms.make(op, args, self.dtype or infer_dtype(op, args), self.shape)

    def step(self, op: str, *args: Any, like: Term | None = None, dtype: Any = None, shape: Any = None) -> Term:
        """A value on the way: of `like`'s dtype and shape unless said otherwise."""
        if like is not None:
            dtype, shape = dtype or like.dtype, shape if shape is not None else like.shape
        return self.terms.make(op, args, dtype or infer_dtype(op, args), shape)


def infer_dtype(op: str, args: tuple[Any, ...]) -> torch.dtype | None:
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


def is_tensor(value: Any) -> bool:
    return isinstance(value, Term) and not value.is_number


def negative_dim(x: Term, dim: Any) -> int:
    if not isinstance(dim, int):
        raise NotCanonical("has a dimension that is not a number")
    if dim < 0:
        return dim
    if x.shape is None:
        raise PatternError("counts dimensions from the front: in a pattern, count from the back (dim=-1)")
    return dim - len(x.shape)


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


def through_cast(c: Call, x: Term, move: Callable[[Term], Term]) -> Term:
    """Upcasts are kept outermost: moving data and casting it commute.

    Casts that round stay where they are, so that what they made is read as it is, not made again.
    """
    if widens(x):
        return cast(c, move(x.args[0]), x.args[1])
    return move(x)


def widens(x: Term) -> bool:
    return x.op == "cast" and _is_upcast(x.args[0].dtype, x.dtype)


def unwidened(x: Term) -> Term:
    while widens(x):
        x = x.args[0]
    return x


def elementwise(c: Call, op: str, *args: Any) -> Term:
    """An operation whose result has its operands' promoted dtype. Autocast's silent casts become visible ones."""
    if c.dtype is not None and c.dtype.is_floating_point:
        # numbers and 0-dim tensors do not promote
        operands = tuple(a for a in args if isinstance(a, Term) and not a.is_number and a.shape != ())
        if all(t.is_float for t in operands) and infer_dtype(op, operands) not in (None, c.dtype):
            # rsqrt(x) under autocast -> rsqrt(cast(x, float32))
            args = tuple(cast(c, a, c.dtype) if a in operands else a for a in args)
    return c(op, *_drop_promoted_upcast(args))


def _drop_promoted_upcast(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """cast(x, f32) * y:f32 -> x * y, since type promotion does the cast."""
    if len(args) != 2 or not all(is_tensor(a) for a in args):
        return args
    for i, j in ((0, 1), (1, 0)):
        x, y = args[i], args[j]
        if x.op == "cast" and y.op != "cast" and y.dtype is not None and same(x.dtype, y.dtype):
            if _is_upcast(x.args[0].dtype, x.dtype) and (y.shape is None or len(y.shape) > 0):
                out = list(args)
                out[i] = x.args[0]
                return tuple(out)
    return args


@rule("neg", "negative")
def neg(c: Call, x: Term) -> Term:
    if x.op.startswith("sum_of_") and isinstance(x.args[2], (int, float)):
        return c(x.op, *x.args[:2], -x.args[2])  # see sums.py
    if x.op == "neg":
        return x.args[0]
    return through_cast(c, x, lambda y: c.step("neg", y, like=y))


def negated(c: Call, x: Any) -> Term | None:
    """y, if x is -y, perhaps cast to a wider dtype."""
    if not isinstance(x, Term):
        return None
    if widens(x) and x.args[0].op == "neg":
        return cast(c, x.args[0].args[0], x.args[1])
    return x.args[0] if x.op == "neg" else None
