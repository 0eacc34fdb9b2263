"""One message: a line of JSON with the small values, then the bytes that only travel through."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["pack", "unpack"]

_dumps = json.JSONEncoder(separators=(",", ":")).encode


def pack(facts: list[Any], *blobs: bytes | None) -> bytes:
    """Return facts and blobs as bytes; the sizes of the blobs (-1 for None) go in front of the facts."""
    sizes = [-1 if blob is None else len(blob) for blob in blobs]
    line = _dumps([sizes, *facts]).encode()
    return b"".join([line, b"\n", *[blob for blob in blobs if blob]])


def unpack(data: bytes) -> tuple[list[Any], list[bytes | None]]:
    """Undo `pack`."""
    end = data.index(b"\n")
    sizes, *facts = json.loads(data[:end])
    blobs: list[bytes | None] = []
    at = end + 1
    for size in sizes:
        if size < 0:
            blobs.append(None)
            continue
        blobs.append(data[at : at + size])
        at += size
    return facts, blobs
