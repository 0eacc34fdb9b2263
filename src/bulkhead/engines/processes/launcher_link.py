"""The caller's end of the conversation with a pool's launcher."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from bulkhead.engines.processes import launcher, main_module, worker_main
from bulkhead.engines.processes.channel import Frame, FrameReader, frame
from bulkhead.engines.processes.launcher import Config, Told
from bulkhead.errors import BulkheadError

__all__ = ["LauncherLink"]

# Between two looks at a launcher that is about to end (seconds).
_PAUSE = 0.001


class LauncherLink:
    """One launcher process and the socket to it. Owner: the pool, under its lock; `reader` by who drives.

    Args:
        method: "forkserver", "spawn" or "fork".
        is_preloading: Whether a forkserver imports the caller's main module before it forks.
        preload: The names of other modules that it does so with.
        inherited: For fork alone: the initializer call, which workers inherit.

    Attributes:
        is_ready: It has said so. Kept by who reads.
    """

    def __init__(
        self,
        method: str,
        *,
        is_preloading: bool = True,
        preload: Sequence[str] = (),
        inherited: worker_main.Initializer | None = None,
    ) -> None:
        self.is_ready = False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket = ours
        self._process: subprocess.Popen[bytes] | None = None
        try:
            if method == "fork":
                self.pid = _fork(ours, theirs, inherited)
            else:
                self._process = _run(theirs)
                self.pid = self._process.pid
                config = Config(method, os.getpid(), main_module.describe(), is_preloading, tuple(preload))
                ours.sendall(frame(Told.CONFIGURE, 0, pickle.dumps(config)))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.reader = FrameReader(ours.fileno())

    @property
    def fd(self) -> int:
        """The descriptor that becomes readable when the launcher has something to say."""
        return self._socket.fileno()

    def read(self) -> list[tuple[int, int, Any]]:
        """Return the (kind, number, body) that have come; `reader.is_at_end` tells that there will be no more."""
        try:
            return [_opened(message) for message in self.reader.read()]
        except ConnectionResetError:
            self.reader.is_at_end = True
            return []

    def start(self, number: int, fds: tuple[int, ...], names: tuple[str, ...] = ()) -> None:
        """Have worker `number` started with these descriptors; they stay the caller's to close.

        Args:
            number: The worker's.
            fds: The descriptors, as `worker_main.Ends` has them.
            names: What the last of them are there, those that not every worker has.
        """
        try:
            data = frame(Told.START, number, pickle.dumps(names))
            socket.send_fds(self._socket, [data], list(fds))
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            self.reader.is_at_end = True

    def end(self, number: int, grace: float) -> None:
        """Have worker `number` and all it started ended, by SIGTERM and after `grace` seconds by SIGKILL."""
        if self.fd < 0:
            return
        try:
            self._socket.sendall(frame(Told.END, number, pickle.dumps(grace)))
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            self.reader.is_at_end = True

    def kill(self) -> None:
        """Kill the launcher; the end of the socket will tell."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def was_killed(self) -> bool:
        """Tell whether a launcher that has ended was killed from outside. Under fork that is not known: False."""
        if self._process is None:
            return False
        try:
            return self._process.wait(0.2) == -signal.SIGKILL
        except subprocess.TimeoutExpired:
            return False

    def close(self, patience: float) -> None:
        """Hang up and see the launcher end; one that does not within `patience` seconds is killed."""
        if self.fd < 0:
            return
        self.reader.fd = -1
        self._socket.close()
        if self._process is not None:
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        else:
            _wait_for(self.pid, patience)

    def abandon(self) -> None:
        """Close this process's copy of the socket; for a forked copy of the caller."""
        self._socket.close()


def _opened(message: Frame) -> tuple[int, int, Any]:
    kind, number, body = message
    return kind, number, pickle.loads(body)


def _run(theirs: socket.socket) -> subprocess.Popen[bytes]:
    if not sys.executable:
        raise BulkheadError("sys.executable is not set, so there is no interpreter to run workers with")
    code = f"from bulkhead.engines.processes.launcher import main; main({theirs.fileno()})"
    return subprocess.Popen(
        launcher.interpreter_command(code),
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        process_group=0,
        cwd=_somewhere(),
    )


def _somewhere() -> str | None:
    """Return a directory for the launcher if the caller's is gone: Python 3.13.0 cannot import in such a one."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return "/"
    return None


def _fork(ours: socket.socket, theirs: socket.socket, inherited: worker_main.Initializer | None) -> int:
    caller = os.getpid()
    # Race: a Ctrl-C between fork and the launcher's own signal handling would print a traceback of this copy.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        pid = os.fork()
        if pid == 0:
            _be_launcher(ours, theirs, caller, inherited, before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _be_launcher(
    ours: socket.socket,
    theirs: socket.socket,
    caller: int,
    inherited: worker_main.Initializer | None,
    mask: set[Any],
) -> None:
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        ours.close()
        launcher.run(theirs, "fork", caller, inherited)
    finally:
        os._exit(1)


def _wait_for(pid: int, patience: float) -> None:
    """Reap a child that was forked without subprocess, within `patience` seconds or with SIGKILL."""
    end = time.monotonic() + patience
    try:
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            if time.monotonic() >= end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return
            time.sleep(_PAUSE)
    except ChildProcessError:  # somebody else has reaped it
        pass
