"""The functions that the benchmarks run in workers.

They have a module of their own, so that a worker imports this one and none of the measuring code.
"""

from __future__ import annotations

import hashlib
import time

__all__ = ["HOLD_SECONDS", "burn", "digest", "hold", "ignore", "noop"]

HOLD_SECONDS = 0.02
"""Length of `hold` and `burn`: long beside a dispatch, short beside a round."""


def noop() -> None:
    """Do nothing: what is left to measure is the way there and back."""


def ignore(_: object) -> None:
    """Do nothing with an item of a map."""


def digest(turns: int) -> None:
    """Do a fixed amount of work, however long others make it take.

    Why no loop in Python: one that makes objects takes up to twice as long where the allocator has a hole in a full
    page (CPython 3.11), and where that is differs between libraries and from item to item.
    """
    hashlib.pbkdf2_hmac("sha256", b"password", b"salt", turns)


def hold() -> None:
    """Keep a worker busy without using its CPU."""
    time.sleep(HOLD_SECONDS)


def burn() -> None:
    """Keep a worker busy with pure Python code."""
    end = time.perf_counter() + HOLD_SECONDS
    while time.perf_counter() < end:
        pass
