"""dispatch and try_dispatch (A1, A3, A4): every pool has its own processes, and who waits for them."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from gates import Gate
from jobs import echo, lines, nap, note, pid
from staffing import staffed

from bulkhead import Dispatcher, Job, JobNotFound, Pool, PoolFull

N_WORKERS = {0: 3, 1: 2}


@pytest.fixture(scope="module")
def disp(start_method: str) -> Iterator[Dispatcher]:
    pools = [Pool(priority, n, start_method=start_method) for priority, n in N_WORKERS.items()]
    with Dispatcher(pools) as disp:
        yield staffed(disp)


def test_each_pool_is_its_own_set_of_processes(disp: Dispatcher, gate: Gate) -> None:
    held = {p: [disp.dispatch(gate.job(priority=p)) for _ in range(n)] for p, n in N_WORKERS.items()}
    gate.wait_begun(5)
    pids = {p: {tracker.status().pid for tracker in trackers} for p, trackers in held.items()}
    gate.open()
    disp.barrier()

    assert [len(pids[p]) for p in N_WORKERS] == [3, 2]
    assert not pids[0] & pids[1]
    assert os.getpid() not in pids[0] | pids[1]
    assert pids == {p: {one.pid for one in disp.stats()[p].processes} for p in N_WORKERS}
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    assert pids[0] | pids[1] <= children


def test_a_job_runs_in_the_process_that_its_status_names(disp: Dispatcher) -> None:
    for _ in range(5):
        for priority in N_WORKERS:
            tracker = disp.dispatch(Job(pid).options(priority=priority))
            assert tracker.result() == tracker.status().pid


def test_a_pool_never_runs_more_jobs_at_once_than_it_has_workers(disp: Dispatcher) -> None:
    spans: dict[int, list[tuple[float, float]]] = {}

    def feed(priority: int) -> None:
        trackers = [disp.dispatch(Job(nap, 0.003).options(priority=priority)) for _ in range(60)]
        spans[priority] = [tracker.result() for tracker in trackers]

    feeders = [threading.Thread(target=feed, args=(priority,)) for priority in N_WORKERS]
    for feeder in feeders:
        feeder.start()
    for feeder in feeders:
        feeder.join()

    assert {priority: _most_at_once(spans[priority]) for priority in N_WORKERS} == N_WORKERS


def test_with_n_busy_workers_the_next_dispatch_returns_only_when_one_ends(
    disp: Dispatcher, gate: Gate
) -> None:
    naps = [disp.dispatch(Job(nap, 0.4))]
    held = [disp.dispatch(gate.job()) for _ in range(N_WORKERS[0] - 1)]

    extra = disp.dispatch(Job(echo, "extra"))
    returned = time.monotonic()

    (_, ended) = naps[0].result()
    assert returned >= ended
    assert not any(tracker.done() for tracker in held)
    assert extra.result(5) == "extra"
    gate.open()
    disp.barrier()


def test_each_worker_that_comes_free_lets_exactly_one_caller_in(disp: Dispatcher, gate: Gate) -> None:
    trackers = [disp.dispatch(gate.job(name, priority=1)) for name in ("a", "b")]
    let_in = []

    def call(name: str) -> None:
        tracker = disp.dispatch(gate.job(name, priority=1))
        let_in.append(name)
        trackers.append(tracker)

    callers = [threading.Thread(target=call, args=(name,)) for name in ("c", "d")]
    for caller in callers:
        caller.start()
    assert sorted(gate.wait_begun(2)) == ["a", "b"]

    gate.open("a")
    third = gate.wait_begun(3)[2]
    assert let_in in ([], [third])
    assert disp.stats()[1].running == 2
    assert len(gate.begun) == 3

    gate.open(third)
    assert sorted(gate.wait_begun(4)) == ["a", "b", "c", "d"]
    gate.open()
    for caller in callers:
        caller.join()
    assert sorted(tracker.result() for tracker in trackers) == ["a", "b", "c", "d"]


def test_dispatch_raises_pool_full_after_its_timeout_and_queues_nothing(
    disp: Dispatcher, gate: Gate, tmp_path: Path
) -> None:
    held = [disp.dispatch(gate.job(priority=1)) for _ in range(2)]
    known = disp.jobs()
    job = Job(note, tmp_path / "notes", "ran").options(priority=1, id="mine")

    began = time.monotonic()
    with pytest.raises(PoolFull, match=r"pool 1 .*0\.15 s") as caught:
        disp.dispatch(job, timeout=0.15)
    took = time.monotonic() - began

    assert 0.15 <= took < 0.5
    assert isinstance(caught.value, TimeoutError)
    assert disp.jobs() == known
    assert (disp.stats()[1].waiting, disp.stats()[1].running) == (0, 2)
    with pytest.raises(JobNotFound):
        disp.job("mine")
    gate.open()
    for tracker in held:
        tracker.result()
    disp.dispatch(job).result()
    disp.barrier()
    assert lines(tmp_path / "notes") == ["ran"]


def test_a_timeout_of_zero_tries_once(disp: Dispatcher, gate: Gate) -> None:
    disp.dispatch(Job(echo, 1).options(priority=1), timeout=0).result()
    for _ in range(2):
        disp.dispatch(gate.job(priority=1))
    with pytest.raises(PoolFull):
        disp.dispatch(Job(echo, 1).options(priority=1), timeout=0)
    gate.open()
    disp.barrier()


def test_try_dispatch_returns_none_at_once_and_queues_nothing(
    disp: Dispatcher, gate: Gate, tmp_path: Path
) -> None:
    for _ in range(2):
        disp.dispatch(gate.job(priority=1))
    known = disp.jobs()
    job = Job(note, tmp_path / "notes", "ran").options(priority=1, id="own")

    times = []
    for _ in range(20):
        began = time.monotonic()
        assert disp.try_dispatch(job) is None
        times.append(time.monotonic() - began)

    assert sorted(times)[10] < 0.01
    assert disp.jobs() == known
    assert disp.stats()[1].waiting == 0
    gate.open()
    disp.barrier()
    tracker = disp.try_dispatch(job)
    assert tracker is not None
    tracker.result()
    disp.barrier()
    assert lines(tmp_path / "notes") == ["ran"]


def test_a_full_pool_does_not_make_dispatch_to_another_pool_wait(disp: Dispatcher, gate: Gate) -> None:
    for _ in range(2):
        disp.dispatch(gate.job(priority=1))
    assert disp.dispatch(Job(echo, "free").options(priority=0), timeout=0).result(5) == "free"
    assert len(gate.wait_begun(2)) == 2
    gate.open()
    disp.barrier()


def _most_at_once(spans: list[tuple[float, float]]) -> int:
    steps = sorted([(began, 1) for began, _ in spans] + [(ended, -1) for _, ended in spans])
    most = now = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    return most
