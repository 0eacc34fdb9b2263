"""How many jobs are claimed ahead, and which travel together."""

from bulkhead.service.pace import Pace


def learned(n_workers: int, **seconds: float) -> Pace:
    pace = Pace(n_workers)
    for task, value in seconds.items():
        for _ in range(50):
            pace.learn(task, value)
    return pace


def test_nothing_is_claimed_ahead_of_what_nobody_knows():
    pace = Pace(4)
    assert pace.room() == 4
    assert not pace.is_short("a")


def test_of_short_jobs_as_many_are_claimed_as_a_moment_takes():
    pace = learned(4, a=0.001)
    assert pace.is_short("a")
    assert pace.room() == 4 + 200
    assert pace.batch_size(["a"] * 200) in (9, 10)
    assert pace.batch_size(["a"] * 8) == 2
    assert pace.batch_size(["a"]) == 1
    assert learned(4, a=1e-7).room() == 4 + 2000


def test_a_long_task_among_short_ones_holds_the_claims_back():
    pace = learned(2, a=0.001, b=5.0)
    assert pace.room() == 2
    assert not pace.is_short("b")
    for _ in range(10_001):
        pace.learn("a", 0.001)
    assert pace.room() == 102, "it was not heard of for long"
    assert not pace.is_short("b")


def test_a_short_task_that_has_become_long_is_known_at_once():
    pace = learned(2, a=0.001)
    pace.learn_long("a")
    assert pace.room() == 2
    assert not pace.is_short("a")
