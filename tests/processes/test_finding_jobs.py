"""Finding jobs by id (B5), and how long and how many settled ones can be found (B6)."""

import gc
import time
import weakref
from collections.abc import Iterator

import psutil
import pytest
from calling import Call
from gates import Gate
from jobs import echo, fail, nothing
from parameters import named
from staffing import staffed
from watching import wait_until

from bulkhead import Dispatcher, Job, JobNotFound, JobState, Pool, Tracker


@pytest.fixture
def disp() -> Iterator[Dispatcher]:
    with Dispatcher([Pool(0, 1, backlog=None), Pool(1, 1)]) as disp:
        yield disp


def is_known(disp: Dispatcher, job_id: object) -> bool:
    try:
        disp.job(job_id)
    except JobNotFound:
        return False
    return True


def test_a_live_job_and_a_settled_one_are_found_by_their_id(disp: Dispatcher, gate: Gate) -> None:
    live, own = disp.dispatch(gate.job()), disp.dispatch(gate.job(id="own", priority=1))
    assert disp.job(0) is live
    assert disp.job("own") is own
    gate.open()
    disp.barrier()
    assert disp.job(0) is live
    assert disp.job("own") is own


@pytest.mark.parametrize("unknown", [7, -1, "text", None, ("a", 1), [], object()], ids=named)
def test_an_unknown_id_raises_with_the_id(disp: Dispatcher, unknown: object) -> None:
    disp.dispatch(Job(nothing))
    with pytest.raises(JobNotFound) as caught:
        disp.job(unknown)
    assert caught.value.job_id is unknown
    assert repr(unknown) in str(caught.value)
    assert isinstance(caught.value, LookupError)


def test_a_job_whose_caller_still_waits_for_room_is_not_known(gate: Gate) -> None:
    with Dispatcher([(0, 1)]) as disp:
        disp.dispatch(gate.job())
        caller = Call(disp.dispatch, Job(nothing).options(id="offered")).until_waiting()
        assert not is_known(disp, "offered")
        assert [job.id for job in disp.jobs()] == [0]
        gate.open()
        tracker = caller.value()
        assert disp.job("offered") is tracker


def test_jobs_are_listed_in_the_order_of_dispatch_and_by_state(disp: Dispatcher, gate: Gate) -> None:
    assert disp.jobs() == []
    assert [disp.jobs(state) for state in JobState] == [[]] * 7
    done, failed = disp.dispatch(Job(nothing)), disp.dispatch(Job(fail))
    disp.barrier(check=False)
    running, first, second = (disp.dispatch(gate.job()) for _ in range(3))
    urgent = disp.dispatch(gate.job(priority=1))
    gate.wait_begun(2)
    assert disp.jobs() == [done, failed, running, first, second, urgent]
    assert disp.jobs(JobState.RUNNING) == disp.jobs("running") == [running, urgent]
    assert disp.jobs("queued") == [first, second]
    assert (disp.jobs("succeeded"), disp.jobs("failed")) == ([done], [failed])
    assert disp.jobs("cancelled") == []
    gate.open()


def test_a_settled_job_expires_between_1_and_1_2_times_the_expiry() -> None:
    with Dispatcher([(0, 1)], job_expiry=0.5) as disp:
        tracker = disp.dispatch(Job(nothing).options(id="it"))
        settled = _settling(tracker)
        assert disp.jobs() == [tracker]
        looked = 0.0
        while is_known(disp, "it"):
            looked = time.monotonic()
        assert looked - settled[1] < 0.6
        assert time.monotonic() - settled[0] >= 0.5
        assert disp.jobs() == []
        assert tracker.status().state == "succeeded"


def test_an_expired_job_is_let_go_though_nothing_happens() -> None:
    with Dispatcher([(0, 1)], job_expiry=1.5) as disp:
        tracker = disp.dispatch(Job(nothing))
        settled = _settling(tracker)
        gone = weakref.ref(tracker)
        del tracker
        wait_until(lambda: gone() is None)
        took = time.monotonic() - settled[1]
        print(f"a job with an expiry of 1.5 s is let go after {took:.3f} s")
        assert time.monotonic() - settled[0] >= 1.5
        assert took < 1.2 * 1.5


def test_a_live_job_never_expires(gate: Gate) -> None:
    with Dispatcher([Pool(0, 1, backlog=None)], job_expiry=0.05, max_history=0) as disp:
        running, queued = disp.dispatch(gate.job()), disp.dispatch(gate.job())
        scheduled = disp.dispatch(gate.job(delay=60.0))
        gate.wait_begun(1)
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            assert disp.jobs() == [running, queued, scheduled]
            assert all(is_known(disp, number) for number in range(3))
        scheduled.cancel()
        gate.open()
        disp.barrier()
        assert disp.jobs() == []


def test_no_more_than_max_history_settled_jobs_are_known_the_last_ones(gate: Gate) -> None:
    with Dispatcher([Pool(0, 1, backlog=None), Pool(1, 1)], max_history=10) as disp:
        held = disp.dispatch(gate.job(priority=1))
        trackers = [disp.dispatch(Job(echo, number)) for number in range(50)]
        disp.barrier(0)
        assert disp.jobs() == [held, *trackers[-10:]]
        assert not is_known(disp, trackers[-11].id)
        # Who holds a tracker can still ask it.
        assert [tracker.result() for tracker in trackers] == list(range(50))
        assert disp.stats()[0].succeeded == 50
        gate.open()


def test_what_history_drops_can_be_collected() -> None:
    with Dispatcher([Pool(0, 2, timeout=3600.0)], max_history=5) as disp:
        held = [
            weakref.ref(disp.dispatch(Job(echo, number).options(id=f"job-{number}"))) for number in range(400)
        ]
        disp.barrier()
        gc.collect()
        assert sum(ref() is not None for ref in held) <= 5
        assert {job.id for job in disp.jobs()} == {ref().id for ref in held if ref() is not None}


def test_no_history_is_kept_when_max_history_is_0() -> None:
    with Dispatcher([(0, 1)], max_history=0) as disp:
        tracker = disp.dispatch(Job(echo, 5).options(id="it"))
        assert tracker.result() == 5
        assert disp.jobs() == []
        assert not is_known(disp, "it")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_is_flat_over_a_million_jobs() -> None:
    with staffed(Dispatcher([(0, 2)])) as disp:
        workers = [psutil.Process(worker.pid) for worker in disp.stats()[0].processes]

        def measured() -> list[float]:
            gc.collect()
            return [process.memory_info().rss / 1e6 for process in (psutil.Process(), *workers)]

        def run(number: int) -> None:
            job = Job(nothing)
            for _ in range(number):
                disp.dispatch(job)
            disp.barrier()

        began = time.monotonic()
        run(100_000)
        before = measured()
        run(900_000)
        after = measured()
        took = time.monotonic() - began
        grown = [later - earlier for earlier, later in zip(before, after, strict=True)]
        print(f"1,000,000 jobs in {took:.0f} s ({1e6 / took:.0f} a second)")
        for name, early, late in zip(("caller", "worker", "worker"), before, after, strict=True):
            print(f"{name}: {early:.1f} MB after 100,000 jobs, {late:.1f} MB after 1,000,000")
        assert disp.stats()[0].succeeded == 1_000_000
        assert len(disp.jobs()) <= 10_000
        assert all(abs(mb) < 10 for mb in grown)


def _settling(tracker: Tracker) -> tuple[float, float]:
    """Return an instant before the job settles and one after it."""
    before = time.monotonic()
    assert tracker.wait(10)
    return before, time.monotonic()
