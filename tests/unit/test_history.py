"""The jobs a dispatcher knows by id: numbers, own ids, and how they are forgotten."""

from __future__ import annotations

from typing import Any

import pytest

from bulkhead import DuplicateJobId, JobNotFound, JobState, Tracker
from bulkhead.history import History

EXPIRY = 100.0


class Clock:
    """Stands in for the `time` module."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1e9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("bulkhead.history.time", made)
    return made


def a_tracker(priority: int = 0) -> Tracker:
    return Tracker(None, b"", priority)


def accepted(history: History, job_id: Any = None, priority: int = 0) -> Tracker:
    """Do what a dispatcher and its pool do for a job that is accepted."""
    job = a_tracker(priority)
    if job_id is not None:
        history.reserve(job_id, job)
    history.enter(job)
    job.state = JobState.QUEUED
    return job


def settle(history: History, job: Tracker, state: JobState = JobState.SUCCEEDED) -> None:
    job.state = state
    history.settle(job)


def ids(history: History) -> list[Any]:
    return [job.id for job in history.jobs()]


# Ids


def test_jobs_are_numbered_from_0_in_the_order_of_their_acceptance(clock: Clock) -> None:
    history = History(EXPIRY, 10)
    jobs = [accepted(history) for _ in range(5)]
    assert [job.id for job in jobs] == [0, 1, 2, 3, 4]
    assert list(history.jobs()) == jobs
    assert all(history.find(job.id) is job for job in jobs)
    assert jobs[0].queued_at == clock.time()


def test_a_number_can_be_reserved_before_the_acceptance() -> None:
    history = History(EXPIRY, 10)
    own = accepted(history, 1)
    later = a_tracker()
    history.number(later)
    other = a_tracker()
    history.number(other)
    assert (later.id, other.id, accepted(history).id) == (0, 2, 3)
    history.number(later)
    history.enter(later)
    assert later.id == 0
    assert history.find(0) is later
    assert history.find(1) is own
    with pytest.raises(DuplicateJobId):
        history.reserve(2, a_tracker())
    history.release(other)
    assert history._reserved == {}


@pytest.mark.parametrize("own", [2, 2.0])
def test_a_number_that_is_somebodys_own_id_is_passed_over(own: Any) -> None:
    history = History(EXPIRY, 10)
    mine = accepted(history, own)
    assert [accepted(history).id for _ in range(4)] == [0, 1, 3, 4]
    assert history.find(2) is mine


def test_a_number_that_is_reserved_is_passed_over_too() -> None:
    history = History(EXPIRY, 10)
    waiting = a_tracker()
    history.reserve(0, waiting)
    assert accepted(history).id == 1
    history.enter(waiting)
    assert history.find(0) is waiting


@pytest.mark.parametrize("own", ["x", ("a", 1), 7, 1.5, b"raw", None.__class__], ids=repr)
def test_an_own_id_of_any_hashable_type_finds_its_job(own: Any) -> None:
    history = History(EXPIRY, 10)
    assert history.find(accepted(history, own).id).id == own


def test_an_own_id_of_a_live_job_is_refused_and_the_live_job_stays() -> None:
    history = History(EXPIRY, 10)
    first = accepted(history, "x")
    for state in (JobState.SCHEDULED, JobState.QUEUED, JobState.RUNNING, JobState.RETRYING):
        first.state = state
        with pytest.raises(DuplicateJobId, match="'x'"):
            history.reserve("x", a_tracker())
    assert history.find("x") is first
    settle(history, first)
    assert accepted(history, "x").id == "x", "the refused attempts left no trace"


def test_a_number_that_was_given_out_cannot_be_taken_as_an_own_id() -> None:
    history = History(EXPIRY, 10)
    first = accepted(history)
    with pytest.raises(DuplicateJobId, match="id 0 "):
        history.reserve(0, a_tracker())
    assert history.find(0) is first


def test_an_id_that_is_being_dispatched_is_refused() -> None:
    history = History(EXPIRY, 10)
    history.reserve("x", a_tracker())
    with pytest.raises(DuplicateJobId, match="'x'"):
        history.reserve("x", a_tracker())


def test_an_own_id_is_free_again_when_its_job_was_not_accepted() -> None:
    history = History(EXPIRY, 10)
    refused = a_tracker()
    history.reserve("x", refused)
    with pytest.raises(JobNotFound):
        history.find("x")
    history.release(refused)
    history.release(refused)
    assert accepted(history, "x").id == "x"


def test_a_job_without_an_own_id_can_be_released() -> None:
    history = History(EXPIRY, 10)
    history.release(a_tracker())
    assert ids(history) == []


def test_a_settled_job_gives_its_own_id_to_the_next_when_that_is_accepted_and_not_before(
    clock: Clock,
) -> None:
    history = History(EXPIRY, 10)
    first = accepted(history, "x")
    settle(history, first)
    refused = a_tracker()
    history.reserve("x", refused)
    history.release(refused)
    assert history.find("x") is first
    clock.now += 50
    second = accepted(history, "x")
    assert list(history.jobs()) == [second]
    clock.now += 60
    history.sweep()
    assert history.find("x") is second, "the first one's expiry does not take the second with it"


def test_a_number_and_an_own_id_that_meet_in_two_threads_stay_two_jobs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Race: a thread reserves the number 0 just after another has looked whether it is reserved."""
    history = History(EXPIRY, 10)
    own = a_tracker()
    refused: list[DuplicateJobId] = []

    class Reserved(dict[Any, Any]):
        def __contains__(self, key: object) -> bool:
            found = super().__contains__(key)
            if own.id is None and not refused:
                try:
                    history.reserve(0, own)
                except DuplicateJobId as error:
                    refused.append(error)
            return found

    monkeypatch.setattr(history, "_reserved", Reserved())
    numbered = accepted(history)
    if not refused:
        history.enter(own)
        own.state = JobState.QUEUED
        assert numbered.id != own.id
        assert history.find(own.id) is own
    assert history.find(numbered.id) is numbered


# Finding


@pytest.mark.parametrize("unknown", [0, "x", None, [1], {}], ids=repr)
def test_what_is_not_known_is_not_found_and_the_error_holds_the_id(unknown: Any) -> None:
    with pytest.raises(JobNotFound, match="never dispatched, or it has expired") as caught:
        History(EXPIRY, 10).find(unknown)
    assert caught.value.job_id == unknown
    assert repr(unknown) in str(caught.value)


def test_live_jobs_are_those_of_the_pool_that_have_not_settled() -> None:
    history = History(EXPIRY, 10)
    jobs = [accepted(history, priority=number % 2) for number in range(4)]
    settle(history, jobs[0])
    history.reserve("x", a_tracker())
    assert list(history.live(0)) == [jobs[2]]
    assert list(history.live(1)) == [jobs[1], jobs[3]]


def test_a_job_that_an_exception_has_left_between_its_entry_and_its_state_is_live() -> None:
    history = History(EXPIRY, 10)
    job = a_tracker()
    history.enter(job)
    assert list(history.live(0)) == [job]


# Forgetting


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
def test_a_settled_job_can_be_found_until_it_expires_and_not_after(clock: Clock, state: JobState) -> None:
    history = History(EXPIRY, 10)
    job = accepted(history)
    clock.now += 500
    settle(history, job, state)
    clock.now += EXPIRY - 0.001
    assert history.find(0) is job
    clock.now += 0.001
    with pytest.raises(JobNotFound):
        history.find(0)
    assert ids(history) == []


def test_a_live_job_never_expires(clock: Clock) -> None:
    history = History(EXPIRY, 0)
    job = accepted(history)
    for number in range(100):
        clock.now += EXPIRY
        settle(history, accepted(history, f"other {number}"))
        history.sweep()
    assert ids(history) == [0]
    assert history.find(0) is job


def test_the_next_sweep_frees_an_expired_job_within_1_to_1_2_times_the_expiry(clock: Clock) -> None:
    history = History(EXPIRY, 10)
    assert history.next_sweep() is None
    settled_at = {}
    for _ in range(5):
        job = accepted(history)
        settle(history, job)
        settled_at[job.id] = clock.now
        clock.now += 7
    while (instant := history.next_sweep()) is not None:
        before = set(history._jobs)
        clock.now = max(clock.now, instant)
        history.sweep()
        gone = before - set(history._jobs)
        assert gone
        for job_id in gone:
            assert EXPIRY <= clock.now - settled_at[job_id] <= 1.2 * EXPIRY
    assert not history._jobs


def test_no_more_settled_jobs_are_known_than_the_limit_and_the_oldest_go_first() -> None:
    history = History(EXPIRY, 3)
    live = accepted(history)
    jobs = [accepted(history) for _ in range(6)]
    for job in jobs:
        settle(history, job)
    assert ids(history) == [live.id, *(job.id for job in jobs[3:])]


def test_a_limit_of_zero_forgets_a_job_as_soon_as_it_has_settled() -> None:
    history = History(EXPIRY, 0)
    job = accepted(history)
    assert history.find(0) is job
    settle(history, job)
    assert ids(history) == []
    assert history.next_sweep() is None


def test_nothing_grows_with_the_number_of_jobs(clock: Clock) -> None:
    history = History(EXPIRY, 100)
    for number in range(20_000):
        clock.now += 0.01
        settle(history, accepted(history, "again" if number % 3 == 0 else None))
    assert len(history._jobs) <= 100
    assert len(history._settled) <= 100
    assert not history._reserved


def test_large_results_are_held_up_to_a_bound_and_the_last_one_always(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bulkhead.history._MAX_BYTES", 100_000)
    history = History(300.0, 10_000)
    for size in (10, 60_000, 30_000, 50_000, 10, 500_000, 5_000):
        job = Tracker(None, b"", 0)  # type: ignore[arg-type]
        job.size = size
        history.enter(job)
        job.state = JobState.SUCCEEDED
        history.settle(job)
    assert [job.size for job in history.jobs()] == [5_000]
    for size in (60_000, 30_000):
        job = Tracker(None, b"", 0)  # type: ignore[arg-type]
        job.size = size
        history.enter(job)
        job.state = JobState.SUCCEEDED
        history.settle(job)
    assert [job.size for job in history.jobs()] == [5_000, 60_000, 30_000]
