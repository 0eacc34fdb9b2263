"""Feeding jobs to pools: who is offered when, what is held, what is given out. The pools are stood in for."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from calling import Call
from hypothesis import given
from hypothesis import strategies as st

from bulkhead import DispatcherFinalized, JobState, PoolBroken
from bulkhead._kernel.records import JobRecord
from bulkhead.feeding import Feeder, Offers


class StandIn:
    """A pool with room for so many jobs; offers wait until the test makes room.

    Args:
        room: How many jobs it takes at once.
        when_waited_for: What happens when somebody waits, so that the wait has an end.
    """

    def __init__(self, room: float = 0, when_waited_for: Callable[[StandIn], object] | None = None) -> None:
        self.room = room
        self.accepted: list[JobRecord] = []
        self.offers: deque[JobRecord] = deque()
        self.refusal: Exception | None = None
        self.interrupts = 0  # how many of the next offers are hit by a Ctrl-C, when they have been made
        self.n_waits = 0
        self.n_background = 0
        self._when_waited_for = when_waited_for

    # What the library calls

    def try_dispatch(self, job: JobRecord, waiter: Any = None) -> bool:
        assert job not in self.accepted
        assert job not in self.offers
        self.check_open()
        taken = not self.offers and self.room > 0
        if taken:
            self._accept(job)
        else:
            self.offers.append(job)
            job.waiters = [waiter]
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        return taken

    def withdraw(self, job: JobRecord) -> bool:
        if job in self.offers:
            self.offers.remove(job)
        return job.state is None

    def check_open(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    def wait_until_accepted(self, job: JobRecord) -> None:
        self.n_waits += 1
        self._be_waited_for()
        assert job.waiters is None, "the wait would never end"

    def call_background(self) -> None:
        self.n_background += 1
        self._be_waited_for()

    # What happens to it

    def make_room(self, n: float = 1) -> None:
        self.room += n
        while self.offers and self.room > 0:
            self._accept(self.offers.popleft())

    def refuse(self, error: Exception) -> None:
        self.refusal = error
        while self.offers:
            _fire(self.offers.popleft())

    def _accept(self, job: JobRecord) -> None:
        self.room -= 1
        self.accepted.append(job)
        job.state = JobState.RUNNING
        _fire(job)

    def _be_waited_for(self) -> None:
        if self._when_waited_for is not None:
            self._when_waited_for(self)


def _fire(job: JobRecord) -> None:
    waiters, job.waiters = job.waiters, None
    for waiter in waiters or ():
        waiter.fire()


def some(number: int) -> list[JobRecord]:
    return [JobRecord(b"", 0) for _ in range(number)]


def dealt(*pools: StandIn, rounds: int) -> list[tuple[StandIn, JobRecord]]:
    """Return a new job for each pool in turn, so many rounds."""
    return [(pool, JobRecord(b"", 0)) for _ in range(rounds) for pool in pools]


@pytest.fixture
def forgotten() -> list[JobRecord]:
    return []


@pytest.fixture
def offers(forgotten: list[JobRecord]) -> Offers:
    return Offers(forgotten.append)


# What is offered


def test_one_job_is_left_with_a_full_pool_and_the_others_wait_in_order(offers: Offers) -> None:
    pool = StandIn()
    first, *others = some(4)
    for job in (first, *others):
        offers.add(pool, job)
    assert list(pool.offers) == [first]
    assert offers.n_held == 4
    given_out: list[JobRecord] = []
    for _ in range(4):
        assert list(offers.accepted()) == []
        pool.make_room()
        given_out += offers.accepted()
        assert len(pool.offers) <= 1
    assert given_out == [first, *others]
    assert offers.n_held == 0


def test_a_full_pool_does_not_keep_another_pools_jobs_back(offers: Offers) -> None:
    full, free = StandIn(), StandIn(room=3)
    for pool, job in dealt(full, free, rounds=3):
        offers.add(pool, job)
    given_out = list(offers.accepted())
    assert given_out == free.accepted
    assert len(given_out) == 3
    assert full.accepted == []
    assert offers.n_held == 3


def test_pools_that_accept_at_once_are_served_in_turn(offers: Offers) -> None:
    one, other = StandIn(), StandIn()
    for pool, job in [*dealt(one, rounds=3), *dealt(other, rounds=3)]:
        offers.add(pool, job)
    for pool in (one, other):
        pool.make_room(3)
    given_out = list(offers.accepted())
    assert given_out == [job for pair in zip(one.accepted, other.accepted, strict=True) for job in pair]
    assert len(given_out) == 6


def test_a_pool_has_its_next_job_before_the_last_one_is_given_out(offers: Offers) -> None:
    pool = StandIn()
    first, second = some(2)
    offers.add(pool, first)
    offers.add(pool, second)
    pool.make_room()
    assert next(offers.accepted()) is first
    assert list(pool.offers) == [second]


@pytest.mark.parametrize("depth", [2, 5])
def test_as_many_jobs_as_allowed_are_left_with_a_pool_and_accepted_ones_count_no_longer(
    forgotten: list[JobRecord], depth: int
) -> None:
    offers = Offers(forgotten.append, depth)
    pool = StandIn()
    jobs = some(depth + 3)
    for job in jobs[:-2]:
        offers.add(pool, job)
    assert list(pool.offers) == jobs[:depth]
    pool.make_room(2)
    for job in jobs[-2:]:
        offers.add(pool, job)
    assert list(pool.offers) == [*jobs[2:depth], *jobs[-2:]], "the one in line has to wait for `accepted`"
    offers.take_back()
    assert forgotten == [*jobs[2:depth], *jobs[-2:], jobs[depth]]


# Waiting


def test_whoever_waits_for_one_pool_waits_there_and_drives_it(offers: Offers) -> None:
    pool, idle = StandIn(when_waited_for=StandIn.make_room), StandIn(room=1)
    offers.add(idle, JobRecord(b"", 0))
    offers.add(pool, JobRecord(b"", 0))
    assert list(offers.accepted()) == idle.accepted
    offers.wait()
    assert (pool.n_waits, pool.n_background) == (1, 0)
    assert (idle.n_waits, idle.n_background) == (0, 0)
    assert list(offers.accepted()) == pool.accepted


def test_whoever_waits_for_several_pools_has_them_driven_and_is_woken_by_the_first(offers: Offers) -> None:
    pools = [StandIn(), StandIn(when_waited_for=StandIn.make_room), StandIn()]
    idle = StandIn(room=1)
    for pool in (*pools, idle):
        offers.add(pool, JobRecord(b"", 0))
    assert list(offers.accepted()) == idle.accepted
    offers.wait()
    assert [pool.n_background for pool in pools] == [1, 1, 1]
    assert idle.n_background == 0
    assert list(offers.accepted()) == pools[1].accepted


@pytest.mark.parametrize("n_pools", [1, 2])
@pytest.mark.parametrize("news", ["accepted", "refused"])
def test_what_happens_between_the_last_look_and_the_wait_ends_the_wait(
    offers: Offers, news: str, n_pools: int
) -> None:
    pools = [StandIn() for _ in range(n_pools)]
    for pool in pools:
        offers.add(pool, JobRecord(b"", 0))
    assert list(offers.accepted()) == []
    if news == "accepted":
        pools[0].make_room()
        offers.wait()
        assert list(offers.accepted()) == pools[0].accepted
    else:
        pools[0].refuse(PoolBroken("given up"))
        offers.wait()
        with pytest.raises(PoolBroken):
            list(offers.accepted())


def test_news_that_was_looked_at_does_not_end_the_next_wait(offers: Offers) -> None:
    one, other = StandIn(), StandIn()
    for pool, job in dealt(one, other, rounds=2):
        offers.add(pool, job)
    one.make_room()
    assert list(offers.accepted()) == one.accepted
    waiting = Call(offers.wait).until_waiting()
    other.make_room()
    waiting.value()
    assert list(offers.accepted()) == other.accepted


# Ends


def test_what_is_not_accepted_is_withdrawn_and_forgotten_and_nothing_else(
    offers: Offers, forgotten: list[JobRecord]
) -> None:
    full, accepting = StandIn(), StandIn()
    given_out, accepted, *rest = some(4)
    for job in (given_out, accepted, *rest):
        offers.add(accepting, job)
    waiting = some(3)
    for job in waiting:
        offers.add(full, job)
    accepting.make_room()
    assert list(offers.accepted()) == [given_out]
    accepting.make_room()
    offers.take_back()
    assert forgotten == [waiting[0], *rest, *waiting[1:]]
    assert not full.offers
    assert not accepting.offers
    assert accepting.accepted == [given_out, accepted]


def test_a_job_that_is_refused_is_forgotten_and_the_refusal_raised(
    offers: Offers, forgotten: list[JobRecord]
) -> None:
    pool = StandIn(room=5)
    pool.refuse(DispatcherFinalized("closed"))
    job = JobRecord(b"", 0)
    with pytest.raises(DispatcherFinalized):
        offers.add(pool, job)
    assert forgotten == [job]
    assert offers.n_held == 0
    offers.take_back()
    assert forgotten == [job], "once"


@pytest.mark.parametrize("is_first", [True, False])
def test_an_interrupt_when_an_offer_was_made_takes_it_back(
    offers: Offers, forgotten: list[JobRecord], is_first: bool
) -> None:
    pool = StandIn()
    jobs = some(1 if is_first else 2)
    if not is_first:
        for job in jobs:
            offers.add(pool, job)
        pool.make_room()
    pool.interrupts = 1

    def offer() -> None:
        if is_first:
            offers.add(pool, jobs[-1])
        else:
            list(offers.accepted())

    with pytest.raises(KeyboardInterrupt):
        offer()
    offers.take_back()
    assert not pool.offers, "nobody knows of it any more, so it must not run"
    assert forgotten == [jobs[-1]]


def test_an_interrupt_when_a_job_was_accepted_leaves_it_accepted(
    offers: Offers, forgotten: list[JobRecord]
) -> None:
    pool = StandIn(room=1)
    pool.interrupts = 1
    with pytest.raises(KeyboardInterrupt):
        offers.add(pool, JobRecord(b"", 0))
    offers.take_back()
    assert len(pool.accepted) == 1
    assert forgotten == []


def test_what_pools_have_accepted_is_given_out_before_the_refusal_of_one_is_raised(offers: Offers) -> None:
    broken, other = StandIn(), StandIn()
    for pool, job in dealt(broken, other, rounds=2):
        offers.add(pool, job)
    for pool in (broken, other):
        pool.make_room()
    broken.refuse(PoolBroken("given up"))
    given_out, error = until_it_ends(offers.accepted())
    assert isinstance(error, PoolBroken)
    assert given_out == broken.accepted + other.accepted
    assert len(given_out) == 2


def until_it_ends(jobs: Iterator[JobRecord]) -> tuple[list[JobRecord], Exception | None]:
    """Return what was given out and the error that ended it."""
    found = []
    try:
        for job in jobs:
            found.append(job)  # noqa: PERF402 - what came before the error counts
    except Exception as error:
        return found, error
    return found, None


# The feeder


def fed(
    jobs: Iterator[tuple[StandIn, JobRecord]] | Sequence[tuple[StandIn, JobRecord]],
    lookahead: int = 1000,
    forget: Callable[[JobRecord], object] = lambda job: None,
) -> Iterator[JobRecord]:
    return iter(Feeder(iter(jobs), lookahead, forget))


def test_nothing_is_read_before_the_first_job_is_asked_for() -> None:
    source = iter(dealt(StandIn(room=9), rounds=3))
    feeder = fed(source)
    assert len(list(source)) == 3
    assert list(feeder) == []


def test_an_endless_source_is_read_as_far_as_it_is_used() -> None:
    pool = StandIn(room=float("inf"))
    source = ((pool, JobRecord(b"", 0)) for _ in itertools.count())
    feeder = fed(source, lookahead=5)
    assert len(list(itertools.islice(feeder, 100))) == 100
    assert len(pool.accepted) <= 105


def test_a_source_that_has_ended_is_not_asked_again() -> None:
    n_ends = 0

    class Source(Iterator[Any]):
        def __init__(self) -> None:
            self.left = dealt(StandIn(when_waited_for=StandIn.make_room), rounds=3)

        def __next__(self) -> Any:
            nonlocal n_ends
            if self.left:
                return self.left.pop()
            n_ends += 1
            raise StopIteration

    assert len(list(fed(Source()))) == 3
    assert n_ends == 1


def test_an_error_of_the_source_comes_after_the_jobs_before_it() -> None:
    pool = StandIn(when_waited_for=StandIn.make_room)

    def source() -> Iterator[tuple[StandIn, JobRecord]]:
        yield from dealt(pool, rounds=3)
        raise ZeroDivisionError

    found, error = until_it_ends(fed(source()))
    assert isinstance(error, ZeroDivisionError)
    assert found == pool.accepted
    assert len(found) == 3


def test_an_interrupt_of_the_source_comes_at_once_and_what_waits_is_taken_back(
    forgotten: list[JobRecord],
) -> None:
    pool = StandIn()
    jobs = dealt(pool, rounds=3)

    def source() -> Iterator[tuple[StandIn, JobRecord]]:
        yield from jobs
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(fed(source(), forget=forgotten.append))
    assert forgotten == [job for _, job in jobs]
    assert not pool.offers


def test_leaving_early_takes_back_what_is_not_accepted(forgotten: list[JobRecord]) -> None:
    full, free = StandIn(), StandIn(room=9)
    jobs = [*dealt(full, rounds=3), *dealt(free, rounds=1), *dealt(full, rounds=3)]
    feeder = fed(iter(jobs), forget=forgotten.append)
    assert next(feeder) is jobs[3][1]
    feeder.close()
    assert forgotten == [job for _, job in jobs[:3]], "the last three were not read"
    assert not full.offers


def test_a_pool_that_takes_no_more_ends_the_feeding_and_the_other_pools_offers_are_taken_back(
    forgotten: list[JobRecord],
) -> None:
    closing = StandIn(when_waited_for=lambda pool: pool.refuse(DispatcherFinalized("closed")))
    full = StandIn()
    with pytest.raises(DispatcherFinalized):
        list(fed(dealt(closing, full, rounds=2), forget=forgotten.append))
    assert len(forgotten) == 4
    assert not full.offers


@given(
    order=st.lists(st.integers(0, 2), max_size=40),
    rooms=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    wakes=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    pace=st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), max_size=3), max_size=40),
    lookahead=st.integers(1, 12),
)
def test_whatever_the_pools_do_every_job_is_dispatched_once_in_its_order_and_in_its_turn(
    order: list[int],
    rooms: list[int],
    wakes: list[int],
    pace: list[list[tuple[int, int]]],
    lookahead: int,
) -> None:
    """Jobs are for random pools; while each is given out, pools make room at random, and when one waits for them."""
    pools = [StandIn(room, lambda pool, n=n: pool.make_room(n)) for room, n in zip(rooms, wakes, strict=True)]
    read: list[tuple[StandIn, JobRecord]] = []
    found: list[JobRecord] = []

    def source() -> Iterator[tuple[StandIn, JobRecord]]:
        for which in order:
            assert len(read) - len(found) < lookahead + len(pools), "what is accepted may be on its way out"
            held = len(read) - sum(len(pool.accepted) for pool in pools)
            assert held < lookahead
            read.append((pools[which], JobRecord(b"", 0)))
            yield read[-1]

    owner: dict[JobRecord, StandIn] = {}
    seen_accepted: dict[JobRecord, int] = {}  # how many were given out when it was seen to be accepted
    for number, job in enumerate(fed(source(), lookahead, lambda job: pytest.fail("forgotten"))):
        owner.update((one, pool) for pool, one in read)
        found.append(job)
        passed_by = [owner[other] for other in found[seen_accepted.get(job, number) : number]]
        for pool in set(passed_by):
            assert passed_by.count(pool) <= 1, "no pool is served twice while another has its turn"
        for which, n in pace[number] if number < len(pace) else ():
            pools[which].make_room(n)
        for pool in pools:
            for one in pool.accepted:
                seen_accepted.setdefault(one, number + 1)
            held_back = [one for of, one in read if of is pool and one not in pool.accepted]
            unseen = [one for one in pool.accepted if one not in found]
            if held_back:
                assert pool.offers or unseen, "a pool has an offer, or will get one when its turn has come"
            assert len(pool.offers) <= 1
    assert sorted(map(id, found)) == sorted(id(job) for _, job in read)
    assert [pools.index(pool) for pool, _ in read] == order
    for pool in pools:
        assert pool.accepted == [job for of, job in read if of is pool]
        assert [job for job in found if owner[job] is pool] == pool.accepted
