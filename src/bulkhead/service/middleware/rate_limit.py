"""`RateLimit`: so many starts in a period, over all consumers.

    rates/<name>/<key>      one instant and the reservations, see tokens.py; changed by compare-and-set

The clock is that of the consumers' machines, as the registry tells none. Where they differ, jobs start more slowly: one
that is ahead takes what the others would have had, never more than the rate.
"""

from __future__ import annotations

import itertools
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from bulkhead import validate
from bulkhead.errors import ConfigError
from bulkhead.service.middleware.changing import Shared
from bulkhead.service.middleware.choosing import be_the_only_one, key_part
from bulkhead.service.middleware.limiting import Limit, Per
from bulkhead.service.middleware.tokens import Bucket, Rate, reserved, started
from bulkhead.service.pauses import soon
from bulkhead.service.task import name as checked_name

if TYPE_CHECKING:
    from bulkhead.service.app import App
    from bulkhead.service.batch import HeldJob

__all__ = ["RateLimit"]

R = TypeVar("R")

# A consumer may ask so late for a start that is free (seconds; at most this share of the period). Without `burst` as
# many as are due in that time may come at once, so that none is lost for good.
_LATE = 0.05
_LATE_SHARE = 0.05

# A worker may begin a job twice as late as that: so the pace is lower, for what begins late not to be too much.
_MARGIN = 2

# Bounds of a period (seconds). Below, clocks are no longer fine enough; above, instants no longer are.
_SHORTEST_PERIOD = 0.001
_LONGEST_PERIOD = 10 * 365 * 86400.0

# Who wants no job is asked again after at most so long (seconds); a start that is due before that is waited for.
_SHORT_WAIT = 0.05

# A job that has to wait asks again within so long (seconds).
_LONGEST_WAIT = 60.0

# It asks no later than so long behind the first one in line (seconds): those before it may be gone.
_LONGEST_LINE = 10.0

# As many keys have a line before the old ones are looked for (arbitrary).
_MANY = 1000


class RateLimit(Limit):
    """Let at most `n` jobs start in any period of `seconds`, over all consumers.

    Args:
        n: How many, at least 1.
        seconds: The period, a millisecond to ten years.
        burst: How many may start at once after a pause. By default those of a twentieth of a second, a tenth of `n` at
            most beyond the first, and the pace is slowed by as much and a tenth of a second, so that no period of this
            length, wherever it begins, sees more than `n`. With a value of your own the pace is `n` in a period
            exactly, and a period may see up to `n` + `burst` - 1.
        per: What is counted by itself: each "queue", each "task", "all", or what a function of the held job returns.
        queues: Jobs of these queues alone.
        tasks: Jobs of the tasks with these names alone.
        name: Tells several of these middlewares apart.

    Raises:
        ConfigError: A value cannot work.
    """

    def __init__(
        self,
        n: int,
        seconds: float = 1.0,
        *,
        burst: int | None = None,
        per: Per = "queue",
        queues: Iterable[str] | None = None,
        tasks: Iterable[str] | None = None,
        name: str = "default",
    ) -> None:
        super().__init__(per, queues, tasks)
        n = validate.whole_number("n", n, at_least=1, at_most=10_000_000)
        seconds = validate.seconds("seconds", seconds)
        if not _SHORTEST_PERIOD <= seconds <= _LONGEST_PERIOD:
            raise ConfigError(f"seconds must be {_SHORTEST_PERIOD} to {_LONGEST_PERIOD:.0f}, not {seconds!r}")
        if burst is None:
            late = min(_LATE, _LATE_SHARE * seconds)
            batch = 1 + min(n // 10, math.ceil(n * late / seconds))
            self.rate = Rate((seconds + _MARGIN * late) / (n - batch + 1), batch)
        else:
            self.rate = Rate(seconds / n, validate.whole_number("burst", burst, at_least=1, at_most=n))
        self.name = checked_name("name", name)
        self._prefix = f"rates/{key_part(name)}"
        # What is known only here: names of reservations, and before when no start of a key is free (monotonic).
        self._marks = itertools.count()
        self._me = secrets.token_hex(8)
        self._lock = threading.Lock()  # guards what follows; nothing is called under it
        self._held: dict[tuple[str, int], str] = {}
        self._not_before: dict[str, float] = {}
        self._turns: dict[str, float] = {}  # when the next one that has to wait should ask, monotonic
        self._shared = Shared(Bucket)

    def attach(self, app: App) -> None:
        """See `Middleware`."""
        self._app = app
        be_the_only_one(app, self, lambda one: one.name)

    def reserve(self, key: str, n: int) -> int:
        """See `Limit`."""
        if not self._wait_shortly(key):
            return 0
        mark = f"{self._me}-{os.getpid()}-{next(self._marks)}"

        def change(bucket: Bucket) -> tuple[Bucket | None, tuple[int, float]]:
            after, granted, wait = reserved(bucket, self.rate, mark, n, time.time())
            return after, (granted, wait)

        granted, wait = self._changed(key, change)
        with self._lock:
            if granted:
                self._held[key, threading.get_ident()] = mark
            else:
                # Why bounded: a wall clock that was set back must not keep the queue from asking for so long.
                self._not_before[key] = time.monotonic() + min(wait, _LONGEST_WAIT)
        return granted

    def use(self, key: str, n_reserved: int, jobs: Sequence[HeldJob]) -> Sequence[HeldJob]:
        """See `Limit`."""
        with self._lock:
            mark = self._held.pop((key, threading.get_ident()))
        n_started, _ = self._start(key, mark, len(jobs))
        return jobs[n_started:]

    def admit(self, key: str, jobs: Sequence[HeldJob], most: int) -> dict[HeldJob, float]:
        """See `Limit`."""
        n_started, wait = self._start(key, None, min(len(jobs), most))
        now = time.monotonic()
        with self._lock:
            turns = [self._next_turn(key, now, wait) for _ in jobs[n_started:]]
        return {
            held: min(turn - now, _LONGEST_WAIT) + soon() / 10
            for held, turn in zip(jobs[n_started:], turns, strict=True)
        }

    def _next_turn(self, key: str, now: float, wait: float) -> float:
        """Return when a job is to ask again: one after the other, so that not all do so for the same start."""
        first = now + wait
        turn = min(max(first, self._turns.get(key, 0.0)), first + _LONGEST_LINE)
        self._turns[key] = turn + self.rate.interval
        if len(self._turns) > _MANY:
            self._turns = {one: at for one, at in self._turns.items() if at > now}
        return turn

    def _start(self, key: str, mark: str | None, n: int) -> tuple[int, float]:
        def change(bucket: Bucket) -> tuple[Bucket | None, tuple[int, float]]:
            after, n_started, wait = started(bucket, self.rate, mark, n, time.time())
            return (None if after == bucket else after), (n_started, wait)

        return self._changed(key, change)

    def _changed(self, key: str, change: Callable[[Bucket], tuple[Bucket | None, R]]) -> R:
        keep = 2 * self.rate.interval * (self.rate.burst + 1) + 60.0
        return self._shared.change(self._app.backend.registry, f"{self._prefix}/{key}", keep, change)

    def _wait_shortly(self, key: str) -> bool:
        """Wait for a start that is known to be free soon; False if it takes longer than who asks should wait."""
        with self._lock:
            wait = self._not_before.get(key, 0.0) - time.monotonic()
        if wait > _SHORT_WAIT:
            return False
        if wait > 0:
            time.sleep(wait)
        with self._lock:
            self._not_before.pop(key, None)
        return True
