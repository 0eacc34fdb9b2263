"""Huge pages for segments: had, entered as such, and done without where they cannot be had."""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from data_jobs import anonymous_bytes
from open_segments import entered_as_huge, kept_segments, need_huge_pages

from bulkhead.engines.processes import pages
from bulkhead.engines.processes.segments import Borrowed, Segment, SegmentPool, create_file

MIB = 1 << 20
HUGE = 2 * MIB
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> pages._System:
    """The system as if it had not been asked for anything yet."""
    need_huge_pages()
    made = pages._System(HUGE)
    monkeypatch.setattr(pages, "_system", lambda: made)
    return made


@pytest.fixture
def pool() -> Iterator[SegmentPool]:
    made = SegmentPool(64 * MIB)
    yield made
    made.close()


def inode(segment: Segment) -> int:
    return os.fstat(segment.fd).st_ino


def content(segment: Segment) -> bytes:
    return os.pread(segment.fd, segment.size, 0)


def mapped(segment: Segment) -> memoryview:
    return Borrowed().map(os.dup(segment.fd), segment.size, lambda _: None)


def data(size: int, number: int = 0) -> bytes:
    return bytes((number + n) % 251 for n in range(251)) * (size // 251) + bytes(size % 251)


# With them


@pytest.mark.usefixtures("system")
def test_a_large_segment_has_huge_pages_and_both_sides_enter_them_as_such(pool: SegmentPool) -> None:
    for number in range(3):  # into fresh pages and into used ones
        sent = data(5 * MIB, number)
        segment = pool.place([sent])
        view = mapped(segment)
        assert view == sent
        assert entered_as_huge(inode(segment)) == {"rw-s": 4 * MIB, "rw-p": 4 * MIB}
        del view, segment


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("size", [HUGE - 1, HUGE, HUGE + 1, 2 * HUGE, 7 * MIB + 5])
def test_huge_pages_take_no_memory_that_small_ones_would_not(pool: SegmentPool, size: int) -> None:
    segment = pool.place([bytes(size)])
    assert size <= os.fstat(segment.fd).st_blocks * 512 < size + 2 * mmap.PAGESIZE
    mapped(segment)
    assert sum(entered_as_huge(inode(segment)).values()) == (size // HUGE * HUGE if size >= HUGE else 0)


@pytest.mark.usefixtures("system")
def test_a_segment_that_grows_has_huge_pages_for_what_is_new(pool: SegmentPool) -> None:
    files = set()
    for number, size in enumerate([MIB, 5 * MIB, 3 * MIB, 9 * MIB + 3]):
        sent = data(size, number)
        segment = pool.place([sent])
        assert content(segment) == sent
        assert mapped(segment) == sent
        files.add(inode(segment))
        huge = entered_as_huge(inode(segment))
        del segment
    assert len(files) == 1
    assert huge["rw-s"] == 8 * MIB


@pytest.mark.usefixtures("system")
def test_a_write_into_a_huge_page_is_private_and_takes_one_small_page(pool: SegmentPool) -> None:
    segment = pool.place([b"a" * 4 * HUGE])
    first, second = mapped(segment), mapped(segment)
    assert first == second
    before = anonymous_bytes()
    first[HUGE + 5 : HUGE + 8] = b"xyz"
    assert anonymous_bytes() - before < MIB
    assert bytes(first[HUGE + 4 : HUGE + 9]) == b"axyza"
    assert second == content(segment) == b"a" * 4 * HUGE


@pytest.mark.usefixtures("system")
def test_what_was_written_into_a_mapping_is_not_in_the_next_one_of_the_same_segment(
    pool: SegmentPool,
) -> None:
    files = set()
    for number in range(5):
        segment = pool.place([bytes([number]) * 5 * MIB])
        view = mapped(segment)
        assert view == bytes([number]) * 5 * MIB
        view[:] = b"w" * 5 * MIB
        assert content(segment) == bytes([number]) * 5 * MIB
        files.add(inode(segment))
        del view, segment
    assert len(files) == 1


@pytest.mark.usefixtures("system")
def test_a_large_segment_can_be_sealed(pool: SegmentPool) -> None:
    pool.place([bytes(5 * MIB)])
    segment = pool.place([b"a" * 5 * MIB])  # whose memory is mapped here
    segment.seal()
    with pytest.raises(PermissionError):
        os.pwrite(segment.fd, b"b", 0)
    view = Borrowed().map(os.dup(segment.fd), segment.size, None)
    assert view == b"a" * 5 * MIB
    segment.spoil()


# Without them


def refuse(*args: Any) -> int:
    return -1


def test_where_the_system_refuses_small_pages_serve_and_it_is_not_asked_again_at_once(
    pool: SegmentPool, system: pages._System, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    advise, asked = system._advise, []

    def refuse_and_note(*args: Any) -> int:
        asked.append(now)
        return -1

    system._advise = refuse_and_note
    held = []
    for number in range(4):
        held.append(pool.place([data(5 * MIB, number)]))
        now += 4.0
    assert asked == [1000.0, 1012.0]
    assert [content(one) for one in held] == [data(5 * MIB, number) for number in range(4)]
    assert [mapped(one) == data(5 * MIB, number) for number, one in enumerate(held)] == [True] * 4
    now += 10.0
    system._advise = advise
    held.append(pool.place([data(5 * MIB, 9)]))
    assert mapped(held[-1]) == data(5 * MIB, 9)
    assert [sum(entered_as_huge(inode(one)).values()) for one in held] == [0] * 4 + [4 * MIB]


def test_where_the_system_gives_a_part_only_the_rest_has_small_pages(
    pool: SegmentPool, system: pages._System
) -> None:
    advise = system._advise

    def give_one(address: int, size: int, advice: int) -> int:
        assert advise(address, HUGE, advice) == 0
        return -1

    system._advise = give_one
    for number in range(3):
        segment = pool.place([data(7 * MIB, number)])
        assert content(segment) == data(7 * MIB, number)
        assert mapped(segment) == data(7 * MIB, number)
        del segment


def no_room(*args: Any, **kwargs: Any) -> Any:
    raise OSError(12, "no room")


def test_without_room_for_more_addresses_the_file_is_mapped_where_there_is_room(
    pool: SegmentPool, system: pages._System
) -> None:
    segment = pool.place([data(5 * MIB)])

    def tight(fd: int, size: int, **kwargs: Any) -> mmap.mmap:
        return no_room() if size > 5 * MIB else mmap.mmap(fd, size, **kwargs)

    owner, start = pages.map_file(segment.fd, 5 * MIB, tight, flags=mmap.MAP_PRIVATE, prot=READ_WRITE)
    assert (start, owner[:]) == (0, data(5 * MIB))


def test_a_segment_that_cannot_be_mapped_is_filled_without(
    pool: SegmentPool, system: pages._System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "map_file", no_room)
    assert content(pool.place([data(5 * MIB)])) == data(5 * MIB)


def test_a_reservation_into_which_nothing_could_be_mapped_is_kept_and_no_other_is_made(
    system: pages._System, pool: SegmentPool
) -> None:
    # Race: another thread may have mapped something where the attempt has left a hole.
    calls = []

    def fail(*args: Any) -> int:
        calls.append(args)
        return 2**64 - 1

    system._map = fail
    for number in range(3):
        segment = pool.place([data(5 * MIB, number)])
        assert mapped(segment) == data(5 * MIB, number)
        del segment
    assert len(calls) == 1
    (reserved,) = system._lost
    assert len(reserved) == 5 * MIB + HUGE


def without_ctypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctypes", None)


def with_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")


def without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_SIZE_FILE", "/proc/self/there is no such file")


@pytest.mark.parametrize("lack", [without_ctypes, with_another_system, without_huge_pages])
def test_where_there_are_none_everything_works_with_small_pages(
    pool: SegmentPool, monkeypatch: pytest.MonkeyPatch, lack: Callable[[pytest.MonkeyPatch], None]
) -> None:
    lack(monkeypatch)
    monkeypatch.setattr(pages, "_system", pages._system.__wrapped__)
    assert pages.huge_page() == 0
    for number, size in enumerate([3 * MIB, 9 * MIB, 5 * MIB]):
        segment = pool.place([data(size, number)])
        assert content(segment) == data(size, number)
        view = mapped(segment)
        assert view == data(size, number)
        view[:] = bytes(size)
        assert content(segment) == data(size, number)
        assert not any(entered_as_huge(inode(segment)).values())
        del segment, view
    assert len(kept_segments()) == 1


def test_a_large_file_that_is_shorter_than_it_should_be_is_an_error() -> None:
    fd = create_file("bulkhead-segment")
    os.pwrite(fd, bytes(5 * MIB), 0)
    with pytest.raises(ValueError, match="size"):
        pages.map_file(fd, 6 * MIB, mmap.mmap, flags=mmap.MAP_PRIVATE, prot=READ_WRITE)
    with pytest.raises(OSError, match="cannot be mapped"):
        Borrowed().map(fd, 6 * MIB, lambda _: None)
