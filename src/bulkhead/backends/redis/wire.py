"""How lists travel to scripts: as columns in one MessagePack argument, far cheaper than an argument for each value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import TypeVar

import msgspec

from bulkhead.errors import MessageTooLarge

__all__ = ["MAX_BATCH", "batches", "check_size", "micros", "millis", "packed", "sized_batches", "text"]

T = TypeVar("T")

# Things in one round trip: a script holds up the server for a few milliseconds, and Lua unpacks some 8,000 at most.
MAX_BATCH = 1000

# Bytes that a server takes as one argument are 512 MiB; the rest is for what goes with the bodies.
_MAX_BYTES = 500 * 1024 * 1024

# Bytes after which a batch that can be cut anywhere is cut: a script holds up the server, and has them in memory twice.
_ENOUGH = 16 * 1024 * 1024

# POSIX seconds, in the year 2255. Lua and sorted sets have floats, which hold no exact microseconds of later instants.
_LAST = 9e9

packed = msgspec.msgpack.Encoder().encode

_TEXT_HEADER = Struct(">BI").pack


def batches(things: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield parts of at most `MAX_BATCH`, in order."""
    for start in range(0, len(things), MAX_BATCH):
        yield things[start : start + MAX_BATCH]


def sized_batches(things: Sequence[T], sizes: Sequence[int]) -> Iterator[Sequence[T]]:
    """Yield parts of at most `MAX_BATCH`, in order, which are cut when they have grown to some MiB."""
    if sum(sizes) < _ENOUGH:
        yield from batches(things)
        return
    start = weight = 0
    for at, size in enumerate(sizes):
        weight += size
        if weight >= _ENOUGH or at + 1 - start == MAX_BATCH:
            yield things[start : at + 1]
            start, weight = at + 1, 0
    if start < len(things):
        yield things[start:]


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
    """Return seconds as microseconds, from 0 to the last exact instant."""
    if seconds <= 0:
        return 0
    return round(seconds * 1_000_000) if seconds < _LAST else round(_LAST * 1_000_000)


def millis(seconds: float) -> int:
    """Return seconds as milliseconds, at least 1."""
    return micros(seconds) // 1000 or 1
