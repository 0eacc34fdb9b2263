"""The result store on Redis: one string for each outcome, which expires, and sorted lists by state and queue.

Lists do not expire entry by entry. A sorted set of all entries by expiry is swept in small steps: by each call that
saves, and before lists and counts are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

import msgspec

from bulkhead.backends.base import Outcome, OutcomeState, ResultStore, is_outdated
from bulkhead.backends.redis.link import Link
from bulkhead.backends.redis.script import script
from bulkhead.backends.redis.wire import batches, check_size, micros, millis, packed, text

__all__ = ["RedisResults", "columns_of"]

# Expired entries that are taken out of the lists in one go.
_SWEEP = 1000

_SAVE = script("save", "results_common")
_DISCARD = script("discard", "results_common")
_OUTCOMES = script("outcomes", "results_common")
_COUNTS = script("results_counts", "results_common")
_SWEEPING = script("sweep", "results_common")

# What is packed behind the place: attempt, enqueued, queue, task, state, value, error, started, finished, keep.
# The scripts read the first two (results_common.lua).
_Fields = tuple[int, float, str, str, str, bytes | None, bytes | None, float, float, float]
_fields = msgspec.msgpack.Decoder(_Fields).decode

# Earlier versions packed them in the order of `Outcome`.
_EarlierFields = tuple[str, str, str, bytes | None, bytes | None, int, float, float, float, float]
_earlier_fields = msgspec.msgpack.Decoder(_EarlierFields).decode


# Why: most are kept for the same time.
_millis = lru_cache(millis)


class RedisResults(ResultStore):
    """Outcomes in a Redis.

    Args:
        link: Where they are. Closed with the store.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    def save_many(self, outcomes: Sequence[Outcome]) -> None:
        """See `ResultStore`."""
        check_size([len(outcome.value or b"") + len(outcome.error or b"") for outcome in outcomes])
        for part in batches(_last_of_each(outcomes)):
            arguments = [packed(([outcome.id for outcome in part], *columns_of(part)))]
            self._link.run(_SAVE, (), arguments, is_repeatable=True)

    def get_many(self, ids: Sequence[str]) -> list[Outcome | None]:
        """See `ResultStore`."""
        found: list[Outcome | None] = []
        for part in batches(ids):
            texts = self._link.command("MGET", *(self._link.key(f"result:{id}") for id in part))
            found += [text and _decoded(id, text) for id, text in zip(part, texts, strict=True)]
        return found

    def delete(self, ids: Sequence[str]) -> list[bool]:
        """See `ResultStore`."""
        answers = b"".join(self._link.run(_DISCARD, (), [packed(part)]) for part in batches(ids))
        return [answer == ord("1") for answer in answers]

    def outcomes(
        self, state: OutcomeState, *, queue: str | None = None, offset: int = 0, limit: int = 100
    ) -> list[Outcome]:
        """See `ResultStore`."""
        self._sweep()
        chosen = () if queue is None else (queue,)
        arguments = (state.value, offset, limit, *chosen)
        rows = self._link.run(_OUTCOMES, (), arguments, is_repeatable=True)
        return [_decoded(id.decode(), text) for id, text in rows]

    def counts(self) -> Mapping[OutcomeState, int]:
        """See `ResultStore`."""
        self._sweep()
        totals: Counter[OutcomeState] = Counter()
        for name, length in self._link.run(_COUNTS, is_repeatable=True):
            totals[OutcomeState(name.partition(b":")[0].decode())] += length
        return totals

    def close(self) -> None:
        """End the connections."""
        self._link.close()

    def _sweep(self) -> None:
        while self._link.run(_SWEEPING, (), [_SWEEP], is_repeatable=True) == _SWEEP:
            pass


def columns_of(outcomes: Sequence[Outcome | None]) -> tuple[list[object], ...]:
    """Return what the scripts take: places, end times, milliseconds to keep, encoded outcomes."""
    return (
        [one and _place(one.state, one.queue) for one in outcomes],
        [one and micros(one.finished_at) for one in outcomes],
        [one and _millis(one.keep) for one in outcomes],
        [one and text(_encoded(one)) for one in outcomes],
    )


def _last_of_each(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return of several outcomes of an id the one that counts."""
    kept: dict[str, Outcome] = {}
    for outcome in outcomes:
        old = kept.get(outcome.id)
        if old is None or not is_outdated(outcome, old):
            kept[outcome.id] = outcome
    return list(kept.values())


@lru_cache
def _place(state: OutcomeState, queue: str) -> str:
    return f"{state.value}:{len(queue.encode())}:{queue}:"


def _encoded(outcome: Outcome) -> bytes:
    _, queue, task, state, value, error, attempt, enqueued, started, finished, keep = outcome
    return packed((attempt, enqueued, queue, task, state.value, value, error, started, finished, keep))


def _decoded(id: str, text: bytes) -> Outcome:
    _, size, rest = text.split(b":", 2)
    data = memoryview(rest)[int(size) + 1 :]
    try:
        attempt, enqueued, queue, task, state, value, error, *times = _fields(data)
    except msgspec.ValidationError:
        queue, task, state, value, error, attempt, enqueued, *times = _earlier_fields(data)
    return Outcome(id, queue, task, OutcomeState(state), value, error, attempt, enqueued, *times)
