"""A caller's own settings are as they were, and whatever a caller has set, bulkhead works (the good guest)."""

from __future__ import annotations

import subprocess
import sys

import pytest
from scripts import running

COMPARE = """
import logging, multiprocessing, os, resource, signal, sys, threading, warnings, gc, locale, atexit, tempfile
import faulty_jobs

def settings():
    return {{
        "start method": multiprocessing.get_start_method(allow_none=True),
        "children": multiprocessing.active_children(),
        "signals": {{n: signal.getsignal(n) for n in signal.valid_signals()}},
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "timers": [signal.getitimer(t) for t in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)],
        "wakeup": (lambda fd: (signal.set_wakeup_fd(fd), fd)[1])(signal.set_wakeup_fd(-1)),
        "handlers": (list(logging.root.handlers), logging.root.level, logging.root.disabled, logging.raiseExceptions),
        "logger classes": (logging.getLoggerClass(), logging.getLogRecordFactory(), logging.lastResort),
        "disabled": logging.root.manager.disable,
        "excepthook": (sys.excepthook, sys.unraisablehook, sys.displayhook, threading.excepthook),
        "thread hooks": (threading.gettrace(), threading.getprofile(), sys.gettrace(), sys.getprofile()),
        "stack size": threading.stack_size(),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "warnings": list(warnings.filters), "showwarning": warnings.showwarning,
        "limits": {{n: resource.getrlimit(getattr(resource, n)) for n in dir(resource) if n.startswith("RLIMIT")}},
        "gc": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), gc.callbacks[:]),
        "switch interval": sys.getswitchinterval(), "recursion": sys.getrecursionlimit(),
        "path": (list(sys.path), list(sys.meta_path), list(sys.path_hooks), list(sys.argv)),
        "environment": dict(os.environ), "directory": os.getcwd(),
        "umask": (lambda m: (os.umask(m), m)[1])(os.umask(0)),
        "group": (os.getpgrp(), os.getsid(0), os.getpriority(os.PRIO_PROCESS, 0)),
        "affinity": os.sched_getaffinity(0), "locale": locale.setlocale(locale.LC_ALL),
        "temporary": tempfile.tempdir, "main": sys.modules["__main__"],
    }}

def differences(before, after):
    return [name for name in before if before[name] != after[name]]

if __name__ == "__main__":
    before = settings()
    import bulkhead
    from bulkhead import Dispatcher, Job, Pool
    assert differences(before, settings()) == [], ("import", differences(before, settings()))
    assert any(isinstance(h, logging.NullHandler) for h in logging.getLogger("bulkhead").handlers)
    with Dispatcher([Pool(0, 2, start_method={method!r}), Pool(1, 1, start_method={method!r})]) as disp:
        assert disp.dispatch(Job(faulty_jobs.double, 4).options(priority=0)).result() == 8
        disp.dispatch(Job(faulty_jobs.kill_self).options(priority=0)).wait()
        disp.dispatch(Job(faulty_jobs.loop).options(priority=1, timeout=0.1)).wait()
        disp.barrier(check=False)
        assert differences(before, settings()) == [], ("while open", differences(before, settings()))
    assert differences(before, settings()) == [], ("after", differences(before, settings()))
    print("done")
"""


def test_no_setting_of_the_caller_is_changed(start_method: str) -> None:
    with running(COMPARE.format(method=start_method)) as script:
        assert script.wait() == 0, script.errors()
        assert (script.output(), script.errors()) == ("done\n", "")


WORKS = """
import os, signal, subprocess, sys, threading, time, warnings, logging, multiprocessing
import faulty_jobs
from bulkhead import Dispatcher, Job, JobTimeout, Pool, WorkerCrashed

def exercise(disp):
    crashed = disp.dispatch(Job(faulty_jobs.exit_with, 3).options(priority=0)).exception(20)
    assert isinstance(crashed, WorkerCrashed) and crashed.exit_code == 3, crashed
    killed = disp.dispatch(Job(faulty_jobs.kill_self).options(priority=0)).exception(20)
    assert isinstance(killed, WorkerCrashed) and killed.signal == "SIGKILL", killed
    late = disp.dispatch(Job(faulty_jobs.sleep_in_c).options(priority=0, timeout=0.1)).exception(20)
    assert isinstance(late, JobTimeout), late
    trackers = [disp.dispatch(Job(faulty_jobs.double, n).options(priority=0)) for n in range(10)]
    assert [tracker.result(20) for tracker in trackers] == [2 * n for n in range(10)]
    disp.barrier(timeout=20, check=False)

if __name__ == "__main__":
{before}
    with Dispatcher([Pool(0, 2, start_method={method!r})]) as disp:
        exercise(disp)
{during}
    signal.setitimer(signal.ITIMER_REAL, 0)
    print("done")
"""

IGNORES_SIGCHLD = "    signal.signal(signal.SIGCHLD, signal.SIG_IGN)"

REAPS_IN_A_HANDLER = """\
    def reap(*_):
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
    signal.signal(signal.SIGCHLD, reap)"""

REAPS_IN_A_THREAD = """\
    is_over = threading.Event()
    def reap():
        while not is_over.is_set():
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                time.sleep(0.001)
    threading.Thread(target=reap, daemon=True).start()"""

BLOCKS_SIGNALS = "    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())"

IGNORES_SIGTERM = (
    "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    signal.signal(signal.SIGINT, signal.SIG_IGN)"
)

HAS_NO_STANDARD_STREAMS = """\
    report = os.dup(1)
    for fd in (0, 1, 2):
        os.close(fd)
    sys.stdin = sys.stdout = sys.stderr = None
    print = lambda text: os.write(report, f"{{text}}\\n".encode())""".replace("{{", "{").replace("}}", "}")

OWN_START_METHOD = "    multiprocessing.set_start_method('spawn')"

OWN_WAKEUP_FD = """\
    r, w = os.pipe()
    os.set_blocking(w, False)
    signal.set_wakeup_fd(w)
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)"""

OTHER_DIRECTORY = "    os.chdir('/')"

DIRECTORY_GONE = """\
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir("../gone")"""

FEW_DESCRIPTORS = """\
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))"""

HIGH_DESCRIPTORS = """\
    import resource
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4096), most))
    kept = [os.open(os.devnull, os.O_RDONLY) for _ in range(min(most, 4096) - 200)]"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize(
    "habit", [IGNORES_SIGCHLD, REAPS_IN_A_HANDLER], ids=["SIGCHLD ignored", "SIGCHLD handler"]
)
def test_it_works_for_a_caller_that_handles_sigchld_its_own_way(habit: str, method: str) -> None:
    assert_works(habit, method)


@pytest.mark.parametrize(
    "habit",
    [
        REAPS_IN_A_THREAD,
        BLOCKS_SIGNALS,
        IGNORES_SIGTERM,
        HAS_NO_STANDARD_STREAMS,
        OWN_START_METHOD,
        OWN_WAKEUP_FD,
        OTHER_DIRECTORY,
        DIRECTORY_GONE,
        FEW_DESCRIPTORS,
        HIGH_DESCRIPTORS,
    ],
    ids=[
        "waitpid(-1) in a thread",
        "signals blocked",
        "SIGTERM ignored",
        "no standard streams",
        "start method set",
        "timer and wakeup fd",
        "other directory",
        "directory gone",
        "few descriptors",
        "high descriptors",
    ],
)
def test_it_works_whatever_the_caller_has_set(habit: str) -> None:
    assert_works(habit, "forkserver")


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize(
    "habit", [BLOCKS_SIGNALS, IGNORES_SIGTERM, HAS_NO_STANDARD_STREAMS, HIGH_DESCRIPTORS]
)
def test_it_works_whatever_a_fork_or_spawn_inherits(habit: str, method: str) -> None:
    assert_works(habit, method)


def assert_works(habit: str, method: str) -> None:
    with running(WORKS.format(before=habit, during="", method=method)) as script:
        assert script.wait() == 0, script.errors()
        assert (script.output(), script.errors()) == ("done\n", "")
        assert script.processes() == []


WAITS_FOR_ITS_OWN = """\
        children = [subprocess.Popen(["sleep", "0.1"]).pid for _ in range(5)]
        for _ in children:
            pid, status = os.waitpid(-1, 0)
            assert pid in children and status == 0, (pid, status)
        exercise(disp)"""


def test_a_caller_that_waits_for_any_child_gets_its_own_children() -> None:
    with running(WORKS.format(before="", during=WAITS_FOR_ITS_OWN, method="forkserver")) as script:
        assert script.wait() == 0, script.errors()
        assert (script.output(), script.errors()) == ("done\n", "")


BESIDE = """
import concurrent.futures, multiprocessing
import faulty_jobs
from bulkhead import Dispatcher, Job

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor, Dispatcher([(0, 1)]) as disp:
        for n in range(10):
            assert executor.submit(faulty_jobs.double, n).result() == 2 * n
            assert disp.dispatch(Job(faulty_jobs.double, n)).result() == 2 * n
    print("done")
"""


def test_it_runs_beside_a_pool_of_the_standard_library() -> None:
    with running(BESIDE, ("-W", "error")) as script:
        assert script.wait() == 0, script.errors()
        assert (script.output(), script.errors()) == ("done\n", "")


# What neither an import of bulkhead nor a worker needs, and takes long.
DEAR = [
    *[
        "sqlite3",
        "msgspec",
        "asyncio",
        "redis",
        "nats",
        "concurrent.futures.process",
        "rich",
        "psutil",
        "ctypes",
    ],
    *[
        "dataclasses",
        "inspect",
        "tempfile",
        "json",
        "bulkhead.dispatcher",
        "bulkhead.tracker",
        "bulkhead.config",
    ],
    *[
        "bulkhead.engines.processes.pool",
        "bulkhead._kernel",
        "bulkhead.retry",
        "bulkhead.stats",
        "bulkhead.spans",
    ],
]
# What only some callers need.
RARE = [*DEAR[:7], "bulkhead.stats", "bulkhead.spans", "tempfile"]


@pytest.mark.parametrize(
    ("code", "dear"),
    [("import bulkhead", DEAR), ("from bulkhead import Dispatcher, Job, Pool", RARE)],
    ids=["the package", "the names of most scripts"],
)
def test_importing_it_imports_nothing_that_is_not_needed(code: str, dear: list[str]) -> None:
    code = f"import sys; {code}; print([name for name in sys.argv[1:] if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, *dear], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


IN_A_WORKER = """
import sys
from bulkhead import Dispatcher, Job, Pool

there = "[*__import__('sys').modules]"
# The second two are what the standard library's traceback imports when it is first used, from 3.13 on.
known = "[*__import__('bulkhead').worker_state(), 'ast', '_ast']"
new = f"[name for name in {there} if name not in {known}]"
with Dispatcher([Pool(0, 1, initializer=eval, initargs=(there,))]) as disp:
    print([name for name in disp.dispatch(Job(eval, there)).result() if name in sys.argv])
    disp.dispatch(Job(eval, "1 / 0")).wait()
    print(list(disp.map(abs, [-1, -2])), disp.dispatch(Job(eval, new)).result())
"""


def test_a_launcher_imports_what_workers_need_and_no_more() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_WORKER, *DEAR], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["[]", "[1, 2] []"]
