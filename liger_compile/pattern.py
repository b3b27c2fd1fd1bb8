"""Patterns: plain Python functions, traced once into canonical terms.

A pattern function takes tensors and numbers and computes with them as a model would. It is called once, with stand-ins
for its arguments, so `x.dtype` and `x.shape[-1] // 2` stay symbolic and no example inputs are needed.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from .graph_terms import call_name, canonical
from .rules import Call
from .terms import Expr, PatternError, Term, Terms, arith, describe, size

if TYPE_CHECKING:
    from .match import Match

Check = Callable[["Match"], "str | dict[str, Any] | None"]
Examples = Callable[[Any, int], Iterable[dict[str, Any]]]


@dataclass(frozen=True)
class Pattern:
    """What to look for, what to put in its place, and when not to.

    `replacement` is called with the captured operands by the names of `function`'s parameters and returns what
    `function` returns. `check` is given the match and returns None, the reason to leave the graph alone, or
    further operands of the replacement by name.
    """

    name: str
    function: Callable[..., Any]
    replacement: Callable[..., Any]
    check: Check | None = None
    recompute: bool = False
    """Whether the backward may compute the replacement again instead of keeping its result."""
    on_demand: bool = False
    """Whether intermediate results that the graph returns may be computed when somebody reads them."""
    examples: Examples | None = None
    """Operands to try the pattern with: given a tensor factory and a number of rows, yields them by name."""

    @functools.cached_property
    def spellings(self) -> tuple[Spelling, ...]:
        """One traced form for each combination of the function's `Literal` keyword-only parameters."""
        return tuple(trace(self, choice) for choice in _choices(self.function))


def target_of(replacement: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What a graph calls for a replacement, and the arguments fixed by `functools.partial`."""
    fixed: dict[str, Any] = {}
    while isinstance(replacement, functools.partial):
        if replacement.args:
            raise PatternError(f"replacement {replacement}: fix arguments by name, not by position")
        fixed = {**replacement.keywords, **fixed}
        replacement = replacement.func
    replacement = getattr(replacement, "_opoverload", replacement)  # what torch.library.custom_op returns
    if isinstance(replacement, torch._ops.OpOverloadPacket):
        replacement = replacement.default
    owner = getattr(replacement, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function) and replacement.__name__ == "apply":
        replacement = _by_name(owner)
    return replacement, fixed


@functools.cache
def _by_name(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply`, which takes its arguments by position, as a function of named operands that FX can print."""
    signature = inspect.signature(function.forward)
    if function.setup_context is torch.autograd.Function.setup_context:  # then the first argument is the context
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])

    @functools.wraps(function.forward)
    def apply(**operands: Any) -> Any:
        bound = signature.bind(**operands)
        bound.apply_defaults()
        return function.apply(*bound.args)

    apply.__name__ = apply.__qualname__ = function.__name__
    apply.__signature__ = signature  # type: ignore[attr-defined]
    return apply


@dataclass(frozen=True)
class Spelling:
    """One traced form of a pattern."""

    pattern: Pattern
    roots: tuple[Term, ...]
    variables: dict[str, Term]
    choice: dict[str, Any]
    operations: int = field(default=0)

    def __repr__(self) -> str:
        return f"{self.pattern.name}: {', '.join(describe(r, 12) for r in self.roots)}"


def _choices(function: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of keyword-only parameters annotated with `Literal`."""
    hints = _hints(function)
    names, values = [], []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY:
            if typing.get_origin(hints.get(p.name)) is not Literal:
                raise PatternError(
                    f"{_where(function)}: keyword-only parameter {p.name!r} needs an annotation Literal[...] that "
                    "lists its values; operands are positional parameters"
                )
            names.append(p.name)
            values.append(typing.get_args(hints[p.name]))
    return (dict(zip(names, combination, strict=True)) for combination in itertools.product(*values))


def trace(pattern: Pattern, choice: dict[str, Any]) -> Spelling:
    """Calls the pattern function with stand-ins and returns what it computes."""
    function = pattern.function
    terms = Terms()
    variables: dict[str, Term] = {}
    kinds = _kinds(pattern)
    for p in inspect.signature(function).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise PatternError(f"{_where(function)}: name each operand instead of *{p.name}")
        if p.kind is not p.KEYWORD_ONLY:
            variables[p.name] = terms.make("var", (p.name, kinds.get(p.name, "any")))
    try:
        result = function(*(TensorProxy(v, terms) for v in variables.values()), **choice)
    except PatternError as error:
        raise PatternError(f"{_where(function)}: {error}") from error
    except Exception as error:
        raise PatternError(f"{_where(function)}: cannot be traced: {type(error).__name__}: {error}") from error
    roots = tuple(_root(function, r) for r in (result if isinstance(result, (tuple, list)) else (result,)))
    reached = set(itertools.chain.from_iterable(subterms(r) for r in roots))
    for name, variable in variables.items():
        if variable not in reached:
            raise PatternError(f"{_where(function)}: parameter {name!r} has no part in the result; remove it")
    operations = sum(t.op != "var" for t in reached)
    return Spelling(pattern, roots, variables, choice, operations)


def _root(function: Callable[..., Any], value: Any) -> Term:
    if not isinstance(value, TensorProxy):
        raise PatternError(f"{_where(function)}: must return a tensor, or a tuple of tensors, not {value!r}")
    if value.term.op == "var":
        raise PatternError(f"{_where(function)}: returns its parameter {value.term.args[0]!r} unchanged")
    return value.term


def subterms(value: Any) -> Iterator[Term]:
    """The terms a value is made of, itself included, those in sizes and dtypes too."""
    seen: set[Term] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, Term):
            if item in seen:
                continue
            seen.add(item)
            yield item
            todo.extend(item.args)
        elif isinstance(item, Expr):
            todo.extend(item.args)
        elif isinstance(item, (tuple, list)):
            todo.extend(item)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """A function's annotations; none if they cannot be evaluated (a name imported only for type checkers)."""
    try:
        return typing.get_type_hints(function)
    except Exception:
        return {}


def _where(function: Callable[..., Any]) -> str:
    code = getattr(function, "__code__", None)
    at = f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""
    return f"pattern {getattr(function, '__name__', function)!r}{at}"


_SCALARS = {"float", "int", "number", "bool", "SymInt", "Scalar"}


def _kinds(pattern: Pattern) -> dict[str, str]:
    """ "tensor" or "scalar", with "?" if it may be None, as far as the replacement's schema or annotations tell."""
    target, _ = target_of(pattern.replacement)
    kinds: dict[str, str] = {}
    if isinstance(target, torch._ops.OpOverload):
        for a in target._schema.arguments:
            text = str(a.type)
            kind = "tensor" if "Tensor" in text else "scalar"
            kinds[a.name] = f"{kind}?" if text.startswith("Optional") else kind
    for function in (target, pattern.function):
        for name, hint in _hints(function).items():
            options = set(typing.get_args(hint)) or {hint}
            absent = "?" if type(None) in options else ""
            if torch.Tensor in options:
                kinds[name] = f"tensor{absent}"
            elif options & {float, int, bool, str}:
                kinds[name] = f"scalar{absent}"
    return kinds


# ---- stand-ins ----------------------------------------------------------------------------------------------------


def _unwrap(value: Any) -> Any:
    if isinstance(value, TensorProxy):
        return value.term
    if isinstance(value, ValueProxy):
        return value.expr
    if isinstance(value, (tuple, list)):
        return type(value)(_unwrap(v) for v in value)
    if isinstance(value, slice):
        return slice(_unwrap(value.start), _unwrap(value.stop), _unwrap(value.step))
    return value


def _no_branching(self: Any, *_: Any) -> Any:
    raise PatternError(
        f"branches on {describe(_unwrap(self))}, which is not known when the pattern is traced; write one pattern "
        "for each branch, or a keyword-only parameter annotated Literal[...]"
    )


class ValueProxy:
    """Stands for an integer, dtype or shape that is known only once the pattern is matched."""

    def __init__(self, expr: Any) -> None:
        self.expr = expr

    __bool__ = __int__ = __index__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _no_branching  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


def _value_operator(fn: str, swapped: bool) -> Callable[[ValueProxy, Any], ValueProxy]:
    def apply(self: ValueProxy, other: Any) -> ValueProxy:
        a, b = _unwrap(self), _unwrap(other)
        return ValueProxy(arith(fn, b, a) if swapped else arith(fn, a, b))

    return apply


for _fn in ("add", "sub", "mul", "floordiv", "truediv", "mod"):
    setattr(ValueProxy, f"__{_fn}__", _value_operator(_fn, False))
    setattr(ValueProxy, f"__r{_fn}__", _value_operator(_fn, True))


class ShapeProxy:
    """Stands for `x.shape`: indexed from the back, since the number of dimensions is not known."""

    def __init__(self, term: Term) -> None:
        self.term = term

    def __getitem__(self, dim: Any) -> ValueProxy:
        if not isinstance(dim, int) or dim >= 0:
            raise PatternError(f"reads shape[{dim!r}]: index shapes from the back, as in x.shape[-1]")
        return ValueProxy(size(self.term, dim))

    def __iter__(self) -> Any:
        raise PatternError("unpacks a shape, whose length is not known; index it from the back, as in x.shape[-1]")

    __len__ = __iter__


class TensorProxy:
    """Stands for a tensor: records what is computed with it as canonical terms."""

    def __init__(self, term: Term, terms: Terms) -> None:
        self.term, self.terms = term, terms

    def _apply(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = call_name(target)
        if (name or "").endswith("_") or kwargs.get("inplace") is True or kwargs.get("out") is not None:
            raise PatternError(f"writes to its operand with {name}; compute the result without changing anything")
        for a in (*args, *kwargs.values()):
            if isinstance(a, torch.Tensor):
                raise PatternError("computes with a tensor made in the function; make it a parameter, or a number")
        plain = [_unwrap(a) for a in args]
        result = canonical(Call(self.terms), name, target, plain, {k: _unwrap(v) for k, v in kwargs.items()}, None)
        if isinstance(result, tuple):
            return tuple(TensorProxy(r, self.terms) for r in result)
        return TensorProxy(result, self.terms)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = [*args, *(kwargs or {}).values()]
        flat += [b for a in flat if isinstance(a, (tuple, list)) for b in a]
        proxy = next(a for a in flat if isinstance(a, TensorProxy))
        return proxy._apply(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if not hasattr(torch.Tensor, name):
            raise PatternError(f"uses .{name}, which torch.Tensor does not have")
        if name in ("T", "mT"):
            return self._apply("t", (self,), {})
        if name in ("ndim", "device", "requires_grad", "is_cuda"):
            raise PatternError(
                f"reads .{name}, which is not known when the pattern is traced; use check= for conditions"
            )
        if name in ("item", "tolist", "numpy"):
            raise PatternError(f"uses .{name}(), whose result is not a tensor")
        return lambda *args, **kwargs: self._apply(name, (self, *args), kwargs)

    def __repr__(self) -> str:
        return describe(self.term)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise PatternError("is passed to NumPy; write the pattern with torch functions")

    @property
    def dtype(self) -> Any:
        return self.term.dtype or ValueProxy(Expr("dtype", (self.term,)))

    @property
    def shape(self) -> ShapeProxy:
        return ShapeProxy(self.term)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    __bool__ = __float__ = __int__ = __index__ = __len__ = __iter__ = __contains__ = _no_branching  # type: ignore[assignment]
    __hash__ = object.__hash__  # comparisons are tensors

    def __setitem__(self, index: Any, value: Any) -> None:
        raise PatternError("writes to its operand with []; compute the result without changing anything")

    def __getitem__(self, index: Any) -> Any:
        return self._apply("getitem", (self, index), {})

    def __neg__(self) -> Any:
        return self._apply("neg", (self,), {})


def _tensor_operator(fn: str, swapped: bool) -> Callable[[TensorProxy, Any], Any]:
    def apply(self: TensorProxy, other: Any) -> Any:
        return self._apply(fn, (other, self) if swapped else (self, other), {})

    return apply


for _fn in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    setattr(TensorProxy, f"__{_fn}__", _tensor_operator(_fn, False))
    setattr(TensorProxy, f"__r{_fn}__", _tensor_operator(_fn, True))
for _fn in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(TensorProxy, f"__{_fn}__", _tensor_operator(_fn, False))
