"""Jobs that leak, grow and linger, for the limits of a pool."""

from __future__ import annotations

import gc
import mmap
import multiprocessing.util
import os
import subprocess
import sys
import time
from pathlib import Path

from jobs import note
from waiting import wait_until

from bulkhead.engines.processes.memory import rss_of

__all__ = [
    "MIB",
    "allowed_cpus",
    "fail_if_there",
    "filled",
    "fork_and_share",
    "grow",
    "grow_at_first",
    "grow_holding_the_lock",
    "grow_if",
    "keep",
    "large_initializer",
    "leak_and_tell",
    "linger_at_exit",
    "make_garbage",
    "make_large",
    "note_at_exit",
    "note_number",
    "own_bytes",
    "resident",
    "start_a_large_process",
    "wait_while_there",
]

MIB = 1 << 20

# A job that nobody stops must not take the machine along.
_FAR_TOO_MUCH = 3 << 30

_kept: list[object] = []


def filled(n_bytes: int) -> bytearray:
    """Return so many bytes, each page of them resident."""
    return bytearray(b"x") * n_bytes


def own_bytes() -> int:
    return rss_of(os.getpid())


def resident(n_bytes: int) -> mmap.mmap:
    """Return so much memory that does not come from the heap, which may have as much to spare already."""
    taken = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, n_bytes, mmap.PAGESIZE):
        taken[page] = 1
    return taken


def keep(n_bytes: int) -> int:
    """Leak so much; return the process."""
    _kept.append(resident(n_bytes))
    return os.getpid()


def leak_and_tell(number: int, n_bytes: int) -> tuple[int, int]:
    return number, keep(n_bytes)


def grow(path: str | None = None) -> None:
    """Take more and more memory in pieces."""
    if path is not None:
        note(path, os.getpid())
    pieces = []
    while len(pieces) * 4 * MIB < _FAR_TOO_MUCH:
        pieces.append(filled(4 * MIB))
    raise AssertionError("nobody has stopped this job")


def grow_if(number: int, which: int) -> int:
    if number == which:
        grow()
    return number


def grow_at_first(path: str) -> int:
    attempt = len(Path(path).read_text().splitlines()) + 1 if Path(path).exists() else 1
    note(path, os.getpid())
    if attempt == 1:
        grow()
    return attempt


def grow_holding_the_lock() -> None:
    """Take gigabytes in a single call in C, which holds the interpreter lock from beginning to end."""
    filled(_FAR_TOO_MUCH)
    raise AssertionError("nobody has stopped this job")


def make_large(n_bytes: int) -> tuple[int, bytes]:
    return os.getpid(), bytes(filled(n_bytes))


def make_garbage(n_bytes: int) -> int:
    """Leave so much that only the collector of cycles can find."""
    gc.disable()
    circle: list[object] = [filled(n_bytes)]
    circle.append(circle)
    return os.getpid()


def start_a_large_process(path: str, n_bytes: int) -> None:
    """Have the memory taken by a process that the job starts."""
    code = f"import time; data = bytearray(b'x') * {n_bytes}; time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code])
    note(path, child.pid)
    child.wait()


def fork_and_share(n_bytes: int, n_copies: int, seconds: float) -> int:
    """Take so much and fork copies that have it in common."""
    data = filled(n_bytes)
    pids = []
    for _ in range(n_copies):
        pid = os.fork()
        if pid == 0:
            time.sleep(seconds)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    return len(data)


def linger_at_exit() -> int:
    """Keep this worker from leaving soon when it is sent home."""
    multiprocessing.util.Finalize(None, time.sleep, args=(60,), exitpriority=1)
    return os.getpid()


def note_at_exit(path: str) -> None:
    """Have this worker take its time for something that it does when it leaves."""

    def note_late() -> None:
        time.sleep(0.2)
        note(path, "left")

    multiprocessing.util.Finalize(None, note_late, exitpriority=1)


def note_number(path: str, number: int) -> int:
    note(path, number)
    return number


def allowed_cpus() -> tuple[set[int], set[int]]:
    """Return the CPUs that this process may use, and those that one started by it may use."""
    code = "import os; print(*os.sched_getaffinity(0))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return os.sched_getaffinity(0), set(map(int, told.split()))


def fail_if_there(path: str) -> None:
    """Initializer that fails as soon as there is such a file; the number of its calls is noted beside it."""
    note(f"{path}.calls", os.getpid())
    if Path(path).exists():
        raise RuntimeError("the licence has expired")


def wait_while_there(path: str) -> None:
    """Initializer that holds its worker up as long as there is such a file."""
    wait_until(lambda: not Path(path).exists(), within=60)


def large_initializer(n_bytes: int) -> None:
    keep(n_bytes)
