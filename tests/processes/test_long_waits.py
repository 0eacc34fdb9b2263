"""Instants that are weeks away, and callers that are busy while something becomes due."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from calling import Call
from gates import Gate
from watching import PATIENCE, wait_until_whole

from bulkhead import Dispatcher, Job, Pool

MONTHS = 200 * 86_400.0


class SlowToRebuild:
    """Takes its time when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[float]]:
        return time.sleep, (3.0,)


def make_slow() -> SlowToRebuild:
    return SlowToRebuild()


def nap(seconds: float) -> str:
    time.sleep(seconds)
    return "done"


def test_instants_that_are_months_away_hold_nothing_up() -> None:
    with Dispatcher([Pool(0, 1, timeout=MONTHS)], job_expiry=MONTHS) as disp:
        delayed = disp.dispatch(Job(nap, 0).options(delay=MONTHS, start_deadline=2 * MONTHS))
        tracker = disp.dispatch(Job(nap, 0.05), timeout=MONTHS)
        called: list[object] = []
        tracker.add_done_callback(called.append)
        # Nobody waits here: the background thread has to see to it.
        end = time.monotonic() + PATIENCE
        while not called and time.monotonic() < end:
            time.sleep(0.001)
        assert called == [tracker]
        assert tracker.result(MONTHS) == "done"
        assert delayed.cancel()


def test_a_job_that_answered_in_time_has_not_timed_out_because_the_caller_was_busy() -> None:
    with Dispatcher([(0, 2)]) as disp:
        wait_until_whole(disp)
        # Both have imported this module then.
        for tracker in [disp.dispatch(Job(nap, 0.1)) for _ in range(2)]:
            tracker.result(PATIENCE)
        disp.dispatch(Job(make_slow))
        in_time = disp.dispatch(Job(nap, 0.3).options(timeout=2.5))
        assert in_time.result(PATIENCE) == "done"
        assert disp.stats()[0].restarts == 0


@pytest.mark.alone
def test_who_has_waited_in_vain_is_not_the_one_who_is_told_to_go_on(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with Dispatcher([(0, 2)]) as disp:
        first, second = disp.dispatch(gate.job("first")), disp.dispatch(gate.job("second"))
        gate.wait_begun(2)
        driver = Call(first.result).until_waiting()
        time.sleep(0.1)  # so that it drives by now
        for _ in range(3):
            assert not second.wait(0.02)
        sleeper = Call(second.result).until_waiting()
        time.sleep(0.1)  # so that it sleeps by now, and the background thread does without a limit

        gate.open("first")
        assert driver.value() == "first"
        gate.open("second")
        assert sleeper.value(5) == "second"
