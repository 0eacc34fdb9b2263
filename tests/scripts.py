"""Scripts as users write them, in an interpreter of their own that the test can watch and kill."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from watching import PATIENCE, is_alive, wait_until

import bulkhead

__all__ = ["Script", "environment", "running"]


class Script:
    """A running script. Its output and errors go to files, so that no reader has to keep up with it."""

    def __init__(
        self, folder: Path, code: str, flags: Sequence[str] = (), env: dict[str, str] | None = None
    ) -> None:
        path = folder / "script.py"
        path.write_text(code)
        self._out, self._err = folder / "stdout", folder / "stderr"
        self._mark = f"BULKHEAD_SCRIPT={uuid.uuid4().hex}"
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                [sys.executable, *flags, str(path)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                env={**environment(), **dict([self._mark.split("=")]), **(env or {})},
                process_group=0,
            )
        self.pid = self._process.pid

    def wait(self, within: float = PATIENCE) -> int:
        """Return the exit code, negative for a signal."""
        return self._process.wait(within)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def is_stopped(self) -> bool:
        return self.is_running() and psutil.Process(self.pid).status() == psutil.STATUS_STOPPED

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def wait_for_line(self, beginning: str) -> str:
        """Return the first line of the output that begins so, when it is there."""
        wait_until(
            lambda: self._find(beginning) or self._process.poll() is not None, f"{beginning!r} in the output"
        )
        found = self._find(beginning)
        assert found is not None, f"no {beginning!r}:\n{self.output()}\n{self.errors()}"
        return found

    def output(self) -> str:
        return self._out.read_text()

    def errors(self) -> str:
        return self._err.read_text()

    def processes(self) -> list[int]:
        """Return the pids of the script and of all it has started, also of those whose parent has gone."""
        name, value = self._mark.split("=")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # gone meanwhile, or somebody else's
                if process.environ().get(name) == value and is_alive(process.pid):
                    found.append(process.pid)
        return found

    def zombies(self) -> list[int]:
        """Return the pids below the script that have ended and were not reaped."""
        children = psutil.Process(self.pid).children(recursive=True)
        return [child.pid for child in children if not is_alive(child.pid)]

    def kill_all(self) -> None:
        """Kill the script and all processes below it."""
        for pid in self.processes():
            # Race: a worker ends by itself when its launcher or the script is gone.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill what is left of the script."""
        self.kill_all()
        self._process.kill()
        self._process.wait()

    def _find(self, beginning: str) -> str | None:
        lines = self.output().split("\n")[:-1]
        return next((line for line in lines if line.startswith(beginning)), None)


@contextlib.contextmanager
def running(code: str, flags: Sequence[str] = (), env: dict[str, str] | None = None) -> Iterator[Script]:
    """Run a script; kill what is left of it in the end."""
    with tempfile.TemporaryDirectory() as folder:
        script = Script(Path(folder), code, flags, env)
        try:
            yield script
        finally:
            script.end()


def environment() -> dict[str, str]:
    """Return the environment of the tests, in which bulkhead and the modules beside this one can be imported."""
    places = [
        str(Path(bulkhead.__file__).parents[1]),
        str(Path(__file__).parent),
        os.environ.get("PYTHONPATH", ""),
    ]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
