"""The registry in a KV bucket: a version is the bucket's revision, which the server counts.

Expiry is written in the value, as in `results`. A value that has expired is none: who expects version 0 then replaces
exactly that one.
"""

from __future__ import annotations

from contextlib import aclosing

from bulkhead.backends.base import Entry
from bulkhead.backends.nats.cells import Cell, Cells
from bulkhead.backends.nats.clock import Clock
from bulkhead.backends.nats.layout import Layout
from bulkhead.backends.nats.names import token_of
from bulkhead.backends.nats.packing import pack, unpack
from bulkhead.backends.nats.session import Session
from bulkhead.errors import BrokerUnavailable, MessageTooLarge

__all__ = ["Entries"]

# Attempts to change a value that others change, too, where the caller does not mind what it was.
_ATTEMPTS = 50


class Entries:
    """What `Registry` promises, in the loop's thread."""

    def __init__(self, session: Session, clock: Clock, layout: Layout) -> None:
        self._session = session
        self._clock = clock
        self._cells = Cells(session, clock, layout.registry_stream, layout.registry, _is_over)

    async def get(self, key: str) -> Entry | None:
        """As `Registry.get`."""
        return self._read((await self._cells.get_named([key]))[0])

    async def put(self, key: str, value: bytes, expected: int | None, keep: float | None) -> int | None:
        """As `Registry.put`."""
        until = None if keep is None else self._clock.now() + keep
        data = pack([until, key], value)
        if len(data) > self._session.room:
            raise MessageTooLarge(
                f"registry value {key!r} has {len(data)} bytes; this NATS server takes {self._session.room}",
                size_bytes=len(data),
                limit_bytes=self._session.room,
            )
        if expected == 0:
            cell = (await self._cells.get_named([key]))[0]
            if self._read(cell) is not None:
                return None
            expected = 0 if cell is None else cell.version
        elif expected is not None and await self._has_expired(key):
            return None
        self._cells.owe(1)
        return (await self._cells.put([(token_of(key), data, expected)]))[0]

    async def delete(self, key: str, expected: int | None) -> bool:
        """As `Registry.delete`."""
        for _ in range(_ATTEMPTS):
            entry = await self.get(key)
            if entry is None or expected not in (None, entry.version):
                return False
            if (await self._cells.put([(token_of(key), b"", entry.version)]))[0] is not None:
                self._cells.owe(1)
                return True
        raise BrokerUnavailable(f"registry value {key!r} is changed by others all the time")

    async def entries(self, prefix: str) -> list[Entry]:
        """As `Registry.entries`. Cost: reads the whole bucket."""
        found: dict[str, Entry] = {}
        async with aclosing(self._cells.scan()) as cells:
            async for cell in cells:
                entry = self._read(cell)
                if entry is not None and entry.key.startswith(prefix):
                    found[entry.key] = entry
        return sorted(found.values(), key=lambda entry: entry.key)

    async def _has_expired(self, key: str) -> bool:
        return self._read((await self._cells.get_named([key]))[0]) is None

    def _read(self, cell: Cell | None) -> Entry | None:
        if cell is None or not cell.data:
            return None
        (until, key), (value,) = unpack(cell.data)
        if until is not None and until <= self._clock.now():
            return None
        return Entry(key, value or b"", cell.version)


def _is_over(data: bytes, at: float) -> bool:
    if not data:
        return True
    until = unpack(data)[0][0]
    return until is not None and float(until) <= at
