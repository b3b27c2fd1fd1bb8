"""Outputs of a linear layer, perhaps scaled or capped, of which a row depends on one row of the layer's input."""

from __future__ import annotations

from collections.abc import Callable

from ..terms import Term, same
from .base import Call, is_tensor, unwidened, widens


def is_rowwise(x: Term) -> bool:
    """Whether x is a linear layer's output, perhaps scaled or capped, or columns of it: a row depends on one row of
    the input."""
    while x.op == "tanh" or _is_scaled(x) or widens(x) or is_columns(x):
        x = x.args[0].args[0] if is_scaled_sigmoid(x) else x.args[0]
    return x.op == "linear"


def is_scaled_sigmoid(x: Term) -> bool:
    return x.op == "mul" and x.args[0].op == "sigmoid" and isinstance(x.args[1], (int, float))


def _is_scaled(x: Term) -> bool:
    """Whether this is a product with a number, in a tensor or not, or with a number for each class."""
    return x.op == "mul" and (not is_tensor(x.args[1]) or is_scale(x.args[1], x.args[0]))


def is_scale(scale: Term, x: Term) -> bool:
    known = x.op in ("linear", "cast") and scale.shape is not None and scale.is_float and is_rowwise(x)
    return known and (is_one_number(scale) or same(scale.shape, x.shape[-1:]))


def is_one_number(scale: Term) -> bool:
    return same(scale.shape, ()) or same(scale.shape, (1,))


def is_columns(x: Term) -> bool:
    return x.op == "slice" and x.args[1] == -1 and x.args[4] == 1


def has_rows(x: Term) -> bool:
    """Whether rows of x are those of the linear layer's input. Less a number for each row they are too, but columns
    are not."""
    return is_rowwise(x.args[0] if x.op == "shifted" or (x.op == "log_softmax" and x.args[1] == -1) else x)


def is_losses(x: Term) -> bool:
    """Whether x is the losses of rows, flat."""
    return x.op == "cross_entropy" and x.args[4] == "none"


def flat(x: Term) -> Term:
    """What was given a shape, and perhaps cast to a wider dtype."""
    x = unwidened(x)
    return x.args[0] if x.op == "reshape" else x


def of_rows(c: Call, x: Term, move: Callable[[Term], Term]) -> Term:
    """Rows of a linear layer's output -> the output of those rows."""
    inner, *rest = x.args
    if x.op == "linear":
        moved = move(inner)
        return c.terms.make("linear", (moved, *rest), x.dtype, (*moved.shape[:-1], x.shape[-1]))
    moved = of_rows(c, inner, move)
    return c.terms.make(x.op, (moved, *rest), x.dtype, (*moved.shape[:-1], x.shape[-1]))
