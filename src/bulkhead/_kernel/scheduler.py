"""The decisions of one pool: a synchronous state machine, stimulus in, instructions out.

What it decides: whether a job is accepted, which waiting job starts on which slot, what follows a success, a failure, a
death, a cancellation or an instant, and when a pool has to give up. What it does not do: it reads no clock, holds no
lock, starts no process. The engine calls one method per stimulus, under the pool's lock, and then carries out
`instructions` in order.

Guarantees, argued for in README.md of this folder:
- Jobs start in the order in which they became ready; a retry becomes ready when its pause is over.
- Callers that wait for room, and jobs that were submitted without waiting for it, are served in the order in which
  they came, after the jobs that are ready already.
- running + ready never exceeds n_workers + backlog by an accepted offer or a submitted job (only a due or returned job
  can exceed it).
- Every accepted job gets exactly one `SettleJob`.

Source: decisions apart from actions as in distributed's worker_state_machine.py.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from bulkhead._kernel import lifecycle
from bulkhead._kernel.deadlines import Alarm, Deadlines
from bulkhead._kernel.lifecycle import JobState
from bulkhead._kernel.phases import Phase, Phases
from bulkhead._kernel.records import JobRecord, Loss, Slot, SlotState, Usage, Verdict, Wear

__all__ = [
    "AcceptOffer",
    "EndWorker",
    "RefuseOffer",
    "Scheduler",
    "SendAhead",
    "SendHome",
    "SettleJob",
    "StartJob",
    "StartWorker",
]

# A job that goes back unread more often than this has something to do with the deaths: it counts as crashed.
_MAX_RETURNS = 3

# Deaths at start in a row, without any worker of the pool coming up, after which the pool is broken (arbitrary); at
# least one for each slot. More when somebody outside kills them: that says nothing about the next one.
_MAX_FAILED_STARTS = 3
_MAX_KILLED_STARTS = 50

# Pause in seconds before a worker is started again after the first death in a row without work, doubled from then on.
_RESPAWN_PAUSE = 0.1
_RESPAWN_PAUSE_MAX = 5.0

# A worker that was idle for this many seconds before it died does not count as one that dies at start (arbitrary).
_SETTLED_IN = 1.0


# What is on the way of every job. Why: Python 3.11 takes 70 ns to find a member in its enum.
_IDLE, _BUSY = SlotState.IDLE, SlotState.BUSY
_SCHEDULED, _RETRYING = JobState.SCHEDULED, JobState.RETRYING
_SUCCEEDED, _FAILED = JobState.SUCCEEDED, JobState.FAILED

# Makes an instruction in half the time that its class takes, on the way of every job.
_new: Callable[..., Any] = tuple.__new__


class StartJob(NamedTuple):
    """Send the job to the slot's worker."""

    slot: Slot
    job: JobRecord


class SendAhead(NamedTuple):
    """Send the job to the slot's busy worker, to be begun when that has answered. Moot if it is not `slot.ahead`."""

    slot: Slot
    job: JobRecord


class SettleJob(NamedTuple):
    """The job has reached its final state: tell whoever waits for it."""

    job: JobRecord
    phase_is_over: bool


class AcceptOffer(NamedTuple):
    """A job whose caller waits for room has been accepted."""

    job: JobRecord


class RefuseOffer(NamedTuple):
    """A job whose caller waits for room will never be accepted: the pool takes no more."""

    job: JobRecord


class StartWorker(NamedTuple):
    """Start a process for the vacant slot."""

    slot: Slot


class EndWorker(NamedTuple):
    """End the slot's process with all it has started."""

    slot: Slot


class SendHome(NamedTuple):
    """Let the slot's process leave; its end is of no interest any more, and another may be started at once."""

    slot: Slot


Instruction = (
    StartJob | SendAhead | SettleJob | AcceptOffer | RefuseOffer | StartWorker | EndWorker | SendHome
)


class Scheduler:
    """One pool's state. Owner: the pool, under its lock.

    Args:
        n_workers: Number of slots.
        backlog: Accepted jobs that may wait beyond the slots; None is unbounded.
        keep_failures: Failed jobs that a phase remembers for its barrier.
        draw: Gives a number from [0, 1) for the jitter of retries.
        on_accept: Called with each job at the moment it is accepted, before it can start.
        expired: Makes the error of a job whose start deadline has passed.
        extended: Asked when a job's time is up: returns the instant up to which it has time after all, or None.
        wear: After how much use workers are recycled.
        recall: Asked to take back what was sent ahead to a slot; False when the worker has begun it. None sends nothing
            ahead.
    """

    def __init__(
        self,
        n_workers: int,
        backlog: int | None,
        *,
        keep_failures: int,
        draw: Callable[[], float],
        on_accept: Callable[[JobRecord], None],
        expired: Callable[[JobRecord], BaseException],
        extended: Callable[[JobRecord], float | None],
        wear: Wear | None = None,
        recall: Callable[[Slot], bool] | None = None,
    ) -> None:
        self.slots = [Slot(index) for index in range(n_workers)]
        self.phases = Phases(keep_failures)
        self.instructions: list[Instruction] = []
        self.broken: BaseException | None = None
        self.is_refusing = False
        self.succeeded = self.failed = self.cancelled = self.retried = self.restarts = self.recycled = 0
        self.wear = wear
        self.running = 0
        self.unsettled = 0
        self._capacity = None if backlog is None else n_workers + backlog
        self._draw = draw
        self._on_accept = on_accept
        self._expired = expired
        self._extended = extended
        self._recall = recall
        self._n_ahead = 0  # slots to which a job was sent ahead
        self._idle: list[Slot] = []  # Why a stack: the worker that ended last is warmest.
        self._ready: OrderedDict[JobRecord, None] = OrderedDict()
        # In line for room: offers, whose callers wait, and submitted jobs, which are accepted already.
        self._offers: OrderedDict[JobRecord, None] = OrderedDict()
        self._pausing: dict[JobRecord, None] = {}  # scheduled or retrying
        self._promised: dict[JobRecord, None] = {}  # counted in, not accepted yet
        self._unfed: set[JobRecord] = set()  # of those that pause: wait for no instant, but to be fed
        self._deadlines = Deadlines(self._is_live)
        self._now = 0.0  # of the last stimulus
        self._starts = 0
        self._turns = 0
        self._failed_starts = self._killed_starts = 0
        self._deaths_in_a_row = 0
        self._is_stopping = False

    # Stimuli from callers

    def offer(self, job: JobRecord, now: float, *, patient: bool = True) -> bool:
        """Take a job if there is room; otherwise remember the offer of a patient caller. Return whether it was taken.

        The engine has checked `broken` and `is_refusing`.
        """
        self._now = now
        if job.due is not None and job.due > now:
            self._accept(job, lifecycle.SCHEDULE)
            self._pausing[job] = None
            self._deadlines.add(job.due, Alarm.JOB_DUE, _handle(job))
        elif self.has_room():
            self._take(job)
        elif patient:
            self._offers[job] = None
        else:
            return False
        if job.start_by is not None and job.state not in lifecycle.SETTLED:
            self._deadlines.add(job.start_by, Alarm.START_DEADLINE, _handle(job))
        return job.state is not None

    def submit(self, job: JobRecord, now: float) -> None:
        """Accept a job whatever the backlog is; without room it gets in line behind the offers that wait.

        The engine has checked `broken` and `is_refusing`. For jobs without `due` and `start_by`.
        """
        self._now = now
        if not self._offers and self._has_room():
            self._take(job)
        else:
            self._accept(job, lifecycle.ACCEPT)
            self._offers[job] = None

    def withdraw(self, job: JobRecord) -> bool:
        """Forget the offer of a caller that waits no longer; False when it was accepted just before."""
        if self._n_ahead:
            self._bring_back(job)
        if job.state is not None or job not in self._offers:
            return False
        del self._offers[job]
        _drop_handle(job)
        return True

    def cancel(self, job: JobRecord, error: BaseException, now: float) -> bool:
        """Take a waiting job out, or have the worker of a running one ended. False when it has settled."""
        self._now = now
        if job.state in lifecycle.SETTLED or job.state is None:
            return False
        if self._n_ahead and not self._bring_back(job):
            slot = self._slot_ahead(job)
            if slot is None:
                return False  # it has ended, for its worker has begun the next one; the answer is under way
            job.error = error
            slot.is_ahead_cancelled = True
            return True
        job.error = error
        if job.state is JobState.RUNNING:
            self._end(job, Verdict.CANCEL)
            return True
        self._ready.pop(job, None)
        self._offers.pop(job, None)
        self._settle(job, lifecycle.CANCEL)
        self._fill()
        return True

    def send_ahead(self) -> None:
        """Send the next in line to workers that are busy, as far as those jobs and these go ahead.

        Why not a job from behind: it would get in front of one that came before it.
        """
        if self._recall is None or self._idle or self.broken is not None:
            return
        while (job := next(iter(self._ready or self._offers), None)) is not None and job.goes_ahead:
            free = [slot for slot in self.slots if self._may_have_ahead(slot)]
            if not free:
                return
            slot = min(free, key=_since)
            if job.state is None:
                del self._offers[job]
            else:
                self._ready.pop(job, None)
                self._offers.pop(job, None)
                self._widen(-1)
            slot.ahead = job
            self._n_ahead += 1
            self.instructions.append(SendAhead(slot, job))

    def begun_ahead(self, job: JobRecord) -> Slot | None:
        """Take a job back that was sent ahead; return the slot whose worker has begun it when that is too late."""
        if job.state is JobState.RUNNING or self._bring_back(job):
            return None
        return self._slot_ahead(job)

    def refuse(self) -> None:
        """Accept nothing any more; what is accepted goes on."""
        self.is_refusing = True
        self._refuse_offers()

    def stop(self) -> None:
        """Start no more workers; those that go are not replaced."""
        self._is_stopping = True

    # Stimuli from callers: jobs that follow others

    def promise(self, job: JobRecord) -> None:
        """Count a job in that will be accepted, or taken back, when others have ended; the open phase waits for it.

        The engine has checked `broken` and `is_refusing`.
        """
        self._promised[job] = None
        self.unsettled += 1
        self.phases.join(job)

    def retract(self, job: JobRecord) -> Phase | None:
        """Take a promise back: nobody will hear of the job. Return the phase that it leaves, None if it is kept."""
        if job not in self._promised:
            return None
        del self._promised[job]
        self.unsettled -= 1
        return self.phases.retract(job)

    def keep(self, job: JobRecord, error: BaseException) -> None:
        """Accept a promised job, also when the pool accepts nothing else any more; it waits until it is fed.

        Does nothing if it is accepted. A job whose promise was taken back (all are when everything is cancelled) is
        cancelled with `error`, and one of a broken pool fails.
        """
        if job.state is not None:
            return
        is_promised = job in self._promised
        if is_promised:
            del self._promised[job]
        else:
            self.unsettled += 1
            self.phases.join(job)
        self._on_accept(job)
        job.state = lifecycle.SCHEDULE[job.state]
        self._pausing[job] = None
        if self.broken is not None:
            job.error = _copy_of(self.broken)
            self._settle(job, lifecycle.FAIL)
        elif is_promised:
            self._unfed.add(job)
        else:
            job.error = error
            self._settle(job, lifecycle.CANCEL)

    def is_unfed(self, job: JobRecord) -> bool:
        """Tell whether the job is kept and waits to be fed."""
        return job in self._unfed

    def feed(self, job: JobRecord, now: float, error: BaseException | None = None) -> None:
        """Let an unfed job become ready, at its instant if it has one; or fail, when `error` kept it from starting."""
        self._now = now
        self._unfed.remove(job)
        if error is not None:
            job.error = error
            self._settle(job, lifecycle.FAIL)
            return
        if job.start_by is not None:
            self._deadlines.add(job.start_by, Alarm.START_DEADLINE, _handle(job))
        if job.due is not None and job.due > now:
            self._deadlines.add(job.due, Alarm.JOB_DUE, _handle(job))
        else:
            self._job_due(job)
            self._fill()

    # Stimuli from workers

    def begin(self) -> None:
        """Have every slot staffed for the first time."""
        for slot in self.slots:
            self._staff(slot)
        self.restarts = 0

    def worker_ready(self, slot: Slot, now: float) -> None:
        """The slot's worker has come up and waits for a job."""
        self._now = now
        self._failed_starts = self._killed_starts = 0
        slot.ready_at = now
        slot.state = SlotState.IDLE
        self._idle.append(slot)
        self._fill()

    def attempt_ended(
        self, slot: Slot, error: BaseException | None, now: float, usage: Usage | None = None
    ) -> None:
        """The slot's worker has answered; `error` is None for a success. A worker told to end has lost its say.

        Args:
            slot: The slot.
            error: What the attempt failed with.
            now: Monotonic seconds.
            usage: What the worker has done and takes, where `wear` asks for it.
        """
        self._now = now
        if slot.state is not _BUSY:
            return
        job = slot.job
        assert job is not None
        self._deaths_in_a_row = 0
        slot.job = job.slot = None
        slot.state = _IDLE
        self._idle.append(slot)
        self.running -= 1
        if error is None:
            self._settle(job, lifecycle.SUCCEED)
        else:
            self._attempt_failed(job, error, now)
        if usage is not None and self.wear is not None and self.wear.is_reached(usage):
            self._recycle(slot)
        if self._ready or self._offers or self._n_ahead:
            if slot.ahead is not None:
                self._go_on(slot)
            self._fill()

    def memory_exceeded(self, slot: Slot, now: float) -> None:
        """The slot's worker takes more memory than any may: its job fails when it is gone, unless it has answered."""
        self._now = now
        if slot.state is SlotState.BUSY:
            assert slot.job is not None
            self._end(slot.job, Verdict.MEMORY)

    def worker_gone(
        self,
        slot: Slot,
        error: BaseException,
        now: float,
        *,
        loss: Loss = Loss.ATTEMPT,
        was_killed: bool = False,
    ) -> None:
        """The slot's process has ended; whatever it had answered before has been reported.

        Args:
            slot: The slot, vacant from now on.
            error: What its job fails with, unless the job was cancelled.
            now: Monotonic seconds.
            loss: What that means for its job, unless the job was cancelled.
            was_killed: It was ended from outside, so that its end says little about the next one.
        """
        self._now = now
        state, job, verdict = slot.state, slot.job, slot.verdict
        if state is SlotState.IDLE:
            self._idle.remove(slot)
        slot.state, slot.job, slot.verdict = SlotState.VACANT, None, None
        if slot.ahead is not None:
            self._back_in_line(slot)
        if job is not None:
            job.slot = None
            self.running -= 1
            self._job_lost(job, verdict, error, now, loss)
        self._restaff(slot, state, error, now, was_killed=was_killed)
        self._fill()

    # Stimuli of time and ruin

    def tick(self, now: float) -> None:
        """Let everything happen that is due."""
        self._now = now
        while (entry := self._deadlines.pop(now)) is not None:
            alarm, subject = entry
            if alarm is Alarm.JOB_DUE:
                self._job_due(subject[0])
            elif alarm is Alarm.START_DEADLINE:
                self._start_deadline(subject[0])
            elif alarm is Alarm.TIMEOUT:
                self._time_is_up(subject.job)
            else:
                self._staff(subject)
        self._fill()

    def break_down(self, error: BaseException) -> None:
        """Give the pool up: fail what waits, refuse what is offered, let what runs end. Once."""
        if self.broken is not None:
            return
        self.broken = error
        self._refuse_offers()
        for job in [*self._ready, *self._offers, *self._pausing]:
            job.error = _copy_of(error)
            self._settle(job, lifecycle.FAIL)
        self._ready.clear()
        self._offers.clear()

    def ruin(self, error: BaseException) -> list[JobRecord]:
        """Forget everything, for an engine that cannot trust this state any more.

        Returns:
            The jobs whose waiters may not know what has become of them: those that were offered, and those whose end
            was decided and perhaps not told.
        """
        self.broken = error if self.broken is None else self.broken
        untold = self.untold()
        for phase in self.phases.unreported:
            phase.unsettled = 0
        self._idle.clear()
        self._ready.clear()
        self._offers.clear()
        self._pausing.clear()
        self._promised.clear()
        self._unfed.clear()
        self.instructions.clear()
        for slot in self.slots:
            slot.state, slot.job, slot.ahead, slot.verdict = SlotState.VACANT, None, None, None
        self.running = self.unsettled = self._n_ahead = 0
        return untold

    # Answers

    def untold(self) -> list[JobRecord]:
        """Return the jobs that are offered, and those whose end is decided and was perhaps not told."""
        ahead = [slot.ahead for slot in self.slots if slot.ahead is not None]
        offered = [job for job in [*self._offers, *ahead] if job.state is None]
        return offered + [one.job for one in self.instructions if isinstance(one, (SettleJob, RefuseOffer))]

    @property
    def next_deadline(self) -> float | None:
        """When `tick` has to be called next, in monotonic seconds; None for never."""
        return self._deadlines.next()

    @property
    def waiting(self) -> int:
        """Number of accepted jobs that wait for a slot."""
        return self.unsettled - len(self._promised) - self.running - len(self._pausing)

    @property
    def delayed(self) -> int:
        """Number of accepted jobs that wait for an instant, for their first start or next attempt, or to be fed."""
        return len(self._pausing)

    def has_room(self) -> bool:
        """Tell whether an offer made now would be accepted at once."""
        # Why not by `_has_room`: it is on the way of every job.
        capacity = self._capacity
        return not self._offers and (capacity is None or self.running + len(self._ready) < capacity)

    def next_for_absent(self) -> list[JobRecord]:
        """Return the waiting jobs that are the next for slots whose workers are not up (again) yet."""
        n_absent = sum(slot.state not in (SlotState.IDLE, SlotState.BUSY) for slot in self.slots)
        return list(itertools.islice(self._ready, n_absent))

    def unsettled_jobs(self) -> list[JobRecord]:
        """Return the accepted jobs that have not settled: running, then waiting, then pausing ones."""
        running = [slot.job for slot in self.slots if slot.job is not None]
        ahead = [slot.ahead for slot in self.slots if slot.ahead is not None and slot.ahead.state is not None]
        submitted = [job for job in self._offers if job.state is not None]
        return [*running, *ahead, *self._ready, *submitted, *self._pausing]

    def promised_jobs(self) -> list[JobRecord]:
        """Return the jobs that are counted in and not accepted."""
        return list(self._promised)

    # Decisions

    def _has_room(self) -> bool:
        return self._capacity is None or self.running + len(self._ready) < self._capacity

    def _accept(self, job: JobRecord, event: lifecycle.Event) -> None:
        self._on_accept(job)
        job.state = event[job.state]
        self.unsettled += 1
        phase = self.phases.open
        job.phase = phase
        phase.unsettled += 1

    def _take(self, job: JobRecord) -> None:
        """Make a job ready that has room, or start it if it need not wait; a submitted one is accepted already."""
        if job.state is None:
            self._accept(job, lifecycle.ACCEPT)
        self._turns = job.turn = self._turns + 1
        if self._ready or not self._idle:
            self._ready[job] = None
        elif job.start_by is None or not self._is_too_late(job):
            self._start(self._idle.pop(), job)

    def _is_too_late(self, job: JobRecord) -> bool:
        """Settle a job that is about to start after its start deadline. Why here too: nobody may have called `tick`."""
        assert job.start_by is not None
        if job.attempt > 0 or self._now <= job.start_by:
            return False
        job.error = self._expired(job)
        self._settle(job, lifecycle.FAIL)
        return True

    def _start_ready(self) -> None:
        idle, ready = self._idle, self._ready
        while idle and ready:
            job, _ = ready.popitem(last=False)
            if job.start_by is None or not self._is_too_late(job):
                self._start(idle.pop(), job)

    def _start(self, slot: Slot, job: JobRecord) -> None:
        self._starts = job.stamp = self._starts + 1
        job.state = lifecycle.START[job.state]
        job.attempt += 1
        job.slot = slot
        slot.job = job
        slot.state = _BUSY
        self.running += 1
        self.instructions.append(_new(StartJob, (slot, job)))

    def arm_timeout(self, job: JobRecord, now: float) -> None:
        """Begin to count a started job's timeout; the engine calls it when it has carried StartJob out."""
        if job.timeout is not None and job.slot is not None:
            self._deadlines.add(now + job.timeout, Alarm.TIMEOUT, job.slot, job.stamp)

    def _fill(self) -> None:
        """Put idle slots and free room to use."""
        if self._ready:
            self._start_ready()
        while self._offers and self._has_room():
            job, _ = self._offers.popitem(last=False)
            is_offer = job.state is None
            self._take(job)
            if is_offer:
                self.instructions.append(_new(AcceptOffer, (job,)))
        if self._n_ahead:
            self._see_to_ahead()

    # What is sent ahead: it stays what it was, in line; its slot alone knows of it, and it goes back to the front.

    def _go_on(self, slot: Slot) -> None:
        """The slot's worker has answered: what was sent to it ahead runs now."""
        job, is_sent, is_cancelled = slot.ahead, slot.is_ahead_sent, slot.is_ahead_cancelled
        assert job is not None
        self._leave_ahead(slot)
        self._idle.remove(slot)
        is_offer = job.state is None
        if is_offer:
            self._accept(job, lifecycle.ACCEPT)
            self._turns = job.turn = self._turns + 1
        self._start(slot, job)
        if is_sent:
            self.instructions.pop()
        if is_offer:
            self.instructions.append(AcceptOffer(job))
        if is_cancelled:
            self._end(job, Verdict.CANCEL)
        self.send_ahead()

    def _see_to_ahead(self) -> None:
        """Let others have what waits behind a slot's job, when one is idle or that job takes long."""
        for slot in sorted((slot for slot in self.slots if slot.ahead is not None), key=_since):
            if (self._idle or self._is_late(slot)) and self._is_back(slot) and self._idle:
                self._fill()  # sees to the others, too
                return
        self.send_ahead()

    def _may_have_ahead(self, slot: Slot) -> bool:
        is_fit = slot.state is _BUSY and slot.job is not None and slot.job.goes_ahead
        return is_fit and slot.ahead is None and not self._is_late(slot)

    def _is_late(self, slot: Slot) -> bool:
        """Tell whether so many jobs have started since the slot's that it seems to take long."""
        return slot.job is not None and self._starts - slot.job.stamp > len(self.slots)

    def _bring_back(self, job: JobRecord) -> bool:
        """Put what was sent ahead, be it the job itself or what is to follow it, back in line; False if it is begun."""
        slot = job.slot if job.state is JobState.RUNNING else self._slot_ahead(job)
        return slot is None or slot.ahead is None or self._is_back(slot)

    def _recall_all(self) -> None:
        for slot in self.slots:
            if slot.ahead is not None:
                self._is_back(slot)

    def _is_back(self, slot: Slot) -> bool:
        """Put what was sent ahead back in line; if its worker has begun it, see to it that it is accepted."""
        job = slot.ahead
        assert job is not None
        assert self._recall is not None
        if slot.is_ahead_cancelled or (slot.is_ahead_sent and not self._recall(slot)):
            if job.state is None:
                self._accept(job, lifecycle.ACCEPT)
                self._turns = job.turn = self._turns + 1
                self._widen(-1)
                self.instructions.append(AcceptOffer(job))
            return False
        self._back_in_line(slot)
        return True

    def _back_in_line(self, slot: Slot) -> None:
        job, is_cancelled = slot.ahead, slot.is_ahead_cancelled
        assert job is not None
        self._leave_ahead(slot)
        if is_cancelled:
            self._settle(job, lifecycle.CANCEL)
        elif job.state is not None:
            self._put_in_front(job)
        elif self.is_refusing or self.broken is not None:
            self.instructions.append(RefuseOffer(job))
        else:
            self._offers[job] = None
            self._offers.move_to_end(job, last=False)

    def _leave_ahead(self, slot: Slot) -> None:
        if slot.ahead is not None and slot.ahead.state is not None:
            self._widen(1)
        slot.ahead, slot.is_ahead_sent, slot.is_ahead_cancelled = None, False, False
        self._n_ahead -= 1

    def _widen(self, by: int) -> None:
        """Have more room, or less: an accepted job that was sent ahead still takes its place among those that wait."""
        if self._capacity is not None:
            self._capacity += by

    def _slot_ahead(self, job: JobRecord) -> Slot | None:
        return next((slot for slot in self.slots if slot.ahead is job), None)

    # What follows the end of an attempt

    def _attempt_failed(self, job: JobRecord, error: BaseException, now: float) -> None:
        job.error = error
        job.returns = 0
        policy = job.retry
        if policy is None or self.broken is not None or not policy.allows(job.attempt, error):
            self._settle(job, lifecycle.FAIL)
            return
        job.state = lifecycle.RETRY[job.state]
        self.retried += 1
        self._pausing[job] = None
        job.due = now + policy.pause(job.attempt, self._draw())
        self._deadlines.add(job.due, Alarm.JOB_DUE, _handle(job), job.stamp)

    def _job_lost(
        self, job: JobRecord, verdict: Verdict | None, error: BaseException, now: float, loss: Loss
    ) -> None:
        if verdict is Verdict.CANCEL:
            self._settle(job, lifecycle.CANCEL)
        elif loss is Loss.NOTHING:
            self._settle(job, lifecycle.SUCCEED)
        elif self.broken is None and (
            loss is Loss.REST or (loss is Loss.UNREAD and verdict is None and job.returns < _MAX_RETURNS)
        ):
            self._return(job, loss)
        else:
            self._attempt_failed(job, error, now)

    def _return(self, job: JobRecord, loss: Loss) -> None:
        """Put an unread job, or the rest of one, back to the front, where such ones keep the order they had."""
        # Why a rest is not counted: each time there is less of it.
        job.returns = job.returns + 1 if loss is Loss.UNREAD else 0
        job.attempt -= 1
        job.state = lifecycle.RETURN[job.state]
        self._put_in_front(job)
        if job.start_by is not None and loss is Loss.UNREAD:
            self._deadlines.add(job.start_by, Alarm.START_DEADLINE, _handle(job))

    def _put_in_front(self, job: JobRecord) -> None:
        before = [other for other in self._ready if other.turn < job.turn]
        self._ready[job] = None
        for one in [job, *reversed(before)]:
            self._ready.move_to_end(one, last=False)

    def _settle(self, job: JobRecord, event: lifecycle.Event) -> None:
        before = job.state
        job.state = after = event[before]
        if before is _SCHEDULED or before is _RETRYING:
            del self._pausing[job]
            self._unfed.discard(job)
        if after is _SUCCEEDED:
            self.succeeded += 1
            job.error = None
        elif after is _FAILED:
            self.failed += 1
        else:
            self.cancelled += 1
        self.unsettled -= 1
        if job.handle is not None:
            _drop_handle(job)
        phase = self.phases.leave(job)
        self.instructions.append(_new(SettleJob, (job, phase.unsettled == 0)))

    def _time_is_up(self, job: JobRecord) -> None:
        instant = self._extended(job)
        if instant is None:
            self._end(job, Verdict.TIMEOUT)
        else:
            self._deadlines.add(instant, Alarm.TIMEOUT, job.slot, job.stamp)

    def _end(self, job: JobRecord, verdict: Verdict) -> None:
        slot = job.slot
        assert slot is not None
        if slot.state is SlotState.BUSY:
            slot.state = SlotState.ENDING
            slot.verdict = verdict
            self.instructions.append(EndWorker(slot))
        elif verdict is Verdict.CANCEL:
            slot.verdict = verdict

    def _job_due(self, job: JobRecord) -> None:
        del self._pausing[job]
        job.state = lifecycle.DUE[job.state]
        self._turns += 1
        job.turn = self._turns
        self._ready[job] = None

    def _start_deadline(self, job: JobRecord) -> None:
        if job.state is None:
            # Why accepted first: the caller gets a tracker that says what became of the job.
            del self._offers[job]
            self._accept(job, lifecycle.ACCEPT)
            job.error = self._expired(job)
            self._settle(job, lifecycle.FAIL)
            self.instructions.append(AcceptOffer(job))
            return
        job.error = self._expired(job)
        self._ready.pop(job, None)
        self._settle(job, lifecycle.FAIL)

    def _refuse_offers(self) -> None:
        if self._n_ahead:
            self._recall_all()
        for job in [job for job in self._offers if job.state is None]:
            del self._offers[job]
            self.instructions.append(RefuseOffer(job))

    def _recycle(self, slot: Slot) -> None:
        """Replace an idle worker that has done its share. Why no pause as after deaths: each one has done some work."""
        self.recycled += 1
        self._idle.remove(slot)
        slot.state = SlotState.VACANT
        self.instructions.append(SendHome(slot))
        self._staff(slot)

    def _staff(self, slot: Slot) -> None:
        if self.broken is None and not self._is_stopping:
            slot.state = SlotState.STARTING
            self.restarts += 1
            self.instructions.append(StartWorker(slot))

    def _restaff(
        self, slot: Slot, before: SlotState, error: BaseException, now: float, *, was_killed: bool
    ) -> None:
        """Replace a worker: at once after a job's death, ever later after deaths without work, never when hopeless."""
        if before is SlotState.STARTING:
            self._killed_starts += was_killed
            self._failed_starts += not was_killed
            n_slots = len(self.slots)
            if self._failed_starts >= max(_MAX_FAILED_STARTS, n_slots) or (
                self._killed_starts >= max(_MAX_KILLED_STARTS, n_slots)
            ):
                self.break_down(error)
        elif before is not SlotState.IDLE or now - slot.ready_at >= _SETTLED_IN:
            self._deaths_in_a_row = 0
            self._staff(slot)
            return
        pause = _respawn_pause(self._deaths_in_a_row)
        self._deaths_in_a_row += 1
        if pause:
            self._deadlines.add(now + pause, Alarm.RESPAWN, slot)
        else:
            self._staff(slot)

    def _is_live(self, alarm: Alarm, subject: Slot | list[JobRecord], stamp: int) -> bool:
        if isinstance(subject, Slot):
            if alarm is Alarm.RESPAWN:
                return subject.state is SlotState.VACANT
            return subject.state is SlotState.BUSY and subject.job is not None and subject.job.stamp == stamp
        if not subject:
            return False
        job = subject[0]
        if alarm is Alarm.JOB_DUE:
            return job in self._pausing and job.stamp == stamp
        return job.attempt == 0 and (
            job in self._offers or job.state in (JobState.SCHEDULED, JobState.QUEUED)
        )


def _handle(job: JobRecord) -> list[JobRecord]:
    """Return what an alarm holds instead of the job, so that a stale alarm does not keep a settled job alive."""
    if job.handle is None:
        job.handle = [job]
    return job.handle


def _since(slot: Slot) -> int:
    """Sort slots by when their jobs were started."""
    return slot.job.stamp if slot.job is not None else 0


def _drop_handle(job: JobRecord) -> None:
    if job.handle is not None:
        job.handle.clear()
        job.handle = None


def _copy_of(error: BaseException) -> BaseException:
    """Return an error of its own for one of several jobs, since each raise adds to an error's traceback."""
    copied = copy.copy(error)
    copied.__cause__ = error.__cause__
    return copied


def _respawn_pause(deaths_in_a_row: int) -> float:
    if deaths_in_a_row == 0:
        return 0.0
    return min(_RESPAWN_PAUSE * 2.0 ** (min(deaths_in_a_row, 16) - 1), _RESPAWN_PAUSE_MAX)
