"""The decisions of the rate limit, without a registry and with a clock of the test's."""

import random

import pytest

from bulkhead.service.middleware import RateLimit
from bulkhead.service.middleware.tokens import Bucket, Rate, reserved, started


def starts(rate: Rate, *, seconds: float, seed: int = 0) -> list[float]:
    """Let three greedy consumers start what they can, through reservations that they keep for a while."""
    random.seed(seed)
    bucket, now, began = Bucket(), 1000.0, []
    holding: dict[str, tuple[int, float]] = {}
    while now < 1000.0 + seconds:
        now += random.uniform(0.0, 0.01)
        me = f"consumer-{random.randrange(3)}"
        if me not in holding:
            after, granted, _ = reserved(bucket, rate, me, 8, now)
            if granted:
                bucket = after or bucket
                holding[me] = granted, now + random.choice([0.0, 0.0, 0.4])
        elif now >= holding[me][1]:
            n = random.randint(0, holding.pop(me)[0])
            bucket, granted, _ = started(bucket, rate, me, n, now)
            # What was reserved is there, whatever others have done meanwhile.
            assert granted == n
            began += [now] * n
    return began


def most_in_a_window(began: list[float], seconds: float) -> int:
    return max(sum(one <= other < one + seconds for other in began) for one in began)


@pytest.mark.parametrize("n", [1, 3, 50, 400])
@pytest.mark.parametrize("seed", range(3))
def test_no_period_wherever_it_begins_sees_more_than_the_rate(n: int, seed: int) -> None:
    rate = RateLimit(n, 1.0).rate

    began = starts(rate, seconds=6.0, seed=seed)

    assert most_in_a_window(began, 1.0) <= n


@pytest.mark.parametrize("late", [0.0, 0.03])
def test_the_rate_is_reached_also_by_who_always_asks_a_little_late(late: float) -> None:
    rate = RateLimit(50, 1.0).rate
    bucket, n_started, now = Bucket(), 0, 1000.0
    while now < 1010.0:
        bucket, granted, wait = started(bucket, rate, None, 5, now)
        n_started += granted
        now += max(wait, 1e-4) + late

    assert 420 <= n_started <= 501


def test_a_burst_may_start_at_once_after_a_pause() -> None:
    rate = RateLimit(10, 1.0, burst=10).rate

    bucket, granted, wait = started(Bucket(), rate, None, 20, 1000.0)

    assert granted == 10
    assert wait == pytest.approx(0.1)
    assert started(bucket, rate, None, 20, 1000.1)[1] == 1
    assert started(bucket, rate, None, 20, 1060.0)[1] == 10


def test_who_finds_no_start_free_is_told_when_to_ask_again() -> None:
    rate = Rate(interval=0.5, burst=1)
    bucket, _, wait = started(Bucket(), rate, None, 1, 1000.0)

    assert wait == pytest.approx(0.5)
    after, granted, wait = reserved(bucket, rate, "me", 1, 1000.2)
    assert (after, granted) == (None, 0)
    assert wait == pytest.approx(0.3)
    assert reserved(bucket, rate, "me", 1, 1000.2 + wait)[1] == 1


def test_what_is_reserved_is_nobody_elses_and_what_is_given_up_costs_nothing() -> None:
    rate = Rate(interval=1.0, burst=2)
    bucket, granted, _ = reserved(Bucket(), rate, "a", 2, 1000.0)
    assert granted == 2
    assert bucket is not None
    assert started(bucket, rate, None, 1, 1000.1)[1] == 0

    bucket, granted, _ = started(bucket, rate, "a", 0, 1000.2)

    assert started(bucket, rate, None, 2, 1000.3)[1] == 2


def test_a_reservation_of_a_consumer_that_died_ends() -> None:
    rate = Rate(interval=1.0, burst=2)
    bucket, _, _ = reserved(Bucket(), rate, "dead", 2, 1000.0)
    assert bucket is not None

    assert reserved(bucket, rate, "b", 2, 1004.0)[1] == 0
    assert reserved(bucket, rate, "b", 2, 1006.0)[1] == 2


def test_a_reservation_that_was_used_too_late_gets_what_is_free_then() -> None:
    rate = Rate(interval=1.0, burst=2)
    bucket, _, _ = reserved(Bucket(), rate, "slow", 2, 1000.0)
    assert bucket is not None
    bucket, granted, _ = started(bucket, rate, None, 1, 1006.0)
    assert granted == 1

    assert started(bucket, rate, "slow", 2, 1006.1)[1] == 1


def test_a_clock_that_is_ahead_slows_others_down_and_lets_no_more_through() -> None:
    rate = Rate(interval=0.1, burst=1)
    bucket, n_ahead, n_behind = Bucket(), 0, 0
    for step in range(1000):
        now = 1000.0 + step * 0.01
        bucket, granted, _ = started(bucket, rate, None, 1, now + 3.0)
        n_ahead += granted
        bucket, granted, _ = started(bucket, rate, None, 1, now)
        n_behind += granted

    assert n_ahead + n_behind <= 101
