"""One pool as an executor (D5): submit, map, futures, shutdown. The standard library's own tests: tests/compat."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import itertools
import logging
import os
import pickle
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from calling import Call
from faulty_jobs import kill_self
from gates import Gate
from jobs import echo, fail, fail_at_first, lines, nap, note, nothing, pid
from staffing import staffed
from watching import PATIENCE, wait_until, wait_until_whole, worker_pids

from bulkhead import (
    Dispatcher,
    DispatcherFinalized,
    Job,
    JobCancelled,
    JobNotPicklable,
    JobTimeout,
    NestedDispatch,
    Pool,
    PoolBroken,
    RemoteError,
    RetryPolicy,
    UnknownPriority,
    WorkerCrashed,
)
from bulkhead.executor import JobFuture, PoolExecutor


@pytest.fixture(scope="module")
def disp() -> Iterator[Dispatcher]:
    with staffed(Dispatcher([Pool(0, 2), Pool(1, 1)])) as made:
        for priority in (0, 1):  # so that each pool has its callback thread
            executor = made.executor(priority)
            executor.submit(nap, 0.01).add_done_callback(id)
            executor.shutdown()
        yield made


@pytest.fixture
def executor(disp: Dispatcher) -> Iterator[PoolExecutor]:
    """Two workers."""
    with disp.executor(0) as made:
        yield made


@pytest.fixture
def single(disp: Dispatcher) -> Iterator[PoolExecutor]:
    """One worker."""
    with disp.executor(1) as made:
        yield made


def hold(executor: PoolExecutor, gate: Gate, name: str) -> JobFuture:
    """Submit a call that runs until the gate lets it end."""
    job = gate.job(name)
    return executor.submit(job.fn, *job.args)


# Submitting


def test_a_call_returns_its_result_or_raises_its_error(start_method: str) -> None:
    with Dispatcher([Pool(0, 2, start_method=start_method)]) as disp, disp.executor() as executor:
        assert executor.submit(pow, 2, 10).result() == 1024
        assert executor.submit(echo, 1, self=2, fn=3).result() == ((1,), {"self": 2, "fn": 3})
        error = executor.submit(fail, "no luck").exception()
        assert type(error) is ValueError
        assert "in fail" in str(error.__cause__)
        assert list(executor.map(pow, range(10), range(10))) == [n**n for n in range(10)]


def test_submit_waits_for_no_worker_and_calls_start_in_their_order(
    single: PoolExecutor, gate: Gate, tmp_path: Path
) -> None:
    first = hold(single, gate, "first")
    gate.wait_begun(1)
    order = tmp_path / "order"
    futures = [single.submit(note, order, number) for number in range(200)]
    assert first.running()
    assert not any(future.running() or future.done() for future in futures)
    gate.open()
    assert first.result(PATIENCE) == "first"
    for future in reversed(futures):
        future.result(PATIENCE)
    assert lines(order) == [str(number) for number in range(200)]


def test_many_submitted_calls_do_not_block(single: PoolExecutor, gate: Gate) -> None:
    held = hold(single, gate, "held")
    gate.wait_begun(1)
    futures = [single.submit(nothing) for _ in range(20_000)]
    assert not any(future.done() for future in futures)
    gate.open()
    assert held.result(PATIENCE) == "held"
    assert concurrent.futures.wait(futures, timeout=PATIENCE).not_done == set()


def test_submitted_calls_run_though_nobody_waits_for_them(single: PoolExecutor, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for number in range(50):
        single.submit(note, ran, number)
    wait_until(lambda: len(lines(ran)) == 50)


def test_a_call_beside_dispatch_waits_its_turn_and_no_longer(
    disp: Dispatcher, single: PoolExecutor, gate: Gate, tmp_path: Path
) -> None:
    held = hold(single, gate, "held")
    gate.wait_begun(1)
    order = tmp_path / "order"
    single.submit(note, order, "first")
    dispatching = Call(disp.dispatch, Job(note, order, "second").options(priority=1)).until_waiting()
    last = single.submit(note, order, "third")
    gate.open()
    dispatching.value().result(PATIENCE)
    last.result(PATIENCE)
    held.result(PATIENCE)
    assert lines(order) == ["first", "second", "third"]


def test_threads_submit_at_once_and_no_call_is_lost_or_doubled(
    executor: PoolExecutor, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"

    def submit_some(thread: int) -> list[JobFuture]:
        return [executor.submit(note, ran, f"{thread}-{number}") for number in range(250)]

    calls = [Call(submit_some, thread) for thread in range(8)]
    for future in as_completed([future for call in calls for future in call.value()], PATIENCE):
        future.result()
    assert sorted(lines(ran)) == sorted(f"{t}-{n}" for t in range(8) for n in range(250))


def test_an_executor_makes_no_thread(disp: Dispatcher) -> None:
    disp.executor(0).submit(nothing).result(PATIENCE)
    before = threading.active_count()
    for executor in [disp.executor(0) for _ in range(20)]:
        assert executor.submit(echo, 1).result(PATIENCE) == 1
        executor.shutdown()
    assert threading.active_count() == before


def test_an_unknown_priority_is_refused(disp: Dispatcher) -> None:
    with pytest.raises(UnknownPriority):
        disp.executor(7)
    assert disp.executor()._pool.config.priority == 0


def test_what_is_no_function_is_refused(executor: PoolExecutor) -> None:
    with pytest.raises(TypeError):
        executor.submit(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        executor.submit()  # type: ignore[call-arg]


class Unpicklable:
    def __reduce__(self) -> str:
        raise pickle.PicklingError("not me")


class NotRebuilt:
    """Can be pickled; raises where it is unpickled."""

    def __init__(self, error: type[BaseException] = ValueError) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return _explode, (self.error,)


def _explode(error: type[BaseException]) -> None:
    raise error("not here")


def make(kind: Callable[[], Any]) -> Any:
    return kind()


def exit_with(code: int) -> None:
    raise SystemExit(code)


def test_what_cannot_be_pickled_is_the_futures_error(executor: PoolExecutor) -> None:
    future = executor.submit(echo, Unpicklable())
    assert future.done()
    error = future.exception(0)
    assert isinstance(error, JobNotPicklable)
    assert isinstance(error, pickle.PicklingError)
    with pytest.raises(pickle.PicklingError):
        list(executor.map(echo, [1, Unpicklable()]))


def test_what_cannot_be_pickled_is_the_futures_error_also_when_the_executor_is_shut_down_just_then() -> None:
    with Dispatcher([(0, 1)]) as disp:
        executor = disp.executor()
        executor.submit(nothing).result(PATIENCE)
        future = executor.submit(echo, Unpicklable())
        executor.shutdown(wait=False)
        with pytest.raises(pickle.PicklingError):
            future.result(PATIENCE)
        executor.shutdown()


def test_errors_are_those_that_code_for_the_standard_library_expects(executor: PoolExecutor) -> None:
    unread = executor.submit(echo, NotRebuilt())
    assert isinstance(unread.exception(PATIENCE), BrokenProcessPool)
    assert isinstance(unread.exception(), RemoteError)
    assert isinstance(executor.submit(make, NotRebuilt).exception(PATIENCE), BrokenProcessPool)
    assert type(executor.submit(make, Unpicklable).exception(PATIENCE)) is pickle.PicklingError
    left = executor.submit(exit_with, 3).exception(PATIENCE)
    assert isinstance(left, SystemExit)
    assert left.code == 3
    assert "in exit_with" in str(left.__cause__)
    assert executor.submit(echo, "usable").result(PATIENCE) == "usable"


# Crashes, timeouts, retries


def test_a_killed_worker_fails_its_own_future_alone(
    disp: Dispatcher, executor: PoolExecutor, gate: Gate
) -> None:
    held = hold(executor, gate, "held")
    gate.wait_begun(1)
    doomed = executor.submit(kill_self)
    behind = [executor.submit(echo, number) for number in range(20)]
    error = doomed.exception(PATIENCE)
    assert isinstance(error, WorkerCrashed)
    assert isinstance(error, BrokenProcessPool)
    assert error.signal == "SIGKILL"
    assert error.pid is not None
    assert type(pickle.loads(pickle.dumps(error))) is type(error)
    assert [future.result(PATIENCE) for future in behind] == list(range(20))
    assert not held.done()
    gate.open()
    assert held.result(PATIENCE) == "held"
    assert executor.submit(echo, "usable").result(PATIENCE) == "usable"


def test_a_worker_that_is_killed_while_idle_fails_no_future(disp: Dispatcher, single: PoolExecutor) -> None:
    [idle] = worker_pids(disp, 1)
    os.kill(idle, signal.SIGKILL)
    assert single.submit(pid).result(PATIENCE) != idle


def test_the_pools_timeout_and_retry_policy_count_for_calls(tmp_path: Path) -> None:
    twice = RetryPolicy(3, initial=0.01, retry_on=(OSError,))
    with Dispatcher([Pool(0, 1, timeout=0.2, retry=twice)]) as disp, disp.executor() as executor:
        error = executor.submit(nap, 60).exception(PATIENCE)
        assert isinstance(error, JobTimeout)
        assert isinstance(error, TimeoutError)
        assert executor.submit(fail_at_first, str(tmp_path / "tries"), 2).result(PATIENCE) == 3


def test_a_failing_initializer_breaks_the_pool_and_its_futures(start_method: str) -> None:
    pool = Pool(0, 1, initializer=fail, initargs=("not ready",), start_method=start_method)
    with Dispatcher([pool]) as disp:
        executor = disp.executor()
        error = executor.submit(nothing).exception(PATIENCE)
        assert isinstance(error, PoolBroken)
        assert isinstance(error, BrokenProcessPool)
        assert isinstance(error.__cause__, ValueError)
        with pytest.raises(PoolBroken, match="not ready") as caught:
            executor.submit(nothing)
        assert isinstance(caught.value, BrokenProcessPool)
        executor.shutdown()


# Futures


def test_a_waiting_call_is_cancelled_and_a_running_one_is_not(
    single: PoolExecutor, gate: Gate, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    running = hold(single, gate, "running")
    gate.wait_begun(1)
    waiting = single.submit(note, ran, "cancelled")
    behind = single.submit(note, ran, "behind")
    told: list[bool] = []
    waiting.add_done_callback(lambda future: told.append(future.cancelled()))
    assert waiting.cancel()
    assert waiting.cancel()
    assert waiting.cancelled()
    assert waiting.done()
    with pytest.raises(CancelledError):
        waiting.result(PATIENCE)
    assert concurrent.futures.wait([waiting, behind], PATIENCE, FIRST_COMPLETED).done == {waiting}
    assert next(as_completed([waiting, behind], PATIENCE)) is waiting
    assert not running.cancel()
    assert running.running()
    gate.open()
    assert running.result(PATIENCE) == "running"
    assert not running.cancel()
    behind.result(PATIENCE)
    assert lines(ran) == ["behind"]
    wait_until(lambda: told == [True])


def test_result_and_exception_wait_no_longer_than_they_are_told(single: PoolExecutor, gate: Gate) -> None:
    held = hold(single, gate, "held")
    for wait in (held.result, held.exception):
        with pytest.raises(TimeoutError):
            wait(0.01)
        with pytest.raises(TimeoutError):
            wait(0)
    gate.open()
    assert held.result(PATIENCE) == "held"
    assert held.exception(0) is None


def test_threads_that_wait_for_one_future_all_wake(single: PoolExecutor, gate: Gate) -> None:
    held = hold(single, gate, "held")
    waiting = [Call(held.result).until_waiting() for _ in range(4)]
    gate.open()
    assert [call.value() for call in waiting] == ["held"] * 4


def test_callbacks_run_in_the_order_of_their_adding_and_one_that_raises_is_logged(
    single: PoolExecutor, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    held = hold(single, gate, "held")
    called: list[object] = []
    held.add_done_callback(lambda future: called.append(future.result(0)))
    held.add_done_callback(lambda future: 1 // 0)  # type: ignore[arg-type]
    for number in range(10):
        held.add_done_callback(lambda future, number=number: called.append(number))
    with caplog.at_level(logging.ERROR, "bulkhead"):
        gate.open()
        wait_until(lambda: len(called) == 11)
    assert called == ["held", *range(10)]
    assert "ZeroDivisionError" in caplog.text
    held.add_done_callback(lambda future: called.append(threading.current_thread()))
    assert called[-1] is threading.current_thread()


def test_a_callback_that_takes_long_holds_up_no_result(single: PoolExecutor) -> None:
    may_end = threading.Event()
    first = single.submit(echo, 1)
    first.add_done_callback(lambda _: may_end.wait(PATIENCE))
    assert single.submit(echo, 2).result(PATIENCE) == 2
    assert concurrent.futures.wait([single.submit(echo, 3)], PATIENCE).not_done == set()
    may_end.set()


def test_a_callback_may_submit_and_wait(single: PoolExecutor) -> None:
    found: list[object] = []
    single.submit(echo, 1).add_done_callback(
        lambda future: found.append(single.submit(echo, future.result() + 1).result(PATIENCE))
    )
    wait_until(lambda: found == [2])


def test_a_future_that_is_done_is_kept_by_nobody_else(executor: PoolExecutor) -> None:
    future = executor.submit(make, set)
    result = weakref.ref(future.result(PATIENCE))
    known = weakref.ref(future)
    del future
    gc.collect()
    assert known() is None
    assert result() is None


def test_settled_calls_are_not_in_the_dispatchers_history(disp: Dispatcher, executor: PoolExecutor) -> None:
    known = len(disp.jobs())
    assert [future.result(PATIENCE) for future in [executor.submit(echo, n) for n in range(100)]]
    wait_until(lambda: len(disp.jobs()) <= known)


# Map


def counted(read: list[int]) -> Iterator[int]:
    for number in itertools.count():
        read.append(number)
        yield number


def test_map_submits_everything_at_once_without_a_buffersize(single: PoolExecutor, gate: Gate) -> None:
    held = hold(single, gate, "held")
    read: list[int] = []
    results = single.map(echo, itertools.islice(counted(read), 50))
    assert read == list(range(50))
    gate.open()
    held.result(PATIENCE)
    assert list(results) == list(range(50))


@pytest.mark.parametrize("chunksize", [1, 5])
def test_map_reads_no_more_than_buffersize_ahead(executor: PoolExecutor, chunksize: int) -> None:
    read: list[int] = []
    results = executor.map(echo, counted(read), buffersize=4, chunksize=chunksize)
    assert len(read) == 4 * chunksize
    for number in range(40):
        assert next(results) == number
        assert len(read) <= number + 1 + 5 * chunksize
    results.close()  # type: ignore[attr-defined]


def test_a_map_with_a_buffersize_ends_with_its_items(executor: PoolExecutor) -> None:
    assert list(executor.map(echo, range(7), buffersize=3)) == list(range(7))
    assert list(executor.map(echo, range(2), buffersize=3)) == [0, 1]
    assert list(executor.map(echo, range(0), buffersize=3)) == []
    assert list(executor.map(pow, range(7), itertools.count(1), chunksize=3, buffersize=2)) == [
        n ** (n + 1) for n in range(7)
    ]


def test_a_map_ends_with_the_first_error_and_cancels_the_rest(
    single: PoolExecutor, gate: Gate, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"

    def items() -> Iterator[Any]:
        yield "fails"
        yield from (f"item {number}" for number in range(500))

    results = single.map(note_or_fail, itertools.repeat(ran), items())
    with pytest.raises(ValueError, match="fails"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)
    single.shutdown()
    assert len(lines(ran)) < 500


def note_or_fail(path: Path, text: str) -> None:
    if text == "fails":
        raise ValueError(text)
    note(path, text)
    time.sleep(0.002)


def test_a_map_that_takes_too_long_raises_and_cancels_the_rest(single: PoolExecutor, gate: Gate) -> None:
    held = hold(single, gate, "held")
    results = single.map(echo, range(3), timeout=0.05)
    with pytest.raises(TimeoutError):
        list(results)
    gate.open()
    assert held.result(PATIENCE) == "held"


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"chunksize": 0}, ValueError),
        ({"chunksize": -1}, ValueError),
        ({"chunksize": 1.5}, TypeError),
        ({"buffersize": 0}, ValueError),
        ({"buffersize": "many"}, TypeError),
        ({"buffersize": True}, TypeError),
    ],
)
def test_options_of_map_that_cannot_work_are_refused(
    executor: PoolExecutor, option: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=next(iter(option))):
        executor.map(echo, [1], **option)


# Shutdown


def test_shutdown_ends_this_executor_and_the_pool_lives_on(disp: Dispatcher, gate: Gate) -> None:
    one, other = disp.executor(0), disp.executor(0)
    held = hold(other, gate, "held")
    gate.wait_begun(1)
    mine = [one.submit(echo, number) for number in range(20)]
    one.shutdown()
    assert [future.result(0) for future in mine] == list(range(20))
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        one.submit(nothing)
    one.shutdown()
    assert not held.done()
    gate.open()
    assert held.result(PATIENCE) == "held"
    assert disp.dispatch(Job(echo, 1).options(priority=0)).result(PATIENCE) == 1
    assert disp.executor(0).submit(echo, 2).result(PATIENCE) == 2


def test_shutdown_without_waiting_lets_the_calls_end(disp: Dispatcher, gate: Gate) -> None:
    executor = disp.executor(1)
    held = hold(executor, gate, "held")
    waiting = executor.submit(echo, 1)
    executor.shutdown(wait=False)
    assert not held.done()
    gate.open()
    executor.shutdown()
    assert (held.result(0), waiting.result(0)) == ("held", 1)


def test_shutdown_may_cancel_what_waits(disp: Dispatcher, gate: Gate) -> None:
    executor, other = disp.executor(1), disp.executor(1)
    held = hold(executor, gate, "held")
    gate.wait_begun(1)
    mine = [executor.submit(nothing) for _ in range(20)]
    its = other.submit(echo, 5)
    executor.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in mine)
    assert not held.done()
    gate.open()
    executor.shutdown()
    assert held.result(0) == "held"
    assert its.result(PATIENCE) == 5


def test_cancel_all_ends_the_calls_of_this_executor_alone(
    disp: Dispatcher, gate: Gate, tmp_path: Path
) -> None:
    mine, others = disp.executor(1), disp.executor(1)
    running = hold(mine, gate, "held")
    gate.wait_begun(1)
    waiting = [mine.submit(note, tmp_path / "ran", number) for number in range(3)]
    kept = others.submit(echo, 5)
    mine.cancel_all()
    assert mine.is_shut
    assert not others.is_shut
    assert kept.result(PATIENCE) == 5
    assert all(future.cancelled() for future in [running, *waiting])
    assert not lines(tmp_path / "ran")
    with pytest.raises(RuntimeError, match="after shutdown"):
        mine.submit(nothing)
    mine.cancel_all()
    wait_until_whole(disp, 1)


def test_shutdown_waits_for_callbacks(disp: Dispatcher) -> None:
    called: list[int] = []
    executor = disp.executor(0)
    for number in range(20):
        executor.submit(echo, number).add_done_callback(lambda future: called.append(future.result()))
    executor.shutdown()
    assert sorted(called) == list(range(20))


def test_shutdown_out_of_a_callback_waits_for_no_callback(disp: Dispatcher) -> None:
    executor = disp.executor(0)
    ended = threading.Event()

    def shut(_: object) -> None:
        executor.shutdown()
        ended.set()

    executor.submit(nothing).add_done_callback(shut)
    assert ended.wait(PATIENCE)


def test_threads_submit_while_another_shuts_down_and_each_call_is_refused_or_waited_for(
    disp: Dispatcher,
) -> None:
    for _ in range(20):
        executor = disp.executor(0)
        begun = threading.Barrier(5)

        def submit_until_refused(executor: PoolExecutor = executor, begun: Any = begun) -> list[JobFuture]:
            begun.wait()
            futures = []
            try:
                while True:
                    futures.append(executor.submit(nothing))
            except RuntimeError:
                return futures

        calls = [Call(submit_until_refused) for _ in range(4)]
        begun.wait()
        executor.shutdown()
        for future in [future for call in calls for future in call.value()]:
            assert future.result(0) is None


def test_finalize_runs_what_was_submitted() -> None:
    with Dispatcher([(0, 1)]) as disp:
        executor = disp.executor()
        futures = [executor.submit(echo, number) for number in range(100)]
    assert [future.result(0) for future in futures] == list(range(100))
    with pytest.raises(DispatcherFinalized, match="cannot schedule new futures after shutdown") as caught:
        executor.submit(nothing)
    assert isinstance(caught.value, RuntimeError)
    executor.shutdown()


def test_finalize_may_cancel_what_was_submitted(gate: Gate) -> None:
    disp = Dispatcher([(0, 1)])
    executor = disp.executor()
    futures = [hold(executor, gate, "held"), *(executor.submit(nothing) for _ in range(50))]
    gate.wait_begun(1)
    disp.finalize(cancel=True)
    assert all(future.cancelled() for future in futures)
    executor.shutdown()


def test_a_barrier_waits_for_what_was_submitted(disp: Dispatcher) -> None:
    disp.barrier(check=False)
    executor = disp.executor(1)
    futures = [executor.submit(echo, number) for number in range(50)]
    report = disp.barrier(1)
    assert all(future.done() for future in futures)
    assert report.pools[1].succeeded == 50


# Elsewhere


def submit_here() -> str:
    try:
        _inherited[0].submit(nothing)
    except NestedDispatch as error:
        return str(error)
    return "submitted"


_inherited: list[PoolExecutor] = []


def test_a_job_cannot_submit_to_the_executor_it_has_inherited(disp: Dispatcher) -> None:
    with pytest.raises(NestedDispatch):
        pickle.dumps(disp.executor(0))
    _inherited.append(disp.executor(0))
    try:
        with Dispatcher([Pool(0, 1, start_method="fork")]) as forked:
            assert "another process" in forked.executor().submit(submit_here).result(PATIENCE)
    finally:
        _inherited.clear()


# asyncio


def test_asyncio_runs_calls_in_the_executor_beside_trackers(disp: Dispatcher, executor: PoolExecutor) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(executor, echo, number) for number in range(50)]
        tracker = disp.dispatch(Job(echo, "tracked").options(priority=1))
        assert await asyncio.gather(*calls) == list(range(50))
        assert await tracker == "tracked"
        with pytest.raises(ValueError, match="no luck"):
            await loop.run_in_executor(executor, fail)
        with pytest.raises(WorkerCrashed):
            await loop.run_in_executor(executor, kill_self)

    asyncio.run(main())
    # Why: the next test counts processes, and the worker in the killed one's place may not be there yet.
    wait_until_whole(disp)


def test_asyncio_cancels_a_call_that_waits(single: PoolExecutor, gate: Gate, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    async def main() -> None:
        held = asyncio.wrap_future(hold(single, gate, "held"))
        await asyncio.to_thread(gate.wait_begun, 1)
        waiting = single.submit(note, ran, "cancelled")
        task = asyncio.wrap_future(waiting)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_until, waiting.cancelled)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(held), 0.01)
        gate.open()
        assert await held == "held"

    asyncio.run(main())
    single.shutdown()
    assert lines(ran) == []


def test_a_future_whose_end_was_decided_when_the_pool_was_hit_is_told_of_it() -> None:
    with Dispatcher([(0, 1)]) as disp:
        executor, pool = disp.executor(), disp._pools[0]
        running, waiting = executor.submit(time.sleep, 0.5), executor.submit(pow, 2, 5)
        assert waiting._job is not None
        # What a signal handler that raises leaves between a decision and its consequences.
        with pool.lock:
            pool._scheduler.cancel(waiting._job, JobCancelled("decided"), time.monotonic())
            pool._acting.ruin(ZeroDivisionError())
        assert waiting.cancelled()
        assert isinstance(running.exception(5), BrokenProcessPool)
