"""dispatch_all (A6): a full pool never keeps another pool's job from starting; lazy, with a bounded look-ahead."""

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from calling import Call
from gates import Gate
from jobs import echo, lines, note, nothing
from staffing import staffed
from watching import wait_until

from bulkhead import (
    ConfigError,
    ConfigTypeError,
    Dispatcher,
    DispatcherFinalized,
    DuplicateJobId,
    Job,
    JobNotFound,
    Tracker,
    UnknownPriority,
)

SLOW, FAST = 0, 1


@pytest.fixture(scope="module")
def disp() -> Iterator[Dispatcher]:
    with Dispatcher([(SLOW, 1), (FAST, 1)]) as disp:
        yield staffed(disp)


class Source:
    """Jobs of alternating priority, the first slow one held at a gate; counts how many were read."""

    def __init__(self, gate: Gate, number: int | None = None, order: Path | None = None) -> None:
        self._gate = gate
        self._order = order
        self._numbers = itertools.count() if number is None else range(number)
        self.n_read = 0

    def __iter__(self) -> Iterator[Job]:
        for number in self._numbers:
            self.n_read += 1
            yield self._job(number)

    def _job(self, number: int) -> Job:
        if number == 0:
            return self._gate.job("slow", priority=SLOW)
        priority = FAST if number % 2 else SLOW
        if self._order is not None and priority == SLOW:
            return Job(note, self._order, number).options(priority=SLOW)
        return Job(echo, number).options(priority=priority)


def test_the_fast_pool_is_done_while_the_slow_one_still_runs(
    disp: Dispatcher, gate: Gate, tmp_path: Path
) -> None:
    trackers = disp.dispatch_all(Source(gate, 1000, tmp_path / "order"))
    accepted = [next(trackers) for _ in range(501)]
    fast = [tracker for tracker in accepted if tracker.priority == FAST]
    slow = [tracker for tracker in accepted if tracker.priority == SLOW]

    assert [tracker.result(10) for tracker in fast] == list(range(1, 1000, 2))
    gate.wait_begun(1)
    assert [tracker.status().state for tracker in slow] == ["running"]
    assert gate.begun == ["slow"]

    gate.open()
    rest = list(trackers)
    assert len(rest) == 499
    assert disp.barrier().failed_count == 0
    assert lines(tmp_path / "order") == [str(number) for number in range(2, 1000, 2)]
    assert len({tracker.id for tracker in accepted + rest}) == 1000


def test_the_fast_pool_is_held_up_in_neither_direction(disp: Dispatcher, gate: Gate) -> None:
    held = [gate.job(priority=FAST), *(Job(nothing).options(priority=FAST) for _ in range(100))]
    others = [Job(echo, number).options(priority=SLOW) for number in range(100)]
    trackers = disp.dispatch_all([*held, *others])
    accepted = [next(trackers) for _ in range(101)]
    assert [tracker.result(10) for tracker in accepted[1:]] == list(range(100))
    gate.open()
    assert len(list(trackers)) == 100
    disp.barrier()


def test_two_pools_that_were_full_are_served_in_turn_however_slow_the_consumer_is(
    disp: Dispatcher, gate: Gate
) -> None:
    held = [gate.job(priority=SLOW), gate.job(priority=FAST)]
    others = [Job(nothing).options(priority=priority) for priority in [*[SLOW] * 10, *[FAST] * 10]]
    trackers = disp.dispatch_all([*held, *others])
    running = [next(trackers), next(trackers)]
    order: list[int] = []

    def consume() -> None:
        for tracker in trackers:
            order.append(tracker.priority)
            for one in (*running, tracker):  # by the end of which both pools could do with their next job
                one.result(10)

    consumer = Call(consume)
    consumer.until_waiting()
    gate.open()
    consumer.value()
    assert sorted(order) == [SLOW] * 10 + [FAST] * 10
    assert all(one != after for one, after in itertools.pairwise(order)), order
    disp.barrier()


@pytest.mark.parametrize("lookahead", [1, 7, 50])
def test_the_iterable_is_never_read_more_than_the_lookahead_ahead(
    disp: Dispatcher, gate: Gate, lookahead: int
) -> None:
    source = Source(gate, 400)
    n_yielded = 0
    furthest = 0

    def watched() -> Iterator[Job]:
        nonlocal furthest
        for job in source:
            furthest = max(furthest, source.n_read - n_yielded)
            yield job

    def consume() -> None:
        nonlocal n_yielded
        for _ in disp.dispatch_all(watched(), lookahead=lookahead):
            n_yielded += 1

    consumer = Call(consume)
    # The first slow job runs, and so many more are held; every fast one between them has passed.
    wait_until(lambda: source.n_read == 2 * lookahead + 1)
    consumer.until_waiting()
    disp.barrier(FAST)
    assert not consumer.has_returned
    assert (source.n_read, n_yielded, furthest) == (2 * lookahead + 1, lookahead + 1, lookahead)
    gate.open()
    consumer.value()
    assert (source.n_read, n_yielded, furthest) == (400, 400, lookahead)
    disp.barrier()


def test_nothing_is_read_before_the_first_tracker_is_asked_for(disp: Dispatcher, gate: Gate) -> None:
    source = Source(gate, 10)
    trackers = disp.dispatch_all(source)
    assert source.n_read == 0
    gate.open()
    assert len(list(trackers)) == 10
    disp.barrier()


def test_an_infinite_iterable_is_read_as_far_as_trackers_are_taken(disp: Dispatcher, gate: Gate) -> None:
    gate.open()
    source = Source(gate)
    trackers = list(itertools.islice(disp.dispatch_all(source, lookahead=20), 300))
    assert len(trackers) == 300
    assert 300 <= source.n_read <= 320
    disp.barrier()
    assert all(tracker.done() for tracker in trackers)


def test_leaving_early_drops_what_was_read_and_not_accepted(
    disp: Dispatcher, gate: Gate, tmp_path: Path
) -> None:
    def source() -> Iterator[Job]:
        yield gate.job("held", priority=SLOW)
        for number in range(10):
            yield Job(note, tmp_path / "slow", number).options(priority=SLOW, id=f"slow-{number}")
        yield Job(echo, "fast").options(priority=FAST)

    accepted = 0
    for tracker in disp.dispatch_all(source()):
        accepted += 1
        if tracker.priority == FAST:
            break
    gate.open()
    disp.barrier()

    assert accepted == 2
    assert lines(tmp_path / "slow") == []
    with pytest.raises(JobNotFound):
        disp.job("slow-0")
    again = disp.dispatch(Job(echo, "again").options(priority=SLOW, id="slow-0"))
    assert again.result(10) == "again"


def test_an_error_of_the_iterable_is_raised_when_the_jobs_before_it_are_dispatched(
    disp: Dispatcher, gate: Gate, tmp_path: Path
) -> None:
    def source() -> Iterator[Job]:
        yield gate.job(priority=SLOW)
        for number in range(5):
            yield Job(note, tmp_path / "slow", number).options(priority=SLOW)
        raise ZeroDivisionError("the source is broken")

    accepted: list[Tracker] = []
    consumer = Call(lambda: accepted.extend(disp.dispatch_all(source())))
    gate.wait_begun(1)
    assert not consumer.has_returned
    gate.open()
    with pytest.raises(ZeroDivisionError, match="the source is broken"):
        consumer.value()
    assert len(accepted) == 6
    assert disp.barrier().failed_count == 0
    assert lines(tmp_path / "slow") == list("01234")


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (Job(nothing).options(priority=9), UnknownPriority),
        ("not a job", ConfigTypeError),
        (Job(nothing).options(id="same"), DuplicateJobId),
    ],
)
def test_a_job_that_cannot_be_dispatched_raises_after_those_before_it(
    disp: Dispatcher, gate: Gate, bad: object, error: type[Exception]
) -> None:
    trackers = disp.dispatch_all([gate.job(id="same"), bad, Job(nothing)])
    assert next(trackers).id == "same"
    with pytest.raises(error):
        next(trackers)
    gate.open()
    disp.barrier()


@pytest.mark.parametrize(
    ("lookahead", "error"),
    [(0, ConfigError), (-1, ConfigError), (1.5, ConfigTypeError), (None, ConfigTypeError)],
)
def test_a_bad_lookahead_raises_before_anything_is_read(
    disp: Dispatcher, gate: Gate, lookahead: object, error: type[Exception]
) -> None:
    source = Source(gate, 10)
    with pytest.raises(error, match="lookahead"):
        disp.dispatch_all(source, lookahead=lookahead)  # type: ignore[arg-type]
    assert source.n_read == 0


def test_jobs_that_cannot_be_iterated_raise(disp: Dispatcher) -> None:
    with pytest.raises(ConfigTypeError, match="jobs must be iterable, not 5"):
        disp.dispatch_all(5)  # type: ignore[arg-type]


def test_two_feeders_and_a_dispatching_thread_lose_nothing(disp: Dispatcher) -> None:
    def some(prefix: str) -> list[Job]:
        return [Job(echo, f"{prefix}-{n}").options(priority=n % 2) for n in range(200)]

    feeders = [Call(lambda name=name: list(disp.dispatch_all(some(name), lookahead=10))) for name in "ab"]
    plain = Call(lambda: [disp.dispatch(job) for job in some("c")])
    results = [tracker.result(10) for call in (*feeders, plain) for tracker in call.value()]
    assert sorted(results) == sorted(f"{name}-{n}" for name in "abc" for n in range(200))


def test_finalize_ends_a_dispatch_all_that_waits(gate: Gate) -> None:
    disp = Dispatcher([(SLOW, 1), (FAST, 1)])
    source = Source(gate)
    begun = threading.Event()

    def consume() -> None:
        for _ in disp.dispatch_all(source, lookahead=5):
            begun.set()

    consumer = Call(consume)
    assert begun.wait(10)
    gate.wait_begun(1)
    closer = Call(disp.finalize)
    with pytest.raises(DispatcherFinalized):
        consumer.value()
    gate.open()
    closer.value()
