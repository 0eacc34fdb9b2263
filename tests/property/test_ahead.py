"""What is sent ahead, in random interleavings with workers that go on by themselves, die, and are told too late.

The model is that of the workers' side: what lies in a worker's pipe, what it has begun, which answers nobody has read.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bulkhead import JobCancelled, JobState, StartDeadlineExceeded, WorkerCrashed
from bulkhead._kernel.lifecycle import SETTLED
from bulkhead._kernel.records import JobRecord, Loss, Slot, SlotState
from bulkhead._kernel.scheduler import (
    AcceptOffer,
    EndWorker,
    RefuseOffer,
    Scheduler,
    SendAhead,
    SettleJob,
    StartJob,
    StartWorker,
)

picks = st.integers(0, 11)


class Part(JobRecord):
    """A job that may be sent ahead; how often it was begun, and how many that came later have started before it."""

    __slots__ = ("begun", "overtaken", "turn_of_offer")

    def __init__(self, turn: int) -> None:
        super().__init__(b"", 0)
        self.turn_of_offer = turn
        self.begun = 0
        self.overtaken = 0


class Chunk(Part):
    goes_ahead = True


class Worker:
    """A process: the message that it is at and the one that was sent ahead, each begun and answered or not."""

    def __init__(self) -> None:
        self.at: Part | None = None
        self.is_read = self.is_answered = False
        self.ahead: Part | None = None
        self.is_ahead_begun = self.is_ahead_answered = False

    def go_on(self) -> None:
        self.at, self.ahead = self.ahead, None
        self.is_read, self.is_answered = self.is_ahead_begun, self.is_ahead_answered
        self.is_ahead_begun = self.is_ahead_answered = False


class WorkersThatGoOn(RuleBasedStateMachine):
    @initialize(n_workers=st.integers(1, 3), backlog=st.sampled_from([0, 0, 1, 2, None]))
    def make(self, n_workers: int, backlog: int | None) -> None:
        self.now = 0.0
        self.room = None if backlog is None else n_workers + backlog
        self.jobs: list[Part] = []
        self.given_up: set[Part] = set()  # withdrawn, refused
        self.settled: list[Part] = []
        self.workers = [Worker() for _ in range(n_workers)]
        self.kernel = Scheduler(
            n_workers,
            backlog,
            keep_failures=100,
            draw=lambda: 0.5,
            on_accept=lambda job: None,
            expired=lambda job: StartDeadlineExceeded("too late"),
            extended=lambda job: None,
            recall=self.recall,
        )
        self.kernel.begin()
        self.carry_out()
        self.all_come_up()

    # The engine's side

    def recall(self, slot: Slot) -> bool:
        worker = self.workers[slot.index]
        assert worker.ahead is slot.ahead, "asked for what was sent"
        if worker.is_ahead_begun:
            return False
        worker.ahead = None
        return True

    def carry_out(self) -> None:
        instructions: list[Any] = self.kernel.instructions
        for one in instructions:
            if isinstance(one, StartJob):
                worker = self.workers[one.slot.index]
                assert worker.at is None
                assert worker.ahead is None
                worker.at, worker.is_read, worker.is_answered = one.job, False, False
                self.started(one.job)
            elif isinstance(one, SendAhead) and one.slot.ahead is one.job:
                worker = self.workers[one.slot.index]
                assert worker.at is not None
                assert worker.ahead is None
                worker.ahead = one.job
                one.slot.is_ahead_sent = True
            elif isinstance(one, SettleJob):
                self.settled.append(one.job)
            elif isinstance(one, RefuseOffer):
                self.given_up.add(one.job)
            else:
                assert isinstance(one, (StartWorker, AcceptOffer, EndWorker, SendAhead))
        instructions.clear()

    def started(self, job: Part) -> None:
        for other in self.jobs:
            if other.turn_of_offer < job.turn_of_offer and self.is_waiting(other):
                other.overtaken += 1

    def is_waiting(self, job: Part) -> bool:
        is_open = job not in self.given_up and job.state in (None, JobState.QUEUED)
        return is_open and not any(w.ahead is job and w.is_ahead_begun for w in self.workers)

    def read_one(self, worker: Worker, error: Exception | None = None) -> None:
        slot = self.slot_of(worker)
        assert slot.state is SlotState.BUSY, "one that is told to end has lost its say"
        worker.at = None
        ahead = slot.ahead if slot.is_ahead_sent else None
        self.kernel.attempt_ended(slot, error, self.now)
        if ahead is not None and slot.job is ahead:
            worker.go_on()
            self.started(ahead)

    def slot_of(self, worker: Worker) -> Slot:
        return self.kernel.slots[self.workers.index(worker)]

    def has_told(self, worker: Worker) -> bool:
        return worker.at is not None and worker.is_answered and self.slot_of(worker).state is SlotState.BUSY

    def busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.at is not None]

    def all_come_up(self) -> None:
        for slot in self.kernel.slots:
            if slot.state is SlotState.STARTING:
                self.workers[slot.index] = Worker()
                self.kernel.worker_ready(slot, self.now)
                self.carry_out()

    # Callers

    @rule(goes_ahead=st.lists(st.booleans(), min_size=1, max_size=4))
    def offer(self, goes_ahead: list[bool]) -> None:
        for goes in goes_ahead:
            if self.kernel.is_refusing or self.kernel.broken is not None:
                return
            job = (Chunk if goes else Part)(len(self.jobs))
            self.jobs.append(job)
            self.kernel.offer(job, self.now)
            if goes:
                self.kernel.send_ahead()
            self.carry_out()

    @precondition(lambda self: self.jobs)
    @rule(pick=picks)
    def withdraw(self, pick: int) -> None:
        job = self.jobs[-1 - pick % len(self.jobs)]
        was_open = job.state is None and job not in self.given_up
        is_gone = self.kernel.withdraw(job)
        self.carry_out()
        if is_gone:
            assert was_open
            assert not job.begun
            self.given_up.add(job)
        else:
            assert job.state is not None or job in self.given_up

    @precondition(lambda self: self.jobs)
    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        job = self.jobs[-1 - pick % len(self.jobs)]
        state = job.state
        is_cancelled = self.kernel.cancel(job, JobCancelled("cancelled"), self.now)
        self.carry_out()
        if state is JobState.QUEUED:
            assert is_cancelled
        elif state is JobState.RUNNING and not is_cancelled:
            worker = next(worker for worker in self.workers if worker.at is job)
            assert worker.is_answered, "refused only when it has ended"

    @precondition(lambda self: len(self.jobs) > 6)
    @rule(is_broken=st.booleans(), really=st.sampled_from([False, False, False, True]))
    def refuse(self, is_broken: bool, really: bool) -> None:
        if really:
            (self.kernel.break_down(RuntimeError("given up")) if is_broken else self.kernel.refuse())
            self.carry_out()

    # Workers

    @precondition(lambda self: any(not worker.is_answered for worker in self.busy()))
    @rule(pick=picks)
    def ends_its_job(self, pick: int) -> None:
        found = [worker for worker in self.busy() if not worker.is_answered]
        self.end_job(found[pick % len(found)])

    def end_job(self, worker: Worker) -> None:
        assert worker.at is not None
        if not worker.is_read:
            worker.at.begun += 1
        worker.is_read = worker.is_answered = True

    @precondition(lambda self: any(not worker.is_read for worker in self.busy()))
    @rule(pick=picks)
    def begins_its_job(self, pick: int) -> None:
        found = [worker for worker in self.busy() if not worker.is_read]
        worker = found[pick % len(found)]
        assert worker.at is not None
        worker.is_read = True
        worker.at.begun += 1

    @precondition(lambda self: any(w.is_answered and w.ahead and not w.is_ahead_begun for w in self.workers))
    @rule(pick=picks)
    def goes_on_by_itself(self, pick: int) -> None:
        found = [w for w in self.workers if w.is_answered and w.ahead and not w.is_ahead_begun]
        worker = found[pick % len(found)]
        assert worker.ahead is not None
        worker.is_ahead_begun = True
        worker.ahead.begun += 1

    @precondition(lambda self: any(worker.is_ahead_begun for worker in self.workers))
    @rule(pick=picks)
    def ends_what_it_went_on_with(self, pick: int) -> None:
        found = [worker for worker in self.workers if worker.is_ahead_begun]
        found[pick % len(found)].is_ahead_answered = True

    @precondition(lambda self: any(worker.is_answered for worker in self.busy()))
    @rule(order=st.permutations(range(3)), n=st.integers(1, 3))
    def answers_are_read(self, order: list[int], n: int) -> None:
        """Also several in one go, before anything is done about them."""
        for index in order[:n]:
            if index < len(self.workers):
                worker = self.workers[index]
                while self.has_told(worker):
                    self.read_one(worker)
        self.carry_out()

    @precondition(lambda self: self.busy())
    @rule(pick=picks)
    def dies(self, pick: int) -> None:
        busy = self.busy()
        self.die(busy[pick % len(busy)])

    def die(self, worker: Worker) -> None:
        while self.has_told(worker):
            self.read_one(worker)  # its last words
        self.carry_out()
        slot = self.slot_of(worker)
        loss = Loss.ATTEMPT if worker.at is None or worker.is_read else Loss.UNREAD
        self.workers[slot.index] = Worker()
        self.kernel.worker_gone(slot, WorkerCrashed("gone"), self.now, loss=loss)
        self.carry_out()

    @rule()
    def workers_come_up(self) -> None:
        self.now += 10.0
        self.kernel.tick(self.now)
        self.carry_out()
        self.all_come_up()

    # What must be true at every moment

    @invariant()
    def each_is_begun_once_and_settled_once(self) -> None:
        assert len(self.settled) == len(set(self.settled))
        assert set(self.settled) == {job for job in self.jobs if job.state in SETTLED}
        for job in self.jobs:
            assert job.begun <= 1
            if job in self.given_up:
                assert not job.begun
                assert job.state is None
        assert self.kernel.unsettled == len(self.kernel.unsettled_jobs())
        assert set(self.kernel.unsettled_jobs()) == {
            job for job in self.jobs if job.state is not None and job.state not in SETTLED
        }

    @invariant()
    def nothing_waits_behind_a_busy_worker_while_another_is_idle(self) -> None:
        # An accepted job that was begun ahead takes its room until the answer before it, which is there, is read.
        is_told = not any(worker.is_ahead_begun for worker in self.workers)
        if is_told and any(slot.state is SlotState.IDLE for slot in self.kernel.slots):
            assert not any(self.is_waiting(job) for job in self.jobs)

    @invariant()
    def no_more_are_accepted_than_there_is_room_for(self) -> None:
        # Those are as good as running, on workers that are done with the job before.
        n_begun = sum(worker.is_ahead_begun for worker in self.workers)
        if self.room is not None:
            assert self.kernel.running + self.kernel.waiting <= self.room + n_begun
        assert self.kernel.running == sum(slot.job is not None for slot in self.kernel.slots)

    @invariant()
    def who_lies_with_a_busy_worker_is_overtaken_by_few(self) -> None:
        n = len(self.workers)
        for job in self.jobs:
            assert job.overtaken <= 3 * n + 2, job.overtaken

    def teardown(self) -> None:
        """Once events stop and workers answer, every job settles and no offer waits."""
        if not hasattr(self, "kernel"):
            return
        for _ in range(200):
            for worker in self.busy():
                if self.slot_of(worker).state is SlotState.ENDING:
                    self.die(worker)
                    continue
                self.end_job(worker)
                self.read_one(worker)
                self.carry_out()
            self.workers_come_up()
        assert all(job.state in SETTLED or job in self.given_up for job in self.jobs)
        self.each_is_begun_once_and_settled_once()


WorkersThatGoOn.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestWorkersThatGoOn = WorkersThatGoOn.TestCase
