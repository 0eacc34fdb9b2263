"""How many items a chunk has, and how a source is read for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from map_jobs import Counted

from bulkhead import ConfigTypeError, mapping
from bulkhead.mapping import MapOptions, _Input, _length_hint, _Sizing, _zipped

SECONDS = mapping._CHUNK_SECONDS
BYTES = mapping._CHUNK_BYTES


class Clock:
    """Stands in for the `time` module: a busy machine must not make a source slow."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(mapping, "time", made)
    return made


def sizing(
    *,
    chunksize: Any = "auto",
    buffersize: int | None = None,
    n_workers: int = 2,
    max_jobs: int | None = None,
) -> _Sizing:
    return _Sizing(MapOptions(True, chunksize, buffersize, None), n_workers, max_jobs)


def a_chunk(n: int, seconds: float | None, size: int = 0, sent: int = 0) -> Any:
    """Return what a chunk of n items tells that has taken so long, with results and a message of so many bytes."""
    return SimpleNamespace(
        n_ended=n, seconds=seconds, size=size, message=SimpleNamespace(size=sent), items=[None] * max(n, 1)
    )


def learned(one: _Sizing, per_item: float, rounds: int = 30, size: int = 0, sent: int = 0) -> int:
    """Return the chunk size after so many chunks whose items take so long and have so many bytes."""
    for _ in range(rounds):
        n = one.size
        one.learn(a_chunk(n, n * per_item, n * size, n * sent))
    return one.size


@pytest.mark.parametrize("per_item", [1e-6, 1e-5, 1e-4, 1e-3])
def test_chunks_of_short_items_come_to_take_some_milliseconds(per_item: float) -> None:
    size = learned(sizing(), per_item)
    expected = min(SECONDS / per_item, mapping._MAX_ITEMS)
    assert 0.5 * expected <= size <= 1.5 * expected
    assert size * per_item < 0.01


@pytest.mark.parametrize("per_item", [0.005, 0.1, 30.0])
def test_long_items_go_alone_from_the_first_on(per_item: float) -> None:
    one = sizing()
    sizes = [learned(one, per_item, rounds=1) for _ in range(10)]
    assert sizes == [1] * 10


def test_items_that_take_no_time_at_all_have_a_largest_chunk() -> None:
    assert learned(sizing(), 0.0) == mapping._MAX_ITEMS


def test_the_first_chunk_has_one_item_and_the_next_ones_grow_step_by_step() -> None:
    one = sizing()
    assert one.size == 1
    one.learn(a_chunk(1, 1e-6))
    assert 1 < one.size <= mapping._GROWTH
    before = one.size
    one.learn(a_chunk(before, before * 1e-6))
    assert before < one.size <= mapping._GROWTH * before


def test_chunks_shrink_soon_when_items_become_long() -> None:
    one = sizing()
    learned(one, 1e-5)
    for _ in range(20):
        one.learn(a_chunk(1, 0.1))
    assert one.size == 1


@pytest.mark.parametrize(("size", "sent"), [(1 << 20, 0), (0, 1 << 20), (1 << 19, 1 << 19)])
def test_large_items_make_small_chunks(size: int, sent: int) -> None:
    assert learned(sizing(), 1e-6, size=size, sent=sent) == pytest.approx(BYTES / (1 << 20), abs=1)
    assert learned(sizing(), 1e-6, size=100 * size, sent=100 * sent) == 1


def test_a_chunk_that_tells_nothing_teaches_nothing() -> None:
    one = sizing()
    learned(one, 1e-4)
    before = one.size
    one.learn(a_chunk(before, None))
    one.learn(a_chunk(0, 5.0))
    assert one.size == before


@pytest.mark.parametrize("per_item", [1e-6, 10.0])
def test_a_chunksize_that_is_named_stays(per_item: float) -> None:
    one = sizing(chunksize=17)
    assert learned(one, per_item) == 17
    assert one.of_next(3) == 17


def test_the_last_chunks_are_smaller_and_no_worker_gets_more_than_its_part_of_the_rest() -> None:
    one = sizing(n_workers=4)
    size = learned(one, 1e-5)
    assert one.of_next(None) == one.of_next(4 * size) == size
    left, sizes = 4 * size, []
    while left > 0:
        sizes.append(min(one.of_next(left), left))
        assert sizes[-1] <= max(left / 4, size / 8)
        left -= sizes[-1]
    assert len(sizes) < 24
    assert learned(sizing(), 1.0) == sizing().of_next(1) == 1


def test_what_is_given_back_is_dealt_to_all_workers() -> None:
    one = sizing(n_workers=4)
    size = learned(one, 1e-5)
    assert (one.of_rest(41), one.of_rest(3), one.of_rest(40 * size)) == (11, 1, size)
    assert sizing(chunksize=17).of_rest(20) == 17


def test_with_a_buffersize_there_are_chunks_enough_for_all_workers() -> None:
    assert learned(sizing(buffersize=100, n_workers=4), 1e-6) * 2 * 4 <= 100
    assert learned(sizing(buffersize=3, n_workers=4), 1e-6) == 1


@pytest.mark.parametrize("options", [{}, {"chunksize": 500}, {"buffersize": 100_000}], ids=str)
def test_no_chunk_has_more_items_than_a_worker_may_do(options: dict[str, Any]) -> None:
    assert learned(sizing(max_jobs=40, **options), 1e-6) == 40
    assert learned(sizing(max_jobs=1, **options), 1e-6) == 1


def test_the_look_ahead_is_a_thousand_items_or_some_chunks_for_each_worker() -> None:
    one = sizing(n_workers=3)
    assert one.lookahead == 1000
    learned(one, 1e-6)
    assert 2 * 3 * one.size <= one.lookahead <= 8 * 3 * one.size


# Reading


def test_as_many_items_are_read_as_are_asked_for() -> None:
    source = Counted()
    one = _Input(source)
    for start in (0, 10, 20):
        assert one.read(10) == list(range(start, start + 10))
        assert source.n_read == start + 10
        assert one.taken() == start
    assert not one.is_at_end


def test_a_source_at_its_end_gives_what_it_has_and_is_known_to_be_at_its_end() -> None:
    source = Counted(7)
    one = _Input(source)
    assert one.read(5) == [0, 1, 2, 3, 4]
    assert one.taken() == 0
    assert one.read(5) == [5, 6]
    assert one.is_at_end
    assert one.taken() == 5
    assert source.n_asked_in_vain == 1


def failing(n: int, error: type[BaseException]) -> Iterator[int]:
    yield from range(n)
    raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("n", [0, 1, 5, 9])
def test_items_before_an_exception_are_kept(n: int, error: type[BaseException]) -> None:
    one = _Input(failing(n, error))
    with pytest.raises(error):
        one.read(10)
    assert one.items == list(range(n))
    assert one.taken() == 0


def test_items_kept_from_an_interrupted_reading_come_first_in_the_next() -> None:
    class Interrupted:
        def __init__(self) -> None:
            self.calls = 0

        def __iter__(self) -> Interrupted:
            return self

        def __next__(self) -> int:
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt
            return self.calls

    one = _Input(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        one.read(6)
    assert one.read(6) == [1, 2, 3, 5, 6, 7]
    assert one.taken() == 0


@pytest.fixture
def slow_source(clock: Clock) -> Callable[[float], Iterator[int]]:
    """Makes a source each of whose items takes so long."""

    def source(pause: float) -> Iterator[int]:
        number = 0
        while True:
            clock.now += pause
            yield number
            number += 1

    return source


def test_a_slow_source_is_read_item_by_item(slow_source: Callable[[float], Iterator[int]]) -> None:
    one = _Input(slow_source(1.0))
    assert one.read(1000) == [0]
    assert one.is_slow
    assert not one.is_at_end
    assert one.taken() == 0
    assert one.read(1000) == [1]


def test_reading_a_chunk_takes_some_milliseconds_at_most(
    slow_source: Callable[[float], Iterator[int]],
) -> None:
    one = _Input(slow_source(0.001))
    n = len(one.read(1000))
    assert mapping._READ_SECONDS / 0.001 <= n <= 3 * mapping._READ_SECONDS / 0.001


def test_a_quick_source_is_not_called_slow(slow_source: Callable[[float], Iterator[int]]) -> None:
    one = _Input(slow_source(1e-7))
    assert len(one.read(1000)) == 1000
    assert not one.is_slow


class Liar:
    def __init__(self, hint: Any) -> None:
        self.hint = hint

    def __iter__(self) -> Iterator[int]:
        return iter(range(10))

    def __length_hint__(self) -> Any:
        if isinstance(self.hint, Exception):
            raise self.hint
        return self.hint


def test_how_many_are_left_is_known_from_any_iterable_that_tells() -> None:
    assert (
        _length_hint(([1, 2, 3],))
        == _length_hint((iter([1, 2, 3]),))
        == _length_hint((range(3), "abcd"))
        == 3
    )
    assert _length_hint((itertools.repeat(1), [1, 2])) == 2
    assert _length_hint((Counted(),)) is None
    one = _Input(iter(range(10)), 10)
    assert one.n_left == 10
    one.read(6)
    one.taken()
    assert one.n_left == 4


@pytest.mark.parametrize("hint", [-1, "3", 2.0, ValueError("no"), NotImplemented], ids=repr)
def test_an_iterable_that_cannot_tell_is_not_asked_again(hint: Any) -> None:
    assert _length_hint((Liar(hint),)) is None


@pytest.mark.parametrize("hint", [0, 3])
def test_when_more_comes_than_was_told_nothing_is_known(hint: int) -> None:
    one = _Input(iter(range(10)), hint)
    one.read(5)
    one.taken()
    assert one.n_left is None
    assert one.read(9) == [5, 6, 7, 8, 9]


# What may be mapped over


def test_one_iterable_gives_its_items_and_several_give_tuples() -> None:
    assert list(_zipped(([1, (2, 3)],))) == [1, (2, 3)]
    assert list(_zipped(([1, 2], "ab", [None]))) == [(1, "a", None)]


@pytest.mark.parametrize("iterables", [(), (5,), ([1], None), ([1], int)])
def test_what_is_not_iterable_is_refused(iterables: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigTypeError):
        _zipped(iterables)
