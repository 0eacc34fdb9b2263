"""Faults can be injected on purpose, at chosen calls, without a change to the script (C16)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jobs
import psutil
import pytest
from scripts import environment
from watching import PATIENCE, assert_whole, wait_until, worker_pids

from bulkhead import (
    ConfigError,
    ConfigTypeError,
    Dispatcher,
    Job,
    JobTimeout,
    Pool,
    RemoteError,
    RetryPolicy,
    UnknownPriority,
    WaitTimeout,
    WorkerCrashed,
    testing,
)
from bulkhead.testing import inject


@pytest.fixture
def disp() -> Iterator[Dispatcher]:
    disp = Dispatcher([Pool(0, 1, backlog=None)])
    yield disp
    disp.finalize(cancel=True)


def error_of(disp: Dispatcher, job: Job) -> Any:
    return disp.dispatch(job).exception(PATIENCE)


# Faults as jobs


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGBUS])
def test_crash_ends_the_worker_by_any_signal(disp: Dispatcher, number: signal.Signals) -> None:
    error = error_of(disp, Job(testing.crash, number))
    assert isinstance(error, WorkerCrashed)
    assert error.signal == number.name
    assert_whole(disp)


def test_segfault_and_exit_look_like_those_of_c_code(disp: Dispatcher) -> None:
    error = error_of(disp, Job(testing.segfault))
    assert error.signal == "SIGSEGV"
    assert "in segfault" in error.stack
    assert error_of(disp, Job(testing.exit_process, 3)).exit_code == 3


@pytest.mark.parametrize("ignore_sigterm", [False, True])
def test_hang_is_ended_by_a_timeout(disp: Dispatcher, ignore_sigterm: bool) -> None:
    job = Job(testing.hang, ignore_sigterm=ignore_sigterm).options(timeout=0.2)
    assert isinstance(error_of(disp, job), JobTimeout)


def test_fail_raises_what_it_is_given(disp: Dispatcher) -> None:
    assert isinstance(error_of(disp, Job(testing.fail)), RuntimeError)
    error = error_of(disp, Job(testing.fail, OSError(28, "no space left")))
    assert isinstance(error, OSError)
    assert error.errno == 28


def test_what_cannot_be_sent_or_rebuilt_is_a_remote_error(disp: Dispatcher) -> None:
    error = error_of(disp, Job(testing.fail_unrebuildably))
    assert isinstance(error, RemoteError)
    assert error.type_name == "Unrebuildable"
    assert isinstance(error_of(disp, Job(testing.return_unpicklable)), RemoteError)
    assert_whole(disp)


def test_leak_takes_memory_that_stays_taken_and_slow_takes_time(disp: Dispatcher) -> None:
    disp.dispatch(Job(testing.leak, 50_000_000)).result(PATIENCE)
    (pid,) = worker_pids(disp)
    assert psutil.Process(pid).memory_info().rss > 50_000_000
    began = time.monotonic()
    disp.dispatch(Job(testing.slow, 0.1)).result(PATIENCE)
    assert time.monotonic() - began >= 0.1


# Faults in functions


def test_only_the_chosen_calls_suffer(usual_start_method: str) -> None:
    with Dispatcher([Pool(0, 2, backlog=None, start_method=usual_start_method)]) as disp:
        with inject("jobs.echo", testing.fail, ValueError("injected"), calls={2, 5}) as injection:
            trackers = [disp.dispatch(Job(jobs.echo, number)) for number in range(8)]
            disp.barrier(timeout=PATIENCE, check=False)
            failed = [tracker for tracker in trackers if tracker.exception() is not None]
            assert (injection.calls, injection.faults, len(failed)) == (8, 2, 2)
        assert {str(tracker.exception()) for tracker in failed} == {"injected"}
        assert disp.dispatch(Job(jobs.echo, 9)).result(PATIENCE) == 9
    assert (injection.calls, injection.faults) == (8, 2)


def test_a_job_that_crashed_at_its_first_attempt_succeeds_at_the_second() -> None:
    with (
        Dispatcher([Pool(0, 1, retry=RetryPolicy(2, initial=0.01))]) as disp,
        inject("jobs.echo", testing.crash, calls={1}) as injection,
    ):
        tracker = disp.dispatch(Job(jobs.echo, "text"))
        assert tracker.result(PATIENCE) == "text"
        assert tracker.status().attempt == 2
        assert injection.calls == 2


def test_items_of_a_map_suffer_too(disp: Dispatcher) -> None:
    with inject("jobs.echo", testing.crash, calls=range(3, 4)):
        results = disp.map(jobs.echo, range(6), chunksize=6)
        found: list[Any] = []
        for _ in range(6):
            try:
                found.append(next(results))
            except WorkerCrashed:
                found.append("crashed")
    assert found.count("crashed") == 1
    assert [one for one in found if one != "crashed"] == [n for n in range(6) if found[n] != "crashed"]


def test_a_fault_that_returns_lets_the_function_run_and_one_that_answers_replaces_it(
    disp: Dispatcher,
) -> None:
    with inject("jobs.echo", testing.slow, 0.05):
        assert disp.dispatch(Job(jobs.echo, 1)).result(PATIENCE) == 1
    with inject("jobs.echo", jobs.pid):
        assert disp.dispatch(Job(jobs.echo, 1)).result(PATIENCE) in worker_pids(disp)


def test_calls_of_many_workers_are_counted_once_each() -> None:
    with (
        Dispatcher([Pool(0, 4, backlog=None)]) as disp,
        inject("jobs.echo", testing.fail, calls=()) as injection,
    ):
        for number in range(300):
            disp.dispatch(Job(jobs.echo, number))
        disp.barrier(timeout=PATIENCE)
        assert (injection.calls, injection.faults) == (300, 0)


def test_the_callers_own_calls_suffer_nothing_and_the_name_is_given_back() -> None:
    before = jobs.echo
    with inject("jobs.echo", testing.exit_process, 1) as injection:
        assert jobs.echo(5) == 5
        assert jobs.echo.__name__ == "echo"
        assert injection.calls == 0
        with pytest.raises(ConfigError, match="already"), inject("jobs.echo", testing.fail):
            pass
    assert jobs.echo is before


def test_a_job_that_outlives_the_context_suffers_nothing(disp: Dispatcher, gate: Any) -> None:
    disp.dispatch(gate.job("first"))
    with inject("jobs.echo", testing.fail):
        late = disp.dispatch(Job(jobs.echo, "late"))
    gate.open()
    assert late.result(PATIENCE) == "late"


@pytest.mark.parametrize(
    "target", ["jobs.not_there", "not_there.jobs", "jobs", "jobs.Greeting", "jobs.Greeting.run", ""]
)
def test_a_target_that_is_no_function_of_a_module_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="target"):
        inject(target, testing.fail)


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(ConfigTypeError, match="target"):
        inject(jobs.echo, testing.fail)  # type: ignore[arg-type]
    with pytest.raises(ConfigTypeError, match="fault"):
        inject("jobs.echo", "crash")  # type: ignore[arg-type]
    with pytest.raises(ConfigTypeError, match="calls"):
        inject("jobs.echo", testing.fail, calls=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigTypeError, match="calls"):
        inject("jobs.echo", testing.fail, calls="1")  # type: ignore[arg-type]
    with pytest.raises(ConfigTypeError, match="calls"):
        inject("jobs.echo", testing.fail, calls={1.5})  # type: ignore[arg-type]
    for calls in ({0}, [-1, 2], range(3)):
        with pytest.raises(ConfigError, match="calls must be at least 1"):
            inject("jobs.echo", testing.fail, calls=calls)
    with pytest.raises(ConfigError, match="picklable"):
        inject("jobs.echo", testing.fail, threading.Lock())


def test_what_a_job_calls_in_a_fresh_worker_is_out_of_reach() -> None:
    with (
        inject("jobs.echo", testing.fail) as injection,
        Dispatcher([Pool(0, 1, start_method="spawn")]) as disp,
    ):
        assert disp.dispatch(Job(_call_echo)).result(PATIENCE) == 1
    assert (injection.calls, injection.faults) == (0, 0)


def _call_echo() -> object:
    return jobs.echo(1)


def test_a_function_of_the_script_itself_suffers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from bulkhead import Dispatcher, Job, WorkerCrashed, testing\n"
        "def convert(n):\n"
        "    return n\n"
        "def main():\n"
        "    with Dispatcher([(0, 1)]) as disp:\n"
        "        trackers = [disp.dispatch(Job(convert, n)) for n in range(3)]\n"
        "        print([type(tracker.exception()).__name__ for tracker in trackers])\n"
        "if __name__ == '__main__':\n"
        "    with testing.inject('__main__.convert', testing.crash, calls={2}):\n"
        "        main()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=True,
    )
    assert (done.stdout, done.stderr) == ("['NoneType', 'WorkerCrashed', 'NoneType']\n", "")


# From outside


def test_a_worker_can_be_killed_while_it_is_busy_or_idle(disp: Dispatcher, gate: Any) -> None:
    tracker = disp.dispatch(gate.job())
    gate.wait_begun(1)
    pid = testing.kill_worker(disp, state="busy")
    error = tracker.exception(PATIENCE)
    assert isinstance(error, WorkerCrashed)
    assert (error.pid, error.signal) == (pid, "SIGKILL")
    idle = testing.kill_worker(disp, state="idle", signal=signal.SIGTERM)
    wait_until(lambda: not psutil.pid_exists(idle))
    assert_whole(disp)
    assert disp.stats()[0].restarts == 2
    assert testing.kill_worker(disp) != os.getpid()


def test_a_busy_worker_is_not_killed_before_it_has_begun_its_job() -> None:
    with Dispatcher([Pool(0, 1)]) as disp:
        for _ in range(20):
            tracker = disp.dispatch(Job(testing.hang))
            pid = testing.kill_worker(disp, state="busy")
            error = tracker.exception(PATIENCE)
            assert isinstance(error, WorkerCrashed)
            assert error.pid == pid


def test_who_is_not_there_cannot_be_killed(disp: Dispatcher) -> None:
    with pytest.raises(WaitTimeout, match="busy"):
        testing.kill_worker(disp, state="busy", timeout=0)
    with pytest.raises(UnknownPriority):
        testing.kill_worker(disp, 7)
    with pytest.raises(ConfigError, match="state"):
        testing.kill_worker(disp, state="tired")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="timeout"):
        testing.kill_worker(disp, timeout=-1)
