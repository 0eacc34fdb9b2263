"""How large a value may be: SQLite takes a row of up to 1,000,000,000 bytes, with all its columns."""

from __future__ import annotations

from bulkhead.errors import MessageTooLarge

__all__ = ["check_size"]

# Bytes, with room for the other columns of the row.
LIMIT = 999_000_000


def check_size(what: str, *values: bytes | None) -> None:
    """Raise `MessageTooLarge` when these are too large for one row."""
    size = sum(len(value) for value in values if value is not None)
    if size > LIMIT:
        raise MessageTooLarge(
            f"{what} has {size} bytes, and the file takes {LIMIT}: keep it in a file of its own, and its name here",
            size_bytes=size,
            limit_bytes=LIMIT,
        )
