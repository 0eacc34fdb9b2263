"""Objects that are placed in memory once and mapped by every job that is given them.

A `Shared` is pickled as a buffer out of band that is in a segment already (see parcels.py), so it may stand anywhere in
a job's arguments and its content is never sent. The job gets the object itself: rebuilt from its pickle for each job,
with the large buffers inside it mapped read only and not copied.
"""

from __future__ import annotations

import mmap
import operator
import pickle
import struct
from typing import Any, SupportsIndex

from bulkhead.engines.processes import main_module
from bulkhead.engines.processes.parcels import Token
from bulkhead.engines.processes.segments import Segment, SegmentPool, spans_of
from bulkhead.errors import BulkheadError, JobNotPicklable, NoSharedMemory

__all__ = ["Shared"]

_PROTOCOL = 5
_LENGTH = struct.Struct("<Q")

_ALONE = "a Shared can be sent to jobs of a Dispatcher alone, not pickled or copied in other ways"


class Shared:
    """A handle on an object in shared memory; `Dispatcher.share` makes it.

    Pass it to jobs, also inside lists, dicts or attributes: each job gets the object itself, not the handle. NumPy
    arrays and other buffers in it are mapped, not copied, and cannot be written to; everything else is rebuilt for each
    job. The memory is freed when the last handle is gone, no job that was given it is under way, and no worker keeps a
    part of it.

    Concurrency: any thread, any dispatcher of the process that made it.
    """

    __slots__ = ("__weakref__", "_token")

    def __init__(self, obj: Any) -> None:
        try:
            body, buffers = _pickled(obj)
            if any(isinstance(memoryview(buffer).obj, Token) for buffer in buffers):
                raise TypeError("it holds a Shared; pass that to the job beside it")
            segment = _placed(body, [buffer.raw() for buffer in buffers])
        except (OSError, MemoryError) as error:
            raise NoSharedMemory(f"there is no memory to share an object in: {error}") from error
        except Exception as error:
            name = type(obj).__qualname__
            raise JobNotPicklable(f"an object of type {name} cannot be shared: {error}") from error
        self._token = Token()
        self._token.fd = segment.fd
        self._token.size = segment.size
        self._token.owner = segment

    @property
    def nbytes(self) -> int:
        """Bytes that the object takes in shared memory."""
        return self._token.size

    def get(self) -> Any:
        """Return the object as a job gets it: rebuilt by each call, its buffers read only."""
        mapped = mmap.mmap(self._token.fd, self._token.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        return _attached(memoryview(mapped))

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        if operator.index(protocol) < _PROTOCOL:
            raise JobNotPicklable(_ALONE)
        return _attached, (pickle.PickleBuffer(self._token),)

    def __repr__(self) -> str:
        return f"<Shared {self.nbytes} bytes>"


def _pickled(obj: Any) -> tuple[bytes, list[pickle.PickleBuffer]]:
    buffers: list[pickle.PickleBuffer] = []
    try:
        if type(obj).__module__ == "__main__" and not main_module.is_importable():
            raise TypeError("workers cannot import the main module, where its class is defined")
        return pickle.dumps(obj, _PROTOCOL, buffer_callback=buffers.append), buffers
    except Exception:  # arbitrary code of the user's objects runs here
        try:
            import cloudpickle
        except ImportError:
            cloudpickle = None
        if cloudpickle is None:
            raise
        buffers.clear()
        return cloudpickle.dumps(obj, protocol=_PROTOCOL, buffer_callback=buffers.append), buffers


def _placed(body: bytes, views: list[memoryview]) -> Segment:
    head = pickle.dumps(spans_of([body, *views]), _PROTOCOL)
    segments = SegmentPool(0)
    try:
        segment = segments.place([_LENGTH.pack(len(head)) + head, body, *views])
        segment.seal()  # or a job that writes into a wrong descriptor would change it for all
        return segment
    finally:
        segments.close()  # so that the segment goes with its last reference instead of being kept


def _attached(segment: memoryview | bytearray | bytes) -> Any:
    """Return the object in a segment. Called by the unpickling of a job in a worker."""
    view = memoryview(segment)
    if not view:
        raise BulkheadError(_ALONE)
    (length,) = _LENGTH.unpack_from(view)
    head = view[: _LENGTH.size + length]
    spans = pickle.loads(head[_LENGTH.size :])
    _, (base, _) = spans_of([head, b""])
    body, *buffers = [view[base + offset : base + offset + n] for offset, n in spans]
    return pickle.loads(body, buffers=buffers)
