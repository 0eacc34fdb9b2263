"""Keeping the leases of held jobs, and knowing whether a job is still ours.

A lease that was renewed a moment ago is ours without asking. Who has not renewed it for longer (it was stopped, or the
server out of reach) asks before anything is told about the job: so what comes too late never takes the place of what
another consumer has told.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bulkhead.backends.base import Standing
from bulkhead.service.batch import HeldJob

if TYPE_CHECKING:
    from bulkhead.service.app import App

__all__ = ["Leases", "is_unwanted"]

_log = logging.getLogger("bulkhead")

# A lease is taken for ours without asking for this share of it: the server's clock is not ours.
_SURE = 0.8

# A round trip renews so many.
_PER_CALL = 1000

# A job that asks whether it is cancelled has so long to end by itself (seconds).
_CANCEL_GRACE = 5.0


class Leases:
    """The leases of one consumer's jobs. Concurrency: any thread."""

    def __init__(self, app: App) -> None:
        self._app = app

    def sure_until(self, asked: float) -> float:
        """Return until when a lease is ours without asking, if it was given to us after `asked`; monotonic seconds."""
        return asked + _SURE * self._app.lease

    def renew(self, jobs: Sequence[HeldJob]) -> None:
        """Renew leases, and note on the jobs what they are worth.

        Raises:
            BrokerUnavailable: Some may not have been renewed.
        """
        for held, standing in self._standings(jobs):
            # Race: a job that is being settled may be acked by now, and its lease be gone for that reason.
            if standing is Standing.LOST and not held.is_settling and not held.is_lost:
                _log.warning(
                    "queue %s: the lease of job %s is lost; its run here is ended", held.claim.queue, held.id
                )
                held.is_lost = True

    def check(self, jobs: Sequence[HeldJob]) -> None:
        """As `renew`, for jobs that are being settled and of which nothing was told yet."""
        for held, standing in self._standings(jobs):
            if standing is Standing.LOST and not held.is_lost:
                _log.warning(
                    "queue %s: job %s is no longer ours; its late end is not told", held.claim.queue, held.id
                )
                held.is_lost = True

    def _standings(self, jobs: Sequence[HeldJob]) -> list[tuple[HeldJob, Standing]]:
        found: list[tuple[HeldJob, Standing]] = []
        for at in range(0, len(jobs), _PER_CALL):
            part, asked = jobs[at : at + _PER_CALL], time.monotonic()
            standings = self._app.backend.broker.renew([held.claim.hold for held in part], self._app.lease)
            for held, standing in zip(part, standings, strict=True):
                if standing is not Standing.LOST:
                    held.sure_until = self.sure_until(asked)
                if standing is Standing.CANCELLED and not held.is_cancelled:
                    held.cancelled_at = time.monotonic()
                    held.is_cancelled = True
                found.append((held, standing))
        return found


def is_unwanted(held: HeldJob) -> bool:
    """Tell whether the run of a job is to be ended: it is lost; or it is cancelled, and does not ask or takes long."""
    if held.is_lost:
        return True
    if not held.is_cancelled:
        return False
    return held.asked_at is None or time.monotonic() - held.cancelled_at >= _CANCEL_GRACE
