"""Running a chunk: what is noted before each item, what is recorded when. In this process, with a real black box."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from bulkhead.engines.processes import blackbox
from bulkhead.engines.processes.chunk_runner import ChunkOrder, run_chunk
from bulkhead.engines.processes.payload import unpack_error
from bulkhead.engines.processes.progress import ERROR, VALUES, Progress
from bulkhead.engines.processes.segments import SegmentPool

MESSAGE = 3
N = 20_000


@pytest.fixture
def progress() -> Iterator[Progress]:
    fd = blackbox.create()
    progress = Progress.in_box(fd)
    yield progress
    progress.close()
    os.close(fd)


def run(progress: Progress, fn: Callable[..., Any], items: list[Any], **options: Any) -> None:
    given = {"is_star": False, "is_timed": False, "may_stop": False, "is_exact": False, **options}
    order = ChunkOrder(range(len(items)), **given)
    run_chunk(fn, items, order, MESSAGE, progress, lambda position, packed: True, SegmentPool(0))


def noted_of(progress: Progress) -> tuple[int, int]:
    running = progress.running(MESSAGE)
    assert running is not None
    return running[0], progress.span()


def values_of(progress: Progress) -> list[Any]:
    values: list[Any] = []
    for first, n, kind, body in sorted(progress.records(MESSAGE), key=lambda record: record[0]):
        assert first == len(values)
        values += pickle.loads(body) if kind == VALUES else [pickle.loads(body)] * n
        assert len(values) == first + n
    return values


@pytest.mark.parametrize("is_star", [False, True])
def test_very_short_items_are_noted_by_the_block_and_the_running_one_is_in_it(
    progress: Progress, is_star: bool
) -> None:
    seen: list[tuple[int, int]] = []

    def look(_: int) -> None:
        seen.append(noted_of(progress))

    def do_nothing(number: int) -> None:
        if number % 1000 == 999:  # Why seldom: looking takes longer than a very short item may
            look(number)

    items = list(range(N))
    for _ in range(50):  # Why several times: on a busy machine nothing is very short
        seen.clear()
        run(progress, do_nothing, [(one,) for one in items] if is_star else items, is_star=is_star)
        if any(
            span >= 256 for _, span in seen
        ):  # one that was not quite so short makes the next block smaller
            break
    assert 256 <= max(span for _, span in seen) <= 1024
    for number, (first, span) in zip(range(999, N, 1000), seen, strict=True):
        assert first <= number < first + span
    assert values_of(progress) == [None] * N


@pytest.mark.parametrize("options", [{"is_exact": True}, {"is_timed": True}], ids=str)
def test_with_a_chunksize_or_a_time_limit_each_item_is_noted(progress: Progress, options: Any) -> None:
    seen: list[tuple[int, int]] = []

    def do_nothing(number: int) -> None:
        if number % 1000 == 999:
            seen.append(noted_of(progress))

    run(progress, do_nothing, list(range(N)), **options)
    assert seen == [(number, 1) for number in range(999, N, 1000)]


def test_items_that_are_not_very_short_are_noted_one_by_one(progress: Progress) -> None:
    seen: list[tuple[int, int]] = []

    def take_some_time(_: int) -> None:
        seen.append(noted_of(progress))
        end = time.perf_counter() + 3e-6
        while time.perf_counter() < end:
            pass

    run(progress, take_some_time, list(range(2000)))
    assert seen == [(number, 1) for number in range(2000)]


def test_after_a_long_item_the_next_ones_are_noted_one_by_one(progress: Progress) -> None:
    seen: dict[int, tuple[int, int]] = {}
    behind = range(10_064, 10_104)  # beyond the piece that the long one may be in

    def do_nothing(number: int) -> None:
        if number == 10_000:
            time.sleep(0.01)
        elif number in behind:
            seen[number] = noted_of(progress)

    run(progress, do_nothing, list(range(N)))
    assert seen == {number: (number, 1) for number in behind}


def test_the_result_of_an_item_that_takes_some_time_is_recorded_before_the_next_one_begins(
    progress: Progress,
) -> None:
    recorded: list[int] = []

    def take_some_time(_: int) -> int:
        recorded.append(sum(n for _, n, _, _ in progress.records(MESSAGE)))
        time.sleep(100e-6)
        return len(recorded)

    run(progress, take_some_time, list(range(20)))
    assert recorded == list(range(20))


@pytest.mark.parametrize("options", [{"is_exact": True}, {"is_timed": True}], ids=str)
def test_with_a_chunksize_or_a_time_limit_a_long_item_among_short_ones_is_recorded_before_the_next_one_begins(
    progress: Progress, options: Any
) -> None:
    recorded: list[int] = []

    def do_nothing(number: int) -> None:
        if number == 10_000:
            time.sleep(100e-6)
        elif number == 10_001:
            recorded.append(sum(n for _, n, _, _ in progress.records(MESSAGE)))

    run(progress, do_nothing, list(range(N)), **options)
    assert recorded == [10_001]


@pytest.mark.parametrize("usual", [None, 5], ids=["None", "a number"])
@pytest.mark.parametrize("is_star", [False, True])
@pytest.mark.parametrize("is_stopped", [False, True], ids=["given back", "stopped"])
def test_when_items_become_long_few_more_of_their_block_begin(
    progress: Progress, usual: int | None, is_star: bool, is_stopped: bool
) -> None:
    """Nobody wants them any more, or others are to have them."""
    begun: list[int] = []

    def do_nothing(number: int) -> int | None:
        if number >= 10_000:
            begun.append(number)
            if len(begun) == 1:
                time.sleep(0.06)
                if is_stopped:
                    progress.stop(MESSAGE)
        return usual

    items: list[Any] = [(one,) for one in range(N)] if is_star else list(range(N))
    for _ in range(
        50
    ):  # Why several times: where this process stands still for long they are given back before
        run(progress, do_nothing, items, is_star=is_star, may_stop=not is_stopped)
        if begun:
            break
    assert 1 <= len(begun) <= 64
    assert values_of(progress) == [usual] * (begun[-1] + 1)


@pytest.mark.parametrize("n", [1, 5, 64, 65, 1000])
@pytest.mark.parametrize("options", [{}, {"is_exact": True}], ids=str)
def test_what_is_raised_behind_the_last_item_is_no_items(progress: Progress, n: int, options: Any) -> None:
    """As the handler of a signal may that an item has asked for."""

    def tracer(frame: FrameType, *_: Any) -> Any:
        if len(frame.f_locals["values"]) == n:
            sys.settrace(before)
            frame.f_trace = None
            raise TimeoutError("too late")
        return tracer

    def raise_later(number: int) -> int:
        if number == n - 1:
            sys._getframe(1).f_trace = tracer
            sys.settrace(lambda *_: None)
        return number

    before = sys.gettrace()
    try:
        run(progress, raise_later, list(range(n)), **options)
    finally:
        sys.settrace(before)
    assert values_of(progress) == list(range(n))


def test_a_result_whose_class_cannot_be_hashed_fails_its_item_alone(progress: Progress) -> None:
    class Equal(type):
        def __eq__(cls, other: object) -> bool:
            return NotImplemented

    class Odd(metaclass=Equal):
        pass

    run(progress, lambda number: Odd() if number == 700 else number, list(range(2000)))
    records = sorted(progress.records(MESSAGE), key=lambda record: record[0])
    assert [(first, n) for first, n, kind, _ in records if kind == ERROR] == [(700, 1)]
    assert sum(n for _, n, _, _ in records) == 2000


@pytest.mark.parametrize("is_star", [False, True])
@pytest.mark.parametrize("usual", [None, 5], ids=["None", "a number"])
def test_each_item_keeps_its_place_whatever_those_before_it_have_returned_or_raised(
    progress: Progress, usual: int | None, is_star: bool
) -> None:
    unusual = {
        1000: 7,
        1001: None,
        3000: [1],
        3001: ValueError("3001"),
        9999: ValueError("9999"),
        15_000: "x",
    }

    def look_up(number: int) -> Any:
        found = unusual.get(number, usual)
        if isinstance(found, ValueError):
            raise found
        return found

    run(progress, look_up, [(one,) for one in range(N)] if is_star else list(range(N)), is_star=is_star)
    ended = 0
    for first, n, kind, body in sorted(progress.records(MESSAGE), key=lambda record: record[0]):
        assert first == ended
        ended += n
        if kind == ERROR:
            assert str(unpack_error(body)) == str(first)
            continue
        values = pickle.loads(body) if kind == VALUES else [pickle.loads(body)] * n
        assert values == [unusual.get(number, usual) for number in range(first, first + n)]
    assert ended == N


def test_a_result_that_may_change_is_pickled_before_the_next_item_runs(progress: Progress) -> None:
    """Also when it is the last one of a block, and when thousands before it were numbers."""
    kept: list[int] = []

    def keep(number: int) -> Any:
        kept.append(number)
        return kept[-3:] if number % 1000 == 0 else number

    items = list(range(5000))
    run(progress, keep, items)
    expected = [items[max(number - 2, 0) : number + 1] if number % 1000 == 0 else number for number in items]
    assert values_of(progress) == expected

    grown: list[int] = []

    def grow(number: int) -> Any:
        grown.append(number)
        return grown

    run(progress, grow, list(range(50)))
    assert [len(one) for one in values_of(progress)] == list(range(1, 51))
