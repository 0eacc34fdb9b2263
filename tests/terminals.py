"""Scripts on a terminal: a session, a foreground process group and a Ctrl-C that the kernel's line discipline makes."""

from __future__ import annotations

import codecs
import contextlib
import os
import pty
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from scripts import environment
from watching import PATIENCE, alive

__all__ = ["Terminal", "on_terminal"]

CTRL_C = b"\x03"


class Terminal:
    """A script that leads the session of a pseudo terminal; everything that it and its children print is read here."""

    def __init__(self, path: Path) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            try:
                os.chdir(path.parent)
                os.execve(
                    sys.executable, [sys.executable, str(path)], {**environment(), "PYTHON_COLORS": "0"}
                )
            finally:
                os._exit(127)
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.code: int | None = None

    def press(self, keys: bytes) -> None:
        """Type; the terminal turns Ctrl-C into SIGINT for its foreground process group."""
        os.write(self._fd, keys)

    def read_until(self, expected: str, within: float = PATIENCE) -> None:
        """Read until the text has come."""
        end = time.monotonic() + within
        while expected not in self.text:
            left = end - time.monotonic()
            assert left > 0, f"no {expected!r} within {within} s:\n{self.text}"
            assert self._read(left), f"the script has ended without {expected!r}:\n{self.text}"

    def read_all(self, within: float = PATIENCE) -> str:
        """Read until the script has ended; return what came since it began, without the terminal's own additions."""
        end = time.monotonic() + within
        while self._read(max(end - time.monotonic(), 0)):
            assert time.monotonic() < end, f"not at its end within {within} s:\n{self.text}"
        _, status = os.waitpid(self.pid, 0)
        self.code = os.waitstatus_to_exitcode(status)
        return self.text

    def family(self) -> list[int]:
        """Return the pids of the script and of all below it."""
        return [self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))]

    def close(self) -> None:
        """Kill what is left and give the terminal back."""
        if self.code is None:
            for pid in alive(self.family()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)

    def _read(self, patience: float) -> bool:
        """Read what is there, waiting for so long; False when nobody has the terminal any more."""
        if not select.select([self._fd], [], [], patience)[0]:
            return True
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # EIO: the last process that had it is gone
            return False
        self.text += self._decoder.decode(data).replace("\r\n", "\n")
        return bool(data)


@contextlib.contextmanager
def on_terminal(code: str) -> Iterator[Terminal]:
    """Run a script on a terminal of its own; kill what is left of it in the end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "script.py"
        path.write_text(code)
        terminal = Terminal(path)
        try:
            yield terminal
        finally:
            terminal.close()
