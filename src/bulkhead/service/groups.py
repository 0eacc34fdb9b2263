"""Groups and chains of durable jobs: enqueued all or none, and asked for as one.

    enqueue_group, enqueue_chain ── one message, the opener: all jobs in it (`envelope.Bundle`) ──▶ broker
                                                                                                     │ claim
    a group's jobs, or a chain's first one  ◀── enqueue under fixed ids ── a worker's `open_group` ◀─┘
    registry  "groups/<id>": how many there are      ◀── put, then ack ──┘

One message is in the queue or is not, on any server: so nothing is ever half enqueued, whoever dies. Opened twice, or
by two workers, it changes nothing the second time: the ids `<group>.<n>` are taken. In a chain each job is a follow-up
of the one before (`on_success`), which the message of that one holds.

What a group is, is worked out from its jobs at each look, and from nothing else. Its jobs' outcomes are kept at least
as long as what the registry has of it, so that a look finds all of them, or no group:

- the opener is still there: jobs that are not enqueued yet are queued;
- a job is neither in the broker nor among the outcomes: it was removed by hand, and counts as cancelled;
- a chain's job that is not enqueued yet: queued while the one before it may succeed, cancelled when that has not.

Race: jobs move on while they are looked at. A job's successor is enqueued, then its outcome kept, then the broker
forgets it; who asks in the other order (opener, broker, outcomes) misses none. Where a server does not look at many ids
at one instant, a second look settles what the first one left out.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from bulkhead import validate
from bulkhead._kernel.lifecycle import SETTLED, JobState
from bulkhead.backends.base import (
    Burial,
    CancelAnswer,
    Claim,
    Entry,
    Message,
    OutcomeState,
    Place,
    Record,
    Standing,
)
from bulkhead.errors import (
    BadMessage,
    BrokerUnavailable,
    BulkheadError,
    ConfigError,
    ConfigTypeError,
    DuplicateJobId,
    JobCancelled,
    JobNotFound,
    JobsFailed,
    MessageTooLarge,
    RemoteError,
    ResultNotFound,
    WaitTimeout,
)
from bulkhead.service.envelope import Bundle, Envelope, Follow, failure, failure_of
from bulkhead.service.middleware.base import Submission
from bulkhead.service.status import from_record, group_key
from bulkhead.service.task import Call, job_id
from bulkhead.service.telling import guarded

if TYPE_CHECKING:
    from bulkhead.service.app import App

__all__ = ["KEEP", "GroupStatus", "Groups", "open_group"]

# For so long a group is known (seconds), unless said otherwise.
KEEP = 7 * 86400.0

# Bounds, so that a message, a look and a wait have one too. Links are nested in one another, which costs stack.
_MOST_JOBS = 100_000
_MOST_LINKS = 100

# Ids of jobs are the group's and a number, and ids have up to 200 characters. A group whose id looks like that would be
# mistaken for a job of another one.
_LONGEST_ID = 180
_MEMBER = re.compile(r".*\.[0-9]+", re.DOTALL)

# An opener goes before what else is in its queue: its jobs have their own priorities.
_PRIORITY = 100

# So often a worker may die over an opener before it becomes a dead letter.
_OPENINGS = 20

# A round trip carries so many jobs.
_PER_CALL = 1000

# How often a wait looks (seconds): first, at most, and in relation to what a look takes.
_FIRST_LOOK = 0.005
_LAST_LOOK = 0.1
_PER_LOOK = 5

# So long the cancellation of a chain follows it (seconds): its running job takes about one to be ended, or five.
_CANCEL_WAIT = 10.0

# An ExceptionGroup has no more failures than that; the number of all of them is told.
_MOST_ERRORS = 100


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """A group or chain at one moment.

    Attributes:
        id: Its id.
        is_chain: Its jobs run one after the other.
        state: SUCCEEDED when all jobs have; when all have settled FAILED if one has failed, else CANCELLED if one was
            cancelled; before that QUEUED while none has begun, else RUNNING.
        job_ids: Of its jobs, in order.
        states: Theirs, in the same order.
    """

    id: str
    is_chain: bool
    state: JobState
    job_ids: tuple[str, ...]
    states: tuple[JobState, ...]

    @property
    def counts(self) -> dict[JobState, int]:
        """How many of its jobs are in each state that occurs."""
        return dict(Counter(self.states))

    @property
    def is_settled(self) -> bool:
        """Tell whether all its jobs have succeeded, failed for good or were cancelled."""
        return self.state in SETTLED


class _Group(msgspec.Struct, array_like=True, frozen=True):
    """What the registry has of a group: it was opened, or is to be cancelled.

    Attributes:
        others: Jobs that stand for those at these positions, as a middleware has found.
        until: When it is forgotten, POSIX seconds.
    """

    is_chain: bool
    n: int
    others: dict[int, str]
    until: float
    is_cancelled: bool = False

    @property
    def seconds_left(self) -> float:
        return max(self.until - time.time(), 1.0)

    def own_ids(self, group: str) -> list[str]:
        """Return those that are enqueued for this group alone."""
        return [_member_id(group, at) for at in range(self.n) if at not in self.others]

    def ids(self, group: str) -> list[str]:
        return [self.others.get(at) or _member_id(group, at) for at in range(self.n)]


_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(_Group).decode


class Groups:
    """An application's groups and chains."""

    def __init__(self, app: App) -> None:
        self._app = app

    def enqueue_group(self, calls: Iterable[Call], group: str | None, keep: float) -> str:
        """See `App.enqueue_group`."""
        group, keep = self._checked(group, keep)
        members = self._submissions(calls, group, _MOST_JOBS)
        for one in members:
            one.brought_by = (group,)
        with self._all_or_none(members):
            self._send_group(group, keep, members)
        return group

    def _send_group(self, group: str, keep: float, members: list[Submission]) -> None:
        self._refuse_taken(group, members)
        passed = self._passed(members)
        kinds: dict[bytes, int] = {}
        follows: list[Follow] = []
        listed = []
        at = {one.id: number for number, one in enumerate(members)}
        for one in passed:
            follow = _follow(one, keep)
            bare = msgspec.structs.replace(
                follow, id="", envelope=msgspec.structs.replace(follow.envelope, payload=b"")
            )
            # Why: most jobs of a group differ in nothing but their arguments, and a message may not be large.
            kind = kinds.setdefault(_pack(bare), len(kinds))
            if kind == len(follows):
                follows.append(bare)
            listed.append((at[one.id], kind, follow.envelope.payload))
        others = {
            number: one.duplicate_of for number, one in enumerate(members) if one.duplicate_of is not None
        }
        bundle = Bundle(False, len(members), keep, tuple(follows), tuple(listed), others)
        self._send(group, self._queue_of(members), bundle)

    def enqueue_chain(self, calls: Iterable[Call], chain: str | None, keep: float) -> str:
        """See `App.enqueue_chain`."""
        chain, keep = self._checked(chain, keep)
        links = self._submissions(calls, chain, _MOST_LINKS)
        if not links:
            raise ConfigError("calls of a chain must be at least one, not none")
        for number, one in enumerate(links):
            one.brought_by = (chain, *(before.id for before in links[:number]))
        with self._all_or_none(links):
            self._send_chain(chain, keep, links)
        return chain

    def _send_chain(self, chain: str, keep: float, links: list[Submission]) -> None:
        self._refuse_taken(chain, links)
        self._require_all(links, self._passed(links))
        then: tuple[Follow, ...] = ()
        for number in reversed(range(len(links))):
            follow = _follow(links[number], keep)
            envelope = msgspec.structs.replace(
                follow.envelope, on_success=follow.envelope.on_success + then, takes=number > 0
            )
            then = (msgspec.structs.replace(follow, envelope=envelope),)
        first = msgspec.structs.replace(then[0], id="")
        bundle = Bundle(True, len(links), keep, (first,), ((0, 0, first.envelope.payload),), {})
        self._send(chain, first.queue, bundle)

    def status(self, group: str) -> GroupStatus:
        """See `App.group_status`."""
        known, opener = self._find(group)
        ids = known.ids(group)
        states = self._states(ids)
        if opener is not None:
            missing = JobState.FAILED if opener is Place.DEAD else JobState.QUEUED
            return _status(group, known, ids, [missing if one is None else one for one in states])
        if _has_gap(known, states):
            unknown = [one for one, state in zip(ids, states, strict=True) if state is None]
            again = iter(self._states(unknown))
            states = [next(again) if state is None else state for state in states]
        return _status(group, known, ids, _filled(known, states))

    def wait(self, group: str, timeout: float) -> GroupStatus:
        """See `App.wait_group`."""
        began = time.monotonic()
        deadline = began + validate.seconds("timeout", timeout, zero=True)
        pause = _FIRST_LOOK
        while not (status := self.status(group)).is_settled:
            now = time.monotonic()
            if now >= deadline:
                raise WaitTimeout(f"{group!r} has not settled within {timeout} s; it is {status.state}")
            time.sleep(min(max(pause, _PER_LOOK * (now - began)), deadline - now))
            pause = min(1.5 * pause, _LAST_LOOK)
            began = time.monotonic()
        return status

    def results(self, group: str, timeout: float) -> list[Any]:
        """See `App.group_results`."""
        status = self.wait(group, timeout) if timeout else self.status(group)
        if not status.is_settled:
            raise ResultNotFound(f"{group!r} is {status.state} and has no results yet")
        if status.state is not JobState.SUCCEEDED:
            raise self._failures(status)
        found = []
        for part in _parts(status.job_ids):
            for one, outcome in zip(part, self._app.backend.results.get_many(part), strict=True):
                if outcome is None or outcome.value is None:
                    raise ResultNotFound(f"job {one!r} of {group!r} has left no result")
                found.append(self._app.sealer.open_value(one, outcome.value))
        return found

    def cancel(self, group: str) -> bool:
        """See `App.cancel_group`."""
        status = self.status(group)
        if status.is_settled:
            return False
        # Race: a worker that is just opening it looks for this mark behind its last enqueue, so that either it sees
        # the mark, or we see all its jobs.
        own_ids = self._mark(group)
        self._app.backend.broker.cancel([group])
        deadline = time.monotonic() + _CANCEL_WAIT
        self._cancel_jobs(own_ids)
        # Race: a job that ends now lets the next one of a chain follow.
        while status.is_chain and not self.status(group).is_settled and time.monotonic() < deadline:
            time.sleep(_LAST_LOOK)
            self._cancel_jobs(own_ids)
        return True

    def open(self, claim: Claim, envelope: Envelope) -> None:
        """Enqueue the jobs of a claimed opener, and ack it. May be repeated, and done by two at once.

        Raises:
            BrokerUnavailable: Some, all or none are enqueued.
        """
        bundle, broker = envelope.bundle, self._app.backend.broker
        assert bundle is not None
        if claim.attempt > _OPENINGS:
            broker.bury([Burial(claim.hold, f"{claim.attempt - 1} workers died while they opened it")])
            return
        is_cancelled = False
        for part in _parts(bundle.members):
            # Race: a worker that was stopped for so long that the jobs have come and gone must not enqueue them again.
            standing = broker.renew([claim.hold], self._app.lease)[0]
            if standing is Standing.LOST:
                return
            if is_cancelled := standing is Standing.CANCELLED:
                break
            try:
                broker.enqueue_many([self._message(claim.id, bundle, *member) for member in part])
            except MessageTooLarge as error:
                broker.bury([Burial(claim.hold, str(error), failure_of(error))])
                return
        known = self._note_opened(claim.id, bundle)
        if known.is_cancelled or is_cancelled:
            self._cancel_jobs(known.own_ids(claim.id))
        broker.ack([claim.hold])

    # Making

    def _checked(self, group: str | None, keep: float) -> tuple[str, float]:
        made = self._app.submitting.next_id() if group is None else job_id(group)
        if len(made) > _LONGEST_ID:
            raise ConfigError(f"id of a group must have up to {_LONGEST_ID} characters, not {len(made)}")
        if _MEMBER.fullmatch(made):
            raise ConfigError(
                f'id of a group must not end with "." and digits, as those of jobs of groups do, and {made!r} does: '
                'write "-" instead'
            )
        return made, validate.seconds("keep", keep)

    def _submissions(self, calls: Iterable[Call], group: str, most: int) -> list[Submission]:
        if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Iterable):
            raise ConfigTypeError(f"calls must be an iterable of task.call(...), not {validate.shown(calls)}")
        made = []
        for number, call in enumerate(calls):
            if number == most:
                raise ConfigError(f"calls must be {most} at most, and there are more")
            one = self._app.submitting.submission(call)
            if one.is_own_id:
                raise ConfigError(f"calls[{number}] must have no id of its own: it is {group}.{number}")
            one.id, one.is_own_id = _member_id(group, number), True
            made.append(one)
        return made

    @contextlib.contextmanager
    def _all_or_none(self, members: list[Submission]) -> Iterator[None]:
        """Let the middlewares know when none of these is enqueued, though some have passed."""
        try:
            yield
        except BaseException as error:
            # Why not after Ctrl-C, either: it may have come between the call and its answer.
            is_certain = isinstance(error, Exception) and not isinstance(error, BrokerUnavailable)
            for middleware in self._app.middlewares:
                guarded(middleware.refused, [one for one in members if one.duplicate_of is None], is_certain)
            raise

    def _refuse_taken(self, group: str, members: Sequence[Submission]) -> None:
        """Check that no other job has an id of the group's; one that is enqueued later is not noticed."""
        backend = self._app.backend
        for part in _parts([one.id for one in members]):
            records = backend.broker.find([group, *part])
            taken = tuple(record.id for record in records[1:] if record is not None)
            # Why: a group that is enqueued again is told that it is there itself.
            if taken and records[0] is None and backend.registry.get(group_key(group)) is None:
                raise DuplicateJobId(
                    f"{len(taken)} jobs with ids of group {group!r} exist already, the first of them as {taken[0]!r}: "
                    "none was enqueued",
                    job_ids=taken,
                )

    def _passed(self, submissions: list[Submission]) -> list[Submission]:
        """Return what the middlewares let through."""
        passed: list[Submission] = []
        if submissions:
            self._app.submitting.submit(submissions, passed.extend)
        return passed

    def _require_all(self, links: list[Submission], passed: list[Submission]) -> None:
        taken = tuple(one.duplicate_of for one in links if one.duplicate_of is not None)
        if taken:
            raise DuplicateJobId(
                f"{len(taken)} jobs of the chain exist already, the first of them as {taken[0]!r}; none was enqueued",
                job_ids=taken,
            )
        if len(passed) < len(links):
            raise BulkheadError(
                f"middlewares let {len(passed)} of the chain's {len(links)} jobs pass; none was enqueued"
            )

    def _queue_of(self, members: list[Submission]) -> str:
        queues = [members[0].queue] if members else self._app.queue_names()
        if not queues:
            raise ConfigError("the application has no queue: give it a task first")
        return queues[0]

    def _send(self, group: str, queue: str, bundle: Bundle) -> None:
        envelope = Envelope("", b"", keep=bundle.keep, bundle=bundle)
        body = self._app.sealer.seal(group, queue, envelope)
        message = Message(group, queue, body, _PRIORITY, remember=max(bundle.keep, 86400.0))
        if not self._app.backend.broker.enqueue_many([message])[0]:
            raise DuplicateJobId(f"there is a job or group {group!r} already", job_ids=(group,))

    # Opening

    def _message(self, group: str, bundle: Bundle, at: int, kind: int, payload: bytes) -> Message:
        follow = bundle.kinds[kind]
        envelope = msgspec.structs.replace(follow.envelope, payload=payload)
        return self._app.submitting.message(
            msgspec.structs.replace(follow, id=_member_id(group, at)), envelope
        )

    def _note_opened(self, group: str, bundle: Bundle) -> _Group:
        registry, made = self._app.backend.registry, _group_of(bundle)
        while True:
            entry = registry.get(group_key(group))
            if entry is not None:
                return _read(entry)
            if registry.put(group_key(group), _pack(made), expected=0, keep=bundle.keep) is not None:
                return made

    # Looking

    def _find(self, group: str) -> tuple[_Group, Place | None]:
        """Return what is known of a group, and where its opener is; None when it was opened."""
        record = self._app.backend.broker.find([job_id(group)])[0]
        bundle = None if record is None else self._bundle(record)
        if record is not None and bundle is not None:
            return _group_of(bundle), record.place
        entry = self._app.backend.registry.get(group_key(group))
        if entry is None:
            raise _unknown(group)
        return _read(entry), None

    def _bundle(self, record: Record) -> Bundle | None:
        return self._app.sealer.open(record.id, record.queue, record.body).bundle

    def _states(self, ids: Sequence[str]) -> list[JobState | None]:
        """Return the jobs' states; None for one of which nothing is known. Two round trips for each 1000."""
        found: list[JobState | None] = []
        for part in _parts(ids):
            records = self._app.backend.broker.find(part)
            settled = [one for one, record in zip(part, records, strict=True) if record is None]
            outcomes = iter(self._app.backend.results.get_many(settled) if settled else ())
            for record in records:
                if record is not None:
                    found.append(_state_of(record))
                else:
                    outcome = next(outcomes)
                    is_known = outcome is not None and outcome.state is not OutcomeState.RUNNING
                    found.append(JobState(outcome.state.value) if outcome is not None and is_known else None)
        return found

    def _failures(self, status: GroupStatus) -> JobsFailed:
        """Return the error that tells what has failed or, where nothing has, what was cancelled."""
        ids = [one for one, state in zip(status.job_ids, status.states, strict=True) if state is status.state]
        some = ids[:_MOST_ERRORS]
        errors: list[Exception] = []
        for one, outcome in zip(some, self._app.backend.results.get_many(some), strict=True):
            told = None if outcome is None else failure(outcome.error)
            if status.state is JobState.CANCELLED:
                errors.append(JobCancelled(f"job {one!r} was cancelled"))
            elif told is None:
                errors.append(RemoteError(f"job {one!r} failed; nothing more is known"))
            else:
                text = f"job {one!r} failed: {told.type}: {told.message}"
                errors.append(RemoteError(text, type_name=told.type, traceback=told.traceback))
        verb = "were cancelled" if status.state is JobState.CANCELLED else "failed"
        return JobsFailed(
            f"{len(ids)} of {len(status.job_ids)} jobs of {status.id!r} {verb}",
            errors,
            job_ids=tuple(some),
            total=len(ids),
        )

    # Cancelling

    def _mark(self, group: str) -> list[str]:
        """Note that it is to be cancelled; return the ids of its own jobs, not of those that stand for others."""
        registry = self._app.backend.registry
        while True:
            record = self._app.backend.broker.find([group])[0]
            bundle = None if record is None else self._bundle(record)
            entry = registry.get(group_key(group))
            if entry is not None:
                known = _read(entry)
            elif bundle is not None:
                known = _group_of(bundle)
            else:
                raise _unknown(group)
            marked = msgspec.structs.replace(known, is_cancelled=True)
            version = 0 if entry is None else entry.version
            if (
                registry.put(group_key(group), _pack(marked), expected=version, keep=known.seconds_left)
                is not None
            ):
                return marked.own_ids(group)

    def _cancel_jobs(self, ids: Sequence[str]) -> None:
        backend = self._app.backend
        for part in _parts(ids):
            records = [record for record in backend.broker.find(part) if record is not None]
            answers = backend.broker.cancel([record.id for record in records])
            removed = [
                from_record(record, self._app.sealer, backend.registry).cancelled()
                for record, answer in zip(records, answers, strict=True)
                if answer is CancelAnswer.REMOVED
            ]
            if removed:
                backend.results.save_many(removed)


def open_group(app: App, claim: Claim, envelope: Envelope) -> None:
    """Enqueue the jobs of a claimed opener; see `Groups.open`."""
    Groups(app).open(claim, envelope)


def _follow(one: Submission, keep: float) -> Follow:
    call, envelope = one.call, one.envelope
    priority = call.task.options.priority if call.priority is None else call.priority
    made = msgspec.structs.replace(
        envelope, keep=max(envelope.keep, keep), headers={**envelope.headers, **one.headers}
    )
    return Follow(one.id, one.queue, priority, call.delay, call.due_at, made)


def _group_of(bundle: Bundle) -> _Group:
    return _Group(bundle.is_chain, bundle.n, bundle.others, time.time() + bundle.keep)


def _read(entry: Entry) -> _Group:
    try:
        return _unpack(entry.value)
    except msgspec.MsgspecError as error:
        raise BadMessage(f"what is kept as {entry.key!r} is no group: {error}") from None


def _unknown(group: str) -> JobNotFound:
    return JobNotFound(
        f"there is no group or chain {group!r}: it never existed, or is no longer kept", job_id=group
    )


def _member_id(group: str, at: int) -> str:
    return f"{group}.{at}"


def _state_of(record: Record) -> JobState:
    state = _PLACES[record.place]
    return JobState.RETRYING if state is JobState.SCHEDULED and record.attempt > 0 else state


_PLACES = {
    Place.READY: JobState.QUEUED,
    Place.SCHEDULED: JobState.SCHEDULED,
    Place.RUNNING: JobState.RUNNING,
    Place.DEAD: JobState.FAILED,
}


def _has_gap(known: _Group, states: Sequence[JobState | None]) -> bool:
    """Tell whether a job is missing that should be somewhere."""
    if not known.is_chain:
        return None in states
    before = [JobState.SUCCEEDED, *states]
    return any(
        one is None and prior is JobState.SUCCEEDED for prior, one in zip(before, states, strict=False)
    )


def _filled(known: _Group, states: Sequence[JobState | None]) -> list[JobState]:
    """Return the states, with what stands for unknown ones."""
    made: list[JobState] = []
    for state in states:
        is_waiting = known.is_chain and bool(made) and made[-1] not in SETTLED
        missing = JobState.QUEUED if is_waiting else JobState.CANCELLED
        made.append(missing if state is None else state)
    return made


def _status(group: str, known: _Group, ids: list[str], states: list[JobState]) -> GroupStatus:
    return GroupStatus(group, known.is_chain, _state(states), tuple(ids), tuple(states))


def _state(states: Sequence[JobState]) -> JobState:
    kinds = set(states)
    if not kinds <= SETTLED:
        return JobState.QUEUED if kinds <= _NOT_BEGUN else JobState.RUNNING
    for state in (JobState.FAILED, JobState.CANCELLED):
        if state in kinds:
            return state
    return JobState.SUCCEEDED


_NOT_BEGUN = {JobState.QUEUED, JobState.SCHEDULED}


def _parts(things: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (things[at : at + _PER_CALL] for at in range(0, len(things), _PER_CALL))
