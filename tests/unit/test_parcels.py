"""Values taken apart into a body and segments, wrapped, and put together again at the other end of a real socket."""

from __future__ import annotations

import contextlib
import errno
import gc
import math
import os
import pickle
import resource
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_segments import kept_segments

from bulkhead import JobNotPicklable, NoSharedMemory
from bulkhead.engines.processes.parcels import LARGE_BODY, Exchange, Opened, Parcel, socket_pair
from bulkhead.engines.processes.payload import pack_call, pack_value, unpack_call, unpack_value
from bulkhead.engines.processes.segments import Borrowed, Segment, SegmentPool
from bulkhead.engines.processes.sharing import Shared

KIB = 1 << 10
MIB = 1 << 20


class Side:
    """One side of the conversation, with the segments that it lends."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        self.segments = SegmentPool(64 * MIB)
        self.exchange = Exchange(line, Borrowed())

    def pack(self, value: Any) -> bytes | Parcel:
        return pack_value(value, self.segments)

    def send(self, value: Any, message: int = 1, extra: Any = None) -> bytes:
        """Return what goes through the pipe for a value."""
        return self.exchange.wrap(self.pack(value), message, extra)

    def read(self, data: bytes, message: int = 1) -> Any:
        opened = self.open(data, message)
        return unpack_value(opened.body, opened.buffers)

    def open(self, data: bytes, message: int = 1) -> Opened:
        return self.exchange.open(self.exchange.unwrap(data), message)

    def lent(self) -> int:
        """Return how many segments are not here, after a look at what has come back."""
        return len(kept_segments()) - self.free()

    def free(self) -> int:
        before = len(kept_segments())
        self.segments.trim(math.inf)
        return before - len(kept_segments())

    def close(self) -> None:
        self.exchange.close()
        self.segments.close()


@pytest.fixture
def sides() -> Iterator[tuple[Side, Side]]:
    here, there = map(Side, socket_pair())
    yield here, there
    here.close()
    there.close()


def number_of_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def array(size: int, value: int = 7) -> np.ndarray:
    return np.full(size, value, np.uint8)


def is_same(one: Any, other: Any) -> bool:
    """Tell whether two values are equal, of the same type, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    return bool(one == other)


# What goes beside the body


@pytest.mark.parametrize("size", [128 * KIB - 1, 128 * KIB, 128 * KIB + 1])
def test_buffers_go_beside_the_body_from_128_kib_on(sides: tuple[Side, Side], size: int) -> None:
    here, there = sides
    packed = here.pack(array(size))
    assert isinstance(packed, Parcel) == (size >= 128 * KIB)
    if isinstance(packed, Parcel):
        assert len(packed.body) < 500
        assert size <= packed.size < size + 500
        del packed
    data = here.send(array(size))
    assert (len(data) < 500) == (size >= 128 * KIB)
    assert np.array_equal(there.read(data), array(size))


@pytest.mark.parametrize("more", [-100, 0, 1])
def test_a_large_body_without_buffers_goes_beside_the_frame(sides: tuple[Side, Side], more: int) -> None:
    here, there = sides
    size = LARGE_BODY + more
    data = here.send(bytes(size))
    assert (len(data) < 500) == (more >= 0)
    assert there.read(data) == bytes(size)


def test_many_small_buffers_together_are_large(sides: tuple[Side, Side]) -> None:
    here, there = sides
    value = [array(4 * KIB, number) for number in range(40)]
    data = here.send(value)
    assert len(data) < 8 * KIB
    assert all(map(np.array_equal, there.read(data), value))


def test_a_small_value_is_bytes_and_nothing_more(sides: tuple[Side, Side]) -> None:
    here, _ = sides
    for value in (None, 1, "text", array(10), [array(0), bytearray(100)]):
        assert type(here.pack(value)) is bytes


_KINDS = {
    "array": lambda size: array(size, size % 250),
    "floats": lambda size: np.arange(size // 8, dtype=np.float64),
    "bytes": lambda size: b"b" * size,
    "bytearray": lambda size: bytearray(b"c" * size),
    "text": lambda size: "d" * size,
    "number": lambda size: size,
}
_PARTS = st.tuples(
    st.sampled_from(sorted(_KINDS)),
    st.sampled_from([0, 1, 5, 100, 64 * KIB, 128 * KIB - 1, 128 * KIB, 300 * KIB, 2 * MIB]),
)
_VALUES = st.recursive(
    _PARTS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.integers(), inner), max_leaves=6
)


def made(recipe: Any) -> Any:
    if isinstance(recipe, tuple):
        kind, size = recipe
        return _KINDS[kind](size)
    if isinstance(recipe, dict):
        return {key: made(value) for key, value in recipe.items()}
    return list(map(made, recipe))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipes=st.lists(_VALUES, min_size=1, max_size=4), keeps=st.integers(0, 3))
def test_whatever_is_sent_arrives_as_it_was(recipes: list[Any], keeps: int) -> None:
    here, there = map(Side, socket_pair())
    held = []
    try:
        for message, recipe in enumerate(recipes, 1):
            arrived = there.read(here.send(made(recipe), message), message)
            assert is_same(arrived, made(recipe))
            if message % 4 == keeps:
                held.append((arrived, recipe))
            del arrived
            here.read(there.send(None, message), message)  # what has come back
        assert all(is_same(arrived, made(recipe)) for arrived, recipe in held)
    finally:
        held.clear()
        here.close()
        there.close()


def test_the_same_array_twice_is_sent_once_and_is_the_same_at_the_other_end(sides: tuple[Side, Side]) -> None:
    here, there = sides
    one = array(MIB)
    packed = here.pack([one, {"again": one}])
    assert isinstance(packed, Parcel)
    assert packed.size < 1.1 * MIB
    first, second = there.read(here.exchange.wrap(packed, 1))
    assert first is second["again"]


def test_what_could_not_be_written_to_cannot_be_written_to_there(sides: tuple[Side, Side]) -> None:
    here, there = sides
    for size in (10, MIB):
        fixed, free = array(size), array(size)
        fixed.flags.writeable = False
        arrived = there.read(here.send([fixed, free]))
        assert [one.flags.writeable for one in arrived] == [False, True]


def test_buffers_lie_where_vector_instructions_want_them(sides: tuple[Side, Side]) -> None:
    here, there = sides
    value = [np.arange(n, dtype=np.complex128) for n in (1, 3, 100_001, 7)]
    arrived = there.read(here.send([b"x" * 300 * KIB, b"odd", *value]))
    assert [one.ctypes.data % 64 for one in arrived[2:]] == [0] * 4


# When there is no memory for a segment


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), MemoryError("full")], ids=type)
@pytest.mark.parametrize(
    "value",
    [array(MIB), b"x" * MIB, [array(MIB), b"x" * MIB, array(3), bytearray(MIB)]],
    ids=["array", "bytes", "several"],
)
def test_without_memory_for_a_segment_everything_goes_through_the_pipe(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch, error: Exception, value: Any
) -> None:
    here, there = sides

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(here.segments, "place", fail)
    packed = here.pack(value)
    assert type(packed) is bytes
    arrived = there.read(here.exchange.wrap(packed, 1))
    assert is_same(arrived, value)
    if isinstance(value, np.ndarray):
        assert arrived.flags.writeable


def test_without_memory_for_a_segment_shared_objects_still_go_beside(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = sides
    shared = Shared(array(MIB, 3))

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(here.segments, "place", fail)
    data = here.send([shared, array(MIB, 5), shared, b"x" * MIB])
    assert 2 * MIB < len(data) < 2.1 * MIB
    arrived = there.read(data)
    assert is_same(arrived, [array(MIB, 3), array(MIB, 5), array(MIB, 3), b"x" * MIB])
    assert arrived[0] is arrived[2]
    assert [one.flags.writeable for one in arrived[:2]] == [False, True]


def test_no_descriptor_for_a_segment_means_the_pipe(sides: tuple[Side, Side]) -> None:
    here, there = sides
    with no_more_descriptors():
        packed = here.pack(array(MIB))
        assert type(packed) is bytes
        assert np.array_equal(there.read(here.exchange.wrap(packed, 1)), array(MIB))


@contextlib.contextmanager
def no_more_descriptors() -> Iterator[None]:
    """Let this process open nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = [os.open(os.devnull, os.O_RDONLY)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in opened:
            os.close(fd)


# Lending


def test_a_segment_is_used_again_when_the_other_side_has_said_that_it_has_let_go(
    sides: tuple[Side, Side],
) -> None:
    here, there = sides
    files = set()
    for message in range(1, 20):
        arrived = there.read(here.send(array(MIB, message), message), message)
        assert np.array_equal(arrived, array(MIB, message))
        files |= kept_segments()
        del arrived
        here.read(there.send(None, message), message)
    assert len(files) == 1


def test_a_segment_that_is_kept_there_is_not_used_again(sides: tuple[Side, Side]) -> None:
    here, there = sides
    first = there.read(here.send(array(MIB, 1), 1), 1)
    for message in range(2, 10):
        arrived = there.read(here.send(array(MIB, message), message), message)
        del arrived
        here.read(there.send(None, message), message)
    assert np.array_equal(first, array(MIB, 1))
    assert (here.free(), here.lent()) == (1, 1)
    del first
    here.read(there.send(None, 10), 10)
    assert (here.free(), here.lent()) == (1, 0)


def test_what_the_other_side_had_when_it_forked_is_never_used_again(sides: tuple[Side, Side]) -> None:
    here, there = sides
    arrived = there.read(here.send(array(MIB), 1), 1)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    del arrived
    assert len(kept_segments()) == 1
    here.read(there.send(None, 2), 2)
    assert len(kept_segments()) == 0


def test_what_the_other_side_had_when_it_went_is_never_used_again(sides: tuple[Side, Side]) -> None:
    here, there = sides
    arrived = there.read(here.send(array(MIB), 1), 1)
    here.exchange.close()
    assert here.free() == 0
    assert np.array_equal(arrived, array(MIB))
    del arrived
    assert len(kept_segments()) == 0


def test_a_parcel_that_is_sent_twice_comes_back_when_both_have_let_go(sides: tuple[Side, Side]) -> None:
    here, there = sides
    packed = here.pack(array(MIB))
    first = there.read(here.exchange.wrap(packed, 1), 1)
    first[:] = 99
    second = there.read(here.exchange.wrap(packed, 2), 2)
    assert np.array_equal(second, array(MIB))  # what the first did to it is the first's alone
    del packed, first
    here.read(there.send(None, 3), 3)
    assert here.free() == 0
    del second
    here.read(there.send(None, 4), 4)
    assert here.free() == 1


def test_both_sides_lend_and_return_at_the_same_time(sides: tuple[Side, Side]) -> None:
    here, there = sides
    for message in range(1, 30):
        there_is = there.read(here.send(array(MIB, message), message), message)
        here_is = here.read(there.send(there_is + 1, message), message)
        assert np.array_equal(here_is, array(MIB, message + 1))
        del here_is, there_is
    assert len(kept_segments()) <= 4


def test_notes_come_along(sides: tuple[Side, Side]) -> None:
    here, there = sides
    data = here.exchange.wrap(b"body", 1, ("extra", 2))
    notes = there.exchange.unwrap(data)
    assert notes.extra == ("extra", 2)
    opened = there.exchange.open(notes, 1)
    assert (bytes(opened.body), opened.buffers, opened.size) == (b"body", [], 0)


# When the line is not as it should be


def test_descriptors_of_a_message_that_was_never_read_are_passed_over_and_closed(
    sides: tuple[Side, Side],
) -> None:
    here, there = sides
    shared = [Shared(array(10, number)) for number in range(5)]
    here.send([array(MIB, 1), *shared], 1)
    here.send([array(MIB, 2)], 2)
    before = number_of_descriptors()
    arrived = there.read(here.send([array(MIB, 3), *shared], 3), 3)
    assert [int(one[0]) for one in arrived] == [3, 0, 1, 2, 3, 4]
    del arrived
    there.exchange.drop_shared()
    assert number_of_descriptors() <= before + 2


@pytest.mark.parametrize("garbage", [b"", b"x", b"12345678", b"much longer than a number"])
def test_what_a_job_has_written_into_the_line_does_no_harm(sides: tuple[Side, Side], garbage: bytes) -> None:
    here, there = sides
    here.line.send(garbage)
    data = here.send(array(MIB), 1)
    with contextlib.suppress(OSError):  # this message may be lost, no other
        assert np.array_equal(there.read(data, 1), array(MIB))
    assert np.array_equal(there.read(here.send(array(MIB, 2), 2), 2), array(MIB, 2))


def test_a_descriptor_that_is_missing_is_an_error_and_nothing_stays_open(sides: tuple[Side, Side]) -> None:
    here, there = sides
    data = here.send([array(MIB), Shared(array(10))], 1)
    before = number_of_descriptors()
    _, (fd,), _, _ = socket.recv_fds(there.line, 100, 1)
    os.close(fd)
    with pytest.raises(OSError, match=r"missing|unavailable"):
        there.read(data, 1)
    assert number_of_descriptors() == before
    # The other side may use its segment again.
    here.read(there.send(None, 1), 1)
    assert here.lent() == 0


def test_no_descriptor_left_to_receive_with_is_an_error_that_says_so_and_the_segment_comes_back(
    sides: tuple[Side, Side],
) -> None:
    here, there = sides
    shared = Shared(array(10))
    data = here.send([array(MIB), shared], 1)
    before = number_of_descriptors()
    with no_more_descriptors(), pytest.raises(OSError, match="no file descriptor is left"):
        there.read(data, 1)
    assert number_of_descriptors() == before
    arrived = there.read(here.send([array(MIB, 2), shared], 2), 2)
    assert int(arrived[0][0]) == 2
    del arrived, shared
    there.exchange.drop_shared()
    here.read(there.send(None, 3), 3)
    assert here.lent() == 0


def test_a_shared_object_stays_mapped_for_the_next_message_that_has_it_and_no_longer(
    sides: tuple[Side, Side],
) -> None:
    here, there = sides
    one, other = Shared(array(MIB, 1)), Shared(array(MIB, 2))

    def address(shared: Shared, message: int) -> int:
        found = there.read(here.send(shared, message), message)
        assert int(found[0]) == (1 if shared is one else 2)
        return found.__array_interface__["data"][0]  # type: ignore[no-any-return]

    assert address(one, 1) == address(one, 2)
    assert there.exchange.keeps_shared
    before = number_of_descriptors()
    address(other, 3)
    assert number_of_descriptors() == before
    there.exchange.drop_shared()
    assert not there.exchange.keeps_shared
    assert number_of_descriptors() < before


def test_a_side_that_is_gone_is_no_error_for_who_sends(sides: tuple[Side, Side]) -> None:
    here, there = sides
    there.line.close()
    here.send(array(MIB))  # that it is gone is told elsewhere
    here.exchange.close()
    assert here.lent() == 0


def test_a_line_that_cannot_be_used_is_an_error_and_nothing_is_lent(sides: tuple[Side, Side]) -> None:
    here, _ = sides
    packed = here.pack([array(MIB), Shared(array(10))])
    here.line.close()
    with pytest.raises(OSError, match="Bad file"):
        here.exchange.wrap(packed, 1)
    del packed
    assert here.lent() == 0


def test_all_descriptors_of_the_largest_message_fit_into_the_line_with_those_of_one_that_was_never_read(
    sides: tuple[Side, Side],
) -> None:
    here, there = sides
    here.line.setblocking(False)  # it would wait for ever otherwise
    shared = [Shared(number) for number in range(128)]
    here.send([array(MIB), *shared], 1)
    arrived = there.read(here.send([array(MIB), *shared], 2), 2)
    assert arrived[1:] == list(range(128))


# Calls, shared objects


def test_a_call_with_large_arguments_comes_through(sides: tuple[Side, Side]) -> None:
    here, there = sides
    packed = pack_call(np.add, (array(MIB, 1), array(MIB, 2)), {"dtype": np.uint16}, here.segments)
    opened = there.open(here.exchange.wrap(packed, 1))
    fn, args, kwargs = unpack_call(opened.body, opened.buffers)
    assert int(fn(*args, **kwargs)[0]) == 3
    assert all(not one.flags.owndata for one in args)


def test_a_lambda_with_large_arguments_comes_through_where_cloudpickle_is_installed(
    sides: tuple[Side, Side],
) -> None:
    pytest.importorskip("cloudpickle")
    here, there = sides
    held = array(MIB, 4)
    shared = Shared(array(MIB, 5))
    packed = pack_call(lambda one, two: (held[0], one[0], two[0]), (array(MIB, 6), shared), {}, here.segments)
    data = here.exchange.wrap(packed, 1)
    assert len(data) < 5 * KIB
    opened = there.open(data)
    fn, args, kwargs = unpack_call(opened.body, opened.buffers)
    assert fn(*args, **kwargs) == (4, 6, 5)


def test_a_lambda_as_part_of_a_large_result_comes_through(sides: tuple[Side, Side]) -> None:
    pytest.importorskip("cloudpickle")
    here, there = sides
    number = 40
    found, fn = there.read(here.send([array(MIB), lambda: number + 2]))
    assert np.array_equal(found, array(MIB))
    assert fn() == 42


def test_no_more_than_128_shared_objects_go_into_one_message_and_the_error_says_what_to_do(
    sides: tuple[Side, Side],
) -> None:
    here, there = sides
    shared = [Shared(number) for number in range(129)]
    with pytest.raises(JobNotPicklable, match=r"128 shared objects, not 129; share them together"):
        pack_call(max, (shared,), {}, here.segments)
    assert there.read(here.send(shared[:128])) == list(range(128))
    # The same one counts once.
    assert there.read(here.send([shared[0]] * 200)) == [0] * 200


def test_a_shared_object_costs_a_few_hundred_bytes(sides: tuple[Side, Side]) -> None:
    here, there = sides
    shared = Shared(array(10 * MIB))
    data = here.send(shared)
    assert len(data) < 500
    arrived = there.read(data)
    assert np.array_equal(arrived, array(10 * MIB))
    assert not arrived.flags.writeable


def test_memory_of_a_shared_object_that_was_not_placed_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(NoSharedMemory, match="full"):
        Shared(array(MIB))
    monkeypatch.undo()
    gc.collect()
    assert kept_segments() == set()


def test_a_buffer_whose_bytes_lie_apart_cannot_be_sent(sides: tuple[Side, Side]) -> None:
    here, _ = sides
    apart = pickle.PickleBuffer(array(MIB)[::2])
    with pytest.raises(JobNotPicklable, match="contiguous"):
        pack_call(len, (apart,), {}, here.segments)
    with pytest.raises((BufferError, pickle.PicklingError), match="contiguous"):
        here.pack([array(MIB), apart])
    gc.collect()
    assert here.lent() == 0


def test_an_object_that_refuses_takes_no_segment_with_it(sides: tuple[Side, Side]) -> None:
    here, _ = sides
    with pytest.raises(JobNotPicklable, match="not for you"):
        pack_call(len, (array(MIB), RefusesToBePickled()), {}, here.segments)
    assert (here.free(), here.lent()) == (0, 0)


class RefusesToBePickled:
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("not for you")


def test_a_segment_is_kept_by_its_parcel(sides: tuple[Side, Side]) -> None:
    here, _ = sides
    packed = here.pack(array(MIB))
    assert isinstance(packed, Parcel)
    assert isinstance(packed.segment, Segment)
    assert (here.free(), here.lent()) == (0, 1)
    del packed
    assert here.free() == 1
