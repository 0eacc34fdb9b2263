"""Retries on real workers: attempts, pauses, and a slot that is free meanwhile."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import (
    echo,
    fail,
    fail_at_first,
    fail_for_good,
    lines,
    note,
    note_and_die,
    note_and_fail,
    note_and_hang,
)
from staffing import staffed
from watching import wait_until

from bulkhead import (
    Dispatcher,
    Job,
    JobState,
    JobTimeout,
    Pool,
    RetryPolicy,
    Unrecoverable,
    WorkerCrashed,
)


@pytest.fixture(scope="module")
def disp() -> Iterator[Dispatcher]:
    with Dispatcher([Pool(0, 1, backlog=None)]) as disp:
        yield staffed(disp)


@pytest.fixture(autouse=True)
def _a_phase_of_its_own(disp: Dispatcher) -> Iterator[None]:
    yield
    disp.barrier(check=False)


@pytest.fixture
def attempts(tmp_path: Path) -> Path:
    """Where jobs note the instant of each attempt."""
    return tmp_path / "attempts"


def test_a_job_that_fails_twice_and_then_succeeds_takes_three_attempts(
    disp: Dispatcher, attempts: Path
) -> None:
    retried = disp.stats()[0].retried
    policy = RetryPolicy(5, initial=0.01)
    tracker = disp.dispatch(Job(fail_at_first, attempts, 2).options(retry=policy))
    assert tracker.result(10) == 3
    assert tracker.status().attempt == len(lines(attempts)) == 3
    assert disp.stats()[0].retried - retried == 2


def test_without_a_policy_nothing_is_retried(disp: Dispatcher, attempts: Path) -> None:
    tracker = disp.dispatch(Job(note_and_fail, attempts))
    assert isinstance(tracker.exception(10), ValueError)
    assert len(lines(attempts)) == tracker.status().attempt == 1


def test_the_last_error_stands_when_the_attempts_are_used_up(disp: Dispatcher, attempts: Path) -> None:
    policy = RetryPolicy(3, initial=0.01)
    tracker = disp.dispatch(Job(fail_at_first, attempts, 99).options(retry=policy))
    with pytest.raises(OSError, match="attempt 3 fails"):
        tracker.result(10)
    assert len(lines(attempts)) == 3


def test_pauses_grow_by_the_factor_within_the_jitter(disp: Dispatcher, attempts: Path) -> None:
    policy = RetryPolicy(4, initial=0.1, factor=2.0, jitter=0.2)
    disp.dispatch(Job(fail_at_first, attempts, 3).options(retry=policy)).result(10)
    instants = [float(line) for line in lines(attempts)]
    pauses = [later - earlier for earlier, later in itertools.pairwise(instants)]
    for pause, planned in zip(pauses, (0.1, 0.2, 0.4), strict=True):
        assert 0.8 * planned <= pause < 1.2 * planned + 0.1


def test_the_slot_is_free_between_attempts(disp: Dispatcher, attempts: Path) -> None:
    policy = RetryPolicy(2, initial=60.0)
    retrying = disp.dispatch(Job(note_and_fail, attempts).options(retry=policy))
    wait_until(lambda: retrying.status().state == JobState.RETRYING)
    stats = disp.stats()[0]
    assert (stats.running, stats.waiting, stats.delayed, stats.idle) == (0, 0, 1, 1)
    assert [disp.dispatch(Job(echo, n), timeout=5).result(5) for n in range(5)] == list(range(5))
    assert retrying.cancel()
    assert retrying.status().state == JobState.CANCELLED
    assert len(lines(attempts)) == 1
    disp.barrier()


def test_attempts_are_made_when_nobody_waits(disp: Dispatcher, attempts: Path) -> None:
    policy = RetryPolicy(3, initial=0.02)
    tracker = disp.dispatch(Job(fail_at_first, attempts, 2).options(retry=policy))
    wait_until(tracker.done)
    assert tracker.result() == 3


def test_unrecoverable_ends_at_once(disp: Dispatcher, attempts: Path) -> None:
    tracker = disp.dispatch(Job(fail_for_good, attempts).options(retry=RetryPolicy(5, initial=0.01)))
    assert isinstance(tracker.exception(10), Unrecoverable)
    assert len(lines(attempts)) == 1


def test_only_the_named_kinds_of_failure_are_retried(disp: Dispatcher, attempts: Path) -> None:
    def run(policy: RetryPolicy) -> int:
        attempts.unlink(missing_ok=True)
        disp.dispatch(Job(note_and_fail, attempts).options(retry=policy)).wait(10)
        return len(lines(attempts))

    assert run(RetryPolicy(3, initial=0.0, retry_on=(OSError,))) == 1
    assert run(RetryPolicy(3, initial=0.0, retry_on=(OSError, ValueError))) == 3
    assert run(RetryPolicy(3, initial=0.0, retry_on=(WorkerCrashed, JobTimeout))) == 1


def test_crashes_and_timeouts_can_be_retried_or_not(attempts: Path) -> None:
    with Dispatcher([(0, 1)]) as disp:

        def run(fn: object, policy: RetryPolicy) -> tuple[int, type]:
            attempts.unlink(missing_ok=True)
            tracker = disp.dispatch(Job(fn, attempts).options(retry=policy, timeout=0.2))  # type: ignore[arg-type]
            error = tracker.exception(20)
            return len(lines(attempts)), type(error)

        crashes = RetryPolicy(2, initial=0.0, retry_on=(WorkerCrashed,))
        timeouts = RetryPolicy(2, initial=0.0, retry_on=(JobTimeout,))
        assert run(note_and_die, crashes) == (2, WorkerCrashed)
        assert run(note_and_die, timeouts) == (1, WorkerCrashed)
        assert run(note_and_hang, timeouts) == (2, JobTimeout)
        assert run(note_and_hang, crashes) == (1, JobTimeout)


def test_a_policy_of_the_pool_counts_for_jobs_that_bring_none(attempts: Path) -> None:
    with Dispatcher([Pool(0, 1, retry=RetryPolicy(2, initial=0.0))]) as disp:
        assert disp.dispatch(Job(fail_at_first, attempts, 1)).result(10) == 2
        assert disp.dispatch(Job(fail).options(retry=RetryPolicy(1))).wait(10)
        assert disp.stats()[0].retried == 1


def test_a_retry_queues_behind_the_jobs_that_became_ready_before_it(disp: Dispatcher, tmp_path: Path) -> None:
    order, failures = tmp_path / "order", tmp_path / "failures"
    disp.dispatch(Job(_fail_once, order, failures).options(retry=RetryPolicy(2, initial=0.0)))
    for number in range(3):
        disp.dispatch(Job(note, order, number))
    disp.barrier()
    assert lines(order) == ["attempt", "0", "1", "2", "attempt"]


def _fail_once(order: Path, failures: Path) -> None:
    note(order, "attempt")
    # Time for the caller to dispatch the jobs that come behind.
    time.sleep(0.1)
    fail_at_first(str(failures), 1)
