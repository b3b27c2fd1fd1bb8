"""Canonical terms: every spelling of the same maths becomes the same hash-consed value.

A `Term` is a read-only view of a computation. Terms are made only through `Terms.make`, which interns them, so two
equal computations are one object and are compared with `is`. The rules that bring a call into canonical form are in
`rules`; `graph_terms.py` views an FX graph through them, `pattern.py` a plain Python function.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch


class PatternError(ValueError):
    """A pattern function that cannot be registered, with what to change."""


@dataclass(frozen=True, eq=False, repr=False)
class Term:
    """One value. `dtype` and `shape` are None where a pattern does not know them yet.

    `op` is a canonical name ("mul", "slice", "cast", ...), "leaf" for a value nothing is known of, or "var" for a
    pattern's parameter; `args` holds Terms, numbers, strings, dtypes, `Expr`s and tuples of these.
    """

    op: str
    args: tuple[Any, ...]
    dtype: torch.dtype | None = None
    shape: tuple[Any, ...] | None = None

    @property
    def is_number(self) -> bool:
        """Whether this is a scalar: one computed in the graph, a pattern's scalar parameter, or such a one inverted or
        negated."""
        if self.op in ("reciprocal", "neg"):
            return not isinstance(self.args[0], Term) or self.args[0].is_number
        return self.op == "number" or (self.op == "var" and self.args[1] in ("scalar", "scalar?"))

    @property
    def is_float(self) -> bool:
        return self.dtype is not None and self.dtype.is_floating_point

    def __repr__(self) -> str:
        return describe(self)


@dataclass(frozen=True)
class Expr:
    """An integer, dtype or shape that a pattern computes from its operands: known only once they are matched.

    `fn` is "size", "dtype" or "shape" of a term, an arithmetic operation, or "operand" for an operand that is a dtype.
    """

    fn: str
    args: tuple[Any, ...]


_SAME_SHAPE = frozenset(
    (
        *("cast", "neg", "reciprocal", "square", "sqrt", "rsqrt", "exp", "tanh", "erf"),
        *("sigmoid", "silu", "relu", "gelu", "abs", "clamp"),
    )
)
"""Operations with one tensor operand, whose shape is the result's."""


def size(term: Term, dim: int) -> Any:
    """Extent of a negative dimension: an int or SymInt in a graph, an `Expr` in a pattern."""
    if term.shape is not None:
        return term.shape[dim]
    if term.op in _SAME_SHAPE:
        return size(term.args[0], dim)
    if term.op == "slice" and term.args[4] == 1:
        inner, sliced, lo, hi, _ = term.args
        return arith("sub", hi, lo) if sliced == dim else size(inner, dim)
    return Expr("size", (term, dim))


_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "truediv": lambda a, b: a / b,
    "mod": lambda a, b: a % b,
    "pow": lambda a, b: a**b,
}


def arith(fn: str, a: Any, b: Any) -> Any:
    """Integer arithmetic that stays symbolic where an operand is an `Expr`."""
    if isinstance(a, Expr) or isinstance(b, Expr):
        if b == 0 and fn in ("add", "sub"):
            return a
        if a == 0 and fn == "add":
            return b
        if fn == "sub" and a == b:
            return 0
        return Expr(fn, (a, b))
    return _ARITHMETIC[fn](a, b)


def evaluate(value: Any, matched: Callable[[Term], Term]) -> Any:
    """The value of an `Expr` once `matched` maps the pattern's terms to terms of a graph."""
    if isinstance(value, tuple):
        return tuple(evaluate(v, matched) for v in value)
    if not isinstance(value, Expr):
        return value
    if value.fn == "operand":
        return matched(value.args[0])
    if value.fn == "size":
        return size(matched(value.args[0]), value.args[1])
    if value.fn == "dtype":
        return matched(value.args[0]).dtype
    if value.fn == "shape":  # of a view: (viewed term, function of its shape)
        shape = matched(value.args[0]).shape
        return None if shape is None else value.args[1](shape)
    a, b = (evaluate(v, matched) for v in value.args)
    return _ARITHMETIC[value.fn](a, b)


def same(a: Any, b: Any) -> bool:
    """Whether two numbers, SymInts, dtypes or tuples are known to be equal, without adding a guard."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return _key(a) == _key(b)
    return (type(a) is type(b) and a == b) or (_is_number(a) and _is_number(b) and a == b)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _key(value: Any) -> Hashable:
    """A hashable stand-in; a SymInt is known by its expression, which may be a number."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        text = str(value)
        return int(text) if text.isdigit() else ("sym", text)
    if isinstance(value, (tuple, list)):
        return tuple(_key(v) for v in value)
    if isinstance(value, slice):
        return ("slice", _key(value.start), _key(value.stop), _key(value.step))
    if isinstance(value, dict):
        return tuple(sorted((k, _key(v)) for k, v in value.items()))
    try:
        hash(value)
    except TypeError:
        return ("id", id(value))
    return value


class Terms:
    """The table of terms made so far. `scope` keeps values apart that must not be shared (a no_grad region)."""

    def __init__(self) -> None:
        self._table: dict[Hashable, Term] = {}
        self.scope: Hashable = None

    def make(self, op: str, args: tuple[Any, ...], dtype: Any = None, shape: Any = None, unique: Any = None) -> Term:
        """The term of an operation; `unique` tells calls apart whose results may differ (random numbers)."""
        key = (op, _key(_ordered(op, args)), dtype, self.scope, unique)
        found = self._table.get(key)
        if found is None:
            found = self._table[key] = Term(op, args, dtype, None if shape is None else tuple(shape))
        return found


COMMUTATIVE = frozenset({"add", "mul"})


def _ordered(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Commutative operands in an order of their own, so that a + b and b + a are one term."""
    if op not in COMMUTATIVE:
        return args
    return tuple(sorted(args, key=lambda a: (not isinstance(a, Term), id(a) if isinstance(a, Term) else repr(a))))


def describe(value: Any, depth: int = 3) -> str:
    """A short readable form: `mul(weight, cast(..., float32))`."""
    if isinstance(value, Term):
        if value.op in ("var", "leaf", "number"):
            return _short(str(value.args[0]))
        if depth == 0:
            return f"{value.op}(...)"
        if value.op == "call" and str(value.args[0]).endswith("_"):
            return f"{describe(value.args[1], depth - 1)} after {value.args[0]}"
        return f"{value.op}({', '.join(describe(a, depth - 1) for a in value.args)})"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Expr):
        if value.fn == "operand":
            return describe(value.args[0])
        if value.fn in ("size", "dtype", "shape"):
            return f"{value.fn}({', '.join(describe(a, 1) for a in value.args if not callable(a))})"
        return f"{value.fn}({', '.join(describe(a, depth) for a in value.args)})"
    if isinstance(value, tuple):
        return f"({', '.join(describe(v, depth) for v in value)})"
    return str(value)


def _short(name: str) -> str:
    """Dynamo's name of a parameter, without the path of modules: `gate_proj.weight`."""
    if " after " in name:
        return name
    return name.rsplit("modules_", 1)[-1].replace("_parameters_", ".").rstrip("_")
