"""The table of patterns: what is in it, who puts it there, and how it is taken out again."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any

import torch

from . import trial
from .emit import parameters_of
from .log import log
from .pattern import Check, Effect, Examples, Pattern, target_of, where
from .terms import PatternError, Term

BUILTIN = "liger_compile.patterns"
"""The package of the patterns that are shipped; also the group of entry points by which others ship theirs."""

_PATTERNS: list[Pattern] = []


def register_pattern(
    function: Callable[..., Any],
    replacement: Callable[..., Any],
    check: Check | None = None,
    name: str | None = None,
    recompute: bool | str = False,
    on_demand: bool | Callable[[Term], bool] = False,
    examples: Examples | None = None,
    priority: int = 0,
    effect: Effect | None = None,
) -> Pattern:
    """Registers a pattern for every later compilation in this process.

    Registering a function again replaces the pattern it made before, so that a cell of a notebook can be run twice. A
    function at the top of a module is the same if module, function and pattern have the names they had; any other (a
    lambda, a function made in a function) only if it is the same object.

    Args:
        function: the code to look for, as a plain function of tensors and numbers. Its positional parameters are the
            operands; a keyword-only parameter annotated `Literal[a, b]` makes one spelling for each value. Sizes are
            read from the back (`x.shape[-1]`), and control flow on operands is not possible.
        replacement: what to call instead: a `torch.library` op, a `torch.autograd.Function.apply`, or any function of
            tensors. It is given, by name, the operands and choices it has parameters for, and returns what `function`
            returns. `functools.partial` fixes further arguments. It must run on tensors without data: a kernel needs
            `torch.library`.
        check: given the `Match`, returns None, the reason why this match must be left alone, or a dictionary of
            operands by name: further ones for the replacement, whose parameters for them need defaults, or others in
            place of those captured.
        name: what reports call the pattern; the function's name by default. Functions that share a name are spellings
            of one pattern.
        recompute: whether the backward may run the replacement again instead of keeping its result; "lean", only with
            `options={"liger.memory": "lean"}`.
        on_demand: whether intermediate results that the model returns (logits next to a loss) may be computed only when
            somebody reads them, instead of preventing the rewrite; a function says of which, by their terms.
        examples: operands to try the pattern with. It is called with a tensor factory and a number of rows, and yields
            dictionaries of operands by name. `make(*shape)` gives values that need a gradient, `make.constant(*shape)`
            some that need none, `make.integers(high, *shape)` whole numbers below `high`. They buy a check, made at
            once and without computing anything: that the replacement's results have the number, shapes, dtypes,
            strides and device of the function's, which finds an op with a wrong fake. Without them nothing can be run.
            What `check` would provide is left at its default.
        priority: patterns of higher priority are tried first; of equal ones, the one with more operations. With 1, a
            pattern comes before all that are shipped, whatever they match.
        effect: given the `Match`, returns what its rewrite spares, in words, for the report; an empty string if that is
            not known, for instance because a size is not.

    Raises:
        PatternError: the function cannot be traced, the replacement does not take its operands, or its results are
            others than the function's on the examples.
    """
    made = make_pattern(function, replacement, check, name, recompute, on_demand, examples, priority, effect)
    at = next((i for i, p in enumerate(_PATTERNS) if _identity(p) == _identity(made)), len(_PATTERNS))
    _PATTERNS[at : at + 1] = [made]
    return made


def _identity(pattern: Pattern) -> tuple[Any, ...]:
    """What tells whether a pattern is registered again or is another one."""
    function = pattern.function
    place = getattr(function, "__qualname__", "<unknown>")
    return pattern.name, function if "<" in place else (function.__module__, place)


def pattern(
    replace: Callable[..., Any],
    check: Check | None = None,
    name: str | None = None,
    recompute: bool | str = False,
    on_demand: bool | Callable[[Term], bool] = False,
    examples: Examples | None = None,
    priority: int = 0,
    effect: Effect | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator form of `register_pattern`. The function itself is returned unchanged."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        register_pattern(function, replace, check, name, recompute, on_demand, examples, priority, effect)
        return function

    return register


def make_pattern(
    function: Callable[..., Any],
    replacement: Callable[..., Any],
    check: Check | None = None,
    name: str | None = None,
    recompute: bool | str = False,
    on_demand: bool | Callable[[Term], bool] = False,
    examples: Examples | None = None,
    priority: int = 0,
    effect: Effect | None = None,
) -> Pattern:
    """A pattern that is checked but not registered: for one compilation (`options={"liger.patterns": [...]}`), or for a
    block (`with liger_compile.registered(...)`). Arguments and errors are those of `register_pattern`."""
    optional = {"check": check, "examples": examples, "effect": effect}
    for what, value in {"function": function, "replacement": replacement, **optional}.items():
        if not callable(value) and not (value is None and what in optional):
            raise PatternError(f"pattern {name or function!r}: {what}={value!r} cannot be called; give a function")
        if isinstance(value, torch.nn.Module):
            raise PatternError(
                f"pattern {name or type(function).__name__!r}: {what} is a {type(value).__name__}, a module; give a "
                "function of its operands, parameters such as weight among them"
            )
    if recompute not in (False, True, "lean"):
        raise PatternError(f"pattern {name or function!r}: recompute={recompute!r}; give True, False or 'lean'")
    if not isinstance(priority, int):
        raise PatternError(f"pattern {name or function!r}: priority={priority!r}; give a whole number")
    name = getattr(function, "__name__", None) if name is None else name
    if not isinstance(name, str) or not name:
        raise PatternError(f"pattern {function!r}: name={name!r}; give it a name that reports can use")
    try:
        inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise PatternError(f"{where(function)}: has no signature; call it in a function of the operands") from error
    made = Pattern(name, function, replacement, check, recompute, on_demand, examples, priority, effect)
    target, fixed = target_of(replacement)
    accepted = parameters_of(target)
    for spelling in made.spellings:
        given = {*spelling.variables, *spelling.choice, *fixed}
        missing = [n for n, required in accepted.items() if required and n not in given]
        if missing:
            raise PatternError(
                f"{where(function)}: the replacement needs {missing[0]!r}, which is not an operand (these are "
                f"{_list(spelling.variables)}); rename it, fix it with functools.partial, or give it a default if "
                "check= provides it"
            )
        unread = [n for n in spelling.variables if n not in accepted]
        if unread:
            raise PatternError(
                f"{where(function)}: the replacement does not take the operand {unread[0]!r}; it takes "
                f"{_list(accepted)}, and operands are given by name"
            )
    if examples is not None and not function.__module__.startswith(f"{BUILTIN}."):  # the test suite checks those
        trial.check_results(made)
    return made


def _list(names: Sequence[str] | dict[str, Any]) -> str:
    return ", ".join(names) or "nothing by name"


def unregister_pattern(pattern_or_name: Pattern | str) -> list[Pattern]:
    """Takes patterns out of the table: later compilations do not use them. What is compiled already stays as it is.

    Args:
        pattern_or_name: what `register_pattern` returned, or a name, which takes out every spelling of that name.
            Patterns that are shipped can be taken out too; inside `with registered():` they are back after the block.

    Returns:
        Those removed.

    Raises:
        ValueError: no such pattern is registered; the message gives the nearest name.
    """
    known = patterns()
    by_name = not isinstance(pattern_or_name, Pattern)
    removed = [p for p in known if (p.name == pattern_or_name if by_name else p is pattern_or_name)]
    if not removed:
        name = str(pattern_or_name) if by_name else pattern_or_name.name
        near = difflib.get_close_matches(name, [p.name for p in known], n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]!r}?" if near and near[0] != name else ""
        what = f"no pattern is called {name!r}" if by_name else f"the pattern {name!r} is not registered"
        raise ValueError(f"{what}{hint}")
    _PATTERNS[:] = [p for p in _PATTERNS if p not in removed]
    return removed


@contextlib.contextmanager
def registered(*added: Pattern) -> Iterator[None]:
    """Registers patterns for compilations in a block, and puts the table back as it was when the block ends::

        with liger_compile.registered(liger_compile.make_pattern(squared_relu, squared_relu_op)):
            compiled(x)  # compiled here; what is compiled stays so behind the block

    Whatever else is registered or unregistered in the block is undone too.

    Raises:
        ValueError: an argument is no pattern.
    """
    for item in added:
        if not isinstance(item, Pattern):
            raise ValueError(f"make patterns with liger_compile.make_pattern(...), not {item!r}")
    before = patterns()
    _PATTERNS.extend(added)
    try:
        yield
    finally:
        _PATTERNS[:] = before


@functools.cache
def load_builtin() -> None:
    """Imports every module of `liger_compile.patterns`, which registers what it defines."""
    package = importlib.import_module(BUILTIN)
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"{package.__name__}.{module}")


@functools.cache
def _entry_points() -> list[metadata.EntryPoint]:
    """Those not loaded yet, the last in the order of names first."""
    return sorted(metadata.entry_points(group=BUILTIN), key=lambda e: e.name, reverse=True)


def load_entry_points() -> None:
    """Registers what other packages ship: an entry point is a module, or a function that is called.

    One that fails is a warning: an installed package must not break compilation.
    """
    waiting = _entry_points()
    while waiting:  # emptied, not iterated: an entry point may look at the table itself
        entry = waiting.pop()
        try:
            loaded = entry.load()
            if not inspect.ismodule(loaded):
                loaded()
        except Exception as error:
            package = entry.dist.name if entry.dist is not None else "unknown"
            log.warning(
                f"the patterns of the package {package} (entry point {entry.name} = {entry.value}) are not used: "
                f"{type(error).__name__}: {error}"
            )
            log.debug("loading patterns failed", exc_info=True)


def patterns(extra: Sequence[Pattern] = ()) -> list[Pattern]:
    """The registered patterns and `extra` ones."""
    load_builtin()
    load_entry_points()
    return [*extra, *_PATTERNS]
