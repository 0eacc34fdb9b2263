"""Outcomes in a KV bucket: one value per job, which expires by what is written in it.

Per-message expiry exists from server 2.11 on; so here an outcome that is too old is not given any more, and deleted by
sweeping, twice as many looked at as were saved. A deletion is a marker, as other clients of the bucket expect it.

Saving compares versions, so that an outcome of an earlier attempt never takes the place of a later one's, whenever it
arrives (`is_outdated`).

Lists are read backwards in growing windows, as JetStream has no backward reading; order is exact within the newest
thousand of the bucket, further back as exact as outcomes are saved soon after they are finished. `counts` reads the
whole bucket: 25,000 to 50,000 outcomes per second, values included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing

from bulkhead.backends.base import Outcome, OutcomeState, is_outdated
from bulkhead.backends.nats.cells import Cell, Cells
from bulkhead.backends.nats.clock import Clock
from bulkhead.backends.nats.layout import Layout
from bulkhead.backends.nats.names import token_of
from bulkhead.backends.nats.packing import pack, unpack
from bulkhead.backends.nats.session import Session
from bulkhead.errors import BrokerUnavailable, MessageTooLarge

__all__ = ["Results"]

# Sequence numbers in the first window; each further one goes back four times as far.
_WINDOW = 1000
# Attempts to change an outcome that others change, too.
_ATTEMPTS = 50


class Results:
    """What `ResultStore` promises, in the loop's thread."""

    def __init__(self, session: Session, clock: Clock, layout: Layout) -> None:
        self._session = session
        self._clock = clock
        self._cells = Cells(session, clock, layout.results_stream, layout.results, _is_over)

    async def save(self, outcomes: Sequence[Outcome]) -> None:
        """As `ResultStore.save_many`."""
        now = self._clock.now()
        data = [self._packed(outcome, now) for outcome in outcomes]
        # Why 0 at first: mostly none is kept so far. Race: what others save meanwhile has another version.
        versions = dict.fromkeys(range(len(outcomes)), 0)
        for _ in range(_ATTEMPTS):
            changes = [
                (token_of(outcomes[place].id), data[place], version) for place, version in versions.items()
            ]
            answers = zip(versions, await self._cells.put(changes), strict=True)
            versions = await self._replaceable(outcomes, [place for place, new in answers if new is None])
            if not versions:
                self._cells.owe(len(outcomes))
                return
        raise BrokerUnavailable("an outcome is changed by others all the time")

    async def _replaceable(self, outcomes: Sequence[Outcome], places: Sequence[int]) -> dict[int, int]:
        """Return the versions of what is kept where it may be replaced."""
        cells = await self._cells.get_named([outcomes[place].id for place in places])
        now = self._clock.now()
        versions = {}
        for place, cell in zip(places, cells, strict=True):
            old = _read(cell, now)
            if old is None or not is_outdated(outcomes[place], old):
                versions[place] = 0 if cell is None else cell.version
        return versions

    async def get(self, ids: Sequence[str]) -> list[Outcome | None]:
        """As `ResultStore.get_many`."""
        now = self._clock.now()
        return [_read(cell, now) for cell in await self._cells.get_named(ids)]

    async def delete(self, ids: Sequence[str]) -> list[bool]:
        """As `ResultStore.delete`."""
        deleted = [False] * len(ids)
        left = [*range(len(ids))]
        for _ in range(_ATTEMPTS):
            cells = await self._cells.get_named([ids[place] for place in left])
            now = self._clock.now()
            there = [
                (place, cell.version)
                for place, cell in zip(left, cells, strict=True)
                if cell is not None and _read(cell, now) is not None
            ]
            versions = await self._cells.put(
                [(token_of(ids[place]), b"", version) for place, version in there]
            )
            left = []
            for (place, _), version in zip(there, versions, strict=True):
                deleted[place] = version is not None
                if version is None:
                    left.append(place)
            if not left:
                self._cells.owe(len(there))
                return deleted
        raise BrokerUnavailable("an outcome is changed by others all the time")

    async def outcomes(
        self, state: OutcomeState, queue: str | None, offset: int, limit: int
    ) -> list[Outcome]:
        """As `ResultStore.outcomes`."""
        if limit <= 0:
            return []
        last = await self._cells.last_version()
        window = _WINDOW
        while True:
            start = max(1, last - window + 1)
            found = [
                outcome
                for outcome in await self._all(start)
                if outcome.state is state and queue in (None, outcome.queue)
            ]
            if start == 1 or len(found) >= offset + limit:
                found.sort(key=lambda outcome: outcome.finished_at, reverse=True)
                return found[offset : offset + limit]
            window *= 4

    async def counts(self) -> Mapping[OutcomeState, int]:
        """As `ResultStore.counts`."""
        found: dict[OutcomeState, int] = {}
        for outcome in await self._all(1):
            found[outcome.state] = found.get(outcome.state, 0) + 1
        return found

    async def sweep(self, grace: float) -> int:
        """Delete what has expired; return how many."""
        return await self._cells.sweep(10**9, grace)

    async def _all(self, start: int) -> list[Outcome]:
        """Return the outcomes from a sequence number on, newest first."""
        found: dict[str, Outcome] = {}
        now = self._clock.now()
        async with aclosing(self._cells.scan(start)) as cells:
            async for cell in cells:
                outcome = _read(cell, now)
                if outcome is not None:
                    # Why popped: one that is saved again while this reads comes twice, and counts where it is last.
                    found.pop(outcome.id, None)
                    found[outcome.id] = outcome
        return [*reversed(found.values())]

    def _packed(self, outcome: Outcome, now: float) -> bytes:
        facts = [
            now + outcome.keep,
            outcome.id,
            outcome.queue,
            outcome.task,
            outcome.state.value,
            outcome.attempt,
            outcome.enqueued_at,
            outcome.started_at,
            outcome.finished_at,
            outcome.keep,
        ]
        data = pack(facts, outcome.value, outcome.error)
        limit = self._session.room
        if len(data) > limit:
            raise MessageTooLarge(
                f"the outcome of job {outcome.id!r} has {len(data)} bytes; this NATS server takes {limit}",
                size_bytes=len(data),
                limit_bytes=limit,
            )
        return data


def _read(cell: Cell | None, now: float) -> Outcome | None:
    """Return the outcome, or None if there is none or it has expired."""
    if cell is None or not cell.data:
        return None
    (until, job_id, queue, task, state, *numbers), (value, error) = unpack(cell.data)
    if until <= now:
        return None
    return Outcome(job_id, queue, task, OutcomeState(state), value, error, *numbers)


def _is_over(data: bytes, at: float) -> bool:
    return not data or float(unpack(data)[0][0]) <= at
