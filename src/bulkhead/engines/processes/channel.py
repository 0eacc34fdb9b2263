"""Framed messages over a one-way pipe with one writer and one reader.

A frame is a header (magic, kind, sequence number, length of the body) and a body. The worker's side blocks; the
caller's side never does: it reads and writes what the pipe takes at the moment and keeps the rest, so that a worker
that is stopped, stuck or dead in the middle of a frame cannot hold the caller up.

Why not `multiprocessing.connection.Connection` on the same pipes: it needs two reads for each message and blocks in the
middle of one. Here a small message is one `write` and one `read`.
"""

from __future__ import annotations

import os
import struct

__all__ = ["CHUNK", "HEADER", "Frame", "FrameReader", "FrameWriter", "frame", "read_frame", "write_all"]

HEADER = struct.Struct("<4sBQQ")
# Why names of their own: looking them up takes time on the way of every job.
_pack, _unpack_from = HEADER.pack, HEADER.unpack_from
_read, _write = os.read, os.write
_MAGIC = b"blk1"  # Why: jobs may write into any descriptor; what does not begin so is no message.
_HEADER_SIZE = HEADER.size

# Bytes asked for by one read: the default capacity of a pipe on Linux, so that one read empties it.
CHUNK = 65536

# A frame that claims to be longer is garbage: something else wrote into the pipe (bytes; arbitrary, 1 PiB).
_MAX_BODY = 1 << 50

# A pipe that carries more than this at once is made larger (bytes): fewer system calls for each MiB.
_LARGE = 1 << 20
_LARGE_PIPE = 1 << 20

_F_SETPIPE_SZ = 1031


# One message: kind, number, body. Why a plain tuple: one is made for each job, and a named one takes ten times as long.
Frame = tuple[int, int, bytes | bytearray | memoryview]


def frame(kind: int, number: int, body: bytes) -> bytes:
    """Return the bytes of one message. Copies the body: meant for small ones."""
    return HEADER.pack(_MAGIC, kind, number, len(body)) + body


def write_all(fd: int, kind: int, number: int, body: bytes) -> None:
    """Write one message to a blocking pipe. Blocking: until the reader has taken it or is gone (BrokenPipeError)."""
    header = HEADER.pack(_MAGIC, kind, number, len(body))
    for part in (header + body,) if len(body) < CHUNK else (header, body):
        n = os.write(fd, part)
        if n < len(part):
            # A large message, or a signal handler of the job's that interrupted the write.
            view = memoryview(part)[n:]
            while view:
                view = view[os.write(fd, view) :]


def read_frame(fd: int, first: bytes) -> Frame | None:
    """Read one message from a blocking pipe, of which `first` was read already. None at a clean end.

    Invariant: the writer sends one message at a time, so nothing of a second one can be in the pipe.
    """
    while len(first) < HEADER.size:
        more = os.read(fd, HEADER.size - len(first))
        if not more:
            return None
        first += more
    _, kind, number, length = HEADER.unpack_from(first)
    if len(first) == HEADER.size + length:
        return kind, number, memoryview(first)[HEADER.size :]
    body = bytearray(length)
    view = memoryview(body)
    got = len(first) - HEADER.size
    view[:got] = first[HEADER.size :]
    if length > _LARGE:
        enlarge(fd)
    while got < length:
        n = os.readv(fd, [view[got:]])
        if n == 0:
            return None
        got += n
    return kind, number, body


def enlarge(fd: int) -> None:
    """Give a pipe more room where the system can; a refusal costs speed only."""
    try:
        import fcntl

        fcntl.fcntl(fd, _F_SETPIPE_SZ, _LARGE_PIPE)
    except (ImportError, OSError):
        pass


class FrameReader:
    """The caller's end of a pipe from a worker. Owner: the thread that drives the pool.

    Attributes:
        is_at_end: Nothing more will come.
        is_garbled: Something came that is no message; what follows it cannot be told apart.
    """

    __slots__ = ("_got", "_head", "_view", "fd", "is_at_end", "is_garbled")

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self.is_at_end = False
        self.is_garbled = False
        self._head = b""
        self._view: memoryview | None = None
        self._got = 0

    def read(self) -> list[Frame]:
        """Read what is there and return the messages that are complete.

        Raises:
            MemoryError: The announced message does not fit into memory.
        """
        if self._view is None:
            try:
                data = _read(self.fd, CHUNK)
            except BlockingIOError:
                return []
            if not data:
                self.is_at_end = True
                return []
            if self._head:
                return self._parse(self._head + data)
            if len(data) >= _HEADER_SIZE:
                # The usual case, one small message, without the general way of taking bytes apart.
                magic, kind, number, length = _unpack_from(data)
                if len(data) == _HEADER_SIZE + length and magic == _MAGIC:
                    return [(kind, number, data[_HEADER_SIZE:])]
            return self._parse(data)
        try:
            n = os.readv(self.fd, [self._view[self._got :]])
        except BlockingIOError:
            return []
        if n == 0:
            self.is_at_end = True
            return []
        self._got += n
        return self._finish_large()

    def read_rest(self) -> list[Frame]:
        """Read until the pipe is empty or at its end, for a worker that is gone."""
        found: list[Frame] = []
        while not self.is_at_end and not self.is_garbled:
            before = self._got, self._view, self._head
            frames = self.read()
            if not frames and before == (self._got, self._view, self._head):
                break
            found += frames
        return found

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def _parse(self, data: bytes) -> list[Frame]:
        frames: list[Frame] = []
        start = 0
        while len(data) - start >= HEADER.size:
            magic, kind, number, length = HEADER.unpack_from(data, start)
            if magic != _MAGIC or length > _MAX_BODY:
                break
            end = start + HEADER.size + length
            if end > len(data):
                self._begin_large(kind, number, length, data[start + HEADER.size :])
                return frames
            frames.append((kind, number, memoryview(data)[start + HEADER.size : end]))
            start = end
        self._head = data[start:]
        self.is_garbled = not _MAGIC.startswith(self._head[:4]) or len(self._head) >= _HEADER_SIZE
        return frames

    def _begin_large(self, kind: int, number: int, length: int, beginning: bytes) -> None:
        if length > _LARGE:
            enlarge(self.fd)
        self._head = HEADER.pack(_MAGIC, kind, number, length)
        self._view = memoryview(bytearray(length))
        self._view[: len(beginning)] = beginning
        self._got = len(beginning)

    def _finish_large(self) -> list[Frame]:
        view = self._view
        assert view is not None
        if self._got < len(view):
            return []
        _, kind, number, _ = HEADER.unpack(self._head)
        self._head, self._view, self._got = b"", None, 0
        return [(kind, number, view)]


class FrameWriter:
    """The caller's end of a pipe to a worker. Owner: whoever holds the pool's lock."""

    __slots__ = ("_rest", "fd")

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self._rest: list[memoryview] = []

    def write(self, kind: int, number: int, body: bytes) -> bool:
        """Begin to send a message; True when all of it is out, else `resume` when the pipe can take more.

        A reader that is gone is no error here: its end is reported elsewhere.
        """
        header = _pack(_MAGIC, kind, number, len(body))
        if not self._rest and len(body) < CHUNK:
            data = header + body
            try:
                n = _write(self.fd, data)
            except BlockingIOError:
                n = 0
            except BrokenPipeError:
                return True
            if n == len(data):
                return True
            self._rest.append(memoryview(data)[n:])
            return False
        if len(body) > _LARGE:
            enlarge(self.fd)
        self._rest += [memoryview(header), memoryview(body)]
        return self.resume()

    def resume(self) -> bool:
        """Send more of what is left; True when nothing is."""
        try:
            while self._rest:
                n = os.write(self.fd, self._rest[0])
                self._rest[0] = self._rest[0][n:]
                if not self._rest[0]:
                    del self._rest[0]
        except BlockingIOError:
            return False
        except BrokenPipeError:
            self._rest.clear()
        return True

    def close(self) -> None:
        """Close the descriptor: the worker reads the end and leaves."""
        self._rest.clear()
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)
