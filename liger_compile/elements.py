"""What one element of a tensor in the graph holds, read back from how the graph computes it.

`read(view, term, index)` follows a term through arange, comparisons, logical operations, views, gathers and the like,
and gives the element at `index` as a value of `predicate.py`. What cannot be followed is an `Element` of that tensor,
as long as it is an integer or a truth value; floating point stays unread, but for constants and choices between them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from . import _torch
from .graph_terms import GraphTerms
from .predicate import (
    Bool,
    Element,
    Linear,
    Size,
    Truth,
    Unread,
    Value,
    absolute,
    arithmetic,
    at_least_zero,
    choice,
    compared,
    conjunction,
    disjunction,
    index,
    is_bool,
    known_at_least,
    linear,
    mapped,
    negation,
    number,
    placed,
    plus,
    quotient,
    remainder,
    scaled,
    truth,
)
from .terms import Term, same

Index = tuple[Linear, ...]


def read(view: GraphTerms, term: Term, at: Index) -> Value:
    """The element of `term` at `at`, one linear value for each dimension.

    Raises:
        Unread: a computation in floating point, or one whose result is no tensor in the graph.
    """
    return _Reader(view).element(term, at)


def positions(shape: tuple[Any, ...], names: str) -> Index:
    """The position in each dimension of a shape, by name."""
    return tuple(index(name, extent_of(n)) for name, n in zip(names, shape, strict=True))


def extent_of(value: Any) -> Linear:
    """A size as a linear value."""
    symbols, const = _torch.size_terms(value)
    return linear({Size(name): n for name, n in symbols.items()}, const)


class _Reader:
    def __init__(self, view: GraphTerms) -> None:
        self.view = view
        self._read: dict[tuple[Any, ...], Value] = {}
        self._names = itertools.count()
        self._mapped: dict[int, Linear] = {}
        """Which element of the dimension that it maps over each `vmap` is at, by its level."""

    def element(self, term: Any, at: Index) -> Value:
        if isinstance(term, bool):
            return term
        if isinstance(term, float):
            return term
        if isinstance(term, (int, torch.SymInt)):
            return extent_of(term)
        if not isinstance(term, Term) or term.shape is None or term.dtype is None:
            raise Unread(f"reads {term!r}")
        key = (term, at, *self._mapped.items())
        if key not in self._read:
            self._read[key] = self._followed(term, at)
        return self._read[key]

    def mapped(self, level: int) -> Linear:
        """Which element the `vmap` of a level is at."""
        if level not in self._mapped:
            raise Unread("is seen from outside of the vmap that it is in")
        return self._mapped[level]

    def element_in(self, level: int, position: Linear | None, term: Term, at: Index) -> Value:
        """An element of a tensor in a `vmap` of that level that is at `position`, or, without one, outside of it. Those
        of lower levels are around it."""
        outer = {k: v for k, v in self._mapped.items() if k < level}
        before, self._mapped = self._mapped, outer | ({} if position is None else {level: position})
        try:
            return self.element(term, at)
        finally:
            self._mapped = before

    def _followed(self, term: Term, at: Index) -> Value:
        if term in self.view.given:
            caller, passed = self.view.given[term]
            return _Reader(caller).element(passed, at)
        if term in self.view.said and not self.view.is_written(self.view.carriers[term][0]):
            value, inputs = self.view.said[term]
            by_name = dict(zip("bhqk"[4 - len(at) :], at, strict=True))
            return placed(value, by_name, [self.view.of[n] for n in inputs])
        rule = _rule_of(term)
        try:
            if rule is None:
                raise Unread(f"is {term!r}")
            return _held(rule(self, term, at, *(term.args[1:] if term.op == "call" else term.args)), term.dtype)
        except (Unread, TypeError) as error:  # TypeError: arguments the rule does not know
            if term.dtype.is_floating_point or term.dtype.is_complex or not self._is_in_graph(term):
                raise Unread(str(error)) from error
        element = Element(term, at)
        return Truth(element) if term.dtype is torch.bool else linear(element)

    def _is_in_graph(self, term: Term) -> bool:
        """Whether this is one tensor there, and not one for each element that a `vmap` maps."""
        nodes = self.view.carriers.get(term)
        return bool(nodes) and not self.view.region[nodes[0]].is_transformed

    def operand(self, value: Any, at: Index) -> Value:
        """An operand's element, where the result has its element `at` by broadcasting."""
        if not isinstance(value, Term) or value.shape is None:
            return self.element(value, ())
        behind = at[len(at) - len(value.shape) :]
        seen = (linear(0) if same(n, 1) else i for n, i in zip(value.shape, behind, strict=True))
        return self.element(value, tuple(seen))

    def fresh(self, extent: Linear) -> Linear:
        return index(f"j{next(self._names)}", extent)


def _held(value: Value, dtype: torch.dtype) -> Value:
    """The value, if a tensor of that dtype holds it. Integers wrap around; positions are taken to fit into 32 bits."""
    if dtype is torch.bool or dtype.is_floating_point or dtype.is_complex:
        return value
    range_of, wide = torch.iinfo(dtype), dtype in (torch.int64, torch.int32)

    def one(v: Value) -> Value:
        if isinstance(v, Linear):
            if range_of.min <= v.const <= range_of.max if v.is_constant else wide or _is_element(v):
                return v
        raise Unread(f"may not fit into {dtype}")

    return mapped(one, number(value))


def _is_element(value: Linear) -> bool:
    return value.const == 0 and [(type(atom), n) for atom, n in value.terms] == [(Element, 1)]


Rule = Callable[..., Value]
_OPERATIONS: dict[str, Rule] = {}
"""Of canonical terms, by what they are called in `rules`."""
_CALLS: dict[str, Rule] = {}
"""Of other calls, by torch's name. `x.repeat(1, 2)` is one, and is not what a canonical `repeat` is."""


def _rule_of(term: Term) -> Rule | None:
    if term.op != "call":
        return _OPERATIONS.get(term.op)
    name = term.args[0]
    return _CALLS.get(name) or _CALLS.get(str(name).removesuffix("_"))  # written in place: what is there afterwards


def _into(table: dict[str, Rule], names: tuple[str, ...]) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        table.update(dict.fromkeys(names, function))
        return function

    return add


def _operation(*names: str) -> Callable[[Rule], Rule]:
    return _into(_OPERATIONS, names)


def _rule(*names: str) -> Callable[[Rule], Rule]:
    return _into(_CALLS, names)


# ---- making tensors -----------------------------------------------------------------------------------------------


@_rule("arange")
def _arange(r: _Reader, term: Term, at: Index, *args: Any) -> Value:
    bounds = args[: len(args) - 4]  # behind them: dtype, layout, device, pin_memory
    start, step = (bounds[0] if len(bounds) > 1 else 0), (bounds[2] if len(bounds) > 2 else 1)
    if not isinstance(step, int) or not isinstance(start, (int, torch.SymInt)) or term.dtype.is_floating_point:
        raise Unread("counts in steps that are not whole")
    return plus(extent_of(start), scaled(at[0], step))


@_rule("ones", "ones_like", "new_ones")
def _ones(r: _Reader, term: Term, at: Index, *_: Any) -> Value:
    return _constant(term, 1)


@_rule("zeros", "zeros_like", "new_zeros")
def _zeros(r: _Reader, term: Term, at: Index, *_: Any) -> Value:
    return _constant(term, 0)


@_rule("full")
def _full(r: _Reader, term: Term, at: Index, size: Any, value: Any, *_: Any) -> Value:
    return _constant(term, value)


@_rule("full_like", "new_full")
def _full_like(r: _Reader, term: Term, at: Index, like: Any, *rest: Any) -> Value:
    return _constant(term, rest[0] if term.args[0] == "full_like" else rest[1])


@_rule("scalar_tensor", "tensor")
def _scalar(r: _Reader, term: Term, at: Index, value: Any, *_: Any) -> Value:
    return _constant(term, value)


def _constant(term: Term, value: Any) -> Value:
    if not isinstance(value, (bool, int, float)):
        raise Unread("is filled with a value that is not known")
    if term.dtype is torch.bool:
        return bool(value)
    return float(value) if term.dtype.is_floating_point else linear(int(value))


@_rule("fill_", "zero_")
def _filled(r: _Reader, term: Term, at: Index, x: Term, value: Any = 0) -> Value:
    return _constant(term, value)


# ---- moving elements ----------------------------------------------------------------------------------------------


@_operation("cast")
def _cast(r: _Reader, term: Term, at: Index, x: Term, dtype: Any) -> Value:
    value = r.element(x, at)
    if dtype is torch.bool:
        return truth(value)
    if not dtype.is_floating_point:
        if dtype not in (torch.int64, torch.int32):
            raise Unread(f"casts to {dtype}, which cannot hold every position")
        if x.dtype.is_floating_point:
            raise Unread("rounds to an integer")
        return number(value)
    exact = 2 / torch.finfo(dtype).eps  # integers up to this are kept as they are

    def rounded(v: Value) -> Value:
        if isinstance(v, float):
            return float(torch.tensor(v, dtype=torch.float64).to(dtype))
        if isinstance(v, Linear) and v.is_constant and abs(v.const) <= exact:
            return float(v.const)
        raise Unread(f"is the integer {v!r} in floating point")

    return mapped(rounded, number(value))


@_operation("slice")
def _slice(r: _Reader, term: Term, at: Index, x: Term, dim: int, lo: Any, hi: Any, step: int) -> Value:
    moved = list(at)
    moved[dim] = plus(extent_of(lo), scaled(at[dim], step))
    return r.element(x, tuple(moved))


@_operation("select")
def _select(r: _Reader, term: Term, at: Index, x: Term, dim: int, where: Any) -> Value:
    place = len(x.shape) + dim
    return r.element(x, (*at[:place], extent_of(where), *at[place:]))


@_operation("expand")
def _expand(r: _Reader, term: Term, at: Index, x: Term, shape: Any) -> Value:
    return r.operand(x, at)


@_operation("repeat")
def _repeat(r: _Reader, term: Term, at: Index, x: Term, dim: int, n: int) -> Value:
    moved = list(at)
    moved[dim] = quotient(at[dim], n)
    return r.element(x, tuple(moved))


@_rule("repeat")
def _tiled(r: _Reader, term: Term, at: Index, x: Term, *_: Any) -> Value:
    """x.repeat(...): all of it again and again."""
    extents = term.shape[len(at) - len(x.shape) :]
    behind = at[len(at) - len(x.shape) :]
    moved = [i if same(n, m) else _modulo(i, n) for i, n, m in zip(behind, x.shape, extents, strict=True)]
    return r.element(x, tuple(moved))


def _modulo(i: Linear, n: Any) -> Linear:
    if not isinstance(n, int):
        raise Unread("is repeated by sizes that only the compiler knows")
    return remainder(i, n)


@_operation("permute")
def _permute(r: _Reader, term: Term, at: Index, x: Term, order: tuple[int, ...]) -> Value:
    moved = list(at)
    for to, source in zip(range(-len(order), 0), order, strict=True):
        moved[source] = at[to]
    return r.element(x, tuple(moved))


@_operation("reshape")
def _reshape(r: _Reader, term: Term, at: Index, x: Term, shape: Any) -> Value:
    return r.element(x, _unshaped(x.shape, term.shape, at))


def _unshaped(before: tuple[Any, ...], after: tuple[Any, ...], at: Index) -> Index:
    """Where the element `at` of a reshaped tensor was before."""
    old, new = list(range(len(before))), list(range(len(after)))
    found: dict[int, Linear] = {}
    while old or new:
        if old and same(before[old[0]], 1):
            found[old.pop(0)] = linear(0)
        elif new and same(after[new[0]], 1):
            new.pop(0)
        elif old and new and same(before[old[0]], after[new[0]]):
            found[old.pop(0)] = at[new.pop(0)]
        else:
            _regroup(before, after, at, old, new, found)
    return tuple(found[d] for d in range(len(before)))


def _regroup(before: Any, after: Any, at: Index, old: list[int], new: list[int], found: dict[int, Linear]) -> None:
    """Takes the fewest dimensions from the front of both that hold as many elements."""
    mine: list[int] = []
    theirs: list[int] = []
    while not mine or math.prod(before[d] for d in mine) != math.prod(after[d] for d in theirs):
        short = not mine or (theirs and math.prod(before[d] for d in mine) < math.prod(after[d] for d in theirs))
        source, chosen, shape = (old, mine, before) if short else (new, theirs, after)
        if not source or not isinstance(shape[source[0]], int):
            raise Unread("is reshaped by sizes that only the compiler knows")
        chosen.append(source.pop(0))
    offset = linear(0)
    for d in theirs:
        offset = plus(scaled(offset, after[d]), at[d])
    for d in reversed(mine):
        found[d] = remainder(offset, before[d])
        offset = quotient(offset, before[d])


@_operation("cat")
def _cat(r: _Reader, term: Term, at: Index, parts: tuple[Term, ...], dim: int) -> Value:
    return _as(_joined(r, parts, dim, at), term.dtype)


def _joined(r: _Reader, parts: tuple[Term, ...], dim: int, at: Index) -> Value:
    first, *others = parts
    value = r.element(first, at)
    if not others:
        return value
    here = extent_of(first.shape[dim])
    behind = list(at)
    behind[dim] = plus(at[dim], here, -1)
    inside = at_least_zero(plus(plus(here, linear(-1)), at[dim], -1))
    return choice(inside, value, _joined(r, tuple(others), dim, tuple(behind)))


@_rule("getitem", "index")
def _gather(r: _Reader, term: Term, at: Index, x: Term, items: Any) -> Value:
    """x[i, j, ...] with a tensor or nothing for each dimension; all tensors broadcast together."""
    if term.args[0] == "index":
        items = tuple(slice(None) if i is None else i for i in items)  # in x[...] that is a new dimension
    items = _spelled_out(items, len(x.shape))
    if any(not isinstance(i, Term) and i is not None and i != slice(None) for i in items):
        raise Unread("indexes with data and numbers or slices")
    data = [d for d, i in enumerate(items) if isinstance(i, Term)]
    if not data or any(items[d].dtype in MASKING for d in data) or data != list(range(data[0], data[-1] + 1)):
        raise Unread("indexes with data in a way that is not a plain gather")
    rank = max(len(items[d].shape) for d in data)
    chosen = at[data[0] : data[0] + rank]
    rest = [*at[: data[0]], *[None] * len(data), *at[data[0] + rank :]]
    moved: list[Linear] = []
    for item, position in zip(items, rest, strict=True):
        if isinstance(item, Term):
            moved.append(_within(r.operand(item, chosen), x.shape[len(moved)]))
        elif item is not None:
            moved.append(position)
    return r.element(x, tuple(moved))


MASKING = frozenset({torch.bool, torch.uint8})
"""Tensors of these say of each element whether it is meant, others which elements are."""


def _spelled_out(items: Any, rank: int) -> list[Any]:
    """The items of x[items], with one for each dimension of x that has none."""
    items = list(items) if isinstance(items, (tuple, list)) else [items]
    named = sum(_dimensions(i) for i in items)
    front = next((n for n, i in enumerate(items) if i is Ellipsis), None)
    if front is None:
        return items + [slice(None)] * (rank - named)
    return items[:front] + [slice(None)] * (rank - named) + items[front + 1 :]


def _dimensions(item: Any) -> int:
    """How many dimensions of x an item of x[items] is for."""
    if isinstance(item, Term) and item.dtype in MASKING:
        return len(item.shape)
    return 0 if item is None or item is Ellipsis else 1


def _within(value: Value, extent: Any) -> Linear:
    """A value that is certainly a position, not one counted from the end or outside."""
    last = plus(extent_of(extent), linear(-1))
    if isinstance(value, Linear) and known_at_least(value, 0) and known_at_least(plus(last, value, -1), 0):
        return value
    raise Unread("indexes with data that may be negative")


@_rule("_add_batch_dim")
def _mapped_over(r: _Reader, term: Term, at: Index, x: Term, dim: int, level: int) -> Value:
    """What a function that `vmap` calls gets of x, which it maps over a dimension."""
    dim %= len(x.shape)
    return r.element_in(level, None, x, (*at[:dim], r.mapped(level), *at[dim:]))


@_rule("_remove_batch_dim")
def _stacked(r: _Reader, term: Term, at: Index, x: Term, level: int, extent: Any, dim: int) -> Value:
    """What `vmap` makes of the results of all calls."""
    dim %= len(at)
    return r.element_in(level, at[dim], x, (*at[:dim], *at[dim + 1 :]))


@_rule("setitem_")
def _set(r: _Reader, term: Term, at: Index, x: Term, items: Any, value: Any) -> Value:
    """x[items] = value, as x is afterwards, for slices and numbers that are known, and a mask among them."""
    items = _spelled_out(items, len(x.shape))
    if sum(isinstance(i, Term) for i in items) > 1:
        raise Unread("writes to what several tensors choose together")
    inside: Bool = True
    within: list[Linear] = []
    written, end = None, len(at)
    for item in reversed(items):
        end -= _dimensions(item)
        if isinstance(item, Term):
            inside = conjunction(inside, _chosen(r, item, at[end:]))
            written = len(within)  # the elements that a mask chooses are one dimension, in which no position is known
            continue
        first, last, step = _range(item, x.shape[end])
        position = plus(at[end], first, -1)
        inside = conjunction(inside, at_least_zero(position), at_least_zero(plus(last, at[end], -1)))
        if step is not None:
            within.insert(0, position)
    if isinstance(value, Term) and len(value.shape) > (len(within) if written is None else written):
        raise Unread("writes what has more dimensions than it is written to")
    return choice(inside, _as(r.operand(value, tuple(within)), term.dtype), r.element(x, at))


def _chosen(r: _Reader, mask: Term, at: Index) -> Bool:
    """Whether a mask chooses what is at `at`, whose first dimensions are the mask's."""
    if mask.dtype is not torch.bool:
        raise Unread(f"writes to {mask!r}, which is not known")
    return truth(r.element(mask, at[: len(mask.shape)]))


@_rule("index_put")
def _put(r: _Reader, term: Term, at: Index, x: Term, items: Any, value: Any, accumulate: bool = False) -> Value:
    if accumulate:
        raise Unread("adds to what was there, perhaps more than once")
    return _set(r, term, at, x, tuple(slice(None) if i is None else i for i in items), value)


def _range(item: Any, extent: Any) -> tuple[Linear, Linear, int | None]:
    """(first, last, step) of what an item takes of a dimension; no step for a single element."""
    if item == slice(None):
        return linear(0), plus(extent_of(extent), linear(-1)), 1
    if isinstance(extent, int) and isinstance(item, slice):
        first, end, step = item.indices(extent)
        if step == 1:
            return linear(first), linear(end - 1), 1
    if isinstance(extent, int) and isinstance(item, int) and not isinstance(item, bool):
        return linear(item % extent), linear(item % extent), None
    raise Unread(f"writes to {item!r}, which is not a range that is known")


# ---- computing ----------------------------------------------------------------------------------------------------


def _two(function: Callable[[Value, Value], Value]) -> Rule:
    def rule(r: _Reader, term: Term, at: Index, a: Any, b: Any) -> Value:
        return function(r.operand(a, at), r.operand(b, at))

    return rule


def _arithmetic_of(name: str) -> Rule:
    def rule(r: _Reader, term: Term, at: Index, a: Any, b: Any, *rest: Any) -> Value:
        if any(x is not None and not same(x, 1) for x in rest):  # rounding modes, alpha
            raise Unread("is more than plain arithmetic")
        x, y = r.operand(a, at), r.operand(b, at)
        if term.dtype is torch.bool and name in ("add", "mul"):
            return (disjunction if name == "add" else conjunction)(truth(x), truth(y))
        value = arithmetic(name, x, y)
        return mapped(_overflowing(term.dtype), value) if term.dtype.is_floating_point else value

    return rule


def _overflowing(dtype: torch.dtype) -> Callable[[Value], Value]:
    """A float constant as `dtype` holds it."""
    return lambda v: float(torch.tensor(v, dtype=torch.float64).to(dtype)) if isinstance(v, float) else v


for _name in ("add", "sub", "mul"):
    _OPERATIONS[_name] = _CALLS[_name] = _arithmetic_of(_name)
_rule("mod", "remainder")(_arithmetic_of("mod"))
_rule("floordiv", "floor_divide")(_arithmetic_of("floordiv"))
for _names in (
    ("eq",),
    ("ne", "not_equal"),
    ("lt", "less"),
    ("le", "less_equal"),
    ("gt", "greater"),
    ("ge", "greater_equal"),
):
    _rule(*_names)(_two(lambda a, b, name=_names[0]: compared(name, a, b)))


def _logical(function: Callable[..., Value]) -> Rule:
    """Of truth values; bit by bit on integers is another thing."""

    def rule(r: _Reader, term: Term, at: Index, *operands: Any) -> Value:
        values = [r.operand(x, at) for x in operands]
        if not all(is_bool(v) for v in values) and not term.args[0].startswith("logical"):
            raise Unread("works on bits")
        return function(*map(truth, values))

    return rule


_rule("and_", "and", "bitwise_and", "logical_and")(_logical(conjunction))
_rule("or_", "or", "bitwise_or", "logical_or")(_logical(disjunction))
_rule("invert", "bitwise_not", "logical_not", "not_")(_logical(negation))
_rule("xor", "bitwise_xor", "logical_xor")(_logical(lambda a, b: negation(compared("eq", a, b))))


@_operation("neg")
def _neg(r: _Reader, term: Term, at: Index, x: Term) -> Value:
    return arithmetic("sub", linear(0), r.element(x, at))


@_operation("abs")
@_rule("abs")
def _abs(r: _Reader, term: Term, at: Index, x: Term) -> Value:
    return absolute(r.element(x, at))


@_rule("log")
def _log(r: _Reader, term: Term, at: Index, x: Term) -> Value:
    def one(v: Value) -> Value:
        if v in (0.0, linear(0)):
            return -math.inf
        if v in (1.0, linear(1)):
            return 0.0
        raise Unread(f"is the logarithm of {v!r}")

    return mapped(one, number(r.element(x, at)))


@_rule("where")
def _where(r: _Reader, term: Term, at: Index, condition: Term, yes: Any, no: Any) -> Value:
    yes, no = (_as(r.operand(v, at), term.dtype) for v in (yes, no))
    return choice(truth(r.operand(condition, at)), yes, no)


@_rule("masked_fill")
def _masked_fill(r: _Reader, term: Term, at: Index, x: Term, mask: Term, value: Any) -> Value:
    return choice(truth(r.operand(mask, at)), _as(r.operand(value, at), term.dtype), r.operand(x, at))


def _as(value: Value, dtype: torch.dtype) -> Value:
    """A number as an element of a tensor of that dtype."""
    if dtype is torch.bool:
        return truth(value)

    def whole(v: Value) -> Value:
        if isinstance(v, float) and not v.is_integer():
            raise Unread(f"rounds {v!r} to an integer")
        return linear(int(v)) if isinstance(v, float) else v

    def floating(v: Value) -> Value:
        if isinstance(v, Linear) and v.is_constant:
            v = float(v.const)
        if not isinstance(v, float):
            raise Unread(f"is the integer {v!r} in floating point")
        return _overflowing(dtype)(v)

    return mapped(floating if dtype.is_floating_point else whole, number(value))


@_rule("tril")
def _tril(r: _Reader, term: Term, at: Index, x: Term, diagonal: int = 0) -> Value:
    keep = at_least_zero(plus(plus(at[-2], at[-1], -1), linear(diagonal)))  # row - column + diagonal >= 0
    return choice(keep, r.element(x, at), _constant(term, 0))


@_rule("triu")
def _triu(r: _Reader, term: Term, at: Index, x: Term, diagonal: int = 0) -> Value:
    keep = at_least_zero(plus(plus(at[-1], at[-2], -1), linear(-diagonal)))
    return choice(keep, r.element(x, at), _constant(term, 0))


@_rule("diff")
def _diff(
    r: _Reader, term: Term, at: Index, x: Term, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None
):
    if n != 1:
        raise Unread("is a difference of differences")
    dim = dim if dim < 0 else dim - len(x.shape)
    parts = tuple(p for p in (prepend, x, append) if p is not None)
    after = list(at)
    after[dim] = plus(at[dim], linear(1))
    values = _joined(r, parts, dim, tuple(after)), _joined(r, parts, dim, at)
    return arithmetic("sub", *values) if x.dtype is not torch.bool else compared("ne", *values)


@_rule("cumsum")
def _cumsum(r: _Reader, term: Term, at: Index, x: Term, dim: int, dtype: Any = None) -> Value:
    summed = list(at)
    summed[dim] = r.fresh(extent_of(x.shape[dim]))
    value = number(r.element(x, tuple(summed)))
    if not isinstance(value, Linear) or not value.is_constant:
        raise Unread("adds up values that differ")
    return scaled(plus(at[dim], linear(1)), value.const)  # c + c + ... -> (i + 1) * c


# ---- masks --------------------------------------------------------------------------------------------------------


def attended(view: GraphTerms, mask: Term) -> Bool:
    """Where an attention mask lets query `q` of head `h` in batch `b` attend to key `k`.

    Args:
        mask: [..., q, k], up to four dimensions: bool, or float to be added to the scores: 0 or so low that nothing
            is left after the softmax.

    Raises:
        Unread: the mask is neither, as far as can be read.
    """
    if mask not in view.masks:
        view.masks[mask] = _attended(view, mask)
    return view.masks[mask]


def _attended(view: GraphTerms, mask: Term) -> Bool:
    value = read(view, mask, positions(mask.shape, "bhqk"[4 - len(mask.shape) :]))
    if not mask.dtype.is_floating_point:
        return truth(value)
    lowest = torch.finfo(mask.dtype).min

    def allowed(added: Value) -> Bool:
        if added == 0.0:
            return True
        if isinstance(added, float) and added <= lowest:
            return False
        raise Unread(f"adds {added!r} to scores")

    return mapped(allowed, value)
