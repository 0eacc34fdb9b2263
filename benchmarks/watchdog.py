"""Ends a benchmark that hangs, and says where: the stacks of all threads name the library that did not answer."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["watched"]

TIMEOUT_SECONDS = 120.0
"""Many times what the slowest measurement takes on a busy machine with the default options."""


@contextmanager
def watched(timeout: float = TIMEOUT_SECONDS) -> Iterator[None]:
    """End this process with exit code 1 and every thread's stack on stderr unless the block is left in time.

    Why at once and without cleaning up: the cleaning up is what may hang. Workers end when they see the caller gone.
    """
    faulthandler.dump_traceback_later(timeout, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
