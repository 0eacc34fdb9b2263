"""What the command line decides for every benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["WORKERS", "Settings", "StartMethod"]

StartMethod = Literal["fork", "forkserver", "spawn"]

WORKERS = 2
"""Of every contestant, where the number of workers is not the question."""


@dataclass(frozen=True)
class Settings:
    """How often and with what to measure; a benchmark takes what means something to it.

    Attributes:
        rounds: Measurements of each contestant.
        jobs: No-op jobs in one measurement of dispatch.
        start_method: Of every contestant, where the benchmark does not try all methods.
        is_quick: Measure a tenth of everything, to see that it works.
    """

    rounds: int
    jobs: int
    start_method: StartMethod
    is_quick: bool = False

    def scaled(self, count: int) -> int:
        """Return what a benchmark has to take instead of `count`."""
        return max(1, count // 10) if self.is_quick else count
