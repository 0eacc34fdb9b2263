"""What one pool remembers of its past: the last attempts and the last workers, for `Dispatcher.timeline`.

It is always on, so it has to cost next to nothing on the way of a job, and of memory. An attempt is a tuple of values
that exist already, in a deque that drops the oldest. Everything else (texts, waiting times) is worked out when somebody
asks. The tuples hold numbers and strings alone, but for ids that the user gave: no tracker, result, argument or error.

Attempts that are too short to be seen are gathered: those shorter than `SHORT` that one worker makes of one function
within `_GATHER` seconds are remembered as one, which knows how many they were. So a job that does nothing costs here
some comparisons, and a million of them take the place of some thousands. `answers.tell` does that for each but the
first of them.

Owner: the pool's lock, for all of this; what `copy` returns belongs to the caller.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from bulkhead._kernel.lifecycle import JobState
from bulkhead._kernel.records import JobRecord, Slot, Verdict
from bulkhead.chunk import Chunk
from bulkhead.config import Pool
from bulkhead.engines.processes.worker import Worker
from bulkhead.errors import JobTimeout, WorkerCrashed, is_of, type_name_of
from bulkhead.outcomes import Outcome
from bulkhead.validate import shown

if TYPE_CHECKING:
    from bulkhead.spans import Span, TimelinePool, WorkerLife

__all__ = ["SHORT", "Chronicle", "Page", "noted"]

# How many characters of an error's text are kept (arbitrary).
_ERROR_LENGTH = 300

# Attempts below so many seconds are gathered, within so many seconds. Of a minute on a screen that is half a pixel.
SHORT = 0.002
_GATHER = 0.02

# How many worker lives are remembered (arbitrary: about 2 MB; a pool with more has other troubles).
_MAX_LIVES = 10_000


_VERDICTS = {
    Verdict.CANCEL: "ended: its job was cancelled",
    Verdict.TIMEOUT: "ended: its job timed out",
    Verdict.MEMORY: "ended: its job took too much memory",
}


class Note(NamedTuple):
    """What is not plain about an attempt; a first attempt that succeeded at once has none."""

    attempt: int
    due: float | None  # earliest start, monotonic seconds
    outcome: str
    error: str | None
    items: int | None
    failed_items: int | None
    jobs: int = 1  # how many it stands for
    busy: float | None = None  # the seconds of all of these, without the pauses between them


# Number of the worker, job id, function, sent and answered (monotonic), queued (POSIX), and the fields of a note if
# there is one. Why one flat tuple: the garbage collector lets go of it, while it would look at one in another again
# and again.
Attempt = tuple[Any, ...]


class Page(NamedTuple):
    """A copy of a chronicle as of `now`."""

    config: Pool
    attempts: list[Attempt]
    is_cut: bool
    running: list[Attempt]
    lives: list[_Life]
    now: float

    def spans(self, epoch: float, posix: float) -> list[Span]:
        """Return the attempts; `epoch` is time 0 in monotonic seconds, `posix` the same instant in POSIX seconds."""
        lives = {life.number: life for life in self.lives}
        to_posix = posix - epoch
        return [
            _span(self.config.priority, lives.get(one[0]), one, epoch, to_posix)
            for one in [*self.attempts, *self.running]
        ]

    def workers(self, epoch: float) -> list[WorkerLife]:
        """Return the lives of the workers."""
        return [life.as_value(self.config.priority, epoch) for life in self.lives]

    def pool(self, epoch: float) -> TimelinePool:
        """Return what the timeline says of the pool."""
        from bulkhead.spans import TimelinePool

        # Why of the first that ended: those were dropped which ended before it.
        since = max(self.attempts[0][4] - epoch, 0.0) if self.is_cut and self.attempts else 0.0
        return TimelinePool(self.config.priority, self.config.label, self.config.n_workers, since)


class _Life:
    """A worker process, from when it is asked for."""

    __slots__ = ("asked", "end", "gone", "is_crash", "number", "pid", "ready", "slot")

    def __init__(self, number: int, slot: int, asked: float) -> None:
        self.number = number
        self.slot = slot
        self.asked = asked
        self.pid: int | None = None
        self.ready: float | None = None
        self.gone: float | None = None
        self.end = ""
        self.is_crash = False

    def as_value(self, priority: int, epoch: float) -> WorkerLife:
        from bulkhead.spans import WorkerLife

        ready = None if self.ready is None else self.ready - epoch
        gone = None if self.gone is None else self.gone - epoch
        return WorkerLife(
            priority,
            self.slot,
            self.number,
            self.pid,
            self.asked - epoch,
            ready,
            gone,
            self.end,
            self.is_crash,
        )

    def copy(self) -> _Life:
        copied = _Life(self.number, self.slot, self.asked)
        copied.pid, copied.ready, copied.gone = self.pid, self.ready, self.gone
        copied.end, copied.is_crash = self.end, self.is_crash
        return copied


class Chronicle:
    """Remembers the last attempts and workers of one pool.

    Args:
        limit: How many attempts are remembered.

    """

    def __init__(self, limit: int) -> None:
        self._attempts: deque[Attempt] = deque(maxlen=min(limit, sys.maxsize))
        self._lives: dict[int, _Life] = {}

    def asked(self, worker: Worker, now: float) -> None:
        """A worker has been asked for; from now on it records its attempts."""
        worker.record = self.record
        self._lives[worker.number] = _Life(worker.number, worker.slot.index, now)
        if len(self._lives) > _MAX_LIVES:
            del self._lives[next(iter(self._lives))]

    def record(self, worker: Worker, job: JobRecord, note: Note | None, now: float) -> None:
        """Remember an attempt that the worker has answered, which is counted there already."""
        began = worker.began
        self.close(worker, worker.jobs - 1, worker.busy_seconds - (now - began))
        attempt = _attempt(worker, job, note, now)
        if note is not None or now - began >= SHORT:
            self._attempts.append(attempt)
            return
        worker.gathered = attempt, worker.jobs - 1, worker.busy_seconds - (now - began)
        worker.gathers, worker.gather_until, worker.ended = job.function, began + _GATHER, now

    def close(self, worker: Worker, jobs: int, busy: float) -> None:
        """Remember what was gathered of the worker up to its so manieth attempt, after so many busy seconds."""
        if worker.gathered is not None:
            self._attempts.append(_together(worker, jobs, busy))
            worker.gathered = None
            worker.gather_until = 0.0

    def lost(
        self, worker: Worker, job: JobRecord, due: float | None, error: BaseException, now: float
    ) -> None:
        """A worker is gone, and the kernel knows what that means for the job it had, which was due at `due`."""
        self._attempts.append(_attempt(worker, job, noted(job, due, error), now))

    def gone(self, worker: Worker, verdict: Verdict | None, error: BaseException | None, now: float) -> None:
        """A worker is gone; `error` says how if neither the pool wanted that nor the verdict does."""
        self.close(worker, worker.jobs, worker.busy_seconds)
        life = self._lives.get(worker.number)
        if life is None or life.gone is not None:
            return
        life.pid, life.ready, life.gone = worker.pid, worker.came_up, now
        if verdict is not None:
            life.end = _VERDICTS[verdict]
        elif worker.is_leaving:
            life.end = "recycled"
        elif error is not None:
            life.end, life.is_crash = _in_short(error), True

    def copy(
        self, config: Pool, slots: list[Slot], workers: Iterable[Worker], n_ended: int, now: float
    ) -> Page:
        """Return what is remembered, with what runs.

        Args:
            config: The pool.
            slots: Its slots.
            workers: Those that it has.
            n_ended: How many attempts have ended so far.
            now: Monotonic seconds.
        """
        open_ones: list[Attempt] = []
        for worker in workers:
            if worker.gathered is not None and self._attempts.maxlen:
                open_ones.append(_together(worker, worker.jobs, worker.busy_seconds))
            life = self._lives.get(worker.number)
            if life is not None:
                life.pid, life.ready = worker.pid, worker.came_up
        running = [
            _running(slot.worker, slot.job, now) for slot in slots if slot.job is not None and slot.worker
        ]
        is_cut = len(self._attempts) == self._attempts.maxlen and n_ended > 0
        return Page(
            config,
            [*self._attempts, *open_ones],
            is_cut,
            running,
            [life.copy() for life in self._lives.values()],
            now,
        )


def noted(job: JobRecord, due: float | None, error: BaseException | None) -> Note:
    """Return the note on an attempt that has just ended, when the kernel knows what that means for the job.

    Args:
        job: The job; of a map's chunk the items of its last sending are counted.
        due: Earliest start of the attempt. Why not the job's: that may be the next attempt's already.
        error: What the attempt failed with.
    """
    items = failed = None
    outcome = _outcome(job, error)
    if isinstance(job, Chunk):
        items, failed, first = job.last_sending
        error = first if error is None else error
        if failed and outcome == Outcome.SUCCEEDED:
            outcome = Outcome.FAILED
    text = None
    if error is not None and outcome not in (Outcome.SUCCEEDED, Outcome.CANCELLED):
        text = _in_short(error)
    return Note(_attempt_of(job), due, outcome, text, items, failed)


def _outcome(job: JobRecord, error: BaseException | None) -> str:
    if job.state is JobState.CANCELLED:
        return Outcome.CANCELLED
    if job.state is JobState.RETRYING:
        return Outcome.RETRIED
    if error is None:
        return Outcome.SUCCEEDED
    if is_of(error, JobTimeout):
        return Outcome.TIMED_OUT
    return Outcome.CRASHED if is_of(error, WorkerCrashed) else Outcome.FAILED


def _in_short(error: BaseException) -> str:
    # Why neither str() nor the attribute: they may run the user's code, and this is under the lock.
    name = type_name_of(error)
    args: tuple[Any, ...] = vars(BaseException)["args"].__get__(error)
    first = args[0] if args else ""
    if type(first) is not str:
        first = shown(first) if type(first) in (int, float) else ""
    text = first.partition("\n")[0]
    return f"{name}: {text}"[:_ERROR_LENGTH] if text else name


def _attempt(worker: Worker, job: JobRecord, note: Note | None, now: float) -> Attempt:
    return worker.number, job.id, job.function, worker.began, now, job.queued_at, *(note or ())


def _together(worker: Worker, jobs: int, busy: float) -> Attempt:
    first, jobs_before, busy_before = worker.gathered
    n = jobs - jobs_before
    if n == 1:
        return first  # type: ignore[no-any-return]
    note = Note(1, None, Outcome.SUCCEEDED, None, None, None, n, busy - busy_before)
    return (*first[:4], worker.ended, first[5], *note)


def _attempt_of(job: JobRecord) -> int:
    # Why: the rest of a chunk has been given back, and its next sending counts as the same attempt.
    return max(job.attempt, 1)


def _running(worker: Worker, job: JobRecord, now: float) -> Attempt:
    items = len(job.todo) if isinstance(job, Chunk) else None
    note = Note(_attempt_of(job), job.due, Outcome.RUNNING, None, items, None)
    return _attempt(worker, job, note, now)


def _span(priority: int, life: _Life | None, attempt: Attempt, epoch: float, to_posix: float) -> Span:
    from bulkhead.spans import Span

    number, job, function, began, ended, queued, *rest = attempt
    note = Note(*rest) if rest else Note(1, None, Outcome.SUCCEEDED, None, None, None)
    ready = began
    if queued is not None and note.attempt == 1:
        ready = queued - to_posix
    if note.due is not None:
        ready = max(note.due, ready) if note.attempt == 1 else note.due
    return Span(
        priority,
        -1 if life is None else life.slot,
        number,
        None if life is None else life.pid,
        job,
        function,
        note.attempt,
        began - epoch,
        ended - epoch,
        max(began - ready, 0.0),
        note.outcome,
        note.error,
        note.items,
        note.failed_items,
        note.jobs,
        ended - began if note.busy is None else note.busy,
    )
