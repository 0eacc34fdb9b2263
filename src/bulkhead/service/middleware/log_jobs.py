"""`LogJobs`: a log record for each attempt, with its facts as attributes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bulkhead.errors import ConfigTypeError
from bulkhead.service.envelope import failure
from bulkhead.service.middleware.base import Middleware, Submission
from bulkhead.service.verdicts import Bury, Cancel, Discard, GiveBack, Lost, Succeed, TryAgain, Verdict

if TYPE_CHECKING:
    from bulkhead.service.batch import HeldJob

__all__ = ["LogJobs"]

# What has become of an attempt, and the level of its record.
_OUTCOMES: dict[type, tuple[str, int]] = {
    Succeed: ("succeeded", logging.INFO),
    TryAgain: ("retrying", logging.WARNING),
    Bury: ("failed", logging.ERROR),
    Discard: ("discarded", logging.WARNING),
    Cancel: ("cancelled", logging.INFO),
    GiveBack: ("given_back", logging.DEBUG),
    Lost: ("lost", logging.WARNING),
}


class LogJobs(Middleware):
    """Log each job that is enqueued (DEBUG), and what has become of each attempt.

    A record has the attributes `job_id`, `queue`, `task` and `outcome`, that of an attempt `attempt` and
    `duration_seconds`, too; where there is a failure, `error_type` and `error`, before another attempt `delay_seconds`.
    Outcomes are "enqueued", "duplicate", "succeeded" (INFO), "retrying" (WARNING), "failed" (ERROR: a dead letter),
    "discarded" (WARNING), "cancelled" (INFO), "given_back" (DEBUG: it will run later, and this attempt does not count)
    and "lost" (WARNING: the lease was lost, somebody else has the job).

    Args:
        logger: Where to, or its name. What becomes of records is for the application to say, as always with `logging`.

    Raises:
        ConfigTypeError: It is neither.
    """

    def __init__(self, logger: logging.Logger | str = "bulkhead.jobs") -> None:
        if not isinstance(logger, (logging.Logger, str)):
            raise ConfigTypeError(f"logger must be a logging.Logger or the name of one, not {logger!r}")
        self._log = logging.getLogger(logger) if isinstance(logger, str) else logger

    def enqueue(
        self, submissions: Sequence[Submission], forward: Callable[[Sequence[Submission]], None]
    ) -> None:
        """See `Middleware`."""
        forward(submissions)
        if self._log.isEnabledFor(logging.DEBUG):
            for one in submissions:
                outcome = "enqueued" if one.duplicate_of is None else "duplicate"
                facts = {"job_id": one.id, "task": one.call.task.name, "queue": one.queue, "outcome": outcome}
                self._log.debug("job %s of %s in queue %s: %s", *facts.values(), extra=facts)

    def settled(self, job: HeldJob, verdict: Verdict) -> None:
        """See `Middleware`."""
        outcome, level = _OUTCOMES[type(verdict)]
        if not self._log.isEnabledFor(level):
            return
        facts: dict[str, Any] = {
            "job_id": job.id,
            "task": job.envelope.task,
            "queue": job.claim.queue,
            "outcome": outcome,
            "attempt": job.claim.attempt,
            "duration_seconds": job.seconds,
        }
        text = "job %s of %s in queue %s: %s, attempt %d, %.3f s"
        self._log.log(level, text, *facts.values(), extra={**facts, **_told(verdict)})


def _told(verdict: Verdict) -> dict[str, Any]:
    if isinstance(verdict, Discard):
        return {"error_type": "Discarded", "error": verdict.reason}
    if isinstance(verdict, GiveBack):
        return {"delay_seconds": verdict.delay}
    if not isinstance(verdict, (TryAgain, Bury)):
        return {}
    told = failure(verdict.error)
    facts: dict[str, Any] = {} if told is None else {"error_type": told.type, "error": told.message}
    if isinstance(verdict, TryAgain):
        facts["delay_seconds"] = verdict.delay
    else:
        facts.setdefault("error", verdict.reason)
    return facts
