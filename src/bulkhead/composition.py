"""Jobs dispatched together: what the caller writes (`group`, `chain`), and the handles on what was dispatched.

    group([a, b, c])    side by side; the result is the list of their results
    chain([a, b, c])    one after the other, each fed the result of the one before; the result is the last one's

Both may hold one another. They say what is to be done and can be dispatched many times; `Dispatcher.dispatch` makes the
handle, a `GroupTracker` or a `ChainTracker`. A handle keeps nothing but the trackers of its jobs: whatever it answers
is worked out from theirs, so that it is the same however often it is asked for. How jobs follow one another is the
business of planning.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from typing import Any, NoReturn

from bulkhead import validate
from bulkhead._kernel.lifecycle import SETTLED, JobState
from bulkhead.errors import (
    ConfigError,
    ConfigTypeError,
    JobCancelled,
    JobsFailed,
    NestedDispatch,
    WaitTimeout,
)
from bulkhead.job import Composition, call_of
from bulkhead.tracker import JobStatus, Tracker
from bulkhead.validate import shown

__all__ = [
    "Chain",
    "ChainTracker",
    "Composite",
    "CompositeStatus",
    "Group",
    "GroupTracker",
    "Part",
    "chain",
    "error_of",
    "group",
    "leaves_of",
    "value_of",
]


class Group(Composition):
    """Jobs side by side; `group` makes it. Immutable."""

    __slots__ = ("parts",)

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.parts = parts

    def __repr__(self) -> str:
        return f"group([{', '.join(map(repr, self.parts))}])"


class Chain(Composition):
    """Jobs one after the other; `chain` makes it. Immutable."""

    __slots__ = ("parts",)

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.parts = parts

    def __repr__(self) -> str:
        return f"chain([{', '.join(map(repr, self.parts))}])"


def group(jobs: Iterable[Any]) -> Group:
    """Return jobs that are dispatched together and awaited together.

    Args:
        jobs: `Job` values, objects with `run()`, groups and chains; also none. One that is named twice runs twice.

    Raises:
        ConfigTypeError: Something is none of these.

    Example:
        >>> with Dispatcher([(0, 2)]) as disp:
        ...     disp.dispatch(group([Job(pow, 2, 5), Job(pow, 3, 2)])).result()
        [32, 9]
    """
    return Group(_parts_of("group", jobs))


def chain(jobs: Iterable[Any]) -> Chain:
    """Return jobs that run one after the other, each with the result of the one before as its first argument.

    None is a result like any other. An object with `run()` is run as `run(previous)`. A group gives each of its jobs
    the previous result and hands on the list of theirs. When a job fails or is cancelled, those after it are
    cancelled.

    Args:
        jobs: As of `group`, at least one.

    Raises:
        ConfigError: There is none.
        ConfigTypeError: Something is no job.

    Example:
        >>> with Dispatcher([(0, 2)]) as disp:
        ...     disp.dispatch(chain([Job(pow, 2, 5), Job(pow, 2)])).result()
        1024
    """
    parts = _parts_of("chain", jobs)
    if not parts:
        raise ConfigError("jobs of a chain must be at least one, not none")
    return Chain(parts)


def _parts_of(kind: str, jobs: Any) -> tuple[Any, ...]:
    if isinstance(jobs, (str, bytes, dict)) or not isinstance(jobs, Iterable):
        raise ConfigTypeError(
            f"jobs must be an iterable of jobs, as in {kind}([Job(f), Job(g)]), not {jobs!r} of type "
            f"{type(jobs).__name__}"
        )
    parts = tuple(jobs)
    for position, part in enumerate(parts):
        if not isinstance(part, Composition):
            try:
                call_of(part)
            except ConfigTypeError as error:
                raise ConfigTypeError(f"jobs[{position}] of a {kind}: {error}") from None
    return parts


@dataclass(frozen=True, slots=True)
class CompositeStatus:
    """A group or chain at one moment.

    Attributes:
        id: Of its parts, in order.
        state: Worked out from its jobs: once all have settled, failed if one has failed, else cancelled if one was
            cancelled, else succeeded. Before that: running once one has begun, else queued if one is, else scheduled.
        jobs: Of its parts, in order.
        queued_at, started_at: The first instant of any of its jobs.
        finished_at: The last one, once all have settled.
    """

    id: tuple[Any, ...]
    state: JobState
    jobs: tuple[JobStatus | CompositeStatus, ...]
    queued_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what is known in JSON's types, as `JobStatus.to_dict` does; a part's id is in its own dict."""
        times = {name: getattr(self, name) for name in ("queued_at", "started_at", "finished_at")}
        known = {name: at.isoformat().replace("+00:00", "Z") for name, at in times.items() if at is not None}
        return {"state": self.state.value, **known, "jobs": [job.to_dict() for job in self.jobs]}

    def to_json(self) -> str:
        """Return `to_dict()` as a JSON text."""
        return json.dumps(self.to_dict())


class Composite:
    """The caller's handle on a dispatched group or chain, with the methods of a `Tracker`.

    Concurrency: any thread of the process that made the dispatcher.

    Attributes:
        trackers: Of its parts, in order: trackers of jobs, and handles of the groups and chains inside it.
        leaves: The trackers of all its jobs, in order.
    """

    __slots__ = ("__weakref__", "leaves", "trackers")

    def __init__(self, trackers: Iterable[Part]) -> None:
        self.trackers: tuple[Part, ...] = tuple(trackers)
        self.leaves: tuple[Tracker, ...] = tuple(leaf for part in self.trackers for leaf in leaves_of(part))

    @property
    def id(self) -> tuple[Any, ...]:
        """The ids of its parts, in order. The jobs can be found by theirs."""
        return tuple(part.id for part in self.trackers)

    def status(self) -> CompositeStatus:
        """Return a frozen picture of all its jobs."""
        jobs = tuple(part.status() for part in self.trackers)
        state = _state_of([job.state for job in jobs])
        ends = [job.finished_at for job in jobs if job.finished_at is not None]
        return CompositeStatus(
            self.id,
            state,
            jobs,
            min((job.queued_at for job in jobs if job.queued_at is not None), default=None),
            min((job.started_at for job in jobs if job.started_at is not None), default=None),
            max(ends, default=None) if state in SETTLED else None,
        )

    def done(self) -> bool:
        """Tell whether all its jobs have settled."""
        return all(leaf.state in SETTLED for leaf in self.leaves)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all its jobs have settled, at most `timeout` seconds; tell whether they have."""
        if timeout is None:
            return all(leaf.wait() for leaf in self.leaves)
        deadline = time.monotonic() + validate.seconds("timeout", timeout, zero=True)
        return all(leaf.wait(max(deadline - time.monotonic(), 0)) for leaf in self.leaves)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for all its jobs and return the list of their results (group) or the last result (chain).

        Raises:
            WaitTimeout: They have not settled within `timeout` seconds; they go on.
            JobsFailed: Jobs of a group failed: an ExceptionGroup with their ids.
            JobCancelled: None failed, but some were cancelled.
            Exception: What a job of a chain failed with.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return value_of(self)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for all its jobs and return what `result` would raise, or None.

        Raises:
            WaitTimeout: They have not settled within `timeout` seconds; they go on.
        """
        if not self.wait(timeout):
            raise WaitTimeout(f"{self!r} has not settled within {timeout} s")
        return error_of(self)

    def cancel(self) -> bool:
        """Cancel those of its jobs that have not settled; False when there is none, or none could be."""
        # Why from the end: of a chain, so that no job follows the one that is cancelled.
        return any([leaf.cancel() for leaf in reversed(self.leaves) if leaf.state not in SETTLED])

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Have `fn(handle)` called once in this process when all its jobs have settled, at once if they have.

        It runs where the callbacks of the job that settles last run; see `Tracker.add_done_callback`.
        """
        validate.function("fn", fn)
        if not self.leaves:
            fn(self)
            return
        # Why a count object: its step is atomic, and the jobs may be those of several pools.
        ended, number = count(1), len(self.leaves)

        def one_has_ended(_: Tracker) -> None:
            if next(ended) == number:
                fn(self)

        for leaf in self.leaves:
            leaf.add_done_callback(one_has_ended)

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait in asyncio and give what `result()` gives. Cancelling the wait leaves the jobs alone."""
        for leaf in self.leaves:
            yield from leaf.settling()
        return self.result(0)

    def __reduce__(self) -> NoReturn:
        raise NestedDispatch(
            f"a {type(self).__name__} cannot be sent to another process; send the result of its jobs instead"
        )

    def __repr__(self) -> str:
        state = _state_of([leaf.state or JobState.QUEUED for leaf in self.leaves])
        return f"<{type(self).__name__} of {len(self.trackers)}, {state}>"


class GroupTracker(Composite):
    """The caller's handle on a dispatched group. Its result is the list of the results of its parts."""

    __slots__ = ()


class ChainTracker(Composite):
    """The caller's handle on a dispatched chain. Its result is that of its last part."""

    __slots__ = ()


Part = Tracker | GroupTracker | ChainTracker


def leaves_of(part: Any) -> tuple[Tracker, ...]:
    """Return the jobs of a part, in order."""
    return (part,) if isinstance(part, Tracker) else part.leaves


def value_of(part: Any) -> Any:
    """Return the result of a part that has succeeded."""
    if isinstance(part, GroupTracker):
        return [value_of(one) for one in part.trackers]
    return value_of(part.trackers[-1]) if isinstance(part, ChainTracker) else part.value


def error_of(part: Any) -> BaseException | None:
    """Return what a settled part has failed with, JobCancelled if it was cancelled, None if it has succeeded."""
    if isinstance(part, Tracker):
        return part.error
    state = _state_of([leaf.state for leaf in part.leaves])
    if state is JobState.SUCCEEDED:
        return None
    if isinstance(part, ChainTracker):
        guilty = next(
            one for one in part.trackers if _state_of([leaf.state for leaf in leaves_of(one)]) is state
        )
        return error_of(guilty)
    ids = [leaf.id for leaf in part.leaves if leaf.state is state]
    named = ", ".join(map(shown, ids[:10])) + (", …" if len(ids) > 10 else "")
    if state is JobState.CANCELLED:
        return JobCancelled(f"{len(ids)} jobs of the group were cancelled: {named}")
    errors: list[Any] = [leaf.error for leaf in part.leaves if leaf.state is state]
    return JobsFailed(
        f"{len(ids)} jobs of the group failed: {named}", errors, job_ids=tuple(ids), total=len(ids)
    )


def _state_of(states: Iterable[JobState | None]) -> JobState:
    """Return the state of the whole, from those of its jobs; of no jobs: they have succeeded."""
    found = set(states)
    if found <= SETTLED:
        order = (JobState.FAILED, JobState.CANCELLED)
        return next((state for state in order if state in found), JobState.SUCCEEDED)
    if not found <= {JobState.QUEUED, JobState.SCHEDULED}:
        return JobState.RUNNING
    return JobState.QUEUED if JobState.QUEUED in found else JobState.SCHEDULED
