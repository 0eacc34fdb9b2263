"""No process that has threads is ever forked, unless asked for, and then it is said (C11)."""

from __future__ import annotations

import gc
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import faulty_jobs
import psutil
import pytest
from jobs import lines, note
from scripts import running
from watching import PATIENCE, launcher_pid, wait_until_whole, worker_pids

from bulkhead import Dispatcher, Job, Pool


@pytest.fixture
def other_thread() -> Iterator[threading.Thread]:
    over = threading.Event()
    thread = threading.Thread(target=over.wait, name="someone-elses")
    thread.start()
    yield thread
    over.set()
    thread.join()


def test_the_default_never_forks_the_caller(
    other_thread: threading.Thread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise AssertionError("the caller was forked")

    for name in ("fork", "forkpty"):
        monkeypatch.setattr(os, name, refuse)
    with Dispatcher([(0, 2), (1, 1)]) as disp:
        for priority in (0, 1):
            assert disp.dispatch(Job(faulty_jobs.double, 4).options(priority=priority)).result(PATIENCE) == 8


def threads_of(pid: int) -> int:
    return psutil.Process(pid).num_threads()


def test_the_process_that_forks_the_workers_has_one_thread(start_method: str) -> None:
    with Dispatcher([Pool(0, 2, start_method=start_method)]) as disp:
        for _ in range(3):
            wait_until_whole(disp)
            assert threads_of(launcher_pid(disp)) == 1
            disp.dispatch(Job(faulty_jobs.kill_self)).wait(PATIENCE)
        wait_until_whole(disp)
        assert [threads_of(pid) for pid in worker_pids(disp)] == [1, 1]


STARTS_THREADS_WHEN_IMPORTED = """
import threading, time
from bulkhead import Dispatcher, Job

threading.Thread(target=time.sleep, args=(10**6,), name="of the main module", daemon=True).start()

def names():
    return sorted(thread.name for thread in threading.enumerate())

if __name__ == "__main__":
    import psutil
    with Dispatcher([(0, 2)]) as disp:
        print(disp.dispatch(Job(names)).result())
        (launcher,) = psutil.Process().children()
        print(launcher.num_threads())
"""


def test_a_main_module_that_starts_threads_when_imported_is_not_imported_where_workers_are_forked() -> None:
    with running(STARTS_THREADS_WHEN_IMPORTED) as script:
        assert script.wait() == 0, script.errors()
        assert script.output() == "['MainThread', 'of the main module']\n1\n"
        assert script.errors() == ""


def test_fork_in_a_caller_with_threads_warns_and_names_them(other_thread: threading.Thread) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        disp = Dispatcher([Pool(0, 1, start_method="fork")])
    with disp:
        # Why a choice: since Python 3.12 the interpreter warns of the fork as well, in its own words.
        (warning,) = [one for one in caught if one.category is RuntimeWarning]
        assert "someone-elses" in str(warning.message)
        assert warning.filename == __file__
        assert disp.dispatch(Job(faulty_jobs.double, 4)).result(PATIENCE) == 8


def test_fork_and_the_default_say_nothing_in_a_caller_without_threads() -> None:
    with Dispatcher([Pool(0, 1, start_method="fork"), Pool(1, 1)]):
        pass


def test_a_forked_worker_knows_what_the_caller_knew_and_others_do_not() -> None:
    known["since"] = "before the fork"
    methods = {0: "fork", 1: "forkserver", 2: "spawn"}
    with Dispatcher([Pool(priority, 1, start_method=method) for priority, method in methods.items()]) as disp:
        told = {
            m: disp.dispatch(Job(what_is_known).options(priority=p)).result(PATIENCE)
            for p, m in methods.items()
        }
    assert told == {"fork": "before the fork", "forkserver": "nothing", "spawn": "nothing"}
    known.clear()


known: dict[str, str] = {}


def what_is_known() -> str:
    return known.get("since", "nothing")


class Garbage:
    """Says which process ends it. A cycle: only the garbage collector does."""

    def __init__(self, path: Path) -> None:
        self.path, self.me = path, self

    def __del__(self) -> None:
        note(self.path, str(os.getpid()))


def test_the_callers_garbage_is_not_ended_a_second_time_in_copies_of_it(tmp_path: Path) -> None:
    gc.disable()
    try:
        Garbage(tmp_path / "ended")
        with Dispatcher([Pool(0, 1, start_method="fork")]) as disp:
            assert disp.dispatch(Job(gc.collect)).exception(PATIENCE) is None
        gc.collect()
    finally:
        gc.enable()
    assert lines(tmp_path / "ended") == [str(os.getpid())]
