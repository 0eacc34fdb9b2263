"""Where the output of a pool's jobs comes out: the thread that writes lines to the caller's streams and logging.

Why a thread: a stream may be blocked for as long as it likes (a pipe to `less`), and a handler of the user's may be
slow; whoever drives the pool must not wait for either. What is put here is written in order. Entries are counted both
ways, so that the pool knows which of them are written, and how much is not.

Guarantees:
- A line is written whole, in one call of the stream's `write`, and the stream is flushed after it. That is as far as
  it goes: a thread of the user's that prints in pieces may have a line of a job between two pieces.
- The streams are those that `sys.stdout` and `sys.stderr` name at that moment.
- Nothing that a stream or a handler does comes out of here: it is logged, once.
- A stream on a pipe, a socket or a terminal is written to when it takes something, so that the thread is not caught in
  a `write` (and the interpreter not at its exit, in the lock that such a thread holds) when the pool ends. What is left
  then is dropped, with a warning.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

from bulkhead.engines.processes import log_records

__all__ = ["Lines", "Outlet", "Record"]

_log = logging.getLogger("bulkhead")

# How much is written before the writer says so (bytes), that of one entry apart.
_BATCH = 256 << 10

# What nobody can write is dropped beyond this (bytes). The pool stops reading long before; only workers that die with
# full pipes, again and again, while the caller's streams are blocked, come so far.
_MOST = 16 << 20


# How much a pipe takes that is said to take something (characters): a page, of text in up to four bytes each. Between
# two looks at a stream that takes nothing (milliseconds).
_PIECE = 1024
_LOOK_AGAIN = 200

# Seconds that the thread has to notice that it is cut off.
_UNWIND = 1.0


class Lines(NamedTuple):
    """Whole lines, each with its newline, for `sys.stdout` or `sys.stderr`."""

    stream: str
    tag: str
    data: bytes


class Record(NamedTuple):
    """A packed log record, and the attributes that it gets here."""

    data: bytes
    facts: dict[str, Any]


class Outlet:
    """Writes what jobs of one pool have printed and logged.

    Args:
        name: Of the thread.
        label: Of the pool.
        on_progress: Called in the thread when entries are written while `is_awaited`.

    Attributes:
        n_put: Entries so far. Owner: who drives.
        n_written: Those of them that are written. Owner: the thread.
        is_awaited: Somebody waits for the next entry to be written. Owner: who drives.
    """

    def __init__(self, name: str, label: str, on_progress: Callable[[], None]) -> None:
        self._label = label
        self._on_progress = on_progress
        self._queue: queue.SimpleQueue[Lines | Record | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._complaints: set[str] = set()
        self._is_cut = False  # nothing more is written
        self._is_dropping = False
        self.n_put = 0
        self.n_written = 0
        self.is_awaited = False
        self._bytes_put = 0  # Owner: who drives
        self._bytes_written = 0  # Owner: the thread

    def begin(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def backlog(self) -> int:
        """Bytes that are put and not written."""
        return self._bytes_put - self._bytes_written

    def put(self, entry: Lines | Record) -> None:
        """Have an entry written. Does not wait."""
        if self.backlog > _MOST:
            self._is_dropping = True
            return
        self.n_put += 1
        self._bytes_put += len(entry.data)
        self._queue.put(entry)

    def end(self, patience: float) -> None:
        """Write what is left and end. Blocking: until that is done or `patience` seconds have passed."""
        self._queue.put(None)
        if self._thread.ident is None or self._thread is threading.current_thread():
            return
        self._thread.join(patience)
        if self._thread.is_alive():
            self._is_cut = True
            self._complain("cut", "the last output of its jobs is not written, the stream is blocked", None)
            self._thread.join(_UNWIND)

    # In the thread

    def _run(self) -> None:
        is_over = False
        while not is_over:
            batch, is_over = self._next_batch()
            # Why together: one write and one flush for lines that came together.
            for stream, entries in groupby(batch, _stream_of):
                self._emit(stream, list(entries))
            self._bytes_written += sum(len(entry.data) for entry in batch)
            self.n_written += len(batch)
            if self._is_dropping:  # Why here: who drives must not wait for a handler of the user's
                self._complain("full", "output of jobs was dropped, because nobody took it", None)
            # Race: whoever waits sets this first and looks at `n_written` then.
            if self.is_awaited:
                self._on_progress()

    def _next_batch(self) -> tuple[list[Lines | Record], bool]:
        """Wait for an entry; return it with those behind it, and whether the end is behind them."""
        entry = self._queue.get()
        batch: list[Lines | Record] = []
        size = 0
        while entry is not None:
            batch.append(entry)
            size += len(entry.data)
            try:
                if size >= _BATCH:
                    return batch, False
                entry = self._queue.get_nowait()
            except queue.Empty:
                return batch, False
        return batch, True

    def _emit(self, stream: str | None, entries: list[Any]) -> None:
        if stream is not None:
            lines = [line for entry in entries for line in _shown(entry)]
            self._give(f"sys.{stream}", self._write, stream, lines)
            return
        for entry in entries:
            # Why each by itself: a handler that raises must not cost the records behind.
            self._give("the loggers", log_records.deliver, entry.data, entry.facts)

    def _give(self, where: str, give: Callable[..., None], *args: Any) -> None:
        try:
            give(*args)
        except BaseException as error:  # whatever a stream or a handler of the user's raises
            self._complain(where, f"output of jobs cannot be given to {where}", error)

    def _write(self, name: str, lines: list[str]) -> None:
        stream = getattr(sys, name)
        if stream is None:
            return
        fd = _blockable(stream)
        for text in ["".join(lines)] if fd is None else _pieces(lines):
            if fd is not None and not self._takes(fd):
                return
            try:
                stream.write(text)
            except UnicodeEncodeError:
                encoding = stream.encoding or "ascii"
                stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()

    def _takes(self, fd: int) -> bool:
        """Wait until the descriptor takes something; False when the thread is cut off."""
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        while not self._is_cut:
            if poll.poll(_LOOK_AGAIN):
                return True
        return False

    def _complain(self, about: str, text: str, error: BaseException | None) -> None:
        if about in self._complaints:
            return
        self._complaints.add(about)
        try:
            _log.warning("%s: %s%s", self._label, text, "" if error is None else f": {error!r}")
        except BaseException:
            pass  # a handler of the user's again


def _stream_of(entry: Lines | Record) -> str | None:
    return entry.stream if isinstance(entry, Lines) else None


def _shown(lines: Lines) -> Iterator[str]:
    """Return each line as it is shown. Of one that was overwritten (progress bars) the last state alone."""
    for line in lines.data.split(b"\n")[:-1]:
        last = line.rstrip(b"\r").rpartition(b"\r")[2]
        yield f"{lines.tag}{last.decode('utf-8', 'replace')}\n"


def _blockable(stream: Any) -> int | None:
    """Return the descriptor of a stream that may take nothing for long, None for others."""
    try:
        fd = int(stream.fileno())
        mode = os.fstat(fd).st_mode
    except Exception:  # no file, or a stream of the user's that has its own idea of it
        return None
    return fd if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode) else None


def _pieces(lines: list[str]) -> Iterator[str]:
    """Return lines together that a page has room for; one that is longer is not cut."""
    piece: list[str] = []
    size = 0
    for line in lines:
        if piece and size + len(line) > _PIECE:
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if piece:
        yield "".join(piece)
