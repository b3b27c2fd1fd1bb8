"""A predicate on positions as a Python expression, which a mask function can be made of again.

The expression reads like what it says, `(q - k >= 0) & (x0[b, k] != 0)`, computes with integer and bool tensors, and
is the same text for the same predicate, so that graphs that hold it are cached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .elements import extent_of
from .graph_terms import GraphTerms
from .predicate import (
    All,
    Any,
    AtLeast,
    Bool,
    Element,
    Index,
    Linear,
    Not,
    Quotient,
    Remainder,
    Truth,
    Unread,
    Zero,
    known_at_least,
    linear,
    plus,
)
from .terms import Term


@dataclass(frozen=True)
class MaskCode:
    source: str
    """An expression of b, h, q, k and x0, x1, ..."""
    tensors: tuple[Term, ...]
    """What x0, x1, ... stand for."""


def write(view: GraphTerms, predicate: Bool) -> MaskCode:
    """The code of a predicate whose positions are b, h, q and k.

    Raises:
        Unread: it holds something that no mask function can compute: a size known only when the graph runs, an element
            of a tensor that this graph does not hold, or that may lie outside it, or one for every query and key.
    """
    writer = _Writer(view)
    return MaskCode(writer.bool(predicate), tuple(writer.tensors))


def function(source: str, tensors: int) -> Callable[..., torch.Tensor]:
    """What FlexAttention calls a mask_mod: a function of b, h, q, k and that many tensors."""
    names = ", ".join(["b", "h", "q", "k", *(f"x{i}" for i in range(tensors))])
    return eval(f"lambda {names}: {source}", {})


class _Writer:
    def __init__(self, view: GraphTerms) -> None:
        self.view = view
        self.tensors: dict[Term, str] = {}

    def bool(self, value: Bool) -> str:
        match value:
            case AtLeast():
                return f"{self.linear(value.of)} >= 0"
            case Zero():
                return f"{self.linear(value.of)} == 0"
            case Truth():
                return self.element(value.of)
            case Not(of=Zero(of=of)):
                return f"{self.linear(of)} != 0"
            case Not():
                return f"~{self.bool(value.of)}"
            case All() | Any():
                parts = (f"({self.bool(part)})" for part in sorted(value.of, key=repr))
                return (" & " if isinstance(value, All) else " | ").join(parts)
        raise Unread(f"is {value!r} everywhere")

    def linear(self, value: Linear) -> str:
        parts = []
        for atom, n in sorted(value.terms, key=lambda t: (t[1] < 0, repr(t[0]))):
            size = "" if abs(n) == 1 else f"{abs(n)} * "
            parts.append(("- " if n < 0 else "+ " if parts else "") + size + self.atom(atom))
        if value.const or not parts:
            parts.append(f"{'-' if value.const < 0 else '+'} {abs(value.const)}" if parts else str(value.const))
        return " ".join(parts)

    def atom(self, atom: object) -> str:
        match atom:
            case Index():
                return atom.name
            case Element():
                wide = atom.tensor.dtype in (torch.int64, torch.int32)  # in others sums wrap around
                return self.element(atom) + ("" if wide else ".long()")
            case Quotient():
                return f"(({self.linear(atom.of)}) // {atom.by})"
            case Remainder():
                return f"(({self.linear(atom.of)}) % {atom.by})"
        raise Unread(f"hangs on {atom!r}, which is known only when the graph runs")

    def element(self, element: Element) -> str:
        tensor = self.view.own(element.tensor)
        if tensor is None:
            raise Unread(f"reads {element.tensor!r}, which this graph does not hold")
        for i, n in zip(element.index, tensor.shape, strict=True):
            if not (known_at_least(i, 0) and known_at_least(plus(plus(extent_of(n), linear(-1)), i, -1), 0)):
                raise Unread(f"may read outside {tensor!r}")
        read = {atom.name for i in element.index for atom, _ in i.terms if isinstance(atom, Index)}
        if {"q", "k"} <= read:
            raise Unread(f"looks {tensor!r} up for every query and key")
        name = self.tensors.setdefault(tensor, f"x{len(self.tensors)}")
        return f"{name}[{', '.join(map(self.linear, element.index))}]"
