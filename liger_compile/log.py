"""The package's logger, and warnings that are given once."""

from __future__ import annotations

import logging

log = logging.getLogger("liger_compile")
_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Once for each reason, however many graphs and matches it concerns."""
    if message not in _warned:
        _warned.add(message)
        log.warning(message)
