"""A pool whose workers cannot start gives up soon, tells why, and harms nobody else (C15)."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import faulty_jobs
import pytest
from calling import Call
from scripts import running
from watching import PATIENCE, assert_whole, wait_until, wait_until_whole, worker_pids

from bulkhead import Dispatcher, Job, Pool, PoolBroken, WorkerCrashed

# Starts that a pool of two workers may try before it gives up: bounded, and more than one.
MOST_STARTS = 8


def starts(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.parametrize(
    ("initializer", "extra", "cause", "text"),
    [
        (faulty_jobs.exit_at_start, (7,), WorkerCrashed, "code 7"),
        (faulty_jobs.exit_at_start, (0,), WorkerCrashed, "code 0"),
        (faulty_jobs.raise_at_start, (), RuntimeError, "the licence server said no"),
        (faulty_jobs.segfault_at_start, (), WorkerCrashed, "SIGSEGV"),
    ],
    ids=["exit 7", "exit 0", "raises", "segfault"],
)
def test_an_initializer_that_always_fails_breaks_its_pool_with_the_cause_and_no_other(
    usual_start_method: str,
    tmp_path: Path,
    initializer: Callable[..., object],
    extra: tuple[int, ...],
    cause: type[Exception],
    text: str,
) -> None:
    log = tmp_path / "log"
    broken = Pool(
        0,
        2,
        backlog=None,
        initializer=initializer,
        initargs=(log, *extra),
        start_method=usual_start_method,
        name="sick",
    )
    with Dispatcher([broken, Pool(1, 1, start_method=usual_start_method)]) as disp:
        wait_until_broken(disp)
        with pytest.raises(PoolBroken, match="sick") as caught:
            disp.dispatch(Job(faulty_jobs.double, 4).options(priority=0))
        assert text in str(caught.value)
        assert isinstance(caught.value.__cause__, cause)
        assert text in str(caught.value.__cause__)
        wait_until(lambda: not disp.stats()[0].processes, "those that were coming up have failed as well")
        tried = starts(log)
        assert 2 <= tried <= MOST_STARTS
        assert_whole(disp, 1)
        assert disp.stats()[1].restarts == 0
        assert starts(log) == tried
        assert disp.barrier(timeout=PATIENCE, check=False).failed_count == 0


def wait_until_broken(disp: Dispatcher) -> None:
    """Wait until the pool takes no more jobs."""

    def is_broken() -> bool:
        try:
            tracker = disp.try_dispatch(Job(faulty_jobs.double, 4).options(priority=0))
        except PoolBroken:
            return True
        assert tracker is None or tracker.cancel() or isinstance(tracker.exception(), PoolBroken)
        return False

    wait_until(is_broken)
    disp.barrier(0, timeout=PATIENCE, check=False)


def test_jobs_and_callers_that_wait_for_a_pool_that_breaks_get_the_error(tmp_path: Path) -> None:
    pool = Pool(0, 1, backlog=2, initializer=faulty_jobs.raise_at_start, initargs=(tmp_path / "log",))
    with Dispatcher([pool]) as disp:
        waiting = [disp.dispatch(Job(faulty_jobs.double, number)) for number in range(3)]
        delayed = disp.dispatch(Job(faulty_jobs.double, 4).options(delay=1000))
        blocked = Call(disp.dispatch, Job(faulty_jobs.double, 4))
        barrier = Call(disp.barrier, timeout=PATIENCE, check=False)
        with pytest.raises(PoolBroken):
            blocked.value()
        assert barrier.value().failed_count == 4
        for tracker in [*waiting, delayed]:
            error = tracker.exception(0)
            assert isinstance(error, PoolBroken)
            assert "the licence server said no" in str(error)
            assert tracker.status().error_type == "PoolBroken"
        for use in (disp.dispatch, disp.try_dispatch, lambda job: list(disp.dispatch_all([job]))):
            with pytest.raises(PoolBroken):
                use(Job(faulty_jobs.double, 4))


def test_the_rate_of_restarts_is_bounded_when_idle_workers_are_killed_again_and_again() -> None:
    with Dispatcher([(0, 1)]) as disp:
        killed = 0
        began = time.monotonic()
        while time.monotonic() < began + 1:
            for pid in worker_pids(disp):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
            time.sleep(0.005)
        assert 2 <= disp.stats()[0].restarts <= 10
        assert killed >= 3
        wait_until_whole(disp)
        assert disp.dispatch(Job(faulty_jobs.double, 4)).result(PATIENCE) == 8


def test_a_job_that_crashes_every_time_does_not_break_its_pool() -> None:
    with Dispatcher([Pool(0, 2, backlog=None)]) as disp:
        trackers = [disp.dispatch(Job(faulty_jobs.exit_with, 1)) for _ in range(30)]
        assert disp.barrier(timeout=PATIENCE, check=False).failed_count == 30
        assert {type(tracker.exception()) for tracker in trackers} == {WorkerCrashed}
        assert_whole(disp)


# Imported well by the caller and badly by every other process.
SICK_MODULE = """
import os
if os.environ.setdefault("SICK_MODULE_CALLER", str(os.getpid())) != str(os.getpid()):
    raise ImportError("sick on purpose")

def initializer():
    pass

def job():
    return 1
"""

IMPORTS = """
import sick
from bulkhead import Dispatcher, Job, Pool, PoolBroken

if __name__ == "__main__":
    pools = [Pool(0, 2, initializer={initializer}, start_method={method!r}), Pool(1, 1, start_method="fork")]
    with Dispatcher(pools) as disp:
        try:
            print("accepted", disp.dispatch(Job(sick.job).options(priority=0)).exception())
        except PoolBroken as error:
            print("refused", error)
        print("other pool:", disp.dispatch(Job(pow, 2, 3).options(priority=1)).result())
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
@pytest.mark.parametrize(
    "initializer", ["sick.initializer", "None"], ids=["with initializer", "by main alone"]
)
def test_a_module_that_fails_on_import_breaks_the_pool_with_the_cause(
    tmp_path: Path, method: str, initializer: str
) -> None:
    (tmp_path / "sick.py").write_text(SICK_MODULE)
    code = IMPORTS.format(method=method, initializer=initializer)
    with running(
        code, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    ) as script:
        assert script.wait() == 0, script.errors()
        told, other = script.output().splitlines()
        assert "sick on purpose" in told
        assert "sick" in told.partition(" ")[2]
        assert other == "other pool: 8"
        assert script.errors() == ""


def test_a_worker_that_fails_to_start_now_and_then_does_not_break_its_pool(tmp_path: Path) -> None:
    pool = Pool(0, 2, initializer=faulty_jobs.crash_first_start, initargs=(tmp_path,))
    with Dispatcher([pool]) as disp:
        for _ in range(5):
            wait_until_whole(disp)
            (tmp_path / "0").unlink()
            for pid in worker_pids(disp):
                os.kill(pid, signal.SIGKILL)
            assert disp.dispatch(Job(faulty_jobs.double, 4), timeout=PATIENCE).result(PATIENCE) == 8
        assert_whole(disp)


NO_DESCRIPTORS = """
import os, resource
import faulty_jobs
from bulkhead import BulkheadError, Dispatcher, Job, Pool
from watching import PATIENCE, assert_whole, wait_until_whole

if __name__ == "__main__":
    methods = {{"start_method": {method!r}}}
    with Dispatcher([Pool(0, 1, backlog=None, **methods), Pool(1, 1, **methods)]) as disp:
        wait_until_whole(disp, 0)
        wait_until_whole(disp, 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        crash = disp.dispatch(Job(faulty_jobs.kill_self).options(priority=0)).exception(PATIENCE)
        print("crash:", type(crash).__name__)
        try:
            following = disp.dispatch(Job(faulty_jobs.double, 4).options(priority=0), timeout=1).exception(1)
        except BulkheadError as error:
            following = error
        print("next:", type(following).__name__)
        print("other:", disp.dispatch(Job(faulty_jobs.double, 4).options(priority=1)).result(PATIENCE))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert_whole(disp, 1)
    print("end")
"""


def test_running_out_of_descriptors_harms_the_pool_that_needs_them_alone_and_never_hangs(
    usual_start_method: str,
) -> None:
    with running(NO_DESCRIPTORS.format(method=usual_start_method)) as script:
        assert script.wait() == 0, script.errors()
        crash, following, other, end = script.output().splitlines()
        assert crash == "crash: WorkerCrashed"
        assert following.removeprefix("next: ") in ("NoneType", "PoolBroken", "PoolFull", "WaitTimeout")
        assert (other, end) == ("other: 8", "end")
        assert script.errors() == ""
        assert script.processes() == []


FORK_FAILS_ONCE = """
import os
import faulty_jobs
from bulkhead import Dispatcher, Job, Pool
from watching import PATIENCE, wait_until_whole

if __name__ == "__mp_main__":  # in the launcher, which imports this script
    fork, forks = os.fork, []

    def fork_or_fail():
        forks.append(1)
        if len(forks) == 3:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    os.fork = fork_or_fail

if __name__ == "__main__":
    with Dispatcher([Pool(0, 2)]) as disp:
        wait_until_whole(disp, 0)
        innocent = disp.dispatch(Job(faulty_jobs.nap, 0.5))
        print(type(disp.dispatch(Job(faulty_jobs.kill_self)).exception(PATIENCE)).__name__)
        print(innocent.exception(PATIENCE))
        wait_until_whole(disp, 0)
"""


def test_a_fork_that_fails_in_the_launcher_costs_no_job_and_is_tried_again() -> None:
    with running(FORK_FAILS_ONCE) as script:
        assert script.wait() == 0, script.errors()
        assert script.output().splitlines() == ["WorkerCrashed", "None"]
