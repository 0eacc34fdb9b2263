"""What a dispatcher could leave behind, counted: processes, threads, descriptors, shared memory."""

from __future__ import annotations

import gc
import os
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

from bulkhead.engines.processes.segments import SegmentPool

__all__ = ["Traces"]

# Inherited by everything that is started with a command, so that also processes whose parent has died are found.
_MARK = f"BULKHEAD_TEST_RUN={uuid.uuid4().hex}"
os.environ.update([_MARK.split("=")])

_PROC = Path("/proc")
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Traces:
    """What exists at one moment."""

    processes: tuple[str, ...]
    threads: tuple[str, ...]
    descriptors: tuple[str, ...]
    shared_memory: tuple[str, ...]

    @classmethod
    def now(cls) -> Traces:
        return cls(_processes(), _threads(), _descriptors(), _segments())

    def counts(self) -> tuple[int, int, int]:
        """Return the numbers of processes, threads and descriptors."""
        return len(self.processes), len(self.threads), len(self.descriptors)

    def beyond(self, before: Traces) -> dict[str, list[str]]:
        """Return what there is more of than before, each with the entries that are new."""
        more = {}
        for kind in ("processes", "threads", "descriptors"):
            then, now = getattr(before, kind), getattr(self, kind)
            if len(now) > len(then):
                more[kind] = sorted(set(now) - set(then))
        if "processes" in more:
            more["processes"] = list(map(_described, more["processes"]))
        if (new := set(self.shared_memory) - set(before.shared_memory)) and (
            new := new - _used_by_strangers()
        ):
            more["shared memory"] = sorted(new)
        return more


def _processes() -> tuple[str, ...]:
    me = os.getpid()
    if not _PROC.is_dir():
        return tuple(sorted(str(child.pid) for child in psutil.Process().children(recursive=True)))
    parents, marked = _parents_and_marked()
    ours = {me}
    # Why again and again: a child may come before its parent.
    while grown := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= grown
    return tuple(map(str, sorted((ours | marked) - {me})))


def _parents_and_marked() -> tuple[dict[int, int], set[int]]:
    """Return the parent of each process that can be ours, and those that were started with a command from here."""
    # Why not psutil: this is done before and after each test, and takes a third of the time.
    mark = _MARK.encode()
    parents, marked = {}, set()
    for name in (name for name, inode in _existing() if (name, inode) not in _STRANGERS):
        try:
            parents[int(name)] = int(_read(f"/proc/{name}/stat").rpartition(b")")[2].split()[1])
            if mark in _read(f"/proc/{name}/environ"):
                marked.add(int(name))
        except (OSError, IndexError):  # gone meanwhile, or somebody else's
            continue
    return parents, marked


def _existing() -> list[tuple[str, int]]:
    """Return each process with what tells it from a later one of the same pid."""
    with os.scandir(_PROC) as entries:
        return [(entry.name, entry.inode()) for entry in entries if entry.name.isdigit()]


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        data = b""
        while more := os.read(fd, 1 << 17):
            data += more
        return data
    finally:
        os.close(fd)


# Why left out: what existed before this process can neither be its child nor have its mark, and a look at each process
# of the machine before and after each test takes a millisecond. A later process with the same pid has another inode.
_STRANGERS: frozenset[tuple[str, int]] = frozenset(_existing() if _PROC.is_dir() else ())


def _described(pid: str) -> str:
    try:
        process = psutil.Process(int(pid))
        return f"{pid} {process.status()} {' '.join(process.cmdline())}"
    except psutil.Error:
        return f"{pid} gone"


def _threads() -> tuple[str, ...]:
    return tuple(thread.name for thread in threading.enumerate())


def _descriptors() -> tuple[str, ...]:
    if not _PROC.is_dir():
        return ("?",) * psutil.Process().num_fds()
    found, segments = [], []
    for name in os.listdir("/proc/self/fd"):
        try:
            named = f"{name} {os.readlink(f'/proc/self/fd/{name}')}"  # noqa: PTH115 - a Path costs more than the call
        except OSError:  # the descriptor of the listing itself
            continue
        (segments if "bulkhead-segment" in named else found).append(named)
    if segments:
        kept = _kept_segments()
        found += [named for named in segments if _inode(Path("/proc/self/fd", named.split()[0])) not in kept]
    return tuple(found)


def _kept_segments() -> set[int]:
    """Return the segments that pools which are open keep for their next message, for a while and on purpose."""
    pools = [thing for thing in gc.get_objects() if type(thing) is SegmentPool]
    files = [file for pool in pools for file in (*pool._free, *pool._returned)]
    return {os.fstat(file.fd).st_ino for file in files if file.fd >= 0}


def _segments() -> tuple[str, ...]:
    return tuple(entry.name for entry in _SHARED_MEMORY.iterdir()) if _SHARED_MEMORY.is_dir() else ()


def _used_by_strangers() -> set[str]:
    """Return the names in shared memory that a process maps which is none of ours: other programs run here too."""
    ours = {os.getpid(), *(int(line.split()[0]) for line in _processes())}
    # Why by inode: sem_open maps a file of another name, which it then links to the one that is seen.
    mapped: set[int] = set()
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and int(entry.name) not in ours:
            try:
                maps = (entry / "maps").read_text()
            except OSError:
                continue
            mapped.update(int(line.split()[4]) for line in maps.splitlines() if "/dev/shm/" in line)
    return {entry.name for entry in _SHARED_MEMORY.iterdir() if _inode(entry) in mapped}


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
