"""Lists and counts, from the tickets; JetStream has no question for them.

The work queue gives its tickets one after the other ("the next message with such a subject"), which makes the list of
those ready. The tickets that a consumer has given out and that are not acknowledged lie between two sequence numbers
that the server tells; the records say which of them run. Scheduled and dead ones are listed by their subjects.

Cost: about 0.2 ms for each job that is ready and comes before the end of the page, or runs; a list of scheduled or
dead ones, and `counts`, read the subjects of all of them, 300,000 per second. How many are ready does not matter to
`counts`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from bulkhead.backends.base import Place, QueueCounts, Record
from bulkhead.backends.nats.cells import Cells, read_cell
from bulkhead.backends.nats.claiming import Claims
from bulkhead.backends.nats.clock import Clock
from bulkhead.backends.nats.job import Job
from bulkhead.backends.nats.layout import Layout
from bulkhead.backends.nats.names import token_of
from bulkhead.backends.nats.queues import Queue, Queues
from bulkhead.backends.nats.session import Session
from bulkhead.backends.nats.tickets import Tickets, order_of, ticket_facts

__all__ = ["Looking"]

# Tickets whose records are read together.
_BATCH = 100


class Looking:
    """Answers what there is, without changing it but for moving tickets that are due."""

    def __init__(
        self,
        session: Session,
        clock: Clock,
        layout: Layout,
        cells: Cells,
        tickets: Tickets,
        queues: Queues,
        claims: Claims,
    ) -> None:
        self._session = session
        self._clock = clock
        self._layout = layout
        self._cells = cells
        self._tickets = tickets
        self._queues = queues
        self._claims = claims

    async def records(self, place: Place, name: str | None, offset: int, limit: int) -> list[Record]:
        """As `Broker.records`."""
        if limit <= 0:
            return []
        if place in (Place.SCHEDULED, Place.DEAD):
            return await self._from_index(place, name, offset, limit)
        queues = [await self._queues.get(name)] if name is not None else await self._queues.all()
        found: list[Record] = []
        for queue in queues:
            found += await self._from_queue(place, queue, offset + limit)
        if name is None:
            found.sort(key=lambda record: (-record.priority, record.due_at))
        return found[offset : offset + limit]

    async def counts(self) -> Mapping[str, QueueCounts]:
        """As `Broker.counts`."""
        later = _by_queue(await self._tickets.listed(f"{self._layout.later}.>"), 5)
        dead = _by_queue(await self._tickets.listed(f"{self._layout.dead}.>"), 4)
        found = {}
        for queue in await self._queues.all():
            due = [order_of(subject)[0] / 1e6 for subject in later.get(queue.token, ())]
            counts = await self._count(queue, due, len(dead.get(queue.token, ())))
            if counts.ready or counts.scheduled or counts.running or counts.dead:
                found[queue.name] = counts
        return found

    async def _count(self, queue: Queue, due: Sequence[float], dead: int) -> QueueCounts:
        running = 0
        now = self._clock.now()
        waiting_since = [at for at in due if at <= now]
        ready = len(waiting_since)
        for priority, consumer in zip(queue.priorities, await self._claims.consumers(queue), strict=True):
            filter_ = f"{self._layout.ready}.{queue.token}.{priority}.>"
            given = await self._given(filter_, consumer)
            runs = sum(job.is_running(now) for job in given)
            running += runs
            ready += consumer["num_pending"] + len(given) - runs
            waiting_since += [job.due for job in given if not job.is_running(now)]
            if consumer["num_pending"]:
                waiting_since += await self._oldest(filter_, consumer["delivered"]["stream_seq"] + 1)
        latency = max(0.0, now - min(waiting_since, default=now))
        return QueueCounts(ready, len(due) - sum(at <= now for at in due), running, dead, latency)

    async def _given(self, filter_: str, consumer: dict[str, Any]) -> list[Job]:
        """Return the jobs whose tickets this consumer has given out."""
        if not consumer["num_ack_pending"]:
            return []
        start, end = consumer["ack_floor"]["stream_seq"] + 1, consumer["delivered"]["stream_seq"]
        jobs: list[Job] = []
        async with aclosing(self._walk(filter_, start, end)) as pages:
            async for page in pages:
                jobs += page
        return jobs

    async def _oldest(self, filter_: str, start: int) -> list[float]:
        async with aclosing(self._walk(filter_, start, None, 1)) as pages:
            async for page in pages:
                if page:
                    return [page[0].due]
        return []

    async def _from_queue(self, place: Place, queue: Queue, most: int) -> list[Record]:
        """Return the first ready or running jobs of one queue."""
        await self._tickets.attend(queue.token)
        await self._tickets.move_due(queue.token, self._clock.now())
        found: list[Record] = []
        for priority, consumer in zip(queue.priorities, await self._claims.consumers(queue), strict=True):
            end = consumer["delivered"]["stream_seq"] if place is Place.RUNNING else None
            start = consumer["ack_floor"]["stream_seq"] + 1 if place is Place.RUNNING else 1
            pages = self._walk(f"{self._layout.ready}.{queue.token}.{priority}.>", start, end)
            async with aclosing(pages):
                async for page in pages:
                    found += _records(page, place, self._clock.now())
                    if len(found) >= most:
                        return found[:most]
        return found

    async def _walk(
        self, filter_: str, start: int, end: int | None, batch: int = _BATCH
    ) -> AsyncGenerator[list[Job]]:
        """Yield the jobs that tickets lead to, by page, from one sequence number to another."""
        keys: list[tuple[str, int]] = []
        subject = f"$JS.API.STREAM.MSG.GET.{self._layout.ready_stream}"
        while end is None or start <= end:
            answer = await self._session.ask_one(
                subject, f'{{"seq":{start},"next_by_subj":"{filter_}"}}'.encode()
            )
            cell = read_cell(answer)
            if cell is None or (end is not None and cell.version > end):
                break
            start = cell.version + 1
            keys.append(ticket_facts(answer["message"]["subject"]))
            if len(keys) >= batch:
                yield await self._jobs(keys)
                keys = []
        if keys:
            yield await self._jobs(keys)

    async def _jobs(self, tickets: Sequence[tuple[str, int]]) -> list[Job]:
        """Return the jobs to which these tickets lead, without those that lead nowhere."""
        cells = await self._cells.get([key for key, _ in tickets])
        found = []
        for (_, turn), cell in zip(tickets, cells, strict=True):
            if cell is not None and (job := Job.read(cell.data)).turn == turn:
                found.append(job)
        return found

    async def _from_index(self, place: Place, name: str | None, offset: int, limit: int) -> list[Record]:
        """Return a page of the scheduled jobs, those due first in front, or of the dead ones, newest first."""
        scheduled = place is Place.SCHEDULED
        root = self._layout.later if scheduled else self._layout.dead
        subjects = await self._tickets.listed(f"{root}.>" if name is None else f"{root}.{token_of(name)}.>")
        subjects.sort(key=order_of if scheduled else _buried_at, reverse=not scheduled)
        now = self._clock.now()
        found: list[Record] = []
        for start in range(0, len(subjects), _BATCH):
            page = await self._jobs([ticket_facts(subject) for subject in subjects[start : start + _BATCH]])
            found += _records(page, place, now)
            if len(found) >= offset + limit:
                break
        return found[offset : offset + limit]


def _records(jobs: Sequence[Job], place: Place, now: float) -> list[Record]:
    found = []
    for job in jobs:
        record = job.record(now)
        if record is not None and record.place is place:
            found.append(record)
    return found


def _buried_at(dead: str) -> int:
    return int(dead.rsplit(".", 4)[2])


def _by_queue(subjects: Sequence[str], last: int) -> dict[str, list[str]]:
    """Return subjects by the token of their queue, which is the first of the `last` ones."""
    found: dict[str, list[str]] = {}
    for subject in subjects:
        found.setdefault(subject.rsplit(".", last)[1], []).append(subject)
    return found
