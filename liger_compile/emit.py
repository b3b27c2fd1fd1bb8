"""Puts the replacement of a match into the graph."""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from . import _torch
from .graph_terms import GraphTerms, value_of
from .legality import Illegal, Site, operands
from .pattern import Spelling, target_of
from .policy import tag
from .terms import PatternError, Term, describe, same


def parameters_of(target: Callable[..., Any]) -> dict[str, bool]:
    """The names of a callable's parameters, and whether each must be given."""
    if isinstance(target, torch._ops.OpOverload):
        return {a.name: not a.has_default_value() for a in target._schema.arguments}
    try:
        named = inspect.signature(target).parameters.values()
    except (TypeError, ValueError) as error:
        raise PatternError(f"replacement {target}: has no signature; wrap it in a function of the operands") from error
    return {p.name: p.default is p.empty for p in named if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


class Emitter:
    """Inserts nodes before one place in the graph; takes them back if the rewrite fails."""

    def __init__(
        self, view: GraphTerms, site: Site, moved: dict[fx.Node, fx.Node], preferred: frozenset[fx.Node] = frozenset()
    ) -> None:
        self.view, self.site, self.moved, self.preferred = view, site, moved, preferred
        self.inserted: list[fx.Node] = []
        self._made: dict[Term, fx.Node] = {}

    def node(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        with self.view.graph.inserting_before(self._here()):
            node = self.view.graph.create_node(op, target, args, kwargs or {})
        origin = self.site.outputs[0]
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in origin.meta:
                node.meta[key] = origin.meta[key]
        self.inserted.append(node)
        node.meta["example_value"] = _torch.run_on_fakes(node, value_of)
        return node

    def _here(self) -> fx.Node:
        return self.site.before

    def operand(self, value: Any) -> Any:
        """A captured operand as an argument: the node that holds it, or nodes that compute it."""
        if isinstance(value, tuple):
            return [self.operand(v) for v in value]
        if isinstance(value, torch.SymInt):
            return self.size(value)
        if not isinstance(value, Term):
            return value
        if self.view.lender is not None and value not in self.view.carriers and value in self.view.lender.carriers:
            self.view.borrow(value)
        carriers = self.view.carriers.get(value)
        if carriers:
            node = next((n for n in carriers if n in self.preferred), carriers[0])
            return self.moved.get(node, node)
        if value not in self._made:
            self._made[value] = _IMPLICIT[value.op](self, *value.args)  # `check_operands` has seen that it is there
        return self._made[value]

    def size(self, value: torch.SymInt) -> fx.Node:
        """A size that only the compiler knows: the node that holds it, the size of an operand, or either and so much
        more."""
        here = self.view.position[self._here()]
        held = [(value_of(n), n, None) for n in self.view.nodes[:here] if isinstance(value_of(n), torch.SymInt)]
        held += [(n, term, dim) for _, term in operands(self.site.match) for dim, n in enumerate(term.shape)]
        more = [_torch.constant(value - size) for size, _, _ in held]
        for nearest in sorted({n for n in more if n is not None}, key=abs):
            _, of, dim = held[more.index(nearest)]
            found = of if dim is None else self.node("call_method", "size", (self.operand(of), dim))
            return found if nearest == 0 else self.node("call_function", operator.add, (found, nearest))
        raise Illegal(f"{value} is a size that only the compiler knows")

    def undo(self) -> None:
        for node in reversed(self.inserted):
            self.view.graph.erase_node(node)


def _sizes(e: Emitter, shape: tuple[Any, ...]) -> list[Any]:
    """A shape as arguments. One extent that is symbolic follows from the others, further ones must be in the graph."""
    known = [_torch.constant(n) for n in shape]
    if None in known:
        known[known.index(None)] = -1
    return [e.size(symbol) if n is None else n for n, symbol in zip(known, shape, strict=True)]


def _slice(e: Emitter, x: Term, dim: int, lo: Any, hi: Any, step: int) -> fx.Node:
    extent = x.shape[dim]
    if not isinstance(hi, int):
        behind = hi - extent
        if same(hi, extent):
            hi = None
        elif _torch.constant(behind) is not None:
            hi = _torch.constant(behind)  # counted from the end
        else:
            raise Illegal(f"the slice ends at {hi}, a size that only the compiler knows")
    if not isinstance(lo, int):
        raise Illegal(f"the slice begins at {lo}, a size that only the compiler knows")
    index = (Ellipsis, slice(lo, hi, step), *(slice(None),) * (-dim - 1))
    return e.node("call_function", operator.getitem, (e.operand(x), index))


def _from_end(e: Emitter, index: Term, n: Any) -> fx.Node:
    index, n = e.operand(index), e.operand(n)
    negative, behind = (e.node("call_function", f, (index, by)) for f, by in ((operator.lt, 0), (operator.add, n)))
    return e.node("call_function", torch.where, (negative, behind, index))


def _scaled(e: Emitter, x: Term, scale: Term) -> fx.Node:
    """x times a tensor of one number, or one for each of its rows, rounded once."""
    inverse = scale.op == "reciprocal" and scale not in e.view.carriers
    factor = e.node("call_method", "float", (e.operand(scale.args[0] if inverse else scale),))
    if len(x.shape) > 1:
        factor = e.node("call_method", "unsqueeze", (factor, -1))
    wide = e.node("call_method", "float", (e.operand(x),))
    scaled = e.node("call_function", operator.truediv if inverse else operator.mul, (wide, factor))
    return e.node("call_method", "to", (scaled, x.dtype))


def _reciprocal(e: Emitter, x: Any) -> Any:
    x = e.operand(x)
    return 1 / x if isinstance(x, (int, float)) and x else e.node("call_function", operator.truediv, (1, x))


_IMPLICIT: dict[str, Callable[..., fx.Node]] = {
    "cast": lambda e, x, dtype: e.node("call_method", "to", (e.operand(x), dtype)),
    "reshape": lambda e, x, shape: e.node("call_method", "reshape", (e.operand(x), *_sizes(e, shape))),
    "permute": lambda e, x, order: e.node("call_method", "permute", (e.operand(x), *_full(x, order))),
    "expand": lambda e, x, shape: e.node("call_method", "expand", (e.operand(x), *_sizes(e, shape))),
    "mul": lambda e, x, y: e.node("call_function", operator.mul, (e.operand(x), e.operand(y))),
    "reciprocal": _reciprocal,
    "not": lambda e, x: e.node("call_function", torch.logical_not, (e.operand(x),)),
    "select": lambda e, x, dim, index: e.node("call_method", "select", (e.operand(x), dim, index)),
    "slice": _slice,
    "from_end": _from_end,
    "scaled": _scaled,
    "linear": lambda e, x, w, b: e.node(
        "call_function", torch.nn.functional.linear, (e.operand(x), e.operand(w), e.operand(b))
    ),
}


def check_operands(view: GraphTerms, site: Site) -> None:
    """Raises `Illegal` if an operand is neither in the graph nor made of what is by calls that move data or cast it."""
    given = site.match.captures.values()
    todo = [v for c in given for v in (c if isinstance(c, tuple) else (c,)) if isinstance(v, Term)]
    while todo:
        term = todo.pop()
        if term in view.carriers or (view.lender is not None and term in view.lender.carriers):
            continue
        if term.op not in _IMPLICIT:
            raise Illegal(f"{describe(term)} is not computed anywhere in the graph")
        todo += [a for a in term.args if isinstance(a, Term)]


def _full(x: Term, order: tuple[int, ...]) -> tuple[int, ...]:
    return (*range(len(x.shape) - len(order)), *(len(x.shape) + i for i in order))


def emit(view: GraphTerms, site: Site, moved: dict[fx.Node, fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Inserts the replacement call; returns the nodes that hold its results, one for each output, and all new ones.

    Raises `Illegal`, leaving the graph as it was, if the results are not what they replace.
    """
    try:
        return _emitted(Emitter(view, site, moved))
    except Illegal:
        # The first node to hold an operand may be laid out in another way than the one that the replaced code reads,
        # such as x.transpose(1, 2).contiguous().transpose(1, 2).
        read = {i for n in (*site.outputs, *site.interior) for i in n.all_input_nodes}
        here = view.position[site.before]
        before = (n for n in read if view.position.get(n, here) < here)  # what another rewrite has put in has none
        preferred = frozenset(n for n in before if not view.is_written(n))
        with contextlib.suppress(Illegal):
            return _emitted(Emitter(view, site, moved, preferred))
        raise


def _emitted(emitter: Emitter) -> tuple[list[fx.Node], list[fx.Node]]:
    site = emitter.site
    try:
        call = _call(emitter)
        _check_count(value_of(call), len(site.outputs))
        results = [call]
        if len(site.outputs) > 1:
            results = [emitter.node("call_function", operator.getitem, (call, i)) for i in range(len(site.outputs))]
        results = [_fit(emitter, r, o) for r, o in zip(results, site.outputs, strict=True)]
    except Illegal:
        emitter.undo()
        raise
    except Exception as error:  # the replacement's own fake implementation refuses its arguments
        emitter.undo()
        raise Illegal(f"the replacement does not take these operands: {type(error).__name__}: {error}") from error
    for node in emitter.inserted[emitter.inserted.index(call) :]:
        tag(node, site.match.pattern.recompute, site.match.options.memory)
    return results, emitter.inserted


def arguments(spelling: Spelling, operands: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What to call for a spelling, and with which of its operands, choices and fixed arguments."""
    target, fixed = target_of(spelling.pattern.replacement)
    given = {**operands, **spelling.choice, **fixed}
    return target, {n: given[n] for n in parameters_of(target) if n in given}


def _check_count(results: Any, expected: int) -> None:
    several = isinstance(results, (tuple, list))
    if several != (expected > 1) or (several and len(results) != expected):
        ours = f"a tuple of {len(results)}" if several else "one result"
        theirs = f"a tuple of {expected}" if expected > 1 else "one result"
        raise Illegal(f"the replacement gives {ours} where the pattern gives {theirs}")


def _call(emitter: Emitter) -> fx.Node:
    match = emitter.site.match
    target, given = arguments(match.spelling, match.captures)
    node = emitter.node("call_function", target, (), {n: emitter.operand(v) for n, v in given.items()})
    node.meta["liger_pattern"] = match.pattern.name
    return node


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal strides, but for dimensions of extent one, where strides have no meaning."""
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(same(n, 1) or _torch.same_sizes((s,), (t,)) for n, s, t in pairs)


def _fit(emitter: Emitter, result: fx.Node, original: fx.Node) -> fx.Node:
    """The result with the dtype and layout of what it replaces; code behind it may rely on both."""
    new, old = value_of(result), value_of(original)
    if not isinstance(new, torch.Tensor) or not _torch.same_sizes(new.shape, old.shape) or new.device != old.device:
        found = f"{tuple(new.shape)} on {new.device}" if isinstance(new, torch.Tensor) else repr(new)
        raise Illegal(f"the replacement gives {found}, the graph has {tuple(old.shape)} on {old.device}", original)
    if new.dtype is not old.dtype:
        if torch.promote_types(new.dtype, old.dtype) is not new.dtype:
            raise Illegal(f"the replacement gives {new.dtype}, the graph has {old.dtype}", original)
        result = emitter.node("call_method", "to", (result, old.dtype))  # computed in more precision, rounded once
        new = value_of(result)
    if not same_layout(new, old):
        if not old.is_contiguous():
            raise Illegal(f"the replacement has strides {new.stride()}, the graph has {old.stride()}", original)
        result = emitter.node("call_method", "contiguous", (result,))
    return result
