"""Runs the standard library's own tests of process pools against bulkhead's executors.

    python tests/compat/run_stdlib_suite.py                       this interpreter, both executors, all start methods
    python tests/compat/run_stdlib_suite.py --python python3.13 --executor standalone --method spawn
    python tests/compat/run_stdlib_suite.py --suite DIR           a directory that holds the package `test`

The test classes of `test.test_concurrent_futures` (a package since 3.12, a module before) that are about process pools
run as they are, but for the type of the executor. Two stand-ins take its place: `bulkhead.ProcessPoolExecutor`, and an
executor of a `Dispatcher` (`disp.executor()`). Nothing is downloaded: an interpreter without that package is named as
such and skipped.

A few tests look at private attributes of the standard library's executor. Where these say something that bulkhead
tells as well, the stand-ins translate: `_processes` (from `stats()`), `_broken`, `_mp_context`. Where they do not, the
test is not applicable; NOT_APPLICABLE says why, and which test of bulkhead's own proves what is behind it.

Exit code: 0 when nothing has failed, 1 when something has, 3 when there is no suite to run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
NO_SUITE = 3

EXECUTORS = ("standalone", "dispatcher")
METHODS = ("fork", "forkserver", "spawn")
MIXINS = {
    "fork": "ProcessPoolForkMixin",
    "forkserver": "ProcessPoolForkserverMixin",
    "spawn": "ProcessPoolSpawnMixin",
}

PACKAGE = "test.test_concurrent_futures"
MODULES = (
    "test_as_completed",
    "test_deadlock",
    "test_init",
    "test_process_pool",
    "test_shutdown",
    "test_wait",
)

# Longest run of one module with one executor and one start method (seconds). Only a hang takes so long.
PATIENCE = 600.0

OWN = "tests/processes/test_executor.py"
OWN_POOL = "tests/processes/test_process_pool_executor.py"


class Reason(NamedTuple):
    """Why a test is not applicable, and under which start methods."""

    text: str
    methods: tuple[str, ...] = METHODS


ON_DEMAND = "counts `_processes`, which are started on demand there; here all workers start at once: "
MANAGER = "joins `_executor_manager_thread` and `_call_queue`, which do not exist here: "

# By the name of the test.
NOT_APPLICABLE = {
    "test_killed_child": Reason(
        "kills one of `_processes` and demands that the whole executor is broken; here a worker's death fails its own "
        f"future alone, and the executor stays usable: {OWN}, a_killed_worker_fails_its_own_future_alone"
    ),
    "test_idle_process_reuse_one": Reason(f"{ON_DEMAND}{OWN_POOL}, an_idle_worker_is_used_again"),
    "test_idle_process_reuse_multiple": Reason(f"{ON_DEMAND}{OWN_POOL}, an_idle_worker_is_used_again"),
    "test_processes_terminate": Reason(  # under fork all start at once there, too
        f"{ON_DEMAND}{OWN_POOL}, shutdown_ends_the_processes", ("forkserver", "spawn")
    ),
    "test_del_shutdown": Reason(
        f"{MANAGER}{OWN_POOL}, a_dropped_executor_ends_its_calls_and_then_its_processes"
    ),
    "test_shutdown_no_wait": Reason(
        f"{MANAGER}{OWN_POOL}, shutdown_without_waiting_ends_the_calls_and_then_the_processes"
    ),
    "test_shutdown_deadlock_pickle": Reason(
        f"{MANAGER}{OWN}, "
        "what_cannot_be_pickled_is_the_futures_error_also_when_the_executor_is_shut_down_just_then"
    ),
    "test_gh105829_should_not_deadlock_if_wakeup_pipe_full": Reason(
        "replaces `_ExecutorManagerThread.run` and `_ThreadWakeup`, which do not exist here, so that it would prove "
        f"nothing: {OWN}, many_submitted_calls_do_not_block"
    ),
    "test_python_finalization_error": Reason(
        "makes `threading._start_joinable_thread` fail for the second thread of the executor; here there is one"
    ),
}


# What runs in the interpreter whose suite it is


class Process:
    """One of `_processes`."""

    def __init__(self, pid: int | None) -> None:
        import psutil

        try:
            self._process = psutil.Process(pid) if pid is not None else None
        except psutil.NoSuchProcess:
            self._process = None

    def join(self) -> None:
        import psutil

        end = time.monotonic() + 30
        while self._process is not None and self._process.is_running():
            if self._process.status() == psutil.STATUS_ZOMBIE:
                return
            if time.monotonic() > end:
                raise AssertionError(f"{self._process} has not ended")
            time.sleep(0.01)


class Translated:
    """The private attributes that the suite looks at, told by what bulkhead tells. `_dispatcher` is the executor's."""

    _dispatcher: Any

    @property
    def _processes(self) -> dict[int, Process]:
        workers = self._dispatcher.stats()[0].processes
        return {worker.pid or -number: Process(worker.pid) for number, worker in enumerate(workers)}

    @property
    def _broken(self) -> bool:
        import bulkhead

        try:
            self._dispatcher.dispatch(bulkhead.Job(int))
        except bulkhead.PoolBroken:
            return True
        return False

    @property
    def _mp_context(self) -> Any:
        return multiprocessing.get_context(self._pool.config.start_method)  # type: ignore[attr-defined]


def _standalone() -> type:
    import bulkhead

    class ProcessPoolExecutor(Translated, bulkhead.ProcessPoolExecutor):
        pass

    return ProcessPoolExecutor


def _of_dispatcher() -> type:
    import bulkhead
    from bulkhead.executor import PoolExecutor
    from bulkhead.job import initialize
    from bulkhead.process_pool_executor import _checked, _start_method

    class ProcessPoolExecutor(Translated, PoolExecutor):
        """`disp.executor()` of a dispatcher that is finalized when the executor is shut down."""

        def __init__(
            self,
            max_workers: int | None = None,
            mp_context: Any = None,
            initializer: Any = None,
            initargs: tuple[Any, ...] = (),
            *,
            max_tasks_per_child: int | None = None,
        ) -> None:
            method = _start_method(mp_context, max_tasks_per_child)
            workers = 2 if max_workers is None else _checked("max_workers", max_workers)
            if initializer is not None:
                initializer, initargs = initialize, (initializer, *initargs)
            limits = {} if max_tasks_per_child is None else {"max_jobs_per_worker": max_tasks_per_child}
            pool = bulkhead.Pool(
                0, workers, initializer=initializer, initargs=initargs, start_method=method, **limits
            )
            self._dispatcher = bulkhead.Dispatcher([pool])
            self.__dict__.update(self._dispatcher.executor().__dict__)

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait, cancel_futures=cancel_futures)
            finalize = self._dispatcher.finalize
            if wait:
                finalize()
            else:
                threading.Thread(target=finalize).start()

    return ProcessPoolExecutor


def suite_modules() -> list[str]:
    """Return the names of the modules that hold the tests, none when there are none."""
    try:
        found = importlib.util.find_spec(PACKAGE)
    except ModuleNotFoundError:
        return []
    if found is None:
        return []
    if found.submodule_search_locations is None:
        return [PACKAGE]
    return [f"{PACKAGE}.{name}" for name in MODULES]


def run_module(name: str, executor: str, method: str, pattern: str | None) -> dict[str, Any]:
    """Run the tests of a module that are about process pools."""
    replacement = _standalone() if executor == "standalone" else _of_dispatcher()
    module = importlib.import_module(name)
    _replace(module, replacement, executor)
    suite = unittest.TestSuite()
    for case in _cases(module, method):
        for test in unittest.defaultTestLoader.loadTestsFromTestCase(case):
            if pattern is None or re.search(pattern, test.id()):
                suite.addTest(test)
    outcome = Outcome(method)
    set_up = getattr(module, "setUpModule", None)
    if set_up is not None:
        set_up()
    try:
        suite.run(outcome)
    finally:
        unittest.doModuleCleanups()
    return outcome.report()


def _replace(module: Any, replacement: type, executor: str) -> None:
    import concurrent.futures.process as process

    from bulkhead.errors import RemoteTraceback

    for place in (module, sys.modules.get(f"{PACKAGE}.util")):
        for mixin in MIXINS.values():
            if place is not None and hasattr(place, mixin):
                getattr(place, mixin).executor_type = replacement
    # Why a type of its own: one test is left out by the suite for the executor of this name, which hangs there.
    concurrent.futures.ProcessPoolExecutor = type("ProcessPoolExecutor", (replacement,), {})  # type: ignore[misc]
    process._RemoteTraceback = RemoteTraceback  # type: ignore[attr-defined]
    if hasattr(module, "assert_python_ok"):
        module.assert_python_ok = _rewriting(module.assert_python_ok, executor)


def _rewriting(assert_python_ok: Any, executor: str) -> Any:
    """Return the function with scripts that use our executor instead of the standard library's."""
    home = "from bulkhead import" if executor == "standalone" else "from run_stdlib_suite import"
    found = f"import sys, multiprocessing; sys.path[:0] = {[str(HERE), *sys.path]!r}; {home} \\1"

    def rewritten(flag: str, code: str, **options: Any) -> Any:
        return assert_python_ok(
            flag,
            re.sub(r"from concurrent\.futures import (\w+)", found.replace("\\1", r"\1"), code),
            **options,
        )

    return rewritten


def __getattr__(name: str) -> Any:
    if name == "ProcessPoolExecutor":  # for the scripts that tests of the suite run
        return _of_dispatcher()
    raise AttributeError(name)


def _cases(module: Any, method: str) -> list[type[unittest.TestCase]]:
    found = []
    for name, case in vars(module).items():
        if (
            isinstance(case, type)
            and issubclass(case, unittest.TestCase)
            and case.__module__ == module.__name__
        ):
            bases = {base.__name__ for base in case.__mro__}
            is_about_resources = name == "FailingInitializerResourcesTest" and method != "fork"
            if MIXINS[method] in bases or is_about_resources:
                found.append(case)
    return found


class Outcome(unittest.TestResult):
    """What has become of each test."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self._method = method
        self._passed: list[str] = []
        self._reasons: dict[str, str] = {}

    def startTest(self, test: Any) -> None:  # noqa: N802
        super().startTest(test)
        name = test._testMethodName
        reason = NOT_APPLICABLE.get(name)
        if reason is not None and self._method in reason.methods and hasattr(test, "executor_type"):

            def skip() -> None:
                raise unittest.SkipTest(reason.text)

            test.setUp, test.tearDown = skip, lambda: None

    def addSuccess(self, test: Any) -> None:  # noqa: N802
        self._passed.append(_short(test))

    def addSkip(self, test: Any, reason: str) -> None:  # noqa: N802
        self._reasons[_short(test)] = reason

    def report(self) -> dict[str, Any]:
        failed = {_short(test): text for test, text in [*self.failures, *self.errors]}
        passed = [name for name in self._passed if name not in failed]
        return {"passed": passed, "failed": failed, "not applicable": self._reasons}


def _short(test: Any) -> str:
    return str(test.id()).removeprefix(PACKAGE + ".")


# What runs in the interpreter that was started


def run(python: str, executors: list[str], methods: list[str], pattern: str | None, suite: str | None) -> int:
    """Run the suite of an interpreter and print what has become of it."""
    version = _ask(python, ["-c", "import sys; print(sys.version.split()[0])"], suite)
    modules = _ask(python, [__file__, "--modules"], suite).split()
    if not modules:
        print(f"{python} ({version}): not run, it has no package {PACKAGE}")
        return NO_SUITE
    n_failed = 0
    for executor in executors:
        total: Counter[str] = Counter()
        failed: dict[str, str] = {}
        reasons: dict[str, str] = {}
        for method in methods:
            jobs = [(module, executor, method) for module in modules]
            for report in _run_all(python, jobs, pattern, suite):
                for kind, found in report.items():
                    total[kind] += len(found)
                failed |= {f"{name} [{method}]": text for name, text in report["failed"].items()}
                reasons |= {f"{name} [{method}]": text for name, text in report["not applicable"].items()}
        for name, text in failed.items():
            print(f"FAILED {name}\n{text}")
        for name, reason in sorted(reasons.items()):
            print(f"not applicable: {name}: {reason}")
        counts = ", ".join(f"{total[kind]} {kind}" for kind in ("passed", "failed", "not applicable"))
        print(f"{version} {executor} ({', '.join(methods)}): {counts}", flush=True)
        n_failed += total["failed"]
    return 1 if n_failed else 0


def _run_all(
    python: str, jobs: list[tuple[str, str, str]], pattern: str | None, suite: str | None
) -> list[dict[str, Any]]:
    """Run modules side by side: most of their tests sleep."""
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as threads:
        return list(threads.map(lambda job: _run_one(python, *job, pattern, suite), jobs))


def _run_one(
    python: str, module: str, executor: str, method: str, pattern: str | None, suite: str | None
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [python, __file__, "--module", module, "--executor", executor, "--method", method]
        command += ["--report", str(report)]
        if pattern is not None:
            command += ["-k", pattern]
        try:
            done = subprocess.run(
                command,
                env=_environment(suite),
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
            said = f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
        except subprocess.TimeoutExpired as error:
            said = f"not done within {error.timeout} s\n{error.stderr!r}"
        if report.exists():
            found: dict[str, Any] = json.loads(report.read_text())
            return found
        return {"passed": [], "failed": {module: said}, "not applicable": {}}


def _ask(python: str, arguments: list[str], suite: str | None) -> str:
    done = subprocess.run(
        [python, *arguments], env=_environment(suite), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{python} cannot be used:\n{done.stderr}")
    return done.stdout.strip()


def _environment(suite: str | None) -> dict[str, str]:
    """Return an environment in which bulkhead and psutil can be imported, by another interpreter, too."""
    import psutil

    import bulkhead

    # Why a link: the folder that psutil lies in holds other packages, perhaps for another version of Python.
    links = Path(tempfile.gettempdir()) / f"bulkhead-suite-{os.getuid()}"
    links.mkdir(exist_ok=True)
    link = links / "psutil"
    target = Path(psutil.__file__).parent
    if not link.exists() or link.resolve() != target:
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    places = [str(Path(bulkhead.__file__).parents[1]), str(links)]
    if suite is not None:
        places.insert(0, suite)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable, help="the interpreter whose suite is run")
    parser.add_argument("--executor", action="append", choices=EXECUTORS)
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("-k", metavar="REGEX", help="only tests whose name matches")
    parser.add_argument("--suite", metavar="DIR", help="where the package `test` lies, if not in the library")
    parser.add_argument("--modules", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--module", help=argparse.SUPPRESS)
    parser.add_argument("--report", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.modules:
        print("\n".join(suite_modules()))
        return 0
    if given.module:
        report = run_module(given.module, given.executor[0], given.method[0], given.k)
        Path(given.report).write_text(json.dumps(report))
        return 0
    return run(given.python, given.executor or [*EXECUTORS], given.method or [*METHODS], given.k, given.suite)


if __name__ == "__main__":
    sys.exit(main())
