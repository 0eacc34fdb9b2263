"""The functions that the benchmarks run in workers.

They have a module of their own, so that a worker imports this one and none of the measuring code.
"""

from __future__ import annotations

import time

__all__ = ["HOLD_SECONDS", "burn", "hold", "ignore", "noop", "spin"]

HOLD_SECONDS = 0.02
"""Length of `hold` and `burn`: long beside a dispatch, short beside a round."""


def noop() -> None:
    """Do nothing: what is left to measure is the way there and back."""


def ignore(_: object) -> None:
    """Do nothing with an item of a map."""


def spin(turns: int) -> None:
    """Do a fixed amount of work in pure Python, however long others make it take."""
    for _ in range(turns):
        pass


def hold() -> None:
    """Keep a worker busy without using its CPU."""
    time.sleep(HOLD_SECONDS)


def burn() -> None:
    """Keep a worker busy with pure Python code."""
    end = time.perf_counter() + HOLD_SECONDS
    while time.perf_counter() < end:
        pass
