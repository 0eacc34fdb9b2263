"""What a job may be (A14): a function with its arguments, or any picklable object with run() and priority."""

import functools
import operator
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gates import Gate
from jobs import Greeting, echo, fail_at_first, lines, nap, nothing, pid
from staffing import staffed

import bulkhead
from bulkhead import Dispatcher, Job, JobNotPicklable, JobTimeout, Pool, RetryPolicy

RUN_A_LAMBDA = textwrap.dedent("""
    import sys

    if sys.argv[1] == "without":
        sys.modules["cloudpickle"] = None  # importing it raises ImportError

    from bulkhead import Dispatcher, Job, JobNotPicklable

    def in_main(x):
        return x + 1

    if __name__ == "__main__":
        with Dispatcher([(0, 1)]) as disp:
            print(disp.dispatch(Job(in_main, 1)).result())
            worker = disp.stats()[0].processes[0].pid
            try:
                print(disp.dispatch(Job(lambda: 42)).result())
            except JobNotPicklable as error:
                print(error)
                print(disp.stats()[0].running, disp.stats()[0].processes[0].pid == worker)
""")


@pytest.fixture(scope="module")
def disp(start_method: str) -> Iterator[Dispatcher]:
    with Dispatcher([Pool(0, 1, start_method=start_method), Pool(1, 1, start_method=start_method)]) as disp:
        yield staffed(disp)


def test_a_function_gets_its_arguments(disp: Dispatcher) -> None:
    assert disp.dispatch(Job(echo, 1, "two", three=3)).result() == ((1, "two"), {"three": 3})
    assert disp.dispatch(Job(echo, fn=1, priority=2, id=3)).result() == (
        (),
        {"fn": 1, "priority": 2, "id": 3},
    )
    assert disp.dispatch(Job(pow, 2, 10)).result() == 1024


@pytest.mark.parametrize(
    ("fn", "args", "result"),
    [
        (functools.partial(pow, 2), (5,), 32),
        ("text".upper, (), "TEXT"),
        (operator.itemgetter(1), ("abc",), "b"),
        (dict, ([(1, 2)],), {1: 2}),
        (os.path.basename, ("a/b",), "b"),
    ],
    ids=["partial", "bound method", "callable object", "class", "stdlib"],
)
def test_everything_that_can_be_called_and_pickled_is_a_job(
    disp: Dispatcher, fn: Callable[..., Any], args: tuple[Any, ...], result: object
) -> None:
    assert disp.dispatch(Job(fn, *args)).result() == result


def test_an_object_with_run_and_priority_is_a_job(disp: Dispatcher) -> None:
    for priority in (0, 1):
        tracker = disp.dispatch(Greeting("you", priority))
        assert tracker.result() == f"hello you from {tracker.status().pid}"
        assert tracker.priority == priority
        assert tracker.status().pid == disp.stats()[priority].processes[0].pid


def test_a_closure_runs_where_cloudpickle_is_installed(disp: Dispatcher) -> None:
    pytest.importorskip("cloudpickle")
    base = 40

    def add(number: int) -> int:
        return base + number

    assert disp.dispatch(Job(add, 2)).result() == 42
    assert disp.dispatch(Job(lambda: base)).result() == 40
    assert disp.dispatch(Job(map, lambda x: x * base, [1, 2])).exception() is None


@pytest.mark.parametrize("cloudpickle", ["with", "without"])
def test_a_lambda_without_cloudpickle_is_refused_with_what_to_install(
    cloudpickle: str, tmp_path: Path
) -> None:
    if cloudpickle == "with":
        pytest.importorskip("cloudpickle")
    done = _run_script(RUN_A_LAMBDA, tmp_path, cloudpickle)
    printed = done.stdout.splitlines()
    assert printed[0] == "2"
    if cloudpickle == "with":
        assert printed[1:] == ["42"]
    else:
        assert "pip install 'bulkhead-pool[closures]'" in printed[1]
        assert "lambda" in printed[1]
        assert printed[2:] == ["0 True"]


def test_what_not_even_cloudpickle_can_send_is_refused(disp: Dispatcher) -> None:
    pytest.importorskip("cloudpickle")
    with pytest.raises(JobNotPicklable, match="job cannot be pickled, not even by cloudpickle"):
        disp.dispatch(Job(echo, threading.Lock()))
    assert disp.dispatch(Job(echo, 1)).result() == 1


def test_a_job_can_be_dispatched_many_times(disp: Dispatcher) -> None:
    job = Job(echo, 5)
    trackers = [disp.dispatch(job) for _ in range(5)]
    assert [tracker.result() for tracker in trackers] == [5] * 5
    assert len({tracker.id for tracker in trackers}) == 5


def test_arguments_are_taken_as_they_are_at_dispatch(gate: Gate) -> None:
    with Dispatcher([Pool(0, 1, backlog=1)]) as own:
        own.dispatch(gate.job())
        argument = [1]
        tracker = own.dispatch(Job(echo, argument))
        argument.append(2)
        gate.open()
        assert tracker.result() == [1]
        assert tracker.result() is not argument


def test_options_return_a_new_job_and_leave_the_old_alone() -> None:
    plain = Job(echo, 1)
    first = plain.options(priority=1, timeout=5)
    second = first.options(timeout=7)
    assert repr(plain) == "Job(echo, 1)"
    assert repr(first) == "Job(echo, 1).options(priority=1, timeout=5.0)"
    assert repr(second) == "Job(echo, 1).options(priority=1, timeout=7.0)"


def test_a_jobs_own_timeout_and_policy_beat_its_pools(tmp_path: Path) -> None:
    patient, eager = RetryPolicy(3, initial=0.01), RetryPolicy(1)
    with Dispatcher([Pool(0, 1, timeout=0.2, retry=eager)]) as disp:
        assert disp.dispatch(Job(nap, 0.3).options(timeout=30.0)).exception() is None
        assert isinstance(disp.dispatch(Job(nap, 30.0)).exception(), JobTimeout)
        assert disp.dispatch(Job(fail_at_first, tmp_path / "own", 2).options(retry=patient)).result() == 3
        assert disp.dispatch(Job(fail_at_first, tmp_path / "pool", 2)).exception() is not None
    assert len(lines(tmp_path / "pool")) == 1


def test_a_job_object_brings_its_options_as_attributes(tmp_path: Path) -> None:
    with Dispatcher([(0, 1)]) as disp:
        assert isinstance(disp.dispatch(Napping(30.0, timeout=0.2)).exception(), JobTimeout)
        policy = RetryPolicy(3, initial=0.01)
        tracker = disp.dispatch(FailingAtFirst(tmp_path / "attempts", retry=policy))
        assert (tracker.result(), tracker.status().attempt) == (3, 3)
        # Too many classes have an `id` of another meaning.
        assert disp.dispatch(Greeting("you", id="not-the-jobs")).id == 2


def test_an_attribute_that_is_none_asks_for_nothing() -> None:
    with Dispatcher([Pool(7, 1, timeout=5.0)]) as disp:
        job = Greeting("you", timeout=None, retry=None, delay=None)
        job.priority = None  # type: ignore[assignment]
        assert disp.dispatch(job).result().startswith("hello")


def test_jobs_of_all_shapes_share_one_worker(disp: Dispatcher) -> None:
    worker = disp.dispatch(Job(pid)).result()
    trackers = [disp.dispatch(job) for job in (Job(nothing), Greeting("you"), Job(echo, 1))]
    assert all(tracker.wait(10) for tracker in trackers)
    assert {tracker.status().pid for tracker in trackers} == {worker}


class Napping:
    priority = 0

    def __init__(self, seconds: float, **options: Any) -> None:
        self.seconds = seconds
        self.__dict__.update(options)

    def run(self) -> None:
        time.sleep(self.seconds)


class FailingAtFirst:
    priority = 0

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.__dict__.update(options)

    def run(self) -> int:
        return fail_at_first(str(self.path), 2)


def _run_script(text: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(bulkhead.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done
