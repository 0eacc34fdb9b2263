"""What is to become of the jobs of a batch that has come back from the pool."""

from __future__ import annotations

import random
from collections.abc import Sequence

from bulkhead.errors import (
    DispatcherFinalized,
    JobCancelled,
    JobTimeout,
    PoolBroken,
    RemoteError,
    RemoteTraceback,
    WorkerCrashed,
)
from bulkhead.service.batch import Batch, HeldJob
from bulkhead.service.envelope import failure_of
from bulkhead.service.pace import Pace
from bulkhead.service.running import FAILED, SNOOZED, Answer, answer_of
from bulkhead.service.verdicts import Bury, Cancel, GiveBack, Verdict, after

__all__ = ["Judged", "breakage", "judge", "may_be_swept_away"]

Judged = list[tuple[HeldJob, Verdict]]

# Jobs that a pool which gives up has not run are given back for so long (seconds): its consumer ends meanwhile.
_BROKEN = 1.0

# Who stops a service may send these to all its processes at once.
_SWEEPING = ("SIGTERM", "SIGINT", "SIGHUP")


def judge(batch: Batch, pace: Pace, *, is_leaving: bool) -> tuple[Judged, list[HeldJob]]:
    """Return what is to become of a batch's jobs, and those that are to run again, each alone.

    Args:
        batch: It has come back: its tracker is done, or it has none.
        pace: Learns what the jobs have taken.
        is_leaving: The consumer stops.
    """
    kept = batch.jobs[: batch.n_kept]
    if batch.refusal is not None:
        return [(held, _refused(batch.refusal)) for held in kept], []
    if batch.tracker is None:
        return [(held, held.verdict) for held in kept], []
    error = batch.tracker.exception(0)
    if error is None:
        answers: Sequence[Answer] = batch.tracker.result(0)
        done = [(held, _answered(held, answer, pace)) for held, answer in zip(kept, answers, strict=False)]
        return done, kept[len(answers) :]
    if isinstance(error, PoolBroken):
        return [(held, GiveBack(_BROKEN)) for held in kept], []
    return _ended(batch, kept, error, pace, is_leaving)


def may_be_swept_away(batch: Batch) -> bool:
    """Tell whether a batch's worker has ended as one does when all processes of a service are told to end."""
    error = batch.tracker.exception(0) if batch.tracker is not None else None
    if not isinstance(error, WorkerCrashed):
        return False
    # Why also without: its launcher was ended with it, and nobody knows more.
    return error.signal in _SWEEPING or (error.signal is None and error.exit_code is None)


def breakage(batch: Batch) -> PoolBroken | None:
    """Return why the pool has given up, if that is what has become of the batch."""
    error: BaseException | None = batch.refusal
    if error is None and batch.tracker is not None:
        error = batch.tracker.exception(0)
    return error if isinstance(error, PoolBroken) else None


def _ended(
    batch: Batch, kept: Sequence[HeldJob], error: BaseException, pace: Pace, is_leaving: bool
) -> tuple[Judged, list[HeldJob]]:
    """Judge a batch whose worker has died, or was ended."""
    blamed = 0 if batch.slot is None else batch.mark
    # Why any signal: when we leave, what ends a worker is no fault of its job.
    is_swept_away = is_leaving and isinstance(error, WorkerCrashed)
    has_not_begun = batch.is_withdrawn and blamed is None and isinstance(error, JobCancelled)
    noted = [answer_of(one) for one in batch.recorded()]
    # Race: a worker that dies between an answer and the next mark has answered for the marked one.
    judged: Judged = [
        (held, _answered(held, answer, pace)) for held, answer in zip(kept, noted, strict=False)
    ]
    again: list[HeldJob] = []
    for number, held in list(enumerate(kept))[len(noted) :]:
        if held.is_returned or held.is_lost or has_not_begun or (number == blamed and is_swept_away):
            judged.append((held, GiveBack()))
        elif number == blamed:
            held.seconds = _seconds(batch)
            judged.append((held, _failed(held, error, batch.overtime is not None, pace)))
        else:
            again.append(held)
    return judged, again


def _answered(held: HeldJob, answer: Answer, pace: Pace) -> Verdict:
    if answer[0] != SNOOZED:
        held.seconds = answer[2]
        pace.learn(held.envelope.task, held.seconds)
    return after(answer, held.envelope, held.claim.attempt, random.random())


def _failed(held: HeldJob, error: BaseException, is_overtime: bool, pace: Pace) -> Verdict:
    if is_overtime:
        timeout = held.envelope.timeout
        error = JobTimeout(f"job ran longer than its timeout of {timeout} s", timeout=timeout)
    elif isinstance(error, JobCancelled):
        return Cancel() if held.is_cancelled else GiveBack()
    pace.learn_long(held.envelope.task)
    answer = FAILED, failure_of(error, _trace(error)), 0.0
    return after(answer, held.envelope, held.claim.attempt, random.random())


def _seconds(batch: Batch) -> float:
    """Return for how long the job ran that has ended the batch's worker."""
    if batch.slot is not None:
        return batch.standing()[1]
    status = batch.tracker.status() if batch.tracker is not None else None
    if status is None or status.started_at is None or status.finished_at is None:
        return 0.0
    return (status.finished_at - status.started_at).total_seconds()


def _refused(error: Exception) -> Verdict:
    if isinstance(error, PoolBroken):
        return GiveBack(_BROKEN)
    if isinstance(error, DispatcherFinalized):
        return GiveBack()
    return Bury(f"it cannot be sent to a worker: {error}", failure_of(error))


def _trace(error: BaseException) -> str:
    if isinstance(error, RemoteError) and error.traceback:
        return error.traceback
    cause = error.__cause__
    return cause.text if isinstance(cause, RemoteTraceback) else getattr(error, "stack", "") or ""
