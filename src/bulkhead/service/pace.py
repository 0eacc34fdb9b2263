"""How long the jobs of a queue take, and what follows from it: how many to claim, and which may travel together.

Nothing is known of a task before its first job has ended: then it counts as a long one. A task of which nothing was
heard for a while is forgotten, so that a rare long one does not slow down the short ones for ever.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

__all__ = ["Pace"]

# Jobs that take less than this on average travel in batches (seconds), of which each should take so long.
_SHORT = 0.002
_BATCH_AIM = 0.01
_LARGEST_BATCH = 500

# So much work (seconds) is held for each worker beyond what runs, and so many jobs at most.
_HELD_AHEAD = 0.05
_MOST_HELD = 2000

# How much of an earlier measurement counts when another comes in.
_MEMORY = 0.8

# What a job takes of which nothing is known, or only that it is long (seconds): it goes alone.
_UNKNOWN = 1.0

# A task is forgotten when so many jobs of others have ended since its last one (arbitrary).
_FORGOTTEN_AFTER = 10_000


class Pace:
    """What jobs of each task take on average. Bounded: an entry for each task. Concurrency: any thread."""

    def __init__(self, n_workers: int) -> None:
        self._n_workers = n_workers
        self._lock = threading.Lock()  # guards the two below; nothing is acquired under it
        self._seconds: dict[str, tuple[float, int]] = {}  # by task, with the number of its last measurement
        self._n_measured = 0

    def learn(self, task: str, seconds: float) -> None:
        """Note what a job has taken."""
        with self._lock:
            self._n_measured += 1
            known = self._seconds.get(task)
            mean = seconds if known is None else _MEMORY * known[0] + (1 - _MEMORY) * seconds
            self._seconds[task] = mean, self._n_measured

    def learn_long(self, task: str) -> None:
        """Note that a job has taken long, or nobody knows how long."""
        with self._lock:
            self._n_measured += 1
            self._seconds[task] = _UNKNOWN, self._n_measured

    def is_short(self, task: str) -> bool:
        """Tell whether jobs of this task may travel with others."""
        return self._mean(task) < _SHORT

    def room(self) -> int:
        """Return how many jobs may be held at once: one for each worker, and what short ones use up in a moment."""
        with self._lock:
            recent = self._n_measured - _FORGOTTEN_AFTER
            for task in [task for task, (_, last) in self._seconds.items() if last < recent]:
                del self._seconds[task]
            longest = max((seconds for seconds, _ in self._seconds.values()), default=_UNKNOWN)
        ahead = int(self._n_workers * _HELD_AHEAD / max(longest, 1e-6))
        return self._n_workers + min(ahead, _MOST_HELD)

    def batch_size(self, tasks: Sequence[str]) -> int:
        """Return how many of these short jobs should travel together, so that each worker has some."""
        seconds = sum(self._mean(task) for task in tasks) / len(tasks)
        most = max(1, min(_LARGEST_BATCH, int(_BATCH_AIM / max(seconds, 1e-6))))
        return max(1, min(most, math.ceil(len(tasks) / self._n_workers)))

    def _mean(self, task: str) -> float:
        found = self._seconds.get(task)
        return _UNKNOWN if found is None else found[0]
