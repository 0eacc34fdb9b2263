"""What new processes alone may inherit: locks, queues, pipes and shared values of multiprocessing, for initializers.

Such an object refuses to be pickled but for a process that is about to start: then what it holds of descriptors goes
the way of that process. Here that is each worker's line for descriptors, before the worker reads its setup. A worker is
replaced later with the same ones, so the pool keeps copies of them.

Semaphores and locks go by their names. One that was made for start method fork has none, and cannot be given to a pool
of another start method: multiprocessing says so.

Connections are known to the pickler of multiprocessing alone; any other would send the bare number of a descriptor.

Source: the part of `multiprocessing.popen_spawn_posix.Popen` that its pickling asks for.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import context
from multiprocessing.reduction import ForkingPickler
from typing import Any

__all__ = ["Heritage", "collecting", "dumps", "inheriting"]

# Owner: the worker, while it unpickles its initializer.
_received: list[int] = []


class Heritage:
    """Descriptors that every worker of a pool gets a copy of. Owner: the pool.

    Attributes:
        fds: Those, in the order in which the pickled objects count them.
    """

    def __init__(self) -> None:
        self.fds: list[int] = []

    def close(self) -> None:
        """Close them. Does no harm twice."""
        while self.fds:
            os.close(self.fds.pop())

    def __del__(self) -> None:
        self.close()


class _Descriptor:
    """What a pickled object holds instead of a descriptor."""

    def __init__(self, index: int) -> None:
        self._index = index

    def detach(self) -> int:
        """Return a descriptor of this process; it is the caller's to close."""
        return os.dup(_received[self._index])


class _Start:
    """Stands for a process that is about to start."""

    DupFd = _Descriptor  # the name that multiprocessing looks for

    def __init__(self, heritage: Heritage) -> None:
        self._heritage = heritage

    def duplicate_for_child(self, fd: int) -> int:
        """Keep a copy of a descriptor; return what `_Descriptor` takes."""
        self._heritage.fds.append(os.dup(fd))
        return len(self._heritage.fds) - 1


@contextmanager
def collecting(heritage: Heritage) -> Iterator[None]:
    """While this lasts, what this thread pickles may be inherited; its descriptors are added to `heritage`."""
    spawning: Any = context
    before = spawning.get_spawning_popen()
    spawning.set_spawning_popen(_Start(heritage))  # of this thread alone
    try:
        yield
    finally:
        spawning.set_spawning_popen(before)


def dumps(value: Any, protocol: int, buffer_callback: Any = None, kind: Any = pickle.Pickler) -> bytes:
    """As `pickle.dumps`, with what multiprocessing knows of its own types.

    Args:
        value: As there.
        protocol: As there.
        buffer_callback: As there.
        kind: The class of the pickler.
    """
    data = io.BytesIO()
    table: Any = ForkingPickler(io.BytesIO()).dispatch_table
    of_kind: Any = getattr(kind, "dispatch_table", None)
    if isinstance(of_kind, Mapping):
        table = ChainMap(table, of_kind)  # type: ignore[arg-type]
    # Why a class: the pickler looks there, and does so when it is made.
    knowing = type("Pickler", (kind,), {"dispatch_table": table})
    knowing(data, protocol, buffer_callback=buffer_callback).dump(value)
    return data.getvalue()


@contextmanager
def inheriting(fds: list[int]) -> Iterator[None]:
    """While this lasts, what is unpickled finds these descriptors; they are closed then."""
    _received[:] = fds
    try:
        yield
    finally:
        while _received:
            os.close(_received.pop())
