"""Jobs start when they are due, on each backend. With the machine for itself: see `ALONE` in conftest.py."""

from __future__ import annotations

import os
import time

import pytest
from jobs import lines
from watching import wait_until

# It takes two seconds to come up: the tests on the other backends need not wait for it.
pytestmark = pytest.mark.usefixtures("starting_cluster")


@pytest.fixture
def _nothing_is_left_behind() -> None:
    """Connections are made as they are needed. `served_anywhere` looks at the end."""


def test_a_hundred_jobs_that_are_due_at_once_start_within_a_tenth_of_a_second(served_anywhere, tmp_path):
    app, instant, best = served_anywhere.app, served_anywhere.instant, 10.0
    for id in app.enqueue_many([instant.call(os.devnull) for _ in range(50)]):
        served_anywhere.settled(id)
    for number in range(6):  # the machine may be busy
        due = time.time() + 0.3
        path = str(tmp_path / str(number))
        app.enqueue_many([instant.call(path).options(eta=due) for _ in range(100)])
        wait_until(lambda: len(lines(path)) == 100)  # noqa: B023
        began = [float(line) for line in lines(path)]
        assert min(began) >= due - 0.002
        best = min(best, max(began) - due)
        if best < 0.1:
            break
    assert best < 0.1
