"""A worker that dies, wherever it is, costs its own job and nothing else (C1); what a crash tells (C14)."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import faulty_jobs
import psutil
import pytest
from watching import (
    PATIENCE,
    alive,
    assert_whole,
    bytes_moved,
    is_alive,
    launcher_pid,
    read_pids,
    wait_until,
    wait_until_whole,
    worker_pids,
)

from bulkhead import Dispatcher, Job, JobTimeout, Pool, PoolBroken, RemoteError, WorkerCrashed
from bulkhead.engines.processes import pool, staff
from bulkhead.engines.processes.segments import SegmentPool

LARGE = 100 * faulty_jobs.MEGABYTE


@pytest.fixture
def disp(usual_start_method: str) -> Iterator[Dispatcher]:
    """Two workers, and room for jobs that wait behind the one that crashes."""
    disp = Dispatcher([Pool(0, 2, backlog=None, start_method=usual_start_method)])
    yield disp
    disp.finalize(cancel=True)


@pytest.fixture
def disp_everywhere(start_method: str) -> Iterator[Dispatcher]:
    """Two workers, and room for jobs that wait behind the one that crashes."""
    disp = Dispatcher([Pool(0, 2, backlog=None, start_method=start_method)])
    yield disp
    disp.finalize(cancel=True)


@pytest.fixture
def single() -> Iterator[Dispatcher]:
    """One worker, so that it is known who gets the next job."""
    disp = Dispatcher([Pool(0, 1, backlog=None)])
    wait_until_whole(disp)
    yield disp
    disp.finalize(cancel=True)


def assert_only_this_fails(disp: Dispatcher, job: Job, error_type: type[Exception]) -> Exception:
    """Run the job in front of six good ones; return its error."""
    faulty = disp.dispatch(job)
    others = [disp.dispatch(Job(faulty_jobs.double, number)) for number in range(6)]
    with pytest.raises(error_type) as caught:
        faulty.result(PATIENCE)
    assert [tracker.result(PATIENCE) for tracker in others] == [0, 2, 4, 6, 8, 10]
    report = disp.barrier(timeout=PATIENCE, check=False)
    assert (report.succeeded, report.failed_count) == (6, 1)
    assert faulty.status().attempt == 1
    assert_whole(disp)
    return caught.value


@pytest.mark.parametrize(
    ("job", "name", "code"),
    [
        (Job(faulty_jobs.kill_self, signal.SIGKILL), "SIGKILL", None),
        (Job(faulty_jobs.kill_self, signal.SIGTERM), "SIGTERM", None),
        (Job(faulty_jobs.segfault), "SIGSEGV", None),
        (Job(os.abort), "SIGABRT", None),
        (Job(faulty_jobs.exit_with, 0), None, 0),
        (Job(faulty_jobs.exit_with, 3), None, 3),
    ],
    ids=["SIGKILL", "SIGTERM", "SIGSEGV", "abort", "exit 0", "exit 3"],
)
def test_a_worker_that_dies_while_it_runs_a_job_fails_that_job_alone_and_says_how_it_died(
    disp: Dispatcher, job: Job, name: str | None, code: int | None
) -> None:
    error = assert_only_this_fails(disp, job, WorkerCrashed)
    assert isinstance(error, WorkerCrashed)
    assert (error.signal, error.exit_code) == (name, code)
    assert error.pid is not None
    assert error.pid != os.getpid()
    assert str(error.pid) in str(error)


def test_an_idle_worker_that_is_killed_costs_no_job_and_is_replaced(disp_everywhere: Dispatcher) -> None:
    wait_until_whole(disp_everywhere)
    before = worker_pids(disp_everywhere)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(before))
    trackers = [disp_everywhere.dispatch(Job(faulty_jobs.own_pid), timeout=PATIENCE) for _ in range(6)]
    assert not {tracker.result(PATIENCE) for tracker in trackers} & set(before)
    assert disp_everywhere.barrier(timeout=PATIENCE).failed_count == 0
    assert_whole(disp_everywhere)
    assert disp_everywhere.stats()[0].restarts == 2


def test_a_job_that_was_sent_to_a_worker_which_died_before_reading_it_runs_elsewhere(
    single: Dispatcher,
) -> None:
    for _ in range(3):
        wait_until_whole(single)
        (pid,) = worker_pids(single)
        os.kill(pid, signal.SIGSTOP)
        tracker = single.dispatch(Job(faulty_jobs.own_pid))
        os.kill(pid, signal.SIGKILL)
        assert tracker.result(PATIENCE) != pid
        assert tracker.status().attempt == 1


def test_a_kill_and_a_dispatch_at_the_same_time_end_in_a_result_or_a_crash(single: Dispatcher) -> None:
    for _ in range(10):
        wait_until_whole(single)
        (pid,) = worker_pids(single)
        killer = threading.Thread(target=os.kill, args=(pid, signal.SIGKILL))
        killer.start()
        tracker = single.dispatch(Job(faulty_jobs.own_pid), timeout=PATIENCE)
        killer.join()
        error = tracker.exception(PATIENCE)
        assert error is None or isinstance(error, WorkerCrashed)
    assert single.barrier(timeout=PATIENCE, check=False).failed_count + single.stats()[0].succeeded == 10


def test_an_argument_that_kills_its_reader_fails_its_job_alone(disp_everywhere: Dispatcher) -> None:
    error = assert_only_this_fails(
        disp_everywhere, Job(faulty_jobs.take, faulty_jobs.KillsItsReader()), WorkerCrashed
    )
    assert isinstance(error, WorkerCrashed)
    assert error.signal == "SIGKILL"


def test_a_worker_killed_in_the_middle_of_a_100_mb_argument_fails_its_job_alone(
    single: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the pipe, as it goes when there is no shared memory for it."""
    monkeypatch.setattr(SegmentPool, "place", faulty_jobs.no_room)
    (pid,) = worker_pids(single)
    before = bytes_moved()
    tracker = single.dispatch(Job(faulty_jobs.size_of, bytes(LARGE)))
    waiting = single.dispatch(Job(faulty_jobs.double, 4))
    wait_until(lambda: bytes_moved() > before + LARGE // 10)
    os.kill(pid, signal.SIGKILL)
    moved = bytes_moved() - before
    assert isinstance(tracker.exception(PATIENCE), WorkerCrashed)
    assert moved < LARGE, "the argument was through already; the test proves nothing"
    assert waiting.result(PATIENCE) == 8
    assert single.dispatch(Job(faulty_jobs.size_of, bytes(LARGE))).result(PATIENCE) == LARGE
    assert_whole(single)


def test_a_worker_killed_in_the_middle_of_a_100_mb_result_fails_its_job_alone(single: Dispatcher) -> None:
    """Through the pipe, as it goes when there is no shared memory for it."""
    (pid,) = worker_pids(single)
    before = bytes_moved()
    tracker = single.dispatch(Job(faulty_jobs.zeros_through_the_pipe, LARGE))
    waiting = single.dispatch(Job(faulty_jobs.double, 4))
    wait_until(lambda: bytes_moved() > before + LARGE // 10)
    os.kill(pid, signal.SIGKILL)
    moved = bytes_moved() - before
    assert isinstance(tracker.exception(PATIENCE), WorkerCrashed)
    assert moved < LARGE, "the result was through already; the test proves nothing"
    assert waiting.result(PATIENCE) == 8
    assert len(single.dispatch(Job(faulty_jobs.zeros_through_the_pipe, LARGE)).result(PATIENCE)) == LARGE
    assert_whole(single)


def test_a_result_that_was_written_before_the_worker_died_counts(single: Dispatcher) -> None:
    for _ in range(10):
        tracker = single.dispatch(Job(faulty_jobs.answer_and_die), timeout=PATIENCE)
        assert tracker.result(PATIENCE) == "answered"
        (pid,) = [tracker.status().pid]
        assert pid is not None
        wait_until(lambda pid=pid: not is_alive(pid))
    assert_whole(single)


def test_a_worker_that_dies_in_its_initializer_once_is_replaced_and_costs_no_job(
    start_method: str, tmp_path: Path
) -> None:
    pool = Pool(
        0, 2, initializer=faulty_jobs.crash_first_start, initargs=(tmp_path,), start_method=start_method
    )
    with Dispatcher([pool]) as disp:
        assert disp.dispatch(Job(faulty_jobs.double, 4)).result(PATIENCE) == 8
        assert (tmp_path / "0").exists()
        assert_whole(disp)


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_a_launcher_that_is_killed_again_and_again_costs_the_running_jobs_alone(
    start_method: str, tmp_path: Path
) -> None:
    pools = [Pool(0, 1, backlog=None, start_method=start_method), Pool(1, 1)]
    with Dispatcher(pools) as disp:
        elsewhere = disp.dispatch(Job(faulty_jobs.wait_for_file, tmp_path / "go").options(priority=1))
        for _ in range(3):
            running = disp.dispatch(Job(faulty_jobs.sleep_in_c))
            waiting = disp.dispatch(Job(faulty_jobs.double, 4))
            wait_until(lambda running=running: running.status().pid is not None)
            workers = worker_pids(disp)
            os.kill(launcher_pid(disp), signal.SIGKILL)
            assert isinstance(running.exception(PATIENCE), WorkerCrashed)
            assert waiting.result(PATIENCE) == 8
            wait_until(lambda workers=workers: not alive(workers), "the old workers are gone", within=2)
        assert_whole(disp)
        (tmp_path / "go").touch()
        assert elsewhere.result(PATIENCE)


def test_a_forked_launcher_that_is_killed_breaks_its_own_pool_with_an_error_and_no_other(
    tmp_path: Path,
) -> None:
    pools = [Pool(0, 1, backlog=None, start_method="fork"), Pool(1, 1, start_method="fork")]
    with Dispatcher(pools) as disp:
        running = disp.dispatch(Job(faulty_jobs.sleep_in_c))
        waiting = disp.dispatch(Job(faulty_jobs.double, 4))
        wait_until(lambda: running.status().pid is not None)
        os.kill(launcher_pid(disp), signal.SIGKILL)
        assert isinstance(running.exception(PATIENCE), WorkerCrashed)
        assert isinstance(waiting.exception(PATIENCE), PoolBroken)
        with pytest.raises(PoolBroken, match="launcher"):
            disp.dispatch(Job(faulty_jobs.double, 4))
        assert disp.barrier(0, timeout=PATIENCE, check=False).failed_count == 2
        assert_whole(disp, 1)


def test_a_stopped_worker_holds_its_own_job_alone_until_it_goes_on(disp: Dispatcher) -> None:
    tracker = disp.dispatch(Job(faulty_jobs.stop_self))
    others = [disp.dispatch(Job(faulty_jobs.double, number)) for number in range(6)]
    assert [other.result(PATIENCE) for other in others] == [0, 2, 4, 6, 8, 10]
    assert not tracker.done()
    pid = tracker.status().pid
    assert pid is not None
    wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    os.kill(pid, signal.SIGCONT)
    assert tracker.result(PATIENCE) == "continued"
    assert_whole(disp)


def test_a_stopped_worker_is_ended_by_the_timeout_of_its_job(single: Dispatcher) -> None:
    assert_only_this_fails(single, Job(faulty_jobs.stop_self).options(timeout=0.2), JobTimeout)


def test_finalize_ends_a_worker_that_is_stopped_while_idle() -> None:
    with Dispatcher([Pool(0, 2)]) as disp:
        wait_until_whole(disp)
        pids = worker_pids(disp)
        os.kill(pids[0], signal.SIGSTOP)
    assert not alive(pids)


def test_finalize_ends_the_workers_of_a_launcher_that_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_STOP", 0.3)  # which it waits for twice
    disp = Dispatcher([Pool(0, 2)])
    wait_until_whole(disp)
    pids = [*worker_pids(disp), launcher_pid(disp)]
    os.kill(pids[-1], signal.SIGSTOP)
    disp.finalize()
    wait_until(lambda: not alive(pids), within=2)


def test_a_crash_and_a_timeout_are_told_though_the_launcher_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(staff, "_REPORT", 0.3)  # which it waits for again and again
    with Dispatcher([Pool(0, 2, backlog=None)]) as disp:
        wait_until_whole(disp)
        os.kill(launcher_pid(disp), signal.SIGSTOP)
        late = disp.dispatch(Job(faulty_jobs.loop).options(timeout=0.2))
        crashed = disp.dispatch(Job(faulty_jobs.kill_self))
        assert isinstance(crashed.exception(PATIENCE), WorkerCrashed)
        assert isinstance(late.exception(PATIENCE), JobTimeout)
        assert_whole(disp)


@pytest.mark.parametrize("first", [0, 3], ids=["all", "all but the standard ones"])
def test_a_job_that_closes_all_descriptors_fails_alone(disp: Dispatcher, first: int) -> None:
    assert_only_this_fails(disp, Job(faulty_jobs.close_descriptors, first), WorkerCrashed)


@pytest.mark.parametrize(
    "garbage",
    [
        b"x",
        b"xyz",
        b"\0" * 5,
        b"hello, world",
        b"\0" * 17,
        b"\xff" * 17,
        b"\0" * 60_000,
        bytes(range(256)) * 100,
    ],
    ids=["1", "3", "5 zeros", "12", "17 zeros", "17 ones", "60000 zeros", "25600 mixed"],
)
def test_a_job_that_writes_garbage_into_every_descriptor_fails_alone(
    single: Dispatcher, garbage: bytes
) -> None:
    faulty = single.dispatch(Job(faulty_jobs.write_everywhere, garbage))
    others = [single.dispatch(Job(faulty_jobs.double, number)) for number in range(4)]
    error = faulty.exception(PATIENCE)
    assert error is None or isinstance(error, (RemoteError, WorkerCrashed))
    assert [other.result(PATIENCE) for other in others] == [0, 2, 4, 6]
    assert_whole(single)


@pytest.mark.parametrize("job", [faulty_jobs.fork_and_return_twice, faulty_jobs.fork_and_raise_in_child])
def test_a_job_that_forks_and_lets_the_child_return_is_answered_once_by_the_parent(
    disp: Dispatcher, job: object
) -> None:
    trackers = [disp.dispatch(Job(job)) for _ in range(4)]
    assert {tracker.result(PATIENCE) for tracker in trackers} == {"parent"}
    report = disp.barrier(timeout=PATIENCE)
    assert report.succeeded == 4
    assert_whole(disp)


def test_a_copy_of_a_worker_that_outlives_its_job_ends_with_the_worker(
    start_method: str, tmp_path: Path
) -> None:
    with Dispatcher([Pool(0, 1, start_method=start_method)]) as disp:
        assert disp.dispatch(Job(faulty_jobs.fork_and_leave_child, tmp_path / "pids")).result(PATIENCE)
        assert_whole(disp)
        (copy,) = read_pids(tmp_path / "pids")
        assert is_alive(copy)
    wait_until(lambda: not is_alive(copy), within=2)


def test_a_worker_that_dies_while_a_copy_of_it_holds_its_pipes_is_still_noticed(
    disp: Dispatcher, tmp_path: Path
) -> None:
    assert_only_this_fails(disp, Job(faulty_jobs.crash_with_child, tmp_path / "pids"), WorkerCrashed)
    (copy,) = read_pids(tmp_path / "pids")
    assert not is_alive(copy)


def test_what_a_job_has_started_in_a_session_of_its_own_ends_when_its_worker_dies(tmp_path: Path) -> None:
    with Dispatcher([(0, 1)]) as disp:
        tracker = disp.dispatch(Job(faulty_jobs.hang_with_child, tmp_path / "pids", new_session=True))
        (child,) = read_pids(tmp_path / "pids")
        os.kill(tracker.status().pid or 0, signal.SIGKILL)
        assert isinstance(tracker.exception(PATIENCE), WorkerCrashed)
        assert_whole(disp)
        wait_until(lambda: not is_alive(child), within=2)


def test_a_dispatch_that_waits_for_a_slot_gets_the_one_of_the_worker_that_died() -> None:
    with Dispatcher([Pool(0, 1)]) as disp:
        for _ in range(5):
            crashing = disp.dispatch(Job(faulty_jobs.kill_self), timeout=PATIENCE)
            assert disp.dispatch(Job(faulty_jobs.double, 4), timeout=PATIENCE).result(PATIENCE) == 8
            assert isinstance(crashing.exception(PATIENCE), WorkerCrashed)


def test_every_waiter_of_a_job_learns_that_its_worker_died(disp: Dispatcher) -> None:
    tracker = disp.dispatch(Job(faulty_jobs.sleep_in_c))
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(tracker.exception(PATIENCE))),
        threading.Thread(target=lambda: found.append(disp.barrier(timeout=PATIENCE, check=False))),
        threading.Thread(target=lambda: found.append(tracker.wait(PATIENCE))),
    ]
    for thread in threads:
        thread.start()
    tracker.add_done_callback(found.append)
    wait_until(lambda: tracker.status().pid is not None)
    os.kill(tracker.status().pid or 0, signal.SIGKILL)
    for thread in threads:
        thread.join(PATIENCE)
    wait_until(lambda: len(found) == 4)


# What a crash tells (C14)


def test_a_segfault_tells_pid_signal_python_stack_memory_and_the_last_output(
    disp: Dispatcher, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = disp.dispatch(Job(faulty_jobs.speak_and_segfault, 100))
    error = tracker.exception(PATIENCE)
    assert isinstance(error, WorkerCrashed)
    assert error.pid == tracker.status().pid
    assert (error.signal, error.exit_code) == ("SIGSEGV", None)
    assert "in speak_and_segfault" in error.stack
    assert "in string_at" in error.stack
    lines = error.output.splitlines()
    assert lines[-2:] == ["line 99", "last words"]
    assert len(lines) < 100
    assert error.peak_rss_bytes is not None
    assert error.peak_rss_bytes > faulty_jobs.MEGABYTE
    assert error.out_of_memory is False
    for fact in (str(error.pid), "SIGSEGV", "speak_and_segfault", "last words"):
        assert fact in str(error)
    status = tracker.status()
    assert status.error_type == "WorkerCrashed"
    assert "speak_and_segfault" in (status.traceback or "")


def test_a_crash_tells_the_output_of_its_own_job_alone(
    single: Dispatcher, capfd: pytest.CaptureFixture[str]
) -> None:
    single.dispatch(Job(print, "from an earlier job")).result(PATIENCE)
    error = single.dispatch(Job(faulty_jobs.speak_and_segfault, 1)).exception(PATIENCE)
    assert isinstance(error, WorkerCrashed)
    assert error.output.splitlines() == ["line 0", "last words"]


def test_what_a_job_printed_is_out_when_its_result_is_there(capfd: pytest.CaptureFixture[str]) -> None:
    with Dispatcher([(0, 1)]) as disp:
        disp.dispatch(Job(print, "hello from a job")).result(PATIENCE)
        assert capfd.readouterr().out == "hello from a job\n"


@pytest.mark.alone  # the kernel counts whom it ends for want of memory for all processes together
def test_a_crash_tells_the_largest_memory_and_does_not_blame_it_without_cause(disp: Dispatcher) -> None:
    size = 300 * faulty_jobs.MEGABYTE
    error = disp.dispatch(Job(faulty_jobs.hold_memory_and_die, size)).exception(PATIENCE)
    assert isinstance(error, WorkerCrashed)
    assert error.signal == "SIGKILL"
    assert error.peak_rss_bytes is not None
    # A worker that is a fork begins with the pages of this process.
    assert size < error.peak_rss_bytes < 2 * size + psutil.Process().memory_info().rss
    assert error.out_of_memory is False


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A memory cgroup of 100 MB, of version 1 or 2, where the system lets this user make one."""
    made = _make_memory_group()
    if made is None:
        pytest.skip("no memory cgroup can be made here (needs root and a writable cgroup file system)")
    yield made
    wait_until(lambda: not (made / "cgroup.procs").read_text().strip())
    made.rmdir()


def _make_memory_group() -> Path | None:
    roots = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")]
    limits = ["memory.limit_in_bytes", "memory.max", "memory.max"]
    for root, limit in zip(roots, limits, strict=True):
        group = root / f"bulkhead-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(100 * faulty_jobs.MEGABYTE))
        except OSError:
            group.rmdir()
            continue
        _forbid_swap(group)
        return group
    return None


def _forbid_swap(group: Path) -> None:
    for name, value in (("memory.swap.max", "0"), ("memory.swappiness", "0")):
        try:
            (group / name).write_text(value)
        except OSError:
            pass


def test_a_job_that_allocates_until_the_kernel_kills_it_is_reported_as_out_of_memory(
    disp: Dispatcher, memory_group: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    error = assert_only_this_fails(disp, Job(faulty_jobs.allocate_within, memory_group), WorkerCrashed)
    assert isinstance(error, WorkerCrashed)
    assert error.signal == "SIGKILL"
    assert error.out_of_memory is True
    assert error.peak_rss_bytes is not None
    assert error.peak_rss_bytes > 50 * faulty_jobs.MEGABYTE
    assert "entered the group" in error.output
    assert "out-of-memory" in str(error)
