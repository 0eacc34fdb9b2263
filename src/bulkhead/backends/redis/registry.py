"""The registry on Redis: one hash for each value, which may expire, and a sorted set of their keys."""

from __future__ import annotations

from bulkhead.backends.base import Entry, Registry
from bulkhead.backends.redis.link import Link
from bulkhead.backends.redis.script import script
from bulkhead.backends.redis.wire import check_size, millis

__all__ = ["RedisRegistry"]

_PUT = script("put", "registry_common")
_DROP = script("drop", "registry_common")
_ENTRIES = script("entries", "registry_common")


class RedisRegistry(Registry):
    """Small values in a Redis.

    Args:
        link: Where they are. Closed with the registry.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    def get(self, key: str) -> Entry | None:
        """See `Registry`."""
        value, version = self._link.command("HMGET", self._link.key(f"entry:{key}"), "value", "version")
        return None if value is None else Entry(key, value, int(version))

    def put(
        self, key: str, value: bytes, *, expected: int | None = None, keep: float | None = None
    ) -> int | None:
        """See `Registry`."""
        check_size([len(value)])
        wanted = "" if expected is None else str(expected)
        arguments = (key, value, wanted, "" if keep is None else millis(keep))
        # Repeated where any version will do: the value is the same, and the version is the last one.
        return self._link.run(_PUT, (), arguments, is_repeatable=expected is None) or None

    def delete(self, key: str, *, expected: int | None = None) -> bool:
        """See `Registry`."""
        return bool(self._link.run(_DROP, (), [key, "" if expected is None else str(expected)]))

    def entries(self, prefix: str) -> list[Entry]:
        """See `Registry`."""
        rows = self._link.run(_ENTRIES, (), [prefix], is_repeatable=True)
        return [Entry(key.decode(), value, int(version)) for key, value, version in rows]

    def close(self) -> None:
        """End the connections."""
        self._link.close()
