"""Jobs that are fed what the job before them returned."""

from __future__ import annotations

import os
import pickle
import signal
import time
from typing import Any, NoReturn

from jobs import note

__all__ = [
    "Doubler",
    "Unsendable",
    "add",
    "crash",
    "describe",
    "fed_and_failing_at_first",
    "fed_pass",
    "hang",
    "instants",
    "note_fed",
    "numbers",
    "refuse",
    "total",
    "unsendable",
]


def add(previous: Any, number: int) -> Any:
    return previous + number


def total(previous: list[int]) -> int:
    return sum(previous)


def numbers(size: int) -> Any:
    import numpy as np  # Why here: few workers need it

    return np.arange(size, dtype=np.int64)


def refuse(previous: Any) -> NoReturn:
    raise ValueError(f"will not take {previous!r}")


def crash(previous: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(previous: Any) -> None:
    time.sleep(60)


def note_fed(previous: Any, path: str) -> Any:
    """Note what came, and hand it on."""
    note(path, repr(previous))
    return previous


def fed_pass(previous: Any, folder: str, name: str) -> str:
    """As a job at the gate."""
    from gates import pass_gate

    return pass_gate(folder, name)


def fed_and_failing_at_first(previous: int, path: str, times: int) -> int:
    """Fail so many times, then return the sum of what came and the number of the attempt."""
    from jobs import fail_at_first

    return previous + fail_at_first(path, times)


def instants(previous: Any) -> tuple[Any, float]:
    return previous, time.monotonic()


def describe(error: BaseException) -> tuple[str, str]:
    return type(error).__qualname__, str(error)


class Doubler:
    """A job of the other shape, to be fed."""

    def __init__(self, priority: int = 0) -> None:
        self.priority = priority

    def run(self, previous: Any) -> Any:
        return previous * 2


class Unsendable:
    """Comes out of its pickle, and never goes into another."""

    def __init__(self) -> None:
        self.is_new = True

    def __reduce__(self) -> Any:
        if not self.is_new:
            raise pickle.PicklingError("once is enough")
        return _second_hand, ()


def _second_hand() -> Unsendable:
    made = Unsendable()
    made.is_new = False
    return made


def unsendable() -> Unsendable:
    return Unsendable()
