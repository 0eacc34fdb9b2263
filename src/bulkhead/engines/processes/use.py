"""What a worker has done and what it takes, for pools that replace workers after so many jobs or so much memory.

The worker counts and measures, because it knows when a job is over; the kernel decides. What was counted lies in the
worker's black box when the answer is sent, so it costs no message, and a pool without such limits nothing at all.
"""

from __future__ import annotations

import gc
import os
import time
from typing import NamedTuple

from bulkhead.engines.processes.blackbox import BlackBox
from bulkhead.engines.processes.memory import MIB, rss_of
from bulkhead.errors import ConfigError

__all__ = ["UseLimits", "WorkerUse", "mib"]

# How often memory is looked at between the items of a chunk (seconds).
_LOOK_EVERY = 0.001

# After garbage had to be collected, no look for this many times as long as that took.
_PAUSE = 20


class UseLimits(NamedTuple):
    """The limits of a pool that a worker has to know. Bytes are those of `memory.rss_of`."""

    max_jobs: int | None
    soft_bytes: int | None
    hard_bytes: int | None

    @property
    def max_bytes(self) -> int | None:
        """What a worker may keep when its job is over."""
        return self.hard_bytes if self.soft_bytes is None else self.soft_bytes


class WorkerUse:
    """What this worker has done. Owner: the worker's main thread.

    Args:
        limits: Of its pool.
        box: Where the caller reads it.

    Raises:
        ConfigError: The worker takes more than that before its first job; replacing it would help nobody.
    """

    def __init__(self, limits: UseLimits, box: BlackBox) -> None:
        self._max_jobs = limits.max_jobs
        self._max_bytes = limits.max_bytes
        self._box = box
        self._jobs = 0
        self._look_at = 0.0
        if self._max_bytes is not None and self._own_bytes() > self._max_bytes:
            name = "hard_memory_limit" if limits.soft_bytes is None else "max_memory_per_worker"
            raise ConfigError(
                f"{name}={self._max_bytes} ({mib(self._max_bytes)}) is less than a worker takes before its first job, "
                f"which is {mib(self._own_bytes())} with its imports and what the initializer has made"
            )

    def count(self, jobs: int) -> None:
        """Note that so many jobs are done."""
        self._jobs += jobs

    def report(self) -> None:
        """Write down what was done and is taken, before an answer is sent. A large one lies in shared memory by now."""
        taken = 0
        if self._max_bytes is not None:
            taken = self._own_bytes()
            if taken > self._max_bytes:
                gc.collect()
                taken = self._own_bytes()
        self._box.note_use(self._jobs, taken)

    @property
    def jobs_left(self) -> int | None:
        """How many more jobs this worker may do; None is without limit."""
        return None if self._max_jobs is None else max(self._max_jobs - self._jobs, 1)

    def is_heavy(self) -> bool:
        """Tell, between two items of a chunk, whether this worker takes too much to go on."""
        if self._max_bytes is None:
            return False
        now = time.perf_counter()
        if now < self._look_at:
            return False
        self._look_at = now + _LOOK_EVERY
        if self._own_bytes() <= self._max_bytes:
            return False
        gc.collect()
        end = time.perf_counter()
        self._look_at = end + _PAUSE * (end - now)
        return self._own_bytes() > self._max_bytes

    def _own_bytes(self) -> int:
        return rss_of(os.getpid())


def mib(n_bytes: int) -> str:
    """Return a number of bytes for people."""
    return f"{n_bytes / MIB:.1f} MiB"
