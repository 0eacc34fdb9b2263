"""Jobs and initializers that print and log, for the tests of output."""

from __future__ import annotations

import ctypes
import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

# Jobs that print


def say(text: str, err: str | None = None) -> str:
    print(text)
    if err is not None:
        print(err, file=sys.stderr)
    return text


def say_without_end(text: str) -> None:
    print(text, end="")


def say_in_every_way() -> None:
    """Print from Python, past Python, from C code, and from processes that the job starts."""
    print("from Python")
    sys.stdout.buffer.write(b"from a buffer\n")
    os.write(1, b"from a descriptor\n")
    ctypes.CDLL(None).printf(b"from C\n")
    subprocess.run(["sh", "-c", "echo from a child; echo error of a child >&2"], check=True)
    print("error from Python", file=sys.stderr)
    os.write(2, b"error from a descriptor\n")
    sys.stdout.flush()
    ctypes.CDLL(None).printf(b"from C without an end")


def say_in_process(text: str) -> None:
    process = multiprocessing.get_context("fork").Process(target=say, args=(text,))
    process.start()
    process.join()


def write_raw(data: bytes, fd: int = 1) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def print_lines(number: int, text: str) -> None:
    for index in range(number):
        print(text, index)


def print_pieces(number: int, piece: str) -> None:
    """Print lines whose pieces are written one by one."""
    for _ in range(number):
        for _ in range(5):
            os.write(1, piece.encode())
            time.sleep(0.0001)
        os.write(1, b"\n")


def print_for_ever() -> None:
    while True:
        print("x" * 99)


def say_and_wait(text: str, path: Path) -> None:
    print(text)
    wait_for(path)


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.002)


def say_and_fail(text: str) -> None:
    print(text)
    raise ValueError(text)


def say_and_fail_at_first(path: Path) -> str:
    if not path.exists():
        path.touch()
        print("attempt 1")
        raise ValueError("attempt 1")
    print("attempt 2")
    return "done"


def say_and_hang(text: str) -> None:
    print(text)
    time.sleep(10**6)


def say_and_kill_self(whole: str, part: str, number: int = signal.SIGKILL) -> None:
    """Print a line and the beginning of another one, and die."""
    print(whole)
    os.write(1, part.encode())
    os.kill(os.getpid(), number)
    time.sleep(10**6)


def leave_child_with_stdout(code: str) -> int:
    """Return while a process that this one has started still has its standard output."""
    child = subprocess.Popen([sys.executable, "-S", "-c", code])
    return child.pid


def leave_thread_printing(path: Path) -> None:
    def run() -> None:
        wait_for(path)
        print("from a thread that was left")
        path.unlink()

    threading.Thread(target=run, daemon=True).start()


def close_stdout() -> str:
    os.close(1)
    os.close(2)
    return "closed"


def point_stdout_elsewhere(path: Path) -> str:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(fd, 1)
    os.close(fd)
    print("into a file")
    return "elsewhere"


def replace_stdout() -> str:
    sys.stdout = io.StringIO()
    print("into a buffer")
    return "replaced"


def descriptors() -> dict[int, str]:
    """Return what this process has open."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = str(Path("/proc/self/fd", name).readlink())
        except OSError:
            pass
    return found


def calls_so_far() -> int:
    """Return how often this process has read and written."""
    return sum(
        int(line.split()[1])
        for line in Path("/proc/self/io").read_text().splitlines()
        if line.startswith(("syscr", "syscw"))
    )


def square_aloud(number: int) -> int:
    print(f"squaring {number}")
    return number * number


def say_much_and_return_much(number: int) -> bytes:
    print("x" * 60_000)
    return bytes(200_000 + number)


class Nameless:
    """An id that cannot be printed."""

    def __str__(self) -> str:
        raise ValueError("no name")


# Jobs that log


class Odd:
    """Can be pickled and not be rebuilt in any process but this one."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return _only_in, (os.getpid(), self.value)

    def __str__(self) -> str:
        return f"odd {self.value}"

    __repr__ = __str__


def _only_in(pid: int, value: int) -> Odd:
    if pid != os.getpid():
        raise RuntimeError("cannot be rebuilt here")
    return Odd(value)


class Point:
    def __init__(self, x: int) -> None:
        self.x = x

    def __str__(self) -> str:
        return f"point {self.x}"


def log(name: str, level: int, text: str, *args: Any, **extra: Any) -> int:
    logging.getLogger(name).log(level, text, *args, extra=extra)
    return os.getpid()


def log_odd(name: str) -> None:
    logging.getLogger(name).warning(
        "odd ones: %s and %s", threading.Lock(), Odd(3), extra={"lock": threading.Lock()}
    )
    logging.getLogger(name).warning("an odd one: %s", Odd(4), extra={"odd": Odd(5)})
    logging.getLogger(name).warning("a good one: %s", Point(6), extra={"point": Point(7)})
    logging.getLogger(name).warning("does not fit: %s %s", *[Odd(8)])


def log_error(name: str) -> None:
    try:
        raise KeyError("no such thing")
    except KeyError:
        logging.getLogger(name).exception("it failed", stack_info=True)


def log_at_all_levels(name: str) -> None:
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logging.getLogger(name).log(level, "level %d", level)


def log_much(name: str, size: int) -> None:
    logging.getLogger(name).warning("y" * size)
    logging.getLogger(name).warning("after it")


def log_many(name: str, number: int) -> None:
    for index in range(number):
        logging.getLogger(name).warning("record %d", index)


def log_in_process_and_thread(name: str) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=log, args=(name, logging.WARNING, "from a process")
    )
    process.start()
    process.join()
    thread = threading.Thread(target=log, args=(name, logging.WARNING, "from a thread"))
    thread.start()
    thread.join()


def log_and_kill_self(name: str) -> None:
    logging.getLogger(name).warning("last words")
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(10**6)


def handlers_of(name: str | None) -> list[str]:
    return [type(one).__name__ for one in logging.getLogger(name).handlers]


# Initializers


def say_at_start(text: str) -> None:
    print(text)


def say_and_exit(text: str) -> None:
    print(text)
    os._exit(3)


def log_at_start(name: str) -> None:
    logging.getLogger(name).warning("from the initializer")


def log_to_file(path: Path, name: str | None = None) -> None:
    """Configure logging as users do in the initializers of other pools."""
    logging.getLogger(name).addHandler(logging.FileHandler(path))


def log_to_file_by_force(path: Path) -> None:
    logging.basicConfig(filename=path, force=True)
