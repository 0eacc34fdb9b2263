"""Dispatching from many threads (A9)."""

from pathlib import Path

import pytest
from calling import at_once
from jobs import echo, lines, note

from bulkhead import Dispatcher, Job, Pool

N_THREADS = 8
N_JOBS = 1000


@pytest.mark.parametrize("backlog", [0, None])
def test_eight_threads_dispatch_a_thousand_jobs_each_and_none_is_lost_or_doubled(
    backlog: int | None, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    with Dispatcher([Pool(0, 2, backlog=backlog), Pool(1, 1, backlog=backlog)]) as disp:

        def feed(thread: int) -> list[tuple[object, object]]:
            jobs = [
                Job(note, ran, f"{thread}/{n}").options(priority=n % 2, id=f"{thread}/{n}" if n % 3 else None)
                for n in range(N_JOBS)
            ]
            return [disp.dispatch(job) for job in jobs]

        trackers = [tracker for call in at_once(N_THREADS, feed) for tracker in call.value(60)]
        report = disp.barrier()
        stats = disp.stats()

    wanted = sorted(f"{thread}/{n}" for thread in range(N_THREADS) for n in range(N_JOBS))
    assert sorted(lines(ran)) == wanted
    assert (report.succeeded, report.failed_count, report.cancelled) == (8000, 0, 0)
    assert sum(pool.succeeded for pool in stats.pools.values()) == 8000
    assert len({tracker.id for tracker in trackers}) == 8000
    numbers = sorted(tracker.id for tracker in trackers if isinstance(tracker.id, int))
    assert numbers == list(range(len(numbers)))


def test_each_thread_gets_its_own_results() -> None:
    with Dispatcher([(0, 2)]) as disp:

        def ask(thread: int) -> bool:
            return all(disp.dispatch(Job(echo, (thread, n))).result(30) == (thread, n) for n in range(150))

        assert all(call.value(60) for call in at_once(N_THREADS, ask))


def test_of_threads_that_race_for_the_last_worker_only_as_many_win_as_there_are(tmp_path: Path) -> None:
    with Dispatcher([Pool(0, 1, backlog=2)]) as disp:
        for number in range(50):
            ran = tmp_path / str(number)
            won = [
                call.value()
                for call in at_once(4, lambda thread, ran=ran: disp.try_dispatch(Job(note, ran, thread)))
            ]
            disp.barrier()
            assert len(lines(ran)) == sum(tracker is not None for tracker in won) >= 3
