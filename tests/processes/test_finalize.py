"""finalize() (A17): refuses, waits or cancels, ends everything, and leaves nothing."""

import contextlib
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from calling import Call
from gates import Gate
from jobs import echo, fail, fail_at_first, lines, note, nothing, spin
from staffing import staffed
from traces import Traces
from watching import alive, children, wait_until

from bulkhead import (
    BulkheadError,
    Dispatcher,
    DispatcherFinalized,
    Job,
    JobCancelled,
    JobState,
    Pool,
    RetryPolicy,
    Tracker,
)


@pytest.fixture
def disp(usual_start_method: str) -> Iterator[Dispatcher]:
    pools = [
        Pool(0, 2, backlog=None, start_method=usual_start_method),
        Pool(1, 1, start_method=usual_start_method),
    ]
    with staffed(Dispatcher(pools)) as disp:
        yield disp
        disp.finalize(cancel=True)


@pytest.fixture
def disp_everywhere(start_method: str) -> Iterator[Dispatcher]:
    pools = [Pool(0, 2, backlog=None, start_method=start_method), Pool(1, 1, start_method=start_method)]
    with staffed(Dispatcher(pools)) as disp:
        yield disp
        disp.finalize(cancel=True)


def pids_of(disp: Dispatcher) -> list[int]:
    return [worker.pid for pool in disp.stats().pools.values() for worker in pool.processes if worker.pid]


def test_accepted_jobs_end_then_all_processes_and_threads(
    disp_everywhere: Dispatcher, gate: Gate, tmp_path: Path
) -> None:
    policy = RetryPolicy(3, initial=0.02)
    trackers = [disp_everywhere.dispatch(gate.job()) for _ in range(5)]
    trackers += [
        disp_everywhere.dispatch(Job(echo, 1).options(delay=0.1)),
        disp_everywhere.dispatch(Job(fail_at_first, tmp_path / "attempts", 2).options(retry=policy)),
        disp_everywhere.dispatch(gate.job(priority=1)),
    ]
    pids = pids_of(disp_everywhere)
    closer = Call(disp_everywhere.finalize)
    gate.wait_begun(3)
    assert not closer.has_returned

    gate.open()
    closer.value()
    assert [tracker.status().state for tracker in trackers] == [JobState.SUCCEEDED] * 8
    assert alive(pids) == []
    assert children() == []
    assert [thread.name for thread in threading.enumerate() if "bulkhead" in thread.name] == []


def test_a_second_finalize_does_nothing(disp: Dispatcher) -> None:
    tracker = disp.dispatch(Job(echo, 1))
    disp.finalize()
    for cancel in (False, True):
        began = time.monotonic()
        disp.finalize(cancel=cancel, timeout=5)
        assert time.monotonic() - began < 0.1
    assert tracker.result() == 1


def test_cancel_cancels_what_waits_and_kills_what_runs(disp: Dispatcher, gate: Gate, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    running = [disp.dispatch(gate.job()) for _ in range(2)]
    queued = [disp.dispatch(Job(note, ran, "queued")) for _ in range(3)]
    delayed = disp.dispatch(Job(note, ran, "delayed").options(delay=60.0))
    spinning = disp.dispatch(Job(spin, 60.0).options(priority=1))
    gate.wait_begun(2)
    pids = pids_of(disp)

    began = time.monotonic()
    disp.finalize(cancel=True)

    assert time.monotonic() - began < 3
    for tracker in (*running, *queued, delayed, spinning):
        assert tracker.status().state == JobState.CANCELLED
        with pytest.raises(JobCancelled, match=f"job {tracker.id} was cancelled"):
            tracker.result(0)
    assert alive(pids) == []
    assert lines(ran) == []


def test_a_timeout_bounds_the_wait_and_then_cancels(disp: Dispatcher, gate: Gate) -> None:
    quick = disp.dispatch(Job(echo, 1))
    held = disp.dispatch(gate.job())
    delayed = disp.dispatch(Job(echo, 1).options(delay=60.0))
    gate.wait_begun(1)
    began = time.monotonic()
    disp.finalize(timeout=0.3)
    assert 0.3 <= time.monotonic() - began < 3
    states = [tracker.status().state for tracker in (quick, held, delayed)]
    assert states == [JobState.SUCCEEDED, JobState.CANCELLED, JobState.CANCELLED]


def test_a_timeout_that_is_not_needed_is_not_waited_for(disp: Dispatcher) -> None:
    tracker = disp.dispatch(Job(echo, 1))
    began = time.monotonic()
    disp.finalize(timeout=60)
    assert time.monotonic() - began < 3
    assert tracker.result(0) == 1


def test_a_job_that_ignores_sigterm_does_not_hold_finalize_up(disp: Dispatcher, gate: Gate) -> None:
    tracker = disp.dispatch(Job(_ignore_sigterm, gate.job("stubborn").args))
    gate.wait_begun(1)
    pids = pids_of(disp)
    began = time.monotonic()
    disp.finalize(cancel=True)
    assert time.monotonic() - began < 5
    assert tracker.status().state == JobState.CANCELLED
    assert alive(pids) == []


def test_finalize_while_the_workers_start_ends_them(start_method: str) -> None:
    for _ in range(3):
        disp = Dispatcher([Pool(0, 2, start_method=start_method), Pool(1, 2, start_method=start_method)])
        disp.finalize()
        assert children() == []
        assert [pool.succeeded for pool in disp.stats().pools.values()] == [0, 0]


def test_leaving_the_block_finalizes(disp: Dispatcher, gate: Gate) -> None:
    with disp as entered:
        assert entered is disp
        tracker = disp.dispatch(gate.job())
        opener = Call(gate.open)
    assert tracker.result(0) == "job-1"
    opener.value()
    with pytest.raises(DispatcherFinalized):
        disp.dispatch(Job(nothing))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_leaving_the_block_by_an_exception_cancels(gate: Gate, error: type[BaseException]) -> None:
    trackers: list[Tracker] = []

    def script() -> None:
        with Dispatcher([Pool(0, 1, backlog=1)]) as disp:
            trackers.extend(disp.dispatch(gate.job()) for _ in range(2))
            gate.wait_begun(1)
            raise error

    began = time.monotonic()
    with pytest.raises(error):
        script()
    assert time.monotonic() - began < 5
    assert [tracker.status().state for tracker in trackers] == [JobState.CANCELLED] * 2
    assert len(gate.begun) == 1


def test_every_way_to_dispatch_is_refused_afterwards(disp: Dispatcher) -> None:
    disp.dispatch(Job(nothing)).result()
    disp.finalize()
    for dispatch in (
        lambda: disp.dispatch(Job(nothing).options(id="late")),
        lambda: disp.dispatch(Job(nothing), timeout=1),
        lambda: disp.dispatch(Job(nothing).options(delay=1)),
        lambda: disp.try_dispatch(Job(nothing)),
        lambda: list(disp.dispatch_all([Job(nothing)])),
    ):
        with pytest.raises(DispatcherFinalized, match="finalized"):
            dispatch()
    assert issubclass(DispatcherFinalized, BulkheadError)
    assert len(disp.jobs()) == 1


def test_everything_else_still_answers_afterwards(disp: Dispatcher) -> None:
    good, bad = disp.dispatch(Job(echo, 1).options(id="good")), disp.dispatch(Job(fail))
    disp.finalize()
    assert (good.result(), good.wait(0), good.done()) == (1, True, True)
    assert isinstance(bad.exception(), ValueError)
    assert disp.job("good") is good
    assert disp.jobs() == [good, bad]
    assert (disp.stats()[0].succeeded, disp.stats()[0].failed) == (1, 1)
    assert disp.barrier(check=False).failed == (bad,)
    assert not good.cancel()
    called: list[Tracker] = []
    good.add_done_callback(called.append)
    wait_until(lambda: called == [good])


def test_a_caller_that_waits_for_room_is_refused_at_once(disp: Dispatcher, gate: Gate) -> None:
    disp.dispatch(gate.job(priority=1))
    gate.wait_begun(1)
    callers = [Call(disp.dispatch, Job(echo, n).options(priority=1)).until_waiting() for n in range(3)]
    closer = Call(disp.finalize)
    for caller in callers:
        with pytest.raises(DispatcherFinalized):
            caller.value()
    assert not closer.has_returned
    gate.open()
    closer.value()
    assert disp.stats()[1].succeeded == 1


def test_threads_that_wait_for_results_and_barriers_get_them(disp: Dispatcher, gate: Gate) -> None:
    tracker = disp.dispatch(gate.job())
    doomed = disp.dispatch(Job(echo, 1).options(delay=60.0))
    result = Call(tracker.result).until_waiting()
    barrier = Call(disp.barrier).until_waiting()
    lost = Call(doomed.result).until_waiting()
    disp.finalize(cancel=True)
    for call in (result, lost):
        with pytest.raises(JobCancelled):
            call.value()
    assert barrier.value().cancelled == 2


def test_done_callbacks_are_waited_for(disp: Dispatcher) -> None:
    seen: list[int] = []

    def slow(tracker: Tracker) -> None:
        time.sleep(0.2)
        seen.append(tracker.id)

    for _ in range(2):
        disp.dispatch(Job(nothing)).add_done_callback(slow)
    disp.finalize()
    assert sorted(seen) == [0, 1]


def test_a_done_callback_may_finalize() -> None:
    disp = Dispatcher([(0, 1)])
    done = threading.Event()

    def close(_: Tracker) -> None:
        disp.finalize()
        done.set()

    disp.dispatch(Job(nothing)).add_done_callback(close)
    assert done.wait(10)
    disp.finalize()


def test_a_dispatcher_that_is_dropped_warns_and_ends_its_processes() -> None:
    pids: list[int] = []

    def use_and_drop() -> None:
        disp = staffed(Dispatcher([(0, 2)]))
        disp.dispatch(Job(echo, 1)).wait()
        pids.extend(pids_of(disp))
        assert len(alive(pids)) == 2
        del disp
        gc.collect()

    with pytest.warns(ResourceWarning, match="dropped without finalize"):
        use_and_drop()
    wait_until(lambda: not alive(pids))


def test_a_script_that_forgets_finalize_lets_its_jobs_end(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from bulkhead import Dispatcher, Job, Pool\n"
        "from jobs import note\n"
        'if __name__ == "__main__":\n'
        "    disp = Dispatcher([Pool(0, 1, backlog=None)])\n"
        "    for number in range(20):\n"
        "        disp.dispatch(Job(note, sys.argv[1], number))\n"
    )
    ran = tmp_path / "ran"
    done = subprocess.run(
        [sys.executable, script, ran, *sys.path], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert lines(ran) == [str(number) for number in range(20)]


def cycle(start_method: str) -> None:
    with Dispatcher([Pool(0, 2, start_method=start_method)]) as disp:  # type: ignore[arg-type]
        trackers = [disp.dispatch(Job(echo, number)) for number in range(20)]
        trackers[-1].add_done_callback(repr)
        disp.barrier()
        assert [tracker.result() for tracker in trackers] == list(range(20))


@pytest.mark.parametrize("cycles", [8, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(300)])])
def test_cycles_of_start_jobs_and_finalize_leave_nothing(start_method: str, cycles: int) -> None:
    cycle(start_method)
    gc.collect()
    before = Traces.now()
    began = time.monotonic()
    most = before.counts()
    for _ in range(cycles):
        cycle(start_method)
        # Why at once, without waiting: finalize has returned, so everything has ended.
        most = tuple(map(max, most, Traces.now().counts()))
    took = time.monotonic() - began
    after = Traces.now()
    print(f"{cycles} cycles under {start_method}, {took / cycles * 1000:.0f} ms each:", end=" ")
    for name in ("processes", "threads", "descriptors", "shared_memory"):
        print(name, len(getattr(before, name)), "->", len(getattr(after, name)), end="; ")
    # Shared memory is compared by the fixture of all tests, which can tell ours from that of other programs.
    assert after.counts() == before.counts() == most


def _ignore_sigterm(at_gate: tuple[str, str]) -> None:
    import signal

    from gates import pass_gate

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(TimeoutError):
        pass_gate(*at_gate)
