"""What the items of the tests' maps do; a source that is watched; reading a map to its end."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import faulty_jobs
from jobs import lines, note

from bulkhead import Unrecoverable

__all__ = [
    "Adder",
    "BreaksElsewhere",
    "Counted",
    "HangsElsewhere",
    "Large",
    "Unpicklable",
    "add_up",
    "die_after_the_answer",
    "do",
    "fail_at_first",
    "exit_at",
    "exit_once_at",
    "held",
    "held_and_do",
    "held_bytes",
    "held_from_1000",
    "identity",
    "large",
    "note_and_do",
    "noted",
    "number_of",
    "odd_ones_fail",
    "outcomes",
    "pid_of_worker",
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


# Items and results of their own kind


class Large:
    """Half a megabyte; those that are alive in this process are known."""

    alive: ClassVar[weakref.WeakSet[Large]] = weakref.WeakSet()

    def __init__(self, number: int) -> None:
        self.number = number
        self.content = bytes(500_000)
        Large.alive.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        Large.alive.add(self)


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


class RebuiltSlowly:
    def __reduce__(self) -> Any:
        return _rebuild_slowly, ()


def _rebuild_slowly() -> int:
    time.sleep(0.8)
    return 1


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


def pid_of_worker(_: object) -> int:
    return os.getpid()


def add_up(number: int, table: Sequence[int], more: bytes) -> int:
    return number + int(table[number]) + len(more)


def large(number: int) -> Large:
    return Large(number)


class Adder:
    def __init__(self, base: int) -> None:
        self.base = base

    def __call__(self, number: int) -> int:
        return self.base + number

    def add(self, number: int) -> int:
        return self.base + number


def noted(folder: Path, number: int) -> int:
    """Note the number and take a millisecond: shorter items may run again when one after them kills their worker."""
    note(folder / "begun", number)
    time.sleep(0.001)
    return number


def held(folder: Path, number: int) -> int:
    """As `noted`, but wait from 1000 on until the file "go" is there."""
    noted(folder, number)
    _wait_until(lambda: number < 1000 or (folder / "go").exists())
    return number


def held_from_1000(folder: Path, number: int) -> int:
    """As `held`, but take no time before."""
    return held(folder, number) if number >= 1000 else number


def held_bytes(folder: Path, number: int) -> bytes:
    held(folder, number)
    return bytes(102_400)


def number_of(folder: Path, large: Large) -> int:
    return held(folder, large.number)


def do(what: str, number: int = 0) -> Any:
    """Let something happen, by its name; with "" return the number."""
    return _HAPPENS[what]() if what else number


def odd_ones_fail(number: int) -> int:
    if number % 2:
        raise ValueError(number)
    return number


def note_and_do(folder: Path, what: str, number: int) -> Any:
    noted(folder, number)
    return do(what, number)


def held_and_do(folder: Path, what: str, number: int) -> Any:
    held(folder, number)
    return do(what, number)


def exit_at(places: frozenset[int], number: int) -> int:
    """Return the number; with some of them the process exits."""
    if number in places:
        os._exit(7)
    return number


def exit_once_at(folder: Path, place: int, number: int) -> int:
    """Return the number; with one of them the process exits, the first time."""
    if number == place:
        note(folder / "begun", number)
        if not (folder / "exited").exists():
            (folder / "exited").touch()
            os._exit(7)
    return number


def fail_at_first(folder: Path, what: str, times: int, number: int) -> int:
    """As `noted`, but let something happen in so many of the first runs of this number."""
    noted(folder, number)
    if lines(folder / "begun").count(str(number)) <= times:
        do(what)
    return number


def die_after_the_answer(folder: Path, number: int) -> Any:
    """Item 1 takes the caller long to rebuild; meanwhile the worker of item 0 answers and dies."""
    note(folder / "begun", number)
    if number == 0:
        _wait_until((folder / "answered").exists)
        time.sleep(0.2)  # until the caller is at it
        faulty_jobs.answer_and_die()
        raise LookupError("the last words")
    if number == 1:
        _wait_until(lambda: len(lines(folder / "begun")) >= 2)
        (folder / "answered").touch()
        return RebuiltSlowly()
    return number


def _wait_until(condition: Callable[[], bool]) -> None:
    # Why not that of `watching`: fresh workers would have to import psutil.
    give_up = time.monotonic() + 60
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError("nobody lets it go on")
        time.sleep(0.002)


class Comparable(type):
    """A class of its classes that gives them no hash."""

    def __eq__(cls, other: object) -> bool:
        return NotImplemented


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
    "long error": lambda: _raise(ValueError("x" * 2_000_000)),
    "many bytes": lambda: bytes(50_000),
    "array": lambda: faulty_jobs.zeros(300_000),
    "speak and die": lambda: faulty_jobs.speak_and_segfault(3),
    "sys.exit": lambda: sys.exit("gone"),
    "os._exit": lambda: os._exit(0),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": faulty_jobs.segfault,
    "hang": lambda: time.sleep(60),
    "ignore SIGTERM": faulty_jobs.ignore_sigterm,
    "overrun": _overrun,
    "lock": threading.Lock,
    "class without hash": lambda: Comparable("Odd", (), {})(),
    "breaks elsewhere": BreaksElsewhere,
    "kills its pickler": KillsItsPickler,
    "fork": lambda: _fork(is_waiting=False),
    "fork and wait": lambda: _fork(is_waiting=True),
    "close descriptors": lambda: faulty_jobs.close_descriptors(3),
    "write everywhere": lambda: faulty_jobs.write_everywhere(b"\xff" * 3_000_000),
}
