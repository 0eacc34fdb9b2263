"""What a worker leaves behind when it dies: a small shared file that it writes and its launcher reads.

It holds the number of the last message the worker began to read (which the caller looks at as well), the tail of what
was printed since, and the Python stacks that faulthandler writes on a fatal signal and on the first signal of the kill
ladder. The file has no name, so nothing has to be removed. Only output through `sys.stdout` and `sys.stderr` is seen,
not what C code writes to descriptors.
"""

from __future__ import annotations

import faulthandler
import fcntl
import io
import mmap
import os
import signal
import struct
import sys
from typing import NamedTuple

from bulkhead.engines.processes.segments import create_file

__all__ = [
    "DUMP",
    "HALVES",
    "PROGRESS_AT",
    "PROGRESS_SIZE",
    "BlackBox",
    "ReadMark",
    "Recovered",
    "create",
    "has_stack",
    "recover",
]

# Makes a worker write down its stacks. Why not SIGTERM: a job may ignore or handle that one.
DUMP: int | None = signal.SIGRTMIN + 9 if hasattr(signal, "SIGRTMIN") else None

# Layout in bytes: three counters (number of the message, bytes of output when it came, bytes of output so far), a ring
# of output, two counters of use (jobs done, bytes taken), two of messages sent ahead (the last that was begun, the last
# that was taken back), the stacks, and far behind them how far a chunk has come (see progress.py), twice: the next one
# may be begun before the caller has read of the last. Pages that nobody writes to take no memory.
_READ_AT = 0
_WRITTEN_AT = 16
_RING_AT = 24
_RING_SIZE = 8192
_USE_AT = 8448
_AHEAD_AT = 8464
_STACK_AT = 16384
_STACK_SIZE = 49152
PROGRESS_AT = 1 << 20
PROGRESS_SIZE = 1 << 20
HALVES = 2
_COUNTER = struct.Struct("<Q")
_MARK = struct.Struct("<QQ")


class Recovered(NamedTuple):
    """What was in the box."""

    last_read: int
    output: str
    stack: str


class BlackBox:
    """The worker's side. Owner: the worker process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._map = mmap.mmap(fd, _STACK_AT)
        self._written = 0
        self.has_output = False

    def note_read(self, number: int) -> None:
        """Remember that the message of this number is being read."""
        _MARK.pack_into(self._map, _READ_AT, number, self._written)

    def claim(self, number: int) -> bool:
        """Begin a message that was sent ahead; False when the caller has taken it back.

        Why a lock on the file: who looks and writes without one may do so at the same time as the other. The kernel
        takes it from a process that dies.
        """
        fcntl.lockf(self._fd, fcntl.LOCK_EX, _MARK.size, _AHEAD_AT)
        try:
            _, taken_back = _MARK.unpack_from(self._map, _AHEAD_AT)
            if taken_back == number:
                return False
            _MARK.pack_into(self._map, _AHEAD_AT, number, taken_back)
            return True
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, _MARK.size, _AHEAD_AT)

    def watch(self) -> None:
        """Have the stacks at fatal signals and everything printed recorded from now on."""
        os.lseek(self._fd, _STACK_AT, os.SEEK_SET)
        faulthandler.enable(file=self._fd, all_threads=True)
        if DUMP is not None:
            faulthandler.register(DUMP, file=self._fd, all_threads=True)
        sys.stdout = _recording(sys.stdout, self)
        sys.stderr = _recording(sys.stderr, self)

    def record(self, text: str) -> None:
        """Add to the ring of output."""
        data = text[-_RING_SIZE:].encode("utf-8", "replace")[-_RING_SIZE:]
        start = self._written % _RING_SIZE
        first = min(len(data), _RING_SIZE - start)
        self._map[_RING_AT + start : _RING_AT + start + first] = data[:first]
        self._map[_RING_AT : _RING_AT + len(data) - first] = data[first:]
        self._written += len(data)
        _COUNTER.pack_into(self._map, _WRITTEN_AT, self._written)
        self.has_output = True

    def note_use(self, jobs: int, rss_bytes: int) -> None:
        """Write down what the worker has done and takes."""
        _MARK.pack_into(self._map, _USE_AT, jobs, rss_bytes)

    def flush_output(self) -> None:
        """Send on what the last job printed, so that nothing stays in a buffer that dies with the process."""
        self.has_output = False
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):  # closed, broken or replaced by the job
                pass


class ReadMark:
    """The caller's view of how far a worker has read. Concurrency: any thread.

    Attributes:
        halves: The memory that tells how far it is with a chunk, twice.
    """

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, PROGRESS_AT + HALVES * PROGRESS_SIZE)
        self._fd = os.dup(fd)
        starts = range(PROGRESS_AT, PROGRESS_AT + HALVES * PROGRESS_SIZE, PROGRESS_SIZE)
        self.halves = [memoryview(self._map)[start : start + PROGRESS_SIZE] for start in starts]

    def take_back(self, number: int) -> bool:
        """Take back a message that was sent ahead; False when the worker has begun it, or does so at this moment."""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, _MARK.size, _AHEAD_AT)
        except (OSError, ValueError):  # it is about to begin it; or the view is closed
            return False
        try:
            begun, _ = _MARK.unpack_from(self._map, _AHEAD_AT)
            if begun == number:
                return False
            _MARK.pack_into(self._map, _AHEAD_AT, begun, number)
            return True
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, _MARK.size, _AHEAD_AT)

    def may_take_back(self) -> bool:
        """Tell whether another message could be taken back: only the last one is written down, so it must be past.

        A worker is past a message when it has begun to read a later one.
        """
        try:
            _, taken_back = _MARK.unpack_from(self._map, _AHEAD_AT)
        except ValueError:  # the view is closed
            return False
        return bool(taken_back == 0 or self.last_read() > taken_back)

    def last_begun(self) -> int:
        """Return the number of the last message that was sent ahead and begun, or -1 when the view is closed."""
        try:
            return int(_COUNTER.unpack_from(self._map, _AHEAD_AT)[0])
        except ValueError:
            return -1

    def last_read(self) -> int:
        """Return the number of the last message that the worker began to read, or -1 when the view is closed."""
        try:
            return int(_COUNTER.unpack_from(self._map, _READ_AT)[0])
        except ValueError:
            return -1

    def use(self) -> tuple[int, int]:
        """Return what the worker has noted: jobs done, and bytes that it takes."""
        jobs, rss_bytes = _MARK.unpack_from(self._map, _USE_AT)
        return jobs, rss_bytes

    def close(self) -> None:
        """Give the view up."""
        for half in self.halves:
            half.release()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
        try:
            self._map.close()
        except BufferError:
            pass  # a thread reads records at this moment; the mapping goes when it lets go of them


def create() -> int:
    """Return the descriptor of a new, empty box."""
    fd = create_file("bulkhead-blackbox")
    os.ftruncate(fd, PROGRESS_AT + HALVES * PROGRESS_SIZE)
    return fd


def has_stack(fd: int) -> bool:
    """Tell whether there are stacks in a box, at least the beginning."""
    return os.pread(fd, 1, _STACK_AT) not in (b"", b"\0")


def recover(fd: int) -> Recovered:
    """Return what a worker that is gone has left in its box."""
    head = os.pread(fd, _RING_AT + _RING_SIZE, 0)
    last_read, began, written = struct.unpack_from("<QQQ", head)
    ring = head[_RING_AT:]
    start = written % _RING_SIZE
    tail = (ring[start:] + ring[:start])[-min(written - began, _RING_SIZE) :] if written > began else b""
    stack = os.pread(fd, _STACK_SIZE, _STACK_AT).rstrip(b"\0")
    return Recovered(last_read, tail.decode("utf-8", "replace"), stack.decode("utf-8", "replace"))


class _Recording(io.TextIOWrapper):
    """A standard stream that also writes into the black box."""

    box: BlackBox
    beneath: (
        io.TextIOWrapper
    )  # Why kept: a text stream that is collected closes its buffer, which this one uses.

    def write(self, text: str, /) -> int:
        self.box.record(text)
        return super().write(text)


def _recording(stream: object, box: BlackBox) -> io.TextIOWrapper:
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # type: ignore[return-value]  # replaced on purpose, or None: nothing to record
    stream.flush()
    recording = _Recording(
        stream.buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    recording.box = box
    recording.beneath = stream
    return recording
