"""Who may have a permit: the decisions of a distributed concurrency limit. Pure: no clock, no registry.

What the consumers share of a key is how many permits each of them has, and which refused jobs have waited longest.

Why waiting jobs: a job that was refused asks again a moment later, and could find each time that a younger one was
faster. So the oldest refused ones are written down, as many as there are permits, and some dozens at most. One of them
that has waited for `PATIENCE` comes before each younger job: a permit that is free stays free until it asks. The
oldest of all refused jobs is always written down, so that it gets the next permit after that; then another one is the
oldest. None waits for ever.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import msgspec

__all__ = ["FORGOTTEN", "PATIENCE", "Asking", "Permits", "admitted", "released", "reserved", "without"]

# A refused job that has waited for so long comes before younger ones (seconds).
PATIENCE = 5.0

# One that has not asked for so long is gone: cancelled, or its consumer died (seconds). Well above their pauses.
FORGOTTEN = 10.0

# The clocks of consumers may differ by so much (seconds); what is from later is none of ours.
_AHEAD = 60.0

# So many are written down at most (arbitrary): each question reads them all.
_MOST_WAITING = 50

# How exact the time of the last question is (seconds): not each one is written down.
_GRAIN = 2.0


class Asking(msgspec.Struct, array_like=True, frozen=True):
    """A job that wants a permit. Times are POSIX seconds.

    Attributes:
        enqueued_at: By which jobs are older or younger.
        since: When it was refused first.
        seen: When it has asked last.
    """

    enqueued_at: float
    since: float
    seen: float


class Permits(msgspec.Struct, array_like=True, frozen=True):
    """What is known of a key.

    Attributes:
        holders: How many permits each consumer has.
        waiting: The oldest of the jobs that were refused, by id.
    """

    holders: dict[str, int] = {}
    waiting: dict[str, Asking] = {}

    @property
    def n_used(self) -> int:
        """How many permits are in use."""
        return sum(self.holders.values())


def reserved(permits: Permits, n: int, me: str, mine: int, wanted: int) -> tuple[Permits, int]:
    """Give a consumer up to `wanted` permits beyond the `mine` that it knows it has; return how many."""
    permits = released(permits, me, mine)
    granted = max(0, min(wanted, n - permits.n_used))
    return released(permits, me, mine + granted), granted


def released(permits: Permits, me: str, mine: int) -> Permits:
    """Write down that a consumer has so many."""
    holders = {**permits.holders, me: mine}
    if not mine:
        del holders[me]
    return Permits(holders, permits.waiting)


def without(permits: Permits, gone: Container[str]) -> Permits:
    """Take back what consumers had that are gone."""
    return Permits({one: n for one, n in permits.holders.items() if one not in gone}, permits.waiting)


def admitted(
    permits: Permits,
    n: int,
    me: str,
    mine: int,
    jobs: Sequence[tuple[str, float]],
    now: float,
    most: int | None = None,
) -> tuple[Permits, list[bool]]:
    """Give as many of these jobs a permit as can have one.

    Args:
        permits: What is known.
        n: The limit.
        me: Their consumer.
        mine: How many it has, as it knows itself.
        jobs: Their ids, and when they were enqueued.
        now: POSIX seconds.
        most: How many of them may have one at most; None is all.

    Returns:
        What is known then, and for each job whether it has a permit.
    """
    permits = released(permits, me, mine)
    waiting = {job: one for job, one in permits.waiting.items() if -_AHEAD < now - one.seen < FORGOTTEN}
    n_free = n - permits.n_used
    answers: list[bool] = []
    for job, enqueued_at in jobs:
        n_before = sum(
            now - one.since >= PATIENCE and (one.enqueued_at, other) < (enqueued_at, job)
            for other, one in waiting.items()
        )
        is_granted = n_free > n_before and (most is None or sum(answers) < most)
        if is_granted:
            n_free -= 1
            waiting.pop(job, None)
        else:
            _note(waiting, n, job, enqueued_at, now)
        answers.append(is_granted)
    return released(Permits(permits.holders, waiting), me, mine + sum(answers)), answers


def _note(waiting: dict[str, Asking], n: int, job: str, enqueued_at: float, now: float) -> None:
    known = waiting.get(job)
    if known is None or now - known.seen > _GRAIN:
        waiting[job] = Asking(enqueued_at, now if known is None else known.since, now)
    if len(waiting) > min(n, _MOST_WAITING):
        del waiting[max(waiting, key=lambda one: (waiting[one].enqueued_at, one))]
