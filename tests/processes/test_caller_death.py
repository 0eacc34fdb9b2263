"""However the caller ends, its workers end with it, also while a job holds the GIL (C7)."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
from scripts import Script, running
from watching import alive, is_alive, shared_memory, wait_until

# The promise: no worker outlives its caller by more (seconds).
AFTERLIFE = 2.0

BUSY = """
import sys, time
import faulty_jobs
from bulkhead import Dispatcher, Job, Pool
from watching import wait_until, wait_until_whole

if __name__ == "__main__":
    disp = Dispatcher([Pool(0, 2, start_method={method!r}), Pool(1, 1, start_method={method!r})])
    wait_until_whole(disp, 0)
    wait_until_whole(disp, 1)
    {before}
    for hang in ({jobs}):
        disp.dispatch(Job(hang).options(priority=0))
    print("ready", flush=True)
    {after}
    time.sleep(10**6)
"""


def busy(
    method: str = "forkserver",
    jobs: str = "faulty_jobs.sum_with_gil, faulty_jobs.sleep_with_gil",
    before: str = "pass",
    after: str = "pass",
) -> str:
    return BUSY.format(method=method, jobs=jobs, before=before, after=after)


def family(script: Script) -> list[int]:
    """Return the script's process and all below it: two or three launchers and three workers at least."""
    script.wait_for_line("ready")
    pids = [script.pid, *(child.pid for child in psutil.Process(script.pid).children(recursive=True))]
    assert len(pids) >= 6
    return pids


def assert_all_gone(pids: list[int]) -> None:
    wait_until(lambda: not alive(pids), f"these are gone: {pids}", within=AFTERLIFE)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["KILL", "TERM"])
def test_nothing_outlives_a_caller_that_is_killed_while_jobs_hold_the_gil(
    start_method: str, number: int
) -> None:
    segments = shared_memory()
    with running(busy(start_method)) as script:
        pids = family(script)
        os.kill(script.pid, number)
        assert_all_gone(pids)
        assert script.wait() == -number
        assert script.output() == "ready\n"
        assert shared_memory() == segments


@pytest.mark.parametrize(
    "jobs",
    [
        "",
        "faulty_jobs.ignore_sigterm, faulty_jobs.block_sigterm",
        "faulty_jobs.loop, faulty_jobs.stop_self",
    ],
    ids=["idle", "no SIGTERM", "stopped"],
)
def test_nothing_outlives_a_killed_caller_whatever_its_workers_do(jobs: str) -> None:
    with running(busy(jobs=jobs)) as script:
        pids = family(script)
        os.kill(script.pid, signal.SIGKILL)
        assert_all_gone(pids)


def test_nothing_outlives_a_caller_that_is_killed_with_its_launchers() -> None:
    with running(busy()) as script:
        pids = family(script)
        workers = {pid for pid in pids if psutil.Process(pid).ppid() != script.pid} - {script.pid}
        for pid in set(pids) - workers:
            os.kill(pid, signal.SIGKILL)
        assert_all_gone(pids)


def test_nothing_outlives_a_killed_caller_whose_launchers_are_stopped() -> None:
    with running(busy()) as script:
        pids = family(script)
        launchers = [child.pid for child in psutil.Process(script.pid).children()]
        for pid in launchers:
            os.kill(pid, signal.SIGSTOP)
        os.kill(script.pid, signal.SIGKILL)
        wait_until(lambda: not alive(set(pids) - set(launchers)), within=AFTERLIFE)
        for pid in launchers:
            os.kill(pid, signal.SIGCONT)
        assert_all_gone(pids)


FORK = """
    import os, ctypes
    child = {fork}()
    if child == 0:
        time.sleep(10**6)
    print("child", child, flush=True)
"""


@pytest.mark.parametrize("fork", ["os.fork", "ctypes.PyDLL(None).fork"], ids=["Python", "C"])
def test_workers_end_with_their_caller_though_a_child_of_it_has_inherited_its_descriptors(
    start_method: str, fork: str
) -> None:
    with running(busy(start_method, after=FORK.format(fork=fork))) as script:
        child = int(script.wait_for_line("child").split()[1])
        pids = family(script)
        os.kill(script.pid, signal.SIGKILL)
        pids.remove(child)
        try:
            assert_all_gone(pids)
            assert is_alive(child)
        finally:
            os.kill(child, signal.SIGKILL)


def test_workers_end_with_their_caller_though_a_command_it_started_lives_on() -> None:
    start = "import subprocess; child = subprocess.Popen(['sleep', '1000'], close_fds=False)"
    with running(busy(after=f"{start}; print('child', child.pid, flush=True)")) as script:
        child = int(script.wait_for_line("child").split()[1])
        pids = family(script)
        os.kill(script.pid, signal.SIGKILL)
        pids.remove(child)
        try:
            assert_all_gone(pids)
        finally:
            os.kill(child, signal.SIGKILL)


WITH_CHILD = """
import sys, time
from pathlib import Path
import faulty_jobs
from bulkhead import Dispatcher, Job, Pool

if __name__ == "__main__":
    disp = Dispatcher([Pool(0, 1)])
    disp.dispatch(Job(faulty_jobs.hang_with_child, Path(sys.argv[0] + ".pids"), new_session={new_session}))
    while not Path(sys.argv[0] + ".pids").exists():
        time.sleep(0.01)
    print("ready", flush=True)
    time.sleep(10**6)
"""


@pytest.mark.parametrize("new_session", [False, True], ids=["same group", "own session"])
def test_what_a_job_has_started_ends_with_the_caller(new_session: bool) -> None:
    with running(WITH_CHILD.format(new_session=new_session)) as script:
        script.wait_for_line("ready")
        pids = script.processes()
        assert len(pids) == 4
        os.kill(script.pid, signal.SIGKILL)
        assert_all_gone(pids)


def test_workers_end_with_a_caller_that_leaves_without_a_word() -> None:
    with running(busy(after="import os; os._exit(0)")) as script:
        script.wait_for_line("ready")
        assert script.wait() == 0
        wait_until(lambda: not script.processes(), within=AFTERLIFE)


def test_workers_end_with_a_caller_that_becomes_another_program() -> None:
    with running(busy(after="__import__('os').execvp('sleep', ['sleep', '1000'])")) as script:
        script.wait_for_line("ready")
        wait_until(lambda: script.processes() == [script.pid], within=2 * AFTERLIFE)


STARTING = """
from bulkhead import Dispatcher, Pool
if __name__ == "__main__":
    print("ready", flush=True)
    while True:
        with Dispatcher([Pool(0, 2, start_method={method!r}), Pool(1, 1, start_method={method!r})]):
            pass
"""


def test_nothing_outlives_a_caller_that_is_killed_while_workers_come_up_or_leave(start_method: str) -> None:
    for moment in range(4):
        with running(STARTING.format(method=start_method)) as script:
            script.wait_for_line("ready")
            # Why a pause: the test wants many different moments of one second of starting and leaving.
            time.sleep(0.1 * moment + 0.03)
            os.kill(script.pid, signal.SIGKILL)
            wait_until(lambda script=script: not script.processes(), "all gone", within=AFTERLIFE)
            assert script.errors() == ""


def test_the_callers_end_is_noticed_within_the_promise_by_the_clock() -> None:
    with running(busy()) as script:
        pids = family(script)
        os.kill(script.pid, signal.SIGKILL)
        killed = time.monotonic()
        assert_all_gone(pids)
        print(
            f"\nall {len(pids)} processes gone {1000 * (time.monotonic() - killed):.0f} ms after the caller"
        )


def test_a_forked_copy_of_the_caller_ends_without_touching_the_workers() -> None:
    fork = "import os; child = os.fork(); child or sys.exit(0); os.waitpid(child, 0); print('waited', flush=True)"
    # Why a filter: since Python 3.12 a fork in a process with threads, the script's own act, warns.
    code = busy(jobs="faulty_jobs.sleep_in_c,", after=fork)
    with running(code, ("-W", "ignore::DeprecationWarning")) as script:
        script.wait_for_line("waited")
        pids = family(script)
        assert alive(pids) == pids
        os.kill(script.pid, signal.SIGKILL)
        assert_all_gone(pids)
        assert script.errors() == ""
