"""What is to become of a job whose attempt is over. Pure: no clock, no broker."""

from __future__ import annotations

from dataclasses import dataclass

from bulkhead import validate
from bulkhead.retry import Backoff
from bulkhead.service.envelope import Envelope, failure
from bulkhead.service.running import CANCELLED, DISCARDED, DONE, SNOOZED, UNRECOVERABLE, Answer

__all__ = [
    "MOST_LOSSES",
    "Bury",
    "Cancel",
    "Discard",
    "GiveBack",
    "Lost",
    "Succeed",
    "TryAgain",
    "Verdict",
    "after",
    "exhausted",
]


# Of a reason (arbitrary): the whole failure is kept beside it.
_REASON_CHARACTERS = 500


# So many consumers may die with a job beyond its own attempts (arbitrary): a job may be what kills them.
MOST_LOSSES = 3


@dataclass(frozen=True, slots=True)
class Succeed:
    """It has succeeded. `value` is encoded in the envelope's codec."""

    value: bytes


@dataclass(frozen=True, slots=True)
class TryAgain:
    """It has failed and is tried again after `delay` seconds."""

    delay: float
    error: bytes

    def __post_init__(self) -> None:
        validate.seconds("delay", self.delay, zero=True)


@dataclass(frozen=True, slots=True)
class Bury:
    """It has failed for good: a dead letter."""

    reason: str
    error: bytes | None


@dataclass(frozen=True, slots=True)
class GiveBack:
    """It has not failed and is to run again after `delay` seconds; the attempt is not counted.

    It keeps its place in the queue, where the server can do that, see `Return`; or it is as one that becomes due then.
    """

    delay: float = 0.0
    keeps_place: bool = True

    def __post_init__(self) -> None:
        validate.seconds("delay", self.delay, zero=True)


@dataclass(frozen=True, slots=True)
class Discard:
    """It is not to be run, and no dead letter either; `reason` is kept as its failure."""

    reason: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """It was cancelled."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The claim was lost, or the broker could not be told: whoever claims the job next decides what becomes of it."""


Verdict = Succeed | TryAgain | Bury | GiveBack | Discard | Cancel | Lost


def after(answer: Answer, envelope: Envelope, attempt: int, draw: float) -> Verdict:
    """Return what follows an attempt.

    Args:
        answer: What has become of it.
        envelope: The job.
        attempt: Its number, from 1.
        draw: From [0, 1): the place within the jitter.
    """
    kind, data, seconds = answer
    if kind == DONE:
        assert data is not None
        return Succeed(data)
    if kind == SNOOZED:
        # Why not at its place: one that snoozes for no time would keep all others of its queue from running.
        return GiveBack(seconds, keeps_place=False)
    if kind == CANCELLED:
        return Cancel()
    assert data is not None
    if kind == DISCARDED:
        return Discard(data.decode())
    if kind == UNRECOVERABLE:
        return Bury(f"unrecoverable: {_text(data)}", data)
    if attempt > envelope.max_retries:
        times = f"failed {attempt} times" if attempt > 1 else "failed"
        return Bury(f"{times}: {_text(data)}", data)
    initial, factor, jitter, maximum = envelope.backoff
    backoff = Backoff(initial=initial, factor=factor, jitter=jitter, maximum=maximum)
    return TryAgain(backoff.pause(attempt, draw), data)


def exhausted(envelope: Envelope, attempt: int) -> bool:
    """Tell whether a claimed job has had all its attempts, and its consumer died, or lost the lease, in the last ones.

    Why more than its attempts: what a consumer has claimed and not begun when it dies has not had its attempt.
    """
    return attempt > envelope.max_retries + 1 + MOST_LOSSES


def _text(data: bytes) -> str:
    told = failure(data)
    return "" if told is None else f"{told.type}: {told.message}"[:_REASON_CHARACTERS]
