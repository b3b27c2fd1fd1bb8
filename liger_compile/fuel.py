"""`liger.fuel`: rewriting only the first so many places, to find the one that breaks a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from .report import Rewritten

T = TypeVar("T")
EVERYTHING = 1 << 62
"""A limit that is none, but counts."""
_spent: list[Rewritten] = []
"""What was rewritten under a limit since the last `reset`, in order. A process compiles graph after graph, each with
options of its own, and the limit is on all of them."""


def reset() -> None:
    _spent.clear()


def left(limit: int | None) -> bool:
    return limit is None or len(_spent) < limit


def spend(limit: int | None, rewritten: Rewritten) -> None:
    if limit is not None:
        _spent.append(rewritten)


def first_to_fail(works: Callable[[int], bool], most: int) -> int:
    """The least number of rewrites with which something fails that works with none and fails with `most`."""
    good, bad = 0, most
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if works(middle) else (good, middle)
    return bad


def search(works: Callable[[int], bool], made: Callable[[], Sequence[T]]) -> tuple[int, Sequence[T]]:
    """The number of the rewrite with which something fails, and all rewrites.

    `works(limit)` runs it with so many; `made()` tells, after a run with all, which those were.

    Raises:
        ValueError: it works with all rewrites, fails without any, or there are none.
    """
    if works(EVERYTHING):
        raise ValueError("it works with all rewrites; there is nothing to find")
    rewrites = made()
    if not works(0):
        raise ValueError("it fails without any rewrite too; the fault is elsewhere")
    if not rewrites:
        raise ValueError("nothing was rewritten; is something compiled with backend='liger'?")
    return first_to_fail(works, len(rewrites)), rewrites


def bisect(works: Callable[[dict[str, Any]], bool]) -> Rewritten:
    """Finds the rewrite that breaks a model::

        def works(options):
            loss = torch.compile(model, backend="liger", options=options)(**batch).loss
            return abs(loss - expected) < 1e-3

        print(liger_compile.bisect(works))

    Args:
        works: compiles and runs something with the options it is given, from scratch each time, and says whether the
            result is right. An exception counts as wrong.

    Returns:
        The rewrite with which it first fails, those before it being made too.

    Raises:
        ValueError: it works with all rewrites, fails without any, or there are none.
    """

    def trial(limit: int) -> bool:
        reset()
        torch._dynamo.reset()
        try:
            return bool(works({"liger.fuel": limit}))
        except Exception:
            return False

    try:
        number, rewrites = search(trial, lambda: list(_spent))
        return rewrites[number - 1]
    finally:
        reset()
        torch._dynamo.reset()
