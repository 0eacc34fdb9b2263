"""Calls that are pickled at one time and sent at another (later.py)."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from bulkhead import JobNotPicklable
from bulkhead.engines.processes.later import Later, run_later
from bulkhead.engines.processes.parcels import LARGE_BODY, Parcel, Token
from bulkhead.engines.processes.payload import pack_call, unpack_call
from bulkhead.engines.processes.segments import SegmentPool

LARGE = 2 * LARGE_BODY


class Buffer(bytearray):
    """Leaves its bytes beside its pickle where it may, as an array does."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Buffer, (pickle.PickleBuffer(self),)


class Shared:
    """Stands for a shared object."""

    def __init__(self, token: Token) -> None:
        self.token = token

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return len, (pickle.PickleBuffer(self.token),)


@pytest.fixture
def segments() -> Iterator[SegmentPool]:
    made = SegmentPool(0)
    yield made
    made.close()


def received(packed: bytes | Parcel, segments: SegmentPool) -> Any:
    """Return what the worker's call returns."""
    if isinstance(packed, bytes):
        fn, args, kwargs = unpack_call(packed)
    else:
        whole = memoryview(bytearray(_content(packed)))
        body = whole[: packed.body_size] if packed.body_size else packed.body
        first_shared = 0 if packed.segment is None else 1
        buffers = [
            whole[at : at + n] if which < first_shared else memoryview(b"four")
            for which, at, n in packed.layout
        ]
        fn, args, kwargs = unpack_call(body, buffers)
    return fn(*args, **kwargs)


def _content(parcel: Parcel) -> bytes:
    import os

    return b"" if parcel.segment is None else os.pread(parcel.segment.fd, parcel.segment.size, 0)


def collected(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def sent(call: Later, previous: Any, segments: SegmentPool) -> Any:
    return received(pack_call(run_later, (previous, call), {}, segments), segments)


def test_the_call_is_made_with_what_it_is_fed_in_front(segments: SegmentPool) -> None:
    call = Later(pack_call, collected, (1, [2]), {"three": 3})
    assert sent(call, None, segments) == ((None, 1, [2]), {"three": 3})
    assert sent(call, "again", segments) == (("again", 1, [2]), {"three": 3})


@pytest.mark.parametrize("size", [10, LARGE])
def test_later_changes_of_its_arguments_do_not_reach_it(segments: SegmentPool, size: int) -> None:
    plain, buffer, listed = bytearray(size), Buffer(size), [0]
    call = Later(pack_call, collected, (plain, buffer, listed), {})
    plain[0] = buffer[0] = listed[0] = 1
    (_, *got), _ = sent(call, None, segments)
    assert got == [bytearray(size), bytearray(size), [0]]


def test_large_parts_travel_beside_its_pickle(segments: SegmentPool) -> None:
    call = Later(pack_call, collected, (Buffer(LARGE), b"x" * LARGE, Buffer(b"y" * LARGE)), {})
    packed = pack_call(run_later, (b"z" * LARGE, call), {}, segments)
    assert isinstance(packed, Parcel)
    assert len(packed.layout) == 3
    (previous, one, two, three), _ = received(packed, segments)
    assert (previous, one, two, three) == (b"z" * LARGE, bytearray(LARGE), b"x" * LARGE, b"y" * LARGE)


@pytest.mark.parametrize("size", [10, LARGE])
def test_shared_objects_stay_shared(segments: SegmentPool, size: int) -> None:
    token = Token()
    token.fd, token.size = 5, 4
    call = Later(pack_call, collected, (Shared(token), Buffer(size), Shared(token)), {})
    packed = pack_call(run_later, (None, call), {}, segments)
    assert isinstance(packed, Parcel)
    assert packed.shared == [token]
    assert packed.shared[0] is token
    (_, one, buffer, two), _ = received(packed, segments)
    assert (one, len(buffer), two) == (4, size, 4)


def test_what_cannot_be_pickled_is_found_at_once() -> None:
    with pytest.raises(JobNotPicklable):
        Later(pack_call, collected, (threading.Lock(),), {})
