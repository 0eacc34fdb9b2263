"""The caller's ends of what a worker prints and logs: a pipe of text is cut into lines, a socket brings records.

Owner of everything here: who drives. Nothing waits: a read takes what is there.
"""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from typing import TYPE_CHECKING

from bulkhead.engines.processes.log_records import MESSAGE

if TYPE_CHECKING:
    from bulkhead.engines.processes.output import PoolOutput
    from bulkhead.engines.processes.worker import Worker

__all__ = ["Logs", "Source", "Stream"]

# A line that is longer comes out in pieces (bytes).
_LONGEST_LINE = 64 << 10

_SIZE = struct.Struct("i")


class Source:
    """One descriptor that a worker writes to. Owner: who drives."""

    most = 64 << 10  # bytes of one read: the default capacity of a pipe on Linux

    def __init__(self, worker: Worker, pool: PoolOutput) -> None:
        self._worker = worker
        self._pool = pool
        self.fd = -1
        self.is_at_end = False

    def read(self) -> int:
        """Read what is there, a pipe full at most; return how many bytes that were."""
        try:
            data = os.read(self.fd, self.most)
        except OSError:  # nothing there; or closed meanwhile, by another thread that has given the pool up
            return 0
        if data:
            self.take(data)
        else:
            self.is_at_end = True
        return len(data)

    def drain(self) -> None:
        """Read as much as is there now."""
        if self.fd < 0 or self.is_at_end:
            return
        try:
            (left,) = _SIZE.unpack(fcntl.ioctl(self.fd, termios.FIONREAD, bytes(_SIZE.size)))
        except OSError:  # as in `read`
            return
        while left > 0 and (n := self.read()):
            left -= n

    def take(self, data: bytes) -> None:
        """Pass on what was read."""
        raise NotImplementedError

    def finish_line(self) -> None:
        """Let nothing wait for the end of its line."""

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


class Stream(Source):
    """A pipe of text, cut into lines."""

    def __init__(self, worker: Worker, pool: PoolOutput, name: str) -> None:
        super().__init__(worker, pool)
        self._name = name
        self._rest = b""  # a line whose end has not come

    def take(self, data: bytes) -> None:
        """Pass on the lines that are whole."""
        data = self._rest + data
        end = data.rfind(b"\n") + 1
        self._rest = data[end:]
        if end:
            self._pool.put_lines(self._worker, self._name, data[:end])
        while len(self._rest) > _LONGEST_LINE:
            self._cut()

    def finish_line(self) -> None:
        """Pass on a line that has no end."""
        if self._rest:
            data, self._rest = self._rest, b""
            self._pool.put_lines(self._worker, self._name, data)

    def _cut(self) -> None:
        """Take a piece of a line that is too long, between two characters of UTF-8."""
        end = _LONGEST_LINE
        while end > _LONGEST_LINE - 4 and self._rest[end] & 0xC0 == 0x80:
            end -= 1
        piece, self._rest = self._rest[:end], self._rest[end:]
        self._pool.put_lines(self._worker, self._name, piece)


class Logs(Source):
    """A socket of messages, each a packed record."""

    most = MESSAGE

    def take(self, data: bytes) -> None:
        """Pass on a record."""
        self._pool.put_record(self._worker, data)
