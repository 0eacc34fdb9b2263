"""Changing a value of the registry that others change, too: by compare-and-set, so that no change is lost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from bulkhead.backends.base import Registry
from bulkhead.errors import BrokerUnavailable

__all__ = ["Shared"]

T = TypeVar("T")
R = TypeVar("R")

# Each try that fails is a success of somebody else; so many in a row mean that something is wrong. Arbitrary.
_TRIES = 200

# Between two tries (seconds), at most.
_PAUSE = 0.005


class Shared(Generic[T]):
    """A value of a type under a key, of which each change is made on what was there just before.

    Args:
        kind: A msgspec.Struct, which can be made without arguments.
    """

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind
        self._decode = msgspec.msgpack.Decoder(kind).decode
        self._encode = msgspec.msgpack.Encoder().encode

    def change(
        self, registry: Registry, key: str, keep: float, change: Callable[[T], tuple[T | None, R]]
    ) -> R:
        """Replace the value by what `change` makes of it, and return what it says beside that.

        Args:
            registry: Where it is.
            key: Its name.
            keep: Seconds for which it is kept.
            change: Gets the value, or a new one; returns the next one, or None where it stays, and what to return.
                May be called several times. A value that equals a new one is removed.

        Raises:
            BrokerUnavailable: The server cannot be reached, or others change it all the time.
        """
        for _ in range(_TRIES):
            entry = registry.get(key)
            version = 0 if entry is None else entry.version
            before = self._kind() if entry is None else self._read(entry.value)
            after, told = change(before)
            if after is None or self._put(registry, key, after, version, keep):
                return told
            time.sleep(random.uniform(0, _PAUSE))
        raise BrokerUnavailable(f"{key!r} was changed by others at each of {_TRIES} tries to change it")

    def _put(self, registry: Registry, key: str, value: T, version: int, keep: float) -> bool:
        if value != self._kind():
            return registry.put(key, self._encode(value), expected=version, keep=keep) is not None
        return version == 0 or registry.delete(key, expected=version)

    def _read(self, data: bytes) -> T:
        try:
            return self._decode(data)
        except msgspec.MsgspecError:
            return self._kind()  # of another version of bulkhead: begin anew
