"""What is remembered of a run: attempts, worker lives and barriers. Frozen values; times in seconds since its start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["BarrierMark", "Span", "TimelinePool", "WorkerLife"]


@dataclass(frozen=True, slots=True)
class Span:
    """One attempt of a job, or one sending of a map's chunk, or several short attempts.

    Attempts below 2 ms that one worker makes of one function within 20 ms, and that succeed, are one span.

    Attributes:
        pool: Priority of the pool.
        slot: Which of the pool's slots, from 0.
        worker: Number of the process in the pool, from 1; `pid` may come again, this does not.
        job: The job's id.
        function: Name of what was called; the class's for an object with `run()`.
        attempt: From 1.
        began, ended: When it was sent to the worker, and when its answer was known here.
        waited: Seconds that it was accepted, due and without a worker.
        outcome: One of `Outcome.ALL`.
        error: What it failed with, in short.
        items: Of a chunk: how many items it has done.
        failed_items: Of a chunk: how many of them failed.
        jobs: How many attempts it stands for; `job`, `waited` and so on are the first one's.
        busy_seconds: How long these took, without the pauses between them.
    """

    pool: int
    slot: int
    worker: int
    pid: int | None
    job: Any
    function: str
    attempt: int
    began: float
    ended: float
    waited: float
    outcome: str
    error: str | None = None
    items: int | None = None
    failed_items: int | None = None
    jobs: int = 1
    busy_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """From its begin to its end."""
        return self.ended - self.began


@dataclass(frozen=True, slots=True)
class WorkerLife:
    """One worker process.

    Attributes:
        pool, slot, worker, pid: As of a `Span`.
        asked: When it was asked for.
        ready: When it had come up; None if it has not.
        gone: When it had ended; None while it lives.
        end: How it ended, where that says something: "ended by SIGKILL".
        is_crash: It ended by itself or by somebody else's hand, not by the pool's.
    """

    pool: int
    slot: int
    worker: int
    pid: int | None
    asked: float
    ready: float | None = None
    gone: float | None = None
    end: str = ""
    is_crash: bool = False


@dataclass(frozen=True, slots=True)
class BarrierMark:
    """A barrier that returned: the end of a phase.

    Attributes:
        pool: Priority of the pool that was waited for; None for all.
        began, ended: When it was called and when it returned.
        succeeded, failed, cancelled: Jobs of the phase.
    """

    pool: int | None
    began: float
    ended: float
    succeeded: int
    failed: int
    cancelled: int


@dataclass(frozen=True, slots=True)
class TimelinePool:
    """A pool of the timeline.

    Attributes:
        priority, name, n_workers: As of the `Pool`.
        since: From when on its attempts are remembered: above 0 when there were more than `max_timeline`.
    """

    priority: int
    name: str
    n_workers: int
    since: float
