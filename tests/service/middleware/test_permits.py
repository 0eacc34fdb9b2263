"""The decisions of the distributed limit, without a registry."""

import random

import pytest

from bulkhead.service.middleware.permits import (
    FORGOTTEN,
    PATIENCE,
    Permits,
    admitted,
    released,
    reserved,
    without,
)


def test_no_more_are_granted_than_there_are_over_all_consumers() -> None:
    permits, first = reserved(Permits(), 5, "a", 0, 4)
    permits, second = reserved(permits, 5, "b", 0, 4)
    permits, third = reserved(permits, 5, "c", 0, 4)

    assert (first, second, third) == (4, 1, 0)
    assert permits.n_used == 5


def test_what_a_consumer_says_of_itself_replaces_what_was_written() -> None:
    permits, _ = reserved(Permits(), 5, "a", 0, 4)

    # The first change was carried out, but its answer was lost: "a" knows of none.
    permits, granted = reserved(permits, 5, "a", 0, 5)

    assert granted == 5
    assert permits.n_used == 5


def test_a_consumer_without_permits_leaves_nothing_behind() -> None:
    permits, _ = reserved(Permits(), 5, "a", 0, 4)

    assert released(permits, "a", 0) == Permits()


def test_what_consumers_had_that_are_gone_is_free() -> None:
    permits, _ = reserved(Permits(), 5, "a", 0, 5)

    _, granted = reserved(without(permits, {"a"}), 5, "b", 0, 3)

    assert granted == 3


def test_a_smaller_limit_takes_nothing_away_and_gives_nothing_out() -> None:
    permits, _ = reserved(Permits(), 5, "a", 0, 5)

    assert reserved(permits, 2, "b", 0, 1)[1] == 0
    assert permits.n_used == 5


def test_of_refused_jobs_the_oldest_are_written_down_and_no_more_than_there_are_permits() -> None:
    permits, _ = reserved(Permits(), 2, "a", 0, 2)

    for number in (5, 3, 9, 1, 7):
        permits, answers = admitted(permits, 2, "b", 0, [(f"job-{number}", float(number))], now=100.0)
        assert answers == [False]

    assert set(permits.waiting) == {"job-1", "job-3"}


def test_a_job_that_has_waited_long_comes_before_younger_ones() -> None:
    permits, _ = reserved(Permits(), 1, "a", 0, 1)
    permits, _ = admitted(permits, 1, "b", 0, [("old", 1.0)], now=100.0)
    free = released(permits, "a", 0)

    # At first who is faster has it; later it waits for the old one.
    assert admitted(free, 1, "b", 0, [("young", 50.0)], now=101.0)[1] == [True]
    assert admitted(free, 1, "b", 0, [("young", 50.0)], now=100.0 + PATIENCE)[1] == [False]
    assert admitted(free, 1, "b", 0, [("older", 0.5)], now=100.0 + PATIENCE)[1] == [True]
    assert admitted(free, 1, "b", 0, [("old", 1.0)], now=100.0 + PATIENCE)[1] == [True]


def test_a_waiting_job_that_does_not_ask_any_more_is_forgotten() -> None:
    permits, _ = reserved(Permits(), 1, "a", 0, 1)
    permits, _ = admitted(permits, 1, "b", 0, [("cancelled", 1.0)], now=100.0)

    free = released(permits, "a", 0)

    assert admitted(free, 1, "b", 0, [("young", 50.0)], now=100.0 + FORGOTTEN)[1] == [True]


@pytest.mark.parametrize("seed", range(5))
def test_no_job_waits_for_ever_however_many_younger_ones_come(seed: int) -> None:
    """Each young job asks at once when a permit is free; the old one, as refused jobs do, only now and then."""
    random.seed(seed)
    n, now, permits, running = 3, 0.0, Permits(), {}
    next_ask, old_began = random.uniform(0.1, 0.8), None
    for number in range(10_000):
        now += 0.01
        for job in [job for job, end in running.items() if end <= now]:
            del running[job]
        asking = [(f"young-{number}", now)]
        if old_began is None and now >= next_ask:
            asking.append(("old", 0.0))
            next_ask = now + random.uniform(0.1, 0.8)
        permits, answers = admitted(permits, n, "me", len(running), asking, now)
        for (job, _), is_granted in zip(asking, answers, strict=True):
            if is_granted:
                running[job] = now + random.uniform(0.02, 0.5)
                old_began = now if job == "old" else old_began
        assert len(running) <= n
        if old_began is not None:
            break

    assert old_began is not None
    assert old_began < PATIENCE + 3.0
