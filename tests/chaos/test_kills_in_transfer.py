"""SIGKILL to the worker, its launcher or the caller in every phase of a large transfer: nothing is left, work goes on.

The slow ones do the same with 200 MB and with many more random instants: `pytest tests/chaos -m slow`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import data_jobs
import numpy as np
import psutil
import pytest
from data_jobs import MEGABYTE, Waits, filled, give_back, segments_of, shared_memory_bytes
from jobs import echo, lines, pid
from scripts import Script, running
from watching import PATIENCE, assert_whole, is_alive, launcher_pid, shared_memory, wait_until, worker_pids

from bulkhead import Dispatcher, Job, JobTimeout, Pool, RetryPolicy, WorkerCrashed

# The promise: no worker outlives its caller by more (seconds).
AFTERLIFE = 2.0

# Pools.
ONE, TWO = 0, 1

# At which a process may end that fills a segment (see `data_jobs.end_after`).
STEPS = ("write", "pages", "buffer")


@pytest.fixture(params=[20, pytest.param(200, marks=pytest.mark.slow)], ids=["20 MB", "200 MB"])
def size(request: pytest.FixtureRequest) -> int:
    return request.param * MEGABYTE


@pytest.fixture(scope="module")
def disp() -> Iterator[Dispatcher]:
    with Dispatcher([Pool(ONE, 1), Pool(TWO, 2)], max_history=0) as disp:
        for priority in (ONE, TWO):
            assert_whole(disp, priority)
        yield disp


@pytest.fixture(autouse=True)
def _next_job_is_fine_and_nothing_is_left(disp: Dispatcher, size: int) -> Iterator[None]:
    before = shared_memory_bytes()
    yield
    for priority in (ONE, TWO):
        assert_whole(disp, priority)
        found = disp.dispatch(Job(data_jobs.raised_by_one, filled(1, size)).options(priority=priority))
        assert np.array_equal(found.result(PATIENCE), filled(2, size))
        del found
        run(disp, echo, 1, priority=priority)  # tells the worker that its segment is free

    def is_nothing_left() -> bool:
        give_back(disp)
        if segments_of(os.getpid()):
            gc.collect()
        return not segments_of(os.getpid())

    wait_until(is_nothing_left, "the caller refers to no segment", within=5)
    # What the workers keep for their next results: they are known, everything else has to be gone.
    kept = sum(segments_of(*worker_pids(disp, ONE), *worker_pids(disp, TWO)).values())
    wait_until(lambda: shared_memory_bytes() - before < kept + size // 2, "nothing is left in shared memory")


def run(disp: Dispatcher, fn: Any, *args: Any, priority: int = ONE) -> Any:
    return disp.dispatch(Job(fn, *args).options(priority=priority)).result(PATIENCE)


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: not is_alive(process))


# The worker


def test_a_worker_that_dies_while_the_caller_fills_the_segment_is_replaced(
    disp: Dispatcher, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = run(disp, pid)
    write = os.pwrite

    def write_and_kill(*args: Any) -> int:
        if is_alive(worker):
            kill(worker)
        return write(*args)

    monkeypatch.setattr(os, "pwrite", write_and_kill)
    assert run(disp, data_jobs.total, filled(3, size)) == 3 * size
    assert not is_alive(worker)


def test_a_job_whose_worker_dies_before_it_has_read_it_runs_elsewhere(disp: Dispatcher, size: int) -> None:
    (worker,) = worker_pids(disp, ONE)
    os.kill(worker, signal.SIGSTOP)
    job = disp.dispatch(Job(data_jobs.raised_by_one, filled(3, size)))
    kill(worker)
    assert np.array_equal(job.result(PATIENCE), filled(4, size))


@pytest.mark.parametrize(
    "job",
    [
        lambda mark, gate, size: Job(data_jobs.call, filled(1, size), Waits(mark, gate, "rebuilt")),
        lambda mark, gate, size: Job(data_jobs.note_and_wait_with, str(mark), filled(1, size)),
        lambda mark, gate, size: Job(data_jobs.waits_when_pickled, mark, gate, filled(1, size)),
    ],
    ids=["unpickling", "running", "packing"],
)
@pytest.mark.parametrize("victim", ["worker", "launcher"])
def test_a_job_whose_worker_or_launcher_dies_while_it_is_at_work_has_crashed(
    disp: Dispatcher, tmp_path: Path, size: int, job: Callable[[Path, Path, int], Job], victim: str
) -> None:
    launcher = launcher_pid(disp, ONE)
    mark = tmp_path / "mark"
    tracker = disp.dispatch(job(mark, tmp_path / "gate", size))
    wait_until(lambda: lines(mark))
    kill(int(lines(mark)[0]) if victim == "worker" else launcher)
    assert type(tracker.exception(PATIENCE)) is WorkerCrashed


@pytest.mark.parametrize("step", STEPS)
def test_a_worker_that_dies_while_it_fills_the_segment_of_its_result_has_crashed(
    disp: Dispatcher, size: int, step: str
) -> None:
    # Why twice as large: it has to write beyond what the segment that it keeps has had.
    job = disp.dispatch(Job(data_jobs.die_while_filling, step, 1, 2 * size))
    assert type(job.exception(PATIENCE)) is WorkerCrashed


def test_a_result_that_its_worker_has_sent_counts_though_it_dies_before_the_caller_reads_it(
    disp: Dispatcher, tmp_path: Path, size: int
) -> None:
    mark, go_on, fill = tmp_path / "mark", tmp_path / "go on", tmp_path / "fill"
    # The thread that reads results is held up by the rebuilding of the first one.
    held_up = disp.dispatch(Job(data_jobs.waits_when_rebuilt, mark, go_on).options(priority=TWO))
    job = disp.dispatch(Job(data_jobs.fill_when_open, fill, 5, size, mark).options(priority=TWO))
    try:
        wait_until(lambda: lines(mark) == [str(os.getpid())])
        fill.touch()
        wait_until(lambda: len(lines(mark)) == 2)
        worker = lines(mark)[1]
        wait_until(lambda: status_of(worker) == psutil.STATUS_SLEEPING, "the answer is in the pipe")
        kill(int(worker))
    finally:
        go_on.touch()
    assert np.array_equal(job.result(PATIENCE), filled(5, size))
    held_up.result(PATIENCE)


def test_a_caller_that_cannot_rebuild_a_result_goes_on(disp: Dispatcher, size: int) -> None:
    for _ in range(3):
        error = disp.dispatch(Job(data_jobs.large_and_broken, size)).exception(PATIENCE)
        assert "ZeroDivisionError" in str(error)


def test_jobs_that_are_timed_out_or_cancelled_before_they_are_read_free_their_segments(
    disp: Dispatcher, size: int
) -> None:
    stopped = [*worker_pids(disp, ONE), *worker_pids(disp, TWO)]
    for worker in stopped:
        os.kill(worker, signal.SIGSTOP)
    array = filled(1, size)
    late = disp.dispatch(Job(data_jobs.total, array).options(timeout=0.1))
    cancelled = disp.dispatch(Job(data_jobs.total, array).options(priority=TWO))
    rescued = disp.dispatch(Job(data_jobs.total, array).options(priority=TWO))
    assert cancelled.cancel()
    assert type(late.exception(PATIENCE)) is JobTimeout
    wait_until(lambda: cancelled.done())
    for worker in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)
    assert rescued.result(PATIENCE) == size


def test_a_dispatcher_that_is_finalized_in_the_middle_of_transfers_leaves_nothing(
    size: int, tmp_path: Path
) -> None:
    mark, gate = tmp_path / "mark", tmp_path / "gate"
    array = filled(1, size)
    own = Dispatcher([Pool(0, 3, backlog=3)])
    shared = own.share(array)
    own.dispatch(Job(data_jobs.call, array, Waits(mark, gate, "rebuilt")))
    own.dispatch(Job(data_jobs.note_and_wait_with, str(mark), shared))
    own.dispatch(Job(data_jobs.waits_when_pickled, mark, gate, array))
    own.dispatch(Job(data_jobs.total, array))
    own.dispatch(Job(data_jobs.total, shared))
    wait_until(lambda: len(lines(mark)) == 3)
    own.finalize(cancel=True)
    assert data_jobs.values_in(shared.get()) == [1]
    del shared
    assert segments_of(os.getpid()) == {}


def kill_at_random(n_kills: int, size: int, seed: int) -> None:
    """Send data there and back while workers are killed at any instant; every job has to succeed in the end."""
    draw = random.Random(seed)
    policy = RetryPolicy(50, initial=0.0, jitter=0.0, retry_on=(WorkerCrashed,))
    is_over = threading.Event()
    killed = 0
    with Dispatcher([Pool(0, 2, retry=policy)], max_history=0) as own:
        assert_whole(own)
        longest = max(timed(own, size) for _ in range(2))

        def killer() -> None:
            nonlocal killed
            while killed < n_kills and not is_over.is_set():
                # Why a pause: the instant has to fall anywhere in a round trip, or while a worker starts.
                time.sleep(draw.uniform(0, 2 * longest))
                with contextlib.suppress(ProcessLookupError, IndexError):
                    os.kill(draw.choice(worker_pids(own)), signal.SIGKILL)
                    killed += 1

        thread = threading.Thread(target=killer)
        thread.start()
        try:
            number = 0
            while thread.is_alive():
                number += 1
                jobs = [
                    own.dispatch(Job(data_jobs.raised_by_one, filled(number % 200 + k, size)), timeout=60)
                    for k in range(3)
                ]
                for k, job in enumerate(jobs):
                    assert np.array_equal(job.result(60), filled(number % 200 + k + 1, size))
                del jobs, job
        finally:
            is_over.set()
            thread.join()
        assert_whole(own)
    assert segments_of(os.getpid()) == {}
    print(f"\n  {killed} workers killed at random, {3 * number} round trips of {size >> 20} MB, all right")


def timed(disp: Dispatcher, size: int) -> float:
    began = time.monotonic()
    run(disp, data_jobs.raised_by_one, filled(1, size))
    return time.monotonic() - began


def test_every_round_trip_is_right_while_workers_are_killed_at_random(size: int) -> None:
    kill_at_random(4, size, seed=size)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(3))
def test_every_round_trip_is_right_while_many_workers_are_killed_at_random(size: int, seed: int) -> None:
    kill_at_random(60 if size < 100 * MEGABYTE else 20, size, seed)


# The caller

CALLER = """
import os, signal, time
from pathlib import Path
import data_jobs
from bulkhead import Dispatcher, Job, Pool
from data_jobs import Waits, filled
from watching import wait_until, wait_until_whole, worker_pids

size, mark, gate = {size}, Path({mark!r}), Path("gate")

if __name__ == "__main__":
    disp = Dispatcher([Pool(0, 2, start_method="fork")])  # which need not import NumPy again
    wait_until_whole(disp)
    array = filled(1, size)
    shared = disp.share(array)
    jobs = [disp.dispatch(Job(data_jobs.keep, array)), disp.dispatch(Job(data_jobs.keep_slice, shared))]
    kept = disp.dispatch(Job(data_jobs.filled, 2, size)).result()
    disp.barrier()
    {phase}
    print("in the phase", flush=True)
    time.sleep(1000)
"""

# NumPy starts no threads when it is imported.
QUICK = {"OPENBLAS_NUM_THREADS": "1"}

SEND = "disp.dispatch(Job({}))"
MARKED = "; wait_until(mark.exists)"

PHASES = {
    **{
        f"filling, {step}": f"data_jobs.end_after({step!r}); "
        + SEND.format("data_jobs.totals, [filled(1, 2 * size), filled(1, size)]")
        for step in STEPS
    },
    "sharing": "data_jobs.end_after('write'); disp.share(array)",
    "sharing, placed in part": "data_jobs.end_after('buffer'); disp.share(array)",
    "not read": "[os.kill(pid, signal.SIGSTOP) for pid in worker_pids(disp)]; "
    + SEND.format("data_jobs.total, array"),
    "unpickling": SEND.format("data_jobs.call, array, Waits(mark, gate, 'rebuilt')") + MARKED,
    "running": SEND.format("data_jobs.note_and_wait_with, str(mark), array") + MARKED,
    "packing": SEND.format("data_jobs.waits_when_pickled, mark, gate, array") + MARKED,
    "result being filled": SEND.format("data_jobs.stop_while_filling, mark, 3 * size") + MARKED,
    "result not read": SEND.format("data_jobs.filled_and_noted, mark, 3, size")
    + "; os.kill(os.getpid(), signal.SIGSTOP)",
    "result being read": SEND.format("data_jobs.large_and_deadly, size") + ".result()",
}


def test_nothing_is_left_of_a_caller_that_is_killed_in_any_phase(size: int, tmp_path: Path) -> None:
    names, before = shared_memory(), shared_memory_bytes()
    # Why many at once: each waits for its imports most of the time. Why not all of the large ones: a gigabyte each.
    at_once = len(PHASES) if size < 100 * MEGABYTE else 2
    for phases in batches(list(PHASES), at_once):
        with contextlib.ExitStack() as stack:
            scripts = {}
            for name in phases:
                code = CALLER.format(size=size, phase=PHASES[name], mark=str(tmp_path / name))
                scripts[name] = stack.enter_context(running(code, env=QUICK))
            for name, script in scripts.items():
                kill_in_phase(name, script, tmp_path / name)
        wait_until(lambda: shared_memory_bytes() - before < size // 2, "nothing is left in shared memory")
    assert shared_memory() <= names


def batches(names: list[str], size: int) -> list[list[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


def kill_in_phase(name: str, script: Script, mark: Path) -> None:
    wait_until(lambda: is_in_phase(name, script, mark), f"{name}: is in the phase")
    with contextlib.suppress(ProcessLookupError):
        os.kill(script.pid, signal.SIGKILL)
    wait_until(lambda: not script.processes(), f"{name}: all have ended", within=AFTERLIFE)
    assert (script.wait(), script.errors()) == (-signal.SIGKILL, ""), name


def is_in_phase(name: str, script: Script, mark: Path) -> bool:
    if name == "result not read":
        # The worker sleeps again after it has made the result.
        return (
            script.is_stopped() and bool(lines(mark)) and status_of(lines(mark)[0]) == psutil.STATUS_SLEEPING
        )
    if name == "result being filled" and mark.exists():
        return status_of(lines(mark)[0]) == psutil.STATUS_STOPPED
    return bool(script.output()) or not script.is_running()


def status_of(pid: str) -> str:
    return psutil.Process(int(pid)).status()


ROUND_TRIPS = """
import data_jobs
from bulkhead import Dispatcher, Job, Pool

if __name__ == "__main__":
    disp = Dispatcher([Pool(0, 2, backlog=2)])
    print("ready", flush=True)
    trackers, kept = [], []  # also while the launcher and the workers come up
    while True:
        shared = disp.share(data_jobs.filled(1, {size} // 4))
        array = data_jobs.filled(1, {size})
        trackers += [disp.dispatch(Job(data_jobs.raised_by_one, array)), disp.dispatch(Job(data_jobs.total, shared))]
        while len(trackers) > 3:
            kept = [*kept[-2:], trackers.pop(0).result()]
"""


def kill_callers_at_random(rounds: int, size: int, seed: int) -> None:
    draw = random.Random(seed)
    names, before = shared_memory(), shared_memory_bytes()
    for _ in range(rounds):
        with contextlib.ExitStack() as stack:
            scripts = [stack.enter_context(running(ROUND_TRIPS.format(size=size))) for _ in range(2)]
            for script in scripts:
                script.wait_for_line("ready")
                # Why a pause: the instant has to fall anywhere in a round trip.
                time.sleep(draw.uniform(0.0, 0.5))
                os.kill(script.pid, signal.SIGKILL)
                wait_until(lambda script=script: not script.processes(), "all have ended", within=AFTERLIFE)
                assert script.errors() == ""
        wait_until(lambda: shared_memory_bytes() - before < size // 2, "nothing is left in shared memory")
        assert shared_memory() <= names


def test_nothing_is_left_of_callers_that_are_killed_at_random(size: int) -> None:
    kill_callers_at_random(1, size, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_is_left_of_many_callers_that_are_killed_at_random(size: int) -> None:
    kill_callers_at_random(10, size, seed=2)
