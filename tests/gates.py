"""Jobs that run until the test lets them end, so that a test decides what happens when."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import lines, note
from waiting import wait_until

if TYPE_CHECKING:
    from bulkhead import Job

__all__ = ["Gate", "pass_gate"]

# A test that fails must not leave its workers waiting for ever (seconds).
_LONGEST = 60.0


class Gate:
    """Holds jobs by name; `open` lets them end.

    Args:
        folder: An empty folder of the test's own, through which the workers learn about it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = 0

    def job(self, name: str = "", **options: object) -> Job:
        """Return a job that returns its name when the gate, or its own door, is open."""
        from bulkhead import Job  # Why here: workers import this module, and make no jobs

        self._made += 1
        return Job(pass_gate, str(self._folder), name or f"job-{self._made}").options(**options)

    @property
    def begun(self) -> list[str]:
        """Names of the jobs that have begun, in order."""
        return lines(self._folder / "begun")

    def wait_begun(self, number: int) -> list[str]:
        """Wait until so many jobs have begun."""
        wait_until(lambda: len(self.begun) >= number, f"{number} jobs at the gate")
        return self.begun

    def open(self, *names: str) -> None:
        """Let these jobs end; all of them, also future ones, when none is named."""
        for name in names or ("",):
            (self._folder / f"open-{name}").touch()


def pass_gate(folder: str, name: str) -> str:
    """What a held job does in the worker."""
    note(Path(folder) / "begun", name)
    doors = Path(folder) / "open-", Path(folder) / f"open-{name}"
    give_up = time.monotonic() + _LONGEST
    while not any(door.exists() for door in doors):
        if time.monotonic() > give_up:
            raise TimeoutError(f"nobody opened the gate for {name}")
        time.sleep(0.002)
    return name
