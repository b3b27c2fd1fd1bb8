"""The table of patterns. Widest first is the order in which they are tried."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

from .emit import parameters_of, target_of
from .pattern import Check, Examples, Pattern, _where
from .terms import PatternError

_PATTERNS: list[Pattern] = []


def register_pattern(
    function: Callable[..., Any],
    replacement: Callable[..., Any],
    check: Check | None = None,
    name: str | None = None,
    recompute: bool = False,
    on_demand: bool = False,
    examples: Examples | None = None,
) -> Pattern:
    """Registers a pattern for every later compilation in this process.

    Args:
        function: the code to look for, as a plain function of tensors and numbers. Its positional parameters are the
            operands; a keyword-only parameter annotated `Literal[a, b]` makes one spelling for each value. Sizes are
            read from the back (`x.shape[-1]`), and control flow on operands is not possible.
        replacement: what to call instead: a `torch.library` op, a `torch.autograd.Function.apply`, or any function of
            tensors. It is given, by name, the operands and choices it has parameters for, and returns what `function`
            returns. `functools.partial` fixes further arguments.
        check: given the `Match`, returns None, the reason why this match must be left alone, or a dictionary of
            operands by name: further ones for the replacement, or others in place of those captured.
        name: what reports call the pattern; the function's name by default. Functions that share a name are spellings
            of one pattern.
        recompute: whether the backward may run the replacement again instead of keeping its result.
        on_demand: whether intermediate results that the model returns (logits next to a loss) may be computed only when
            somebody reads them, instead of preventing the rewrite.
        examples: operands to try the pattern with. It is called with a tensor factory `make(*shape)` and a number of
            rows, and yields dictionaries of operands by name; the test suite compares function and replacement on them.

    Raises:
        PatternError: the function cannot be traced, or the replacement does not take its operands.
    """
    pattern = make_pattern(function, replacement, check, name, recompute, on_demand, examples)
    _PATTERNS.append(pattern)
    return pattern


def pattern(
    replace: Callable[..., Any],
    check: Check | None = None,
    name: str | None = None,
    recompute: bool = False,
    on_demand: bool = False,
    examples: Examples | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator form of `register_pattern`. The function itself is returned unchanged."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        register_pattern(function, replace, check, name, recompute, on_demand, examples)
        return function

    return register


def make_pattern(
    function: Callable[..., Any],
    replacement: Callable[..., Any],
    check: Check | None = None,
    name: str | None = None,
    recompute: bool = False,
    on_demand: bool = False,
    examples: Examples | None = None,
) -> Pattern:
    """A pattern for one compilation (`options={"liger.patterns": [...]}`), checked but not registered."""
    for what, value in (("function", function), ("replacement", replacement), ("check", check), ("examples", examples)):
        if not callable(value) and not (value is None and what in ("check", "examples")):
            raise PatternError(f"pattern {name or function!r}: {what}={value!r} cannot be called; give a function")
    name = getattr(function, "__name__", None) if name is None else name
    if not isinstance(name, str) or not name:
        raise PatternError(f"pattern {function!r}: name={name!r}; give it a name that reports can use")
    try:
        inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise PatternError(f"{_where(function)}: has no signature; call it in a function of the operands") from error
    made = Pattern(name, function, replacement, check, recompute, on_demand, examples)
    target, fixed = target_of(replacement)
    accepted = parameters_of(target)
    for spelling in made.spellings:
        given = {*spelling.variables, *spelling.choice, *fixed}
        missing = [n for n, required in accepted.items() if required and n not in given]
        if missing:
            raise PatternError(f"{_where(function)}: the replacement needs {missing[0]!r}, which is not an operand")
        unread = [n for n in spelling.variables if n not in accepted]
        if unread:
            raise PatternError(f"{_where(function)}: the replacement does not take the operand {unread[0]!r}")
    return made


@functools.cache
def load_builtin() -> None:
    """Imports every module of `liger_compile.patterns`, which registers what it defines."""
    package = importlib.import_module("liger_compile.patterns")
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"{package.__name__}.{module}")


def patterns(extra: Sequence[Pattern] = ()) -> list[Pattern]:
    """The registered patterns and `extra` ones."""
    load_builtin()
    return [*extra, *_PATTERNS]
