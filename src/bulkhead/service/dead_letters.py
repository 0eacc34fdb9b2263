"""Dead letters are kept for a time and up to a number: each worker looks now and then, and deletes the oldest beyond.

Race: several workers look at once, and somebody may revive one meanwhile. Only what is a dead letter at that moment is
deleted (`dead_only`), so that a job which waits again stays.

Prior art: Sidekiq keeps 10,000 for six months.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bulkhead.backends.base import Place, Record

if TYPE_CHECKING:
    from bulkhead.service.app import App

__all__ = ["KEEP_DEAD", "MAX_DEAD", "DeadLetters"]

_log = logging.getLogger("bulkhead")

MAX_DEAD = 10_000
KEEP_DEAD = 180 * 86400.0

# Between two looks (seconds). Arbitrary: a look is two small questions.
_EVERY = 60.0

# So many are read at a time, with all that is in them.
_PAGE = 100

# A look begins no further page after so long (seconds): schedules wait for it. What is left has its turn soon.
_LOOK = 0.2
_SOON = 2.0


class DeadLetters:
    """Bounds an application's dead letters. Owner: one thread."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._next_look = float("-inf")

    def look_now_and_then(self) -> None:
        """Delete what is beyond the bounds, if the last look is some time ago."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + _EVERY
            n = self.sweep(now + _LOOK)
            if n:
                _log.info("%d dead letters beyond max_dead or keep_dead were deleted", n)
            if n >= _PAGE:
                self._next_look = time.monotonic() + _SOON

    def sweep(self, until: float = float("inf")) -> int:
        """Delete what is beyond the bounds; return how many.

        Args:
            until: When to begin no further page of them (monotonic seconds).

        Raises:
            BrokerUnavailable: Some may be deleted.
        """
        return self._sweep_surplus(until) + self._sweep_old(until)

    def _sweep_surplus(self, until: float) -> int:
        most, n = self._app.max_dead, 0
        if most is None:
            return 0
        while True:
            found = self._app.backend.broker.records(Place.DEAD, offset=most, limit=_PAGE)
            n += self._delete(found)
            if len(found) < _PAGE or time.monotonic() >= until:
                return n

    def _sweep_old(self, until: float) -> int:
        if self._app.keep_dead is None:
            return 0
        broker, n = self._app.backend.broker, 0
        latest = time.time() - self._app.keep_dead
        n_left = sum(counts.dead for counts in broker.counts().values())
        while n_left > 0:
            # The last ones of the list are the oldest.
            page = broker.records(Place.DEAD, offset=max(0, n_left - _PAGE), limit=_PAGE)
            old = [one for one in page if one.due_at < latest]
            n += self._delete(old)
            n_left -= len(old)
            if len(old) < len(page) or not page or time.monotonic() >= until:
                break
        return n

    def _delete(self, records: Sequence[Record]) -> int:
        if not records:
            return 0
        return sum(self._app.backend.broker.delete([one.id for one in records], dead_only=True))
