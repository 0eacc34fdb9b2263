"""Schedules: jobs that come again and again. What is kept of them, who may change it, and who enqueues their runs.

    app.schedule(...)      declares one: nothing is connected; a worker that starts keeps what its code declares
    app.add_schedule(...)  keeps one now, from any process
                  │
                  ▼
    registry  "schedules/<name>": when, what, next_due     any worker's timer thread: read, enqueue what is due, advance

There is no leader. Every worker's timer reads the same entries and does the same with them:

1. it reads an entry (version v, next_due d) and finds by its clock that d has come;
2. it enqueues a job with the id `schedule:<name>:<d>`, not before d by the server's clock;
3. it puts the entry with the next instant, if the version still is v.

Why no run is doubled, none is lost, whoever dies where:

- Two timers do 2 at once: the broker takes an id once.
- One dies between 2 and 3: another does 2, is refused, does 3.
- One is stopped between 1 and 2 and goes on much later: it looks at the clock before 2 and reads anew after a minute.
  Stopped behind that look, it is refused: an id stays taken for a day after its job has settled.
- A schedule is paused, changed or cancelled between 1 and 3: the version is another one, so 3 changes nothing. A run
  that was due before may still come; none that is due later does.
- A clock that is fast enqueues early, and the server keeps the job until it is due. One that is slow is late. A clock
  that is ahead by more than a period counts runs as missed which others would have enqueued in time: machines are
  expected to agree to within a second, as they do with NTP.

A run's failure is its job's own affair. Runs that are not enqueued in time: see `timing.decide`.
"""

from __future__ import annotations

import functools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from bulkhead.backends.base import Entry
from bulkhead.errors import BadMessage, BrokerUnavailable, ConfigError, ConfigTypeError, ScheduleNotFound
from bulkhead.service.dead_letters import DeadLetters
from bulkhead.service.envelope import Envelope, Follow, decoded
from bulkhead.service.middleware.base import Submission
from bulkhead.service.task import Call, name
from bulkhead.service.timing import MISSED, Decision, Missed, Timing, decide, timing, zone_name
from bulkhead.validate import shown

if TYPE_CHECKING:
    from bulkhead.service.app import App

__all__ = ["Schedule", "Schedules", "Timer", "run_id"]

_log = logging.getLogger("bulkhead")

_PREFIX = "schedules/"

# A run's id is made of the name, and ids have up to 200 characters.
_LONGEST_NAME = 150

# Another process may have changed something: a timer looks at least so often (seconds).
_LOOK_EVERY = 1.0

# Timers of several workers wake up to so long after a due time (seconds), so that mostly one of them does all the work.
_SPREAD = 0.05

# What was read longer ago than this (seconds) is read anew before anything is enqueued by it.
_STALE = 60.0

# The last instant (POSIX milliseconds) that a schedule may come to: in the year 9000, in any time zone a datetime.
_LAST_INSTANT = 221_845_392_000_000

# So many errors are remembered, so that none is logged each second (arbitrary).
_MOST_COMPLAINTS = 10_000

# Pauses while the broker is out of reach (seconds).
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0

# So long the end of a timer is waited for (seconds): a call to a server that is out of reach takes some.
_END_WAIT = 10.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule at one moment. Times are aware datetimes in UTC.

    Attributes:
        name: Its name.
        when: Cron fields, a nickname or "@every" with a duration.
        tz: The time zone in which cron fields are meant.
        task, queue: Of its jobs.
        missed: What becomes of runs that could not be enqueued in time.
        next_due: When it is due next; of a paused one, when it would be.
        last_due: When the last run that was enqueued was due, or None.
        is_paused: It enqueues nothing until it is resumed.
    """

    name: str
    when: str
    tz: str
    task: str
    queue: str
    missed: Missed
    next_due: datetime
    last_due: datetime | None
    is_paused: bool

    @property
    def last_job_id(self) -> str | None:
        """The id of the last run's job, or None."""
        return None if self.last_due is None else run_id(self.name, round(self.last_due.timestamp() * 1000))


def run_id(schedule: str, due: int) -> str:
    """Return the id of the job that is a schedule's run, due at these POSIX milliseconds."""
    return f"schedule:{schedule}:{due}"


class _Kept(msgspec.Struct, array_like=True, frozen=True):
    """A schedule in the registry; instants are POSIX milliseconds. `body` is the job, sealed as a message is."""

    when: str
    tz: str
    missed: Missed
    task: str
    queue: str
    priority: int
    body: bytes
    is_declared: bool
    anchor: int = 0
    next_due: int = 0
    last_due: int | None = None
    is_paused: bool = False

    def timing(self) -> Timing:
        return _timing(self.when, self.tz, self.anchor)

    def has_definition_of(self, other: _Kept) -> bool:
        return self._definition() == other._definition()

    def _definition(self) -> tuple[Any, ...]:
        return (
            *(self.when, self.tz, self.missed, self.task, self.queue),
            *(self.priority, self.body, self.is_declared),
        )

    def begun(self, now: int) -> _Kept:
        """Return it as new at this moment."""
        made = msgspec.structs.replace(self, anchor=now)
        return msgspec.structs.replace(made, next_due=made.timing().after(now))

    def instead_of(self, old: _Kept, now: int) -> _Kept:
        """Return it in the place of an older definition: what stays the same goes on."""
        if (self.when, self.tz) == (old.when, old.tz):
            made = msgspec.structs.replace(self, anchor=old.anchor, next_due=old.next_due)
        else:
            made = self.begun(now)
        return msgspec.structs.replace(made, last_due=old.last_due, is_paused=old.is_paused)


_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(_Kept).decode
_timing = functools.lru_cache(maxsize=1024)(timing)


class Schedules:
    """An application's schedules: those that its code declares, and the kept ones."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._declared: dict[str, _Kept] = {}
        self._complain = _Complaints()

    def declare(self, schedule: str, when: str, call: Call, tz: Any, missed: Missed) -> None:
        """Take note of a schedule, which is kept when a worker starts, or by `put_declared`."""
        made = self._defined(schedule, when, call, tz, missed, is_declared=True)
        known = self._declared.get(schedule)
        if known is not None and not known.has_definition_of(made):
            raise ConfigError(f"there is a schedule {schedule!r} already, and it is another one")
        self._declared[schedule] = made

    def add(self, schedule: str, when: str, call: Call, tz: Any, missed: Missed) -> None:
        """Keep a schedule now."""
        self._put(schedule, self._defined(schedule, when, call, tz, missed, is_declared=False))

    def put_declared(self) -> None:
        """Keep what is declared."""
        for schedule, made in list(self._declared.items()):
            self._put(schedule, made)
        for entry in self._entries() if self._declared else []:
            kept = _read(entry)
            gone = _name_of(entry)
            if kept is not None and kept.is_declared and gone not in self._declared:
                _log.info(
                    "schedule %r was declared in code, is not declared here, and goes on; "
                    "cancel_schedule(%r) would end it",
                    gone,
                    gone,
                )

    def all(self) -> list[Schedule]:
        """Return the kept schedules, by name."""
        known = _readable(self._entries(), self._complain)
        return sorted((_told(_name_of(entry), kept) for entry, kept in known), key=lambda one: one.name)

    def pause(self, schedule: str) -> None:
        """Let it enqueue nothing until `resume`."""
        self._change(schedule, lambda kept: msgspec.structs.replace(kept, is_paused=True))

    def resume(self, schedule: str) -> None:
        """Let it go on with the first instant from now on; what it would have enqueued meanwhile is not missed."""

        def resumed(kept: _Kept) -> _Kept:
            if not kept.is_paused:
                return kept
            due = max(kept.next_due, kept.timing().after(_now()))
            return msgspec.structs.replace(kept, is_paused=False, next_due=due)

        self._change(schedule, resumed)

    def cancel(self, schedule: str) -> None:
        """Forget it."""
        if not self._app.backend.registry.delete(_PREFIX + name("name", schedule)):
            raise _unknown(schedule)

    def _defined(
        self, schedule: str, when: str, call: Call, tz: Any, missed: Missed, *, is_declared: bool
    ) -> _Kept:
        schedule = name("name", schedule)
        if len(schedule) > _LONGEST_NAME:
            raise ConfigError(f"name must have up to {_LONGEST_NAME} characters, not {len(schedule)}")
        if missed not in MISSED:
            raise ConfigError(f"missed must be one of {', '.join(MISSED)}, not {shown(missed)}")
        zone = zone_name(tz)
        timing(when, zone, _now())
        _check_call(call)
        one = self._app.submitting.submission(call)
        priority = call.task.options.priority if call.priority is None else call.priority
        # Why other ids: those of jobs that follow are random ones, and this is compared with what is kept.
        body = self._app.sealer.seal(_PREFIX + schedule, one.queue, _with_ids(one.envelope, ""))
        return _Kept(when, zone, missed, call.task.name, one.queue, priority, body, is_declared)

    def _put(self, schedule: str, made: _Kept) -> None:
        registry, key = self._app.backend.registry, _PREFIX + schedule
        while True:
            entry = registry.get(key)
            old = None if entry is None else _read(entry)
            if old is not None and old.has_definition_of(made):
                return
            now = _now()
            new = made.begun(now) if old is None else made.instead_of(old, now)
            # Race: a timer or another worker that starts was faster. What it has put is looked at anew.
            if registry.put(key, _pack(new), expected=0 if entry is None else entry.version) is not None:
                return

    def _change(self, schedule: str, change: Callable[[_Kept], _Kept]) -> None:
        registry, key = self._app.backend.registry, _PREFIX + name("name", schedule)
        while True:
            entry = registry.get(key)
            kept = None if entry is None else _read(entry)
            if entry is None or kept is None:
                raise _unknown(schedule)
            if registry.put(key, _pack(change(kept)), expected=entry.version) is not None:
                return

    def _entries(self) -> list[Entry]:
        return self._app.backend.registry.entries(_PREFIX)


@dataclass(frozen=True, slots=True)
class _Due:
    """A schedule of which runs are due."""

    name: str
    version: int
    kept: _Kept
    decision: Decision


class Timer:
    """Enqueues what is due. A thread of its own, so that no other work of a worker waits for it, nor it for any.

    Args:
        app: The application; of schedules whose task it does not have it lets others take care.
        thread: Makes a thread whose end by an exception is the consumer's end.
        clock: Gives POSIX seconds.
    """

    def __init__(
        self,
        app: App,
        thread: Callable[[str, Callable[[], None]], threading.Thread],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._app = app
        self._clock = clock
        self._is_over = threading.Event()
        self._complain = _Complaints()
        self._dead_letters = DeadLetters(app)
        self._thread = thread("timer", self._run)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def end(self) -> None:
        """End it. Blocking: until a call to the server that is under way is over, some seconds at most."""
        self._is_over.set()
        if self._thread.ident is not None:
            self._thread.join(_END_WAIT)

    def tick(self) -> float:
        """Enqueue what is due now; return after how many seconds to look again.

        Raises:
            BrokerUnavailable: Some of it may be enqueued.
        """
        read_at = self._clock()
        entries = self._app.backend.registry.entries(_PREFIX)
        now = int(self._clock() * 1000)
        due = []
        next_dues = []
        for entry, kept in _readable(entries, self._complain):
            decision = self._decision(entry, kept, now)
            if decision is None:
                continue
            next_dues.append(decision.next_due)
            if kept.next_due <= now:
                due.append(_Due(_name_of(entry), entry.version, kept, decision))
        if due:
            self._carry_out(due, read_at)
        left = min(next_dues, default=float("inf")) / 1000 - self._clock()
        return _LOOK_EVERY if left > _LOOK_EVERY else max(left, 0.0) + random.uniform(0.0, _SPREAD)

    def _run(self) -> None:
        wait, pause = 0.0, _FIRST_PAUSE
        while not self._is_over.wait(wait):
            try:
                wait, pause = self.tick(), _FIRST_PAUSE
                self._dead_letters.look_now_and_then()
                continue
            except BrokerUnavailable as error:
                _log.warning("schedules: %s; trying again in %g s", error, pause)
            except Exception:
                _log.exception("schedules: trying again in %g s", pause)
            wait, pause = pause, min(2 * pause, _LONGEST_PAUSE)

    def _decision(self, entry: Entry, kept: _Kept, now: int) -> Decision | None:
        """Return what follows from an entry, if this worker can do something about it now."""
        if kept.is_paused or kept.task not in self._app.tasks():
            return None
        try:
            made = decide(kept.timing(), kept.next_due, kept.missed, now)
            if kept.next_due <= self._clock() * 1000:
                self._app.sealer.open(entry.key, kept.queue, kept.body)
        except (ConfigError, BadMessage) as error:
            # A time zone that this machine does not have, or the key of other workers: theirs are the runs, too.
            self._complain(entry, f"is left to other workers: {error}")
            return None
        return made

    def _carry_out(self, due: list[_Due], read_at: float) -> None:
        runs = [(one, at) for one in due for at in one.decision.runs]
        # Race: we may have been stopped since the entries were read, for longer than the ids of runs stay taken.
        if abs(self._clock() - read_at) > _STALE:
            return
        self._enqueue(runs)
        for one in due:
            last = one.decision.runs[-1] if one.decision.runs else one.kept.last_due
            new = msgspec.structs.replace(one.kept, next_due=one.decision.next_due, last_due=last)
            self._app.backend.registry.put(_PREFIX + one.name, _pack(new), expected=one.version)

    def _enqueue(self, runs: list[tuple[_Due, int]]) -> None:
        """Enqueue runs; one that cannot be is logged and does not keep back the others."""
        try:
            submissions = [self._submission(one, at) for one, at in runs]
            if submissions:
                self._app.submitting.submit(submissions)
        except BrokerUnavailable:
            raise
        except Exception:
            if len(runs) == 1:
                _log.exception("schedule %r: its run could not be enqueued", runs[0][0].name)
                return
            for run in runs:
                self._enqueue([run])

    def _submission(self, one: _Due, at: int) -> Submission:
        kept, job_id = one.kept, run_id(one.name, at)
        sealed = self._app.sealer.open(_PREFIX + one.name, kept.queue, kept.body)
        if sealed.task != kept.task:
            raise BadMessage(f"schedule {one.name!r} is not the one that was sealed")
        envelope = _with_ids(sealed, job_id)
        args, kwargs = decoded(envelope.codec, envelope.payload)
        call = Call(
            self._app.find_task(kept.task),
            tuple(args),
            kwargs,
            id=job_id,
            queue=kept.queue,
            priority=kept.priority,
            due_at=at / 1000,
        )
        return Submission(job_id, True, call, kept.queue, envelope)


def _check_call(call: Any) -> None:
    if not isinstance(call, Call):
        raise ConfigTypeError(f"call must be a job as task.call(...) makes it, not {shown(call)}")
    if call.delay or call.due_at is not None:
        raise ConfigError("call must have neither delay nor eta: the schedule says when it is due")
    if any(one.id is not None for one in _all_of(call)):
        raise ConfigError(
            "call must have no id of its own, nor what follows it: each run has an id of its own"
        )


def _all_of(call: Call) -> Iterator[Call]:
    yield call
    for _, follow in call.follows:
        yield from _all_of(follow)


def _with_ids(envelope: Envelope, prefix: str) -> Envelope:
    """Return it with ids for the jobs that follow, made of a prefix and numbers: the same each time."""
    numbers = iter(range(1_000_000))

    def renamed(one: Envelope) -> Envelope:
        return msgspec.structs.replace(
            one,
            on_success=tuple(follow_of(follow) for follow in one.on_success),
            on_error=tuple(follow_of(follow) for follow in one.on_error),
        )

    def follow_of(follow: Follow) -> Follow:
        return msgspec.structs.replace(
            follow, id=f"{prefix}.{next(numbers)}", envelope=renamed(follow.envelope)
        )

    return renamed(envelope) if envelope.on_success or envelope.on_error else envelope


def _read(entry: Entry) -> _Kept | None:
    """Return what is kept; None of what bulkhead has not written: one such entry costs only itself."""
    try:
        kept = _unpack(entry.value)
    except (msgspec.MsgspecError, ValueError):
        return None
    instants = (kept.anchor, kept.next_due, kept.last_due or 0)
    return kept if all(0 <= one <= _LAST_INSTANT for one in instants) else None


def _readable(entries: list[Entry], complain: Callable[[Entry, str], None]) -> list[tuple[Entry, _Kept]]:
    found = [(entry, _read(entry)) for entry in entries]
    for entry, kept in found:
        if kept is None:
            complain(entry, "is skipped, as what is kept of it cannot be read: cancel or add it anew")
    return [(entry, kept) for entry, kept in found if kept is not None]


class _Complaints:
    """Errors that are logged once for each version of an entry. Bounded: begun anew when there are many."""

    def __init__(self) -> None:
        self._told: set[tuple[str, int]] = set()

    def __call__(self, entry: Entry, why: str) -> None:
        mark = entry.key, entry.version
        if mark not in self._told:
            if len(self._told) >= _MOST_COMPLAINTS:
                self._told.clear()
            self._told.add(mark)
            _log.error("schedule %r %s", _name_of(entry), why)


def _name_of(entry: Entry) -> str:
    return entry.key.removeprefix(_PREFIX)


def _told(schedule: str, kept: _Kept) -> Schedule:
    return Schedule(
        schedule,
        kept.when,
        kept.tz,
        kept.task,
        kept.queue,
        kept.missed,
        _utc(kept.next_due),
        None if kept.last_due is None else _utc(kept.last_due),
        kept.is_paused,
    )


def _utc(instant: int) -> datetime:
    return datetime.fromtimestamp(instant / 1000, UTC)


def _now() -> int:
    return int(time.time() * 1000)


def _unknown(schedule: str) -> ScheduleNotFound:
    return ScheduleNotFound(f"there is no schedule {schedule!r}")
