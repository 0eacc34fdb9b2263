"""A dispatcher of two pools for each module; nothing may be left of what a test dispatches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from composing import HERE, THERE
from jobs import echo, nothing
from staffing import staffed
from watching import PATIENCE

from bulkhead import (
    Dispatcher,
    Job,
)


@pytest.fixture(scope="module")
def disp() -> Iterator[Dispatcher]:
    with Dispatcher([(HERE, 2), (THERE, 1)]) as disp:
        for priority in (HERE, THERE):
            # Why: threads that are made when they are first needed, and stay until the end.
            ahead = Job(nothing).options(priority=priority, on_success=Job(echo).options(priority=priority))
            disp.dispatch(ahead).add_done_callback(repr)
        disp.barrier()
        yield staffed(disp)


@pytest.fixture
def own() -> Iterator[Dispatcher]:
    """For large data: free memory is kept for the next jobs until the end, and results as long as they are known."""
    with Dispatcher([(HERE, 2), (THERE, 1)], max_history=0) as disp:
        yield disp


@pytest.fixture(autouse=True)
def _everything_has_settled(request: pytest.FixtureRequest) -> Iterator[None]:
    """When a test is over, the module's dispatcher has nothing left and nobody's promise."""
    yield
    if "disp" in request.fixturenames:
        disp = request.getfixturevalue("disp")
        disp.barrier(timeout=PATIENCE, check=False)
        for pool in disp._pools.values():
            assert pool._scheduler.unsettled == 0
            assert pool._scheduler.promised_jobs() == []
        assert disp._history._reserved == {}
