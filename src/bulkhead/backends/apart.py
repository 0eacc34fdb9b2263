"""Ending claims and keeping outcomes where no single step does both.

So it is with jobs in one place and results in another, and with a place that has only the three contracts.

The outcome is saved first and the job acked then, so that whoever dies in between has the job run again rather than
lose what it has returned; the second run's outcome takes the place of the first. A dead letter is made first and its
outcome saved then: the dead letter itself says what happened.

What may happen in between, and what it does:

- Somebody else gets the job, since our lease ran out while we were held up. Where that is possible (the lease may have
  run out by now) the broker is asked just before. A consumer that is frozen just behind that saves its outcome late;
  the store then keeps what a later attempt has left (`is_outdated`). While that attempt still runs, ours is seen until
  it ends.
- The answer gets lost, and we ask again: the claim is gone, and whether we have ended it is seen by what is there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from bulkhead.backends.base import Broker, Burial, Ending, Outcome, Place, Record, ResultStore, Settler

__all__ = ["Apart"]

# Seconds by which an instant may differ from itself: not every place has microseconds.
_SAME = 0.002


class Apart(Settler):
    """Two steps.

    Args:
        broker: Has the jobs.
        results: Has the outcomes.
        sure_until: Until when all claims to be ended hold for certain, monotonic seconds.
    """

    def __init__(self, broker: Broker, results: ResultStore, sure_until: float) -> None:
        self._broker = broker
        self._results = results
        self._sure_until = sure_until

    def settle(self, endings: Sequence[Ending]) -> list[bool]:
        """See `Settler`."""
        done: dict[int, bool] = {}
        forgotten = [(at, one) for at, one in enumerate(endings) if one.reason is None]
        buried = [(at, one) for at, one in enumerate(endings) if one.reason is not None]
        for part, settle in ((forgotten, self._forget), (buried, self._bury)):
            if part:
                answers = settle([one for _, one in part])
                done.update(zip([at for at, _ in part], answers, strict=True))
        return [done[at] for at in range(len(endings))]

    def _forget(self, endings: Sequence[Ending]) -> list[bool]:
        held = self._held(endings)
        to_end = [one for one, is_held in zip(endings, held, strict=True) if is_held]
        if kept := [one.outcome for one in to_end if one.outcome is not None]:
            self._results.save_many(kept)
        acked = iter(self._broker.ack([one.hold for one in to_end]) if to_end else [])
        return self._corrected(endings, [is_held and next(acked) for is_held in held])

    def _bury(self, endings: Sequence[Ending]) -> list[bool]:
        burials = [Burial(one.hold, one.reason or "", one.error) for one in endings]
        answers = self._corrected(endings, self._broker.bury(burials))
        done = [one.outcome for one, is_done in zip(endings, answers, strict=True) if is_done]
        if kept := [outcome for outcome in done if outcome is not None]:
            self._results.save_many(kept)
        return answers

    def _held(self, endings: Sequence[Ending]) -> list[bool]:
        """Tell of which claims the outcome may be saved. One without an outcome is the broker's to refuse."""
        if time.monotonic() < self._sure_until or not any(one.outcome for one in endings):
            return [True] * len(endings)
        records = self._broker.find([one.hold.id for one in endings])
        return [
            one.outcome is None or _is_attempt(record, one.outcome)
            for one, record in zip(endings, records, strict=True)
        ]

    def _corrected(self, endings: Sequence[Ending], answers: Sequence[bool]) -> list[bool]:
        """Return the answers, with True for what had been carried out before, and nobody was told."""
        corrected = [*answers]
        missed = [at for at, is_done in enumerate(answers) if not is_done and endings[at].outcome is not None]
        if not missed:
            return corrected
        ids = [endings[at].hold.id for at in missed]
        found = zip(missed, self._broker.find(ids), self._results.get_many(ids), strict=True)
        for at, record, stored in found:
            corrected[at] = _was_carried_out(endings[at], record, stored)
        return corrected


def _was_carried_out(ending: Ending, record: Record | None, stored: Outcome | None) -> bool:
    outcome = ending.outcome
    assert outcome is not None
    if ending.reason is not None:
        return record is not None and record.place is Place.DEAD and _is_same_attempt(record, outcome)
    is_there_anew = record is not None and abs(record.enqueued_at - outcome.enqueued_at) > _SAME
    return _is_same(stored, outcome) and (record is None or is_there_anew)


def _is_attempt(record: Record | None, outcome: Outcome) -> bool:
    """Tell whether nobody has claimed the job since the attempt that this is the outcome of."""
    return record is not None and record.place in _CLAIMED and _is_same_attempt(record, outcome)


# Where a job is that is claimed, or was until its lease ran out.
_CLAIMED = (Place.RUNNING, Place.READY)


def _is_same_attempt(record: Record, outcome: Outcome) -> bool:
    return record.attempt == outcome.attempt and abs(record.enqueued_at - outcome.enqueued_at) <= _SAME


def _is_same(stored: Outcome | None, outcome: Outcome) -> bool:
    """Tell whether what is kept is this very outcome: no other attempt ends at the same instant with the same value."""
    return (
        stored is not None
        and (stored.state, stored.attempt, stored.value, stored.error)
        == (outcome.state, outcome.attempt, outcome.value, outcome.error)
        and abs(stored.finished_at - outcome.finished_at) <= _SAME
    )
