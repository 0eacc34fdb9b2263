"""What an engine may ask of the dispatcher that owns it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from bulkhead._kernel.records import JobRecord

__all__ = ["Ledger"]


class Ledger(Protocol):
    """Keeps the jobs by id. Concurrency: called by several pools at once, each under its own lock."""

    def enter(self, job: JobRecord) -> None:
        """Note that a job is accepted, and give it an id if it has none."""

    def settle(self, job: JobRecord) -> None:
        """Note that a job has settled."""

    def live(self, priority: int) -> Iterable[JobRecord]:
        """Return the jobs of a pool that are accepted and not settled, or settled while somebody waits to be told."""

    def next_sweep(self) -> float | None:
        """Return when `sweep` should be called, in monotonic seconds; None for never."""

    def sweep(self) -> None:
        """Drop what has expired."""
