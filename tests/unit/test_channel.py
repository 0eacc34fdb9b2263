"""Framed messages over real pipes, taken apart at every byte; no process takes part."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bulkhead.engines.processes import channel
from bulkhead.engines.processes.channel import (
    CHUNK,
    HEADER,
    FrameReader,
    FrameWriter,
    frame,
    read_frame,
    write_all,
)

F_SETPIPE_SZ = 1031
PAGE = 4096
HUNDRED_MEGABYTES = 100_000_000

SIZES = [0, 1, 100, CHUNK - HEADER.size, CHUNK - 1, CHUNK, CHUNK + 1, 1 << 20, (1 << 20) + 1, 3_000_000]


class Pipe(NamedTuple):
    read: int
    write: int


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe(*os.pipe())
    yield made
    for fd in made:
        try:
            os.close(fd)
        except OSError:
            pass


def body_of(size: int) -> bytes:
    return (bytes(range(256)) * (size // 256 + 1))[:size]


def plain(frames: list[channel.Frame]) -> list[tuple[int, int, bytes]]:
    return [(kind, number, bytes(body)) for kind, number, body in frames]


def wait_until(fd: int, event: int) -> None:
    poll = select.poll()
    poll.register(fd, event)
    assert poll.poll(20_000), "nothing happened on the pipe"


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


# The caller reads


def test_a_message_that_comes_byte_by_byte_is_complete_with_its_last_byte(pipe: Pipe) -> None:
    reader = FrameReader(pipe.read)
    data = frame(4, 7, b"hello")
    for byte in data[:-1]:
        os.write(pipe.write, bytes([byte]))
        assert reader.read() == []
    os.write(pipe.write, data[-1:])
    assert plain(reader.read()) == [(4, 7, b"hello")]
    assert reader.read() == []
    assert not reader.is_at_end


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    bodies=st.lists(st.sampled_from([0, 1, 16, 17, 18, 300, 70_000]), max_size=5),
    cuts=st.lists(st.integers(1, 70_000), max_size=8),
)
def test_messages_come_out_as_they_went_in_wherever_the_stream_is_cut(
    bodies: list[int], cuts: list[int]
) -> None:
    sent = [(number % 7, number, body_of(size)) for number, size in enumerate(bodies)]
    stream = b"".join(frame(*one) for one in sent)
    pipe = Pipe(*os.pipe())
    try:
        reader = FrameReader(pipe.read)
        os.set_blocking(pipe.write, False)
        found = []
        while stream:
            cut = cuts.pop(0) if cuts else len(stream)
            taken = os.write(pipe.write, stream[:cut])
            stream = stream[taken:]
            found += reader.read_rest()
        assert plain(found) == sent
    finally:
        os.close(pipe.read)
        os.close(pipe.write)


@pytest.mark.parametrize("size", SIZES)
def test_a_message_of_any_size_reaches_the_caller(pipe: Pipe, size: int) -> None:
    reader = FrameReader(pipe.read)
    body = body_of(size)
    writing = in_thread(lambda: write_all(pipe.write, 5, 2**63, body))
    found: list[channel.Frame] = []
    while not found:
        wait_until(pipe.read, select.POLLIN)
        found = reader.read()
    writing.join()
    assert plain(found) == [(5, 2**63, body)]


def test_a_hundred_megabytes_reach_the_caller_and_the_message_behind_them_too(pipe: Pipe) -> None:
    reader = FrameReader(pipe.read)
    body = bytes(HUNDRED_MEGABYTES)

    def write() -> None:
        write_all(pipe.write, 5, 1, body)
        write_all(pipe.write, 5, 2, b"next")

    writing = in_thread(write)
    found: list[channel.Frame] = []
    while len(found) < 2:
        wait_until(pipe.read, select.POLLIN)
        found += reader.read()
    writing.join()
    assert found[0][2] == body
    assert plain(found[1:]) == [(5, 2, b"next")]


def test_reading_an_empty_pipe_does_not_block(pipe: Pipe) -> None:
    reader = FrameReader(pipe.read)
    assert reader.read() == []
    assert reader.read_rest() == []
    assert not reader.is_at_end


def test_the_caller_does_not_block_in_the_middle_of_a_large_message(pipe: Pipe) -> None:
    reader = FrameReader(pipe.read)
    data = frame(1, 1, body_of(200_000))
    os.write(pipe.write, data[:50_000])
    assert reader.read() == []
    assert reader.read() == []
    assert reader.read_rest() == []
    assert not reader.is_at_end


@pytest.mark.parametrize(
    "cut", [1, HEADER.size - 1, HEADER.size, HEADER.size + 1, 1000, 39_999 + HEADER.size]
)
def test_an_end_in_the_middle_of_a_message_gives_what_was_complete_before_it(pipe: Pipe, cut: int) -> None:
    reader = FrameReader(pipe.read)
    os.write(pipe.write, frame(1, 1, b"whole") + frame(1, 2, body_of(40_000))[:cut])
    os.close(pipe.write)
    assert plain(reader.read_rest()) == [(1, 1, b"whole")]
    assert reader.is_at_end
    assert reader.read_rest() == []


def test_a_clean_end_is_an_end_without_messages(pipe: Pipe) -> None:
    reader = FrameReader(pipe.read)
    os.close(pipe.write)
    assert reader.read() == []
    assert reader.is_at_end


def test_the_rest_that_a_dead_writer_left_is_read_to_its_end(pipe: Pipe) -> None:
    fcntl.fcntl(pipe.write, F_SETPIPE_SZ, 1 << 20)
    reader = FrameReader(pipe.read)
    sent = [(1, number, body_of(size)) for number, size in enumerate([10, 200_000, 0, 300_000, 5])]
    os.write(pipe.write, b"".join(frame(*one) for one in sent))
    os.close(pipe.write)
    assert plain(reader.read_rest()) == sent
    assert reader.is_at_end


GARBAGE = {
    "one byte": b"x",
    "a line": b"hello, world\n",
    "a beginning of the magic": frame(1, 1, b"")[:3] + b"x",
    "ones": b"\xff" * HEADER.size,
    "a page": bytes(range(255, -1, -1)) * 16,
    "a pipe full": b"\x80" * 70_000,
    "an impossible length": HEADER.pack(frame(1, 1, b"")[:4], 1, 1, 2**60),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("before", [b"", frame(1, 1, b"whole")], ids=["alone", "after a message"])
def test_garbage_is_told_and_is_not_an_endless_message(pipe: Pipe, garbage: bytes, before: bytes) -> None:
    fcntl.fcntl(pipe.write, F_SETPIPE_SZ, 1 << 20)
    reader = FrameReader(pipe.read)
    os.write(pipe.write, before)
    assert len(reader.read()) == bool(before)
    assert not reader.is_garbled
    os.write(pipe.write, garbage)
    assert reader.read() == []
    assert reader.is_garbled


def test_garbage_in_front_of_a_message_is_told(pipe: Pipe) -> None:
    reader = FrameReader(pipe.read)
    os.write(pipe.write, b"x" + frame(1, 1, b"whole"))
    assert reader.read() == []
    assert reader.is_garbled


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_a_message_that_came_in_front_of_garbage_counts(pipe: Pipe, garbage: bytes) -> None:
    fcntl.fcntl(pipe.write, F_SETPIPE_SZ, 1 << 20)
    reader = FrameReader(pipe.read)
    os.write(pipe.write, frame(1, 1, b"whole") + garbage)
    assert plain(reader.read()) == [(1, 1, b"whole")]
    assert reader.is_garbled


def test_closing_the_reader_twice_closes_no_foreign_descriptor(pipe: Pipe) -> None:
    reader = FrameReader(pipe.read)
    reader.close()
    other = os.dup(pipe.write)
    try:
        reader.close()
        os.fstat(other)
    finally:
        os.close(other)


# The caller writes


@pytest.mark.parametrize("size", SIZES)
def test_a_message_of_any_size_reaches_the_worker(pipe: Pipe, size: int) -> None:
    writer = FrameWriter(pipe.write)
    body = body_of(size)
    received: list[channel.Frame | None] = []
    reading = in_thread(lambda: received.append(read_frame(pipe.read, b"")))
    done = writer.write(2, 9, body)
    while not done:
        wait_until(pipe.write, select.POLLOUT)
        done = writer.resume()
    reading.join()
    assert received[0] is not None
    assert plain([received[0]]) == [(2, 9, body)]


def test_a_hundred_megabytes_reach_the_worker(pipe: Pipe) -> None:
    writer = FrameWriter(pipe.write)
    body = bytes(HUNDRED_MEGABYTES)
    received: list[channel.Frame | None] = []
    reading = in_thread(lambda: received.append(read_frame(pipe.read, b"")))
    done = writer.write(2, 9, body)
    assert not done
    while not done:
        wait_until(pipe.write, select.POLLOUT)
        done = writer.resume()
    reading.join()
    assert received[0] is not None
    assert received[0][2] == body


def test_a_worker_that_reads_nothing_does_not_hold_the_caller_up(pipe: Pipe) -> None:
    writer = FrameWriter(pipe.write)
    assert not writer.write(2, 1, body_of(500_000))
    assert not writer.resume()
    assert not writer.write(2, 2, b"behind it")
    reader = FrameReader(pipe.read)
    found = []
    while len(found) < 2:
        writer.resume()
        found += reader.read()
    assert writer.resume()
    assert plain(found) == [(2, 1, body_of(500_000)), (2, 2, b"behind it")]


def test_a_small_message_waits_for_room_in_a_full_pipe(pipe: Pipe) -> None:
    writer = FrameWriter(pipe.write)
    filled = 0
    while writer.write(1, filled, b"x" * 1000):
        filled += 1
    reader = FrameReader(pipe.read)
    found = reader.read_rest()
    assert writer.resume()
    found += reader.read_rest()
    assert [number for _, number, _ in found] == list(range(filled + 1))


@pytest.mark.parametrize("size", [0, 5, 400])
def test_a_pipe_that_takes_one_byte_at_a_time_gets_the_whole_message(
    pipe: Pipe, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_one(fd: int, data: bytes | memoryview) -> int:
        return os.write(fd, bytes(data[:1]))

    narrow = SimpleNamespace(write=write_one, set_blocking=os.set_blocking)
    with monkeypatch.context() as patch:
        patch.setattr(channel, "os", narrow)
        writer = FrameWriter(pipe.write)
        if not writer.write(3, 1, body_of(size)):
            assert writer.resume()
        write_all(pipe.write, 3, 2, body_of(size))
    assert plain(FrameReader(pipe.read).read_rest()) == [(3, 1, body_of(size)), (3, 2, body_of(size))]


def test_the_caller_takes_no_notice_of_a_worker_that_is_gone(pipe: Pipe) -> None:
    writer = FrameWriter(pipe.write)
    assert not writer.write(2, 1, body_of(500_000))
    os.close(pipe.read)
    assert writer.resume()
    assert writer.write(2, 2, b"small")
    assert writer.write(2, 3, body_of(500_000))


def test_closing_the_writer_is_the_end_for_the_worker(pipe: Pipe) -> None:
    writer = FrameWriter(pipe.write)
    writer.close()
    writer.close()
    assert os.read(pipe.read, 1) == b""


# The worker


@pytest.mark.parametrize("body", [b"", b"hello", body_of(400)], ids=len)
def test_the_worker_goes_on_from_whatever_it_has_read_of_a_message(body: bytes) -> None:
    data = frame(2, 5, body)
    for cut in range(len(data) + 1):
        read, write = os.pipe()
        try:
            os.write(write, data[cut:])
            found = read_frame(read, data[:cut])
            assert found is not None
            assert plain([found]) == [(2, 5, body)]
        finally:
            os.close(read)
            os.close(write)


@pytest.mark.parametrize("cut", [0, 1, HEADER.size - 1, HEADER.size, HEADER.size + 3])
def test_the_worker_sees_an_end_in_the_middle_of_a_message_as_the_end(pipe: Pipe, cut: int) -> None:
    os.write(pipe.write, frame(2, 5, b"hello")[:cut])
    os.close(pipe.write)
    assert read_frame(pipe.read, b"") is None


@pytest.mark.parametrize("size", [10, CHUNK])
def test_a_worker_whose_caller_is_gone_is_told_so(pipe: Pipe, size: int) -> None:
    os.close(pipe.read)
    with pytest.raises(BrokenPipeError):
        write_all(pipe.write, 5, 1, body_of(size))


def test_a_signal_that_interrupts_the_worker_in_the_middle_of_a_write_costs_no_byte(pipe: Pipe) -> None:
    """Race: a handler that a job has left installed runs while the write waits; write(2) then returns a part."""
    fcntl.fcntl(pipe.write, F_SETPIPE_SZ, PAGE)
    reader = FrameReader(pipe.read)
    found: list[channel.Frame] = []
    body = body_of(30_000)
    before = signal.signal(signal.SIGALRM, lambda *_: found.extend(reader.read_rest()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        write_all(pipe.write, 5, 1, body)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    found.extend(reader.read_rest())
    assert plain(found) == [(5, 1, body)]
