"""Jobs on large data, and where that data lies: which segment a buffer is in, which segments a process has."""

from __future__ import annotations

import gc
import math
import mmap
import operator
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
from faulty_jobs import KillsItsReader
from jobs import note

from bulkhead import Dispatcher
from bulkhead.engines.processes import segments, worker_main

MEGABYTE = 1 << 20

# What the library calls its segments where they show.
_NAME = "memfd:bulkhead-segment"


# Measures


class Place(NamedTuple):
    """Where a buffer lies."""

    segment: int  # inode
    access: str  # as in /proc/PID/maps: "rw-p" is writable and private


def place_of(buffer: Any) -> Place | None:
    """Return in which segment a buffer lies; None when it lies in this process's own memory."""
    address = np.frombuffer(buffer, np.uint8).ctypes.data
    for start, end, access, inode, name in _mappings(os.getpid()):
        if start <= address < end:
            return Place(inode, access) if _NAME in name else None
    raise AssertionError("the buffer lies nowhere")


def segments_of(*pids: int) -> dict[int, int]:
    """Return the segments that these processes have open or mapped: inode and bytes of memory."""
    found: dict[int, int] = {}
    for pid in pids:
        for entry in _entries(Path(f"/proc/{pid}/fd")):
            try:
                if _NAME in str(entry.readlink()):
                    status = entry.stat()
                    found[status.st_ino] = status.st_blocks * 512
            except OSError:  # closed meanwhile
                continue
        for start, end, _, inode, name in _mappings(pid):
            if _NAME in name:
                found.setdefault(inode, end - start)
    return found


def shared_by(*pids: int) -> set[int]:
    """Return the segments that these processes have mapped to read only."""
    return {
        inode
        for pid in pids
        for _, _, access, inode, name in _mappings(pid)
        if _NAME in name and access == "r--p"
    }


def shared_memory_bytes() -> int:
    """Return what the whole machine has in shared memory, also that which is on its way between two processes."""
    return _kilobytes("/proc/meminfo", "Shmem:") * 1024


def anonymous_bytes() -> int:
    """Return what this process has in memory of its own."""
    return _kilobytes("/proc/self/status", "RssAnon:") * 1024


def resident_bytes() -> int:
    return _kilobytes("/proc/self/status", "VmRSS:") * 1024


def shares_of(pid: int, segment: int) -> tuple[int, int]:
    """Return how much of a segment is in the process's memory, and its share of that among those who map it (bytes)."""
    resident = share = 0
    is_it = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_it = words[4] == str(segment)
        elif is_it and words[0] == "Rss:":
            resident += int(words[1]) * 1024
        elif is_it and words[0] == "Pss:":
            share += int(words[1]) * 1024
    return resident, share


def _mappings(pid: int) -> Iterator[tuple[int, int, str, int, str]]:
    try:
        text = Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # the process is gone
        return
    for line in text.splitlines():
        span, access, _, _, inode, *name = line.split(maxsplit=5)
        start, _, end = span.partition("-")
        yield int(start, 16), int(end, 16), access, int(inode), name[0] if name else ""


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # the process is gone
        return []


def _kilobytes(path: str, key: str) -> int:
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(key))


def give_back(*disps: Dispatcher) -> None:
    """Have the caller give its free segments to the system now, instead of keeping them for the next jobs."""
    for disp in disps:
        for pool in disp._pools.values():
            pool.segments.trim(math.inf)


# Jobs


def keep_shared_briefly() -> None:
    """As an initializer: have the worker give shared objects back soon after a job."""
    worker_main._KEEP_SHARED_FOR = 0.02


def filled(value: int, size: int) -> np.ndarray:
    return np.full(size, value, np.uint8)


def filled_here(value: int, size: int) -> tuple[int, np.ndarray]:
    return os.getpid(), filled(value, size)


def total(array: np.ndarray) -> int:
    return int(array.sum(dtype=np.int64))


def values_in(array: np.ndarray) -> list[int]:
    return np.unique(array).tolist()


def where(buffer: Any) -> Place | None:
    return place_of(buffer)


def where_and_total(array: np.ndarray) -> tuple[Place | None, int]:
    return place_of(array), total(array)


def measured(array: np.ndarray) -> tuple[Place | None, bool, int, int]:
    """Return where the array lies, whether it can be written to, and how many bytes of memory of its own the process
    takes to read all of it and to write one byte of it.
    """
    before = anonymous_bytes()
    array.sum()
    summed = anonymous_bytes()
    array[0] += 1
    return place_of(array), bool(array.flags.writeable), summed - before, anonymous_bytes() - summed


def faults_in_reading(array: np.ndarray) -> int:
    """Read every page; return how often the kernel had to enter some of them."""
    array[:1].sum()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array[:: mmap.PAGESIZE].sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def overwrite(array: np.ndarray) -> tuple[list[int], Place | None]:
    """Return what was in the array, and where it lies; leave something else in it."""
    found = values_in(array)
    array[:] = 99
    return found, place_of(array)


def raise_by_one(array: np.ndarray) -> list[int]:
    """Write into the whole array."""
    array += 1
    return values_in(array)


def raised_by_one(array: np.ndarray) -> np.ndarray:
    return array + 1


def totals(arrays: list[np.ndarray]) -> list[int]:
    return list(map(total, arrays))


def total_of_buffer(buffer: Any) -> int:
    return sum(memoryview(buffer).cast("B"))


def are_writable(arrays: list[np.ndarray]) -> list[bool]:
    return [bool(array.flags.writeable) for array in arrays]


def are_one(first: Any, second: Any) -> bool:
    return first is second


def place_of_column(frame: Any, name: str) -> Place | None:
    return place_of(frame[name].to_numpy())


def sum_of_column(frames: list[Any], name: str) -> int:
    return int(frames[0][name].sum())


def place_of_chunk(table: Any) -> Place | None:
    return place_of(table.column(0).chunks[0].buffers()[1])


def write_and_fail_at_first(marks: str, array: np.ndarray) -> tuple[int, list[int]]:
    """Spoil the array and fail; at the second call return what is in it."""
    if not Path(marks).exists():
        array[:] = 99
        note(marks, os.getpid())
        raise OSError("the first attempt fails")
    return os.getpid(), values_in(array)


def write_and_die_at_first(marks: str, array: np.ndarray) -> tuple[int, list[int]]:
    if not Path(marks).exists():
        array[:] = 99
        note(marks, os.getpid())
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid(), values_in(array)


_kept: list[Any] = []


def keep(value: Any) -> Place | None:
    """Keep a buffer beyond the job."""
    _kept.append(value)
    return place_of(value)


def keep_slice(array: np.ndarray) -> None:
    _kept.append(array[1000:2000])


def make_cycle(array: np.ndarray) -> list[int]:
    """Leave the array in a cycle that only the garbage collector finds."""
    gc.disable()
    cycle: list[Any] = [array]
    cycle.append(cycle)
    return values_in(array)


def collect() -> None:
    gc.enable()
    gc.collect()


def kept() -> list[list[int]]:
    return [values_in(one) for one in _kept]


def drop_kept() -> None:
    _kept.clear()


def note_values(array: np.ndarray, gate: Path, found: Path) -> None:
    """Write down what is in the array when the gate opens."""
    wait_for(gate)
    note(found, values_in(array))


def fork_and_leave_reader(array: np.ndarray, gate: str, found: str) -> int:
    """Return, and leave a child behind that looks at the array when the gate opens and writes down what is in it."""
    child = os.fork()
    if child:
        return child
    try:
        note_values(array, Path(gate), Path(found))
    finally:
        os._exit(0)


def fork_and_return_twice(gate: str, size: int) -> tuple[int, np.ndarray]:
    """Return ones at once, and twos from a forked copy when the gate opens."""
    child = os.fork()
    if child:
        return child, filled(1, size)
    wait_for(Path(gate))
    return 0, filled(2, size)


def wait_for(gate: Path, longest: float = 60.0) -> None:
    """Wait until the file is there. A test that fails must not leave its processes waiting for ever."""
    end = time.monotonic() + longest
    while not gate.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"nobody opened {gate}")
        time.sleep(0.002)


def note_and_wait(mark: str, gate: str) -> None:
    note(mark, os.getpid())
    wait_for(Path(gate))


def note_and_wait_with(mark: str, array: np.ndarray) -> None:
    note_and_wait(mark, mark + " never")


def fail_with_array(value: int, size: int) -> NoReturn:
    raise ValueError("see the array", filled(value, size))


def hoard_descriptors() -> int:
    """Open files until no more can be opened, and keep them."""
    before = len(_kept)
    try:
        while True:
            _kept.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return len(_kept) - before


def hoard_descriptors_and_return(value: int, size: int) -> np.ndarray:
    hoard_descriptors()
    return filled(value, size)


def close_hoard() -> None:
    while _kept:
        os.close(_kept.pop())


def write_into(array: np.ndarray) -> None:
    array[0] = 99


def force_write_into(array: np.ndarray) -> None:
    array.flags.writeable = True
    array[0] = 99


def read_and_note(mark: str, gate: str, array: np.ndarray) -> tuple[int, Place | None]:
    """Read the whole array, say so, and hold it until the gate opens."""
    array.sum()
    note_and_wait(mark, gate)
    return os.getpid(), place_of(array)


def values_and_places(value: Any) -> Any:
    """Return lists, dicts and objects as they are, with the place and the values of each array instead of it."""
    if isinstance(value, np.ndarray):
        return place_of(value), values_in(value)
    if isinstance(value, dict):
        return {key: values_and_places(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [values_and_places(one) for one in value]
    if isinstance(value, Holder):
        return values_and_places(value.held)
    return value


class Holder:
    """Holds anything in an attribute."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def place(self) -> Place | None:
        return place_of(self.held)

    def values(self, more: int) -> list[int]:
        return values_in(self.held + more)


def add_to(words: dict[str, int]) -> dict[str, int]:
    words["added"] = len(words)
    return words


def set_kept(value: Any) -> None:
    """An initializer: keeps what it is given."""
    _kept[:] = [value]


def write_into_descriptors(garbage: bytes, value: Any) -> int:
    """Write into every segment this process has a descriptor of; return how many took it."""
    taken = 0
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if _NAME in str(Path(f"/proc/self/fd/{fd}").readlink()):
                os.pwrite(fd, garbage, 0)
                taken += 1
        except OSError:
            continue
    return taken


# Arguments and results that stop on their way


class Waits:
    """Notes its process and waits for the gate while it is pickled or rebuilt, wherever that is asked for.

    Args:
        mark: The file in which the process notes its pid.
        gate: The file that lets it go on.
        when: "pickled" or "rebuilt".
    """

    def __init__(self, mark: Path, gate: Path, when: str) -> None:
        self._plan = str(mark), str(gate), when

    def __reduce__(self) -> Any:
        mark, gate, when = self._plan
        if when == "pickled":
            note_and_wait(mark, gate)
            return str, ("pickled",)
        return note_and_wait, (mark, gate)


def waits_when_pickled(mark: Path, gate: Path, *rest: Any) -> list[Any]:
    """Return something whose pickling waits, after what else there is."""
    return [*rest, Waits(mark, gate, "pickled")]


def waits_when_rebuilt(mark: Path, gate: Path, *rest: Any) -> list[Any]:
    return [*rest, Waits(mark, gate, "rebuilt")]


def fill_when_open(gate: Path, value: int, size: int, mark: Path) -> np.ndarray:
    wait_for(gate)
    return filled_and_noted(mark, value, size)


def die_while_filling(step: str, value: int, size: int) -> list[np.ndarray]:
    """Return arrays from a process that dies after a step of filling their segment (see `end_after`)."""
    end_after(step)
    return [filled(value, size // 2), filled(value, size // 2)]


def filled_and_noted(mark: Path, value: int, size: int) -> np.ndarray:
    array = filled(value, size)
    note(mark, os.getpid())
    return array


def stop_while_filling(mark: Path, size: int) -> np.ndarray:
    note(mark, os.getpid())
    end_after("write", signal.SIGSTOP)
    return filled(1, size)


def large_and_broken(size: int) -> list[Any]:
    """Return what cannot be rebuilt, after a large array."""
    return [filled(1, size), Breaks()]


class Breaks:
    def __reduce__(self) -> Any:
        return operator.floordiv, (1, 0)


def large_and_deadly(size: int) -> list[Any]:
    """Return what kills the process that rebuilds it, after a large array."""
    return [filled(1, size), KillsItsReader()]


def end_after(step: str, number: int = signal.SIGKILL) -> None:
    """Kill or stop this process after the next step of filling a segment.

    Args:
        step: "write" is the first byte or bytes, "pages" when there are pages for all of it, "buffer" when the first
            of several buffers is copied.
    """
    file = segments._File
    owner, name = {"write": (os, "pwrite"), "pages": (file, "prepare"), "buffer": (file, "fill")}[step]
    fn = getattr(owner, name)

    def end(*args: Any) -> Any:
        done = fn(*args)
        os.kill(os.getpid(), number)
        return done

    setattr(owner, name, end)


def refusing() -> Refuses:
    return Refuses()


class Refuses(np.ndarray):
    """An array that cannot be pickled."""

    def __new__(cls) -> Self:
        return np.zeros(MEGABYTE, np.uint8).view(cls)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("not for you")


class Scattered:
    """Is pickled as a buffer whose bytes do not lie side by side."""

    def __reduce__(self) -> Any:
        return bytes, (pickle.PickleBuffer(np.zeros(2 * MEGABYTE, np.uint8)[::2]),)


def scattered() -> Scattered:
    return Scattered()


def call(fn: Callable[..., Any], *args: Any) -> Any:
    return fn(*args)
