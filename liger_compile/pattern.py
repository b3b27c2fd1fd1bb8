"""Patterns: plain Python functions, traced once into canonical terms.

A pattern function takes tensors and numbers and computes with them as a model would. It is called once, with stand-ins
for its arguments, so `x.dtype` and `x.shape[-1] // 2` stay symbolic and no example inputs are needed.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from .graph_terms import PYTHON_OPERATORS, call_name, canonical
from .rules import Call
from .terms import Expr, PatternError, Term, Terms, arith, describe, size

if TYPE_CHECKING:
    from .match import Match

Check = Callable[["Match"], "str | dict[str, Any] | None"]
Examples = Callable[[Any, int], Iterable[dict[str, Any]]]
Effect = Callable[["Match"], str]


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
    recompute: bool | str = False
    """Whether the backward may compute the replacement again instead of keeping its result."""
    on_demand: bool | Callable[[Term], bool] = False
    """Whether intermediate results that the graph returns may be computed when somebody reads them, or which ones."""
    examples: Examples | None = None
    """Given a tensor factory and a number of rows, yields operands to try the pattern with, by name."""
    priority: int = 0
    """Patterns of higher priority are tried first, whatever their width."""
    effect: Effect | None = None
    """What the rewrite of a match spares, in words, for the report; empty if that is not known."""

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
    if getattr(replacement, "__name__", "") == "<lambda>":
        replacement = _named(replacement)
    return replacement, fixed


def name_of(target: Callable[..., Any]) -> str:
    """How reports and messages call what is called in a graph: `mine.squared_relu.default`, `my_function`."""
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", repr(target))


@functools.cache
def _named(function: Callable[..., Any]) -> Callable[..., Any]:
    """A lambda as a function that FX can print: it looks for the source of a lambda, which a notebook may not have."""

    @functools.wraps(function)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    replacement.__name__ = replacement.__qualname__ = "replacement"
    return replacement


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
                    f"{where(function)}: keyword-only parameter {p.name!r} needs an annotation Literal[...] that "
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
            raise PatternError(f"{where(function)}: name each operand instead of *{p.name}")
        if p.kind is not p.KEYWORD_ONLY:
            variables[p.name] = terms.make("var", (p.name, kinds.get(p.name, "any")))
    try:
        result = function(*(_stand_in(v, terms) for v in variables.values()), **choice)
    except PatternError as error:
        raise PatternError(f"{where(function)}: {error}") from error
    except Exception as error:
        raise PatternError(f"{where(function)}: cannot be traced: {type(error).__name__}: {error}") from error
    roots = tuple(_root(function, r) for r in (result if isinstance(result, (tuple, list)) else (result,)))
    reached = set(itertools.chain.from_iterable(subterms(r) for r in roots))
    values = set(itertools.chain.from_iterable(subterms(r, symbolic=False) for r in roots))
    for name, variable in variables.items():
        if variable not in reached:
            raise PatternError(f"{where(function)}: parameter {name!r} has no part in the result; remove it")
        if variable not in values:
            raise PatternError(
                f"{where(function)}: of parameter {name!r} only the size or dtype is used, which does not tell what "
                f"it is in a graph; compute with it, or annotate it {name}: torch.dtype if it is a dtype"
            )
    operations = sum(t.op != "var" for t in reached)
    return Spelling(pattern, roots, variables, choice, operations)


def _root(function: Callable[..., Any], value: Any) -> Term:
    if not isinstance(value, TensorProxy):
        raise PatternError(f"{where(function)}: must return a tensor, or a tuple of tensors, not {value!r}")
    if value.term.op == "var":
        name = value.term.args[0]
        raise PatternError(f"{where(function)}: returns its parameter {name!r} unchanged; leave it out of the results")
    return value.term


def _stand_in(variable: Term, terms: Terms) -> Any:
    if variable.args[1].startswith("dtype"):
        return ValueProxy(Expr("operand", (variable,)))
    return TensorProxy(variable, terms)


def subterms(value: Any, symbolic: bool = True) -> Iterator[Term]:
    """The terms a value is made of, itself included; if `symbolic`, those read only for a size or dtype too."""
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
        elif isinstance(item, Expr) and (symbolic or item.fn == "operand"):
            todo.extend(item.args)
        elif isinstance(item, (tuple, list)):
            todo.extend(item)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """A function's annotations; none if they cannot be evaluated (a name imported only for type checkers)."""
    try:
        return typing.get_type_hints(function)
    except Exception:
        return {}


def where(function: Callable[..., Any]) -> str:
    """How messages call a pattern's function: its name, file and line."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    at = f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""
    return f"pattern {getattr(function, '__name__', function)!r}{at}"


_SCALARS = {"float", "int", "number", "bool", "SymInt", "Scalar"}


def _kinds(pattern: Pattern) -> dict[str, str]:
    """What operands are, as far as the replacement's schema or annotations tell.

    "tensor", "scalar" or "dtype", with "?" if it may be None.
    """
    target, _ = target_of(pattern.replacement)
    kinds: dict[str, str] = {}
    if isinstance(target, torch._ops.OpOverload):
        for a in target._schema.arguments:
            text = str(a.real_type)
            kind = "tensor" if "Tensor" in text else "dtype" if "ScalarType" in text else "scalar"
            kinds[a.name] = f"{kind}?" if text.startswith("Optional") else kind
    for function in (target, pattern.function):
        for name, hint in _hints(function).items():
            options = set(typing.get_args(hint)) or {hint}
            absent = "?" if type(None) in options else ""
            if torch.Tensor in options:
                kinds[name] = f"tensor{absent}"
            elif torch.dtype in options:
                kinds[name] = f"dtype{absent}"
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


def _no_conversion(self: Any, *_: Any) -> Any:
    raise PatternError(
        f"makes a Python number of {describe(_unwrap(self))}, which is not known when the pattern is traced; leave it "
        "as it is, with x.shape[-1] ** 0.5 for math.sqrt and torch functions for values of tensors"
    )


def _no_loop(self: Any, *_: Any) -> Any:
    raise PatternError(
        f"loops over {describe(_unwrap(self))} or unpacks it, whose length is not known when the pattern is traced; "
        "use x.chunk(n, dim=-1) or slices, and write other loops out"
    )


class ValueProxy:
    """Stands for an integer, dtype or shape that is known only once the pattern is matched."""

    def __init__(self, expr: Any) -> None:
        self.expr = expr

    __bool__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _no_branching  # type: ignore[assignment]
    __int__ = __float__ = __index__ = _no_conversion  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return TensorProxy.__torch_function__(func, types, args, kwargs)  # torch accepts it as a dtype if this is here


def _value_operator(fn: str, swapped: bool) -> Callable[[ValueProxy, Any], ValueProxy]:
    def apply(self: ValueProxy, other: Any) -> ValueProxy:
        a, b = _unwrap(self), _unwrap(other)
        return ValueProxy(arith(fn, b, a) if swapped else arith(fn, a, b))

    return apply


for _fn in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow"):
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
        in_place = (name or "").endswith("_") and target not in PYTHON_OPERATORS
        if in_place or kwargs.get("inplace") is True or kwargs.get("out") is not None:
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
        proxy = next((a for a in flat if isinstance(a, TensorProxy)), None)
        if proxy is None:
            raise PatternError(f"makes a tensor with {func.__name__}; make it a parameter, or a number")
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

    __bool__ = __contains__ = _no_branching  # type: ignore[assignment]
    __int__ = __float__ = __index__ = _no_conversion  # type: ignore[assignment]
    __len__ = __iter__ = _no_loop  # type: ignore[assignment]
    __hash__ = object.__hash__  # comparisons are tensors

    def __setitem__(self, index: Any, value: Any) -> None:
        raise PatternError("writes to its operand with []; compute the result without changing anything")

    def __getitem__(self, index: Any) -> Any:
        return self._apply("getitem", (self, index), {})

    def __neg__(self) -> Any:
        return self._apply("neg", (self,), {})

    def __abs__(self) -> Any:
        return self._apply("abs", (self,), {})

    def __invert__(self) -> Any:
        return self._apply(operator.invert, (self,), {})


def _tensor_operator(fn: Any, swapped: bool) -> Callable[[TensorProxy, Any], Any]:
    def apply(self: TensorProxy, other: Any) -> Any:
        return self._apply(fn, (other, self) if swapped else (self, other), {})

    return apply


for _fn in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    setattr(TensorProxy, f"__{_fn}__", _tensor_operator(_fn, False))
    setattr(TensorProxy, f"__r{_fn}__", _tensor_operator(_fn, True))
for _fn, _target in (
    ("and", operator.and_),
    ("or", operator.or_),
    ("floordiv", operator.floordiv),
    ("mod", operator.mod),
):
    setattr(TensorProxy, f"__{_fn}__", _tensor_operator(_target, False))
for _fn in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(TensorProxy, f"__{_fn}__", _tensor_operator(_fn, False))
