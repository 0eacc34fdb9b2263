"""Segments of anonymous memory: filled, lent, mapped, given back, filled again; all in one process."""

from __future__ import annotations

import errno
import gc
import math
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_segments import kept_segments

from bulkhead.engines.processes import pages, segments
from bulkhead.engines.processes.segments import Borrowed, Segment, SegmentPool, create_file, spans_of

KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture
def pool() -> Iterator[SegmentPool]:
    made = SegmentPool(64 * MIB)
    yield made
    made.close()


def content(segment: Segment) -> bytes:
    return os.pread(segment.fd, segment.size, 0)


def inode(segment: Segment) -> int:
    return os.fstat(segment.fd).st_ino


# Placing


@given(sizes=st.lists(st.sampled_from([0, 1, 63, 64, 65, 4095, 4096, 4097, 100_000]), max_size=8))
def test_places_are_aligned_and_do_not_overlap(sizes: list[int]) -> None:
    spans = spans_of([bytes(size) for size in sizes])
    assert [length for _, length in spans] == sizes
    end = 0
    for offset, length in spans:
        assert offset % 64 == 0
        assert end <= offset < end + 64
        end = offset + length


@pytest.mark.parametrize(
    "buffers",
    [
        [b"x"],
        [b"", b"abc", bytearray(b"d" * 65), memoryview(b"e" * 5000)],
        [b"", b""],
        [b"a" * 100, b""],
        [bytes(range(256)) * 40_000, b"end"],
        [b"a" * (8 * MIB), b"b" * (8 * MIB + 1)],
    ],
    ids=["one byte", "several kinds", "nothing", "nothing at the end", "ten megabytes", "steps"],
)
def test_what_was_placed_lies_at_its_places(pool: SegmentPool, buffers: list[Any]) -> None:
    for _ in range(2):  # into fresh pages and into used ones
        segment = pool.place(buffers)
        data = content(segment)
        assert [data[at : at + length] for at, length in spans_of(buffers)] == [bytes(one) for one in buffers]
        assert os.fstat(segment.fd).st_size >= segment.size  # or it could not be mapped
        del segment


def test_a_segment_is_filled_again_when_nobody_refers_to_it(pool: SegmentPool) -> None:
    first = pool.place([b"1" * MIB])
    file, fd = inode(first), first.fd
    second = pool.place([b"2" * MIB])
    assert inode(second) != file  # the first is still referred to
    assert content(first) == b"1" * MIB
    del first
    third = pool.place([b"3" * MIB])
    assert (inode(third), third.fd) == (file, fd)
    assert content(third) == b"3" * MIB
    assert content(second) == b"2" * MIB


def test_a_smaller_and_a_larger_message_go_into_the_same_segment(pool: SegmentPool) -> None:
    sizes = [3 * MIB, 2 * MIB, 5 * MIB, 5 * MIB + 1, 4 * MIB]
    files = set()
    for number, size in enumerate(sizes):
        segment = pool.place([bytes([number]) * size])
        assert content(segment) == bytes([number]) * size
        files.add(inode(segment))
        del segment
    assert len(files) == 1


def test_the_segment_that_fits_best_is_taken(pool: SegmentPool) -> None:
    held = [pool.place([bytes(size * MIB)]) for size in (8, 2, 4)]
    files = {one.size // MIB: inode(one) for one in held}
    held.clear()
    assert inode(pool.place([bytes(3 * MIB)])) == files[4]
    assert inode(pool.place([bytes(2 * MIB)])) == files[2]
    assert inode(pool.place([bytes(5 * MIB)])) == files[8]


def test_a_much_larger_segment_is_not_tied_up_by_something_small(pool: SegmentPool) -> None:
    large = inode(pool.place([bytes(40 * MIB)]))
    small = pool.place([bytes(2 * MIB)])
    assert inode(small) != large
    assert inode(pool.place([bytes(30 * MIB)])) == large


def test_a_segment_that_is_spoilt_is_never_filled_again(pool: SegmentPool) -> None:
    segment = pool.place([bytes(MIB)])
    file = inode(segment)
    segment.spoil()
    assert content(segment) == bytes(MIB)  # spoilt is not gone
    del segment
    assert len(kept_segments()) == 0
    assert inode(pool.place([bytes(MIB)])) != file


# What is kept


def test_no_more_is_kept_than_allowed_and_the_oldest_goes_first() -> None:
    pool = SegmentPool(5 * MIB)
    held = [pool.place([bytes(2 * MIB)]) for _ in range(4)]
    files = [inode(one) for one in held]
    while held:
        del held[0]  # in the order in which they were made
    again = [pool.place([bytes(2 * MIB)]) for _ in range(2)]
    assert {inode(one) for one in again} == set(files[2:])
    assert len(kept_segments()) == 2
    again.clear()
    pool.close()


def test_a_segment_larger_than_what_may_be_kept_goes_at_once() -> None:
    pool = SegmentPool(MIB)
    pool.place([bytes(2 * MIB)])
    pool.trim(0.0)
    assert len(kept_segments()) == 0
    pool.close()


def test_what_was_not_used_for_long_is_given_back_and_what_was_is_kept(
    pool: SegmentPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert pool.next_trim() is None
    held = [pool.place([bytes(MIB)]), pool.place([bytes(MIB)])]
    younger = inode(held[1])
    assert pool.next_trim() is None
    del held[0]
    now = 1004.0
    held.clear()
    due = pool.next_trim()
    assert due is not None
    assert 1000.0 < due <= 1010.0
    pool.trim(due - 0.001)
    assert len(kept_segments()) == 2
    pool.trim(due)
    assert len(kept_segments()) == 1
    assert pool.next_trim() == due + 4.0
    assert inode(pool.place([bytes(MIB)])) == younger
    pool.trim(math.inf)
    assert len(kept_segments()) == 0


def test_a_closed_pool_keeps_nothing_and_what_is_lent_goes_with_its_last_reference() -> None:
    pool = SegmentPool(64 * MIB)
    lent = pool.place([b"lent" * KIB])
    pool.place([bytes(MIB)])
    pool.close()
    assert len(kept_segments()) == 1
    assert content(lent) == b"lent" * KIB
    del lent
    assert len(kept_segments()) == 0
    # Race: a job may be packed while its dispatcher is finalized by another thread; it is refused later.
    late = pool.place([b"late"])
    assert content(late) == b"late"
    del late
    assert len(kept_segments()) == 0


def test_a_segment_that_comes_back_while_the_pool_is_closed_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = SegmentPool(64 * MIB)
    held = [pool.place([bytes(MIB)])]
    clock = time.monotonic

    def close_meanwhile() -> float:  # between the look at whether it is closed and the return of the segment
        pool.close()
        return clock()

    monkeypatch.setattr(time, "monotonic", close_meanwhile)
    held.clear()
    monkeypatch.undo()
    gc.collect()
    assert len(kept_segments()) == 0


class _Model:
    """Fills and frees at random; every segment that is still referred to must keep what was put there."""

    def __init__(self, keep_bytes: int) -> None:
        self.pool = SegmentPool(keep_bytes)
        self.live: list[tuple[Segment, list[bytes]]] = []
        self._made = 0

    def place(self, sizes: list[int]) -> None:
        self._made += 1
        buffers = [bytes([(self._made + n) % 251]) * size for n, size in enumerate(sizes)]
        self.live.append((self.pool.place(buffers), buffers))

    def check(self) -> None:
        assert len({inode(segment) for segment, _ in self.live}) == len(self.live)
        for segment, buffers in self.live:
            data = content(segment)
            assert [data[at : at + n] for at, n in spans_of(buffers)] == buffers


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(
        st.one_of(
            st.lists(st.sampled_from([1, 64, 4096, 100_000, 1_100_000, 3_000_000]), min_size=1, max_size=3),
            st.integers(0, 5),
            st.sampled_from(["trim", "spoil"]),
        ),
        max_size=15,
    ),
    keep_bytes=st.sampled_from([0, MIB, 64 * MIB]),
)
def test_nothing_that_is_referred_to_is_overwritten_whatever_the_order(
    steps: list[Any], keep_bytes: int
) -> None:
    model = _Model(keep_bytes)
    for step in steps:
        if isinstance(step, list):
            model.place(step)
        elif isinstance(step, int):
            del model.live[step : step + 1]
        elif step == "spoil" and model.live:
            model.live[-1][0].spoil()
        else:
            model.pool.trim(math.inf)
        model.check()
    n_live = len(model.live)
    model.pool.close()
    model.check()
    assert len(kept_segments()) == n_live
    model.live.clear()
    assert len(kept_segments()) == 0


# When there is no memory


def failing_write(fd: int, data: Any, offset: int) -> int:
    raise OSError(errno.ENOSPC, "no space")


@pytest.mark.parametrize("is_recycled", [False, True], ids=["fresh", "recycled"])
def test_nothing_is_kept_of_a_segment_that_could_not_be_filled(
    pool: SegmentPool, monkeypatch: pytest.MonkeyPatch, is_recycled: bool
) -> None:
    if is_recycled:
        pool.place([bytes(MIB)])
    monkeypatch.setattr(os, "pwrite", failing_write)
    with pytest.raises(OSError, match="no space"):
        pool.place([bytes(2 * MIB)])
    monkeypatch.undo()
    assert len(kept_segments()) == 0
    assert content(pool.place([b"next"])) == b"next"


def test_a_segment_that_cannot_be_mapped_again_is_an_error_and_nothing_is_kept(
    pool: SegmentPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.place([bytes(MIB)])

    def no_memory(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(mmap, "mmap", no_memory)
    with pytest.raises(OSError, match="no memory"):
        pool.place([bytes(MIB)])
    monkeypatch.undo()
    assert len(kept_segments()) == 0


def test_a_partial_write_is_gone_on_with(pool: SegmentPool, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:10_007], offset))
    data = bytes(range(256)) * 1000
    assert content(pool.place([data, data]))[: len(data)] == data


def interrupted_at(step: int, work: Callable[[], object]) -> bool:
    """Do the work; raise KeyboardInterrupt at the n-th line of the modules that runs. False when there is none."""
    left = step
    struck = False

    def local(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left, struck
        if event == "line":
            if left == 0 and not struck:
                struck = True
                raise KeyboardInterrupt
            left -= 1
        return local

    def trace(frame: FrameType, event: str, _: object) -> Any:
        return local if frame.f_code.co_filename in (segments.__file__, pages.__file__) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return struck


@pytest.mark.parametrize("is_recycled", [False, True], ids=["fresh", "recycled"])
def test_an_interrupt_at_any_line_leaves_no_segment_behind(is_recycled: bool) -> None:
    leaking = []
    for step in range(200):
        pool = SegmentPool(64 * MIB)
        if is_recycled:
            pool.place([bytes(MIB)])

        placed: list[Segment] = []

        def work(pool: SegmentPool = pool, placed: list[Segment] = placed) -> None:
            placed.append(pool.place([bytes(MIB), b"x" * MIB]))

        has_struck = interrupted_at(step, work)
        placed.clear()
        pool.close()
        del pool, work
        if kept_segments():
            leaking.append(step)
            break
        if not has_struck:
            break
    else:
        raise AssertionError("the work never ended")
    assert step > 10
    assert leaking == []


# Mapping


class Done(list[bool]):
    """Calls of `done`."""

    def __call__(self, is_reusable: bool) -> None:
        self.append(is_reusable)


def lent(pool: SegmentPool, data: bytes) -> tuple[Segment, int]:
    """Return a segment, and the descriptor that its borrower gets."""
    segment = pool.place([data])
    return segment, os.dup(segment.fd)


def test_a_mapping_shows_what_was_placed_and_its_writes_are_private(pool: SegmentPool) -> None:
    borrowed, done = Borrowed(), Done()
    segment, fd = lent(pool, b"a" * MIB)
    first = borrowed.map(fd, MIB, done)
    second = borrowed.map(os.dup(segment.fd), MIB, done)
    first[0:3] = b"xyz"
    assert bytes(first[:5]) == b"xyzaa"
    assert bytes(second[:5]) == b"aaaaa"
    assert content(segment) == b"a" * MIB
    assert done == []
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_a_shared_mapping_cannot_be_written_to(pool: SegmentPool) -> None:
    segment, fd = lent(pool, b"a" * MIB)
    view = Borrowed().map(fd, MIB, None)
    assert view.readonly
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 1
    assert content(segment)[:1] == b"a"


def test_a_mapping_is_over_when_the_last_part_of_it_is_gone(pool: SegmentPool) -> None:
    borrowed, done = Borrowed(), Done()
    _, fd = lent(pool, b"a" * MIB)
    view = borrowed.map(fd, MIB, done)
    parts = [view[at : at + 10] for at in (0, 1000, MIB - 10)]
    slice_of_a_part = parts[1][3:5]
    del view
    while parts:
        assert done == []
        del parts[0]
    assert done == []
    assert bytes(slice_of_a_part) == b"aa"
    del slice_of_a_part
    assert done == [True]


def test_a_mapping_in_a_cycle_is_over_when_the_cycle_is_found_and_its_segment_spoilt(
    pool: SegmentPool,
) -> None:
    borrowed, done = Borrowed(), Done()
    _, fd = lent(pool, b"a" * MIB)
    cycle: list[Any] = [borrowed.map(fd, MIB, done)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert done == [False]
    assert not borrowed.has_mapped


class Keeper:
    """A cycle that keeps what it holds from going with it."""

    kept: ClassVar[list[Any]] = []

    def __init__(self, held: Any) -> None:
        self.me = self
        self.held = held

    def __del__(self) -> None:
        self.kept.append(self.held)


def test_a_segment_that_a_finalizer_has_kept_from_the_garbage_collector_is_never_reusable(
    pool: SegmentPool,
) -> None:
    done = Done()
    _, fd = lent(pool, b"a" * MIB)
    Keeper(Borrowed().map(fd, MIB, done))
    gc.collect()
    [view] = Keeper.kept
    assert bytes(view[:2]) == b"aa"
    assert done == [False]
    Keeper.kept.clear()


def test_a_segment_that_was_mapped_when_the_process_forked_is_never_reusable(pool: SegmentPool) -> None:
    borrowed, before, after = Borrowed(), Done(), Done()
    _, fd = lent(pool, b"a" * MIB)
    view = borrowed.map(fd, MIB, before)
    fork_and_reap()
    _, fd = lent(pool, b"b" * MIB)
    later = borrowed.map(fd, MIB, after)
    del view, later
    assert before == [False]
    assert after == [True]


def test_a_fork_that_another_thread_makes_just_after_the_mapping_counts(
    pool: SegmentPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    borrowed, done = Borrowed(), Done()
    _, fd = lent(pool, b"a" * MIB)
    make = segments._Mapping

    def map_and_fork(*args: Any, **kwargs: Any) -> mmap.mmap:
        made = make(*args, **kwargs)
        fork_and_reap()
        return made

    monkeypatch.setattr(segments, "_Mapping", map_and_fork)
    view = borrowed.map(fd, MIB, done)
    monkeypatch.undo()
    del view
    assert done == [False]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def fork_and_reap() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def test_beyond_a_number_of_mappings_the_next_are_copied_and_their_segments_come_back_at_once(
    pool: SegmentPool,
) -> None:
    borrowed = Borrowed()
    n = 300
    before = len(os.listdir("/proc/self/fd"))
    views = []
    calls = []
    for number in range(n):
        done = Done()
        segment, fd = lent(pool, bytes([number % 256]) * 5000)
        views.append(borrowed.map(fd, segment.size, done))
        calls.append(done)
        if done:
            del segment  # a lender would fill it again
        else:
            segment.spoil()
    copied = sum(done == [True] for done in calls)
    assert 0 < n - copied <= 128
    assert len(os.listdir("/proc/self/fd")) - before <= n - copied + 4
    assert [bytes(view) for view in views] == [bytes([number % 256]) * 5000 for number in range(n)]
    assert not any(view.readonly for view in views)
    # When mapped ones go, there is room again.
    views.clear()
    done = Done()
    _, fd = lent(pool, bytes(5000))
    view = borrowed.map(fd, 5000, done)
    assert done == []
    del view
    assert done == [True]
    assert {tuple(one) for one in calls} == {(True,)}


def test_what_cannot_be_mapped_is_copied(pool: SegmentPool, monkeypatch: pytest.MonkeyPatch) -> None:
    done = Done()
    _, fd = lent(pool, b"a" * MIB)

    def no_room(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOMEM, "no room")

    monkeypatch.setattr(segments, "_Mapping", no_room)
    view = Borrowed().map(fd, MIB, done)
    monkeypatch.undo()
    assert done == [True]
    assert not view.readonly
    assert bytes(view) == b"a" * MIB


@pytest.mark.parametrize("error", [OSError, MemoryError])
def test_what_can_be_neither_mapped_nor_copied_is_an_error_and_comes_back(
    pool: SegmentPool, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    done = Done()
    _, fd = lent(pool, b"a" * MIB)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("short")

    monkeypatch.setattr(
        segments, "_Mapping", lambda *args, **kwargs: fail() if error is MemoryError else no_room()
    )
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(error, match="short"):
        Borrowed().map(fd, MIB, done)
    monkeypatch.undo()
    assert done == [True]
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def no_room() -> None:
    raise OSError(errno.ENOMEM, "no room")


def test_a_segment_that_is_shorter_than_it_should_be_is_an_oserror_and_closes_its_descriptor() -> None:
    fd = create_file("bulkhead-segment")
    os.pwrite(fd, b"abc", 0)
    for _ in range(2):
        done = Done()
        with pytest.raises(OSError, match=r"\w"):
            Borrowed().map(os.dup(fd), MIB, done)
        assert done == [True]
    os.close(fd)


def test_where_the_system_has_no_anonymous_files_an_unlinked_one_serves(
    pool: SegmentPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    done = Done()
    segment, fd = lent(pool, b"a" * MIB)
    assert os.fstat(segment.fd).st_nlink == 0
    view = Borrowed().map(fd, MIB, done)
    view[0] = 0
    assert content(segment) == b"a" * MIB
    del view, segment
    assert done == [True]
    pool.trim(math.inf)
