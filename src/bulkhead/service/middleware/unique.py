"""`Unique`: a job is not enqueued while another one stands for it.

    unique/<name>/<digest of the key>      which job has the lock; changed by compare-and-set

The way of a lock: the producer takes it for some seconds, enqueues the job, and then confirms it for long. The consumer
releases it when the job is settled.

- Two producers at once: compare-and-set lets one of them win. The other waits until the winner's job is enqueued, and
  is told its id then.
- A producer dies between lock and job: the lock ends by itself after `_PENDING` seconds, and who waits for it goes on.
- It dies between job and confirmation: the same, so that for the rest of its life the job has no lock.
- A consumer dies between the end of a job and the release; a job is cancelled or deleted before it runs: who finds a
  confirmed lock looks whether its job still waits or runs, and takes the lock over if not.
- A producer stands still between lock and job for longer than that, and another one has taken over: the first one
  finds out when it confirms, and deletes its job again if that does not run yet.
- A producer that was told an error, or another timer, enqueues the same job under the same id: it takes its own lock
  over, as nothing says that the job is there.
- A job of a group or chain is not at the broker before its turn: so long those that bring it speak for it. Its lock is
  confirmed before the group is sent, so for `_BRINGING` seconds it stands whatever is at the broker.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from bulkhead import validate
from bulkhead.backends.base import Entry, Place
from bulkhead.errors import BrokerUnavailable, ConfigTypeError
from bulkhead.service.middleware.base import Middleware, Submission
from bulkhead.service.middleware.choosing import Chosen, be_the_only_one, digest, key_part
from bulkhead.service.status import group_key
from bulkhead.service.task import name as checked_name
from bulkhead.service.verdicts import Bury, Cancel, Discard, Succeed, Verdict

if TYPE_CHECKING:
    from bulkhead.service.app import App
    from bulkhead.service.batch import HeldJob

__all__ = ["Unique", "arguments_key"]

_log = logging.getLogger("bulkhead")

# How long a lock holds for which there is no job yet (seconds): well above the time that enqueueing takes.
_PENDING = 10.0

# The lock of a job of a group or chain holds so long after it was confirmed while that is not at the broker (seconds):
# well above the time that it takes to lock all jobs of a large one. The clocks of producers are expected to agree.
_BRINGING = 60.0

# A lock that nobody has released ends so long after its job is due (seconds). Arbitrary; a bound for what is kept.
_LONGEST = 30 * 86400.0

# So many jobs are locked, enqueued and confirmed at a time: in well below `_PENDING`.
_PART = 100

# How often a lock is looked at whose job is not enqueued yet (seconds): first, and at most.
_FIRST_LOOK = 0.002
_LAST_LOOK = 0.05

# Who is faster each time has got the lock, so that more tries than these mean that something is wrong. Arbitrary.
_TRIES = 100


class _Holder(msgspec.Struct, array_like=True, frozen=True):
    """What a lock says: for which job, whether that is known to be enqueued, and which jobs may still bring it.

    Attributes:
        since: When it was confirmed, POSIX seconds.
    """

    id: str
    is_confirmed: bool = False
    brought_by: tuple[str, ...] = ()
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class _Lock:
    """A lock that was taken; `is_renewed` when the job had it already, as an earlier call for it has failed."""

    key: str
    version: int
    job: Submission
    is_renewed: bool = False


# Jobs with the keys of their locks, None of one that may be there many times.
_Jobs = Sequence[tuple[Submission, str | None]]

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(_Holder).decode


class Unique(Middleware):
    """Enqueue no job while another one with the same key waits or runs. The caller is told which one that is.

    `enqueue` raises DuplicateJobId then, with the id of the other job in `job_ids`; `enqueue_many(existing="keep")`
    returns that id. While another producer is just enqueueing the same job they wait for it: milliseconds or, if it was
    killed in that moment, ten seconds.

    Args:
        key: Gets the submission and returns what may not be twice, or None for a job that may; by default task and
            arguments, see `arguments_key`.
        seconds: For how long no other job is enqueued, whatever becomes of this one; None is until it is settled: has
            succeeded, is cancelled, discarded or a dead letter.
        queues: Jobs of these queues alone.
        tasks: Jobs of the tasks with these names alone.
        name: Tells several of these middlewares apart.

    Raises:
        ConfigError: A value cannot work.
    """

    def __init__(
        self,
        *,
        key: Callable[[Submission], str | None] | None = None,
        seconds: float | None = None,
        queues: Iterable[str] | None = None,
        tasks: Iterable[str] | None = None,
        name: str = "default",
    ) -> None:
        self._key: Callable[[Submission], str | None] = (
            arguments_key if key is None else validate.function("key", key)
        )
        self.seconds = None if seconds is None else validate.seconds("seconds", seconds)
        self._chosen = Chosen(queues, tasks)
        self.name = checked_name("name", name)
        self._prefix = f"unique/{key_part(name)}"
        self._header = f"unique:{name}"

    def attach(self, app: App) -> None:
        """See `Middleware`."""
        self._app = app
        be_the_only_one(app, self, lambda one: one.name)

    def enqueue(
        self, submissions: Sequence[Submission], forward: Callable[[Sequence[Submission]], None]
    ) -> None:
        """See `Middleware`."""
        jobs = [(one, self._key_of(one)) for one in submissions]
        for at in range(0, len(jobs), _PART):
            self._enqueue(jobs[at : at + _PART], forward)

    def refused(self, submissions: Sequence[Submission], is_certain: bool) -> None:
        """See `Middleware`. What cannot be told ends by itself: with `seconds` after these, else when another asks."""
        # Why not one that it had before: an earlier call may have enqueued the very job.
        taken = [one for one in submissions if one.notes.get(self._header) is False]
        with contextlib.suppress(BrokerUnavailable):
            for one in taken:
                if is_certain or not any(self._app.find_jobs([*one.brought_by, one.id])):
                    self._release(one.headers[self._header], one.id)

    def settled(self, job: HeldJob, verdict: Verdict) -> None:
        """See `Middleware`."""
        key = job.envelope.headers.get(self._header)
        if self.seconds is None and key is not None and isinstance(verdict, (Succeed, Bury, Discard, Cancel)):
            # What cannot be told does no harm: who finds the lock looks whether its job is there.
            with contextlib.suppress(BrokerUnavailable):
                self._release(key, job.id)

    def _key_of(self, one: Submission) -> str | None:
        if not self._chosen.has(one.queue, one.call.task.name):
            return None
        key = self._key(one)
        if key is None:
            return None
        if not isinstance(key, str):
            raise ConfigTypeError(f"the key function of Unique must return a str or None, not {key!r}")
        return f"{self._prefix}/{digest(key.encode('utf-8', 'surrogatepass'))}"

    def _enqueue(self, jobs: _Jobs, forward: Callable[[Sequence[Submission]], None]) -> None:
        deadline, pause = time.monotonic() + 2 * _PENDING, _FIRST_LOOK
        while jobs := self._enqueue_some(jobs, forward, is_patient=time.monotonic() < deadline):
            time.sleep(pause)
            pause = min(2 * pause, _LAST_LOOK)

    def _enqueue_some(
        self, jobs: _Jobs, forward: Callable[[Sequence[Submission]], None], *, is_patient: bool
    ) -> _Jobs:
        """Enqueue those that nothing stands for; return those of which nobody can say that yet.

        Invariant: who waits has no lock of its own that others would have to wait for.
        """
        locks: list[_Lock] = []
        wanted: list[Submission] = []
        doubtful: list[tuple[Submission, str | None]] = []
        try:
            for one, key in jobs:
                if key is not None and not self._try_lock(key, one, locks, is_patient=is_patient):
                    doubtful.append((one, key))
                elif one.duplicate_of is None:
                    wanted.append(one)
            if wanted:
                forward(wanted)
        except BaseException:
            self._withdraw(locks)
            raise
        for lock in locks:
            self._confirm(lock)
        return doubtful

    def _try_lock(self, key: str, job: Submission, locks: list[_Lock], *, is_patient: bool) -> bool:
        """Take the lock, or note which job stands for this one; False if nobody can say that yet."""
        registry = self._app.backend.registry
        value = _pack(_Holder(job.id, brought_by=job.brought_by))
        expected, is_renewed = 0, False
        for _ in range(_TRIES):
            version = registry.put(key, value, expected=expected, keep=_PENDING)
            if version is not None:
                job.headers[self._header], job.notes[self._header] = key, is_renewed
                locks.append(_Lock(key, version, job, is_renewed))
                return True
            entry = registry.get(key)
            is_renewed = entry is not None and _is_own(entry, job)
            if entry is not None and not is_renewed:
                stands = self._stands(entry)
                if stands is None and is_patient:
                    return False
                if stands is not False:
                    job.duplicate_of = _holder(entry).id
                    return True
            expected = 0 if entry is None else entry.version
        raise BrokerUnavailable(f"a lock changed hands at each of {_TRIES} tries to get it")

    def _stands(self, entry: Entry) -> bool | None:
        """Tell whether the job of a lock keeps others out; None while its producer has not enqueued it."""
        holder, find = _holder(entry), self._app.backend.broker.find
        if not holder.id:
            return False
        if not holder.is_confirmed:
            return True if find([holder.id])[0] else None
        if self.seconds is not None or self._may_be_on_its_way(holder):
            return True
        # Race: its own id comes last, as it is enqueued before the one that brings it is gone.
        records = find([*holder.brought_by, holder.id])
        return any(record is not None and record.place is not Place.DEAD for record in records)

    def _may_be_on_its_way(self, holder: _Holder) -> bool:
        """Tell whether what brings a job may not have come to the broker yet."""
        if not holder.brought_by or abs(time.time() - holder.since) >= _BRINGING:
            return False
        bringer, backend = holder.brought_by[0], self._app.backend
        # What has come to the broker is there until it is opened or cancelled, and each of them leaves a trace.
        return backend.registry.get(group_key(bringer)) is None and not backend.results.get_many([bringer])[0]

    def _confirm(self, lock: _Lock) -> None:
        registry, job = self._app.backend.registry, lock.job
        is_there = job.duplicate_of == job.id and lock.is_renewed
        if job.duplicate_of is not None and not is_there:  # by its own id, or by another middleware
            registry.delete(lock.key, expected=lock.version)
            return
        value = _pack(_Holder(job.id, True, job.brought_by, time.time()))
        if registry.put(lock.key, value, expected=lock.version, keep=self._keep(job)) is not None:
            return
        # Race: the job is settled already, and the lock released. Or we were too slow, and another one has it.
        entry = registry.get(lock.key)
        if entry is not None and (other := _holder(entry).id) != job.id:
            broker = self._app.backend.broker
            if broker.delete([job.id])[0]:
                job.duplicate_of = other
            elif broker.find([job.id])[0]:
                _log.warning(
                    "jobs %s and %s are the same, and both are there: enqueueing took too long", job.id, other
                )

    def _keep(self, job: Submission) -> float:
        if self.seconds is not None:
            return self.seconds
        call = job.call
        delay = call.delay if call.due_at is None else max(0.0, call.due_at - time.time())
        return delay + _LONGEST

    def _withdraw(self, locks: list[_Lock]) -> None:
        """After an error: release the locks of jobs that were not enqueued. What cannot be told ends by itself."""
        with contextlib.suppress(BrokerUnavailable):
            records = self._app.backend.broker.find([lock.job.id for lock in locks]) if locks else []
            for lock, record in zip(locks, records, strict=True):
                # Why not that of a group that had it already: an earlier call may have enqueued it.
                if record is None and not (lock.is_renewed and lock.job.brought_by):
                    self._app.backend.registry.delete(lock.key, expected=lock.version)
                else:
                    self._confirm(lock)

    def _release(self, key: str, job_id: str) -> None:
        registry = self._app.backend.registry
        for _ in range(_TRIES):
            entry = registry.get(key)
            if entry is None or _holder(entry).id != job_id:
                return
            # Race: its producer may confirm it between the two.
            if registry.delete(key, expected=entry.version):
                return


def _holder(entry: Entry) -> _Holder:
    """Return what a lock says; of one that cannot be read that no job has it."""
    try:
        return _unpack(entry.value)
    except msgspec.MsgspecError:
        return _Holder("")


def _is_own(entry: Entry, job: Submission) -> bool:
    """Tell whether a lock is that of the very job, which may not be there."""
    holder = _holder(entry)
    # Why also a confirmed one of a job of a group: it is confirmed before the group is enqueued.
    return holder.id == job.id and (not holder.is_confirmed or bool(job.brought_by))


def arguments_key(job: Submission) -> str:
    """Return a text that is the same for two jobs of one task with equal arguments, however they are written.

    `f(1)`, `f(a=1)` and, where b is 2 by default, `f(1, b=2)` are the same. With codec="pickle" what MessagePack cannot
    write is compared by its pickled bytes, which may differ for equal objects: give a function of your own then.
    """
    call = job.call
    arguments: Any
    try:
        bound = inspect.signature(call.task.fn).bind(*call.args, **call.kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
    except TypeError:  # the job will fail; that is not for us to say
        arguments = (call.args, dict(call.kwargs))
    try:
        data = msgspec.msgpack.encode((call.task.name, arguments), order="deterministic")
    except Exception:  # what only pickle can write
        data = call.task.name.encode("utf-8", "surrogatepass") + b"\0" + job.envelope.payload
    return digest(data)
