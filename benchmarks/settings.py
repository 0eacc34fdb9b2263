"""What the command line decides for every benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Settings", "StartMethod"]

StartMethod = Literal["fork", "forkserver", "spawn"]


@dataclass(frozen=True)
class Settings:
    """How often and with what to measure; a benchmark takes what means something to it.

    Attributes:
        rounds: Measurements of each contestant.
        jobs: No-op jobs in one measurement of speed.
        start_method: Of every contestant, where the benchmark does not try all methods.
    """

    rounds: int
    jobs: int
    start_method: StartMethod
