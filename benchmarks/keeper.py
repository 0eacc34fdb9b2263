"""Run a command in a folder of its own, and let neither outlive whoever asked for it.

    python keeper.py PROGRAM ARGUMENT ...        stdin: a pipe whose other end the caller holds

The keeper ends the command, and all that came of it, when the command ends and when the pipe closes. The system closes
it whatever the caller dies of. Processes that leave their group or session do not escape: orphans of the command become
children of the keeper (PR_SET_CHILD_SUBREAPER), which kills until there is none. Its exit code is the command's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import psutil

__all__ = ["die_with_parent"]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_prctl = ctypes.CDLL(None).prctl


def main() -> int:
    """Do it."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        command = subprocess.Popen(
            sys.argv[1:],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - this process has one thread
        )
        # Why: whoever ends the benchmark by its name means us, too; but then there is something left to do.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=_end_with_caller, args=(command,), daemon=True).start()
        try:
            code = command.wait()
        finally:
            _kill_all()
    return code if code >= 0 else 128 - code


def die_with_parent() -> None:
    """Have the system kill this process when the one that has made it dies. For `preexec_fn`."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _end_with_caller(command: subprocess.Popen[bytes]) -> None:
    while os.read(0, 4096):
        pass
    command.kill()


def _kill_all() -> None:
    """Kill until nobody is left. Race: who is killed may have made another meanwhile, which then becomes our child."""
    while True:
        for one in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
