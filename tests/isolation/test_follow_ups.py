"""A pool whose jobs are followed by another's is not held up by it, whatever state that is in (A2 for A19 and A20)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import faulty_jobs
import pytest
from calling import Call
from gates import Gate
from jobs import echo, fail, nothing
from linked_jobs import add, describe
from watching import PATIENCE, assert_whole, wait_until, wait_until_whole

from bulkhead import ChainTracker, Dispatcher, Job, JobTimeout, PoolBroken, chain, group

FROM, TO = 1, 0

# Set in the caller alone: pickling a `Hesitant` waits for it there.
_may_go_on: threading.Event | None = None


class Hesitant:
    """Comes out of a job, and takes its time to go into the next one."""

    def __reduce__(self) -> Any:
        if _may_go_on is not None:
            _may_go_on.wait(PATIENCE)
        return Hesitant, ()


def hesitant() -> Hesitant:
    return Hesitant()


@pytest.fixture
def disp() -> Iterator[Dispatcher]:
    disp = Dispatcher([(FROM, 2), (TO, 1)])
    wait_until_whole(disp, FROM)
    wait_until_whole(disp, TO)
    yield disp
    disp.finalize(cancel=True)


def source(job: Job) -> Job:
    return job.options(priority=FROM)


def assert_goes_on(disp: Dispatcher) -> None:
    """Prove that jobs of the source pool start, fail, time out and are followed by jobs of the same pool."""
    crash = disp.dispatch(source(Job(faulty_jobs.kill_self)))
    assert crash.exception(PATIENCE) is not None
    late = disp.dispatch(source(Job(faulty_jobs.loop)).options(timeout=0.1))
    assert isinstance(late.exception(PATIENCE), JobTimeout)
    own = disp.dispatch(chain([source(Job(echo, 1)), source(Job(add, 1)), group([source(Job(add, 1))])]))
    assert own.result(PATIENCE) == [3]
    followed = disp.dispatch(source(Job(fail, "oh")).options(on_failure=source(Job(describe))))
    followed.wait(PATIENCE)
    assert followed.follow_up.result(PATIENCE) == ("ValueError", "oh")


def chains(disp: Dispatcher, number: int) -> list[ChainTracker]:
    return [disp.dispatch(chain([source(Job(echo, one)), Job(add, 1)])) for one in range(number)]


def test_a_full_pool_holds_up_none_that_it_is_to_follow(disp: Dispatcher, gate: Gate) -> None:
    held = disp.dispatch(gate.job("held"))
    gate.wait_begun(1)
    handles = chains(disp, 50)
    assert [handle.trackers[0].result(PATIENCE) for handle in handles] == list(range(50))
    assert_whole(disp, FROM)
    assert_goes_on(disp)
    wait_until(lambda: disp.stats()[TO].waiting == 50, "all are fed")
    gate.open()
    assert [handle.result(PATIENCE) for handle in handles] == list(range(1, 51))
    assert held.done()


def test_a_pool_whose_lock_is_held_for_ever_holds_up_none_that_it_is_to_follow(
    disp: Dispatcher, gate: Gate
) -> None:
    both = group([source(Job(add, 2)), Job(add, 1)])
    held = [source(gate.job(f"held-{number}", on_success=Job(echo))) for number in range(2)]
    handles = [disp.dispatch(chain([one, source(Job(len)), both])) for one in held]
    gate.wait_begun(2)
    # These wait for room, and are accepted, begun and refused by no thread of the caller's.
    waiting = Call(
        disp.dispatch, group([source(Job(echo, 1)), source(Job(echo, 2)), Job(echo, 3)])
    ).until_waiting()
    with disp._pools[TO].lock:
        gate.open()
        assert [handle.trackers[1].result(PATIENCE) for handle in handles] == [6, 6]
        assert [handle.leaves[2].result(PATIENCE) for handle in handles] == [8, 8]
        assert_goes_on(disp)
        assert not any(handle.done() for handle in handles)
    assert [handle.result(PATIENCE) for handle in handles] == [[8, 7], [8, 7]]
    assert waiting.value().result(PATIENCE) == [1, 2, 3]


def test_what_takes_long_to_pickle_holds_up_only_what_follows_in_the_same_pool(
    disp: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setitem(globals(), "_may_go_on", go_on)
    slow = disp.dispatch(chain([source(Job(hesitant)), Job(nothing_but)]))
    slow.trackers[0].result(PATIENCE)
    late = disp.dispatch(chain([source(Job(echo, 1)), Job(add, 1)]))
    assert_goes_on(disp)
    assert disp.dispatch(Job(echo, 5)).result(PATIENCE) == 5, "the pool itself goes on, too"
    assert not slow.done()
    assert not late.done()
    go_on.set()
    assert slow.result(PATIENCE) is None
    assert late.result(PATIENCE) == 2


def nothing_but(previous: object) -> None:
    nothing()


def test_a_broken_pool_holds_up_none_that_it_is_to_follow(disp: Dispatcher, gate: Gate) -> None:
    handle = disp.dispatch(chain([source(gate.job("held")), Job(echo)]))
    gate.wait_begun(1)
    pool = disp._pools[TO]
    with pool.lock:
        pool._acting.ruin(ZeroDivisionError("a bug"))
    assert_goes_on(disp)
    gate.open()
    assert isinstance(handle.exception(PATIENCE), PoolBroken)
    assert handle.trackers[0].result() == "held"
