"""What the items of the tests' maps do, and reading a map to its end."""

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

from faulty_jobs import _die_after_next_write, _writes
from jobs import lines, note

from bulkhead import Unrecoverable

__all__ = [
    "BreaksInWorker",
    "Counted",
    "Hanging",
    "KillsPickler",
    "KillsReader",
    "Unpicklable",
    "die_at",
    "do",
    "fails_at_first",
    "held",
    "outcomes",
    "square",
    "where",
]


def outcomes(results: Iterator[Any]) -> list[Any]:
    """Read a map to its end; return values, and where an item has failed its exception."""
    found: list[Any] = []
    while True:
        try:
            found.append(next(results))
        except StopIteration:
            return found
        except Exception as error:
            found.append(error)


class Counted:
    """Counts up, to `stop` or for ever, and knows how far it was read, and how often after its end."""

    def __init__(self, stop: int | None = None, pause: float = 0.0) -> None:
        self._numbers = itertools.count() if stop is None else iter(range(stop))
        self._pause = pause
        self.n_read = 0
        self.n_asked_in_vain = 0

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> int:
        if self._pause:
            time.sleep(self._pause)
        try:
            number = next(self._numbers)
        except StopIteration:
            self.n_asked_in_vain += 1
            raise
        self.n_read += 1
        return number


# Items that behave


def square(number: int) -> int:
    return number * number


def where(seconds: float = 0.0) -> tuple[int, float, float]:
    """Sleep; return the process, and when the item began and ended."""
    began = time.monotonic()
    time.sleep(seconds)
    return os.getpid(), began, time.monotonic()


def held(folder: Path, first: int, number: int) -> int:
    """Note the number; from `first` on wait until the file "go" is there."""
    note(folder / "begun", number)
    give_up = time.monotonic() + 60
    while number >= first and not (folder / "go").exists():
        if time.monotonic() > give_up:
            raise TimeoutError(f"nobody lets {number} go")
        time.sleep(0.002)
    return number


# Items that do not


def die_at(number: int, at: int) -> int:
    if number == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fails_at_first(folder: Path, number: int, what: str, times: int) -> int:
    """Note the number; `what` happens in so many of its first runs. Take a millisecond, so that no group is formed."""
    note(folder / f"runs-{number}", os.getpid())
    time.sleep(0.001)
    if len(lines(folder / f"runs-{number}")) <= times:
        _HAPPENS[what](number)
    return number


def do(what: str, *args: Any) -> Any:
    """Let something happen, by its name; "" is nothing."""
    return _HAPPENS[what](*args) if what else None


class Named(Exception):
    """Has an idea of its own of what a note is."""

    def add_note(self, customer: str, text: str) -> None:
        raise NotImplementedError


class Noteless(Exception):
    """Cannot be given a note."""

    __notes__ = ()


class Sealed(Exception):
    """Cannot be changed once it is made."""

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("sealed")


def _raise(error: BaseException) -> NoReturn:
    raise error


def _daemonize() -> None:
    os.setsid()


def _fork_and_return_twice(is_waiting: bool) -> str:
    child = os.fork()
    if not child:
        return "child"
    if is_waiting:
        os.waitpid(child, 0)
    return "parent"


def _overrun_sigterm(*_: object) -> str:
    """Run until SIGTERM comes, and return a value then."""
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    told.wait()
    return "told"


def _answer_and_die(*_: object) -> None:
    """Raise, in a process that dies as soon as the answer is in the pipe."""
    threading.Thread(target=_die_after_next_write, args=(_writes(),), daemon=True).start()
    raise LookupError("the last words")


_HAPPENS: dict[str, Callable[..., Any]] = {
    "ValueError": lambda *_: _raise(ValueError("no luck")),
    "Unrecoverable": lambda *_: _raise(Unrecoverable("never")),
    "StopIteration": lambda *_: _raise(StopIteration("not the end")),
    "SystemExit": lambda *_: _raise(SystemExit(3)),
    "sys.exit": lambda *_: sys.exit("gone"),
    "KeyboardInterrupt": lambda *_: _raise(KeyboardInterrupt()),
    "GeneratorExit": lambda *_: _raise(GeneratorExit()),
    "Named": lambda *_: _raise(Named("named")),
    "Noteless": lambda *_: _raise(Noteless("noteless")),
    "Sealed": lambda *_: _raise(Sealed("sealed")),
    "os._exit": lambda *_: os._exit(0),
    "SIGKILL": lambda *_: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda *_: time.sleep(60),
    "lock": lambda *_: threading.Lock(),
    "value that breaks here": lambda *_: BreaksInWorker(os.getpid()),
    "value that kills its pickler": lambda *_: KillsPickler(),
    "fork": lambda *_: _fork_and_return_twice(False),
    "fork and wait": lambda *_: _fork_and_return_twice(True),
    "overrun": _overrun_sigterm,
    "answer and die": _answer_and_die,
}
