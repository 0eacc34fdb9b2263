"""Jobs and initializers that misbehave, each in one way, and a few that behave, for comparison."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from bulkhead import testing
from bulkhead.engines.processes.segments import SegmentPool

MEGABYTE = 1_000_000

# A process that lives until it is killed, and one that also ignores SIGTERM.
_FOREVER = "import time; time.sleep(10**6)"
_STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {_FOREVER}"

_place = SegmentPool.place


# Jobs that behave


def double(number: int) -> int:
    return 2 * number


def double_at_leisure(number: int) -> int:
    """Take two milliseconds every fifth time, so that processes die while they run jobs and between jobs."""
    if number % 5 == 0:
        time.sleep(0.002)
    return 2 * number


def own_pid() -> int:
    return os.getpid()


def instant_of_start() -> float:
    """Return when the job began; this clock is the same in every process of the machine."""
    return time.monotonic()


def zeros(size: int) -> bytes:
    return bytes(size)


def zeros_through_the_pipe(size: int) -> bytes:
    """Return so many bytes from a worker that gets no shared memory from now on."""
    withhold_room()
    return bytes(size)


def withhold_room() -> None:
    """Give this process no shared memory from now on."""
    SegmentPool.place = no_room


def grant_room() -> None:
    """Give this process shared memory again."""
    SegmentPool.place = _place


def no_room(segments: SegmentPool, buffers: object) -> NoReturn:
    """Refuse to place anything, as when the machine has no shared memory left."""
    raise OSError(errno.ENOSPC, "no room")


def size_of(data: bytes) -> int:
    return len(data)


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def wait_for_file(path: Path) -> int:
    """Hold the slot until the file is there."""
    while not path.exists():
        time.sleep(0.005)
    return os.getpid()


def note(path: Path, text: str = "") -> int:
    """Append a line to the file; return the number of its lines."""
    append(path, text)
    return len(path.read_text().splitlines())


def append(path: Path, text: object) -> None:
    with path.open("a") as file:
        file.write(f"{text}\n")


# Jobs that end their process


kill_self = testing.crash
exit_with = testing.exit_process
segfault = testing.segfault


def speak_and_segfault(lines: int) -> None:
    for number in range(lines):
        print(f"line {number}")
    print("last words", file=sys.stderr)
    ctypes.string_at(0)


def answer_and_die() -> str:
    """Return a value from a process that dies as soon as the value is in the pipe."""
    threading.Thread(target=_die_after_next_write, args=(_writes(),), daemon=True).start()
    return "answered"


def _die_after_next_write(before: int) -> None:
    while _writes() == before:
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def _writes() -> int:
    return next(
        int(line.split()[1])
        for line in Path("/proc/self/io").read_text().splitlines()
        if line.startswith("syscw")
    )


class KillsItsReader:
    """An argument that kills the process in which it is rebuilt."""

    def __getstate__(self) -> dict[str, int]:
        return {"signal": signal.SIGKILL}

    def __setstate__(self, state: dict[str, int]) -> None:
        os.kill(os.getpid(), state["signal"])


def take(*values: Any) -> int:
    return len(values)


def crash_once(marks: Path, number: int) -> int:
    """Kill the process at the first call with this number, return it at the second."""
    try:
        (marks / str(number)).touch(exist_ok=False)
    except FileExistsError:
        return number
    os.kill(os.getpid(), signal.SIGKILL)
    return -1


def hold_memory_and_die(size: int) -> None:
    _fill(size)
    os.kill(os.getpid(), signal.SIGKILL)


def allocate_within(group: Path) -> None:
    """Enter the memory cgroup and allocate until killed."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    print("entered the group", flush=True)
    kept = []
    while True:
        kept.append(_fill(16 * MEGABYTE))


def _fill(size: int) -> bytes:
    return b"x" * size


# Jobs that hang


def loop() -> None:
    while True:
        pass


def sleep_in_c() -> None:
    time.sleep(10**6)


def sleep_with_gil() -> None:
    """Sleep in C code that never gives the GIL away."""
    ctypes.PyDLL(None).sleep(10**6)


def sum_with_gil() -> None:
    sum(range(10**12))


def ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    loop()


def block_sigterm() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    loop()


def catch_sigterm() -> None:
    """Turn SIGTERM into an exception and swallow it, again and again."""

    def refuse(*_: object) -> None:
        raise InterruptedError

    signal.signal(signal.SIGTERM, refuse)
    while True:
        try:
            time.sleep(10**6)
        except InterruptedError:
            pass


def answer_sigterm() -> str:
    """Return a value when told to end."""
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    told.wait()
    return "too late"


def leave_group() -> None:
    """Join the process group of the parent, and hang there."""
    os.setpgid(0, os.getpgid(os.getppid()))
    loop()


def stop_self() -> str:
    os.kill(os.getpid(), signal.SIGSTOP)
    return "continued"


def stop_self_and_hang() -> None:
    """Hang, stopped until somebody has the process go on."""
    stop_self()
    sleep_in_c()


def hang_with_child(pids: Path, *, stubborn: bool = False, new_session: bool = False) -> None:
    """Start a process that lives for ever, note its pid, and wait for it."""
    code = _STUBBORN if stubborn else _FOREVER
    child = subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=new_session)
    append(pids, child.pid)
    child.wait()


def hang_with_daemon(pids: Path) -> None:
    """Start a process the way daemons are started: in a session of its own, its parent gone."""
    start_daemon(pids)
    loop()


def start_daemon(pids: Path) -> None:
    middle = os.fork()
    if middle == 0:
        os.setsid()
        if os.fork() == 0:
            append(pids, os.getpid())
            time.sleep(10**6)
        os._exit(0)
    os.waitpid(middle, 0)
    while not pids.exists():
        time.sleep(0.005)


def crash_with_child(pids: Path) -> None:
    """Fork a process that holds copies of all descriptors, and die."""
    child = os.fork()
    if child == 0:
        time.sleep(10**6)
    append(pids, child)
    os.kill(os.getpid(), signal.SIGKILL)


# Jobs that damage their surroundings


def close_descriptors(first: int) -> str:
    os.closerange(first, 65536)
    return "closed"


def write_everywhere(garbage: bytes) -> str:
    """Write into every descriptor but the standard ones, without waiting where a pipe is full."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2:
            try:
                os.set_blocking(fd, False)
                os.write(fd, garbage)
            except OSError:
                pass
    return "written"


def fork_and_return_twice() -> str:
    """Return in the worker and, just before, in a forked copy of it."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return "parent"
    return "child"


def fork_and_raise_in_child() -> str:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return "parent"
    raise ValueError("in the child")


def fork_and_leave_child(pids: Path) -> str:
    """Return and leave a forked copy running, with copies of all descriptors."""
    child = os.fork()
    if child == 0:
        time.sleep(10**6)
    append(pids, child)
    return "parent"


# Jobs to retry


def fail_until(log: Path, attempt: int) -> int:
    """Raise ValueError in all attempts before this one; return the number of attempts."""
    made = note(log, str(time.monotonic()))
    if made < attempt:
        raise ValueError(f"attempt {made}")
    return made


def fail_with(log: Path, error: Exception) -> None:
    note(log)
    raise error


def note_and_call(log: Path, fn: Any, *args: Any) -> Any:
    note(log)
    return fn(*args)


# Initializers


def exit_at_start(log: Path, code: int) -> None:
    append(log, time.monotonic())
    os._exit(code)


def raise_at_start(log: Path) -> None:
    append(log, time.monotonic())
    raise RuntimeError("the licence server said no")


def segfault_at_start(log: Path) -> None:
    append(log, time.monotonic())
    ctypes.string_at(0)


def crash_first_start(marks: Path) -> None:
    crash_once(marks, 0)
