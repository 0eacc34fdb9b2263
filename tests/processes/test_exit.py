"""At exit the interpreter has nothing to say: no warning, no zombie, no process (C12)."""

from __future__ import annotations

import pytest
from scripts import Script, running
from watching import PATIENCE, wait_until

STRICT = ("-X", "dev", "-W", "error")

HEAD = """
import os, signal, sys, time
import psutil
import faulty_jobs
from bulkhead import Dispatcher, Job, Pool

def work(disp):
    trackers = [disp.dispatch(Job(faulty_jobs.double, n).options(priority=n % 2)) for n in range(20)]
    assert [tracker.result() for tracker in trackers] == [2 * n for n in range(20)]

def work_and_crash(disp):
    work(disp)
    for job in (Job(faulty_jobs.kill_self), Job(faulty_jobs.exit_with, 0), Job(faulty_jobs.loop).options(timeout=0.1)):
        assert disp.dispatch(job.options(priority=0)).exception() is not None
    work(disp)

def pools():
    return [Pool(0, 2, start_method={method!r}), Pool(1, 1, start_method={method!r})]

def zombies():
    return [child for child in psutil.Process().children(recursive=True) if child.status() == psutil.STATUS_ZOMBIE]

"""

GUARD = 'if __name__ == "__main__":\n'

WITH_BLOCK = """
    with Dispatcher(pools()) as disp:
        work_and_crash(disp)
    assert psutil.Process().children() == []
    print("done")
"""

FORGETS_FINALIZE = """
    disp = Dispatcher(pools())
    work_and_crash(disp)
    print("done")
"""

FORGETS_JOBS_TOO = """
    disp = Dispatcher(pools())
    work(disp)
    disp.dispatch(Job(faulty_jobs.nap, 0.3).options(priority=0))
    print("done")
"""

IN_A_FUNCTION = """
    def main():
        disp = Dispatcher(pools())
        work(disp)
    main()
    import gc
    gc.collect()
    end = time.monotonic() + 10
    while psutil.Process().children() and time.monotonic() < end:
        time.sleep(0.01)
    assert psutil.Process().children() == []
    print("done")
"""

WITH_CALLBACKS = """
    with Dispatcher(pools()) as disp:
        for n in range(20):
            disp.dispatch(Job(faulty_jobs.double, n).options(priority=0)).add_done_callback(lambda tracker: None)
    print("done")
"""

IN_A_THREAD = """
    import threading
    def main():
        disp = Dispatcher(pools())
        work(disp)
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
    print("done")
"""

MANY = """
    for _ in range(5):
        with Dispatcher(pools()) as disp:
            work(disp)
    assert psutil.Process().children() == []
    print("done")
"""


def script_of(body: str, method: str = "forkserver") -> str:
    return HEAD.format(method=method) + GUARD + body


def assert_quiet_end(script: Script, code: int = 0) -> None:
    assert script.wait() == code, script.errors()
    assert script.errors() == ""
    assert script.output() == "done\n"
    assert script.processes() == []


@pytest.mark.parametrize("body", [WITH_BLOCK, FORGETS_FINALIZE], ids=["with block", "no finalize"])
def test_a_script_leaves_nothing_and_says_nothing_at_exit(start_method: str, body: str) -> None:
    with running(script_of(body, start_method), STRICT) as script:
        assert_quiet_end(script)


@pytest.mark.parametrize(
    "body",
    [FORGETS_JOBS_TOO, WITH_CALLBACKS, MANY],
    ids=["running job", "callbacks", "five dispatchers"],
)
def test_whatever_a_script_forgets_nothing_is_left_and_nothing_is_said(body: str) -> None:
    with running(script_of(body), STRICT) as script:
        assert_quiet_end(script)


@pytest.mark.parametrize("body", [IN_A_FUNCTION, IN_A_THREAD], ids=["function", "thread"])
def test_a_dispatcher_that_is_dropped_leaves_nothing_and_is_told_of_in_development_mode_alone(
    body: str,
) -> None:
    with running(script_of(body)) as script:
        assert_quiet_end(script)
    with running(script_of(body), ("-X", "dev")) as script:
        assert script.wait() == 0
        assert script.errors().count("ResourceWarning: a Dispatcher was dropped without finalize()\n") == 1
        assert script.errors().count("Warning") == 1
        assert script.processes() == []


ENDS_BY_EXCEPTION = """
    with Dispatcher(pools()) as disp:
        work(disp)
        disp.dispatch(Job(faulty_jobs.sleep_in_c).options(priority=0))
        print("done", flush=True)
        raise RuntimeError("the script's own")
"""

ENDS_BY_EXCEPTION_WITHOUT_FINALIZE = """
    disp = Dispatcher(pools())
    work(disp)
    disp.dispatch(Job(faulty_jobs.sleep_in_c).options(priority=0))
    print("done", flush=True)
    raise RuntimeError("the script's own")
"""


@pytest.mark.parametrize(
    "body", [ENDS_BY_EXCEPTION, ENDS_BY_EXCEPTION_WITHOUT_FINALIZE], ids=["with block", "no finalize"]
)
def test_a_script_that_ends_by_an_exception_prints_its_own_traceback_alone(
    start_method: str, body: str
) -> None:
    with running(script_of(body, start_method), STRICT) as script:
        assert script.wait() == 1
        errors = script.errors()
        assert errors.startswith("Traceback (most recent call last):\n")
        assert errors.count("Traceback") == 1
        assert errors.endswith("\nRuntimeError: the script's own\n")
        assert script.output() == "done\n"
        assert script.processes() == []


ENDS_BY_SYS_EXIT = """
    disp = Dispatcher(pools())
    work(disp)
    disp.dispatch(Job(faulty_jobs.nap, 0.2).options(priority=0))
    print("done", flush=True)
    sys.exit(3)
"""


def test_a_script_that_leaves_by_sys_exit_keeps_its_exit_code() -> None:
    with running(script_of(ENDS_BY_SYS_EXIT), STRICT) as script:
        assert_quiet_end(script, 3)


STAYS = """
    with Dispatcher(pools()) as disp:
        for _ in range(5):
            for job in (Job(faulty_jobs.kill_self), Job(faulty_jobs.exit_with, 0)):
                assert disp.dispatch(job.options(priority=0)).exception() is not None
        work(disp)
        end = time.monotonic() + 10
        while zombies() and time.monotonic() < end:
            time.sleep(0.01)
        assert zombies() == []
        os.kill(os.getpid(), signal.SIGSTOP)
    print("done")
"""


def test_workers_that_died_are_no_zombies_while_the_script_runs(usual_start_method: str) -> None:
    with running(script_of(STAYS, usual_start_method), STRICT) as script:
        wait_until(lambda: script.is_stopped() or not script.is_running(), within=PATIENCE)
        assert script.is_running(), script.errors()
        assert script.zombies() == []
        script.resume()
        assert_quiet_end(script)


CHILD_LEAVES_FIRST = """
    disp = Dispatcher(pools())
    work(disp)
    child = os.fork()
    if child == 0:
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    work(disp)
    disp.finalize()
    print("done")
"""


def test_a_forked_copy_of_the_script_that_exits_takes_nothing_down() -> None:
    # Why not -W error: since Python 3.12 a fork in a process with threads, the script's own act, warns.
    with running(script_of(CHILD_LEAVES_FIRST), ("-X", "dev", "-W", "ignore::DeprecationWarning")) as script:
        assert_quiet_end(script)
