"""What jobs of the tests do. At module level and cheap to import, as workers import it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from bulkhead import Unrecoverable

__all__ = [
    "Greeting",
    "echo",
    "fail",
    "fail_at_first",
    "fail_for_good",
    "instant",
    "lines",
    "nap",
    "nothing",
    "note",
    "note_and_die",
    "note_and_fail",
    "note_and_hang",
    "pid",
    "spin",
]


def nothing() -> None:
    """Return at once."""


def echo(*args: Any, **kwargs: Any) -> Any:
    """Return the only argument, or all there are."""
    return args[0] if len(args) == 1 and not kwargs else (args, kwargs)


def pid() -> int:
    return os.getpid()


def instant() -> float:
    """Return when it ran, on the clock that all processes of a machine share."""
    return time.monotonic()


def nap(seconds: float) -> tuple[float, float]:
    """Sleep, and return when it began and when it ended."""
    began = time.monotonic()
    time.sleep(seconds)
    return began, time.monotonic()


def spin(seconds: float) -> int:
    """Use the CPU for so long."""
    end = time.monotonic() + seconds
    turns = 0
    while time.monotonic() < end:
        turns += 1
    return turns


def note(path: str | Path, text: object) -> None:
    """Add a line to a file; several processes may do so at once."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(fd, f"{text}\n".encode())
    finally:
        os.close(fd)


def lines(path: str | Path) -> list[str]:
    """Return what was noted."""
    try:
        return Path(path).read_text().splitlines()
    except FileNotFoundError:
        return []


def note_and_give(path: str, value: int) -> int:
    note(path, value)
    return value


def fail(text: str = "no luck") -> None:
    raise ValueError(text)


def note_and_die(path: str) -> None:
    note(path, time.monotonic())
    os.kill(os.getpid(), signal.SIGKILL)


def note_and_hang(path: str) -> None:
    note(path, time.monotonic())
    time.sleep(60)


def note_and_fail(path: str) -> None:
    note(path, time.monotonic())
    raise ValueError("no luck")


def fail_at_first(path: str, times: int) -> int:
    """Fail so many times, then return the number of the attempt; each attempt's instant is noted."""
    note(path, time.monotonic())
    attempt = len(lines(path))
    if attempt <= times:
        raise OSError(f"attempt {attempt} fails")
    return attempt


def fail_for_good(path: str) -> None:
    note(path, time.monotonic())
    raise Unrecoverable("trying again is useless")


class Greeting:
    """A job of the other shape: an object with `priority` and `run()`."""

    def __init__(self, name: str, priority: int = 0, **options: Any) -> None:
        self.name = name
        self.priority = priority
        self.__dict__.update(options)

    def run(self) -> str:
        return f"hello {self.name} from {os.getpid()}"
