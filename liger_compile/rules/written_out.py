"""Functions that models write out: GELU as a polynomial of its gate, and rows divided by their length."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterator
from typing import Any

import torch

from ..terms import Term, same, size
from .base import Call, elementwise, is_tensor, unwidened

_GELU = {
    "tanh": ("tanh", {(1,): math.sqrt(2 / math.pi), (3,): math.sqrt(2 / math.pi) * 0.044715}),
    "erf": ("none", {(1,): math.sqrt(0.5)}),
}
"""By the function in a GELU: which approximation it is, and the function's argument as a polynomial."""


def written_out_gelu(product: Term) -> tuple[Term, str] | None:
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


def unit_of(c: Call, x: Term, y: Any) -> Term | None:
    """x / max(norm(x), eps) * scale -> unit(x, "floor", eps, scale), and with "outside" x / (norm(x) + eps) * scale.

    The norm is that of the last dimension, or so many times it; numbers among the factors go into the scale.
    """
    if not is_tensor(y):
        if x.op == "unit" and (times := times_number(x.args[3], y)) is not None:
            return c("unit", *x.args[:3], times)  # (x / norm(x)) * k
        if x.op == "mul":
            for unit, weight in (x.args, reversed(x.args)):
                if isinstance(unit, Term) and unit.op == "unit" and is_tensor(weight):
                    scaled = unit_of(Call(c.terms, unit.dtype, unit.shape), unit, y)
                    return None if scaled is None else elementwise(c, "mul", scaled, weight)  # x / norm(x) * w * k
        return None
    for whole, inverse in ((x, y), (y, x)):
        found = _guarded(inverse.args[0]) if inverse.op == "reciprocal" and is_tensor(inverse.args[0]) else None
        if found is None:
            continue
        normed, guard, eps, scale = found
        row, times = without_number(unwidened(whole))
        if unwidened(row) is unwidened(normed) and times > 0:
            return c("unit", whole if times == 1 else row, guard, eps, times_number(scale, times))
    return None


def _guarded(x: Term) -> tuple[Term, str, Any, Any] | None:
    """row, guard, eps, 1 / k of k max(norm(row), eps), or of k (norm(row) + eps), where k > 0."""
    if not (x.op == "add" or (x.op == "clamp" and x.args[2] is None)) or is_tensor(x.args[1]):
        return None
    length, times = without_number(unwidened(x.args[0]))
    if length.op != "sqrt" or length.args[0].op not in ("sum", "mean") or times <= 0:
        return None
    squares, dim, keepdim = length.args[0].args
    squares = unwidened(squares)
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


def without_number(x: Term) -> tuple[Term, float]:
    """y, k where x is y times a number k."""
    times = 1.0
    while x.op == "mul" and (k := times_number(times, x.args[1])) is not None and isinstance(k, float):
        x, times = x.args[0], k
    return x, times


def times_number(scale: Any, k: Any) -> Any:
    """scale * k of numbers, one of which is 1 if the other is not known before the graph runs; else None."""
    if isinstance(k, Term) and k.op == "reciprocal" and isinstance(k.args[0], (int, float)) and k.args[0] != 0:
        k = 1 / k.args[0]
    if isinstance(k, (int, float)) and isinstance(scale, (int, float)):
        return float(scale * k)
    return k if same(scale, 1) and not is_tensor(k) else None


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
    value = unwidened(value)
    if any(value is unwidened(s) for s in symbols):
        return {tuple(int(value is unwidened(s)) for s in symbols): 1}
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
