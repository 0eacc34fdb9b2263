"""From tickets to claims: one durable pull consumer for each queue and priority.

A ticket that was fetched is hidden from others for `_ACK_WAIT`. In that time its record is read and, if the job can be
had, changed to name the new attempt: this compare-and-set is the claim. Then the server is told to hide the ticket for
as long as the lease (a negative acknowledgement with a delay, since the one for work in progress always means the
consumer's own time), so that it comes back when the lease has run out. Whoever gets it then looks into the record.

If the claimer dies before the compare-and-set, the ticket comes back and nothing has happened; if it dies after it,
the ticket comes back and the record says until when it has to be left alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nats.aio.msg import Msg

from bulkhead.backends.nats.cells import Cells
from bulkhead.backends.nats.clock import Clock
from bulkhead.backends.nats.job import Job, Stage
from bulkhead.backends.nats.layout import Layout, check_answer
from bulkhead.backends.nats.names import consumer_name
from bulkhead.backends.nats.pulling import NoAnswer, Pull
from bulkhead.backends.nats.queues import Queue
from bulkhead.backends.nats.session import Session
from bulkhead.backends.nats.tickets import Tickets, ticket_facts

__all__ = ["Claims", "Held", "hide"]

# Seconds for which a fetched ticket is hidden until its record was read and changed. A claimer that dies in between
# delays the job by that; one that is slower than this only makes somebody look twice.
_ACK_WAIT = 1.0
# Tickets fetched in one go.
_BATCH = 256
# Seconds after which a ticket is looked at again whose record was changed by somebody else, or is not there yet.
_AGAIN = 0.02
# Seconds after which a ticket of a turn that its record never came to leads nowhere: who put it has died.
_STILLBORN = 60.0
# Added to a hidden ticket's time, so that it comes back when the lease is over and not just before: 5 ms.
_MARGIN = 0.005


@dataclass(slots=True)
class Held:
    """A claim of this process: the record as it was written last, its version, and where to acknowledge."""

    job: Job
    version: int
    reply: str


class Claims:
    """Takes jobs from the queues' consumers."""

    def __init__(
        self, session: Session, clock: Clock, layout: Layout, cells: Cells, tickets: Tickets
    ) -> None:
        self._session = session
        self._clock = clock
        self._layout = layout
        self._cells = cells
        self._tickets = tickets
        self._pulls: dict[str, Pull] = {}

    async def take(self, queue: Queue, n: int, lease: float) -> list[Held]:
        """Claim up to `n` jobs of a queue, those of the highest priority first."""
        taken: list[Held] = []
        for priority in queue.priorities:
            while len(taken) < n:
                want = min(n - len(taken), _BATCH)
                found = await self._fetch(queue.token, priority, want)
                taken += await self._accept(found, queue, lease)
                if len(found) < want:
                    break
        return taken

    async def consumers(self, queue: Queue) -> list[dict[str, Any]]:
        """Return what the server says of a queue's consumers, in the order of its priorities."""
        found = []
        for priority in queue.priorities:
            await self._make_consumer(queue.token, priority)
            name = consumer_name(queue.token, priority)
            answer = await self._session.ask_one(f"$JS.API.CONSUMER.INFO.{self._layout.ready_stream}.{name}")
            found.append(check_answer(answer, f"asking about the consumer {name}"))
        return found

    async def _fetch(self, queue: str, priority: int, n: int) -> list[Msg]:
        pull = await self._pull(queue, priority)
        try:
            return await pull.fetch(n)
        except NoAnswer:
            await self._replace(queue, priority)
        return await (await self._pull(queue, priority)).fetch(n)

    async def _pull(self, queue: str, priority: int) -> Pull:
        name = consumer_name(queue, priority)
        if name not in self._pulls:
            created = await self._make_consumer(queue, priority)
            self._pulls[name] = Pull(self._session, self._layout.ready_stream, name, created)
        return self._pulls[name]

    async def _replace(self, queue: str, priority: int) -> None:
        """Make a consumer anew that does not answer.

        Somebody may have deleted it. Or the server was killed, and has come up with tickets that had been acknowledged,
        counts them and waits for them, but does not give them out. A new consumer gives out all tickets there are, also
        those that are hidden; the records say what becomes of each.
        """
        name = consumer_name(queue, priority)
        pull = self._pulls.pop(name, None)
        if pull is None:  # another call was quicker
            return
        await pull.close()
        address = f"{self._layout.ready_stream}.{name}"
        info = await self._session.ask_one(f"$JS.API.CONSUMER.INFO.{address}")
        # Race: if it is not the one that was asked, another process has just made it.
        if info.get("created") == pull.created:
            await self._session.ask_one(f"$JS.API.CONSUMER.DELETE.{address}")

    async def _make_consumer(self, queue: str, priority: int) -> str:
        """Make a consumer if it is missing; return when it was made."""
        name = consumer_name(queue, priority)
        config = {
            "durable_name": name,
            "ack_policy": "explicit",
            "deliver_policy": "all",
            "replay_policy": "instant",
            "ack_wait": int(_ACK_WAIT * 1e9),
            "max_deliver": -1,
            "max_ack_pending": -1,
            "filter_subject": f"{self._layout.ready}.{queue}.{priority}.>",
        }
        stream = self._layout.ready_stream
        body = json.dumps({"stream_name": stream, "config": config}).encode()
        answer = await self._session.ask_one(f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.{name}", body)
        return str(check_answer(answer, f"making the consumer {name}")["created"])

    async def _accept(self, found: Sequence[Msg], queue: Queue, lease: float) -> list[Held]:
        """Claim what these tickets lead to, and see to those that lead elsewhere."""
        if not found:
            return []
        facts = [ticket_facts(message.subject) for message in found]
        cells = await self._cells.get([key for key, _ in facts])
        now = self._clock.now()
        free: list[tuple[Msg, Job, int]] = []
        stale: list[tuple[Msg, Job | None]] = []
        for message, (_, turn), cell in zip(found, facts, cells, strict=True):
            job = None if cell is None else Job.read(cell.data)
            if (
                job is None
                or cell is None
                or job.stage is Stage.GONE
                or job.turn > turn
                or job.queue != queue.name
            ):
                stale.append((message, job))
            elif job.turn < turn:
                await self._wait_for_record(message, job, stale)
            elif job.stage is Stage.DEAD:
                stale.append((message, job))
            elif (hidden := max(job.due, job.leased if job.token else 0.0) - now) > 0:
                await hide(self._session, message.reply, hidden)
            else:
                free.append((message, job, cell.version))
        await self._drop(stale, now)
        return await self._mark(free, now + lease)

    async def _mark(self, free: Sequence[tuple[Msg, Job, int]], until: float) -> list[Held]:
        """Write the claims into the records; return those that nobody else was quicker with."""
        jobs = [
            replace(job, token=os.urandom(12).hex(), leased=until, attempt=job.attempt + 1)
            for _, job, _ in free
        ]
        changes = [(job.key, job.packed(), old[2]) for job, old in zip(jobs, free, strict=True)]
        held = []
        for job, (message, _, _), version in zip(jobs, free, await self._cells.put(changes), strict=True):
            if version is None:
                await hide(self._session, message.reply, _AGAIN)
            else:
                held.append(Held(job, version, message.reply))
        now = self._clock.now()
        for claim in held:
            await hide(self._session, claim.reply, until - now)
        return held

    async def _wait_for_record(self, message: Msg, job: Job, stale: list[tuple[Msg, Job | None]]) -> None:
        """Treat a ticket that was put before its record (`revive`)."""
        age = self._clock.now() - int(message.reply.split(".")[7]) / 1e9
        if age > _STILLBORN:
            stale.append((message, job))
        else:
            await hide(self._session, message.reply, _AGAIN if age < 1 else 1.0)

    async def _drop(self, stale: Sequence[tuple[Msg, Job | None]], now: float) -> None:
        """Acknowledge tickets that lead nowhere, once the jobs that are there have their right ones."""
        if not stale:
            return
        await self._tickets.put(
            [job for _, job in stale if job is not None and job.stage is not Stage.GONE], now
        )
        await self._session.ask([(message.reply, b"+ACK", None) for message, _ in stale])


async def hide(session: Session, reply: str, seconds: float) -> None:
    """Tell the server to give this ticket to nobody for some time. If that is lost, its earlier time counts."""
    nanoseconds = int((max(0.0, seconds) + _MARGIN) * 1e9)
    await session.tell(reply, b'-NAK {"delay": %d}' % nanoseconds)
