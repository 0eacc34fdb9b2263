"""The backlog of a pool (A5) and the order in which jobs start (A8)."""

import time
from pathlib import Path

import pytest
from calling import Call
from gates import Gate
from jobs import echo, instant, lines, note, nothing
from watching import wait_until

from bulkhead import Dispatcher, Job, Pool, PoolFull


def test_k_jobs_may_wait_beyond_the_workers_and_one_more_blocks(gate: Gate) -> None:
    with Dispatcher([Pool(0, 2, backlog=3)]) as disp:
        accepted = [disp.dispatch(gate.job(), timeout=5) for _ in range(5)]
        gate.wait_begun(2)
        assert (disp.stats()[0].running, disp.stats()[0].waiting) == (2, 3)

        assert disp.try_dispatch(gate.job()) is None
        with pytest.raises(PoolFull):
            disp.dispatch(gate.job(), timeout=0.1)
        assert disp.stats()[0].waiting == 3
        assert not any(tracker.done() for tracker in accepted)

        gate.open(gate.begun[0])
        sixth = disp.dispatch(gate.job(), timeout=5)
        assert sum(tracker.done() for tracker in accepted) == 1
        assert (disp.stats()[0].running, disp.stats()[0].waiting) == (2, 3)
        gate.open()
        assert sixth.wait(5)


def test_a_pool_has_no_backlog_unless_it_asks_for_one(gate: Gate) -> None:
    assert Pool(0, 1).backlog == 0
    with Dispatcher([(0, 2)]) as disp:
        for _ in range(2):
            disp.dispatch(gate.job())
        assert disp.try_dispatch(gate.job()) is None
        gate.open()


def test_jobs_may_wait_for_workers_that_are_not_up_yet() -> None:
    with Dispatcher([Pool(0, 1, backlog=4)]) as disp:
        trackers = [disp.dispatch(Job(echo, number), timeout=0) for number in range(5)]
        assert [tracker.result(10) for tracker in trackers] == list(range(5))


def test_a_backlog_of_none_is_unbounded_and_says_so(gate: Gate) -> None:
    assert "None is unbounded" in str(Pool.__doc__)
    with Dispatcher([Pool(0, 1, backlog=None)]) as disp:
        disp.dispatch(gate.job())
        gate.wait_begun(1)
        trackers = [disp.dispatch(Job(nothing), timeout=0) for _ in range(20_000)]
        assert disp.stats()[0].waiting == 20_000
        gate.open()
        disp.barrier()
        assert all(tracker.done() for tracker in trackers)


def test_a_backlog_may_be_any_number() -> None:
    with Dispatcher([Pool(0, 1, backlog=10**5000)]) as disp:
        assert [one.result() for one in disp.dispatch_all(Job(abs, -number) for number in range(4))] == [
            0,
            1,
            2,
            3,
        ]


@pytest.mark.parametrize("backlog", [0, 7, None])
def test_jobs_of_a_pool_start_in_the_order_of_their_dispatch(backlog: int | None, tmp_path: Path) -> None:
    with Dispatcher([Pool(0, 1, backlog=backlog)]) as disp:
        trackers = [disp.dispatch(Job(note, tmp_path / "order", number)) for number in range(100)]
        disp.barrier()
    assert lines(tmp_path / "order") == [str(number) for number in range(100)]
    starts = [tracker.status().started_at for tracker in trackers]
    assert starts == sorted(starts)


def test_several_workers_take_jobs_in_the_order_of_their_dispatch() -> None:
    with Dispatcher([Pool(0, 3, backlog=None)]) as disp:
        trackers = [disp.dispatch(Job(nothing)) for _ in range(200)]
        disp.barrier()
    starts = [tracker.status().started_at for tracker in trackers]
    assert starts == sorted(starts)


def test_callers_that_wait_for_room_are_let_in_in_the_order_they_came(gate: Gate) -> None:
    with Dispatcher([(0, 1)]) as disp:
        disp.dispatch(gate.job("first"))
        gate.wait_begun(1)
        callers = []
        for number in range(6):
            callers.append(Call(disp.dispatch, gate.job(f"caller-{number}")).until_waiting())
        gate.open()
        for caller in callers:
            caller.value()
        disp.barrier()
    assert gate.begun == ["first", *(f"caller-{number}" for number in range(6))]


def test_a_job_in_the_backlog_starts_when_nobody_waits_for_anything(gate: Gate) -> None:
    with Dispatcher([Pool(0, 1, backlog=2)]) as disp:
        disp.dispatch(gate.job("held"))
        gate.wait_begun(1)
        later = disp.dispatch(Job(instant))
        gate.open()
        opened = time.monotonic()
        wait_until(later.done)
        assert later.result() - opened < 1.0
