"""A pickled value with its large parts beside it: what travels between caller and worker when bytes are not enough.

    value ── pickle 5 ──▶ body, buffers ──▶ segment ── descriptor through a socket ──▶ mapping ──▶ value
                            └───────────── frame through the pipe: notes, and the body if it is small

Small values never come here. When there is no memory for a segment, everything goes through the pipe, in the body.

The descriptors go first, each in a message of its own with the number of its segment, so that they are there when the
frame that names them is read.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, NamedTuple

from bulkhead.engines.processes.segments import Borrowed, Segment, SegmentPool, spans_of
from bulkhead.errors import JobNotPicklable

__all__ = [
    "LARGE_BODY",
    "Exchange",
    "Notes",
    "Opened",
    "Parcel",
    "Token",
    "handed_down",
    "parcel_of",
    "socket_pair",
]

_PROTOCOL = 5

# From this size on buffers go beside the pickled body, and the body itself beside the frame (bytes). Why: below it,
# making and mapping a segment costs more than a copy through the pipe (measured on Linux 6: 70 microseconds and some;
# 128 KiB take as long through a pipe, and 256 KiB eight times as long).
_LARGE_BUFFERS = 128 << 10
LARGE_BODY = 160 << 10

# Up to this size a body with its notes fits into a pipe (bytes).
_SMALL_BODY = 63 << 10

# Different shared objects in one job (arbitrary; each is a message in the socket's queue, which holds some 250).
_MAX_SHARED = 128

# So many shared segments are kept mapped for the next message (arbitrary; each takes a descriptor).
_MAX_KEPT = 16

_LENGTH = struct.Struct("<I")
_TAG = struct.Struct("<Q")  # number of the message a descriptor belongs to
_SETUP = 0  # that of a worker's setup

_DESCRIPTOR = struct.Struct("@i")
_DESCRIPTOR_SPACE = socket.CMSG_LEN(_DESCRIPTOR.size)

_RECEIVE = socket.MSG_DONTWAIT | getattr(socket, "MSG_CMSG_CLOEXEC", 0)

Callback = Callable[[pickle.PickleBuffer], Any]


class Token(bytearray):
    """Stands for a shared object in a pickled body: a buffer without content that knows where the content is.

    Attributes:
        fd, size: The descriptor of its segment and its bytes in use.
        owner: Keeps both; never looked at.
    """

    fd: int
    size: int
    owner: object


class Parcel:
    """A packed value that is more than its body. Immutable; may be sent several times.

    Attributes:
        body: The pickled value, or b"" when the segment begins with it.
        body_size: Its length in the segment, or 0.
        segment: Its own large parts, if there are any.
        shared: The shared objects it refers to.
        layout: For each buffer of the pickled value: which segment (its own, then the shared ones), offset, length.
    """

    __slots__ = ("body", "body_size", "layout", "segment", "shared")

    def __init__(
        self,
        body: bytes,
        body_size: int,
        segment: Segment | None,
        shared: list[Token],
        layout: list[tuple[int, int, int]],
    ) -> None:
        self.body = body
        self.body_size = body_size
        self.segment = segment
        self.shared = shared
        self.layout = layout

    @property
    def size(self) -> int:
        """Bytes that it takes, shared objects apart."""
        return len(self.body) + (0 if self.segment is None else self.segment.size)

    @property
    def is_lone(self) -> bool:
        """Whether all of it is in the body, and that fits into an empty pipe."""
        return self.segment is None and not self.shared and len(self.body) < _SMALL_BODY


class Notes(NamedTuple):
    """What a frame with notes says, its segments still to be mapped."""

    body: memoryview
    body_size: int
    sizes: list[tuple[int, int]]
    layout: list[tuple[int, int, int]]
    extra: Any


class Opened(NamedTuple):
    """The parts of a pickled value. They keep its segments mapped."""

    body: memoryview
    buffers: list[memoryview]
    size: int  # bytes in its own segment


def parcel_of(
    body: bytes,
    buffers: list[pickle.PickleBuffer],
    pickled: Callable[[Callback], bytes],
    segments: SegmentPool,
) -> bytes | Parcel:
    """Put the large parts of a pickled value beside it; return bytes alone when there are none.

    Args:
        body: The value pickled without its buffers.
        buffers: What pickle's `buffer_callback` was given.
        pickled: Pickles the value again with another `buffer_callback`.
        segments: Where large parts go. When it has no memory for them, they go into the body.
    """
    tokens = [_token_of(buffer) for buffer in buffers]
    shared = list({id(token): token for token in tokens if token is not None}.values())
    if len(shared) > _MAX_SHARED:
        raise JobNotPicklable(
            f"a job can refer to {_MAX_SHARED} shared objects, not {len(shared)}; share them together, as a tuple"
        )
    views = [b.raw() for b, token in zip(buffers, tokens, strict=True) if token is None]
    segment, body_size = None, 0
    if sum(map(len, views)) >= _LARGE_BUFFERS or len(body) >= LARGE_BODY:
        if len(body) >= LARGE_BODY:
            views.insert(0, memoryview(body))
            body_size = len(body)
        try:
            segment = segments.place(views)
        except (OSError, MemoryError):
            body_size = 0
    if segment is None and views:
        body = pickled(_only_tokens)
        tokens = [token for token in tokens if token is not None]
    if segment is None and not shared:
        return body
    spans = iter(spans_of(views)[1 if body_size else 0 :])
    places = {id(token): which for which, token in enumerate(shared, 1 if segment is not None else 0)}
    layout = [(0, *next(spans)) if token is None else (places[id(token)], 0, token.size) for token in tokens]
    return Parcel(b"" if body_size else body, body_size, segment, shared, layout)


class Exchange:
    """One side's end of the exchange with one other process: who has lent which segment to whom.

    Owner: in the caller whoever drives the pool or holds its lock, in a worker its only thread. What comes back through
    the garbage collector goes through `let_go`, in any thread.

    Args:
        line: The socket for descriptors; what it does not take at once is an error if it does not block.
        borrowed: Maps what the other side lends.

    Attributes:
        let_go: Loans of the other side that this side is done with, negative if spoilt. `wrap` sends them back.
    """

    def __init__(self, line: socket.socket, borrowed: Borrowed) -> None:
        self._line = line
        self._borrowed = borrowed
        self._loans: dict[int, Segment] = {}  # what the other side may have mapped
        self._numbers = count(1)
        self.let_go: deque[int] = deque()
        self._shared: dict[tuple[int, int, int], memoryview] = {}

    def wrap(self, parcel: bytes | Parcel, message: int, extra: Any = None) -> bytes:
        """Return the body of a frame with notes, and send the descriptors that belong to it.

        Args:
            parcel: What is to be sent.
            message: Number of the frame.
            extra: Anything else the other side has to know.

        Raises:
            OSError: The descriptors cannot be sent.
        """
        sizes: list[tuple[int, int]] = []
        layout: list[tuple[int, int, int]] = []
        body, body_size = (parcel, 0) if isinstance(parcel, bytes) else (parcel.body, parcel.body_size)
        if isinstance(parcel, Parcel):
            layout = parcel.layout
            sizes = [(0, token.size) for token in parcel.shared]
            fds = [token.fd for token in parcel.shared]
            loan = 0
            if parcel.segment is not None:
                loan = next(self._numbers)
                self._loans[loan] = parcel.segment
                sizes.insert(0, (loan, parcel.segment.size))
                fds.insert(0, parcel.segment.fd)
            try:
                for fd in fds:
                    _send(self._line, message, fd)
            except BaseException:
                self._loans.pop(loan, None)  # nobody reads what was sent of it
                raise
        notes = pickle.dumps((self._drained(), extra, sizes, layout, body_size), _PROTOCOL)
        return _LENGTH.pack(len(notes)) + notes + body

    def unwrap(self, data: memoryview | bytes | bytearray) -> Notes:
        """Take apart what the other side has wrapped, and take back what it has let go of."""
        view = memoryview(data)
        (length,) = _LENGTH.unpack_from(view)
        start = _LENGTH.size + length
        let_go, extra, sizes, layout, body_size = pickle.loads(view[_LENGTH.size : start])
        for loan in let_go:
            self._come_back(loan)
        return Notes(view[start:], body_size, sizes, layout, extra)

    def open(self, notes: Notes, message: int) -> Opened:
        """Map the segments of a frame.

        Raises:
            OSError, MemoryError: They cannot be had; nothing of them stays open.
        """
        if not notes.sizes:
            return Opened(notes.body, [], 0)
        mapped = self._map_all(notes.sizes, message)
        buffers = [mapped[which][offset : offset + n] for which, offset, n in notes.layout]
        body = mapped[0][: notes.body_size] if notes.body_size else notes.body
        return Opened(body, buffers, sum(size for loan, size in notes.sizes if loan))

    @property
    def keeps_shared(self) -> bool:
        """Whether shared segments are kept mapped for the next message."""
        return bool(self._shared)

    def drop_shared(self) -> None:
        """Keep none of them mapped any longer."""
        self._shared.clear()

    def hand_down(self, fds: list[int]) -> None:
        """Send copies of descriptors that the worker needs for its setup.

        Raises:
            OSError: They do not all fit into the line.
        """
        for fd in fds:
            _send(self._line, _SETUP, fd)

    def close(self) -> None:
        """Hang up. What the other side had is never filled again: what it has forked may live on."""
        for segment in list(self._loans.values()):  # Race: who drives may take one back
            segment.spoil()
        self._loans.clear()
        self._shared.clear()
        try:
            self._line.close()
        except OSError:
            pass  # a job has closed it already

    def _come_back(self, loan: int) -> None:
        segment = self._loans.pop(abs(loan), None)
        if segment is not None and loan < 0:
            segment.spoil()

    def _drained(self) -> list[int]:
        loans = []
        while self.let_go:
            loans.append(self.let_go.popleft())
        return loans

    def _map_all(self, sizes: list[tuple[int, int]], message: int) -> list[memoryview]:
        mapped: list[memoryview] = []
        fds: list[int] = []
        waiting = list(sizes)
        try:
            fds = _receive(self._line, message, len(sizes))
            kept, self._shared = self._shared, {}
            while waiting:
                loan, size = waiting.pop(0)
                if loan:
                    done = partial(_return, self.let_go, loan)
                    mapped.append(self._borrowed.map(fds.pop(0), size, done))
                else:
                    mapped.append(self._map_shared(fds.pop(0), size, kept))
        finally:
            _close(fds)
            self.let_go.extend(loan for loan, _ in waiting if loan)
        return mapped

    def _map_shared(self, fd: int, size: int, kept: dict[tuple[int, int, int], memoryview]) -> memoryview:
        """Map a shared segment, or take what the last message has left mapped: most of the time goes into the pages."""
        status = os.fstat(fd)
        # A file that is mapped exists, so no other one has its number.
        key = status.st_dev, status.st_ino, size
        view = kept.get(key)
        if view is None:
            view = self._borrowed.map(fd, size, None)
        else:
            os.close(fd)
        if len(self._shared) < _MAX_KEPT:
            self._shared[key] = view
        return view


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a line for descriptors, which keeps messages apart."""
    kind = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_DGRAM
    return socket.socketpair(socket.AF_UNIX, kind)


def handed_down(line: socket.socket, n: int) -> list[int]:
    """Return the `n` descriptors that came before a worker's setup; they are the caller's to close."""
    return _receive(line, _SETUP, n)


def _return(let_go: deque[int], loan: int, is_reusable: bool) -> None:
    let_go.append(loan if is_reusable else -loan)


def _send(line: socket.socket, message: int, fd: int) -> None:
    try:
        socket.send_fds(line, [_TAG.pack(message)], [fd])
    except (BrokenPipeError, ConnectionResetError):
        pass  # the other side is gone, and its end is reported elsewhere


def _receive(line: socket.socket, message: int, n: int) -> list[int]:
    """Return the `n` descriptors of a message that has come, in order; they are the caller's to close."""
    found: list[int] = []
    try:
        while len(found) < n:
            # Why not `socket.recv_fds`: it ignores the flags that it is given.
            tag, ancillary, flags, _ = line.recvmsg(_TAG.size, _DESCRIPTOR_SPACE, _RECEIVE)
            fds = [fd for _, _, data in ancillary for (fd,) in _DESCRIPTOR.iter_unpack(data)]
            if len(tag) == _TAG.size and _TAG.unpack(tag)[0] != message:
                _close(fds)  # of a message that was never read
            elif fds:
                found += fds
            else:
                is_cut = flags & socket.MSG_CTRUNC
                reason = "no file descriptor is left for it" if is_cut else "its descriptor is missing"
                raise OSError(f"a shared memory segment cannot be received: {reason}")
    except BaseException:
        _close(found)
        raise
    return found


def _token_of(buffer: pickle.PickleBuffer) -> Token | None:
    owner = memoryview(buffer).obj
    return owner if isinstance(owner, Token) else None


def _only_tokens(buffer: pickle.PickleBuffer) -> bool:
    return _token_of(buffer) is None


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
