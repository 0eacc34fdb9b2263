"""Each decision of the kernel by a plain example; tests/property runs them in all orders."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from bulkhead import (
    JobCancelled,
    JobState,
    JobTimeout,
    MemoryLimitExceeded,
    PoolBroken,
    RetryPolicy,
    StartDeadlineExceeded,
    Unrecoverable,
    WorkerCrashed,
)
from bulkhead._kernel.records import JobRecord, Loss, Slot, SlotState, Usage, Verdict, Wear
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

CRASH = WorkerCrashed("gone")
TOO_LARGE = MemoryLimitExceeded("too large")
TEN_JOBS = Wear(max_jobs=10, max_rss_bytes=None)
TWICE = RetryPolicy(2, initial=1.0, jitter=0.0)

GOES_BACK = pytest.mark.parametrize("loss", [Loss.UNREAD, Loss.REST])


def never(job: JobRecord) -> None:
    """Give no job more time."""


def unstaffed(
    n_workers: int = 1,
    backlog: int | None = 0,
    draw: float = 0.5,
    keep_failures: int = 100,
    extended: Callable[[JobRecord], float | None] = never,
    wear: Wear | None = None,
) -> Scheduler:
    kernel = Scheduler(
        n_workers,
        backlog,
        keep_failures=keep_failures,
        draw=lambda: draw,
        on_accept=lambda job: None,
        expired=lambda job: StartDeadlineExceeded("too late"),
        extended=extended,
        wear=wear,
    )
    kernel.begin()
    return kernel


def staffed(n_workers: int = 1, backlog: int | None = 0, **options: Any) -> Scheduler:
    kernel = unstaffed(n_workers, backlog, **options)
    for slot in kernel.slots:
        kernel.worker_ready(slot, 0.0)
    kernel.instructions.clear()
    return kernel


def a_job(
    *,
    timeout: float | None = None,
    retry: RetryPolicy | None = None,
    due: float | None = None,
    start_by: float | None = None,
) -> JobRecord:
    job = JobRecord(b"", 0, timeout, retry)
    job.due, job.start_by = due, start_by
    return job


def offered(kernel: Scheduler, count: int = 1, now: float = 0.0, **options: Any) -> list[JobRecord]:
    jobs = [a_job(**options) for _ in range(count)]
    for job in jobs:
        kernel.offer(job, now)
    return jobs


def offered_one(kernel: Scheduler, now: float = 0.0, **options: Any) -> JobRecord:
    return offered(kernel, 1, now, **options)[0]


def slot_of(job: JobRecord) -> Slot:
    assert job.slot is not None
    return job.slot


def taken(kernel: Scheduler, kind: type) -> list[Any]:
    """Return the instructions of one kind, and take all out."""
    found = [instruction for instruction in kernel.instructions if type(instruction) is kind]
    kernel.instructions.clear()
    return found


def started(kernel: Scheduler) -> list[JobRecord]:
    return [instruction.job for instruction in taken(kernel, StartJob)]


def settled(kernel: Scheduler) -> list[JobRecord]:
    return [instruction.job for instruction in taken(kernel, SettleJob)]


class Record(JobRecord):
    """One whose end can be watched."""

    __slots__ = ("__weakref__",)


# Room and order


def test_each_slot_gets_a_worker_at_the_beginning() -> None:
    kernel = unstaffed(3)
    assert [slot.index for (slot,) in taken(kernel, StartWorker)] == [0, 1, 2]
    assert kernel.restarts == 0


def test_a_job_starts_at_once_when_a_worker_is_idle() -> None:
    kernel = staffed(2)
    job = offered_one(kernel)
    assert started(kernel) == [job]
    assert job.state is JobState.RUNNING
    assert job.attempt == 1


def test_jobs_that_are_accepted_before_a_worker_is_up_start_in_order_when_it_is() -> None:
    kernel = unstaffed(2)
    jobs = offered(kernel, 2)
    assert started(kernel) == []
    for slot in kernel.slots:
        kernel.worker_ready(slot, 1.0)
    assert started(kernel) == jobs


@pytest.mark.parametrize(("n_workers", "backlog"), [(1, 0), (3, 0), (1, 2), (2, 5)])
def test_as_many_jobs_are_accepted_as_there_are_workers_and_places_in_the_backlog(
    n_workers: int, backlog: int
) -> None:
    kernel = staffed(n_workers, backlog)
    room = n_workers + backlog
    answers = [kernel.offer(a_job(), 0.0, patient=False) for _ in range(room + 2)]
    assert answers == [True] * room + [False] * 2
    assert (kernel.running, kernel.waiting) == (n_workers, backlog)


def test_an_unbounded_backlog_takes_everything() -> None:
    kernel = staffed(1, None)
    assert all(kernel.offer(a_job(), 0.0, patient=False) for _ in range(1000))
    assert (kernel.running, kernel.waiting) == (1, 999)


def test_an_impatient_offer_that_is_turned_away_leaves_nothing_behind() -> None:
    kernel = staffed(1)
    first = offered_one(kernel)
    kernel.instructions.clear()
    job = a_job(start_by=1.0)
    assert not kernel.offer(job, 0.0, patient=False)
    assert job.state is None
    assert kernel.next_deadline is None
    kernel.attempt_ended(slot_of(first), None, 1.0)
    assert started(kernel) == []
    assert kernel.offer(job, 0.5, patient=False), "the same job can be offered again"


def test_jobs_start_in_the_order_of_their_acceptance() -> None:
    kernel = staffed(1, None)
    jobs = offered(kernel, 100)
    order = started(kernel)
    for _ in jobs:
        kernel.attempt_ended(kernel.slots[0], None, 1.0)
        order += started(kernel)
    assert order == jobs


def test_freed_room_goes_to_the_caller_that_waits_longest() -> None:
    kernel = staffed(1)
    running, *waiting = offered(kernel, 4)
    order = []
    for job in [running, *waiting[:2]]:
        kernel.instructions.clear()
        kernel.attempt_ended(slot_of(job), None, 1.0)
        order += [accepted.job for accepted in taken(kernel, AcceptOffer)]
    assert order == waiting


def test_a_newcomer_does_not_pass_the_callers_that_wait() -> None:
    kernel = staffed(1)
    offered(kernel, 2)
    assert not kernel.has_room()
    assert not kernel.offer(a_job(), 0.0, patient=False)


def test_a_withdrawn_offer_is_not_accepted_later() -> None:
    kernel = staffed(1)
    running, withdrawn, other = offered(kernel, 3)
    assert kernel.withdraw(withdrawn)
    assert not kernel.withdraw(withdrawn)
    kernel.attempt_ended(slot_of(running), None, 1.0)
    assert withdrawn.state is None
    assert other.state is JobState.RUNNING


def test_an_accepted_job_cannot_be_withdrawn() -> None:
    kernel = staffed(1)
    job = offered_one(kernel)
    assert not kernel.withdraw(job)
    assert job.state is JobState.RUNNING


# Delays


def test_a_delayed_job_takes_no_worker_and_no_room_before_it_is_due() -> None:
    kernel = staffed(1)
    delayed = offered_one(kernel, due=5.0)
    assert delayed.state is JobState.SCHEDULED
    assert kernel.next_deadline == 5.0
    other = offered_one(kernel)
    assert other.state is JobState.RUNNING
    kernel.attempt_ended(slot_of(other), None, 1.0)
    kernel.tick(4.9)
    assert delayed.state is JobState.SCHEDULED
    kernel.tick(5.0)
    assert delayed.state is JobState.RUNNING
    assert kernel.next_deadline is None


def test_a_job_that_was_due_before_it_was_offered_is_an_ordinary_one() -> None:
    kernel = staffed(1)
    job = offered_one(kernel, now=6.0, due=5.0)
    assert job.state is JobState.RUNNING


def test_delayed_jobs_become_ready_in_the_order_of_their_instants_then_of_their_acceptance() -> None:
    kernel = staffed(1, None)
    late, *same = [offered_one(kernel, due=due) for due in (3.0, 2.0, 2.0, 2.0)]
    kernel.tick(10.0)
    assert kernel.unsettled_jobs() == [*same, late]


def test_jobs_that_come_due_are_accepted_already_and_may_exceed_the_room() -> None:
    kernel = staffed(1)
    offered(kernel, 3, due=1.0)
    waiting = offered(kernel, 2)
    kernel.tick(1.0)
    assert kernel.waiting == 3
    assert waiting[1].state is None


# Start deadlines


def test_a_queued_job_that_does_not_start_in_time_fails() -> None:
    kernel = staffed(1, 1)
    running, late = offered(kernel, 2, start_by=5.0)
    kernel.instructions.clear()
    kernel.tick(4.9)
    assert late.state is JobState.QUEUED
    kernel.tick(5.0)
    assert settled(kernel) == [late]
    assert isinstance(late.error, StartDeadlineExceeded)
    assert late.attempt == 0
    assert running.state is JobState.RUNNING
    assert kernel.next_deadline is None


def test_an_offer_that_is_not_accepted_in_time_is_accepted_and_failed_once() -> None:
    kernel = staffed(1)
    running, late = offered(kernel, 2, start_by=5.0)
    kernel.instructions.clear()
    kernel.tick(5.0)
    assert [type(instruction) for instruction in kernel.instructions] == [SettleJob, AcceptOffer]
    assert isinstance(late.error, StartDeadlineExceeded)
    kernel.instructions.clear()
    kernel.attempt_ended(slot_of(running), None, 6.0)
    assert settled(kernel) == [running]


def test_a_delayed_job_can_miss_its_start_deadline() -> None:
    kernel = staffed(1)
    job = offered_one(kernel, due=9.0, start_by=5.0)
    kernel.tick(5.0)
    assert job.state is JobState.FAILED
    assert kernel.delayed == 0
    assert kernel.next_deadline is None


def test_a_job_is_never_started_after_its_start_deadline_even_if_nobody_ticked() -> None:
    kernel = staffed(1, 1)
    running, late = offered(kernel, 2, start_by=5.0)
    kernel.attempt_ended(slot_of(running), None, 50.0)
    assert isinstance(late.error, StartDeadlineExceeded)
    past = offered_one(kernel, now=51.0, start_by=50.5)
    assert isinstance(past.error, StartDeadlineExceeded)
    assert kernel.running == 0
    assert kernel.unsettled == 0


def test_a_job_that_started_in_time_may_be_retried_after_its_start_deadline() -> None:
    kernel = staffed(1)
    job = offered_one(kernel, start_by=1.0, retry=TWICE)
    kernel.attempt_ended(slot_of(job), ValueError(), 2.0)
    kernel.tick(3.0)
    assert job.state is JobState.RUNNING


@pytest.mark.parametrize("gone_at", [1.0, 5.0, 7.0])
def test_a_job_that_came_back_unread_still_has_its_start_deadline(gone_at: float) -> None:
    kernel = staffed(2)
    _, job = offered(kernel, 2, start_by=5.0)
    assert kernel.next_deadline is None, "both have started"
    kernel.worker_gone(slot_of(job), CRASH, gone_at, loss=Loss.UNREAD)
    assert kernel.next_deadline == 5.0
    kernel.tick(max(gone_at, 5.0))
    assert isinstance(job.error, StartDeadlineExceeded)
    assert kernel.next_deadline is None


# Timeouts


def test_a_job_that_runs_too_long_has_its_worker_ended_and_fails_when_that_is_gone() -> None:
    kernel = staffed(1)
    job = offered_one(kernel, timeout=2.0)
    kernel.arm_timeout(job, 1.0)
    assert kernel.next_deadline == 3.0
    kernel.instructions.clear()
    kernel.tick(3.0)
    assert kernel.instructions == [EndWorker(slot_of(job))]
    assert job.state is JobState.RUNNING
    kernel.instructions.clear()
    error = JobTimeout("too long")
    kernel.worker_gone(slot_of(job), error, 3.5)
    assert settled(kernel) == [job]
    assert job.error is error


def test_an_answer_of_a_worker_that_was_told_to_end_does_not_count() -> None:
    kernel = staffed(1)
    job = offered_one(kernel, timeout=2.0)
    kernel.arm_timeout(job, 0.0)
    kernel.tick(2.0)
    kernel.attempt_ended(slot_of(job), None, 2.1)
    assert job.state is JobState.RUNNING
    kernel.worker_gone(slot_of(job), JobTimeout("too long"), 2.2)
    assert job.state is JobState.FAILED


def test_the_timeout_of_an_ended_attempt_does_not_hit_the_next_job_of_its_worker() -> None:
    kernel = staffed(1)
    first = offered_one(kernel, timeout=2.0)
    kernel.arm_timeout(first, 0.0)
    kernel.attempt_ended(slot_of(first), None, 1.0)
    second = offered_one(kernel, timeout=5.0)
    kernel.arm_timeout(second, 1.0)
    assert kernel.next_deadline == 6.0
    kernel.instructions.clear()
    kernel.tick(2.0)
    assert kernel.instructions == []
    assert second.state is JobState.RUNNING


def test_the_slot_of_a_timed_out_job_counts_as_taken_until_the_process_is_gone() -> None:
    kernel = staffed(1)
    job = offered_one(kernel, timeout=1.0)
    kernel.arm_timeout(job, 0.0)
    kernel.tick(1.0)
    assert not kernel.has_room()
    kernel.worker_gone(slot_of(job), JobTimeout("too long"), 2.0)
    assert kernel.has_room()


# Timeouts that are extended


class Extensions:
    """Answers when a job's time is up, one after the other, then None; notes which jobs it was asked about."""

    def __init__(self, *instants: float) -> None:
        self._instants = list(instants)
        self.asked: list[JobRecord] = []

    def __call__(self, job: JobRecord) -> float | None:
        self.asked.append(job)
        return self._instants.pop(0) if self._instants else None


def test_a_job_whose_time_is_extended_runs_on_until_that_is_over_too() -> None:
    extensions = Extensions(5.0, 6.5)
    kernel = staffed(1, extended=extensions)
    job = offered_one(kernel, timeout=2.0)
    kernel.arm_timeout(job, 1.0)
    kernel.instructions.clear()
    for asked, (now, until) in enumerate([(3.0, 5.0), (5.0, 6.5)], 1):
        kernel.tick(now - 0.1)
        assert len(extensions.asked) == asked - 1, "nobody is asked before the time is up"
        kernel.tick(now)
        assert extensions.asked == [job] * asked
        assert kernel.next_deadline == until
        assert kernel.instructions == []
        assert slot_of(job).verdict is None
    kernel.tick(6.5)
    assert kernel.instructions == [EndWorker(slot_of(job))]
    assert slot_of(job).verdict is Verdict.TIMEOUT
    assert kernel.next_deadline is None
    kernel.worker_gone(slot_of(job), JobTimeout("too long"), 7.0)
    assert job.state is JobState.FAILED
    assert isinstance(job.error, JobTimeout)


def test_the_answer_of_a_job_whose_time_was_extended_counts() -> None:
    kernel = staffed(1, extended=Extensions(5.0))
    job = offered_one(kernel, timeout=2.0)
    kernel.arm_timeout(job, 0.0)
    kernel.tick(2.0)
    kernel.attempt_ended(slot_of(job), None, 4.9)
    assert job.state is JobState.SUCCEEDED
    assert kernel.next_deadline is None


def test_an_extension_that_is_over_already_is_asked_for_again_at_once() -> None:
    extensions = Extensions(3.0, 9.9, 11.0)
    kernel = staffed(1, extended=extensions)
    job = offered_one(kernel, timeout=2.0)
    kernel.arm_timeout(job, 0.0)
    kernel.tick(10.0)
    assert extensions.asked == [job] * 3
    assert kernel.next_deadline == 11.0
    assert job.state is JobState.RUNNING


def test_nobody_is_asked_to_extend_the_time_of_a_job_that_has_none_is_over_or_is_to_be_ended() -> None:
    extensions = Extensions()
    kernel = staffed(4, extended=extensions)
    endless = offered_one(kernel)
    over, cancelled, late = offered(kernel, 3, timeout=2.0)
    for job in (endless, over, cancelled, late):
        kernel.arm_timeout(job, 0.0)
    kernel.attempt_ended(slot_of(over), None, 1.0)
    kernel.cancel(cancelled, JobCancelled("cancelled"), 1.0)
    for now in (2.0, 3.0, 100.0):
        kernel.tick(now)
    assert extensions.asked == [late]


def test_an_extension_does_not_hit_the_next_job_of_its_worker() -> None:
    extensions = Extensions(5.0)
    kernel = staffed(1, extended=extensions)
    first = offered_one(kernel, timeout=2.0)
    kernel.arm_timeout(first, 0.0)
    kernel.tick(2.0)
    kernel.attempt_ended(slot_of(first), None, 3.0)
    second = offered_one(kernel, 3.0, timeout=9.0)
    kernel.arm_timeout(second, 3.0)
    assert kernel.next_deadline == 12.0
    kernel.tick(5.0)
    assert extensions.asked == [first]
    assert second.state is JobState.RUNNING


@pytest.mark.parametrize("is_extended", [False, True])
def test_the_time_of_a_job_whose_worker_died_does_not_run_on_when_its_rest_is_with_the_same_worker(
    is_extended: bool,
) -> None:
    extensions = Extensions(*([5.0] if is_extended else []))
    kernel = staffed(1, extended=extensions)
    job = offered_one(kernel, timeout=4.0)
    kernel.arm_timeout(job, 0.0)
    kernel.tick(4.0 if is_extended else 3.0)
    kernel.worker_gone(kernel.slots[0], CRASH, 4.1, loss=Loss.REST)
    kernel.worker_ready(kernel.slots[0], 4.2)
    assert kernel.next_deadline is None, "it counts from the sending"
    kernel.arm_timeout(job, 4.3)
    assert kernel.next_deadline == 8.3
    kernel.tick(5.0)
    assert extensions.asked == [job] * is_extended
    kernel.tick(8.3)
    assert slot_of(job).verdict is Verdict.TIMEOUT


def test_a_time_that_is_extended_again_and_again_does_not_fill_the_heap() -> None:
    kernel = staffed(1, extended=Extensions(*(float(instant) for instant in range(2, 2000))))
    job = offered_one(kernel, timeout=1.0)
    kernel.arm_timeout(job, 0.0)
    for now in range(1, 1000):
        kernel.tick(float(now))
        assert len(kernel._deadlines) == 1
    assert job.state is JobState.RUNNING


# Cancellation


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.SCHEDULED, JobState.RETRYING])
def test_a_job_that_waits_is_cancelled_at_once(state: JobState) -> None:
    kernel = staffed(1, 1)
    if state is JobState.RETRYING:
        job = offered_one(kernel, retry=TWICE)
        kernel.attempt_ended(slot_of(job), ValueError(), 1.0)
    elif state is JobState.SCHEDULED:
        job = offered_one(kernel, due=5.0)
    else:
        job = offered(kernel, 2)[1]
    assert job.state is state
    kernel.instructions.clear()
    error = JobCancelled("cancelled")
    assert kernel.cancel(job, error, 1.0)
    assert settled(kernel) == [job]
    assert job.state is JobState.CANCELLED
    assert job.error is error
    assert job not in kernel.unsettled_jobs()
    assert kernel.next_deadline is None


def test_a_running_job_is_cancelled_by_ending_its_worker() -> None:
    kernel = staffed(1)
    job = offered_one(kernel, retry=TWICE)
    kernel.instructions.clear()
    assert kernel.cancel(job, JobCancelled("cancelled"), 1.0)
    assert kernel.instructions == [EndWorker(slot_of(job))]
    kernel.worker_gone(slot_of(job), CRASH, 2.0)
    assert job.state is JobState.CANCELLED
    assert isinstance(job.error, JobCancelled)


def test_a_cancellation_beats_the_timeout_that_came_before_it() -> None:
    kernel = staffed(1)
    job = offered_one(kernel, timeout=1.0, retry=TWICE)
    kernel.arm_timeout(job, 0.0)
    kernel.tick(1.0)
    assert kernel.cancel(job, JobCancelled("cancelled"), 1.1)
    kernel.worker_gone(slot_of(job), JobTimeout("too long"), 1.5)
    assert job.state is JobState.CANCELLED
    assert isinstance(job.error, JobCancelled)


def test_a_settled_job_cannot_be_cancelled() -> None:
    kernel = staffed(1)
    job = offered_one(kernel)
    kernel.attempt_ended(slot_of(job), None, 1.0)
    assert not kernel.cancel(job, JobCancelled("cancelled"), 1.0)
    assert job.state is JobState.SUCCEEDED
    assert job.error is None


def test_cancelling_a_waiting_job_makes_room_for_a_caller_that_waits() -> None:
    kernel = staffed(1, 1)
    _, queued, waiting = offered(kernel, 3)
    kernel.instructions.clear()
    kernel.cancel(queued, JobCancelled("cancelled"), 1.0)
    assert taken(kernel, AcceptOffer) == [AcceptOffer(waiting)]


# Retries


def test_a_failed_attempt_is_tried_again_after_a_pause_in_which_the_worker_is_free() -> None:
    kernel = staffed(1)
    job = offered_one(kernel, retry=TWICE)
    error = ValueError("once")
    kernel.attempt_ended(slot_of(job), error, 10.0)
    assert job.state is JobState.RETRYING
    assert job.error is error
    assert (kernel.running, kernel.delayed, kernel.retried) == (0, 1, 1)
    assert kernel.has_room()
    kernel.tick(10.9)
    assert job.state is JobState.RETRYING
    kernel.tick(11.0)
    assert job.state is JobState.RUNNING
    assert job.attempt == 2
    kernel.attempt_ended(slot_of(job), None, 12.0)
    assert job.state is JobState.SUCCEEDED
    assert job.error is None


def test_pauses_grow_by_the_factor_within_the_jitter() -> None:
    policy = RetryPolicy(4, initial=1.0, factor=2.0, jitter=0.5)
    kernel = staffed(1, draw=1.0)
    job = offered_one(kernel, retry=policy)
    now, pauses = 0.0, []
    for _ in range(3):
        kernel.attempt_ended(slot_of(job), ValueError(), now)
        pauses.append(job.due - now)
        now = job.due
        kernel.tick(now)
    assert pauses == [1.5, 3.0, 6.0]


def test_the_last_attempt_decides() -> None:
    kernel = staffed(1)
    job = offered_one(kernel, retry=RetryPolicy(3, initial=0.0))
    for attempt in (1, 2, 3):
        assert job.attempt == attempt
        kernel.attempt_ended(slot_of(job), ValueError(attempt), 0.0)
        kernel.tick(0.0)
    assert job.state is JobState.FAILED
    assert job.error.args == (3,)
    assert kernel.retried == 2


@pytest.mark.parametrize(
    "error", [Unrecoverable("useless"), KeyError("not asked for")], ids=["unrecoverable", "other type"]
)
def test_an_error_that_the_policy_does_not_allow_fails_the_job_at_once(error: Exception) -> None:
    kernel = staffed(1)
    job = offered_one(kernel, retry=RetryPolicy(5, retry_on=(ValueError, Unrecoverable)))
    kernel.attempt_ended(slot_of(job), error, 1.0)
    assert job.state is JobState.FAILED
    assert job.error is error


def test_a_crash_and_a_timeout_are_retried_when_the_policy_says_so() -> None:
    kernel = staffed(2)
    crashing, hanging = offered(kernel, 2, timeout=1.0, retry=RetryPolicy(2, retry_on=(JobTimeout,)))
    for job in (crashing, hanging):
        kernel.arm_timeout(job, 0.0)
    kernel.worker_gone(slot_of(crashing), CRASH, 0.5)
    kernel.tick(1.0)
    kernel.worker_gone(slot_of(hanging), JobTimeout("too long"), 1.5)
    assert crashing.state is JobState.FAILED
    assert hanging.state is JobState.RETRYING


def test_a_retry_waits_behind_the_jobs_that_became_ready_before_its_pause_was_over() -> None:
    kernel = staffed(1, None)
    again, running, waiting = offered(kernel, 3, retry=TWICE)
    kernel.attempt_ended(slot_of(again), ValueError(), 0.0)
    kernel.tick(1.0)
    assert kernel.unsettled_jobs() == [running, waiting, again]


# Workers that go


def test_a_death_fails_the_job_of_that_worker_only_and_the_worker_is_replaced() -> None:
    kernel = staffed(2)
    dying, other = offered(kernel, 2)
    slot = slot_of(dying)
    kernel.instructions.clear()
    kernel.worker_gone(slot, CRASH, 1.0)
    assert kernel.instructions == [SettleJob(dying, False), StartWorker(slot)]
    assert dying.error is CRASH
    assert other.state is JobState.RUNNING
    assert kernel.restarts == 1


def test_a_death_while_idle_costs_no_job() -> None:
    kernel = staffed(2)
    kernel.worker_gone(kernel.slots[1], CRASH, 10.0)
    jobs = offered(kernel, 2)
    assert [job.state for job in jobs] == [JobState.RUNNING, JobState.QUEUED]
    kernel.worker_ready(kernel.slots[1], 11.0)
    assert jobs[1].state is JobState.RUNNING


@GOES_BACK
def test_a_job_that_was_not_read_or_has_a_rest_goes_back_to_the_front_and_the_attempt_does_not_count(
    loss: Loss,
) -> None:
    kernel = staffed(1, None)
    back, next_one = offered(kernel, 2)
    slot = slot_of(back)
    kernel.instructions.clear()
    kernel.worker_gone(slot, CRASH, 1.0, loss=loss)
    assert kernel.instructions == [StartWorker(slot)]
    assert back.state is JobState.QUEUED
    assert back.attempt == 0
    assert back.error is None
    assert back.slot is None
    assert (kernel.running, kernel.waiting, kernel.failed, kernel.retried) == (0, 2, 0, 0)
    kernel.worker_ready(slot, 2.0)
    assert back.state is JobState.RUNNING
    assert back.attempt == 1
    assert next_one.state is JobState.QUEUED


@GOES_BACK
def test_jobs_that_go_back_keep_their_order(loss: Loss) -> None:
    kernel = staffed(3, None)
    jobs = offered(kernel, 5)
    for index in (1, 0, 2):
        kernel.worker_gone(slot_of(jobs[index]), CRASH, 1.0, loss=loss)
    assert kernel.unsettled_jobs() == jobs


@pytest.mark.parametrize("losses", list(itertools.product([Loss.UNREAD, Loss.REST], repeat=3)))
def test_jobs_that_were_not_read_and_rests_keep_their_order_among_each_other(
    losses: tuple[Loss, ...],
) -> None:
    for deaths in itertools.permutations(range(3)):
        kernel = staffed(3, None)
        jobs = offered(kernel, 5)
        for index in deaths:
            kernel.worker_gone(slot_of(jobs[index]), CRASH, 1.0, loss=losses[index])
        assert kernel.unsettled_jobs() == jobs


@GOES_BACK
def test_jobs_that_go_back_keep_their_order_when_one_of_them_has_been_started_again(loss: Loss) -> None:
    kernel = staffed(2, None)
    first, second = offered(kernel, 2)
    slots = [slot_of(first), slot_of(second)]
    kernel.worker_gone(slots[0], CRASH, 1.0, loss=loss)
    kernel.worker_ready(slots[0], 2.0)
    kernel.worker_gone(slots[1], CRASH, 3.0, loss=loss)
    kernel.worker_gone(slots[0], CRASH, 3.0, loss=loss)
    assert kernel.unsettled_jobs() == [first, second]


@GOES_BACK
def test_a_job_that_goes_back_moves_to_another_worker_that_is_idle(loss: Loss) -> None:
    kernel = staffed(2)
    job = offered_one(kernel)
    dying = slot_of(job)
    kernel.instructions.clear()
    kernel.worker_gone(dying, CRASH, 1.0, loss=loss)
    assert slot_of(job) is not dying
    assert kernel.instructions == [StartWorker(dying), StartJob(slot_of(job), job)]


@GOES_BACK
def test_a_job_that_goes_back_is_not_passed_by_a_caller_that_waits_for_room(loss: Loss) -> None:
    kernel = staffed(1)
    back, offer = offered(kernel, 2)
    kernel.worker_gone(kernel.slots[0], CRASH, 1.0, loss=loss)
    assert not kernel.has_room()
    kernel.worker_ready(kernel.slots[0], 2.0)
    assert back.state is JobState.RUNNING
    assert offer.state is None


@GOES_BACK
def test_a_barrier_waits_for_a_job_that_has_gone_back(loss: Loss) -> None:
    kernel = staffed(1)
    job = offered_one(kernel)
    (phase,) = kernel.phases.close()
    kernel.instructions.clear()
    kernel.worker_gone(kernel.slots[0], CRASH, 1.0, loss=loss)
    assert settled(kernel) == []
    assert phase.unsettled == 1
    kernel.worker_ready(kernel.slots[0], 2.0)
    kernel.instructions.clear()
    kernel.attempt_ended(kernel.slots[0], None, 3.0)
    assert kernel.instructions == [SettleJob(job, True)]
    assert (phase.unsettled, phase.succeeded, phase.failed) == (0, 1, 0)


@GOES_BACK
def test_going_back_gives_no_attempt_of_a_retried_job_away(loss: Loss) -> None:
    kernel = staffed(1)
    job = offered_one(kernel, retry=TWICE)
    kernel.attempt_ended(kernel.slots[0], ValueError(), 0.0)
    kernel.tick(1.0)
    for _ in range(3):
        assert job.attempt == 2
        kernel.worker_gone(kernel.slots[0], CRASH, 1.0, loss=loss)
        assert job.attempt == 1
        kernel.worker_ready(kernel.slots[0], 1.0)
    kernel.worker_gone(kernel.slots[0], CRASH, 2.0)
    assert job.state is JobState.FAILED
    assert job.attempt == 2
    assert kernel.retried == 1


def test_the_rest_of_a_job_goes_back_as_often_as_it_takes() -> None:
    kernel = staffed(1)
    job = offered_one(kernel, retry=TWICE)
    for number in range(100):
        kernel.worker_gone(slot_of(job), CRASH, float(number), loss=Loss.REST)
        assert job.state is JobState.QUEUED
        kernel.worker_ready(kernel.slots[0], float(number))
    assert job.attempt == 1
    assert kernel.restarts == 100
    kernel.attempt_ended(slot_of(job), None, 100.0)
    assert (kernel.succeeded, kernel.retried) == (1, 0)


def test_a_job_that_goes_back_unread_again_and_again_counts_as_crashed() -> None:
    kernel = staffed(1)
    job = offered_one(kernel)
    deaths = 0
    while job.state is not JobState.FAILED:
        kernel.worker_gone(slot_of(job), CRASH, 1.0, loss=Loss.UNREAD)
        deaths += 1
        kernel.worker_ready(kernel.slots[0], 1.0)
        assert deaths < 10
    assert deaths == 4
    assert job.error is CRASH


def test_unread_returns_are_counted_anew_after_an_attempt_that_was_read() -> None:
    kernel = staffed(1)
    job = offered_one(kernel, retry=RetryPolicy(2, initial=0.0))
    for _ in range(2):
        for _ in range(3):
            kernel.worker_gone(kernel.slots[0], CRASH, 1.0, loss=Loss.UNREAD)
            assert job.state is JobState.QUEUED
            kernel.worker_ready(kernel.slots[0], 1.0)
        attempt = job.attempt
        kernel.attempt_ended(kernel.slots[0], ValueError(), 1.0)
        kernel.tick(1.0)
    assert attempt == 2
    assert isinstance(job.error, ValueError)


def test_unread_returns_are_counted_anew_after_a_part_was_done() -> None:
    kernel = staffed(1)
    job = offered_one(kernel)
    for loss in [*[Loss.UNREAD] * 3, Loss.REST, *[Loss.UNREAD] * 3, Loss.REST, *[Loss.UNREAD] * 3]:
        kernel.worker_gone(slot_of(job), CRASH, 1.0, loss=loss)
        assert job.state is JobState.QUEUED
        kernel.worker_ready(kernel.slots[0], 1.0)
    kernel.worker_gone(slot_of(job), CRASH, 1.0, loss=Loss.UNREAD)
    assert job.state is JobState.FAILED


def test_a_job_whose_worker_dies_when_all_of_it_is_done_has_succeeded() -> None:
    kernel = staffed(1)
    job, offer = offered(kernel, 2, retry=TWICE)
    slot = slot_of(job)
    (phase,) = kernel.phases.close()
    kernel.instructions.clear()
    kernel.worker_gone(slot, CRASH, 1.0, loss=Loss.NOTHING)
    assert kernel.instructions == [SettleJob(job, True), StartWorker(slot), AcceptOffer(offer)]
    assert job.state is JobState.SUCCEEDED
    assert job.error is None
    assert job.slot is None
    assert (kernel.succeeded, kernel.failed, kernel.retried) == (1, 0, 0)
    assert (phase.succeeded, phase.failed, phase.failures) == (1, 0, [])
    assert slot.state is SlotState.STARTING
    kernel.worker_ready(slot, 2.0)
    assert offer.state is JobState.RUNNING


def test_a_retried_job_that_is_done_when_its_worker_dies_forgets_the_error_of_its_first_attempt() -> None:
    kernel = staffed(1)
    job = offered_one(kernel, retry=TWICE)
    kernel.attempt_ended(kernel.slots[0], ValueError(), 0.0)
    kernel.tick(1.0)
    assert isinstance(job.error, ValueError)
    kernel.worker_gone(kernel.slots[0], CRASH, 2.0, loss=Loss.NOTHING)
    assert job.state is JobState.SUCCEEDED
    assert job.error is None
    assert job.attempt == 2


def test_the_rest_of_a_timed_out_job_goes_back_without_an_error() -> None:
    kernel = staffed(1, None)
    job, other = offered(kernel, 2, timeout=1.0, retry=TWICE)
    kernel.arm_timeout(job, 0.0)
    kernel.tick(1.0)
    kernel.worker_gone(kernel.slots[0], JobTimeout("too long"), 1.5, loss=Loss.REST)
    assert kernel.unsettled_jobs() == [job, other]
    assert (job.state, job.attempt, job.error) == (JobState.QUEUED, 0, None)
    assert (kernel.failed, kernel.retried) == (0, 0)
    kernel.worker_ready(kernel.slots[0], 2.0)
    kernel.worker_gone(kernel.slots[0], CRASH, 2.1, loss=Loss.UNREAD)
    assert job.state is JobState.QUEUED, "a worker's verdict ends with the worker"
    kernel.worker_ready(kernel.slots[0], 2.2)
    kernel.attempt_ended(kernel.slots[0], None, 3.0)
    assert job.state is JobState.SUCCEEDED


def test_a_timed_out_job_of_which_nothing_is_left_has_succeeded() -> None:
    kernel = staffed(1)
    job = offered_one(kernel, timeout=1.0, retry=TWICE)
    kernel.arm_timeout(job, 0.0)
    kernel.tick(1.0)
    kernel.worker_gone(kernel.slots[0], JobTimeout("too long"), 1.5, loss=Loss.NOTHING)
    assert job.state is JobState.SUCCEEDED
    assert job.error is None


def test_a_timed_out_job_that_was_not_read_has_run_too_long() -> None:
    kernel = staffed(1)
    job = offered_one(kernel, timeout=1.0)
    kernel.arm_timeout(job, 0.0)
    kernel.tick(1.0)
    kernel.worker_gone(kernel.slots[0], JobTimeout("too long"), 1.5, loss=Loss.UNREAD)
    assert job.state is JobState.FAILED
    assert isinstance(job.error, JobTimeout)


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("loss", Loss)
def test_a_job_that_was_cancelled_while_it_ran_is_cancelled_however_much_of_it_is_done(
    loss: Loss, is_late: bool
) -> None:
    kernel = staffed(1)
    job = offered_one(kernel, timeout=1.0, retry=TWICE)
    kernel.arm_timeout(job, 0.0)
    if is_late:
        kernel.tick(1.0)
    error = JobCancelled("cancelled")
    kernel.cancel(job, error, 1.1)
    kernel.instructions.clear()
    kernel.worker_gone(kernel.slots[0], CRASH, 2.0, loss=loss)
    assert kernel.instructions == [SettleJob(job, True), StartWorker(kernel.slots[0])]
    assert job.state is JobState.CANCELLED
    assert job.error is error
    assert kernel.waiting == kernel.delayed == kernel.unsettled == 0


def test_the_rest_of_a_job_can_be_cancelled_while_it_waits() -> None:
    kernel = staffed(1)
    job = offered_one(kernel)
    kernel.worker_gone(kernel.slots[0], CRASH, 1.0, loss=Loss.REST)
    kernel.instructions.clear()
    assert kernel.cancel(job, JobCancelled("cancelled"), 1.5)
    assert settled(kernel) == [job]
    kernel.worker_ready(kernel.slots[0], 2.0)
    assert started(kernel) == []


# Pools that break


def test_a_pool_whose_workers_die_at_start_in_a_row_is_given_up() -> None:
    kernel = unstaffed(1, None)
    waiting = offered(kernel, 2)
    delayed = offered_one(kernel, due=1000.0)
    starts, now = 0, 0.0
    while kernel.broken is None:
        starts += len(taken(kernel, StartWorker))
        kernel.worker_gone(kernel.slots[0], PoolBroken("cannot start"), now)
        if kernel.slots[0].state is SlotState.VACANT:
            now = kernel.next_deadline
            kernel.tick(now)
    assert starts == 3
    assert now <= 1.0
    assert all(isinstance(job.error, PoolBroken) for job in [*waiting, delayed])
    assert kernel.unsettled == 0
    kernel.tick(1e9)
    assert taken(kernel, StartWorker) == []
    assert kernel.next_deadline is None


def test_a_wide_pool_is_not_given_up_before_each_slot_has_been_tried() -> None:
    kernel = unstaffed(16)
    for slot in kernel.slots[:15]:
        kernel.worker_gone(slot, CRASH, 0.0)
    assert kernel.broken is None
    kernel.worker_gone(kernel.slots[15], CRASH, 0.0)
    assert kernel.broken is CRASH


def test_workers_that_are_killed_from_outside_while_they_come_up_are_given_many_more_tries() -> None:
    kernel = unstaffed(1)
    slot, now, deaths = kernel.slots[0], 0.0, 0
    while kernel.broken is None:
        kernel.worker_gone(slot, CRASH, now, was_killed=True)
        deaths += 1
        if slot.state is SlotState.VACANT:
            now = kernel.next_deadline
            kernel.tick(now)
    assert deaths == 50
    assert now > 100.0, "at a bounded rate"


def test_one_worker_that_comes_up_is_enough_not_to_give_the_pool_up() -> None:
    kernel = unstaffed(2)
    failing, healthy = kernel.slots
    now = 0.0
    for _ in range(50):
        while failing.state is not SlotState.STARTING:
            assert kernel.next_deadline is not None
            now = kernel.next_deadline
            kernel.tick(now)
        kernel.worker_gone(failing, CRASH, now)
        if healthy.state is SlotState.STARTING:
            kernel.worker_ready(healthy, now)
        kernel.worker_gone(healthy, CRASH, now + 2.0)
        kernel.worker_ready(healthy, now + 2.0)
    assert kernel.broken is None


def test_workers_that_come_up_and_die_idle_are_replaced_at_a_bounded_rate() -> None:
    kernel = staffed(1)
    slot, now, starts = kernel.slots[0], 0.0, 0
    while now < 600.0:
        kernel.worker_gone(slot, CRASH, now)
        while slot.state is SlotState.VACANT:
            assert kernel.next_deadline is not None
            now = kernel.next_deadline
            kernel.tick(now)
        starts += len(taken(kernel, StartWorker))
        kernel.worker_ready(slot, now)
    assert kernel.broken is None
    assert starts <= 600 / 5 + 10


def test_a_job_that_is_done_ends_the_series_of_early_deaths() -> None:
    kernel = staffed(1)
    slot, now = kernel.slots[0], 0.0
    for _ in range(5):
        kernel.worker_gone(slot, CRASH, now)
        if slot.state is SlotState.VACANT:
            now = kernel.next_deadline
            kernel.tick(now)
        kernel.worker_ready(slot, now)
    job = offered_one(kernel, now)
    kernel.attempt_ended(slot_of(job), None, now)
    kernel.worker_gone(slot, CRASH, now)
    assert slot.state is SlotState.STARTING


def test_a_broken_pool_fails_what_waits_and_lets_what_runs_end() -> None:
    kernel = staffed(1, 1)
    running, queued, waiting = offered(kernel, 3, retry=TWICE)
    kernel.instructions.clear()
    cause = PoolBroken("given up")
    kernel.break_down(cause)
    assert kernel.instructions == [RefuseOffer(waiting), SettleJob(queued, False)]
    assert waiting.state is None
    assert running.state is JobState.RUNNING
    kernel.attempt_ended(slot_of(running), ValueError(), 1.0)
    assert running.state is JobState.FAILED
    assert kernel.broken is cause
    kernel.break_down(PoolBroken("again"))
    assert kernel.broken is cause


def test_each_job_of_a_broken_pool_gets_an_error_of_its_own() -> None:
    kernel = unstaffed(2)
    jobs = offered(kernel, 2)
    cause = PoolBroken("given up", pool=1)
    cause.__cause__ = OSError("no memory")
    kernel.break_down(cause)
    assert jobs[0].error is not jobs[1].error
    for job in jobs:
        assert str(job.error) == "given up"
        assert job.error.pool == 1
        assert job.error.__cause__ is cause.__cause__


@GOES_BACK
@pytest.mark.parametrize("is_late", [False, True])
def test_a_broken_pool_takes_no_job_back(loss: Loss, is_late: bool) -> None:
    kernel = staffed(1)
    job = offered_one(kernel, timeout=1.0, retry=RetryPolicy(9))
    kernel.arm_timeout(job, 0.0)
    if is_late:
        kernel.tick(1.0)
    kernel.break_down(PoolBroken("given up"))
    kernel.instructions.clear()
    kernel.worker_gone(slot_of(job), CRASH, 1.0, loss=loss)
    assert kernel.instructions == [SettleJob(job, True)]
    assert job.state is JobState.FAILED
    assert job.error is CRASH
    assert kernel.unsettled == 0


def test_the_rest_of_a_job_that_waits_when_the_pool_breaks_fails_with_it() -> None:
    kernel = staffed(1)
    job = offered_one(kernel)
    kernel.worker_gone(slot_of(job), CRASH, 1.0, loss=Loss.REST)
    kernel.instructions.clear()
    kernel.break_down(PoolBroken("given up"))
    assert settled(kernel) == [job]
    assert isinstance(job.error, PoolBroken)


@pytest.mark.parametrize("is_late", [False, True])
def test_a_job_that_is_done_when_its_worker_dies_has_succeeded_in_a_broken_pool_too(is_late: bool) -> None:
    kernel = staffed(1)
    job = offered_one(kernel, timeout=1.0)
    kernel.arm_timeout(job, 0.0)
    if is_late:
        kernel.tick(1.0)
    kernel.break_down(PoolBroken("given up"))
    kernel.instructions.clear()
    kernel.worker_gone(slot_of(job), CRASH, 1.0, loss=Loss.NOTHING)
    assert kernel.instructions == [SettleJob(job, True)]
    assert job.state is JobState.SUCCEEDED
    assert job.error is None


def test_ruin_forgets_everything_and_names_the_callers_that_wait() -> None:
    kernel = staffed(1, 1)
    _, _, waiting = offered(kernel, 3)
    phase = kernel.phases.open
    assert kernel.ruin(PoolBroken("ruined")) == [waiting]
    assert kernel.unsettled_jobs() == []
    assert kernel.instructions == []
    assert phase.is_over
    assert isinstance(kernel.broken, PoolBroken)


# Ends


def test_a_refusing_pool_sends_waiting_callers_away_and_finishes_what_it_accepted() -> None:
    kernel = staffed(1)
    running = offered_one(kernel, retry=TWICE)
    delayed = offered_one(kernel, due=5.0)
    waiting = offered_one(kernel)
    kernel.instructions.clear()
    kernel.refuse()
    assert kernel.instructions == [RefuseOffer(waiting)]
    kernel.attempt_ended(slot_of(running), ValueError(), 1.0)
    for now in (2.0, 5.0):
        kernel.tick(now)
        kernel.attempt_ended(kernel.slots[0], None, now)
    assert running.state is delayed.state is JobState.SUCCEEDED


@GOES_BACK
def test_a_refusing_pool_takes_back_what_it_has_accepted(loss: Loss) -> None:
    kernel = staffed(1)
    job = offered_one(kernel)
    kernel.refuse()
    kernel.worker_gone(slot_of(job), CRASH, 1.0, loss=loss)
    kernel.worker_ready(kernel.slots[0], 2.0)
    kernel.attempt_ended(slot_of(job), None, 3.0)
    assert job.state is JobState.SUCCEEDED


def test_a_stopped_pool_replaces_no_worker() -> None:
    kernel = staffed(2)
    job = offered_one(kernel)
    kernel.instructions.clear()
    kernel.stop()
    kernel.worker_gone(slot_of(job), CRASH, 5.0)
    kernel.worker_gone(kernel.slots[0], CRASH, 5.0)
    kernel.tick(1000.0)
    assert taken(kernel, StartWorker) == []


# Recycling


@pytest.mark.parametrize(
    ("wear", "fresh", "worn"),
    [
        (TEN_JOBS, Usage(9, 10**12), Usage(10, 0)),
        (TEN_JOBS, Usage(9, 0), Usage(25, 0)),
        (Wear(None, 1000), Usage(10**9, 1000), Usage(1, 1001)),
        (Wear(10, 1000), Usage(9, 1000), Usage(1, 1001)),
        (Wear(10, 1000), Usage(9, 1000), Usage(10, 0)),
    ],
)
def test_a_worker_that_has_done_or_takes_enough_is_sent_home_after_its_answer_and_another_is_started(
    wear: Wear, fresh: Usage, worn: Usage
) -> None:
    kernel = staffed(wear=wear)
    first, second = offered(kernel, 2)
    slot = slot_of(first)
    kernel.attempt_ended(slot, None, 1.0, fresh)
    assert taken(kernel, SendHome) == []
    assert slot.job is second

    kernel.attempt_ended(slot, None, 2.0, worn)
    assert kernel.instructions == [
        SettleJob(second, phase_is_over=True),
        SendHome(slot),
        StartWorker(slot),
    ]
    assert second.state is JobState.SUCCEEDED
    assert slot.state is SlotState.STARTING
    assert (kernel.recycled, kernel.restarts) == (1, 1)
    assert kernel.next_deadline is None


def test_the_next_job_waits_for_the_worker_that_takes_the_place_and_counts_no_attempt_before() -> None:
    kernel = staffed(2, backlog=1, wear=TEN_JOBS)
    first, second, third = offered(kernel, 3)
    kernel.attempt_ended(slot_of(first), None, 1.0, Usage(10, 0))
    assert kernel.running == 1
    assert third.state is JobState.QUEUED
    kernel.instructions.clear()
    kernel.worker_ready(kernel.slots[third_slot(kernel)], 1.5)
    assert started(kernel) == [third]
    assert (third.attempt, kernel.running) == (1, 2)
    assert second.state is JobState.RUNNING


def third_slot(kernel: Scheduler) -> int:
    (slot,) = (slot for slot in kernel.slots if slot.state is SlotState.STARTING)
    return slot.index


def test_a_worker_is_recycled_after_a_failed_attempt_as_well_and_the_retry_goes_to_any() -> None:
    kernel = staffed(wear=TEN_JOBS)
    job = offered_one(kernel, retry=TWICE)
    slot = slot_of(job)
    kernel.attempt_ended(slot, ValueError("no luck"), 1.0, Usage(10, 0))
    assert job.state is JobState.RETRYING
    assert taken(kernel, SendHome) == [SendHome(slot)]
    kernel.worker_ready(slot, 1.1)
    kernel.tick(2.0)
    assert started(kernel) == [job]


def test_an_answer_without_usage_recycles_nobody() -> None:
    kernel = staffed(wear=TEN_JOBS)
    job = offered_one(kernel)
    kernel.attempt_ended(slot_of(job), None, 1.0)
    assert taken(kernel, SendHome) == []
    assert kernel.slots[0].state is SlotState.IDLE


def test_a_worker_that_was_told_to_end_is_not_recycled_by_its_late_answer() -> None:
    kernel = staffed(wear=TEN_JOBS)
    job = offered_one(kernel)
    slot = slot_of(job)
    kernel.cancel(job, JobCancelled("cancelled"), 1.0)
    kernel.instructions.clear()
    kernel.attempt_ended(slot, None, 1.1, Usage(10, 0))
    assert kernel.instructions == []
    assert slot.state is SlotState.ENDING


def test_a_caller_that_waits_for_room_is_accepted_while_a_worker_is_being_replaced() -> None:
    kernel = staffed(wear=TEN_JOBS)
    first, second = offered(kernel, 2)
    kernel.attempt_ended(slot_of(first), None, 1.0, Usage(10, 0))
    assert taken(kernel, AcceptOffer) == [AcceptOffer(second)]
    assert second.state is JobState.QUEUED


def test_a_stopped_or_broken_pool_sends_worn_workers_home_and_starts_none() -> None:
    for give_up in (lambda kernel: kernel.stop(), lambda kernel: kernel.break_down(CRASH)):
        kernel = staffed(wear=TEN_JOBS)
        job = offered_one(kernel)
        slot = slot_of(job)
        give_up(kernel)
        kernel.attempt_ended(slot, None, 1.0, Usage(10, 0))
        assert [type(one) for one in kernel.instructions[-2:]] == [SettleJob, SendHome]
        assert slot.state is SlotState.VACANT
        assert kernel.next_deadline is None


def test_recycled_workers_are_replaced_without_a_pause_however_many_there_are() -> None:
    kernel = staffed(wear=Wear(1, None))
    for number in range(100):
        job = offered_one(kernel, now=float(number))
        kernel.attempt_ended(slot_of(job), None, float(number), Usage(1, 0))
        assert taken(kernel, StartWorker) == [StartWorker(kernel.slots[0])]
        kernel.worker_ready(kernel.slots[0], float(number))
    assert (kernel.recycled, kernel.restarts, kernel.succeeded) == (100, 100, 100)


def test_a_pool_whose_second_generation_does_not_come_up_is_given_up() -> None:
    kernel = staffed(wear=TEN_JOBS)
    first, second = offered(kernel, 2)
    kernel.attempt_ended(slot_of(first), None, 1.0, Usage(10, 0))
    now = 1.0
    while kernel.broken is None:
        kernel.worker_gone(kernel.slots[0], PoolBroken("no licence"), now)
        assert now < 10.0
        now += 1.0
        kernel.tick(now)
    assert first.state is JobState.SUCCEEDED
    assert second.state is JobState.FAILED
    assert str(second.error) == "no licence"


# Memory


def test_a_job_that_takes_too_much_memory_has_its_worker_ended_and_fails_when_that_is_gone() -> None:
    kernel = staffed()
    job = offered_one(kernel)
    slot = slot_of(job)
    kernel.memory_exceeded(slot, 1.0)
    assert kernel.instructions[-1] == EndWorker(slot)
    assert slot.verdict is Verdict.MEMORY
    assert job.state is JobState.RUNNING
    kernel.worker_gone(slot, TOO_LARGE, 1.1)
    assert (job.state, job.error) == (JobState.FAILED, TOO_LARGE)
    assert taken(kernel, StartWorker) == [StartWorker(slot)]


@pytest.mark.parametrize("retried", [MemoryLimitExceeded, WorkerCrashed, MemoryError, Exception])
def test_a_job_that_took_too_much_memory_is_retried_where_the_policy_names_it_or_crashes(
    retried: type[Exception],
) -> None:
    kernel = staffed()
    job = offered_one(kernel, retry=RetryPolicy(2, initial=1.0, jitter=0.0, retry_on=(retried,)))
    slot = slot_of(job)
    kernel.memory_exceeded(slot, 1.0)
    kernel.worker_gone(slot, TOO_LARGE, 1.1)
    assert job.state is JobState.RETRYING


def test_memory_is_held_against_a_worker_only_while_it_has_a_job_and_once() -> None:
    kernel = staffed(2)
    job = offered_one(kernel)
    busy = slot_of(job)
    (idle,) = (slot for slot in kernel.slots if slot is not busy)
    kernel.instructions.clear()
    kernel.memory_exceeded(idle, 1.0)
    assert kernel.instructions == []
    kernel.memory_exceeded(busy, 1.0)
    kernel.memory_exceeded(busy, 1.1)
    assert kernel.instructions == [EndWorker(busy)]


def test_a_timeout_does_not_follow_an_excess_and_a_cancellation_beats_it() -> None:
    kernel = staffed(2)
    late, cancelled = offered(kernel, 2, timeout=2.0)
    for job in (late, cancelled):
        kernel.arm_timeout(job, 0.0)
        kernel.memory_exceeded(slot_of(job), 1.0)
    kernel.tick(5.0)
    kernel.cancel(cancelled, JobCancelled("cancelled"), 5.0)
    for slot in kernel.slots:
        kernel.worker_gone(slot, TOO_LARGE, 6.0)
    assert (late.state, late.error) == (JobState.FAILED, TOO_LARGE)
    assert cancelled.state is JobState.CANCELLED


def test_the_rest_of_a_chunk_whose_item_took_too_much_memory_goes_back() -> None:
    kernel = staffed()
    job = offered_one(kernel)
    kernel.memory_exceeded(slot_of(job), 1.0)
    kernel.worker_gone(kernel.slots[0], TOO_LARGE, 1.1, loss=Loss.REST)
    assert (job.state, job.attempt) == (JobState.QUEUED, 0)


# Barriers


def test_a_barrier_waits_for_what_was_accepted_before_it_and_for_nothing_else() -> None:
    kernel = staffed(2)
    before = offered_one(kernel)
    (phase,) = kernel.phases.close()
    after = offered_one(kernel)
    kernel.instructions.clear()
    kernel.attempt_ended(slot_of(after), None, 1.0)
    assert not phase.is_over
    kernel.attempt_ended(slot_of(before), None, 2.0)
    assert phase.is_over
    assert kernel.instructions == [SettleJob(after, True), SettleJob(before, True)]
    assert (phase.succeeded, phase.failed, phase.cancelled) == (1, 0, 0)


def test_a_barrier_waits_for_retries_and_delayed_jobs() -> None:
    kernel = staffed(1)
    job = offered_one(kernel, retry=TWICE)
    delayed = offered_one(kernel, due=50.0)
    (phase,) = kernel.phases.close()
    kernel.attempt_ended(slot_of(job), ValueError(), 1.0)
    assert phase.unsettled == 2
    kernel.tick(2.0)
    kernel.attempt_ended(slot_of(job), None, 3.0)
    assert not phase.is_over
    kernel.tick(50.0)
    kernel.attempt_ended(slot_of(delayed), None, 51.0)
    assert phase.is_over


def test_an_offer_that_is_accepted_after_the_barrier_was_called_is_not_waited_for() -> None:
    kernel = staffed(1)
    before, offer = offered(kernel, 2)
    (phase,) = kernel.phases.close()
    kernel.attempt_ended(slot_of(before), None, 1.0)
    assert offer.state is JobState.RUNNING
    assert phase.is_over


def test_two_barriers_report_each_phase_once() -> None:
    kernel = staffed(2)
    first = offered_one(kernel)
    one = kernel.phases.close()
    second = offered_one(kernel)
    two = kernel.phases.close()
    for job in (first, second):
        kernel.attempt_ended(slot_of(job), ValueError(), 1.0)
    assert [phase.failures for phase in kernel.phases.report(two)] == [[first], [second]]
    assert kernel.phases.report(one) == []
    assert len(kernel.phases.unreported) == 1


def test_a_phase_counts_every_failure_and_remembers_a_bounded_number() -> None:
    kernel = staffed(1, None, keep_failures=3)
    jobs = offered(kernel, 5)
    for _ in jobs:
        kernel.attempt_ended(kernel.slots[0], ValueError(), 1.0)
    phase = kernel.phases.open
    assert phase.failed == 5
    assert phase.failures == jobs[:3]


# Bounds


def test_alarms_of_a_million_ended_jobs_would_not_pile_up() -> None:
    kernel = staffed(1)
    for number in range(5_000):
        now = float(number)
        job = offered_one(kernel, now, timeout=1e6, start_by=now + 1e6)
        kernel.arm_timeout(job, now)
        kernel.attempt_ended(slot_of(job), None, now)
        kernel.instructions.clear()
    assert len(kernel._deadlines) <= 512


@pytest.mark.parametrize("fate", ["answered", "withdrawn", "missed", "cancelled", "came back", "done"])
def test_the_kernel_keeps_no_job_alive_that_is_over(fate: str) -> None:
    kernel = staffed(1, 1, extended=Extensions(50.0))
    blocking = offered(kernel, 2) if fate == "withdrawn" else []
    job = Record(b"", 0, 1e6, RetryPolicy(3))
    job.start_by = None if fate in ("came back", "done") else 1e6
    job.due = 5.0 if fate in ("missed", "cancelled") else None
    kernel.offer(job, 0.0)
    if fate == "answered":
        kernel.arm_timeout(job, 0.0)
        kernel.attempt_ended(slot_of(job), ValueError(), 0.0)
        kernel.tick(kernel.next_deadline)
        kernel.arm_timeout(job, 2.0)
        kernel.attempt_ended(slot_of(job), None, 3.0)
    elif fate in ("came back", "done"):
        kernel.arm_timeout(job, 0.0)
        for loss in (Loss.REST, Loss.UNREAD):
            kernel.worker_gone(slot_of(job), CRASH, 1.0, loss=loss)
            kernel.worker_ready(kernel.slots[0], 1.0)
            kernel.arm_timeout(job, 1.0)
        if fate == "done":
            kernel.worker_gone(slot_of(job), CRASH, 2.0, loss=Loss.NOTHING)
        else:
            kernel.attempt_ended(slot_of(job), None, 2.0)
    elif fate == "withdrawn":
        assert kernel.withdraw(job)
    elif fate == "missed":
        job.start_by = 0.0
        kernel.tick(5.0)
        kernel.phases.report(kernel.phases.close())
    else:
        kernel.cancel(job, JobCancelled("cancelled"), 1.0)
    assert job.state in (None, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)
    kernel.instructions.clear()
    seen = weakref.ref(job)
    del job
    gc.collect()
    assert seen() is None
    assert len(kernel.unsettled_jobs()) == len(blocking)


# Jobs that are submitted


def test_a_submitted_job_is_accepted_whatever_the_backlog_is() -> None:
    kernel = staffed(n_workers=1, backlog=0)
    jobs = [a_job() for _ in range(5)]
    for job in jobs:
        kernel.submit(job, 0.0)
    assert [job.state for job in jobs] == [JobState.RUNNING, *[JobState.QUEUED] * 4]
    assert (kernel.running, kernel.waiting, kernel.unsettled) == (1, 4, 5)
    assert kernel.unsettled_jobs() == jobs
    assert not kernel.has_room()
    for job in jobs:
        assert kernel.slots[0].job is job
        kernel.attempt_ended(kernel.slots[0], None, 1.0)
    assert (kernel.succeeded, kernel.waiting, kernel.unsettled) == (5, 0, 0)


def test_offers_and_submitted_jobs_start_in_the_order_in_which_they_came() -> None:
    kernel = staffed(n_workers=1, backlog=0)
    first, second, third, fourth = (a_job() for _ in range(4))
    kernel.submit(first, 0.0)
    kernel.submit(second, 0.0)
    assert not kernel.offer(third, 0.0)
    kernel.submit(fourth, 0.0)
    started = []
    for _ in range(4):
        started.append(kernel.slots[0].job)
        kernel.instructions.clear()
        kernel.attempt_ended(kernel.slots[0], None, 1.0)
        accepted = [one.job for one in kernel.instructions if isinstance(one, AcceptOffer)]
        assert accepted == ([third] if kernel.slots[0].job is third else [])
    assert started == [first, second, third, fourth]


def test_a_submitted_job_in_line_can_be_cancelled_and_not_be_withdrawn() -> None:
    kernel = staffed(n_workers=1, backlog=0)
    first, second, third = (a_job() for _ in range(3))
    for job in (first, second, third):
        kernel.submit(job, 0.0)
    assert not kernel.withdraw(second)
    assert kernel.cancel(second, JobCancelled("cancelled"), 0.0)
    assert (second.state, kernel.waiting) == (JobState.CANCELLED, 1)
    kernel.attempt_ended(kernel.slots[0], None, 1.0)
    assert kernel.slots[0].job is third


def test_refusing_keeps_submitted_jobs_and_breaking_fails_them() -> None:
    kernel = staffed(n_workers=1, backlog=0)
    running, submitted, offered = (a_job() for _ in range(3))
    kernel.submit(running, 0.0)
    kernel.submit(submitted, 0.0)
    kernel.offer(offered, 0.0)
    kernel.instructions.clear()
    kernel.refuse()
    assert kernel.instructions == [RefuseOffer(offered)]
    assert submitted.state is JobState.QUEUED
    kernel.break_down(PoolBroken("given up"))
    assert submitted.state is JobState.FAILED
    assert (kernel.waiting, kernel.unsettled) == (0, 1)


def test_ruin_returns_offers_alone() -> None:
    kernel = staffed(n_workers=1, backlog=0)
    running, submitted, offered = (a_job() for _ in range(3))
    kernel.submit(running, 0.0)
    kernel.submit(submitted, 0.0)
    kernel.offer(offered, 0.0)
    assert kernel.ruin(PoolBroken("ruined")) == [offered]


def test_ruin_returns_jobs_whose_end_is_decided_and_not_told() -> None:
    kernel = staffed(n_workers=1, backlog=1)
    running, cancelled, refused = (a_job() for _ in range(3))
    kernel.offer(running, 0.0)
    kernel.submit(cancelled, 0.0)
    kernel.offer(refused, 0.0)
    kernel.refuse()
    kernel.cancel(cancelled, JobCancelled(), 1.0)
    assert kernel.ruin(PoolBroken("ruined")) == [refused, cancelled]


def test_jobs_are_promised_to_workers_that_are_coming_up() -> None:
    kernel = unstaffed(n_workers=2, backlog=1)
    jobs = [a_job() for _ in range(4)]
    for job in jobs:
        kernel.submit(job, 0.0)
    assert kernel.next_for_absent() == jobs[:2]
    kernel.worker_ready(kernel.slots[0], 0.0)
    assert kernel.next_for_absent() == [jobs[1]]
    kernel.worker_ready(kernel.slots[1], 0.0)
    assert kernel.next_for_absent() == []


# Jobs that follow others


LATE = JobCancelled("the promise was taken back")


def promised(kernel: Scheduler, **options: Any) -> JobRecord:
    job = a_job(**options)
    kernel.promise(job)
    return job


def kept(kernel: Scheduler, **options: Any) -> JobRecord:
    job = promised(kernel, **options)
    kernel.keep(job, LATE)
    return job


def test_a_promised_job_is_waited_for_and_unknown() -> None:
    kernel = staffed()
    job = promised(kernel)
    assert job.state is None
    assert kernel.unsettled == 1
    assert not kernel.phases.open.is_over
    assert kernel.unsettled_jobs() == []
    assert kernel.promised_jobs() == [job]
    assert kernel.delayed == 0
    assert kernel.instructions == []


def test_a_retracted_promise_leaves_no_trace() -> None:
    kernel = staffed()
    job = promised(kernel)
    phase = kernel.phases.open
    assert kernel.retract(job) is phase
    assert phase.is_over
    assert phase.cancelled == 0
    assert kernel.unsettled == 0
    assert kernel.retract(job) is None


def test_a_kept_job_belongs_to_the_phase_in_which_it_was_promised() -> None:
    kernel = staffed()
    job = promised(kernel)
    (phase,) = kernel.phases.close()
    kernel.keep(job, LATE)
    kernel.feed(job, 1.0)
    kernel.attempt_ended(slot_of(job), None, 2.0)
    assert [(one.job, one.phase_is_over) for one in taken(kernel, SettleJob)] == [(job, True)]
    assert phase.succeeded == 1
    assert kernel.phases.open.succeeded == 0


def test_a_kept_job_is_scheduled_and_takes_no_room_until_it_is_fed() -> None:
    kernel = staffed()
    job = kept(kernel)
    assert job.state is JobState.SCHEDULED
    assert kernel.delayed == 1
    assert kernel.next_deadline is None
    assert kernel.has_room()
    kernel.feed(job, 1.0)
    assert started(kernel) == [job]
    assert not kernel.is_unfed(job)


def test_a_fed_job_needs_no_room_and_goes_before_offers() -> None:
    kernel = staffed()
    job = kept(kernel)
    running, waiting = offered(kernel, 2)
    kernel.feed(job, 1.0)
    assert job.state is JobState.QUEUED
    kernel.instructions.clear()
    kernel.attempt_ended(slot_of(running), None, 2.0)
    assert started(kernel) == [job]
    assert waiting.state is None


def test_a_fed_job_waits_for_its_instant() -> None:
    kernel = staffed()
    job = kept(kernel)
    job.due = 5.0
    kernel.feed(job, 1.0)
    assert job.state is JobState.SCHEDULED
    assert kernel.next_deadline == 5.0
    kernel.tick(5.0)
    assert started(kernel) == [job]


def test_a_fed_job_may_start_too_late() -> None:
    kernel = staffed()
    offered_one(kernel)
    job = kept(kernel)
    job.start_by = 3.0
    kernel.feed(job, 1.0)
    assert kernel.next_deadline == 3.0
    kernel.tick(3.5)
    assert isinstance(job.error, StartDeadlineExceeded)


def test_a_job_that_cannot_be_fed_fails_without_an_attempt() -> None:
    kernel = staffed()
    job, error = kept(kernel), ValueError("cannot be pickled")
    kernel.feed(job, 1.0, error)
    assert settled(kernel) == [job]
    assert (job.state, job.error, job.attempt) == (JobState.FAILED, error, 0)


def test_a_kept_job_is_cancelled_like_a_waiting_one() -> None:
    kernel = staffed()
    job = kept(kernel)
    assert kernel.cancel(job, JobCancelled("not wanted"), 1.0)
    assert settled(kernel) == [job]
    assert not kernel.is_unfed(job)


def test_a_promise_is_kept_when_the_pool_refuses_all_else() -> None:
    kernel = staffed()
    job = promised(kernel)
    kernel.refuse()
    kernel.keep(job, LATE)
    kernel.feed(job, 1.0)
    assert started(kernel) == [job]


def test_keeping_what_was_retracted_cancels_it() -> None:
    kernel = staffed()
    job = promised(kernel)
    kernel.retract(job)
    kernel.keep(job, LATE)
    assert settled(kernel) == [job]
    assert (job.state, job.error) == (JobState.CANCELLED, LATE)
    assert kernel.unsettled == 0
    kernel.keep(job, LATE)
    assert kernel.instructions == []


@pytest.mark.parametrize("is_ruined", [False, True])
def test_a_promise_of_a_pool_that_is_given_up_is_kept_with_its_error(is_ruined: bool) -> None:
    kernel = staffed()
    before, after = kept(kernel), promised(kernel)
    error = PoolBroken("given up")
    if is_ruined:
        kernel.ruin(error)  # the engine settles what was accepted
    else:
        kernel.break_down(error)
        assert settled(kernel) == [before]
        assert isinstance(before.error, PoolBroken)
    kernel.keep(after, LATE)
    assert settled(kernel) == [after]
    assert isinstance(after.error, PoolBroken)
    assert after.error is not error
    assert kernel.unsettled == 0
    assert not kernel.is_unfed(after)


def test_a_follower_that_has_settled_is_forgotten() -> None:
    kernel = staffed()
    job = Record(b"", 0)
    kernel.promise(job)
    kernel.keep(job, LATE)
    kernel.cancel(job, LATE, 1.0)
    kernel.instructions.clear()
    watched = weakref.ref(job)
    del job
    gc.collect()
    assert watched() is None
