"""Calls that change a dtype, or nothing."""

from __future__ import annotations

from typing import Any

import torch

from ..terms import Expr, Term
from .base import RULES, Call, NotCanonical, cast, rule


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
