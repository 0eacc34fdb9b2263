"""The stand-alone executor (D5), a drop-in that owns its processes: its start, its end, the interpreter's end."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from concurrent.futures import BrokenExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest
from jobs import echo, fail, nap, nothing, pid
from scripts import running
from traces import Traces
from watching import PATIENCE, alive, children, wait_until

from bulkhead import ConfigError, ConfigTypeError, JobNotPicklable, PoolBroken, ProcessPoolExecutor
from bulkhead.process_pool_executor import _usable_cpus

STRICT = ("-X", "dev", "-W", "error")


def context(method: str) -> Any:
    return multiprocessing.get_context(method)


def workers_of(executor: ProcessPoolExecutor) -> list[int]:
    """Return the pids of the workers, when all have come up."""
    stats = executor._dispatcher.stats
    wait_until(lambda: stats()[0].starting == 0, "all workers are up")
    return [worker.pid for worker in stats()[0].processes if worker.pid is not None]


def test_it_does_what_the_standard_librarys_does(start_method: str) -> None:
    with ProcessPoolExecutor(2, context(start_method)) as executor:
        assert executor.submit(pow, 2, 10).result() == 1024
        assert list(executor.map(pow, range(20), range(20), chunksize=3)) == [n**n for n in range(20)]
        with pytest.raises(ValueError, match="no luck"):
            executor.submit(fail).result()


def test_an_idle_worker_is_used_again() -> None:
    with ProcessPoolExecutor(4) as executor:
        workers = workers_of(executor)
        assert len(workers) == 4
        assert {executor.submit(pid).result() for _ in range(20)} <= set(workers)
        assert workers_of(executor) == workers


def test_by_default_there_is_a_worker_for_each_cpu_that_may_be_used() -> None:
    with ProcessPoolExecutor() as executor:
        assert executor._max_workers == _usable_cpus() == len(os.sched_getaffinity(0))
        assert len(workers_of(executor)) == executor._max_workers


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_workers": 0}, ConfigError, "max_workers must be greater than 0"),
        ({"max_workers": -1}, ConfigError, "max_workers must be greater than 0"),
        ({"max_workers": 10**30}, ConfigError, "max_workers must be at most 10000"),
        ({"max_workers": "2"}, ConfigTypeError, "max_workers"),
        ({"max_workers": 1, "mp_context": "spawn"}, ConfigTypeError, "mp_context"),
        ({"max_workers": 1, "initializer": 3}, ConfigTypeError, "initializer"),
        ({"max_workers": 1, "initializer": nothing, "initargs": 3}, ConfigTypeError, "initargs"),
        ({"max_workers": 1, "max_tasks_per_child": 0}, ConfigError, "max_tasks_per_child"),
        ({"max_workers": 1, "max_tasks_per_child": 1.5}, ConfigTypeError, "max_tasks_per_child"),
        (
            {"max_workers": 1, "mp_context": multiprocessing.get_context("fork"), "max_tasks_per_child": 1},
            ConfigError,
            "max_tasks_per_child",
        ),
    ],
)
def test_values_that_cannot_work_are_refused_before_anything_starts(
    options: dict[str, Any], error: type[ConfigError], text: str
) -> None:
    before = Traces.now()
    with pytest.raises(error, match=text):
        ProcessPoolExecutor(**options)
    assert not Traces.now().beyond(before)


def test_a_worker_is_replaced_after_so_many_calls() -> None:
    with ProcessPoolExecutor(1, context("forkserver"), max_tasks_per_child=3) as executor:
        pids = [executor.submit(pid).result(PATIENCE) for _ in range(7)]
    assert [pids.count(one) for one in dict.fromkeys(pids)] == [3, 3, 1]


# Initializers

# Why scripts: multiprocessing keeps a process and semaphores of its own until the interpreter ends.
HEIRS = """
import multiprocessing, os, signal
from bulkhead import ProcessPoolExecutor

kept = []

def keep(*given):
    kept[:] = given

def use(number):
    queue, lock, value, end = kept
    with lock:
        value.value += number
    queue.put(number)
    end.send(number)
    return os.getpid()

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    queue, lock, value = context.SimpleQueue(), context.Lock(), context.Value("i", 0)
    receiver, sender = context.Pipe(duplex=False)
    with ProcessPoolExecutor(2, context, {keep}, (queue, lock, value, sender)) as executor:
        first = {{executor.submit(use, number).result() for number in range(10)}}
        for worker in first:
            os.kill(worker, signal.SIGKILL)
        for worker in first:
            while os.path.exists(f"/proc/{{worker}}"):
                pass
        # Workers that take another's place get them, too.
        second = {{executor.submit(use, number).result() for number in range(10, 20)}}
        assert not first & second
        assert value.value == sum(range(20))
        assert sorted(queue.get() for _ in range(20)) == list(range(20))
        assert sorted(receiver.recv() for _ in range(20)) == list(range(20))
    print("done")
"""


@pytest.mark.parametrize(
    "keep", ["keep", "lambda *given: __import__('__main__').keep(*given)"], ids=["function", "lambda"]
)
def test_locks_queues_values_and_pipes_of_multiprocessing_reach_the_workers_through_the_initializer(
    start_method: str, keep: str
) -> None:
    if keep != "keep" and start_method != "spawn":
        keep = "keep"  # how it is pickled does not depend on the method
    with running(HEIRS.format(method=start_method, keep=keep), STRICT) as script:
        assert script.wait() == 0, script.errors()
        assert (script.output(), script.errors()) == ("done\n", "")


LOCK_BEFORE = """
import multiprocessing
from bulkhead import ProcessPoolExecutor

is_main = False

def is_fork():
    return is_main

if __name__ == "__main__":
    is_main = True
    lock = multiprocessing.Lock()
    print(multiprocessing.get_start_method(allow_none=True) is not None)
    with ProcessPoolExecutor(1) as executor:
        print(executor.submit(is_fork).result())
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as executor:
        print(executor.submit(is_fork).result())
"""


def test_a_lock_that_somebody_makes_does_not_make_forks_the_default() -> None:
    with running(LOCK_BEFORE) as script:
        assert script.wait() == 0, script.errors()
        assert script.output() == "True\nFalse\nTrue\n"


def test_an_initializer_that_cannot_be_sent_is_refused_and_its_descriptors_are_closed() -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with pytest.raises(JobNotPicklable, match="initializer cannot be pickled"):
        ProcessPoolExecutor(1, None, echo, (sender, (n for n in range(3))))
    sender.close()
    with pytest.raises(EOFError):  # nobody else has the other end
        receiver.recv()
    receiver.close()


def test_a_failing_initializer_breaks_the_executor(usual_start_method: str) -> None:
    with ProcessPoolExecutor(2, context(usual_start_method), fail, ("not ready",)) as executor:
        error = executor.submit(nothing).exception(PATIENCE)
        assert isinstance(error, BrokenProcessPool)
        assert isinstance(error, PoolBroken)
        with pytest.raises(BrokenExecutor, match="not ready"):
            executor.submit(nothing)


# Ends


def test_shutdown_ends_the_processes(usual_start_method: str) -> None:
    executor = ProcessPoolExecutor(3, context(usual_start_method))
    workers = workers_of(executor)
    futures = [executor.submit(nap, 0.02) for _ in range(10)]
    executor.shutdown()
    assert all(future.done() for future in futures)
    assert alive(workers) == []
    assert children() == []
    executor.shutdown()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(nothing)


def test_shutdown_without_waiting_ends_the_calls_and_then_the_processes() -> None:
    executor = ProcessPoolExecutor(2)
    workers = workers_of(executor)
    results = executor.map(echo, range(10))
    last = executor.submit(nap, 0.2)
    executor.shutdown(wait=False)
    assert not last.done()
    assert list(results) == list(range(10))
    assert last.exception(PATIENCE) is None
    wait_until(lambda: alive(workers) == [])
    executor.shutdown()


def test_a_dropped_executor_ends_its_calls_and_then_its_processes() -> None:
    executor = ProcessPoolExecutor(2)
    workers = workers_of(executor)
    last = executor.submit(nap, 0.2)
    results = executor.map(echo, range(10))
    del executor
    gc.collect()
    assert list(results) == list(range(10))
    assert last.exception(PATIENCE) is None
    wait_until(lambda: alive(workers) == [])


def test_terminated_workers_end_their_calls() -> None:
    executor = ProcessPoolExecutor(1)
    [worker] = workers_of(executor)
    futures = [executor.submit(time.sleep, 60) for _ in range(3)]
    wait_until(futures[0].running)
    executor.terminate_workers()
    assert all(future.cancelled() for future in futures)
    assert alive([worker]) == []
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(nothing)


@pytest.mark.slow
def test_a_hundred_executors_leave_nothing_behind(start_method: str) -> None:
    before = Traces.now()
    for number in range(100):
        with ProcessPoolExecutor(2, context(start_method)) as executor:
            assert executor.submit(echo, number).result(PATIENCE) == number
    wait_until(lambda: not Traces.now().beyond(before))


# The interpreter's end

SCRIPT = """
import sys, time
from bulkhead import Dispatcher, ProcessPoolExecutor
from jobs import nap, note

if __name__ == "__main__":
    executor = {made}
    futures = [executor.submit(nap, 0.02) for _ in range(20)]
    executor.submit(note, {path!r}, "last")
    {end}
"""


@pytest.mark.parametrize(
    "end",
    [
        "pass",
        "executor.shutdown(wait=False)",
        "del executor",
        "raise SystemExit(0)",
        "executor.shutdown(wait=False, cancel_futures=False); del executor",
    ],
)
def test_calls_that_were_submitted_end_before_the_interpreter_does(end: str, tmp_path: Any) -> None:
    path = tmp_path / "noted"
    with running(SCRIPT.format(made="ProcessPoolExecutor(2)", path=str(path), end=end), STRICT) as script:
        assert script.wait() == 0, script.errors()
        assert script.errors() == ""
        assert path.read_text() == "last\n"
        assert script.processes() == []


def test_calls_that_were_submitted_end_also_after_an_exception(tmp_path: Any) -> None:
    path = tmp_path / "noted"
    code = SCRIPT.format(made="ProcessPoolExecutor(2)", path=str(path), end="1 // 0")
    with running(code, STRICT) as script:
        assert script.wait() == 1
        assert script.errors().count("Traceback") == 1
        assert path.read_text() == "last\n"


def test_calls_on_a_dispatchers_pool_end_before_the_interpreter_does(tmp_path: Any) -> None:
    path = tmp_path / "noted"
    code = SCRIPT.format(made="Dispatcher([(0, 2)]).executor()", path=str(path), end="pass")
    with running(code, STRICT) as script:
        assert script.wait() == 0, script.errors()
        assert script.errors() == ""
        assert path.read_text() == "last\n"


AT_EXIT = """
import atexit

@atexit.register
def run_last():
    try:
        executor.submit(int)
    except RuntimeError as error:
        print(error, flush=True)

from bulkhead import Dispatcher, ProcessPoolExecutor

if __name__ == "__main__":
    executor = {made}
    executor.submit(int).result()
"""


@pytest.mark.parametrize("made", ["ProcessPoolExecutor(1)", "Dispatcher([(0, 1)]).executor()"])
def test_at_exit_nothing_can_be_submitted(made: str) -> None:
    with running(AT_EXIT.format(made=made), STRICT) as script:
        assert script.wait() == 0, script.errors()
        assert "cannot schedule new futures after" in script.output()
