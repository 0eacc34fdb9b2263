"""A dispatcher used inside a job, or in a copy of its process, is an error that says so, never a deadlock (C9)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import faulty_jobs
import pytest
from watching import PATIENCE, assert_whole

from bulkhead import BulkheadError, Dispatcher, Job, NestedDispatch, Pool, Tracker

# What a forked worker inherits. Owner: the caller, before the fork.
inherited: dict[str, Any] = {}


class Remembered(Dispatcher):
    """A dispatcher that a global knows before its workers are forked."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        inherited["dispatcher"] = self
        super().__init__(*args, **kwargs)


USES: dict[str, Callable[[Dispatcher], object]] = {
    "dispatch": lambda disp: disp.dispatch(Job(faulty_jobs.double, 4)),
    "dispatch with timeout": lambda disp: disp.dispatch(Job(faulty_jobs.double, 4), timeout=1),
    "try_dispatch": lambda disp: disp.try_dispatch(Job(faulty_jobs.double, 4)),
    "dispatch_all": lambda disp: list(disp.dispatch_all([Job(faulty_jobs.double, 4)])),
    "barrier": lambda disp: disp.barrier(),
    "finalize": lambda disp: disp.finalize(),
    "with": lambda disp: disp.__enter__(),
    "stats": lambda disp: disp.stats(),
}


def use_inherited(name: str) -> str:
    """Use the inherited dispatcher; return the error's type and text."""
    try:
        USES[name](inherited["dispatcher"])
    except BulkheadError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def use_inherited_tracker(name: str) -> str:
    """Use the inherited tracker of a job that never ends; return the error's type and text."""
    tracker: Tracker = inherited["tracker"]
    calls = {
        "result": tracker.result,
        "exception": tracker.exception,
        "wait": tracker.wait,
        "cancel": tracker.cancel,
        "add_done_callback": lambda: tracker.add_done_callback(print),
    }
    try:
        calls[name]()
    except BulkheadError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.fixture(scope="module")
def same() -> Iterator[Dispatcher]:
    disp = Remembered([Pool(0, 1, timeout=PATIENCE, start_method="fork")])
    assert_whole(disp)
    yield disp
    disp.finalize(cancel=True)
    inherited.clear()


@pytest.mark.parametrize("name", list(USES))
def test_a_job_that_inherits_its_dispatcher_by_fork_gets_an_error_for_each_use(
    same: Dispatcher, name: str
) -> None:
    text = same.dispatch(Job(use_inherited, name)).result(PATIENCE)
    assert text.startswith("NestedDispatch: ")
    assert "job" in text
    assert_whole(same)


@pytest.mark.parametrize("name", ["result", "exception", "wait", "cancel", "add_done_callback"])
def test_a_job_that_inherits_a_tracker_by_fork_gets_an_error_and_never_waits(name: str) -> None:
    with Dispatcher([(0, 1)]) as outer:
        unsettled = outer.dispatch(Job(faulty_jobs.sleep_in_c))
        inherited["tracker"] = unsettled
        with Dispatcher([Pool(0, 1, timeout=3.0, start_method="fork")]) as disp:
            text = disp.dispatch(Job(use_inherited_tracker, name)).result(PATIENCE)
        assert text.startswith("NestedDispatch: "), text
        assert not unsettled.done()
        outer.finalize(cancel=True)


def test_a_dispatcher_cannot_be_an_argument_of_its_own_job(usual_start_method: str) -> None:
    with Dispatcher([Pool(0, 1, start_method=usual_start_method)]) as disp:
        with pytest.raises(BulkheadError, match="a Dispatcher cannot be sent to a job"):
            disp.dispatch(Job(faulty_jobs.take, disp))
        with pytest.raises(BulkheadError, match="a Dispatcher cannot be sent to a job"):
            disp.dispatch(Job(disp.barrier))
        assert disp.stats()[0].waiting == disp.stats()[0].running == 0
        assert disp.jobs() == []
        assert_whole(disp)


def test_a_tracker_cannot_be_an_argument_of_a_job() -> None:
    with Dispatcher([(0, 1)]) as disp:
        tracker = disp.dispatch(Job(faulty_jobs.double, 4))
        with pytest.raises(BulkheadError, match="a Tracker cannot be sent to another process"):
            disp.dispatch(Job(faulty_jobs.take, tracker))
        assert tracker.result(PATIENCE) == 8


@pytest.mark.parametrize("name", list(USES))
def test_a_forked_copy_of_the_caller_gets_an_error_for_each_use(same: Dispatcher, name: str) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, use_inherited(name).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    text = os.read(reader, 10_000).decode()
    os.close(reader)
    assert text.startswith("NestedDispatch: ")
    assert_whole(same)


def run_inner(start_method: str) -> list[int]:
    with Dispatcher([Pool(0, 2, start_method=start_method)]) as inner:
        return [inner.dispatch(Job(faulty_jobs.double, number)).result(PATIENCE) for number in range(4)]


def test_a_job_may_have_a_dispatcher_of_its_own(start_method: str) -> None:
    with Dispatcher([Pool(0, 1, start_method=start_method)]) as disp:
        assert disp.dispatch(Job(run_inner, start_method)).result(PATIENCE) == [0, 2, 4, 6]
        assert_whole(disp)


def test_nested_dispatch_is_a_bulkhead_error_that_says_what_to_do_instead() -> None:
    with Dispatcher([(0, 1)]) as disp, pytest.raises(NestedDispatch, match="let the caller dispatch it"):
        disp.__reduce__()
