"""Finding patterns in a graph's terms, and the best near misses.

Unification walks a pattern's terms and a graph's terms together. Commutative operands are tried both ways, casts that a
dtype makes superfluous may be absent, and products may be associated differently. What a pattern leaves open (sizes,
dtypes) is checked once its operands are known. A near miss is a match with one difference, or two.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .graph_terms import GraphTerms, value_of
from .pattern import Pattern, Spelling, subterms
from .rules import Call, mul, negated
from .terms import COMMUTATIVE, Expr, Term, describe, evaluate, same

if TYPE_CHECKING:
    from .options import Options


@dataclass(frozen=True)
class Match:
    """A pattern found in a graph: what its operands and results are there."""

    spelling: Spelling
    view: GraphTerms
    captures: dict[str, Any]
    """The operands by name. Each is a Term, a number, a string, a dtype, None for an optional one left out, or a tuple
    of Terms."""
    roots: tuple[Term, ...]
    """The terms of the pattern's results."""
    terms: frozenset[Term]
    """Every term matched by an operation of the pattern."""
    options: Options
    """What the user asked of this compilation."""

    @property
    def pattern(self) -> Pattern:
        return self.spelling.pattern

    @property
    def effect(self) -> str:
        """What the rewrite spares, in words; empty if that is not known."""
        if self.pattern.effect is None:
            return ""
        try:
            return self.pattern.effect(self)
        except Exception as error:  # the rewrite itself is right
            return f"effect= raises {type(error).__name__}: {error}"

    def dtype(self, name: str) -> torch.dtype:
        """Of an operand."""
        return self.captures[name].dtype

    def shape(self, name: str) -> tuple[Any, ...]:
        """Of an operand; sizes that only the compiler knows are symbolic."""
        return self.captures[name].shape

    def example(self, name: str) -> torch.Tensor | None:
        """What was recorded of an operand when the graph was captured; None if the graph computes it implicitly."""
        return next(map(value_of, self.nodes(name)), None)

    def with_operands(self, operands: dict[str, Any]) -> Match:
        """The same match with further operands for the replacement, or others in place of those captured."""
        return dataclasses.replace(self, captures={**self.captures, **operands})

    def nodes(self, name: str) -> list[fx.Node]:
        """The nodes that hold an operand; none if the graph computes it only implicitly."""
        return self.view.carriers.get(self.captures[name], [])

    def requires_grad(self, name: str) -> bool:
        """Whether an operand needs a gradient, or what it is read from if the graph computes it only implicitly."""
        return any(value_of(n).requires_grad for n in self.view.sources([self.captures[name]]))


@dataclass(frozen=True)
class NearMiss:
    """A place where a pattern matches but for a difference or two."""

    spelling: Spelling
    root: Term
    reason: str
    at: Term
    score: float
    terms: frozenset[Term]


@dataclass(frozen=True)
class _Difference:
    expected: Any
    found: Any
    inside: Term
    reason: str
    related: bool
    """Whether both sides are of one family (silu and gelu), so that one plausibly stands for the other."""


@dataclass(frozen=True)
class _State:
    """One partial match."""

    bound: dict[str, Any] = field(default_factory=dict)
    pairs: dict[Term, Term] = field(default_factory=dict)
    checks: tuple[tuple[Any, Any, Term], ...] = ()
    differences: tuple[_Difference, ...] = ()

    def pair(self, p: Term, t: Term) -> _State:
        return dataclasses.replace(self, pairs={**self.pairs, p: t})

    def bind(self, name: str, value: Any) -> _State:
        return dataclasses.replace(self, bound={**self.bound, name: value})

    def check(self, expected: Any, actual: Any, inside: Term) -> _State:
        return dataclasses.replace(self, checks=(*self.checks, (expected, actual, inside)))


_FAMILIES = (
    {"silu", "gelu", "relu", "sigmoid", "mish", "leaky_relu", "elu", "hardswish", "hardsigmoid"},
    {"add", "sub"},
    {"square", "pow", "abs"},
    {"rsqrt", "sqrt", "reciprocal", "pow"},
    {"mean", "sum", "amax", "var", "std"},
    {"cat", "stack", "interleave"},
    {"cross_entropy", "cross_entropy_of_probabilities", "nll_loss", "kl_div", "mse_loss", "pick"},
)
_ARITHMETIC = {"add", "sub", "mul", "div", "neg", "square", "cast", "slice", "select", "reshape", "permute", "expand"}
_ANYWHERE = _ARITHMETIC | {"linear", "logsumexp", "sigmoid", "sum_of_squares", "plus_squares"}
"""What is in models of all kinds, and does not tell a pattern."""
_COMMON = _ANYWHERE | {"cat"}
_HALF = (torch.float16, torch.bfloat16)


def _name(term: Term) -> str:
    """What an operation is called: of a generic call, the function."""
    return term.args[0] if term.op == "call" and isinstance(term.args[0], str) else term.op


def _operand_names(term: Term) -> set[str]:
    return {_name(a) for a in term.args if isinstance(a, Term)} - _COMMON - {"leaf", "var", "number", "call"}


def _related(p: Term, t: Term) -> bool:
    """Of one family, with a telling operand in common, or the same before an in-place change, or as that change."""
    if t.op == "leaf" and len(t.args) > 1:
        return _name(p) in (_name(t.args[1]), *t.args[2:])
    if any(_name(p) in family and _name(t) in family for family in _FAMILIES):
        return True
    count_p, count_t = (sum(isinstance(a, Term) for a in x.args) for x in (p, t))
    # linear(silu(x), w) is an MLP without a gate, and no product that was meant to be silu(x) * w
    return count_p == count_t and t.op != "linear" and bool(_operand_names(p) & _operand_names(t))


def _uncast(t: Term) -> Term:
    return _uncast(t.args[0]) if t.op == "cast" else t


class Matcher:
    """Matches patterns against one graph.

    `relaxed` also takes code that computes in half precision where the pattern computes in float32; `tolerance` is how
    many differences are allowed, which is how near misses are found.
    """

    def __init__(self, view: GraphTerms, options: Options, relaxed: bool = False, tolerance: int = 0) -> None:
        self.view, self.options, self.relaxed, self.tolerance = view, options, relaxed, tolerance
        self._anchors: dict[str, list[Term]] = {}
        self._users: dict[str, list[Term]] = {}
        self._found: dict[frozenset[str], list[Term]] = {}
        self._slices: dict[tuple[Term, int], list[Term]] = {}
        for term in view.carriers:
            self._anchors.setdefault(_name(_uncast(term) if tolerance else term), []).append(term)
            if term.op == "slice" and term.args[4] == 1:
                self._slices.setdefault(term.args[:2], []).append(term)
            for name in _operand_names(term):
                self._users.setdefault(f"using {name}", []).append(term)

    # ---- whole patterns -------------------------------------------------------------------------------------------

    def anchors(self, root: Term) -> list[Term]:
        """The terms of the graph that a pattern's result could be, in graph order."""
        names = {_name(root)}
        while root.op == "cast":
            root = root.args[0]
            names.add(_name(root))
        if self.tolerance:
            names |= {n for family in _FAMILIES if _name(root) in family for n in family}
            names |= {f"using {n}" for n in _operand_names(root)}
        key = frozenset(names)
        if key not in self._found:
            found = {t: None for name in names for t in self._anchors.get(name, ())}
            found |= {t: None for name in names for t in self._users.get(name, ())}
            self._found[key] = sorted(found, key=self._position)
        return self._found[key]

    def _enter(self, anchor: Term) -> None:
        """Terms made while matching belong where the anchor is."""
        self.view.terms.scope = self.view.region[self.view.carriers[anchor][0]]

    def _position(self, term: Term) -> int:
        return self.view.position[self.view.carriers[term][0]]

    def matches(self, spelling: Spelling, anchor: Term, taken: set[Term]) -> Iterator[Match]:
        """The ways a pattern's first result can be `anchor`."""
        self._enter(anchor)
        for state in self._roots(spelling, anchor, taken):
            roots = tuple(state.pairs[r] for r in spelling.roots)
            captures = {name: state.bound[name] for name in spelling.variables}
            yield Match(spelling, self.view, captures, roots, frozenset(state.pairs.values()), self.options)

    def near_miss(self, spelling: Spelling, anchor: Term) -> NearMiss | None:
        """The closest match with differences, if it is close enough to be worth telling."""
        self._enter(anchor)
        best: NearMiss | None = None
        root = spelling.roots[0]
        for state in self._unify(root, anchor if root.op == "cast" else _uncast(anchor), _State(), anchor, None):
            unmet = self._unmet(state)
            differences = (*state.differences, unmet) if unmet is not None else state.differences
            if not differences or len(differences) > self.tolerance:
                continue
            odd = {d.expected for d in differences if isinstance(d.expected, Term)}
            if len(differences) > 1 and any(p.op == "var" for p in odd):
                continue  # another operation, of what is no operand: 30 * sigmoid(x) is no gate
            matched = {p for p in state.pairs if p not in odd}
            score = (len(matched) - 0.5 * (len(differences) - 1)) / spelling.operations
            known = {_name(p) for p in matched}
            telling = bool(known - _COMMON) or differences[0].related
            if not telling and known <= _ANYWHERE and not operations(spelling) <= _ANYWHERE:
                continue  # sums and products are anywhere: of what makes it this pattern, nothing is there
            if score < (0.4 if telling and len(differences) == 1 else 0.6) or (
                best is not None and score <= best.score
            ):
                continue
            first = differences[0]
            at = first.found if isinstance(first.found, Term) else first.inside
            reason = "; ".join(dict.fromkeys(d.reason for d in differences))
            best = NearMiss(spelling, anchor, reason, at, score, frozenset(state.pairs.values()))
        return best

    def _roots(self, spelling: Spelling, anchor: Term, taken: set[Term]) -> Iterator[_State]:
        states: Iterator[_State] = self._unify(spelling.roots[0], anchor, _State(), anchor, None)
        for root in spelling.roots[1:]:
            states = self._next_root(states, root, anchor, taken)
        return (s for s in states if self._unmet(s) is None)

    def _next_root(self, states: Iterator[_State], root: Term, anchor: Term, taken: set[Term]) -> Iterator[_State]:
        """Further results are looked for near the first one."""
        anchors = self.anchors(root)
        at = bisect.bisect_left(anchors, self._position(anchor), key=self._position)
        near = sorted(anchors[max(at - 8, 0) : at + 8], key=lambda t: abs(self._position(t) - self._position(anchor)))
        for state in states:
            for other in near:
                if other not in taken and other not in state.pairs.values():
                    yield from self._unify(root, other, state, other, None)

    def _unmet(self, state: _State) -> _Difference | None:
        """The first size or dtype that is not what the pattern says, now that its operands are known."""

        def matched(term: Term) -> Term:
            return state.bound[term.args[0]] if term.op == "var" else state.pairs[term]

        for expected, actual, inside in state.checks:
            try:
                value = evaluate(expected, matched)
            except (KeyError, AttributeError, IndexError, TypeError):
                if state.differences:  # an operand inside a difference
                    continue
                return _Difference(expected, actual, inside, f"{describe(expected)} is not known here", False)
            if not same(value, actual):
                reason = f"has {describe(actual)} in {describe(inside, 1)} where the pattern has {describe(expected)}"
                return _Difference(expected, actual, inside, f"{reason} = {describe(value)}", False)
        return None

    # ---- unification ----------------------------------------------------------------------------------------------

    def _differs(self, state: _State, p: Any, t: Any, inside: Term, reason: str | None = None) -> Iterator[_State]:
        """A difference ends the match, or is noted where some are allowed. The same one twice counts once."""
        if not self.tolerance:
            return
        related = isinstance(p, Term) and isinstance(t, Term) and _related(p, t)
        reason = reason or f"has {describe(t, 2)} where the pattern has {describe(p, 2)}{self._made_outside(t)}"
        if any(d.reason == reason for d in state.differences):
            yield state
        elif len(state.differences) < self.tolerance:
            noted = _Difference(p, t, inside, reason, related)
            yield dataclasses.replace(state, differences=(*state.differences, noted))

    def _made_outside(self, t: Any) -> str:
        """Said of what a pattern would compute and a graph is given, most often since a graph break is in between."""
        while isinstance(t, Term) and t.op in ("reshape", "cast", "slice", "permute"):
            t = t.args[0]
        node = next(iter(self.view.carriers.get(t, ())), None) if isinstance(t, Term) else None
        if node is None or node.op != "placeholder" or isinstance(value_of(node), torch.nn.Parameter):
            return ""
        return f"; {describe(t)} is an input of this graph, computed outside of it"

    def _unify(self, p: Any, t: Any, state: _State, inside: Term, context: torch.dtype | None) -> Iterator[_State]:
        """Every way to extend `state` so that the graph's `t` is the pattern's `p`.

        `context` is the dtype that arithmetic around `t` promotes it to.
        """
        if isinstance(p, Term):
            if p.op == "var":
                yield from self._bind(p, t, state, inside)
            elif not isinstance(t, Term):
                yield from self._differs(state, p, t, inside)
            elif p in state.pairs:
                if state.pairs[p] is t:
                    yield state
                else:
                    yield from self._differs(state, p, t, inside)
            elif p.op == "cast":
                yield from self._cast(p, t, state, context)
            elif p.op == "slice" and t.op != "slice" and p.args[4] == 1:
                x, dim, lo, hi, _ = p.args  # a slice that takes everything leaves no trace in the graph
                if t.shape is not None and len(t.shape) >= -dim:
                    whole = state.pair(p, t).check(lo, 0, t).check(hi, t.shape[dim], t)
                    yield from self._unify(x, t, whole, inside, None)
                yield from self._differs(state, p, t, inside)
            elif p.op == "reshape" and t.op != "reshape" and isinstance(p.args[1], Term) and t.shape is not None:
                for same_shape in self._bind(p.args[1], t.shape, state.pair(p, t), inside):  # leaves no trace either
                    yield from self._unify(p.args[0], t, same_shape, inside, context)
                yield from self._differs(state, p, t, inside)
            elif p.op == "slice" and t.op == "slice":
                yield from self._operands(p, t, state)
                yield from self._slice_of_slice(p, t, state)
            elif p.op != t.op:
                if p.op == "sub" and t.op == "add":
                    yield from self._difference(p, t, state)
                if p.op == "sub" and t.op == "shifted" and same(t.args[1].shape[:-1], t.shape[:-1]):
                    yield from self._operands(p, t, state)
                yield from self._other_operation(p, t, state, inside)
            else:
                yield from self._operands(p, t, state)
        elif isinstance(p, Expr):
            if isinstance(t, Term):
                yield from self._differs(state, p, t, inside)
            else:
                yield from self._expect(p, t, state, inside)
        elif isinstance(p, tuple) and isinstance(t, (tuple, list)):
            if any(isinstance(x, Term) for x in p) and len(p) == len(t):
                yield from self._all(list(zip(p, t, strict=True)), state, inside, None)
            elif any(isinstance(x, Expr) for x in p) and len(p) == len(t):
                yield state.check(p, tuple(t), inside)
            elif same(p, tuple(t)):
                yield state
            else:
                yield from self._differs(state, p, t, inside)
        elif same(p, t):
            yield state
        else:
            reason = f"{describe(inside, 1)} has {describe(t)} where the pattern has {describe(p)}"
            yield from self._differs(state, p, t, inside, reason)

    def _slice_of_slice(self, p: Term, t: Term, state: _State) -> Iterator[_State]:
        """x[4:8] is also (x[4:12])[0:4], where the graph has x[4:12] too."""
        x, dim, lo, hi, step = t.args
        for part in self._slices.get((x, dim), ()):
            start, end = part.args[2:4]
            if all(isinstance(n, int) for n in (lo, hi, start, end)) and start <= lo and hi <= end:
                inner = (part, dim, lo - start, hi - start, step)
                yield from self._all(list(zip(p.args, inner, strict=True)), state.pair(p, t), t, t.dtype)

    def _bind(self, p: Term, t: Any, state: _State, inside: Term) -> Iterator[_State]:
        name, kind = p.args
        if t is None and kind == "tensor":
            return  # a call without it is a different operation, and no near miss
        number = not isinstance(t, Term) or t.is_number
        fits = {
            "any": t is not None,
            "tensor": not number,
            "tensor?": t is None or not number,
            "scalar": t is not None and number,
            "scalar?": number,
            "dtype": isinstance(t, torch.dtype),
            "dtype?": t is None or isinstance(t, torch.dtype),
        }[kind]
        if not fits:
            yield from self._differs(state, p, t, inside, f"{name} is {describe(t, 2)}, not a {kind.rstrip('?')}")
        elif name not in state.bound:
            yield state.bind(name, t)
        elif state.bound[name] is t or (not isinstance(t, Term) and same(state.bound[name], t)):
            yield state
        else:
            reason = f"{name} is {describe(state.bound[name], 2)} in one place and {describe(t, 2)} in another"
            yield from self._differs(state, p, t, inside, reason)

    def _expect(self, p: Any, value: Any, state: _State, inside: Term) -> Iterator[_State]:
        """A size or dtype: an operand of the pattern is bound to it, anything else is checked at the end."""
        if isinstance(p, Expr) and p.fn == "operand":
            yield from self._bind(p.args[0], value, state, inside)
        else:
            yield state.check(p, value, inside)

    def _cast(self, p: Term, t: Term, state: _State, context: torch.dtype | None) -> Iterator[_State]:
        """A cast in the pattern is a cast in the graph, or none where the dtype is right without."""
        inner, dtype = p.args
        if t.op == "cast":
            for s in self._expect(dtype, t.dtype, state.pair(p, t), t):
                yield from self._unify(inner, t.args[0], s, t, None)
        if isinstance(dtype, Expr) and dtype.fn == "operand" and self._only_cast(t):
            return  # any dtype would do for what is cast behind: the pattern's cast is that one
        promoted = context is not None and same(dtype, context) and t.is_float and t.dtype in _HALF
        lower = self.relaxed and dtype is torch.float32 and t.dtype in _HALF
        paired = state.pair(p, t)
        for unchanged in [paired] if promoted or lower else self._expect(dtype, t.dtype, paired, t):
            yield from self._unify(inner, t, unchanged, t, context)

    def _only_cast(self, t: Term) -> bool:
        """Whether all that the graph does with a value is to cast it."""
        read = [self.view.of.get(user) for node in self.view.carriers.get(t, ()) for user in node.users]
        return bool(read) and all(r is not None and r.op == "cast" and r.args[0] is t for r in read)

    def _other_operation(self, p: Term, t: Term, state: _State, inside: Term) -> Iterator[_State]:
        noted = list(self._differs(state, p, t, inside))
        yield from noted
        if not noted or not _related(p, t):
            return
        operands = [a for a in t.args if isinstance(a, Term)]
        pairs = list(zip([a for a in p.args if isinstance(a, Term)], operands, strict=False))
        for s in noted:  # one operation stands in another's place: the rest must still agree
            yield from self._all(pairs, s.pair(p, t), t, None)
            if p.op in COMMUTATIVE and len(pairs) == 2:
                yield from self._all([(pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[0][1])], s.pair(p, t), t, None)

    def _operands(self, p: Term, t: Term, state: _State) -> Iterator[_State]:
        state = state.pair(p, t)
        context = t.dtype
        if len(p.args) != len(t.args):
            yield from self._differs(state, p, t, t)
            return
        if p.op not in COMMUTATIVE:
            yield from self._all(list(zip(p.args, t.args, strict=True)), state, t, context)
            return
        (a, b), (x, y) = p.args, t.args
        yield from self._all([(a, x), (b, y)], state, t, context)
        yield from self._all([(a, y), (b, x)], state, t, context)
        if p.op == "mul" and not self.tolerance:
            yield from self._reassociated(p, t, state)

    def _reassociated(self, p: Term, t: Term, state: _State) -> Iterator[_State]:
        """(x * y) * z is also x * (y * z), where the pattern has a product, or one with a name, in the other place."""
        for nested, z in (t.args, reversed(t.args)):
            if not (
                isinstance(nested, Term) and nested.op == "mul" and isinstance(z, Term) and nested.dtype is t.dtype
            ):
                continue
            for x, y in (nested.args, reversed(nested.args)):
                if not (isinstance(x, Term) and isinstance(y, Term)):
                    continue
                regrouped = mul(Call(self.view.terms, t.dtype, t.shape), y, z)
                for a, b in (p.args, reversed(p.args)):
                    if isinstance(b, Term) and b.op in ("mul", "square", "silu", "unit") and regrouped.op == b.op:
                        yield from self._all([(a, x), (b, regrouped)], state, t, t.dtype)

    def _difference(self, p: Term, t: Term, state: _State) -> Iterator[_State]:
        """x + y * -z is also x - y * z, to the bit."""
        for x, product in (t.args, reversed(t.args)):
            if not (isinstance(product, Term) and product.op == "mul"):
                continue
            call = Call(self.view.terms, product.dtype, product.shape)
            for y, z in (product.args, reversed(product.args)):
                if (opposite := negated(call, z)) is not None:
                    pairs = zip(p.args, (x, mul(call, y, opposite)), strict=True)
                    yield from self._all(list(pairs), state.pair(p, t), t, t.dtype)

    def _all(
        self, pairs: list[tuple[Any, Any]], state: _State, inside: Term, context: torch.dtype | None
    ) -> Iterator[_State]:
        if not pairs:
            yield state
            return
        (p, t), *rest = pairs
        for s in self._unify(p, t, state, inside, context):
            yield from self._all(rest, s, inside, context)


def operations(spelling: Spelling) -> set[str]:
    """The names of a spelling's operations."""
    return {_name(t) for r in spelling.roots for t in subterms(r) if t.op != "var"}
