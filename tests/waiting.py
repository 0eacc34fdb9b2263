"""Waiting for what should become true. Apart from watching.py, so that jobs which wait import no psutil."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["PATIENCE", "wait_until"]

# How long a condition may take to come true before a test gives up (seconds). Only a broken test takes so long.
PATIENCE = 20.0


def wait_until(condition: Callable[[], object], what: str = "", *, within: float = PATIENCE) -> None:
    """Return when `condition()` is true; fail the test when it is not within so many seconds."""
    end = time.monotonic() + within
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {within} s: {what or condition}")
        time.sleep(0.002)
