"""The kernel against a naive model: random interleavings of callers, workers, time, barriers and ruin."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from naive_pool import SETTLED, NaiveJob, NaivePool

from bulkhead import (
    JobCancelled,
    JobTimeout,
    MemoryLimitExceeded,
    RetryPolicy,
    StartDeadlineExceeded,
    Unrecoverable,
    WorkerCrashed,
)
from bulkhead._kernel.phases import Phase
from bulkhead._kernel.records import JobRecord, Loss, SlotState, Usage, Wear
from bulkhead._kernel.scheduler import (
    AcceptOffer,
    EndWorker,
    RefuseOffer,
    Scheduler,
    SendHome,
    SettleJob,
    StartJob,
    StartWorker,
)

# Longest pause in seconds before a worker is replaced: the one thing of C15's bounded rate that the model needs.
RESPAWN_WITHIN = 5.0

ERRORS: dict[str, type[Exception]] = {"value": ValueError, "key": KeyError, "hopeless": Unrecoverable}
RETRY_ON: dict[tuple[str, ...], tuple[type[BaseException], ...]] = {
    ("value", "key", "crash", "timeout", "memory"): (Exception,),
    ("value",): (ValueError,),
    ("crash", "memory"): (WorkerCrashed,),
    ("memory",): (MemoryError,),
    ("timeout",): (JobTimeout,),
}
ENDS: dict[str | None, Exception] = {
    None: WorkerCrashed("gone"),
    "timeout": JobTimeout("too long"),
    "memory": MemoryLimitExceeded("too large"),
}
STATES = {
    "missing": SlotState.VACANT,
    "starting": SlotState.STARTING,
    "idle": SlotState.IDLE,
    "busy": SlotState.BUSY,
    "ending": SlotState.ENDING,
}


class Wish(NamedTuple):
    """What a caller asks for; instants are given in seconds from now."""

    is_submitted: bool
    patient: bool
    delay: float | None
    start_within: float | None
    timeout: float | None
    has_items: bool
    retried_on: tuple[str, ...]
    max_attempts: int
    initial: float


picks = st.integers(0, 11)
moments = st.sampled_from([0.25, 0.5, 1.0, 2.0])
rarely = st.sampled_from([*[False] * 7, True])
losses = st.sampled_from(Loss)
returns = st.sampled_from([Loss.UNREAD, Loss.UNREAD, Loss.UNREAD, Loss.REST])
wishes = st.builds(
    Wish,
    is_submitted=st.booleans(),
    patient=st.booleans(),
    delay=st.one_of(st.none(), st.none(), moments),
    start_within=st.one_of(st.none(), st.none(), moments),
    timeout=st.one_of(st.none(), moments),
    has_items=st.booleans(),
    retried_on=st.sampled_from([(), *RETRY_ON]),
    max_attempts=st.integers(1, 3),
    initial=st.sampled_from([0.0, 0.5, 1.0]),
)


class Barrier:
    """A barrier under way: what the kernel handed out, and which jobs the model says it waits for."""

    def __init__(self, phases: list[Phase], until: int) -> None:
        self.phases = phases
        self.until = until


class KernelAgainstModel(RuleBasedStateMachine):
    """Every stimulus goes to both; every instruction is compared with what the model says must follow."""

    @initialize(
        n_workers=st.integers(1, 3),
        backlog=st.sampled_from([0, 0, 1, 2, None]),
        most_jobs=st.sampled_from([None, None, 1, 2, 5]),
        is_up=st.booleans(),
        wishes=st.lists(wishes, max_size=6),
    )
    def make(
        self, n_workers: int, backlog: int | None, most_jobs: int | None, is_up: bool, wishes: list[Wish]
    ) -> None:
        self.now = 100.0
        self.records: dict[JobRecord, NaiveJob] = {}
        self.model = NaivePool(n_workers, backlog, most_jobs)
        self.barriers: list[Barrier] = []
        self.reported: list[Phase] = []
        self.settled: list[NaiveJob] = []
        self.missing_since: dict[int, float] = {}
        self.entered: list[JobRecord] = []
        self.later: dict[
            NaiveJob, tuple[float | None, float | None]
        ] = {}  # those that were promised; their instants
        self.kernel = Scheduler(
            n_workers,
            backlog,
            keep_failures=1000,
            draw=lambda: 0.5,
            on_accept=self.entered.append,
            expired=lambda job: StartDeadlineExceeded("too late"),
            extended=self.extended,
            wear=None if most_jobs is None else Wear(most_jobs, None),
        )
        self.kernel.begin()
        assert self.kernel.instructions == [StartWorker(slot) for slot in self.kernel.slots]
        self.kernel.instructions.clear()
        if is_up:
            self.all_come_up()
        for wish in wishes:
            self.offer_one(wish)

    # Stimuli from callers

    @precondition(lambda self: not (self.model.is_broken or self.model.is_refusing))
    @rule(wishes=st.lists(wishes, min_size=1, max_size=4))
    def offer(self, wishes: list[Wish]) -> None:
        for wish in wishes:
            self.offer_one(wish)

    @precondition(lambda self: self.model.offers)
    @rule(pick=picks)
    def withdraw(self, pick: int) -> None:
        job = self.model.offers[pick % len(self.model.offers)]
        assert self.kernel.withdraw(self.record_of(job))
        self.model.withdraw(job)
        self.compare()

    @precondition(lambda self: self.known())
    @rule(pick=picks)
    def withdraw_too_late(self, pick: int) -> None:
        known = self.known()
        assert not self.kernel.withdraw(self.record_of(known[pick % len(known)]))
        self.compare()

    @precondition(lambda self: not (self.model.is_broken or self.model.is_refusing))
    @rule(wishes=st.lists(wishes, min_size=1, max_size=3))
    def promise(self, wishes: list[Wish]) -> None:
        for wish in wishes:
            record, job = self.made(wish)
            self.later[job] = record.due, record.start_by
            record.due = record.start_by = job.due = job.start_by = None
            self.kernel.promise(record)
            self.model.promise(job)
            self.compare()

    @precondition(lambda self: self.later)
    @rule(pick=picks)
    def retract(self, pick: int) -> None:
        """Now and then one that is kept, or was retracted before."""
        job = self.pick_later(pick)
        phase = self.kernel.retract(self.record_of(job))
        assert (phase is not None) == (job.stage == "promised")
        self.model.retract(job)
        self.compare()

    @precondition(lambda self: self.later)
    @rule(pick=picks)
    def keep(self, pick: int) -> None:
        """Now and then one that is kept, or was retracted before, or is settled."""
        self.keep_one(self.pick_later(pick))

    @precondition(lambda self: self.later)
    @rule(pick=picks, fails=rarely)
    def feed(self, pick: int, fails: bool) -> None:
        self.feed_one(self.pick_later(pick), fails=fails)

    @precondition(lambda self: self.known())
    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        known = sorted(self.known(), key=lambda job: not job.is_unsettled)
        self.cancel_one(known[pick % len(known)])

    # Stimuli from workers

    @precondition(lambda self: self.workers("starting"))
    @rule(pick=picks)
    def worker_comes_up(self, pick: int) -> None:
        self.come_up(self.pick_worker(pick, "starting"))

    @precondition(lambda self: self.workers("busy"))
    @rule(pick=picks, error=st.sampled_from([None, None, None, *ERRORS]), n_items=st.integers(0, 4))
    def worker_answers(self, pick: int, error: str | None, n_items: int) -> None:
        self.answer(self.pick_worker(pick, "busy"), error, n_items)

    @precondition(lambda self: self.workers("busy", "ending", "idle"))
    @rule(pick=picks)
    def worker_takes_too_much_memory(self, pick: int) -> None:
        worker = self.pick_worker(pick, "busy", "ending", "idle")
        self.kernel.memory_exceeded(self.kernel.slots[worker], self.now)
        self.model.takes_too_much(worker)
        self.compare()

    @precondition(lambda self: self.workers("ending"))
    @rule(pick=picks, error=st.sampled_from([None, *ERRORS]))
    def worker_answers_when_told_to_end(self, pick: int, error: str | None) -> None:
        self.answer(self.pick_worker(pick, "ending"), error)

    @precondition(lambda self: self.workers("starting", "idle", "busy"))
    @rule(pick=picks, loss=losses, was_killed=st.booleans())
    def worker_dies(self, pick: int, loss: Loss, was_killed: bool) -> None:
        self.die(self.pick_worker(pick, "starting", "idle", "busy"), loss, was_killed=was_killed)

    @precondition(lambda self: self.workers("busy"))
    @rule(pick=picks, losses=st.lists(returns, min_size=2, max_size=8))
    def job_loses_one_worker_after_the_other(self, pick: int, losses: list[Loss]) -> None:
        job = self.model.has[self.pick_worker(pick, "busy")]
        assert job is not None
        for loss in losses:
            self.die(self.model.has.index(job), loss)
            self.all_come_up()
            if job not in self.model.has:
                break

    @precondition(lambda self: len(self.workers("busy")) > 1)
    @rule(order=st.permutations(range(3)), losses=st.lists(returns, min_size=3, max_size=3))
    def workers_die_together(self, order: list[int], losses: list[Loss]) -> None:
        busy = self.workers("busy")
        for which, loss in zip(order, losses, strict=True):
            if which < len(busy):
                self.die(busy[which], loss)

    @precondition(lambda self: self.workers("ending"))
    @rule(pick=picks, loss=losses)
    def worker_ends_as_told(self, pick: int, loss: Loss) -> None:
        self.die(self.pick_worker(pick, "ending"), loss)

    @precondition(lambda self: self.workers("busy"))
    @rule(pick=picks, is_late=st.booleans(), is_cancelled=st.booleans(), loss=losses)
    def job_is_given_up_and_its_worker_goes(
        self, pick: int, is_late: bool, is_cancelled: bool, loss: Loss
    ) -> None:
        job = self.model.has[self.pick_worker(pick, "busy")]
        assert job is not None
        if is_late and job.times_out_at is not None:
            self.now = max(self.now, job.times_out_at)
            self.tick()
        if is_cancelled:
            self.cancel_one(job)
        if self.model.workers[self.model.has.index(job)] == "ending":
            self.die(self.model.has.index(job), loss)

    @precondition(lambda self: self.chunks_under_way())
    @rule(pick=picks, seconds=moments, until_alarm=st.booleans())
    def next_item_begins(self, pick: int, seconds: float, until_alarm: bool) -> None:
        """The pool is not told; it finds out when the chunk's time seems to be up."""
        chunks = self.chunks_under_way()
        job = chunks[pick % len(chunks)]
        self.now += seconds
        self.model.item_begins(job, self.now)
        if until_alarm and job.times_out_at is not None:
            self.now = max(self.now, job.times_out_at)
            self.tick()

    # Time

    @rule(seconds=moments)
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.tick()

    @rule(seconds=moments)
    def time_passes_unnoticed(self, seconds: float) -> None:
        """The driver is busy: other news come before the tick."""
        self.now += seconds

    @precondition(lambda self: self.kernel.next_deadline is not None)
    @rule()
    def sleep_until_next_deadline(self) -> None:
        self.now = max(self.now, self.kernel.next_deadline or 0.0)
        self.tick()

    # Barriers, ends

    @precondition(lambda self: len(self.barriers) < 3)
    @rule()
    def begin_barrier(self) -> None:
        before = list(self.kernel.phases.unreported)
        phases = self.kernel.phases.close()
        assert phases == before
        assert self.kernel.phases.open not in phases
        self.barriers.append(Barrier(phases, self.model.phase))
        self.model.phase += 1

    @precondition(lambda self: any(self.is_over(barrier) for barrier in self.barriers))
    @rule()
    def end_barrier(self) -> None:
        barrier = next(barrier for barrier in self.barriers if self.is_over(barrier))
        self.barriers.remove(barrier)
        reported = self.kernel.phases.report(barrier.phases)
        for phase in reported:
            assert phase not in self.reported, "a phase is reported once"
        self.reported += reported
        assert all(phase in self.reported for phase in barrier.phases)

    @precondition(lambda self: len(self.records) > 8 and not self.model.is_refusing)
    @rule(really=rarely)
    def refuse(self, really: bool) -> None:
        if really:
            self.kernel.refuse()
            self.model.refuse()
            self.compare()

    @precondition(lambda self: len(self.records) > 8)
    @rule(really=rarely, losses=st.lists(losses, max_size=3))
    def break_down(self, really: bool, losses: list[Loss]) -> None:
        if really:
            self.give_up(losses)

    # What must be true at every moment

    @invariant()
    def states_agree(self) -> None:
        for record, job in self.records.items():
            expected = None if not job.is_accepted else job.stage
            assert record.state == expected, job
            assert record.attempt == job.attempt, job
        for slot, word in zip(self.kernel.slots, self.model.workers, strict=True):
            assert slot.state is STATES[word]

    @invariant()
    def no_job_is_lost(self) -> None:
        kernel, model = self.kernel, self.model
        unsettled = [self.records[record] for record in kernel.unsettled_jobs()]
        promised = [self.records[record] for record in kernel.promised_jobs()]
        assert promised == model.staged("promised")
        assert len(unsettled) == len(set(unsettled)) == kernel.unsettled - len(promised)
        assert [job for job in unsettled if kernel.is_unfed(self.record_of(job))] == [
            job for job in unsettled if job in model.unfed()
        ]
        assert set(unsettled) == set(model.unsettled())
        assert kernel.running == len(model.staged("running"))
        assert kernel.waiting == len(model.staged("queued"))
        assert kernel.delayed == len(model.staged("scheduled", "retrying"))
        for record, job in self.records.items():
            assert (record.slot is not None and record.slot.job is record) == (job.stage == "running")
        assert [self.records[record] for record in self.entered] == sorted(
            (self.records[record] for record in self.entered), key=self.entered_at
        )

    @invariant()
    def settled_once(self) -> None:
        assert len(self.settled) == len(set(self.settled))
        assert set(self.settled) == set(self.model.staged(*SETTLED))
        kernel, model = self.kernel, self.model
        assert kernel.succeeded == len(model.staged("succeeded"))
        assert kernel.failed == len(model.staged("failed"))
        assert kernel.cancelled == len(model.staged("cancelled"))
        assert kernel.retried == model.retried
        assert kernel.recycled == model.recycled
        for record, job in self.records.items():
            if job.stage in SETTLED:
                assert (record.error is None) == (job.stage == "succeeded")
                assert isinstance(record.error, JobCancelled) == (job.stage == "cancelled")

    @invariant()
    def no_free_worker_while_a_job_waits(self) -> None:
        if self.model.staged("queued"):
            assert not self.workers("idle")
        if self.model.line:
            assert not self.kernel.has_room()

    @invariant()
    def next_deadline_is_right(self) -> None:
        instants = self.model.instants()
        found = self.kernel.next_deadline
        if instants:
            assert found is not None
            assert found <= min(instants)
        if not self.workers("missing"):
            assert found == min(instants, default=None)
        elif not self.model.is_broken:
            assert found is not None, "a missing worker is replaced some time"
            for worker in self.workers("missing"):
                assert found <= self.missing_since[worker] + RESPAWN_WITHIN

    @invariant()
    def barriers_agree(self) -> None:
        for barrier in self.barriers:
            waits_for = [job for job in self.model.jobs if 0 <= job.phase <= barrier.until]
            unreported = [phase for phase in barrier.phases if phase not in self.reported]
            assert sum(phase.unsettled for phase in unreported) == sum(job.is_waited_for for job in waits_for)
            assert all(phase.is_over for phase in barrier.phases) == self.is_over(barrier)
        every = self.kernel.phases.unreported + self.reported
        for counted in SETTLED:
            assert sum(getattr(phase, counted) for phase in every) == len(self.model.staged(counted))
        waited_for = [job for job in self.model.jobs if job.is_waited_for]
        assert sum(phase.unsettled for phase in every) == len(waited_for)
        failures = [self.records[record] for phase in every for record in phase.failures]
        assert sorted(failures, key=lambda job: job.number) == self.model.staged("failed")

    def teardown(self) -> None:
        """Nothing starves: once events stop, workers come up and answer, every job settles and no offer waits."""
        if not hasattr(self, "kernel"):
            return
        if self.records and len(self.records) % 3 == 0:  # also in a pool that is given up at last
            first = len(self.records) // 3 % len(Loss)
            self.give_up([*Loss][first:])
        self.end_promises()
        for _ in range(1000):
            for worker in self.workers("ending"):
                self.die(worker, Loss.ATTEMPT)
            self.all_come_up()
            for worker in self.workers("busy"):
                self.answer(worker, None)
            if not (
                self.model.unsettled() or self.model.offers or self.workers("ending", "starting", "busy")
            ):
                break
            if self.kernel.next_deadline is not None:
                self.sleep_until_next_deadline()
        assert not self.model.unsettled()
        assert not self.model.offers
        self.states_agree()
        self.no_job_is_lost()
        self.settled_once()
        self.barriers_agree()
        assert all(phase.is_over for phase in self.kernel.phases.unreported)

    def end_promises(self) -> None:
        for job in self.model.staged("promised"):
            if len(self.records) % 2:
                self.keep_one(job)
            else:
                assert self.kernel.retract(self.record_of(job)) is not None
                self.model.retract(job)
        for job in self.model.unfed():
            self.feed_one(job)

    # Carrying out

    def compare(self) -> None:
        """Take the kernel's instructions and compare them with what the model expects."""
        expected = self.model.expect()
        by_kind: dict[type, list[Any]] = {}
        for instruction in self.kernel.instructions:
            by_kind.setdefault(type(instruction), []).append(instruction)
        self.check_settled(by_kind.get(SettleJob, []), expected.settled)
        self.kernel.instructions.clear()
        accepted = self.jobs_of(by_kind.get(AcceptOffer, []))
        assert {job.number for job in accepted} == {job.number for job in expected.accepted}
        # Those whose start deadline has passed are accepted only to fail, in the order of their deadlines.
        assert [job for job in accepted if job.stage != "failed"] == [
            job for job in expected.accepted if job.stage != "failed"
        ], "offers are taken in their order"
        assert self.jobs_of(by_kind.get(RefuseOffer, [])) == expected.refused
        assert self.jobs_of(by_kind.get(StartJob, [])) == expected.started, "jobs start in their order"
        for slot, record in by_kind.get(StartJob, []):
            self.model.place(slot.index, self.records[record])
            self.kernel.arm_timeout(record, self.now)
        assert {slot.index for (slot,) in by_kind.get(EndWorker, [])} == {
            self.model.has.index(job) for job in expected.ended
        }
        sent_home = [slot.index for (slot,) in by_kind.get(SendHome, [])]
        assert sent_home == expected.sent_home
        at_once = {slot.index for (slot,) in by_kind.get(StartWorker, [])}
        assert self.model.is_broken or at_once >= set(sent_home), (
            "the place of one sent home is taken at once"
        )
        for (slot,) in by_kind.get(StartWorker, []):
            self.model.staffed(slot.index)
        for worker in self.workers("missing"):
            self.missing_since.setdefault(worker, self.now)
        for worker in self.workers("starting", "idle", "busy", "ending"):
            self.missing_since.pop(worker, None)

    def check_settled(self, found: list[SettleJob], expected: list[NaiveJob]) -> None:
        jobs = self.jobs_of(found)
        assert sorted(jobs, key=lambda job: job.number) == sorted(expected, key=lambda job: job.number)
        for position, (record, phase_is_over) in enumerate(found):
            job = self.records[record]
            if job.phase < self.model.phase:
                later = [other for other in jobs[position + 1 :] if other.phase == job.phase]
                assert phase_is_over == (not later and not self.model.waited_for(job.phase))
        self.settled += jobs

    def made(self, wish: Wish) -> tuple[JobRecord, NaiveJob]:
        policy = None
        if wish.retried_on:
            policy = RetryPolicy(
                wish.max_attempts,
                initial=wish.initial,
                factor=2.0,
                jitter=0.0,
                maximum=1.0,
                retry_on=RETRY_ON[wish.retried_on],
            )
        if wish.is_submitted:
            wish = wish._replace(delay=None, start_within=None)
        record = JobRecord(b"", 0, wish.timeout, policy)
        record.due = None if wish.delay is None else self.now + wish.delay
        # A map has no start deadline, so of a job that has one no part can be done.
        if wish.start_within is not None and not wish.has_items:
            record.start_by = self.now + wish.start_within
        job = NaiveJob(
            len(self.records),
            max_attempts=wish.max_attempts,
            initial=wish.initial,
            factor=2.0,
            maximum=1.0,
            retried_on=wish.retried_on,
            timeout=wish.timeout,
            due=record.due,
            start_by=record.start_by,
            has_items=wish.has_items,
        )
        self.records[record] = job
        return record, job

    def offer_one(self, wish: Wish) -> None:
        record, job = self.made(wish)
        if wish.is_submitted:
            self.kernel.submit(record, self.now)
            self.model.submit(job, self.now)
            self.compare()
            return
        had_room = self.kernel.has_room()
        taken = self.kernel.offer(record, self.now, patient=wish.patient)
        assert taken == self.model.offer(job, self.now, patient=wish.patient)
        if wish.delay is None:
            assert taken == had_room
        self.compare()

    def pick_later(self, pick: int) -> NaiveJob:
        """Pick one of those that were promised, rather one that has not been fed."""
        found = sorted(self.later, key=lambda job: job.is_fed or not job.is_waited_for)
        return found[pick % len(found)]

    def keep_one(self, job: NaiveJob) -> None:
        self.kernel.keep(self.record_of(job), JobCancelled("cancelled by finalize"))
        self.model.keep(job)
        self.compare()

    def feed_one(self, job: NaiveJob, *, fails: bool = False) -> None:
        """As the engine does: keep it first, and feed it if that is still of use."""
        record = self.record_of(job)
        self.keep_one(job)
        assert self.kernel.is_unfed(record) == (job in self.model.unfed())
        if not self.kernel.is_unfed(record):
            return
        due, start_by = self.later[job]
        record.due, record.start_by = due, start_by
        self.kernel.feed(record, self.now, ValueError("cannot be sent") if fails else None)
        self.model.feed(job, self.now, due, start_by, fails=fails)
        self.compare()

    def cancel_one(self, job: NaiveJob) -> None:
        expected = self.model.cancel(job, self.now)
        assert self.kernel.cancel(self.record_of(job), JobCancelled("cancelled"), self.now) == expected
        self.compare()

    def give_up(self, losses: list[Loss]) -> None:
        """Break the pool, and have workers die that were left."""
        self.kernel.break_down(RuntimeError("given up"))
        self.model.break_down()
        self.compare()
        for worker, loss in zip(self.workers("busy", "ending"), losses, strict=False):
            self.die(worker, loss)

    def come_up(self, worker: int) -> None:
        self.kernel.worker_ready(self.kernel.slots[worker], self.now)
        self.model.came_up(worker, self.now)
        self.compare()

    def all_come_up(self) -> None:
        for worker in self.workers("starting"):
            self.come_up(worker)

    def answer(self, worker: int, error: str | None, n_items: int = 1) -> None:
        raised = None if error is None else ERRORS[error](error)
        job = self.model.has[worker]
        n_jobs = n_items if job is not None and job.has_items else 1
        usage = None if self.kernel.wear is None else Usage(self.model.done[worker] + n_jobs, 0)
        self.kernel.attempt_ended(self.kernel.slots[worker], raised, self.now, usage)
        self.model.answered(worker, error, self.now, n_jobs)
        self.compare()

    def die(self, worker: int, loss: Loss, *, was_killed: bool = False) -> None:
        slot = self.kernel.slots[worker]
        job = self.model.has[worker]
        error = ENDS[job.ended_for if job is not None else None]
        if job is not None and not job.has_items and loss in (Loss.REST, Loss.NOTHING):
            loss = Loss.ATTEMPT
        self.kernel.worker_gone(slot, error, self.now, loss=loss, was_killed=was_killed)
        self.model.died(worker, self.now, loss=loss.value, was_killed=was_killed)
        self.compare()

    def extended(self, record: JobRecord) -> float | None:
        """Answer the kernel's question as an engine would, which sees how far the worker is."""
        job = self.records[record]
        assert self.model.workers[self.model.has.index(job)] == "busy", "asked as long as it matters"
        assert job.timeout is not None
        assert job.times_out_at is not None
        assert job.times_out_at <= self.now, "asked when the time is up"
        until = 0.0 if job.item_began is None else job.item_began + job.timeout
        return until if until > self.now else None

    def tick(self) -> None:
        self.kernel.tick(self.now)
        self.model.tick(self.now)
        self.compare()

    def chunks_under_way(self) -> list[NaiveJob]:
        return [job for job in self.model.staged("running") if job.has_items]

    def known(self) -> list[NaiveJob]:
        return [job for job in self.model.jobs if job.is_accepted]

    def workers(self, *words: str) -> list[int]:
        return [index for index, word in enumerate(self.model.workers) if word in words]

    def pick_worker(self, pick: int, *words: str) -> int:
        found = self.workers(*words)
        return found[pick % len(found)]

    def record_of(self, job: NaiveJob) -> JobRecord:
        return list(self.records)[job.number]

    def jobs_of(self, instructions: list[Any]) -> list[NaiveJob]:
        return [self.records[instruction.job] for instruction in instructions]

    def entered_at(self, job: NaiveJob) -> int:
        return self.entered.index(self.record_of(job))

    def is_over(self, barrier: Barrier) -> bool:
        return not any(job.is_waited_for and job.phase <= barrier.until for job in self.model.jobs)


class KernelAgainstModelAtLength(KernelAgainstModel):
    """The same, with many more examples."""


def examples(n: int) -> settings:
    return settings(
        max_examples=n,
        stateful_step_count=60,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


KernelAgainstModel.TestCase.settings = examples(200)
KernelAgainstModelAtLength.TestCase.settings = examples(4_000)
TestKernelAgainstModel = KernelAgainstModel.TestCase
TestKernelAgainstModelAtLength = pytest.mark.slow(
    pytest.mark.timeout(900)(KernelAgainstModelAtLength.TestCase)
)
