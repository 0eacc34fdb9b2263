"""For how long a job is given back that may not begin: the longer, the longer none of its kind could.

A job that is given back is claimed again when its pause is over. With a short pause hundreds of them would keep a
consumer busy that has nothing to do, with a long one a place that comes free would stay free. So the pause is a share
of the time for which none of the kind has begun: where jobs are short, and places come free all the time, it is short.

Pure but for the clock and the jitter. Bounded: kinds of which nobody has asked for a while are forgotten.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

__all__ = ["Pauses", "soon"]

# A pause is this share of the time for which none has begun, and no longer than that (seconds).
_SHARE = 0.5
_LONGEST = 10.0

# As many kinds are remembered before the old ones are looked for (arbitrary).
_MANY = 1000


class Pauses:
    """Pauses of jobs by kind: what a limit counts by itself, or a queue. Concurrency: any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows; nothing is called under it
        self._stalls: dict[
            str, tuple[float, float]
        ] = {}  # since when none has begun, when one was held up last

    def begun(self, kind: str) -> None:
        """Note that one has begun."""
        with self._lock:
            self._stalls.pop(kind, None)

    def next(self, kind: str, *, share: float = _SHARE, longest: float = _LONGEST) -> float:
        """Return for how many seconds one is given back that may not begin now: `soon()` or longer."""
        now = self._clock()
        with self._lock:
            since, last = self._stalls.get(kind, (now, now))
            # Why: those that waited may have gone, and with them whoever would have told that one has begun.
            if now - last > 2 * _LONGEST:
                since = now
            self._stalls[kind] = since, now
            if len(self._stalls) > _MANY:
                self._stalls = {one: at for one, at in self._stalls.items() if now - at[1] <= 2 * _LONGEST}
        return max(soon(), min(longest, share * (now - since)) * random.uniform(0.9, 1.1))


def soon() -> float:
    """Return a pause in seconds before somebody asks again; random, so that not all do at once."""
    return random.uniform(0.1, 0.2)
