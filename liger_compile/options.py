"""The `liger.*` options of `torch.compile(..., options={...})`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from . import _torch
from .pattern import Pattern
from .registry import patterns

PREFIX = "liger."
CHOICES = {
    "logits": ("lazy", "keep"),
    "loss": ("lean", "balanced", "fast"),
    "memory": ("speed", "balanced", "lean"),
    "select": ("auto", "always"),
}
"""The values of options that have a few."""


@dataclass(frozen=True)
class Options:
    """What the user asked of the rewriter. Every field is an option `liger.<name>`; docs/options.md has the table."""

    enable: tuple[str, ...] | None = None
    """Use only these patterns (by name); all, if None."""
    disable: tuple[str, ...] = ()
    """Never use these patterns."""
    patterns: tuple[Pattern, ...] = ()
    """Further patterns for this compilation alone, made by `liger_compile.make_pattern`."""
    logits: str = "lazy"
    """What becomes of logits that a model returns next to its loss. "lazy" computes them when they are first read,
    "keep" leaves the loss of such a model alone."""
    loss: str = "balanced"
    """What the loss takes of logits at a time ("lean", "balanced" or "fast"; docs/loss.md)."""
    memory: str = "balanced"
    """What the backward computes again instead of keeping it: results of norms and gated units ("balanced"), of RoPE
    too ("lean"), or none of ours ("speed")."""
    select: str = "auto"
    """"auto" leaves to Inductor what it does as fast on this device, with these dtypes and sizes, as far as that was
    measured; "always" rewrites whatever the kernels take."""
    fuse: bool = True
    """Fuse our ops with their neighbours in the graphs of forward and backward (`fuse.py`)."""
    verify: bool = False
    """Run each replacement beside the code it replaces, uncompiled, and raise at the first that is wrong."""
    fuel: int | None = None
    """Rewrite only so many places, counted over the process in the order of compilation; `liger-compile bisect`."""
    debug: bool | str = False
    """Write each graph before and after, and the report, to this folder (`liger_debug`, if True)."""

    def wants(self, name: str) -> bool:
        return (self.enable is None or name in self.enable) and name not in self.disable


def split_options(options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Our options, and Inductor's.

    Raises:
        ValueError: a key that neither knows, or a value of the wrong type; the message says what to write instead.
    """
    ours = _from_environment()
    inductor: dict[str, Any] = {}
    names = {f.name for f in fields(Options)}
    known = _torch.inductor_options()
    for key, value in (options or {}).items():
        if not isinstance(key, str):
            raise ValueError(f"options: names of options are strings, not {key!r}")
        plain = key.replace("-", "_")
        if key.startswith(PREFIX) and key.removeprefix(PREFIX) in names:
            ours[key.removeprefix(PREFIX)] = value
        elif not key.startswith(PREFIX) and plain in known:
            inductor[plain] = _of_type(key, value, _torch.option_type(plain))
        else:
            candidates = [PREFIX + n for n in sorted(names)] + sorted(known)
            near = difflib.get_close_matches(key, candidates, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"unknown option {key!r}; did you mean {near!r}? Options of the liger backend are "
                f"{', '.join(PREFIX + n for n in sorted(names))}; all others are Inductor's."
            )
    return _checked(ours), inductor


def _checked(values: dict[str, Any]) -> Options:
    if "patterns" in values:
        items = values["patterns"]
        items = items if isinstance(items, (list, tuple)) else (items,)
        for item in items:
            if not isinstance(item, Pattern):
                raise ValueError(f"{PREFIX}patterns: make patterns with liger_compile.make_pattern(...), not {item!r}")
        values["patterns"] = tuple(items)
    for key in ("enable", "disable"):
        if values.get(key) is None:
            values.pop(key, None)
        else:
            values[key] = _names(key, values[key], values.get("patterns", ()))
    for key, known in CHOICES.items():
        if values.get(key, known[0]) not in known:
            choices = " or ".join(f'"{k}"' for k in known)
            raise ValueError(f"{PREFIX}{key}: {choices}, not {values[key]!r}")
    _checked_types(values)
    return Options(**values)


def _checked_types(values: dict[str, Any]) -> None:
    fuel = values.get("fuel")
    if not isinstance(values.get("debug", False), (bool, str, os.PathLike)):
        raise ValueError(f"{PREFIX}debug: True, False or a folder, not {values['debug']!r}")
    for key in ("fuse", "verify"):
        if not isinstance(values.get(key, False), bool):
            raise ValueError(f"{PREFIX}{key}: True or False, not {values[key]!r}")
    if fuel is not None and (not isinstance(fuel, int) or isinstance(fuel, bool) or fuel < 0):
        raise ValueError(f"{PREFIX}fuel: how many places to rewrite, a whole number from 0 on, not {fuel!r}")


def _from_environment() -> dict[str, Any]:
    """Options for programs that cannot be changed; those given in code win."""
    found: dict[str, Any] = {}
    if folder := os.environ.get("LIGER_COMPILE_DEBUG"):
        found["debug"] = folder
    if fuel := os.environ.get("LIGER_COMPILE_FUEL"):
        found["fuel"] = int(fuel) if fuel.isdecimal() else fuel
    return found


def _of_type(key: str, value: Any, expected: type | None) -> Any:
    if expected is not None and not isinstance(value, expected):
        raise ValueError(f"{key}: a value of type {expected.__name__}, not {value!r}")
    return value


def _names(key: str, value: Any, extra: tuple[Pattern, ...]) -> tuple[str, ...]:
    if not isinstance(value, (str, Iterable)):
        raise ValueError(f"{PREFIX}{key}: a list of names of patterns, not {value!r}")
    items = (value,) if isinstance(value, str) else tuple(value)
    known = sorted({p.name for p in patterns(extra)})
    for item in items:
        if item not in known:
            near = difflib.get_close_matches(str(item), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{PREFIX}{key}: no pattern is called {item!r}; did you mean {near!r}?")
    return items
