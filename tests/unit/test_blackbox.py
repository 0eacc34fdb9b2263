"""What a worker leaves behind: a ring of output that wraps around, the last message read, the stacks."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bulkhead.engines.processes.blackbox import BlackBox, ReadMark, create, recover

RING = 8192


@pytest.fixture
def fd() -> Iterator[int]:
    made = create()
    yield made
    os.close(made)


def test_an_empty_box_tells_nothing(fd: int) -> None:
    assert recover(fd) == (0, "", "")


def test_the_last_message_that_was_read_is_known(fd: int) -> None:
    box = BlackBox(fd)
    for number in (1, 2, 2**40):
        box.note_read(number)
        assert recover(fd).last_read == number


def test_output_is_recovered_in_its_order(fd: int) -> None:
    box = BlackBox(fd)
    assert not box.has_output
    for text in ("one\n", "", "two", " and three\n"):
        box.record(text)
    assert box.has_output
    assert recover(fd).output == "one\ntwo and three\n"


@pytest.mark.parametrize("size", [RING - 1, RING, RING + 1, 2 * RING, 3 * RING + 5, 1_000_000])
def test_of_a_long_text_the_end_is_kept(fd: int, size: int) -> None:
    text = "".join(str(number % 10) for number in range(size))
    BlackBox(fd).record(text)
    assert recover(fd).output == text[-RING:]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 3 * RING), max_size=8))
def test_the_ring_holds_the_end_of_everything_that_was_printed(sizes: list[int]) -> None:
    fd = create()
    try:
        box = BlackBox(fd)
        printed = ""
        for number, size in enumerate(sizes):
            text = (chr(ord("a") + number) + "0123456789") * (size // 11)
            box.record(text)
            printed += text
        assert recover(fd).output == printed[-RING:]
    finally:
        os.close(fd)


@pytest.mark.parametrize("earlier", [0, 10, RING - 3, RING, 3 * RING + 7])
@pytest.mark.parametrize("later", [0, 5, RING - 1, RING, RING + 1, 2 * RING])
def test_only_what_was_printed_since_the_last_message_is_recovered(fd: int, earlier: int, later: int) -> None:
    box = BlackBox(fd)
    box.record("e" * earlier)
    box.note_read(1)
    text = "".join(str(number % 10) for number in range(later))
    box.record(text)
    assert recover(fd).output == text[-RING:]


def test_the_caller_sees_how_far_the_worker_has_read(fd: int) -> None:
    mark = ReadMark(fd)
    box = BlackBox(fd)
    assert mark.last_read() == 0
    box.note_read(7)
    assert mark.last_read() == 7
    mark.close()
    mark.close()
    assert mark.last_read() == -1


@pytest.mark.parametrize("character", ["é", "€", "🐟"])
@pytest.mark.parametrize("prefix", ["", "x", "xy", "xyz"])
def test_a_character_that_the_ring_cuts_in_two_spoils_only_itself(
    fd: int, character: str, prefix: str
) -> None:
    box = BlackBox(fd)
    width = len(character.encode())
    box.record(prefix + character * (2 * RING // width))
    output = recover(fd).output
    assert output.lstrip("\ufffd") == character * (RING // width)
    assert output.count("\ufffd") < width


def test_characters_that_come_one_by_one_survive_the_end_of_the_ring(fd: int) -> None:
    box = BlackBox(fd)
    box.record("x" * (RING - 1))
    box.record("🐟!")
    assert recover(fd).output == "x" * (RING - 5) + "🐟!"


def test_text_that_is_no_unicode_is_recorded_with_replacements(fd: int) -> None:
    BlackBox(fd).record("before \udcff after")
    assert recover(fd).output == "before ? after"


def test_stacks_are_read_from_behind_the_ring(fd: int) -> None:
    BlackBox(fd).record("x" * (2 * RING))
    os.lseek(fd, 16384, os.SEEK_SET)
    os.write(fd, b"Fatal Python error: \xff" + b"s" * 100_000)
    stack = recover(fd).stack
    assert stack.startswith("Fatal Python error: \ufffd")
    assert len(stack) < 100_000, "of a bounded size"
    assert recover(fd).output == "x" * RING


def test_the_box_has_no_name_that_would_have_to_be_removed(fd: int) -> None:
    assert os.fstat(fd).st_nlink == 0


def test_a_second_message_may_be_taken_back_when_the_worker_is_past_the_first(fd: int) -> None:
    box, mark = BlackBox(fd), ReadMark(fd)
    try:
        assert mark.may_take_back()
        box.note_read(1)
        assert mark.take_back(3)
        assert not mark.may_take_back()
        box.note_read(3)
        assert not mark.may_take_back()  # it has still to look whether it may begin
        assert not box.claim(3)
        box.note_read(5)
        assert mark.may_take_back()
    finally:
        mark.close()
    assert not mark.may_take_back()
