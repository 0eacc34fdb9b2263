"""The standard streams of a worker whose output is captured: descriptors 1 and 2 lead to its caller.

So whatever runs in the worker is captured: Python, C code, what a job starts. Python's streams and C's `stdout` are
made line buffered, so that what has been printed in whole lines is out when the process is killed, and both are flushed
at the end of each job, before its answer is sent.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from bulkhead.engines.processes.blackbox import BlackBox

__all__ = ["CapturedBox", "redirect"]

_IOLBF = 1  # of setvbuf(3): line buffered

# Streams that were replaced. Why kept: after a fork they hold what the caller had not flushed, and would write it when
# they are collected.
_replaced: list[Any] = []


class CapturedBox(BlackBox):
    """The black box of a worker whose output is captured."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._flush_c = _line_buffered_c()
        self.has_output = True  # Why always: what C code or `sys.stdout.buffer` has printed is not noted

    def flush_output(self) -> None:
        """Send on what the last job has printed."""
        super().flush_output()
        self._flush_c()
        self.has_output = True


def redirect(out: int, err: int) -> None:
    """Lead this process's standard output and standard error into these descriptors."""
    import fcntl

    # Why copies first: a caller without standard streams may have given away descriptors that are 1 or 2 here.
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (out, err)]
    for fd in {out, err} - {1, 2}:
        os.close(fd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        copy = copies[number - 1]
        os.dup2(copy, number)
        os.close(copy)
        _replaced.extend((getattr(sys, name), getattr(sys, f"__{name}__")))
        stream = open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _line_buffered_c() -> Callable[[], object]:
    """Make C's `stdout` line buffered; return a function that flushes it."""
    try:
        import ctypes

        libc = ctypes.CDLL(None)
        stream = ctypes.c_void_p.in_dll(libc, "__stdoutp" if sys.platform == "darwin" else "stdout")
        if hasattr(libc, "__fpurge"):
            libc.__fpurge(stream)  # after a fork: what the caller had not flushed
        libc.setvbuf(stream, None, _IOLBF, 0)
    except (ImportError, OSError, ValueError, AttributeError):
        return lambda: None
    return lambda: libc.fflush(stream)
