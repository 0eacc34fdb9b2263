"""How much memory a process takes: resident pages of its own.

Counted is what the system would get back if the process ended: not the pages of files that it has mapped (libraries,
`numpy.memmap`), which are a cache, and not shared memory (large arguments as they came, results under way, objects of
`Dispatcher.share`), which others have, too. What is written into a private mapping becomes the process's own.

Why not what C calls the data segment, or a limit that the system enforces (RLIMIT_AS, RLIMIT_DATA): those count address
space that is never touched, of which NumPy, Arrow and every thread reserve gigabytes. The system ignores RLIMIT_RSS.
"""

from __future__ import annotations

import os

__all__ = ["MIB", "descendants_of", "private_bytes_of", "rss_of"]

MIB = 1 << 20

_PAGE = os.sysconf("SC_PAGESIZE")
_HAS_STATM = os.path.exists("/proc/self/statm")
_HAS_ROLLUP = os.path.exists("/proc/self/smaps_rollup")
_HAS_CHILDREN = os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def rss_of(pid: int) -> int:
    """Return the resident bytes of a process's own, or 0 if there is none. Takes some 5 microseconds on Linux.

    Source: proc_pid_statm(5): size, resident, shared (file mappings and shared memory), in pages.
    """
    if not _HAS_STATM:
        return _by_psutil(pid, "memory_info", "rss")
    data = _read(f"/proc/{pid}/statm")
    if not data:
        return 0
    _, resident, shared, _ = data.split(None, 3)
    return max(int(resident) - int(shared), 0) * _PAGE


def private_bytes_of(pid: int) -> int:
    """Return the bytes that no other process has, or 0 if there is no such process. Takes milliseconds for a large one.

    Why besides `rss_of`: what a process had before it forked is resident in both.
    """
    if not _HAS_ROLLUP:
        return _by_psutil(pid, "memory_full_info", "uss")
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith(b"Private_Dirty:"):
            return int(line.split()[1]) * 1024
    return 0


def descendants_of(pid: int) -> list[int]:
    """Return the pids of a process's children, their children and so on."""
    if not _HAS_CHILDREN:
        return _descendants_by_psutil(pid)
    found = _children_of(pid)
    for child in found:  # it grows meanwhile
        found += _children_of(child)
    return found


def _children_of(pid: int) -> list[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    return [int(one) for thread in threads for one in _read(f"/proc/{pid}/task/{thread}/children").split()]


def _read(path: str) -> bytes:
    """Return the contents of a file of /proc, or nothing when its process is gone."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(fd, 65536)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _by_psutil(pid: int, question: str, field: str) -> int:
    import psutil

    try:
        return int(getattr(getattr(psutil.Process(pid), question)(), field))
    except psutil.Error:
        return 0


def _descendants_by_psutil(pid: int) -> list[int]:
    import psutil

    try:
        return [one.pid for one in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []
