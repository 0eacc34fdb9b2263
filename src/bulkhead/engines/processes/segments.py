"""Anonymous shared memory for large data: segments that a sender fills and lends, and a receiver maps.

A segment is a file without a name (a memfd, elsewhere an unlinked temporary file) whose descriptor travels with the
message. So the kernel frees it when the last process that knows it has ended, however they end.

The sender copies into the segment once. The receiver maps it privately: it can write into what it got, nobody else sees
that, and nothing is copied until it does. When the receiver has let go of everything inside, it reports the segment's
number, and the sender may fill it again: fresh pages cost more than the copy. Large segments have huge pages where the
system gives them (see pages.py).

Invariant: a segment is filled again only when no process can have it mapped. Hence a segment is given up instead if its
borrower died (what that had forked may live on) or forked while it had it mapped.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from bulkhead import forks
from bulkhead.engines.processes import pages

__all__ = ["Borrowed", "Segment", "SegmentPool", "create_file", "spans_of"]

Buffer = bytes | bytearray | memoryview

# Where a buffer may begin (bytes): a cache line, and what vector instructions ask for.
_ALIGNMENT = 64

# A copy is made in steps of so many bytes, so that other threads get the interpreter in between (about 1 ms each).
_STEP = 8 << 20

# A free segment that is this much larger than what is to be placed is not taken for it (a factor), from this size on.
_WASTE = 4
_SMALL = 1 << 20

# Free segments that nobody has needed for so long are given back to the system (seconds).
_KEEP_FOR = 10.0

# Segments that a receiver has mapped at once, after which it copies the next ones out (each costs a descriptor); and
# the largest share of the descriptors that the process may open.
_MAX_MAPPED = 64
_SHARE_OF_DESCRIPTORS = 8

# Advice to map all pages at once, on Linux since 5.14. Why not MAP_POPULATE: that does not let other threads run.
_POPULATE_WRITE = 23

_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


class Segment:
    """A filled segment. It goes back to its pool when the last reference to this object does.

    Attributes:
        fd: Its descriptor, open as long as this object lives.
        size: Bytes in use.
    """

    __slots__ = ("_file", "_home", "size")

    def __init__(self, home: SegmentPool, file: _File, size: int) -> None:
        self._home = home
        self._file = file
        self.size = size

    @property
    def fd(self) -> int:
        """Open as long as this object lives."""
        return self._file.fd

    def spoil(self) -> None:
        """See to it that the segment is never filled again: somebody unknown may have it mapped."""
        self._file.is_spoilt = True

    def seal(self) -> None:
        """Let nobody write into it any more, where the system can. It must not be filled again."""
        self._file.seal()

    def __del__(self) -> None:
        # Race: a Ctrl-C may have struck before the fields were set; then the file closes itself.
        file = getattr(self, "_file", None)
        if file is not None:
            self._home.take_back(file)


class SegmentPool:
    """Segments of one sender. Concurrency: any thread.

    Args:
        keep_bytes: Free segments are kept for the next message up to so many bytes together.

    Attributes:
        is_used: Something has been placed here; until then nothing has to be trimmed.
    """

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        # Why apart from `_free`: segments come back through the garbage collector, in any thread, at any line.
        self._returned: deque[_File] = deque()
        self._lock = threading.Lock()  # guards `_free`; nothing else is acquired while it is held
        self._free: list[_File] = []  # the one used last comes last
        self._is_closed = False
        self._open: set[int] = set()  # keys of files that are lent or kept
        self.is_used = False

    def place(self, buffers: Iterable[Buffer]) -> Segment:
        """Copy the buffers into a segment, at the places that `spans_of` names.

        Args:
            buffers: One-dimensional contiguous bytes.

        Raises:
            OSError, MemoryError: The system has no memory or no descriptor left for it. Nothing is kept of it.
        """
        self.is_used = True
        parts = [memoryview(buffer) for buffer in buffers]
        spans = spans_of(parts)
        # Why not the end of the last one: it may be empty, and begin where nothing is written.
        size = max((offset + n for offset, n in spans if n), default=0)
        file = self._suitable(size) or _File(self._open)
        try:
            file.prepare(size)
            for part, (offset, _) in zip(parts, spans, strict=True):
                file.fill(part, offset)
        except BaseException:
            file.close()
            raise
        return Segment(self, file, size)

    def take_back(self, file: _File) -> None:
        """Note that nobody refers to a segment any more. Safe inside the garbage collector."""
        if self._is_closed or file.is_spoilt or file.depth != forks.depth:
            file.close()
            return
        file.freed_at = time.monotonic()
        self._returned.append(file)
        # Race: `close` may have come to its end just before the append.
        if self._is_closed:
            file.close()

    @property
    def has_files(self) -> bool:
        """Whether there is a segment, lent or kept."""
        return bool(self._open)

    def next_trim(self) -> float | None:
        """Return when `trim` should be called next, in monotonic seconds; None while nothing is kept."""
        if self._is_closed:
            return None
        with self._lock:
            self._sort_in()
            return self._free[0].freed_at + _KEEP_FOR if self._free else None

    def trim(self, now: float) -> None:
        """Give back to the system what nobody has needed for long."""
        with self._lock:
            self._sort_in()
            while self._free and self._free[0].freed_at + _KEEP_FOR <= now:
                self._free.pop(0).close()

    def close(self) -> None:
        """Give everything back; segments that are lent go when their last reference does."""
        self._is_closed = True
        self._lock = (
            threading.Lock()
        )  # Why: also called in a forked copy, where another thread may have held it
        while self._returned:
            self._returned.popleft().close()
        while self._free:
            self._free.pop().close()

    def _suitable(self, size: int) -> _File | None:
        """Return the free segment that fits best, or one that has to be made longer, or None."""
        with self._lock:
            self._sort_in()
            largest = max(_WASTE * size, _SMALL)
            fitting = [file for file in self._free if file.filled <= largest]
            if not fitting:
                return None
            roomy = [file for file in fitting if file.filled >= size]
            best = (
                min(roomy, key=lambda file: file.filled)
                if roomy
                else max(fitting, key=lambda file: file.filled)
            )
            self._free.remove(best)
            return best

    def _sort_in(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())
        if self._free and self._free[0].depth != forks.depth:
            # This is a copy of the process that filled them, which may fill them again.
            while self._free:
                self._free.pop().close()
        excess = sum(file.filled for file in self._free) - self._keep_bytes
        while excess > 0:
            oldest = self._free.pop(0)
            excess -= oldest.filled
            oldest.close()


class Borrowed:
    """What a receiver has mapped of other processes' segments. Concurrency: any thread.

    A mapping ends when the last array, view or slice inside it does, and only the interpreter knows when that is: the
    mapping carries a `_Loan`, which ends with it.

    Attributes:
        is_used: Something has been mapped.
    """

    def __init__(self) -> None:
        self._mapped: set[int] = set()  # ids of loans
        self.is_used = False
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = min(_MAX_MAPPED, soft // _SHARE_OF_DESCRIPTORS) if soft > 0 else _MAX_MAPPED

    def map(self, fd: int, size: int, done: Callable[[bool], object] | None) -> memoryview:
        """Return the segment's bytes, and close `fd`.

        Args:
            fd: The segment's descriptor.
            size: Its bytes in use, at least 1.
            done: Called when nothing refers to the bytes any more: with False if the segment must never be filled
                again. It may be called by the garbage collector, in any thread, so it must do next to nothing. None
                for a segment that is shared: a write into it raises. Otherwise writes are private.

        Raises:
            OSError, MemoryError: The system has no memory left for it; `done` has been called.
        """
        self.is_used = True
        # What is mapped when this process forks is mapped by the copy as well. Race: another thread may fork at any
        # line from here on.
        made = forks.made
        try:
            if done is None:
                return memoryview(mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))
            found = self._map_privately(fd, size) if len(self._mapped) < self._limit else None
            if found is None:
                copied = _read_all(fd, size)
                done(True)
                return memoryview(copied)
        except BaseException as error:
            if done is not None:
                done(True)
            if isinstance(error, ValueError):
                raise OSError(
                    f"a segment of {size} bytes cannot be mapped: {error}"
                ) from error  # it is shorter
            raise
        finally:
            os.close(fd)
        mapping, start = found
        mapping.loan = _Loan()
        key = id(mapping.loan)

        def gone(is_over: bool) -> None:
            self._mapped.discard(key)
            done(is_over and made == forks.made)

        self._mapped.add(key)
        _ends[key] = gone
        return memoryview(mapping)[start : start + size]

    @property
    def has_mapped(self) -> bool:
        """Whether something that was mapped is still referred to."""
        return bool(self._mapped)

    def _map_privately(self, fd: int, size: int) -> tuple[_Mapping, int] | None:
        try:
            return pages.map_file(fd, size, _Mapping, flags=mmap.MAP_PRIVATE, prot=_READ_WRITE)
        except OSError:  # no address space or descriptors left for another mapping; a copy may still fit
            return None


class _Loan:
    """Ends with the mapping that carries it, and says so.

    Race: the garbage collector finalizes this together with other objects of a cycle, and one of those may still look
    into the mapping, or keep it. Then the mapping still refers to this, which shows in the number of references.
    """

    __slots__ = ()

    def __del__(self) -> None:
        gone = _ends.pop(id(self), None)
        if gone is not None:
            gone(sys.getrefcount(self) == _REFERENCES_AT_END)


def _references_at_end() -> int:
    counts = []

    class Probe:
        __slots__ = ()

        def __del__(self) -> None:
            counts.append(sys.getrefcount(self))

    Probe()
    return counts[0]


_REFERENCES_AT_END = _references_at_end()


class _Mapping(mmap.mmap):
    loan: _Loan


# What is done at the end of a loan, by its id.
_ends: dict[int, Callable[[bool], object]] = {}


class _File:
    """The memory of a segment. Owner: who places into it, then the pool's lock."""

    __slots__ = ("_map", "_open", "depth", "fd", "filled", "freed_at", "is_spoilt")

    def __init__(self, opened: set[int]) -> None:
        self.fd = -1
        self._map: memoryview | None = None
        self.depth = forks.depth
        self.filled = 0  # bytes that have pages
        self.freed_at = 0.0
        self.is_spoilt = False
        self._open = opened
        opened.add(id(self))
        self.fd = create_file("bulkhead-segment")

    def prepare(self, size: int) -> None:
        """Have huge pages for what is to come, as far as the system gives them: then `fill` finds them there."""
        huge = pages.huge_page()
        start, end = (self.filled // huge * huge, size // huge * huge) if huge else (0, 0)
        if end <= self.filled:
            return
        try:
            # Why by writing: when memory is short that is an error, and not a death.
            for first in range(start, end, huge):
                os.pwrite(self.fd, b"\0", first)
            os.ftruncate(self.fd, size)
            self._map = None
            owner, begin = self._map_file(size)
            if pages.collapse(owner, begin + start, begin + end):
                self._map = memoryview(owner)[begin : begin + size]
                self.filled = end
        except OSError:
            pass  # of room or of memory; `fill` sees which

    def fill(self, data: memoryview, offset: int) -> None:
        """Copy `data` to `offset`."""
        if not data:
            return  # it may begin where nothing is written
        # Why two ways: a write into fresh pages is the fastest, and fails with an error where a store into a mapping
        # would kill the process when memory is short; into pages that are there, a mapping is three times as fast.
        n_there = max(min(len(data), self.filled - offset), 0)
        if n_there:
            target = self._mapping()
            for start in range(0, n_there, _STEP):
                end = min(start + _STEP, n_there)
                target[offset + start : offset + end] = data[start:end]
        while n_there < len(data):
            n_there += os.pwrite(self.fd, data[n_there : n_there + _STEP], offset + n_there)
        self.filled = max(self.filled, offset + len(data))

    def close(self) -> None:
        try:
            self._open.remove(id(self))  # Race: of two threads that close it one gets further
        except KeyError:
            return
        self._map = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        # For what a Ctrl-C has left without an owner, perhaps in the middle of `__init__`.
        if hasattr(self, "_open"):
            self.close()

    def seal(self) -> None:
        self._map = None  # or the system refuses
        if hasattr(fcntl, "F_ADD_SEALS"):
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)

    def _mapping(self) -> memoryview:
        if self._map is None or len(self._map) < self.filled:
            self._map = None
            owner, begin = self._map_file(self.filled)
            self._map = memoryview(owner)[begin : begin + self.filled]
            try:
                for start in range(0, self.filled, _STEP):
                    owner.madvise(_POPULATE_WRITE, begin + start, min(_STEP, self.filled - start))
            except OSError:
                pass  # a system that does not know it: then the first copy finds the pages one by one
        return self._map

    def _map_file(self, size: int) -> tuple[mmap.mmap, int]:
        return pages.map_file(self.fd, size, mmap.mmap, flags=mmap.MAP_SHARED, prot=_READ_WRITE)


def create_file(name: str) -> int:
    """Return the descriptor of a new, empty file in memory that has no name in any folder."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def spans_of(buffers: Iterable[Buffer]) -> list[tuple[int, int]]:
    """Return offset and length of each buffer in a segment that holds them all."""
    spans = []
    offset = 0
    for buffer in buffers:
        spans.append((offset, len(buffer)))
        offset += -(-len(buffer) // _ALIGNMENT) * _ALIGNMENT
    return spans


def _read_all(fd: int, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    got = 0
    while got < size:
        n = os.preadv(fd, [view[got : got + _STEP]], got)
        if n == 0:
            raise OSError(f"a segment ends after {got} of {size} bytes")
        got += n
    return data
