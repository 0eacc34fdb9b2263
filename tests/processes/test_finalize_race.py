"""Calls that race finalize() (A18): each dispatch is either accepted and waited for, or refused."""

import threading
from pathlib import Path

import pytest
from calling import at_once
from gates import Gate
from jobs import lines, nap, note

from bulkhead import Dispatcher, DispatcherFinalized, Job, JobState, Pool, Tracker

N_THREADS = 8


@pytest.mark.parametrize("backlog", [0, None])
@pytest.mark.parametrize("round_", range(5))
def test_a_dispatch_that_races_finalize_is_accepted_and_waited_for_or_refused(
    round_: int, backlog: int | None, tmp_path: Path
) -> None:
    disp = Dispatcher([Pool(0, 1, backlog=backlog), Pool(1, 1, backlog=backlog)])
    accepted: list[Tracker] = []
    is_enough = threading.Event()

    def feed(thread: int) -> int:
        number = 0
        while True:
            job = Job(note, tmp_path / "ran", f"{thread}/{number}").options(priority=thread % 2)
            try:
                accepted.append(disp.dispatch(job))
            except DispatcherFinalized:
                return number
            number += 1
            if len(accepted) > 20 * round_:
                is_enough.set()

    threads = at_once(N_THREADS, feed)
    is_enough.wait(20)
    disp.finalize()
    unsettled = [tracker for tracker in accepted if not tracker.done()]
    counts = [thread.value() for thread in threads]

    assert unsettled == []
    assert {tracker.status().state for tracker in accepted} == {JobState.SUCCEEDED}
    assert sorted(lines(tmp_path / "ran")) == sorted(
        f"{t}/{n}" for t in range(N_THREADS) for n in range(counts[t])
    )
    assert sum(pool.succeeded for pool in disp.stats().pools.values()) == len(accepted) == sum(counts)


@pytest.mark.parametrize("cancel", [False, True])
def test_of_eight_threads_that_finalize_at_once_all_return_when_all_is_ended(cancel: bool) -> None:
    for _ in range(5):
        disp = Dispatcher([Pool(0, 2, backlog=None), (1, 1)])
        trackers = [disp.dispatch(Job(nap, 0.01)) for _ in range(10)]
        trackers[0].add_done_callback(repr)

        def close(_: int, disp: Dispatcher = disp, trackers: list[Tracker] = trackers) -> bool:
            disp.finalize(cancel=cancel)
            return all(tracker.done() for tracker in trackers)

        assert all(call.value() for call in at_once(N_THREADS, close))
        wanted = {JobState.SUCCEEDED, JobState.CANCELLED} if cancel else {JobState.SUCCEEDED}
        assert {tracker.status().state for tracker in trackers} <= wanted


def test_a_cancelling_finalize_beside_one_that_waits_ends_both(gate: Gate) -> None:
    disp = Dispatcher([Pool(0, 1, backlog=None)])
    trackers = [disp.dispatch(gate.job()) for _ in range(3)]
    gate.wait_begun(1)
    waiting, cancelling = at_once(2, lambda index: disp.finalize(cancel=index == 1))
    waiting.value()
    cancelling.value()
    assert {tracker.status().state for tracker in trackers} == {JobState.CANCELLED}


def test_everything_a_thread_may_call_survives_a_finalize_beside_it() -> None:
    for _ in range(5):
        disp = Dispatcher([Pool(0, 2, backlog=5)])

        def use(index: int, disp: Dispatcher = disp) -> None:
            try:
                while True:
                    tracker = disp.dispatch(Job(nap, 0.001))
                    (tracker.wait, tracker.cancel, tracker.status, disp.stats, disp.jobs)[index]()
                    tracker.add_done_callback(repr)
                    disp.barrier(check=False)
            except DispatcherFinalized:
                return

        users = at_once(5, use)
        while disp.stats()[0].succeeded < 20:
            disp.barrier(check=False)
        disp.finalize()
        for user in users:
            user.value()
