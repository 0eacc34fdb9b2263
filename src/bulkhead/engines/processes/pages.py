"""Huge pages for segments, and mappings that can have them.

Most of the time of a large transfer goes into pages, not into bytes: clearing each for a fresh segment, entering each
into the tables of whoever reads it, taking it out again. With pages of 2 MiB instead of 4 KiB next to nothing of that
is left. By default Linux gives files in memory small pages only, but it makes huge ones of them when it is asked to
(MADV_COLLAPSE, since 6.1), whatever is set for the system.

A huge page is entered as one only where its address is a multiple of its size. `mmap` does not choose such an address,
so a larger stretch is reserved, and the file is mapped into the middle of it.

Where huge pages cannot be had (another system, no `ctypes`, memory in small pieces), everything works as well with
small ones. Nothing here is needed for what is right, only for what is fast.

Source: madvise(2), "MADV_COLLAPSE".
"""

from __future__ import annotations

import functools
import mmap
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["collapse", "huge_page", "map_file"]

_SIZE_FILE = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"

_COLLAPSE = 25
_MAP_FIXED = 0x10

# After huge pages could not be had, nobody asks again for so long (seconds). Why: the kernel first tries to make room
# by moving other pages, which takes the longer the less there is.
_REST = 10.0

Owner = TypeVar("Owner", bound=mmap.mmap)


def huge_page() -> int:
    """Return the size of the huge pages that may be asked for now (bytes), or 0."""
    system = _system()
    return system.size if system is not None and time.monotonic() >= system.rests_until else 0


def map_file(fd: int, size: int, owner: Callable[..., Owner], *, flags: int, prot: int) -> tuple[Owner, int]:
    """Map the beginning of a file, if it can be at an address that is good for huge pages.

    Args:
        fd: The file's descriptor.
        size: Bytes to map, at least 1.
        owner: Makes the `mmap` that owns the addresses.
        flags: As for `mmap`.
        prot: As for `mmap`; reading and writing.

    Returns:
        The owner, and where in it the file begins.

    Raises:
        OSError: There is no room.
        ValueError: The file is shorter.
    """
    system = _system()
    if system is not None and system.size <= size <= os.fstat(fd).st_size:
        found = system.map_aligned(fd, size, owner, flags, prot)
        if found is not None:
            return found
    return owner(fd, size, flags=flags, prot=prot), 0


def collapse(owner: mmap.mmap, start: int, end: int) -> bool:
    """Make huge pages of a part of a mapped file. Other threads go on meanwhile.

    Args:
        owner: What `map_file` has returned; shared with the file.
        start: Where in it the part begins: a multiple of `huge_page()` in the file. From here on at least one byte in
            each huge page must have been written.
        end: Where it ends, a multiple as well.

    Returns:
        Whether that part consists of huge pages now. Otherwise some of it may.
    """
    system = _system()
    return system is not None and system.collapse(owner, start, end)


class _System:
    """The calls to the C library. Concurrency: any thread; what is noted is a hint.

    Attributes:
        size: Of a huge page, in bytes.
        rests_until: When to ask for huge pages again, in monotonic seconds.
    """

    def __init__(self, size: int) -> None:
        import ctypes

        self.size = size
        self.rests_until = 0.0
        self._lost: list[Any] = []
        self._ctypes = ctypes
        c_int, c_size, c_pointer = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
        libc = ctypes.CDLL(None)
        self._map = libc.mmap
        self._map.argtypes = (c_pointer, c_size, c_int, c_int, c_int, ctypes.c_long)
        self._map.restype = c_pointer
        self._advise = libc.madvise
        self._advise.argtypes = (c_pointer, c_size, c_int)

    def map_aligned(
        self, fd: int, size: int, owner: Callable[..., Owner], flags: int, prot: int
    ) -> tuple[Owner, int] | None:
        if self._lost:
            return None
        try:
            reserved = owner(-1, size + self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            return None
        address = self._address(reserved)
        start = -address % self.size
        address += start
        if self._map(address, size, prot, flags | _MAP_FIXED, fd, 0) != address:
            # Race: it may have left a hole, where another thread may have mapped something since. So the reservation
            # must not be given back, and nobody tries again.
            self._lost.append(reserved)
            return None
        return reserved, start

    def collapse(self, owner: mmap.mmap, start: int, end: int) -> bool:
        address = self._address(owner) + start
        if address % self.size:
            return False
        if self._advise(address, end - start, _COLLAPSE) == 0:
            return True
        self.rests_until = time.monotonic() + _REST
        return False

    def _address(self, owner: mmap.mmap) -> int:
        return self._ctypes.addressof(self._ctypes.c_char.from_buffer(owner))


@functools.cache
def _system() -> _System | None:
    if sys.platform != "linux":
        return None
    try:
        with open(_SIZE_FILE, encoding="ascii") as file:
            return _System(int(file.read()))
    except Exception:  # this kernel has none, or this interpreter no `ctypes`
        return None
