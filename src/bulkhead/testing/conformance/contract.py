"""What the contracts' tests have in common: the fixtures, and how to wait."""

from __future__ import annotations

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol, TypeVar

import pytest

from bulkhead.backends.base import Backend, Broker, Claim, Message
from bulkhead.errors import BrokerUnavailable

__all__ = [
    "LONG",
    "ODD_NAMES",
    "SHORT",
    "TICK",
    "Again",
    "Contract",
    "claims",
    "ids_of",
    "keep",
    "soonest",
    "until",
]

T = TypeVar("T")

# Seconds of a lease that a test lets run out, and of one that it does not.
SHORT = 0.15
LONG = 60.0

# By how many seconds the server's clock may be off, which may have only milliseconds.
TICK = 0.01

# Longest wait in seconds for what has to come.
PATIENCE = 10.0

# What may not be taken for a pattern, a path, a separator, a number, another case or another form of the same.
ODD_NAMES = (
    "a b",
    " a ",
    "a.b",
    ".",
    "..",
    "*",
    ">",
    "a*",
    "a:b",
    "a/b\\c",
    "{a}",
    "%",
    "a_c",
    "'; --",
    "0",
    "-1",
    "None",
    "a",
    "A",
    "\n\t",
    "a\0b",
    "Grüße ☃ \U0001d11e",
    "\u00e9",
    "e\u0301",
    "x" * 200,
    "\U0001d11e" * 200,
)


class Again(Protocol):
    """Connects once more to the place of this test; the namespace is one of at most 20 letters and "-"."""

    def __call__(self, namespace: str = "one") -> Backend:
        """Return a connection of its own."""


class Contract:
    """The fixtures of all contracts. The subclass has the fixture `again`.

    Attributes:
        is_shared_by_processes: False for a place in the memory of one process, which a forked copy of it is told.
        keeps_places: False for one where a job that is given back for a while cannot keep its place in line.
    """

    is_shared_by_processes = True
    keeps_places = True

    @pytest.fixture
    def backend(self, again: Again) -> Backend:
        """The connection that most tests use."""
        return again()

    def shares_with_fork(self, work: Callable[[], object]) -> bool:
        """Run `work` in a forked copy of this process, where it has to return something true.

        Returns:
            False where the place is in the memory of one process; then the copy has been told so.
        """
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # threads beside a fork: they are not used in the copy
            child = os.fork()
        if not child:
            _end_as(work)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if self.is_shared_by_processes:
            assert status == _TRUE, (
                f"the copy ended with {status} (1: error, 2: nothing true, 3: unavailable)"
            )
        else:
            assert status == _UNAVAILABLE, f"the copy ended with {status}, BrokerUnavailable would be 3"
        return self.is_shared_by_processes


# Exit codes of a forked copy.
_TRUE, _ERROR, _FALSE, _UNAVAILABLE = range(4)


def _end_as(work: Callable[[], object]) -> NoReturn:
    code = _ERROR
    try:
        # Why: a copy that hangs must not hold up the tests.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(PATIENCE))
        code = _TRUE if work() else _FALSE
    except BrokerUnavailable:
        code = _UNAVAILABLE
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def keep(broker: Broker, *ids: str, queue: str = "q", **rest: object) -> None:
    """Enqueue jobs with these ids; each is new."""
    messages = [Message(id, queue, id.encode(), **rest) for id in ids]  # type: ignore[arg-type]
    assert broker.enqueue_many(messages) == [True] * len(ids)


def claims(broker: Broker, n: int = 1, lease: float = LONG, queue: str = "q") -> list[Claim]:
    """Claim `n` jobs, which have to come."""
    found: list[Claim] = []
    deadline = time.monotonic() + PATIENCE
    while len(found) < n:
        found += broker.claim(queue, n - len(found), lease, wait=0.5)
        assert time.monotonic() < deadline, f"{len(found)} of {n} jobs came: {[claim.id for claim in found]}"
    return found


def until(condition: Callable[[], T]) -> T:
    """Return what `condition` gives as soon as it is true."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, "what had to come did not come"
        time.sleep(0.005)
    return value


def soonest(attempt: Callable[[], float], *, bound: float, tries: int = 6) -> None:
    """Assert that `attempt`, which returns seconds, stays below `bound` at least once: a loaded machine may be late."""
    seen: list[float] = []
    while not seen or min(seen) >= bound:
        assert len(seen) < tries, f"never within {bound} s: {seen}"
        seen.append(attempt())


def ids_of(things: Sequence[object]) -> list[str]:
    """The ids of claims, records or outcomes."""
    return [thing.id for thing in things]  # type: ignore[attr-defined]
