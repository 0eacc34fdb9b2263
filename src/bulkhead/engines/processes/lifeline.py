"""No worker outlives its caller: the kernel ends it when the caller's end of a pipe closes.

Each worker holds the read end of a pipe whose only write end is in the caller, and nothing is ever written. When the
caller ends, however it ends, the kernel closes the write end and, since the worker asked for it, sends SIGKILL to the
worker's whole process group. No thread and no GIL is involved, so that a job stuck in C code ends too. The caller can
also close the line on purpose: that is a kill that needs neither a pid nor the launcher.

Where the system cannot send a chosen signal (not Linux), a thread of the worker reads the line instead; a job that
never lets go of the GIL then ends only with the launcher's SIGKILL.

Source: fcntl(2), F_SETSIG and F_SETOWN with a negative process group id.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading

__all__ = ["hold"]


def hold(fd: int) -> None:
    """Let this process, the leader of its group, end with all of its group when the other end of `fd` closes."""
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(fd, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
        # Race: the caller may have gone before the flag was set; then there is no event any more, but an end to read.
        if _is_cut(fd):
            _end_group()
        return
    threading.Thread(target=_watch, args=(fd,), name="bulkhead-lifeline", daemon=True).start()


def _is_cut(fd: int) -> bool:
    os.set_blocking(fd, False)
    try:
        return os.read(fd, 1) == b""
    except BlockingIOError:
        return False


def _watch(fd: int) -> None:
    os.set_blocking(fd, True)
    os.read(fd, 1)
    _end_group()


def _end_group() -> None:
    os.killpg(0, signal.SIGKILL)
