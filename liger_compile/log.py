"""The package's logger, and what is said once."""

from __future__ import annotations

import logging

log = logging.getLogger("liger_compile")
_said: set[str] = set()


def warn_once(message: str) -> None:
    """Once for each reason, however many graphs and matches it concerns."""
    _once(logging.WARNING, message)


def tell_once(message: str) -> None:
    """As `warn_once`, of what is no fault."""
    _once(logging.INFO, message)


def _once(level: int, message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.log(level, message)
