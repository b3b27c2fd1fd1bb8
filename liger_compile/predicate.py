"""Integers and truth values as functions of positions: the algebra in which attention masks are read.

A value is what one element of a tensor holds, written in terms of where the element stands:

- `Linear`: an integer, a sum of atoms times constants. Atoms are positions, sizes that only the compiler knows,
  elements of other tensors, and quotients and remainders of linear values;
- True, False, `AtLeast` (a linear value >= 0), `Zero`, `Truth` (an element of a bool tensor), `Not`, `All`, `Any`;
- a float constant; `Choice` between two values.

Values are made by the functions below, which simplify: what follows from the ranges of the positions is not kept, so
that equal predicates are usually equal objects (`q - k >= 0` however it was written).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any as Anything


@dataclass(frozen=True)
class Index:
    """A position along one dimension: 0 <= value < extent."""

    name: str
    extent: Linear

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Size:
    """A size that is known only when the graph runs; at least 0."""

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Element:
    """An element of a tensor whose contents are not known: an integer or a truth value."""

    tensor: Anything
    index: tuple[Linear, ...]

    def __repr__(self) -> str:
        return f"{self.tensor!r}[{', '.join(map(repr, self.index))}]"


@dataclass(frozen=True)
class Quotient:
    """floor(of / by)"""

    of: Linear
    by: int

    def __repr__(self) -> str:
        return f"({self.of!r}) // {self.by}"


@dataclass(frozen=True)
class Remainder:
    """of - by * floor(of / by)"""

    of: Linear
    by: int

    def __repr__(self) -> str:
        return f"({self.of!r}) % {self.by}"


Atom = Index | Size | Element | Quotient | Remainder


@dataclass(frozen=True)
class Linear:
    terms: frozenset[tuple[Atom, int]]
    const: int

    def __repr__(self) -> str:
        parts = [f"{'' if n == 1 else '-' if n == -1 else f'{n} * '}{a!r}" for a, n in self.terms]
        parts = sorted(parts, key=lambda p: (p.startswith("-"), p))
        if self.const or not parts:
            parts.append(str(self.const))
        return " + ".join(parts).replace("+ -", "- ")

    @property
    def is_constant(self) -> bool:
        return not self.terms


@dataclass(frozen=True)
class AtLeast:
    """of >= 0"""

    of: Linear

    def __repr__(self) -> str:
        return f"{self.of!r} >= 0"


@dataclass(frozen=True)
class Zero:
    """of == 0"""

    of: Linear

    def __repr__(self) -> str:
        return f"{self.of!r} == 0"


@dataclass(frozen=True)
class Truth:
    of: Element

    def __repr__(self) -> str:
        return repr(self.of)


@dataclass(frozen=True)
class Not:
    of: Truth | Zero

    def __repr__(self) -> str:
        return f"not ({self.of!r})"


@dataclass(frozen=True)
class All:
    of: frozenset[Bool]

    def __repr__(self) -> str:
        return " and ".join(sorted(f"({b!r})" for b in self.of))


@dataclass(frozen=True)
class Any:
    of: frozenset[Bool]

    def __repr__(self) -> str:
        return " or ".join(sorted(f"({b!r})" for b in self.of))


Bool = bool | AtLeast | Zero | Truth | Not | All | Any


@dataclass(frozen=True)
class Choice:
    """`yes` where `condition` holds, `no` elsewhere."""

    condition: Bool
    yes: Value
    no: Value

    def __repr__(self) -> str:
        return f"({self.yes!r} if {self.condition!r} else {self.no!r})"


Value = Linear | Bool | float | Choice


class Unread(Exception):
    """A computation that this algebra has no words for, or too many."""


LONGEST = 64
"""Comparisons and alternatives in one value. Masks have a handful; what has more is not taken apart, in little time."""


def _short(value: Value) -> Value:
    if _length(value) > LONGEST:
        raise Unread("has too many cases")
    return value


def _length(value: Value) -> int:
    if isinstance(value, (All, Any)):
        return sum(map(_length, value.of))
    if isinstance(value, Choice):
        return _length(value.condition) + _length(value.yes) + _length(value.no)
    return 1


# ---- integers -----------------------------------------------------------------------------------------------------


def linear(atoms: dict[Atom, int] | Atom | int, const: int = 0) -> Linear:
    if isinstance(atoms, int):
        return Linear(frozenset(), atoms + const)
    if not isinstance(atoms, dict):
        atoms = {atoms: 1}
    return Linear(frozenset((a, n) for a, n in atoms.items() if n), const)


def index(name: str, extent: Linear) -> Linear:
    """The position along a dimension; 0 where there is one only."""
    return linear(0) if extent == linear(1) else linear(Index(name, extent))


def plus(a: Linear, b: Linear, times: int = 1) -> Linear:
    """a + times * b"""
    sums = dict(a.terms)
    for atom, n in b.terms:
        sums[atom] = sums.get(atom, 0) + times * n
    return linear(sums, a.const + times * b.const)


def scaled(a: Linear, n: int) -> Linear:
    return linear({atom: n * m for atom, m in a.terms}, n * a.const)


def bound(a: Linear, upper: bool) -> Linear | None:
    """A value in sizes alone that `a` never passes; None if there is none."""
    result = linear(a.const)
    for atom, n in a.terms:
        highest = upper == (n > 0)
        if isinstance(atom, Size):
            result = plus(result, linear(atom), n)
        elif isinstance(atom, Index):
            if highest:
                result = plus(result, plus(atom.extent, linear(-1)), n)
        elif isinstance(atom, Remainder):
            if highest:
                result = plus(result, linear(atom.by - 1), n)
        elif isinstance(atom, Quotient):
            inner = bound(atom.of, highest)
            if inner is None or not inner.is_constant:
                return None
            result = plus(result, linear(inner.const // atom.by), n)
        else:
            return None
    return result


def known_at_least(a: Linear, least: int) -> bool:
    """Whether a >= least wherever the positions stand and however large the sizes are."""
    low = bound(a, upper=False)
    return low is not None and low.const >= least and all(n > 0 for _, n in low.terms)


def _divided(a: Linear, by: int) -> tuple[Linear, Linear]:
    """(whole, rest) with a == by * whole + rest, as far as the coefficients show."""
    whole = linear({atom: n // by for atom, n in a.terms}, a.const // by)
    return whole, plus(a, whole, -by)


def quotient(a: Linear, by: int) -> Linear:
    whole, rest = _divided(a, by)
    if known_at_least(rest, 0) and known_at_least(plus(linear(by - 1), rest, -1), 0):
        return whole
    return plus(whole, linear(Quotient(rest, by)))


def remainder(a: Linear, by: int) -> Linear:
    _, rest = _divided(a, by)
    if known_at_least(rest, 0) and known_at_least(plus(linear(by - 1), rest, -1), 0):
        return rest
    return linear(Remainder(rest, by))


# ---- truth values -------------------------------------------------------------------------------------------------


def at_least_zero(a: Linear) -> Bool:
    if known_at_least(a, 0):
        return True
    return False if known_at_least(scaled(a, -1), 1) else AtLeast(a)


def is_zero(a: Linear) -> Bool:
    if a == linear(0):
        return True
    if known_at_least(a, 1) or known_at_least(scaled(a, -1), 1):
        return False
    return Zero(min(a, scaled(a, -1), key=lambda x: (repr(x).startswith("-"), repr(x))))  # -a == 0 -> a == 0


def negation(b: Bool) -> Bool:
    if isinstance(b, bool):
        return not b
    if isinstance(b, Not):
        return b.of
    if isinstance(b, AtLeast):  # not a >= 0 -> -a - 1 >= 0
        return at_least_zero(plus(linear(-1), b.of, -1))
    if isinstance(b, (All, Any)):  # what is as simple as it gets stays so: the rules for both are the same
        return (Any if isinstance(b, All) else All)(frozenset(map(negation, b.of)))
    return Not(b)


def conjunction(*values: Bool) -> Bool:
    found: set[Bool] = set()
    for b in values:
        found |= b.of if isinstance(b, All) else {b}
    found.discard(True)
    if False in found or any(negation(b) in found for b in found):
        return False
    found = _strictest(found)
    if _is_empty(found):
        return False
    return True if not found else found.pop() if len(found) == 1 else _short(All(frozenset(found)))


def _strictest(found: set[Bool]) -> set[Bool]:
    """a >= 0 and a + n >= 0 -> a >= 0"""
    least: dict[Anything, int] = {}
    for b in found:
        if isinstance(b, AtLeast):
            least[b.of.terms] = min(least.get(b.of.terms, b.of.const), b.of.const)
    return {b for b in found if not isinstance(b, AtLeast) or least[b.of.terms] == b.of.const}


def _is_empty(found: set[Bool]) -> bool:
    """a - 4 >= 0 and 3 - a >= 0"""
    least = {b.of.terms: b.of.const for b in found if isinstance(b, AtLeast)}
    opposite = {terms: frozenset((atom, -n) for atom, n in terms) for terms in least}
    return any(opposite[t] in least and const + least[opposite[t]] < 0 for t, const in least.items())


def disjunction(*values: Bool) -> Bool:
    """a or b -> not (not a and not b), so that one set of rules serves both"""
    return negation(conjunction(*map(negation, values)))


# ---- any value ----------------------------------------------------------------------------------------------------


def choice(condition: Bool, yes: Value, no: Value) -> Value:
    if isinstance(condition, bool):
        return yes if condition else no
    return _choice(condition, _assuming(condition, yes), _assuming(negation(condition), no))


def _assuming(condition: Bool, value: Value) -> Value:
    """The value where `condition` holds: a choice by the same, or by what follows from it, is made."""
    if not isinstance(value, Choice):
        return value
    both = conjunction(condition, value.condition)
    if both is False or both == condition:
        return _assuming(condition, value.yes if both else value.no)
    return _choice(value.condition, _assuming(condition, value.yes), _assuming(condition, value.no))


def _choice(condition: Bool, yes: Value, no: Value) -> Value:
    if yes == no or same_where(condition, yes, no):
        return no
    if isinstance(yes, bool) and isinstance(no, bool):
        return condition if yes else negation(condition)
    if is_bool(yes) and is_bool(no):
        return disjunction(conjunction(condition, yes), conjunction(negation(condition), no))
    return _short(Choice(condition, yes, no))


def same_where(condition: Bool, yes: Value, no: Value) -> bool:
    """Whether `yes` is what `no` is at the only position where `condition` holds: i <= 0 holds at i == 0 alone."""
    if not isinstance(condition, AtLeast) or len(condition.of.terms) != 1 or condition.of.const != 0:
        return False
    ((atom, n),) = condition.of.terms
    if not isinstance(atom, Index) or n > 0:
        return False
    return substituted(no, atom, linear(0)) == substituted(yes, atom, linear(0))


def substituted(value: Value, position: Index, by: Linear) -> Value:
    """The value where `position` is `by`."""
    return replaced(value, lambda atom: by if atom == position else linear(atom))


EXTENTS = {name: linear(Index(name, linear(Size(f"extent of {name}")))) for name in "bhqk"}
"""Positions along the dimensions of a mask, however long these are."""


def portable(value: Value, place_of: Callable[[Anything], int]) -> Value:
    """What is read of a mask in one graph, for others that are given it: without the sizes of that graph, and its
    tensors by their places.

    Raises:
        Unread: it hangs on sizes that only that graph knows.
    """

    def position(atom: Index | Size) -> Linear:
        if isinstance(atom, Size) or atom.name not in EXTENTS:
            raise Unread(f"hangs on {atom!r}, which only one graph knows")
        return EXTENTS[atom.name]

    return replaced(value, position, place_of)


def placed(value: Value, positions: dict[str, Linear], tensors: Sequence[Anything]) -> Value:
    """What `portable` gave, in a graph where the mask's positions and tensors are these."""
    return replaced(value, lambda atom: positions[atom.name], lambda place: tensors[place])


def replaced(
    value: Value,
    position: Callable[[Index | Size], Linear],
    tensor: Callable[[Anything], Anything] = lambda t: t,
) -> Value:
    """The value with other positions and sizes, and elements of other tensors."""

    def of(v: Value) -> Value:
        match v:
            case Linear():
                return total(v)
            case AtLeast():
                return at_least_zero(total(v.of))
            case Zero():
                return is_zero(total(v.of))
            case Truth():
                return Truth(element(v.of))
            case Not():
                return negation(of(v.of))
            case All() | Any():
                return (conjunction if isinstance(v, All) else disjunction)(*map(of, v.of))
            case Choice():
                return choice(of(v.condition), of(v.yes), of(v.no))
        return v

    def total(v: Linear) -> Linear:
        result = linear(v.const)
        for a, n in v.terms:
            result = plus(result, atom(a), n)
        return result

    def atom(a: Atom) -> Linear:
        match a:
            case Element():
                return linear(element(a))
            case Quotient() | Remainder():
                return (quotient if isinstance(a, Quotient) else remainder)(total(a.of), a.by)
        return position(a)

    def element(e: Element) -> Element:
        return Element(tensor(e.tensor), tuple(map(total, e.index)))

    return of(value)


def is_bool(value: Value) -> bool:
    return isinstance(value, (bool, AtLeast, Zero, Truth, Not, All, Any))


def truth(value: Value) -> Bool:
    """value != 0"""
    if is_bool(value):
        return value
    return negation(compared("eq", value, linear(0)))


def number(value: Value) -> Value:
    """A truth value as 1 or 0; anything else as it is."""
    return choice(value, linear(1), linear(0)) if is_bool(value) else value


def absolute(value: Value) -> Value:
    def one(v: Value) -> Value:
        return choice(at_least_zero(v), v, scaled(v, -1)) if isinstance(v, Linear) else abs(v)

    return mapped(one, number(value))


def mapped(function: Callable[..., Value], *values: Value) -> Value:
    """A function of plain values, applied to each alternative of those that are choices."""
    for i, v in enumerate(values):
        if isinstance(v, Choice):
            with_yes, with_no = ((*values[:i], w, *values[i + 1 :]) for w in (v.yes, v.no))
            return choice(v.condition, mapped(function, *with_yes), mapped(function, *with_no))
    return function(*values)


def arithmetic(name: str, a: Value, b: Value) -> Value:
    """add, sub, mul, floordiv, mod of integers and float constants."""
    return mapped(lambda x, y: _arithmetic(name, x, y), number(a), number(b))


def _arithmetic(name: str, a: Value, b: Value) -> Value:
    if isinstance(a, Linear) and isinstance(b, Linear):
        if name in ("add", "sub"):
            return plus(a, b, 1 if name == "add" else -1)
        if name == "mul" and (a.is_constant or b.is_constant):
            return scaled(a, b.const) if b.is_constant else scaled(b, a.const)
        if name in ("floordiv", "mod") and b.is_constant and b.const > 0:
            return (quotient if name == "floordiv" else remainder)(a, b.const)
    else:
        x, y = _float(a), _float(b)
        if name in ("add", "sub", "mul"):
            return {"add": x + y, "sub": x - y, "mul": x * y}[name]
    raise Unread(f"is a {name} of {a!r} and {b!r}")


def _float(value: Value) -> float:
    if isinstance(value, Linear) and value.is_constant and abs(value.const) <= 2**24:
        return float(value.const)
    if isinstance(value, float):
        return value
    raise Unread(f"computes in floating point with {value!r}")


def compared(name: str, a: Value, b: Value) -> Bool:
    """eq, ne, lt, le, gt, ge."""
    if name in ("eq", "ne") and is_bool(a) and is_bool(b):
        equal = disjunction(conjunction(a, b), conjunction(negation(a), negation(b)))
        return equal if name == "eq" else negation(equal)
    return mapped(lambda x, y: _compared(name, x, y), number(a), number(b))


def _compared(name: str, a: Value, b: Value) -> Bool:
    if isinstance(a, Linear) and isinstance(b, Linear):
        difference = plus(a, b, -1)
        if name in ("eq", "ne"):
            return is_zero(difference) if name == "eq" else negation(is_zero(difference))
        if name in ("lt", "le"):
            difference = scaled(difference, -1)
        return at_least_zero(plus(difference, linear(-1 if name in ("lt", "gt") else 0)))
    x, y = _float(a), _float(b)
    if math.isnan(x) or math.isnan(y):
        raise Unread("compares with NaN")
    return {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}[name]
