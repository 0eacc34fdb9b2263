"""Values of the user's that break an assumption: they cost their own job something, and neither its pool nor others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import faulty_jobs
import jobs
import pytest
from watching import PATIENCE

from bulkhead import (
    BarrierTimeout,
    Dispatcher,
    Job,
    JobCancelled,
    JobsFailed,
    JobState,
    JobTimeout,
    Pool,
    RetryPolicy,
    WaitTimeout,
    WorkerCrashed,
    chain,
    testing,
)

HUGE = 10**5000  # more digits than Python turns into text


class Nameless:
    def __repr__(self) -> str:
        raise RuntimeError("no name")


IDS = [pytest.param(Nameless, id="repr-raises"), pytest.param(lambda: HUGE, id="huge-int")]


@pytest.fixture
def disp() -> Iterator[Dispatcher]:
    disp = Dispatcher([Pool(0, 1, backlog=None)])
    yield disp
    assert disp.dispatch(Job(jobs.echo, 1)).result(PATIENCE) == 1
    disp.finalize(cancel=True)


def fail_with_a_huge_int() -> None:
    raise ValueError(HUGE)


def test_an_error_with_a_huge_int(disp: Dispatcher) -> None:
    error = disp.dispatch(Job(fail_with_a_huge_int)).exception(PATIENCE)
    assert type(error) is ValueError
    assert error.args == (HUGE,)
    (span,) = disp.timeline().spans
    assert span.error == "ValueError: <int>"


@pytest.mark.parametrize("make", IDS)
def test_a_job_with_such_an_id_is_cancelled(disp: Dispatcher, make: Callable[[], Any]) -> None:
    running = disp.dispatch(Job(faulty_jobs.loop).options(id=make()))
    waiting = disp.dispatch(Job(jobs.nothing).options(id=(make(), 2)))
    assert waiting.cancel()
    assert running.cancel()
    assert isinstance(waiting.exception(PATIENCE), JobCancelled)
    assert isinstance(running.exception(PATIENCE), JobCancelled)


@pytest.mark.parametrize("make", IDS)
def test_the_worker_of_a_job_with_such_an_id_is_lost(disp: Dispatcher, make: Callable[[], Any]) -> None:
    late = disp.dispatch(Job(faulty_jobs.loop).options(id=make(), timeout=0.1))
    with pytest.raises(WaitTimeout, match=type(late.id).__name__):
        late.result(0)
    assert isinstance(late.exception(PATIENCE), JobTimeout)
    dead = disp.dispatch(Job(testing.crash).options(id=(make(), 2)))
    assert isinstance(dead.exception(PATIENCE), WorkerCrashed)


@pytest.mark.parametrize("make", IDS)
def test_a_barrier_names_jobs_with_such_an_id(disp: Dispatcher, make: Callable[[], Any]) -> None:
    disp.dispatch(Job(jobs.nap, 0.2).options(id=make()))
    with pytest.raises(BarrierTimeout, match="1 jobs"):
        disp.barrier(timeout=0.01)
    disp.dispatch(Job(jobs.fail).options(id=(make(), 2)))
    with pytest.raises(JobsFailed, match="1 jobs failed"):
        disp.barrier(timeout=PATIENCE)


@pytest.mark.parametrize("make", IDS)
def test_finalize_cancels_a_job_with_such_an_id(make: Callable[[], Any]) -> None:
    disp = Dispatcher([Pool(0, 1)])
    tracker = disp.dispatch(Job(faulty_jobs.loop).options(id=make()))
    disp.finalize(cancel=True)
    assert isinstance(tracker.exception(0), JobCancelled)


class Empty(Exception):
    """Is false, as an error that is a collection may be."""

    def __len__(self) -> int:
        return 0


class Undecided(Exception):
    def __bool__(self) -> bool:
        raise RuntimeError("neither")


def fail_at_one(kind: type[Exception], number: int) -> int:
    if number == 1:
        raise kind("none")
    return number


@pytest.mark.parametrize("retry", [RetryPolicy(1), RetryPolicy(2, initial=0.01)], ids=["once", "twice"])
@pytest.mark.parametrize("kind", [Empty, Undecided])
def test_an_error_that_is_not_true_is_one(kind: type[Exception], retry: RetryPolicy) -> None:
    with Dispatcher([Pool(0, 1, retry=retry)]) as disp:
        results = disp.map(partial(fail_at_one, kind), range(3), chunksize=3)
        assert next(results) == 0
        with pytest.raises(kind):
            next(results)
        assert next(results) == 2
        tracker = disp.dispatch(chain([Job(fail_at_one, kind, 1), Job(jobs.echo)]))
        assert isinstance(tracker.exception(PATIENCE), kind)
        cancelled = tracker.trackers[1].exception(PATIENCE)
        assert isinstance(cancelled, JobCancelled)
        assert isinstance(cancelled.__cause__, kind)


class Masked(Exception):
    """Raises when it is asked what it is, as `isinstance` does."""

    @property
    def __class__(self) -> Any:
        raise RuntimeError("masked")


class Meta(type):
    def __instancecheck__(cls, instance: object) -> bool:
        raise RuntimeError("not to be asked")


class Strange(Exception, metaclass=Meta):
    pass


@pytest.mark.parametrize("retry", [None, RetryPolicy(2, initial=0.01, retry_on=(Strange, Masked))])
@pytest.mark.parametrize("kind", [Masked, Strange])
def test_an_error_that_may_not_be_asked_for_its_class_fails_its_job_alone(
    kind: type[Exception], retry: RetryPolicy | None
) -> None:
    with Dispatcher([Pool(0, 1, retry=retry)]) as disp:
        tracker = disp.dispatch(Job(fail_at_one, kind, 1))
        assert type(tracker.exception(PATIENCE)) is kind
        status = tracker.status()
        assert (status.state, status.attempt) == (JobState.FAILED, 1 if retry is None else 2)
        assert status.error_type == kind.__name__
        assert disp.timeline().spans[-1].error == f"{kind.__name__}: none"
        with pytest.raises(JobsFailed) as raised:
            disp.barrier(timeout=PATIENCE)
        assert [type(error) for error in raised.value.exceptions] == [kind]

        results = disp.map(partial(fail_at_one, kind), range(3), chunksize=3)
        assert next(results) == 0
        assert type(raised_by(lambda: next(results))) is kind  # pytest.raises would ask it
        assert next(results) == 2

        linked = disp.dispatch(chain([Job(fail_at_one, kind, 1), Job(jobs.echo)]))
        assert type(linked.exception(PATIENCE)) is kind
        assert isinstance(linked.trackers[1].exception(PATIENCE), JobCancelled)

        future = disp.executor().submit(fail_at_one, kind, 1)
        assert type(future.exception(PATIENCE)) is kind
        assert disp.dispatch(Job(jobs.echo, 1)).result(PATIENCE) == 1


def test_a_policy_whose_error_type_may_not_be_asked_costs_nobody_else_anything() -> None:
    with Dispatcher([Pool(0, 1, retry=RetryPolicy(2, initial=0.01, retry_on=(Strange,)))]) as disp:
        tracker = disp.dispatch(Job(jobs.fail))
        assert type(tracker.exception(PATIENCE)) is ValueError
        assert tracker.status().attempt == 1
        assert disp.dispatch(Job(jobs.echo, 1)).result(PATIENCE) == 1


def raised_by(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None
