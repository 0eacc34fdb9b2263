"""A script without the main guard gets an error that shows it: no fork bomb, no hang."""

from __future__ import annotations

import time

import pytest
from scripts import Script, running

# More processes than a healthy start has: the script, two launchers, three workers, and some that are coming and going.
FORK_BOMB = 12

AT_MODULE_LEVEL = """
from bulkhead import Dispatcher, Job, Pool

def job():
    return 42

disp = Dispatcher([Pool(0, 2, start_method={method!r}), Pool(1, 1, start_method={method!r})])
print("result", disp.dispatch(Job(job).options(priority=0)).result())
disp.barrier()
disp.finalize()
print("end of the script")
"""

IN_A_BLOCK = """
from bulkhead import Dispatcher, Job, Pool

def job():
    return 42

def main():
    with Dispatcher([Pool(0, 2, start_method={method!r}), Pool(1, 1, start_method={method!r})]) as disp:
        for tracker in disp.dispatch_all(Job(job).options(priority=n % 2) for n in range(20)):
            print("result", tracker.result())

main()
print("end of the script")
"""

CATCHES_EVERYTHING = """
from bulkhead import Dispatcher, Job, Pool

def job():
    return 42

try:
    disp = Dispatcher([Pool(0, 2, start_method={method!r})])
    print("result", disp.dispatch(Job(job)).result())
except Exception as error:
    print("caught", error)
"""

GUARD = 'if __name__ == "__main__":'


def most_processes(script: Script) -> int:
    """Watch the script until it ends; return the largest number of its processes seen at once."""
    most = 0
    while script.is_running():
        most = max(most, len(script.processes()))
        time.sleep(0.02)
    return most


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
@pytest.mark.parametrize("code", [AT_MODULE_LEVEL, IN_A_BLOCK], ids=["module level", "with block"])
def test_a_script_without_the_guard_gets_an_error_that_shows_it(code: str, method: str) -> None:
    with running(code.format(method=method)) as script:
        assert most_processes(script) < FORK_BOMB
        assert script.wait() == 1
        assert script.output() == ""
        errors = script.errors()
        assert GUARD in errors
        assert "MissingMainGuard" in errors or "PoolBroken" in errors
        assert errors.count("bulkhead.errors.PoolBroken") <= 1, errors
        assert script.processes() == []


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_script_without_the_guard_that_swallows_errors_still_ends(method: str) -> None:
    with running(CATCHES_EVERYTHING.format(method=method)) as script:
        assert most_processes(script) < FORK_BOMB
        assert script.wait() == 0
        assert script.processes() == []


def test_a_script_without_the_guard_works_under_fork() -> None:
    with running(AT_MODULE_LEVEL.format(method="fork")) as script:
        assert script.wait() == 0, script.errors()
        assert script.output() == "result 42\nend of the script\n"
        assert script.errors() == ""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_script_with_the_guard_works(method: str) -> None:
    code = IN_A_BLOCK.replace("main()\nprint", f"{GUARD}\n    main()\n    print")
    with running(code.format(method=method)) as script:
        assert script.wait() == 0, script.errors()
        assert script.output() == "result 42\n" * 20 + "end of the script\n"
        assert script.errors() == ""
