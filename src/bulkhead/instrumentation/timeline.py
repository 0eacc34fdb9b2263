"""The timeline of a run: which worker ran what when, how busy the pools were, how long jobs waited.

`Dispatcher.timeline` makes it from what the pools remember (engines/processes/chronicle.py). It is frozen data; here it
is summed up and written, as a page that needs nothing but a browser or as a trace that Perfetto opens.

Source: the trace event format, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any, Protocol

from bulkhead.instrumentation.files import write_whole
from bulkhead.outcomes import Outcome
from bulkhead.spans import BarrierMark, Span, TimelinePool, WorkerLife
from bulkhead.validate import shown

__all__ = ["PoolSummary", "Timeline", "Waits"]

_DATA = "/*DATA*/"

# Whoever reads the files may round a larger number (to a double), and one of too many digits cannot be written.
_MAX_NUMBER = 2**53

# The page shows so many failures and so many slowest jobs (arbitrary).
_MAX_LISTED = 200


class PastOf(Protocol):
    """What is asked of what a pool remembers."""

    @property
    def now(self) -> float: ...
    def spans(self, epoch: float, posix: float) -> list[Span]: ...
    def workers(self, epoch: float) -> list[WorkerLife]: ...
    def pool(self, epoch: float) -> TimelinePool: ...


@dataclass(frozen=True, slots=True)
class Waits:
    """How long attempts waited for a worker, in seconds."""

    p50: float
    p95: float
    max: float


@dataclass(frozen=True, slots=True)
class PoolSummary:
    """One pool of a timeline, summed up.

    Attributes:
        priority, name, n_workers: As of the `Pool`.
        attempts: How many are shown.
        outcomes: How many of them ended how.
        items: Items of maps among them.
        busy_seconds: Time that workers had jobs.
        utilisation: Share of the workers' time, from the first attempt to the last, in which they had jobs; 0 to 1.
        waits: How long attempts waited; None when there are none.
    """

    priority: int
    name: str
    n_workers: int
    attempts: int
    outcomes: dict[str, int]
    items: int
    busy_seconds: float
    utilisation: float
    waits: Waits | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """What ran where and when. All times are in seconds since `started_at`.

    Attributes:
        started_at: When the dispatcher was made, in UTC.
        seconds: How long ago that was when the timeline was made.
        pools: The most urgent first.
        spans: Attempts, by pool and then in the order of their end; those that still run come last.
        workers: The worker processes.
        barriers: In the order of their return.
    """

    started_at: datetime
    seconds: float
    pools: tuple[TimelinePool, ...]
    spans: tuple[Span, ...]
    workers: tuple[WorkerLife, ...]
    barriers: tuple[BarrierMark, ...]

    @classmethod
    def of(
        cls, pasts: Sequence[PastOf], barriers: Iterable[BarrierMark], epoch: float, posix: float
    ) -> Timeline:
        """Make it of what pools remember; `epoch` and `posix` are the start on both clocks."""
        ends = [life.gone for past in pasts for life in past.workers(epoch)]
        is_over = bool(ends) and None not in ends
        now = max(past.now for past in pasts) - epoch
        return cls(
            started_at=datetime.fromtimestamp(posix, UTC),
            # Why: when the workers are gone, what comes after is no part of the run.
            seconds=max((end for end in ends if end is not None), default=now) if is_over else now,
            pools=tuple(past.pool(epoch) for past in pasts),
            spans=tuple(span for past in pasts for span in past.spans(epoch, posix)),
            workers=tuple(life for past in pasts for life in past.workers(epoch)),
            barriers=tuple(barriers),
        )

    def summary(self) -> tuple[PoolSummary, ...]:
        """Return the figures of each pool, the most urgent first."""
        by_pool: dict[int, list[Span]] = {pool.priority: [] for pool in self.pools}
        for span in self.spans:
            by_pool[span.pool].append(span)
        return tuple(_summed_up(pool, by_pool[pool.priority]) for pool in self.pools)

    def save_html(self, path: str | os.PathLike[str], *, title: str = "bulkhead timeline") -> None:
        """Write a page that shows the timeline in any browser, without a network or another file.

        Args:
            path: Where to; an existing file is replaced when the new one is complete.
            title: The page's.
        """
        page = resources.files("bulkhead.instrumentation").joinpath("timeline.html").read_text("utf-8")
        before, _, after = page.partition(_DATA)
        # Why: "</script>" inside a string would end the script element.
        data = json.dumps(self._page_data(title), separators=(",", ":")).replace("<", "\\u003c")
        write_whole(path, before + data + after)

    def save_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write a trace in Chrome's trace event format, for https://ui.perfetto.dev or chrome://tracing.

        Each pool is a process of the trace and each of its slots a thread; barriers, crashes and starts of workers are
        instants.

        Args:
            path: Where to; an existing file is replaced when the new one is complete.
        """
        events = [*self._metadata(), *map(self._trace_span, self.spans), *self._instants()]
        trace = {
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": {"started_at": _rfc3339(self.started_at)},
        }
        write_whole(path, json.dumps(trace))

    # The page

    def _page_data(self, title: str) -> dict[str, Any]:
        texts = _Texts()
        order = {pool.priority: index for index, pool in enumerate(self.pools)}
        pids = {(life.pool, life.worker): life.pid for life in self.workers}
        spans = self.spans
        return {
            "title": title,
            "startedAt": _rfc3339(self.started_at),
            "seconds": self.seconds,
            "outcomes": Outcome.ALL,
            "pools": [
                _page_pool(pool, figures) for pool, figures in zip(self.pools, self.summary(), strict=True)
            ],
            # Why columns: a hundred thousand objects would take the browser seconds to read.
            "spans": {
                "pool": [order[span.pool] for span in spans],
                "slot": [span.slot for span in spans],
                "pid": [pids.get((span.pool, span.worker)) for span in spans],
                "job": [_job_name(span.job) for span in spans],
                "function": [texts.number(span.function) for span in spans],
                "attempt": [span.attempt for span in spans],
                "began": [round(span.began * 1e6) for span in spans],
                "took": [round(span.seconds * 1e6) for span in spans],
                "waited": [round(span.waited * 1e6) for span in spans],
                "outcome": [Outcome.ALL.index(span.outcome) for span in spans],
                "error": [0 if span.error is None else texts.number(span.error) for span in spans],
                "items": [span.items for span in spans],
                "failedItems": [span.failed_items for span in spans],
                "jobs": [span.jobs for span in spans],
                "busy": [round(span.busy_seconds * 1e6) for span in spans],
            },
            "texts": texts.all,
            "workers": [
                [
                    order[life.pool],
                    life.slot,
                    life.pid,
                    life.asked,
                    life.ready,
                    life.gone,
                    life.end,
                    life.is_crash,
                ]
                for life in self.workers
            ],
            "barriers": [
                [
                    None if mark.pool is None else order[mark.pool],
                    mark.began,
                    mark.ended,
                    mark.succeeded,
                    mark.failed,
                    mark.cancelled,
                ]
                for mark in self.barriers
            ],
            "maxListed": _MAX_LISTED,
        }

    # The trace

    def _metadata(self) -> list[dict[str, Any]]:
        events = []
        for rank, pool in enumerate(self.pools):
            # Why not the priority: Perfetto takes process 0 for the idle task, and no negative one.
            pid = rank + 1
            name = f"{pool.name} (priority {pool.priority})"
            events.append(_named("process_name", pid, 0, name=name))
            events.append(_named("process_sort_index", pid, 0, sort_index=rank))
            for slot in range(pool.n_workers):
                events.append(_named("thread_name", pid, slot + 1, name=f"worker slot {slot}"))
                events.append(_named("thread_sort_index", pid, slot + 1, sort_index=slot))
        return events

    def _trace_span(self, span: Span) -> dict[str, Any]:
        told = {
            "job": _job_name(span.job),
            "attempt": span.attempt,
            "outcome": span.outcome,
            "error": span.error,
            "worker_pid": span.pid,
            "waited_seconds": span.waited,
            "items": span.items,
            "failed_items": span.failed_items,
            "jobs": span.jobs if span.jobs > 1 else None,
        }
        return {
            "ph": "X",
            "name": span.function or "job",
            "cat": span.outcome,
            "pid": self._rank(span.pool) + 1,
            "tid": span.slot + 1,
            "ts": span.began * 1e6,
            "dur": span.seconds * 1e6,
            "args": {name: value for name, value in told.items() if value is not None},
        }

    def _instants(self) -> list[dict[str, Any]]:
        events = []
        for number, mark in enumerate(self.barriers, start=1):
            counts = {"succeeded": mark.succeeded, "failed": mark.failed, "cancelled": mark.cancelled}
            scope, pid = ("g", 1) if mark.pool is None else ("p", self._rank(mark.pool) + 1)
            name = f"barrier {number}"
            events.append(
                {"ph": "i", "s": scope, "name": name, "cat": "barrier", "pid": pid, "tid": 1}
                | {"ts": mark.ended * 1e6, "args": counts}
            )
        for life in self.workers:
            place = {
                "ph": "i",
                "s": "t",
                "cat": "worker",
                "pid": self._rank(life.pool) + 1,
                "tid": life.slot + 1,
            }
            if life.ready is not None:
                told = {"pid": life.pid, "seconds_to_start": life.ready - life.asked}
                events.append({**place, "name": "worker ready", "ts": life.ready * 1e6, "args": told})
            if life.gone is not None and life.end:
                name = "worker crashed" if life.is_crash else "worker ended"
                events.append({**place, "name": name, "ts": life.gone * 1e6, "args": {"how": life.end}})
        return events

    def _rank(self, priority: int) -> int:
        return next(rank for rank, pool in enumerate(self.pools) if pool.priority == priority)


class _Texts:
    """Numbers texts, each once; number 0 is the empty one."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {"": 0}

    def number(self, text: str) -> int:
        return self._numbers.setdefault(text, len(self._numbers))

    @property
    def all(self) -> list[str]:
        return list(self._numbers)


def _summed_up(pool: TimelinePool, spans: Sequence[Span]) -> PoolSummary:
    outcomes = dict.fromkeys(Outcome.ALL, 0)
    for span in spans:
        outcomes[span.outcome] += span.jobs
    busy = sum(span.busy_seconds for span in spans)
    elapsed = 0.0
    if spans:
        elapsed = max(span.ended for span in spans) - min(span.began for span in spans)
    return PoolSummary(
        priority=pool.priority,
        name=pool.name,
        n_workers=pool.n_workers,
        attempts=sum(span.jobs for span in spans),
        outcomes={outcome: number for outcome, number in outcomes.items() if number},
        items=sum(span.items or 0 for span in spans),
        busy_seconds=busy,
        # Why bounded: a worker's end and the next one's beginning are told at one instant, but rounded.
        utilisation=min(busy / (elapsed * pool.n_workers), 1.0) if elapsed > 0 else 0.0,
        waits=_waits(sorted(span.waited for span in spans)),
    )


def _waits(waited: Sequence[float]) -> Waits | None:
    if not waited:
        return None
    last = len(waited) - 1
    return Waits(waited[last // 2], waited[-(-last * 95 // 100)], waited[last])


def _page_pool(pool: TimelinePool, figures: PoolSummary) -> dict[str, Any]:
    waits = figures.waits
    return {
        "name": pool.name,
        "priority": pool.priority,
        "workers": pool.n_workers,
        "since": pool.since,
        "attempts": figures.attempts,
        "outcomes": figures.outcomes,
        "items": figures.items,
        "busy": figures.busy_seconds,
        "utilisation": figures.utilisation,
        "waits": None if waits is None else [waits.p50, waits.p95, waits.max],
    }


def _named(kind: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}


def _job_name(job: Any) -> int | str:
    if type(job) is str or (type(job) is int and abs(job) <= _MAX_NUMBER):
        return job
    return shown(job)


def _rfc3339(instant: datetime) -> str:
    return instant.isoformat().replace("+00:00", "Z")
