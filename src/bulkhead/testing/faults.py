"""What can go wrong in a worker. Each function can be dispatched as a job, or injected into one of the user's.

They are meant for workers: in the caller's own process they do to it what they say.
"""

from __future__ import annotations

import os
import signal as signals
import time
from typing import Any

__all__ = [
    "Unrebuildable",
    "crash",
    "exit_process",
    "fail",
    "fail_unrebuildably",
    "hang",
    "leak",
    "return_unpicklable",
    "segfault",
    "slow",
]

_FOR_EVER = 10**6  # seconds

_leaked: list[bytes] = []


class Unrebuildable(Exception):
    """An exception that no other process can rebuild: its arguments are not those of its `__init__`."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


def crash(signal: int = signals.SIGKILL) -> None:
    """End the process by a signal: the job fails with WorkerCrashed, which names it."""
    if signals.getsignal(signal) not in (signals.SIG_DFL, None):
        signals.signal(signal, signals.SIG_DFL)  # workers ignore some, or a job handles it
    os.kill(os.getpid(), signal)
    time.sleep(_FOR_EVER)


def segfault() -> None:
    """Read memory that is not there, as broken C code does: WorkerCrashed with SIGSEGV and the Python stack."""
    import ctypes

    ctypes.string_at(0)


def exit_process(code: int = 1) -> None:
    """End the process at once with an exit code, as C code that calls exit: WorkerCrashed with that code."""
    os._exit(code)


def hang(*, ignore_sigterm: bool = False) -> None:
    """Never return: the job's timeout or a cancellation has to end it.

    Args:
        ignore_sigterm: Bear the first rung of the kill ladder, so that only SIGKILL ends it.
    """
    if ignore_sigterm:
        signals.signal(signals.SIGTERM, signals.SIG_IGN)
    while True:
        time.sleep(_FOR_EVER)


def slow(seconds: float) -> None:
    """Take so long."""
    time.sleep(seconds)


def fail(error: BaseException | None = None) -> None:
    """Raise `error`, by default a RuntimeError."""
    raise RuntimeError("a fault that was injected") if error is None else error


def fail_unrebuildably() -> None:
    """Raise an exception that cannot be rebuilt in the caller: it arrives as RemoteError."""
    raise Unrebuildable("one", "other")


def return_unpicklable() -> Any:
    """Return what cannot be sent to the caller: the job fails with RemoteError."""
    return (number for number in range(3))


def leak(size: int) -> None:
    """Take `size` bytes of memory that the process never gives back."""
    _leaked.append(b"x" * size)  # Why not zeros: untouched pages take no memory
