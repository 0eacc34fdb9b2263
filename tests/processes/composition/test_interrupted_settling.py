"""A handler of the user's may raise at any step at which a job is settled: still everybody who follows is told."""

from __future__ import annotations

import itertools
import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from composing import HERE, THERE
from gates import Gate
from jobs import echo
from watching import PATIENCE, wait_until

from bulkhead import Dispatcher, Job, JobCancelled, Pool, chain
from bulkhead.engines.processes import settling

# Whose steps a handler can strike at, once a job's end is being told.
TOLD_BY = ("settling.py", "planning.py", "callbacks.py", "driving.py", "executor.py")


class FromHandler(BaseException):
    """As KeyboardInterrupt. Why no Exception: `Future` logs those that strike in its callbacks, and goes on."""


class Struck:
    """Raises in this thread at one of the steps at which it is told of an end."""

    def __init__(self, step: int) -> None:
        self._left = step
        self.has_struck = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._at_line if frame.f_code.co_filename.endswith(TOLD_BY) and is_telling(frame) else None

    def _at_line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and not self.has_struck and not is_with(frame):
            self._left -= 1
            if self._left < 0:
                self.has_struck = True
                sys.settrace(None)
                raise FromHandler
        return self._at_line


def is_telling(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code is not settling.Settling.settle.__code__:
        frame = frame.f_back
    return frame is not None


def is_with(frame: FrameType) -> bool:
    """Tell whether this line begins or ends a `with`. No signal is handled between block and exit."""
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


@contextmanager
def struck_at(step: int) -> Iterator[Struck]:
    before, struck = sys.gettrace(), Struck(step)
    sys.settrace(struck)
    try:
        yield struck
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_whatever_step_it_strikes_the_next_link_and_those_who_wait_are_told(gate: Gate, stride: int) -> None:
    for step in itertools.count(0, stride):
        if not has_struck_and_all_were_told(step, gate):
            break
    assert step > 60


def has_struck_and_all_were_told(step: int, gate: Gate) -> bool:
    pools = [Pool(priority, 1, backlog=None, start_method="fork") for priority in (HERE, THERE)]
    disp = Dispatcher(pools)
    disp.dispatch(gate.job(priority=HERE))
    links = chain([Job(echo, 1).options(priority=HERE), Job(echo).options(priority=THERE)])
    first, second = disp.dispatch(links).trackers
    calls: list[Any] = []
    first.add_done_callback(calls.append)
    first.add_done_callback(calls.append)
    future = disp.executor(HERE).submit(echo, 2)
    future.add_done_callback(calls.append)
    with struck_at(step) as struck:
        try:
            first.cancel()
            future.cancel()
        except FromHandler:
            pass
    assert isinstance(second.exception(PATIENCE), JobCancelled), step
    wait_until(lambda: len(calls) >= 3, f"all callbacks, struck at step {step}")
    disp.finalize(cancel=True)
    assert calls.count(first) == 2
    assert calls.count(future) == 1
    return struck.has_struck
