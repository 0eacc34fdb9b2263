"""What the items of the tests' maps do; a source that is watched; reading a map to its end."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import faulty_jobs
from jobs import lines, note

from bulkhead import Unrecoverable

__all__ = [
    "BreaksElsewhere",
    "Counted",
    "HangsElsewhere",
    "Unpicklable",
    "do",
    "fail_at_first",
    "held",
    "identity",
    "outcomes",
    "square",
    "where",
]


def outcomes(results: Iterator[Any]) -> list[Any]:
    """Read a map to its end; return its values, and the exception where an item has failed."""
    found: list[Any] = []
    while True:
        try:
            found.append(next(results))
        except StopIteration:
            return found
        except Exception as error:
            found.append(error)


class Counted:
    """Counts from 0, up to `stop` or for ever; knows how far it was read, and how often beyond its end."""

    def __init__(self, stop: int | None = None, pause: float = 0.0) -> None:
        self._numbers = itertools.count() if stop is None else iter(range(stop))
        self._pause = pause
        self.n_read = 0
        self.n_asked_in_vain = 0

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> int:
        time.sleep(self._pause)
        try:
            number = next(self._numbers)
        except StopIteration:
            self.n_asked_in_vain += 1
            raise
        self.n_read += 1
        return number


# Items that cannot travel


class Unpicklable:
    def __reduce__(self) -> NoReturn:
        raise ZeroDivisionError("the pickling breaks")


class BreaksElsewhere:
    """Can be rebuilt in the process that made it, and in no other."""

    def __reduce__(self) -> Any:
        return _break_elsewhere, (os.getpid(),)


class HangsElsewhere:
    """Takes a minute to be rebuilt."""

    def __reduce__(self) -> Any:
        return time.sleep, (60,)


class KillsItsPickler:
    def __reduce__(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def _break_elsewhere(home: int) -> BreaksElsewhere:
    if os.getpid() != home:
        raise ZeroDivisionError("the unpickling breaks")
    return BreaksElsewhere()


# What items do


def identity(value: Any) -> Any:
    return value


def square(number: int) -> int:
    return number * number


def where(seconds: float = 0.0) -> tuple[int, float, float]:
    """Sleep; return the process, and when that began and ended."""
    began = time.monotonic()
    time.sleep(seconds)
    return os.getpid(), began, time.monotonic()


def held(folder: Path, number: int) -> int:
    """Note the number. From 1000 on, wait until the file "go" is there."""
    note(folder / "begun", number)
    give_up = time.monotonic() + 60
    while number >= 1000 and not (folder / "go").exists():
        if time.monotonic() > give_up:
            raise TimeoutError(f"nobody lets {number} go")
        time.sleep(0.002)
    return number


def do(what: str, number: int = 0) -> Any:
    """Let something happen, by its name; with "" return the number."""
    return _HAPPENS[what]() if what else number


def fail_at_first(folder: Path, what: str, times: int, number: int) -> int:
    """Note the run of this number; let something happen in so many of its first ones, then return the number.

    Takes a millisecond, since shorter items may run again when another one kills their worker.
    """
    note(folder / f"runs-{number}", os.getpid())
    time.sleep(0.001)
    if len(lines(folder / f"runs-{number}")) <= times:
        do(what)
    return number


class Named(Exception):
    """Has a meaning of its own for what a note is."""

    def add_note(self, customer: str, text: str) -> None:
        raise NotImplementedError


class Noteless(Exception):
    """Cannot be given a note."""

    __notes__ = ()


def _raise(error: BaseException) -> NoReturn:
    raise error


def _fork(*, is_waiting: bool) -> str:
    """Return in the worker and in a forked copy of it."""
    child = os.fork()
    if not child:
        return "child"
    if is_waiting:
        os.waitpid(child, 0)
    return "parent"


def _overrun() -> str:
    """Return a value when told to end."""
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    told.wait(60)
    return "too late"


_HAPPENS: dict[str, Callable[[], Any]] = {
    "ValueError": lambda: _raise(ValueError("no luck")),
    "LookupError": lambda: _raise(LookupError("not there")),
    "Unrecoverable": lambda: _raise(Unrecoverable("never")),
    "StopIteration": lambda: _raise(StopIteration("not the end")),
    "SystemExit": lambda: _raise(SystemExit(3)),
    "KeyboardInterrupt": lambda: _raise(KeyboardInterrupt()),
    "GeneratorExit": lambda: _raise(GeneratorExit()),
    "Named": lambda: _raise(Named("named")),
    "Noteless": lambda: _raise(Noteless("noteless")),
    "sys.exit": lambda: sys.exit("gone"),
    "os._exit": lambda: os._exit(0),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": faulty_jobs.segfault,
    "hang": lambda: time.sleep(60),
    "ignore SIGTERM": faulty_jobs.ignore_sigterm,
    "overrun": _overrun,
    "lock": threading.Lock,
    "breaks elsewhere": BreaksElsewhere,
    "kills its pickler": KillsItsPickler,
    "fork": lambda: _fork(is_waiting=False),
    "fork and wait": lambda: _fork(is_waiting=True),
    "close descriptors": lambda: faulty_jobs.close_descriptors(3),
    "write everywhere": lambda: faulty_jobs.write_everywhere(b"\xff" * 3_000_000),
}
