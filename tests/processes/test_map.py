"""map (D1, D2): lazy on both sides, in chunks that nobody sees, on real workers."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from calling import Call
from jobs import echo, lines, nothing
from map_jobs import (
    Adder,
    Counted,
    Large,
    add_up,
    held,
    held_bytes,
    held_from_1000,
    identity,
    large,
    number_of,
    odd_ones_fail,
    outcomes,
    pid_of_worker,
    square,
    where,
)
from parameters import named
from staffing import staffed
from watching import wait_until, wait_until_whole

from bulkhead import (
    ConfigError,
    ConfigTypeError,
    Dispatcher,
    Job,
    JobNotPicklable,
    NestedDispatch,
    Pool,
    UnknownPriority,
    mapping,
)

# Of the module's dispatcher: a pool of two, and a pool of one that accepts whatever comes.
PAIR, ONE = 0, 1


@pytest.fixture(scope="module")
def disp() -> Iterator[Dispatcher]:
    with Dispatcher([Pool(PAIR, 2), Pool(ONE, 1, backlog=None)]) as disp:
        yield staffed(disp)


@pytest.fixture
def roomy() -> Iterator[Dispatcher]:
    """One that ends with the test: free shared memory is kept for a while for the next large data."""
    with Dispatcher([(PAIR, 2)]) as roomy:
        yield staffed(roomy)


@pytest.fixture(autouse=True)
def _all_is_quiet_afterwards(disp: Dispatcher, tmp_path: Path) -> Iterator[None]:
    """No chunk waits or runs after a test, whatever it has left unread."""
    yield
    (tmp_path / "go").touch()
    for priority in (PAIR, ONE):
        wait_until(lambda priority=priority: is_quiet(disp, priority))
        disp.barrier(priority)


def is_quiet(disp: Dispatcher, priority: int = PAIR) -> bool:
    stats = disp.stats()[priority]
    return stats.waiting == stats.running == stats.delayed == 0


def chunks_done(disp: Dispatcher, priority: int = PAIR) -> int:
    return disp.stats()[priority].succeeded


def begun(folder: Path) -> list[int]:
    """Return the numbers of the `held` items that have begun."""
    return [int(line) for line in lines(folder / "begun")]


# Results


@pytest.mark.parametrize("chunksize", [1, 7, 1000, "auto"])
def test_every_item_has_its_result_in_its_place(disp: Dispatcher, chunksize: Any) -> None:
    for n in (0, 1, 7, 500):
        assert list(disp.map(square, range(n), chunksize=chunksize)) == [i * i for i in range(n)]


def test_several_iterables_are_the_arguments_and_the_shortest_ends_the_map(disp: Dispatcher) -> None:
    assert list(disp.map(pow, itertools.count(2), [3, 4, 5], itertools.repeat(100))) == [8, 81, 24]


def test_items_of_one_iterable_that_are_tuples_stay_one_argument(disp: Dispatcher) -> None:
    items = [(), (1,), (1, 2), (1, 2, 3)]
    assert list(disp.map(identity, items, chunksize=2)) == items
    assert list(disp.map(len, items, chunksize=2, timeout=20)) == [0, 1, 2, 3]


class OfOldStyle:
    def __getitem__(self, index: int) -> int:
        return (10, 20, 30)[index]


@pytest.mark.parametrize(
    "items", ["abc", {1: 2, 3: 4}, OfOldStyle(), (n for n in range(3)), np.arange(3), b"\1\2"]
)
def test_anything_that_can_be_iterated_is_taken(disp: Dispatcher, items: Any) -> None:
    expected = list(range(3)) if isinstance(items, Iterator) else list(items)
    assert list(disp.map(identity, items)) == expected


@pytest.mark.parametrize(
    "fn", [partial(pow, 2), Adder(5), Adder(5).add, str, abs, lambda number: -number], ids=named
)
def test_anything_that_can_be_called_and_sent_is_taken(disp: Dispatcher, fn: Callable[[int], Any]) -> None:
    assert list(disp.map(fn, range(5), chunksize=2)) == [fn(number) for number in range(5)]


def test_results_of_every_size_come_back_as_they_were_from_one_chunk(roomy: Dispatcher) -> None:
    items = [
        None,
        bytes(1 << 20),
        np.arange(100_000),
        1,
        "x" * 300_000,
        np.zeros((300, 300)),
        [],
        bytearray(b"y" * 200_000),
        np.arange(3),
        b"z" * (3 << 20),
        {"deep": [np.full(50_000, 7.0), None]},
    ]
    results = list(roomy.map(identity, items * 2, chunksize=len(items)))
    assert len(results) == 2 * len(items)
    for result, item in zip(results, items * 2, strict=True):
        assert type(result) is type(item)
        if isinstance(item, dict):
            result, item = result["deep"][0], item["deep"][0]
        if isinstance(item, np.ndarray):
            assert (result.shape, result.dtype) == (item.shape, item.dtype)
            assert (result == item).all()
        else:
            assert result == item


def test_a_large_common_argument_is_given_to_every_item(roomy: Dispatcher) -> None:
    table, more = np.arange(100_000), bytes(1 << 20)
    results = roomy.map(add_up, range(300), itertools.repeat(table), itertools.repeat(more))
    assert list(results) == [2 * number + (1 << 20) for number in range(300)]


def test_a_shared_argument_is_given_to_every_item() -> None:
    with Dispatcher([(0, 2)]) as roomy:
        table = roomy.share(np.arange(100_000))
        results = roomy.map(add_up, range(300), itertools.repeat(table), itertools.repeat(b"+"))
        assert list(results) == [2 * number + 1 for number in range(300)]


def test_an_exception_that_is_returned_is_a_result(disp: Dispatcher) -> None:
    [result] = disp.map(identity, [ValueError("as a value")])
    assert isinstance(result, ValueError)


def test_a_source_that_changes_one_object_again_and_again_is_understood_with_chunks_of_one(
    disp: Dispatcher,
) -> None:
    def same() -> Iterator[list[int]]:
        one = [0]
        for number in range(20):
            one[0] = number
            yield one

    assert list(disp.map(identity, same(), chunksize=1)) == [[number] for number in range(20)]


# Lazy


def test_nothing_is_read_before_the_first_result_is_asked_for(disp: Dispatcher) -> None:
    source = Counted()
    results = disp.map(square, source)
    time.sleep(0.01)  # time for a thread that would read
    assert source.n_read == 0
    assert next(results) == 0


def test_an_endless_iterable_gives_as_many_results_as_are_taken(disp: Dispatcher) -> None:
    source = Counted()
    results = disp.map(square, source, buffersize=100)
    assert list(itertools.islice(results, 3000)) == [number * number for number in range(3000)]
    assert source.n_read <= 3100
    assert list(itertools.islice(disp.map(abs, itertools.count()), 3000)) == list(range(3000))


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("buffersize", "chunksize"), [(1, 1), (1, "auto"), (3, 7), (64, 16), (64, "auto")])
def test_no_more_is_read_ahead_than_the_buffersize(
    disp: Dispatcher, buffersize: int, chunksize: Any, ordered: bool
) -> None:
    n_given = furthest = 0

    def watched() -> Iterator[int]:
        nonlocal furthest
        for number in range(300):
            furthest = max(furthest, number + 1 - n_given)
            yield number

    results = []
    for result in disp.map(identity, watched(), buffersize=buffersize, chunksize=chunksize, ordered=ordered):
        results.append(result)
        n_given += 1
    assert sorted(results) == list(range(300))
    assert furthest <= buffersize
    if buffersize == 64:
        assert furthest > 1


def test_without_a_buffersize_the_look_ahead_is_bounded_while_the_first_item_takes_long(
    disp: Dispatcher, tmp_path: Path
) -> None:
    source = Counted()
    small = (number % 1000 for number in source)  # not held
    results = disp.map(
        held_from_1000, itertools.repeat(tmp_path), itertools.chain([1000], small), chunksize=20
    )
    reader = Call(next, results)
    wait_until(lambda: source.n_read >= 900)
    reader.until_waiting()
    wait_until(lambda: disp.stats()[PAIR].running == 1)  # the others are done
    assert source.n_read <= 1000 + 20
    (tmp_path / "go").touch()
    assert reader.value() == 1000
    assert list(itertools.islice(results, 2000)) == [*range(1000), *range(1000)]


def test_nothing_is_read_while_results_wait_that_are_too_many_bytes(
    disp: Dispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping, "_LOOKAHEAD_BYTES", 1 << 20)
    source = Counted()
    results = disp.map(held_bytes, itertools.repeat(tmp_path), itertools.chain([1000], source), chunksize=1)
    reader = Call(next, results)
    wait_until(lambda: source.n_read >= 10)
    reader.until_waiting()
    wait_until(lambda: disp.stats()[PAIR].running == 1)
    assert source.n_read <= 10 + 2 * 2 + 1
    (tmp_path / "go").touch()
    assert len(reader.value()) == 102_400
    assert len(list(itertools.islice(results, 100))) == 100


def test_items_that_have_run_are_let_go_although_their_results_wait(
    roomy: Dispatcher, tmp_path: Path
) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    source = map(Large, [1000, *range(100)])
    results = roomy.map(number_of, itertools.repeat(tmp_path), source, chunksize=1)
    reader = Call(next, results)
    wait_until(lambda: len(begun(tmp_path)) == 101)
    reader.until_waiting()
    wait_until(lambda: roomy.stats()[PAIR].running == 1)
    gc.collect()
    assert len(Large.alive) <= 10
    assert len(os.listdir("/proc/self/fd")) - descriptors <= 10
    (tmp_path / "go").touch()
    assert reader.value() == 1000
    assert list(results) == list(range(100))


def test_results_that_were_given_out_are_let_go(disp: Dispatcher) -> None:
    most = 0
    for result in disp.map(large, range(60), chunksize=2, buffersize=8):
        most = max(most, len(Large.alive))
        assert result.number >= 0
    assert most <= 14


def test_nothing_grows_with_the_number_of_items(disp: Dispatcher) -> None:
    def objects() -> int:
        deque(itertools.islice(results, 500), maxlen=0)
        gc.collect()
        return len(gc.get_objects())

    results = disp.map(square, itertools.count(), chunksize=1, timeout=20, buffersize=50)
    before = objects()
    # What is under way differs from look to look; one object for each item would be 500.
    assert objects() - before < 400


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_million_items_take_no_more_memory_than_some(disp: Dispatcher) -> None:
    process = psutil.Process()
    results = disp.map(square, itertools.count())
    assert sum(itertools.islice(results, 100_000)) == sum(n * n for n in range(100_000))
    before = process.memory_info().rss
    assert sum(itertools.islice(results, 900_000)) == sum(n * n for n in range(100_000, 1_000_000))
    assert process.memory_info().rss - before < 50_000_000


def test_a_source_that_has_ended_is_not_asked_again(disp: Dispatcher) -> None:
    source, longer = Counted(50), Counted()
    assert list(disp.map(square, source, chunksize=3)) == [n * n for n in range(50)]
    assert source.n_asked_in_vain == 1
    assert list(disp.map(pow, longer, [1] * 50, chunksize=3)) == list(range(50))
    assert longer.n_read <= 51  # as with zip


def test_a_source_may_wait_for_the_result_before(disp: Dispatcher) -> None:
    answers: list[int] = []

    def questions() -> Iterator[int]:
        for number in range(50):
            assert len(answers) == number
            yield number

    answers.extend(disp.map(square, questions(), buffersize=1))
    assert answers == [n * n for n in range(50)]


@pytest.mark.parametrize("ordered", [True, False])
def test_results_are_given_out_although_the_source_is_slow(disp: Dispatcher, ordered: bool) -> None:
    source = Counted(20, pause=0.02)
    lags = [source.n_read - n for n, _ in enumerate(disp.map(square, source, ordered=ordered), 1)]
    assert len(lags) == 20
    # One is read while its result is worked out; more only when the machine is busy.
    assert sorted(lags)[10] <= 2


def test_workers_go_on_with_a_slow_source_while_the_first_item_takes_long(
    disp: Dispatcher, tmp_path: Path
) -> None:
    source = itertools.chain([1000], Counted(20, pause=0.01))
    reader = Call(lambda: list(disp.map(held, itertools.repeat(tmp_path), source)))
    wait_until(lambda: len(begun(tmp_path)) == 21)
    assert not reader.has_returned
    (tmp_path / "go").touch()
    assert reader.value() == [1000, *range(20)]


# Chunks


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_short_items_travel_in_chunks_that_are_learned(disp: Dispatcher, timeout: float | None) -> None:
    before = chunks_done(disp)
    assert list(disp.map(square, range(20_000), timeout=timeout)) == [n * n for n in range(20_000)]
    assert chunks_done(disp) - before < 500


def test_long_items_go_alone(disp: Dispatcher) -> None:
    before = chunks_done(disp)
    assert len(list(disp.map(where, [0.02] * 12))) == 12
    assert chunks_done(disp) - before == 12


def test_a_chunk_that_was_made_for_short_items_is_dealt_anew_when_long_ones_come(disp: Dispatcher) -> None:
    naps = [0.0] * 5000 + [0.1] * 12
    long_ones = list(disp.map(where, naps))[-12:]
    assert len({pid for pid, _, _ in long_ones}) == 2
    # A quarter of the work is done by one worker while the other is at work, too.
    overlap = sum(
        max(min(end, other_end) - max(begin, other_begin), 0.0)
        for (pid, begin, end), (other, other_begin, other_end) in itertools.combinations(long_ones, 2)
        if pid != other
    )
    assert overlap > 0.25 * 1.2 / 2


def test_a_chunksize_is_kept(disp: Dispatcher) -> None:
    before = chunks_done(disp)
    assert list(disp.map(square, range(95), chunksize=np.int64(10))) == [n * n for n in range(95)]
    assert chunks_done(disp) - before == 10


# Order


def test_with_order_a_long_first_item_holds_back_results_but_not_the_other_workers(
    disp: Dispatcher, tmp_path: Path
) -> None:
    reader = Call(lambda: list(disp.map(held, itertools.repeat(tmp_path), [1000, *range(50)], chunksize=1)))
    wait_until(lambda: len(begun(tmp_path)) == 51)
    assert not reader.has_returned
    (tmp_path / "go").touch()
    assert reader.value() == [1000, *range(50)]


def test_without_order_results_come_as_their_chunks_are_done(disp: Dispatcher, tmp_path: Path) -> None:
    items = [1000, *range(50)]
    results = disp.map(held, itertools.repeat(tmp_path), items, chunksize=1, ordered=False)
    first = [next(results) for _ in range(50)]
    # By one worker, one after the other, but for the one that lay behind 1000 until that was found to take long.
    assert sorted(first) == list(range(50))
    assert [one for one in first if one != 1] == [0, *range(2, 50)]
    assert first.index(1) < 6
    (tmp_path / "go").touch()
    assert list(results) == [1000]


# Pools


def test_a_priority_names_the_pool(disp: Dispatcher) -> None:
    both = [
        set(disp.map(pid_of_worker, range(8), priority=priority, chunksize=1)) for priority in (PAIR, ONE)
    ]
    assert both[0].isdisjoint(both[1])
    assert len(both[1]) == 1
    assert set(disp.map(pid_of_worker, range(8), chunksize=1)) <= both[0] | both[1] - both[1]


def test_without_a_priority_it_is_the_only_pool_or_pool_0() -> None:
    with Dispatcher([(7, 1)]) as only:
        assert list(only.map(square, [3])) == [9]
    with Dispatcher([(7, 1), (8, 1)]) as without, pytest.raises(UnknownPriority, match="0 has no pool"):
        without.map(square, [3])


def test_two_maps_on_two_pools_are_read_in_turn(disp: Dispatcher) -> None:
    both = zip(disp.map(square, range(300)), disp.map(abs, range(300), priority=ONE), strict=True)
    assert list(both) == [(n * n, n) for n in range(300)]


def test_two_maps_on_one_pool_are_read_in_turn(disp: Dispatcher) -> None:
    both = zip(*(disp.map(fn, itertools.count(), priority=ONE) for fn in (square, abs)), strict=True)
    assert list(itertools.islice(both, 300)) == [(n * n, n) for n in range(300)]


def test_a_map_of_a_map_works_on_the_only_worker(disp: Dispatcher) -> None:
    inner = disp.map(square, range(300), priority=ONE)
    assert list(disp.map(str, inner, priority=ONE)) == [str(n * n) for n in range(300)]


def test_maps_in_several_threads_do_not_mix(disp: Dispatcher) -> None:
    def run(base: int) -> list[int]:
        return list(disp.map(abs, range(base, base + 500), chunksize=base // 1000 % 3 * 5 + 1))

    calls = [Call(run, 1000 * number) for number in range(4)]
    for number, call in enumerate(calls):
        assert call.value() == list(range(1000 * number, 1000 * number + 500))


def test_a_map_does_not_starve_the_dispatches_of_other_threads(disp: Dispatcher) -> None:
    is_over = threading.Event()

    def read() -> None:
        for result in disp.map(where, itertools.repeat(0.001), chunksize=5):
            assert result
            if is_over.is_set():
                break

    reader = Call(read)
    wait_until(lambda: disp.stats()[PAIR].running == 2)
    trackers = [disp.dispatch(Job(echo, number), timeout=20) for number in range(50)]
    assert [tracker.result(20) for tracker in trackers] == list(range(50))
    assert not reader.has_returned
    is_over.set()
    reader.value()


def test_a_barrier_meanwhile_waits_for_the_chunks_under_way(disp: Dispatcher, tmp_path: Path) -> None:
    disp.barrier()
    results = disp.map(held, itertools.repeat(tmp_path), [0, 1000, *range(1, 50)], chunksize=1, buffersize=3)
    assert next(results) == 0
    barrier = Call(disp.barrier, PAIR).until_waiting()
    (tmp_path / "go").touch()
    report = barrier.value()
    assert report.failed_count == 0
    assert 2 <= report.succeeded <= 3
    assert list(results) == [1000, *range(1, 50)]


def test_a_source_may_use_the_dispatcher(disp: Dispatcher) -> None:
    def source() -> Iterator[int]:
        for number in range(20):
            yield disp.dispatch(Job(echo, number)).result(20)
            disp.barrier(timeout=20)

    assert list(disp.map(square, source())) == [n * n for n in range(20)]


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"chunksize": 0}, ConfigError, "chunksize must be at least 1, not 0"),
        ({"chunksize": -3}, ConfigError, "chunksize"),
        ({"chunksize": 1.5}, ConfigTypeError, "chunksize"),
        ({"chunksize": True}, ConfigTypeError, "chunksize"),
        ({"chunksize": None}, ConfigTypeError, "chunksize"),
        ({"chunksize": "automatic"}, ConfigError, "chunksize must be a whole number or 'auto'"),
        ({"buffersize": 0}, ConfigError, "buffersize must be at least 1, not 0"),
        ({"buffersize": -1}, ConfigError, "buffersize"),
        ({"buffersize": 2.0}, ConfigTypeError, "buffersize"),
        ({"timeout": 0}, ConfigError, "timeout"),
        ({"timeout": -1}, ConfigError, "timeout"),
        ({"timeout": float("nan")}, ConfigError, "timeout"),
        ({"timeout": "1"}, ConfigTypeError, "timeout"),
        ({"priority": 9}, UnknownPriority, "9 has no pool"),
        ({"priority": "high"}, UnknownPriority, "'high'"),
        ({"priority": []}, UnknownPriority, "has no pool"),
    ],
    ids=str,
)
def test_an_option_that_cannot_work_raises_at_once_and_nothing_is_read(
    disp: Dispatcher, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    source = Counted()
    with pytest.raises(error, match=words):
        disp.map(square, source, **options)
    assert source.n_read == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((5, [1]), "fn must be callable, not 5"),
        ((None, [1]), "fn must be callable"),
        ((square,), "at least one iterable"),
        ((square, 5), "map needs iterables, not 5 of type int"),
        ((pow, [1], None), "map needs iterables, not None"),
    ],
)
def test_what_cannot_be_called_or_iterated_raises_at_once(
    disp: Dispatcher, arguments: tuple[Any, ...], words: str
) -> None:
    with pytest.raises(ConfigTypeError, match=words):
        disp.map(*arguments)
    gc.collect()  # half-made objects must not complain


def test_a_function_that_cannot_be_sent_raises_at_once_and_nothing_is_read(disp: Dispatcher) -> None:
    source = Counted()
    with pytest.raises(JobNotPicklable, match="function"):
        disp.map(partial(echo, threading.Lock()), source)
    assert source.n_read == 0


@pytest.mark.parametrize("chunksize", [1, 4, "auto"])
def test_an_error_of_the_iterable_is_raised_after_the_results_of_the_items_before_it(
    disp: Dispatcher, chunksize: Any
) -> None:
    def source() -> Iterator[int]:
        yield from range(10)
        raise ZeroDivisionError("the source is broken")

    results = disp.map(square, source(), chunksize=chunksize)
    assert [next(results) for _ in range(10)] == [n * n for n in range(10)]
    with pytest.raises(ZeroDivisionError, match="the source is broken") as caught:
        next(results)
    assert caught.traceback[-1].name == "source"
    assert list(results) == []
    assert is_quiet(disp)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("ordered", [True, False])
def test_whatever_the_iterable_raises_reaches_the_reader_and_what_was_read_is_given_out(
    disp: Dispatcher, error: type[BaseException], ordered: bool
) -> None:
    def source() -> Iterator[int]:
        yield from range(10)
        raise error

    results = disp.map(square, source(), ordered=ordered)
    found: list[int] = []
    with pytest.raises(error):
        found.extend(results)
    found.extend(results)
    assert sorted(found) == [n * n for n in range(10)]


def test_an_iterable_that_fails_at_once_raises_its_error(disp: Dispatcher) -> None:
    class Broken:
        def __iter__(self) -> Iterator[int]:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        disp.map(square, Broken())
    results = disp.map(square, (1 // 0 for _ in range(3)))
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert next(results, "over") == "over"


# Leaving early


def leave_by_break(results: Any, first: Callable[[], None]) -> None:
    for _ in results:
        first()
        break


def leave_by_exception(results: Any, first: Callable[[], None]) -> None:
    def read() -> None:
        for _ in results:
            first()
            raise LookupError("of the reader")

    with pytest.raises(LookupError, match="of the reader"):
        read()


def leave_by_dropping_a_cycle(results: Any, first: Callable[[], None]) -> None:
    next(results)
    first()
    cycle: list[Any] = [results]
    cycle.append(cycle)


def leave_by_close(results: Any, first: Callable[[], None]) -> None:
    next(results)
    first()
    results.close()
    assert next(results, "over") == "over"


@pytest.mark.parametrize(
    "leave",
    [leave_by_break, leave_by_exception, leave_by_dropping_a_cycle, leave_by_close],
    ids=lambda leave: leave.__name__,
)
def test_leaving_early_lets_the_running_item_end_and_no_other_begin(
    disp: Dispatcher, tmp_path: Path, leave: Callable[[Any, Callable[[], None]], None]
) -> None:
    items = [0, *range(1000, 1100)]

    def wait_until_others_wait() -> None:
        wait_until(lambda: disp.stats()[ONE].waiting > 0 and begun(tmp_path) == [0, 1000])

    # Not a variable: whoever holds the iterator has not left.
    leave(
        disp.map(held, itertools.repeat(tmp_path), items, priority=ONE, chunksize=1), wait_until_others_wait
    )
    gc.collect()
    wait_until(lambda: disp.stats()[ONE].waiting == 0)
    assert disp.stats()[ONE].running == 1
    (tmp_path / "go").touch()
    wait_until(lambda: is_quiet(disp, ONE))
    assert begun(tmp_path) == [0, 1000]
    assert list(disp.map(square, [3], priority=ONE)) == [9]


def test_leaving_early_ends_a_chunk_in_its_middle(disp: Dispatcher, tmp_path: Path) -> None:
    items = [*range(10), *range(1000, 1200)]
    results = disp.map(held, itertools.repeat(tmp_path), items, priority=ONE, chunksize=10)
    assert next(results) == 0
    wait_until(lambda: 1000 in begun(tmp_path))
    results.close()
    (tmp_path / "go").touch()
    wait_until(lambda: is_quiet(disp, ONE))
    assert begun(tmp_path) == [*range(10), 1000]


def test_close_gives_nothing_out_any_more_wherever_the_reader_is(disp: Dispatcher) -> None:
    for n_taken in (0, 1, 5, 10, 20):
        results = disp.map(odd_ones_fail, range(20), chunksize=10)
        for _ in range(n_taken):
            try:
                next(results)
            except ValueError:
                continue
        results.close()
        results.close()
        assert list(results) == []


def test_dropping_a_map_lets_its_source_go(disp: Dispatcher) -> None:
    over = []

    def source() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            over.append(True)

    for result in disp.map(square, source()):
        assert result == 0
        break
    gc.collect()
    assert over


def test_100_maps_that_nobody_reads_to_their_end_leave_nothing(disp: Dispatcher) -> None:
    for number in range(100):
        results = disp.map(square, itertools.count(), priority=number % 2, chunksize=number % 7 + 1)
        assert [next(results) for _ in range(number % 5)] == [n * n for n in range(number % 5)]
        if number % 3:
            results.close()
    del results
    for priority in (PAIR, ONE):
        wait_until(lambda priority=priority: is_quiet(disp, priority))
        wait_until_whole(disp, priority)
    assert disp.jobs("running") == disp.jobs("queued") == []


# In the wrong place

inherited: dict[str, Any] = {}


class Remembered(Dispatcher):
    """A dispatcher that a global knows before its workers are forked."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        inherited["dispatcher"] = self
        super().__init__(*args, **kwargs)


def _map_inside() -> str:
    try:
        return str(list(inherited["dispatcher"].map(square, [3])))
    except NestedDispatch as error:
        return f"NestedDispatch: {error}"


def test_map_inside_a_job_raises() -> None:
    with Remembered([Pool(0, 1, timeout=20, start_method="fork")]) as disp:
        assert disp.dispatch(Job(_map_inside)).result(20).startswith("NestedDispatch: ")
    inherited.clear()


def in_a_copy(action: Callable[[], object]) -> str:
    """Call `action` in a fork of this process; return what it raised, or "nothing"."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "nothing"
        try:
            threading.Timer(10, os._exit, (1,)).start()  # rather than hang
            action()
        except BaseException as error:
            said = type(error).__name__
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    said = os.read(reader, 1000).decode()
    os.close(reader)
    return said


def test_a_forked_copy_of_the_caller_cannot_read_on_and_does_no_harm(
    disp: Dispatcher, tmp_path: Path
) -> None:
    items = [0, *range(1000, 1100)]
    results = disp.map(held, itertools.repeat(tmp_path), items, priority=ONE, chunksize=1)
    assert next(results) == 0
    wait_until(lambda: begun(tmp_path) == [0, 1000])
    assert in_a_copy(lambda: next(results)) == "NestedDispatch"
    assert in_a_copy(lambda: list(results)) == "NestedDispatch"
    assert in_a_copy(results.close) in ("NestedDispatch", "nothing")
    assert in_a_copy(lambda: disp.map(square, [1])) == "NestedDispatch"
    assert in_a_copy(results.__reduce__) != ""  # whatever it says, the copy ends
    (tmp_path / "go").touch()
    assert list(results) == list(range(1000, 1100))


def test_a_copy_that_drops_its_map_does_no_harm(disp: Dispatcher, tmp_path: Path) -> None:
    maps = [disp.map(held, itertools.repeat(tmp_path), [0, *range(1000, 1010)], priority=ONE, chunksize=1)]
    assert next(maps[0]) == 0
    assert in_a_copy(lambda: (maps.clear(), gc.collect())) == "nothing"
    (tmp_path / "go").touch()
    assert list(maps[0]) == list(range(1000, 1010))


def test_a_map_and_single_jobs_share_the_pool(disp: Dispatcher) -> None:
    results = disp.map(square, itertools.count(), priority=ONE, chunksize=1)
    for number in range(50):
        tracker = disp.dispatch(Job(nothing).options(priority=ONE))
        assert next(results) == number * number
        assert tracker.result(20) is None
    assert outcomes(itertools.islice(results, 3)) == [50 * 50, 51 * 51, 52 * 52]
