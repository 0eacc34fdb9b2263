"""How lists travel to scripts: as columns in one MessagePack argument, which costs a tenth of an argument for each value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import TypeVar

import msgspec

from bulkhead.errors import MessageTooLarge

__all__ = ["MAX_BATCH", "batches", "check_size", "micros", "millis", "packed", "text"]

T = TypeVar("T")

# Things in one round trip: a script holds up the server for a few milliseconds, and Lua unpacks no more than some 8,000.
MAX_BATCH = 1000

# Bytes that a server takes as one argument are 512 MiB; the rest is for what goes with the bodies.
_MAX_BYTES = 500 * 1024 * 1024

# Why a bound: later instants have no exact microseconds as a float, which is what Lua and sorted sets have.
_LAST_MICROSECOND = 2**53 - 1

packed = msgspec.msgpack.Encoder().encode

_TEXT_HEADER = Struct(">BI").pack


def batches(things: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield parts of at most `MAX_BATCH`, in order."""
    for start in range(0, len(things), MAX_BATCH):
        yield things[start : start + MAX_BATCH]


def text(data: bytes | None) -> msgspec.Raw | None:
    """Return bytes as MessagePack's text, which they need not be: the server's decoder does not know bytes."""
    return None if data is None else msgspec.Raw(_TEXT_HEADER(0xDB, len(data)) + data)


def check_size(sizes: Sequence[int]) -> None:
    """Raise MessageTooLarge if a round trip of things of these sizes in bytes is more than a server takes."""
    for part in batches(sizes):
        size = sum(part)
        if size > _MAX_BYTES:
            raise MessageTooLarge(
                f"{size} bytes in one round trip are more than the {_MAX_BYTES} that Redis takes at once",
                size_bytes=size,
                limit_bytes=_MAX_BYTES,
            )


def micros(seconds: float) -> int:
    """Return seconds as microseconds, at least 0."""
    return min(max(0, round(min(seconds, 1e10) * 1_000_000)), _LAST_MICROSECOND)


def millis(seconds: float) -> int:
    """Return seconds as milliseconds, at least 1."""
    return max(1, micros(seconds) // 1000)
