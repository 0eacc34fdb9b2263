"""The tracker (B1, B2): waiting, callbacks, awaiting, cancelling, ids."""

import asyncio
import gc
import logging
import pickle
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
from calling import Call, at_once
from gates import Gate
from jobs import echo, fail, nap, nothing
from staffing import staffed
from watching import wait_until

from bulkhead import (
    ConfigError,
    Dispatcher,
    DuplicateJobId,
    Job,
    JobCancelled,
    JobState,
    NestedDispatch,
    Pool,
    RetryPolicy,
    Tracker,
    WaitTimeout,
)


@pytest.fixture(scope="module")
def disp() -> Iterator[Dispatcher]:
    with staffed(Dispatcher([Pool(0, 2, backlog=None), Pool(1, 1)])) as disp:
        for priority in (0, 1):
            # Why: the thread of callbacks is made when the first is added, and stays until the end.
            disp.dispatch(Job(nothing).options(priority=priority)).add_done_callback(repr)
        yield disp


@pytest.fixture
def single() -> Iterator[Dispatcher]:
    """One worker, and ids that begin with 0."""
    with Dispatcher([Pool(0, 1, backlog=None)]) as disp:
        yield disp


# Waiting


def test_all_of_several_waiters_wake(disp: Dispatcher, gate: Gate) -> None:
    tracker = disp.dispatch(gate.job("it"))
    calls = [Call(tracker.wait), Call(tracker.result), Call(tracker.exception), Call(tracker.wait, 30)]
    calls += [Call(tracker.result, 30) for _ in range(6)]
    for call in calls:
        call.until_waiting()
    gate.open()
    began = time.monotonic()
    assert [call.value() for call in calls] == [True, "it", None, True, *["it"] * 6]
    assert time.monotonic() - began < 1


def test_waiters_of_several_jobs_each_wake_for_their_own(disp: Dispatcher, gate: Gate) -> None:
    trackers = [disp.dispatch(gate.job(name)) for name in ("a", "b")]
    calls = [Call(tracker.result).until_waiting() for tracker in trackers for _ in range(2)]
    gate.open("b")
    assert [call.value() for call in calls[2:]] == ["b", "b"]
    assert not any(call.has_returned for call in calls[:2])
    gate.open("a")
    assert [call.value() for call in calls[:2]] == ["a", "a"]


def test_a_wait_that_runs_out_of_time_leaves_the_job_alone(disp: Dispatcher, gate: Gate) -> None:
    tracker = disp.dispatch(gate.job("it"))
    began = time.monotonic()
    assert not tracker.wait(0.1)
    with pytest.raises(WaitTimeout, match=r"has not settled within 0\.1 s; it is running") as caught:
        tracker.result(0.1)
    with pytest.raises(WaitTimeout):
        tracker.exception(timeout=0.1)
    assert 0.3 <= time.monotonic() - began < 1.0
    assert isinstance(caught.value, TimeoutError)
    assert not tracker.wait(0)
    assert not tracker.done()
    gate.open()
    assert tracker.result(10) == "it"
    assert tracker.wait(0)


def test_what_a_job_failed_with_is_raised_by_result_and_returned_by_exception(disp: Dispatcher) -> None:
    tracker = disp.dispatch(Job(fail, "really"))
    error = tracker.exception(10)
    assert isinstance(error, ValueError)
    for _ in range(2):
        with pytest.raises(ValueError, match="really") as caught:
            tracker.result()
        assert caught.value is error
    assert disp.dispatch(Job(echo, 1)).exception() is None


def test_a_result_can_be_asked_for_many_times(disp: Dispatcher) -> None:
    tracker = disp.dispatch(Job(echo, [1]))
    assert tracker.result() is tracker.result()


def test_a_job_settles_when_nobody_waits(disp: Dispatcher) -> None:
    trackers = [disp.dispatch(Job(echo, n)) for n in range(10)]
    wait_until(lambda: all(tracker.done() for tracker in trackers))


# Callbacks


def test_callbacks_run_once_each_in_the_order_in_which_they_were_added(disp: Dispatcher, gate: Gate) -> None:
    tracker = disp.dispatch(gate.job())
    called: list[tuple[int, Tracker, bool]] = []
    for number in range(5):
        tracker.add_done_callback(lambda t, number=number: called.append((number, t, t.done())))
    assert called == []
    gate.open()
    wait_until(lambda: len(called) == 5)
    assert called == [(number, tracker, True) for number in range(5)]
    disp.dispatch(Job(nothing)).result()
    disp.barrier(check=False)
    assert len(called) == 5


def test_callbacks_of_several_jobs_run_in_the_order_in_which_the_jobs_settle(
    disp: Dispatcher, gate: Gate
) -> None:
    called: list[str] = []
    for name in ("first", "second"):
        disp.dispatch(gate.job(name)).add_done_callback(lambda tracker: called.append(tracker.result()))
    gate.wait_begun(2)
    gate.open("second")
    wait_until(lambda: called == ["second"])
    gate.open("first")
    wait_until(lambda: called == ["second", "first"])


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
def test_a_callback_is_called_however_the_job_ends(disp: Dispatcher, gate: Gate, end: str) -> None:
    job = {"succeeded": Job(nothing), "failed": Job(fail), "cancelled": gate.job()}[end]
    states: list[JobState] = []
    tracker = disp.dispatch(job)
    tracker.add_done_callback(lambda t: states.append(t.status().state))
    if end == "cancelled":
        tracker.cancel()
    wait_until(lambda: states == [end])


def test_a_callback_that_is_added_when_the_job_has_settled_is_called(disp: Dispatcher) -> None:
    tracker = disp.dispatch(Job(nothing))
    tracker.wait()
    called = threading.Event()
    tracker.add_done_callback(lambda _: called.set())
    assert called.wait(10)


def test_a_failing_callback_is_logged_and_stops_nothing(
    disp: Dispatcher, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[object] = []
    tracker = disp.dispatch(gate.job(id="its-job"))

    def broken(_: Tracker) -> None:
        raise ZeroDivisionError("the callback is broken")

    def leaving(_: Tracker) -> None:
        raise SystemExit(3)

    for callback in (broken, leaving, called.append):
        tracker.add_done_callback(callback)
    with caplog.at_level(logging.ERROR, logger="bulkhead"):
        gate.open()
        wait_until(lambda: called)
    assert called == [tracker]
    assert [(record.name, record.levelname) for record in caplog.records] == [("bulkhead", "ERROR")] * 2
    assert "'its-job'" in caplog.records[0].getMessage()
    assert "the callback is broken" in caplog.text
    other = disp.dispatch(Job(echo, 1))
    other.add_done_callback(called.append)
    assert other.result() == 1
    wait_until(lambda: called == [tracker, other])


def test_a_slow_callback_holds_up_no_job_and_no_other_pool(disp: Dispatcher) -> None:
    is_over, called = threading.Event(), threading.Event()
    tracker = disp.dispatch(Job(nothing))
    tracker.add_done_callback(lambda _: is_over.wait(30))
    tracker.wait()
    assert [disp.dispatch(Job(echo, n)).result(5) for n in range(10)] == list(range(10))
    disp.dispatch(Job(nothing).options(priority=1)).add_done_callback(lambda _: called.set())
    assert called.wait(5)
    is_over.set()


def test_a_callback_may_use_the_dispatcher(disp: Dispatcher) -> None:
    followed: list[object] = []

    def follow(tracker: Tracker) -> None:
        followed.append(disp.dispatch(Job(echo, tracker.result() + 1)).result(10))

    disp.dispatch(Job(echo, 1)).add_done_callback(follow)
    wait_until(lambda: followed == [2])


def test_what_cannot_be_called_is_no_callback(disp: Dispatcher) -> None:
    with pytest.raises(ConfigError, match="fn must be callable, not 5"):
        disp.dispatch(Job(nothing)).add_done_callback(5)  # type: ignore[arg-type]


# asyncio


def test_trackers_can_be_awaited(disp: Dispatcher, gate: Gate) -> None:
    async def main() -> None:
        held = disp.dispatch(gate.job("held"))
        waiting = [asyncio.create_task(_awaited(held)) for _ in range(3)]
        assert await disp.dispatch(Job(echo, 5)) == 5
        gate.open()
        assert await asyncio.gather(*waiting) == ["held"] * 3
        assert await held == "held"

    asyncio.run(main())


def test_the_event_loop_goes_on_while_a_tracker_is_awaited(disp: Dispatcher, gate: Gate) -> None:
    async def main() -> int:
        held = asyncio.create_task(_awaited(disp.dispatch(gate.job())))
        turns = 0
        while turns < 20:
            await asyncio.sleep(0.001)
            turns += 1
        assert not held.done()
        gate.open()
        await held
        return turns

    assert asyncio.run(main()) == 20


def test_awaiting_a_failed_or_cancelled_job_raises(disp: Dispatcher, gate: Gate) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="no luck"):
            await disp.dispatch(Job(fail))
        tracker = disp.dispatch(gate.job())
        waiting = asyncio.create_task(_awaited(tracker))
        await asyncio.sleep(0)
        tracker.cancel()
        with pytest.raises(JobCancelled):
            await waiting

    asyncio.run(main())


def test_cancelling_an_await_leaves_the_job_alone(disp: Dispatcher, gate: Gate) -> None:
    async def main() -> Tracker:
        tracker = disp.dispatch(gate.job("it"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_awaited(tracker), 0.05)
        assert not tracker.done()
        return tracker

    tracker = asyncio.run(main())
    # The loop is closed now, and the job's end has nobody there to tell.
    gate.open()
    assert tracker.result(10) == "it"


def test_hundred_jobs_can_be_awaited_together(disp: Dispatcher) -> None:
    async def main() -> list[int]:
        return await asyncio.gather(*(_awaited(disp.dispatch(Job(echo, n))) for n in range(100)))

    assert asyncio.run(main()) == list(range(100))


async def _awaited(tracker: Tracker) -> object:
    return await tracker


# Cancelling


def test_cancel_takes_out_a_waiting_job_and_ends_a_running_one(disp: Dispatcher, gate: Gate) -> None:
    disp.barrier(check=False)
    running = [disp.dispatch(gate.job()) for _ in range(2)]
    queued = disp.dispatch(gate.job("queued"))
    delayed = disp.dispatch(gate.job("delayed", delay=60.0))
    gate.wait_begun(2)
    for tracker in (queued, delayed):
        assert tracker.cancel()
        assert tracker.status().state == JobState.CANCELLED
    assert running[0].cancel()
    assert running[0].wait(10)
    for tracker in (running[0], queued, delayed):
        with pytest.raises(JobCancelled, match=f"job {tracker.id} was cancelled"):
            tracker.result(0)
    assert running[1].status().state == JobState.RUNNING
    gate.open()
    assert running[1].result() in ("job-1", "job-2")
    report = disp.barrier(0)
    assert (report.cancelled, len(gate.begun)) == (3, 2)
    wait_until(lambda: disp.stats()[0].idle == 2)


def test_cancel_tells_whether_the_job_is_or_will_be_cancelled(disp: Dispatcher, gate: Gate) -> None:
    done, failed = disp.dispatch(Job(nothing)), disp.dispatch(Job(fail))
    assert all(tracker.wait(10) for tracker in (done, failed))
    assert [done.cancel(), failed.cancel()] == [False, False]
    assert [done.status().state, failed.status().state] == ["succeeded", "failed"]
    running = disp.dispatch(gate.job())
    gate.wait_begun(1)
    assert [running.cancel(), running.cancel()] == [True, True]
    assert running.wait(10)
    assert running.cancel()
    disp.barrier(check=False)
    wait_until(lambda: disp.stats()[0].idle == 2)


def test_of_threads_that_cancel_and_a_job_that_ends_one_outcome_stands(disp: Dispatcher) -> None:
    for _ in range(20):
        tracker = disp.dispatch(Job(nap, 0.001))
        answers = [call.value() for call in at_once(2, lambda _, tracker=tracker: tracker.cancel())]
        assert tracker.wait(10)
        state = tracker.status().state
        assert state in (JobState.SUCCEEDED, JobState.CANCELLED)
        assert any(answers) == (state == JobState.CANCELLED)
    disp.barrier(check=False)
    wait_until(lambda: disp.stats()[0].idle == 2)


# Ids


def test_ids_are_numbers_from_0_in_the_order_of_dispatch(single: Dispatcher) -> None:
    assert [single.dispatch(Job(nothing)).id for _ in range(5)] == [0, 1, 2, 3, 4]


def test_a_refused_dispatch_uses_no_number(single: Dispatcher, gate: Gate) -> None:
    with Dispatcher([(0, 1)]) as disp:
        assert disp.dispatch(gate.job()).id == 0
        for _ in range(3):
            assert disp.try_dispatch(Job(nothing)) is None
        gate.open()
        assert disp.dispatch(Job(nothing)).id == 1


@pytest.mark.parametrize("own", ["text", 17, -1, 2.5, ("a", 1), b"bytes", frozenset({1})], ids=repr)
def test_an_own_id_is_kept(disp: Dispatcher, own: object) -> None:
    tracker = disp.dispatch(Job(echo, 1).options(id=own))  # type: ignore[arg-type]
    assert tracker.id == own
    assert disp.job(own) is tracker
    tracker.wait()


def test_numbers_pass_over_own_ids_that_are_taken(single: Dispatcher) -> None:
    ids = [single.dispatch(Job(nothing).options(id=own)).id for own in (None, 1, 2, None, None, 5, None)]
    assert ids == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("state", ["running", "queued", "scheduled", "retrying"])
def test_the_id_of_a_live_job_cannot_be_given_again(single: Dispatcher, gate: Gate, state: str) -> None:
    if state == "queued":
        single.dispatch(gate.job())
    policy = RetryPolicy(2, initial=60.0)
    job = {
        "running": gate.job(),
        "queued": gate.job(),
        "scheduled": gate.job(delay=60.0),
        "retrying": Job(fail).options(retry=policy),
    }[state].options(id="same")
    live = single.dispatch(job)
    wait_until(lambda: live.status().state == state)
    for dispatch in (single.dispatch, single.try_dispatch, lambda job: list(single.dispatch_all([job]))):
        with pytest.raises(DuplicateJobId, match="'same' is still live"):
            dispatch(Job(nothing).options(id="same"))
    assert single.job("same") is live
    gate.open()
    live.cancel()
    single.barrier(check=False)


def test_an_id_can_be_given_again_when_its_job_has_settled(single: Dispatcher) -> None:
    first = single.dispatch(Job(echo, 1).options(id="same"))
    first.wait()
    second = single.dispatch(Job(echo, 2).options(id="same"))
    assert single.job("same") is second
    assert (first.result(), second.result()) == (1, 2)


def test_a_refused_dispatch_leaves_the_settled_job_of_its_id_alone(gate: Gate) -> None:
    with Dispatcher([(0, 1)]) as disp:
        first = disp.dispatch(Job(echo, 1).options(id="same"))
        first.wait()
        disp.dispatch(gate.job())
        assert disp.try_dispatch(Job(echo, 2).options(id="same")) is None
        assert disp.job("same") is first
        gate.open()


def test_of_threads_that_give_the_same_id_one_wins(disp: Dispatcher, gate: Gate) -> None:
    def give(_: int) -> bool:
        try:
            disp.dispatch(gate.job(id="contested"))
        except DuplicateJobId:
            return False
        return True

    assert sum(call.value() for call in at_once(6, give)) == 1
    gate.open()
    disp.barrier()


# Elsewhere


def test_a_tracker_cannot_be_sent_to_a_job(disp: Dispatcher) -> None:
    tracker = disp.dispatch(Job(nothing))
    with pytest.raises(NestedDispatch, match="cannot be sent"):
        pickle.dumps(tracker)
    tracker.wait()


def test_a_tracker_shows_id_and_state(disp: Dispatcher) -> None:
    tracker = disp.dispatch(Job(nothing).options(id="shown"))
    tracker.wait()
    assert repr(tracker) == "<Tracker 'shown' succeeded>"


def test_a_tracker_keeps_nothing_alive_but_itself() -> None:
    with Dispatcher([Pool(0, 1)], max_history=0) as disp:
        tracker = disp.dispatch(Job(bytes, 10))
        tracker.wait()
        disp.dispatch(Job(nothing)).wait()
        gone = weakref.ref(tracker)
        del tracker
        gc.collect()
        wait_until(lambda: gone() is None)
