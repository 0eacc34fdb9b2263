"""barrier() (A15, A16): what it waits for, what it reports, and that the same workers go on."""

import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from calling import Call, at_once
from gates import Gate
from jobs import echo, fail, fail_at_first, lines, note, pid
from staffing import staffed
from watching import wait_until

from bulkhead import BarrierTimeout, Dispatcher, Job, JobsFailed, Pool, RetryPolicy, UnknownPriority


@pytest.fixture(scope="module")
def disp(start_method: str) -> Iterator[Dispatcher]:
    pools = [Pool(0, 2, backlog=None, start_method=start_method), Pool(1, 1, start_method=start_method)]
    with Dispatcher(pools) as disp:
        yield staffed(disp)


def test_phase_2_sees_all_effects_of_phase_1_and_runs_on_the_same_workers(
    disp: Dispatcher, tmp_path: Path
) -> None:
    pids = {p: {worker.pid for worker in disp.stats()[p].processes} for p in (0, 1)}
    for phase in range(10):
        for number in range(20):
            disp.dispatch(Job(note, tmp_path / f"{phase}", number).options(priority=number % 2))
        report = disp.barrier()
        assert report.succeeded == 20
        seen = [disp.dispatch(Job(lines, tmp_path / f"{phase}").options(priority=p)) for p in (0, 1)]
        for tracker in seen:
            assert sorted(map(int, tracker.result())) == list(range(20))
        disp.barrier()
    assert {p: {worker.pid for worker in disp.stats()[p].processes} for p in (0, 1)} == pids
    for priority in (0, 1):
        ran_on = {disp.dispatch(Job(pid).options(priority=priority)).result() for _ in range(20)}
        assert ran_on <= pids[priority]
    disp.barrier()


def test_retries_of_a_job_of_the_phase_are_waited_for(disp: Dispatcher, tmp_path: Path) -> None:
    policy = RetryPolicy(3, initial=0.05)
    tracker = disp.dispatch(Job(fail_at_first, tmp_path / "attempts", 2).options(retry=policy))
    disp.dispatch(Job(echo, 1))
    report = disp.barrier()
    assert (tracker.result(0), tracker.status().attempt) == (3, 3)
    assert (report.succeeded, report.failed_count) == (2, 0)


def test_jobs_that_other_threads_dispatch_meanwhile_are_not_waited_for(disp: Dispatcher, gate: Gate) -> None:
    first = disp.dispatch(gate.job("first"))
    gate.wait_begun(1)
    caller = Call(disp.barrier).until_waiting()
    meanwhile = disp.dispatch(gate.job("meanwhile"))
    gate.wait_begun(2)
    assert not caller.has_returned

    gate.open("first")
    report = caller.value()
    assert first.done()
    assert not meanwhile.done()
    assert report.succeeded == 1
    gate.open()
    assert disp.barrier().succeeded == 1


def test_a_barrier_returns_though_other_threads_never_stop_dispatching(disp: Dispatcher) -> None:
    is_over = threading.Event()

    def flow(_: int) -> None:
        while not is_over.is_set():
            disp.dispatch(Job(echo, 1)).result()

    flows = at_once(3, flow)
    for _ in range(20):
        disp.barrier(timeout=10)
    is_over.set()
    for one in flows:
        one.value()
    disp.barrier()


def test_jobs_failed_is_raised_when_all_have_settled_and_the_pools_go_on(disp: Dispatcher) -> None:
    failing = [disp.dispatch(Job(fail, f"number {n}").options(id=f"bad-{n}")) for n in range(3)]
    urgent = disp.dispatch(Job(fail, "urgent").options(priority=1))
    good = [disp.dispatch(Job(echo, n)) for n in range(20)]

    with pytest.raises(JobsFailed) as caught:
        disp.barrier()

    group = caught.value
    assert all(tracker.done() for tracker in (*failing, urgent, *good))
    assert group.job_ids == ("bad-0", "bad-1", "bad-2", urgent.id)
    assert [str(error) for error in group.exceptions] == ["number 0", "number 1", "number 2", "urgent"]
    assert isinstance(group, ExceptionGroup)
    assert "4 jobs failed: 'bad-0', 'bad-1', 'bad-2'" in str(group)
    assert [disp.dispatch(Job(echo, n).options(priority=n)).result() for n in (0, 1)] == [0, 1]
    assert disp.barrier().failed == ()


def test_jobs_failed_can_be_split_by_type_and_keeps_the_ids(disp: Dispatcher) -> None:
    disp.dispatch(Job(fail, "value").options(id="value"))
    disp.dispatch(Job(pow, "a", 2).options(id="type"))
    caught = []
    try:
        disp.barrier()
    except* TypeError as group:
        caught.append(group.job_ids)
    except* ValueError as group:
        caught.append(group.job_ids)
    assert caught == [("type",), ("value",)]


def test_jobs_failed_survives_pickling(disp: Dispatcher) -> None:
    disp.dispatch(Job(fail, "text").options(id="mine"))
    with pytest.raises(JobsFailed) as caught:
        disp.barrier()
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.job_ids, str(copy.exceptions[0]), copy.total) == (("mine",), "text", 1)


def test_without_check_failures_are_only_reported(disp: Dispatcher, gate: Gate) -> None:
    bad = [disp.dispatch(Job(fail)) for _ in range(2)]
    for number in range(3):
        disp.dispatch(Job(echo, number))
    running = disp.dispatch(gate.job(priority=1))
    gate.wait_begun(1)
    assert running.cancel()

    report = disp.barrier(check=False)

    assert report.failed == tuple(bad)
    assert {p: (c.succeeded, c.failed, c.cancelled) for p, c in report.pools.items()} == {
        0: (3, 2, 0),
        1: (0, 0, 1),
    }
    assert (report.succeeded, report.failed_count, report.cancelled) == (3, 2, 1)
    assert 0 < report.elapsed < 10
    wait_until(lambda: disp.stats()[1].idle == 1)


def test_each_failure_is_reported_by_one_barrier(disp: Dispatcher) -> None:
    disp.dispatch(Job(fail))
    with pytest.raises(JobsFailed):
        disp.barrier()
    report = disp.barrier()
    assert (report.succeeded, report.failed_count, report.cancelled) == (0, 0, 0)


def test_a_barrier_of_one_pool_neither_waits_for_nor_reports_another(disp: Dispatcher, gate: Gate) -> None:
    held = disp.dispatch(gate.job())
    bad = disp.dispatch(Job(fail))
    urgent = disp.dispatch(Job(echo, 1).options(priority=1))

    report = disp.barrier(1)

    assert list(report.pools) == [1]
    assert report.succeeded == 1
    assert urgent.done()
    assert not held.done()
    gate.open()
    assert disp.barrier(0, check=False).failed == (bad,)
    assert disp.barrier().failed_count == 0


def test_an_unknown_priority_raises(disp: Dispatcher) -> None:
    with pytest.raises(UnknownPriority, match="priority 9"):
        disp.barrier(9)


def test_a_barrier_that_runs_out_of_time_names_what_is_pending(disp: Dispatcher, gate: Gate) -> None:
    for _ in range(2):
        disp.dispatch(gate.job())
    queued = disp.dispatch(gate.job(id="queued"))
    delayed = disp.dispatch(Job(echo, 1).options(id="delayed", delay=0.5))
    urgent = disp.dispatch(gate.job(priority=1, id="urgent"))
    quick = disp.dispatch(Job(echo, 1).options(id="quick", delay=0.01, priority=1))
    gate.wait_begun(3)
    running = [job.id for job in disp.jobs("running") if job.priority == 0]

    began = time.monotonic()
    with pytest.raises(BarrierTimeout, match=r"6 jobs have not settled within 0\.1 s") as caught:
        disp.barrier(timeout=0.1)
    assert 0.1 <= time.monotonic() - began < 0.6
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.pending == (*running, "queued", "delayed", "urgent", "quick")

    gate.open()
    report = disp.barrier(timeout=10)
    assert report.succeeded == 6
    assert all(tracker.done() for tracker in (queued, delayed, urgent, quick))


def test_a_barrier_with_a_timeout_of_zero_looks_once(disp: Dispatcher, gate: Gate) -> None:
    tracker = disp.dispatch(gate.job())
    with pytest.raises(BarrierTimeout) as caught:
        disp.barrier(timeout=0)
    assert caught.value.pending == (tracker.id,)
    gate.open()
    disp.barrier()
    assert disp.barrier(timeout=0).succeeded == 0


def test_failures_before_a_barrier_that_ran_out_of_time_are_reported_by_the_next(
    disp: Dispatcher, gate: Gate
) -> None:
    bad = disp.dispatch(Job(fail))
    bad.wait()
    disp.dispatch(gate.job())
    with pytest.raises(BarrierTimeout):
        disp.barrier(timeout=0.01)
    later = disp.dispatch(Job(fail))
    gate.open()
    with pytest.raises(JobsFailed) as caught:
        disp.barrier()
    assert caught.value.job_ids == (bad.id, later.id)


def test_barriers_of_several_threads_all_return(disp: Dispatcher, gate: Gate) -> None:
    for _ in range(3):
        disp.dispatch(gate.job())
    bad = disp.dispatch(Job(fail))
    callers = [Call(disp.barrier, check=False).until_waiting() for _ in range(4)]
    gate.open()
    reports = [caller.value() for caller in callers]
    assert sum(report.succeeded for report in reports) == 3
    assert [report.failed for report in reports if report.failed] == [(bad,)]


def test_a_barrier_with_nothing_to_wait_for_returns_at_once(disp: Dispatcher) -> None:
    report = disp.barrier(timeout=0)
    assert (report.succeeded, report.failed_count, report.cancelled, report.failed) == (0, 0, 0, ())
    assert list(report.pools) == [1, 0]


def test_a_barrier_waits_for_jobs_that_no_worker_could_take_yet() -> None:
    # Why not the module's: here the workers are still starting.
    with Dispatcher([Pool(0, 1, backlog=None)]) as fresh:
        trackers = [fresh.dispatch(Job(echo, number)) for number in range(5)]
        fresh.barrier()
        assert all(tracker.done() for tracker in trackers)
