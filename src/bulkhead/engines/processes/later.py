"""A call that is pickled now and sent later, with one more argument in front: of a job that follows another.

Why now: what the caller changes after the dispatch must not reach the job, and what cannot be pickled has to be found
before anything starts. Why not put into shared memory now: the segment would lie there until the job before has ended,
and what it is fed has to travel in one as well. So the large parts are copied once more than those of other jobs.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

from bulkhead.engines.processes.parcels import Parcel
from bulkhead.engines.processes.payload import unpack_call

__all__ = ["Later", "run_later"]

Pack = Callable[..., bytes | Parcel]


class Later:
    """A pickled call. In the job that gets it, it is the call itself: a function, its args and its kwargs.

    Args:
        pack: Packs calls for the pool, as `pack_call` does.
        fn: The function.
        args: Its arguments after the one that it will be fed.
        kwargs: Its keyword arguments.

    Raises:
        JobNotPicklable: With the reason.
    """

    __slots__ = ("_body", "_buffers")

    def __init__(
        self, pack: Pack, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        copies = _Copies()
        packed = pack(fn, args, kwargs, copies)
        self._body: Any = packed
        self._buffers: list[bytearray] = []  # a Token among them stands for a shared object
        if isinstance(packed, Parcel):
            own = iter(copies.placed)
            self._body = next(own) if packed.body_size else packed.body
            first_shared = 0 if packed.segment is None else 1
            for which, _, _ in packed.layout:
                self._buffers.append(
                    next(own) if which < first_shared else packed.shared[which - first_shared]
                )

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        buffers = [pickle.PickleBuffer(buffer) for buffer in self._buffers]
        return unpack_call, (pickle.PickleBuffer(self._body), buffers)


def run_later(previous: Any, call: tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]) -> Any:
    """Make the call in a worker, with what the job is fed as its first argument."""
    fn, args, kwargs = call
    return fn(previous, *args, **kwargs)


class _Copies:
    """Takes the place of a pool's segments: keeps copies in ordinary memory."""

    def __init__(self) -> None:
        self.placed: list[bytearray] = []

    def place(self, views: list[memoryview]) -> _Copies:
        self.placed = [bytearray(view) for view in views]
        return self
