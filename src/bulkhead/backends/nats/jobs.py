"""The broker's steps, each with what happens when whoever takes it dies in its middle.

| call | its steps | dying between them leaves |
|---|---|---|
| enqueue | record (only if there is none), ticket | a record without a ticket: nobody was told that the job is \
kept; the same call again finds the record and puts the ticket |
| claim | fetch ticket, record names the attempt, hide ticket | the ticket comes back after a second, the record says \
whether the job can be had |
| renew | record has a later end, hide ticket | the ticket comes back early, and is hidden again by whoever gets it |
| ack | record says GONE, acknowledge ticket | a ticket that leads nowhere; whoever gets it drops it |
| nack | record waits with the next turn, new ticket, acknowledge the old one | the old ticket; whoever gets it puts \
the new one before it drops the old one |
| nack, keeping the place | record waits, ticket is given back itself | the ticket comes back when the lease \
would have ended |
| bury | record says DEAD, ticket into the list of the dead, acknowledge the old one | the same |
| revive | ticket of the next turn, record waits with it, out of the list | a ticket whose record never came; it is \
dropped after a minute, and the job is still dead; later, an entry of the list that is skipped |
| delete, cancel | record says GONE, tickets away | tickets that lead nowhere |
| a due time comes | ticket into the work queue, out of the list of those scheduled | two tickets, of which one leads \
nowhere once the other was used |

Every change of a record is a compare-and-set, which is carried out entirely or not at all; it is the only thing that
decides. So a claim is worth something as long as its token stands in the record, whatever the tickets do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bulkhead.backends.base import (
    Burial,
    CancelAnswer,
    Claim,
    Hold,
    Message,
    Place,
    QueueCounts,
    Record,
    Return,
    Standing,
)
from bulkhead.backends.nats.bells import Bells
from bulkhead.backends.nats.cells import Cells
from bulkhead.backends.nats.claiming import Claims, Held, hide
from bulkhead.backends.nats.clock import Clock
from bulkhead.backends.nats.job import Job, Stage, is_over
from bulkhead.backends.nats.layout import Layout
from bulkhead.backends.nats.looking import Looking
from bulkhead.backends.nats.names import token_of
from bulkhead.backends.nats.queues import Queues
from bulkhead.backends.nats.session import Session
from bulkhead.backends.nats.tickets import Tickets
from bulkhead.errors import BrokerUnavailable, MessageTooLarge

__all__ = ["Jobs"]

# Seconds between two looks of a claimer that waits: a lease that runs out rings no bell.
_LOOK = 0.25
# Attempts to change a record that others change, too; each fails only because another one has succeeded.
_ATTEMPTS = 50
# Claims of this process that are remembered; beyond it those are forgotten whose lease ran out, and read when needed.
_HELD = 10_000
# Part of the largest message that a body may not take, for the facts and the error that travel beside it.
_RESERVE = 8


@dataclass(frozen=True, slots=True)
class _Change:
    """What a record was, and what it is."""

    old: Job
    new: Job


class Jobs:
    """What `Broker` promises, in the loop's thread."""

    def __init__(self, session: Session, clock: Clock, layout: Layout) -> None:
        self._session = session
        self._clock = clock
        self._layout = layout
        self._cells = Cells(session, clock, layout.jobs_stream, layout.jobs, is_over)
        self._tickets = Tickets(session, layout)
        index = Cells(session, clock, layout.index_stream, layout.queues, _never)
        self.queues = Queues(session, index, self._tickets, layout)
        self._claims = Claims(session, clock, layout, self._cells, self._tickets)
        self._bells = Bells(session, layout.bell, lambda queue, found: self._tickets.heap(queue).add(found))
        self._looking = Looking(session, clock, layout, self._cells, self._tickets, self.queues, self._claims)
        self._held: dict[str, Held] = {}

    # Putting in

    async def enqueue(self, messages: Sequence[Message]) -> list[bool]:
        """As `Broker.enqueue_many`."""
        self._check_sizes(messages)
        await self.queues.announce((message.queue, message.priority) for message in messages)
        now = self._clock.now()
        for queue in {token_of(message.queue) for message in messages}:
            await self._tickets.move_due(queue, now)
        jobs = [Job.of(message, now, place) for place, message in enumerate(messages)]
        versions = await self._cells.put([(job.key, job.packed(), 0) for job in jobs])
        kept = [version is not None for version in versions]
        await self._put([job for job, is_new in zip(jobs, kept, strict=True) if is_new], now)
        # Why afterwards: one may have the id of another of this very call, whose ticket is there by now.
        left = [place for place, is_new in enumerate(kept) if not is_new]
        for place, is_new in zip(
            left, await self._take_over([jobs[place] for place in left], now), strict=True
        ):
            kept[place] = is_new
        return kept

    async def _take_over(self, jobs: Sequence[Job], now: float) -> list[bool]:
        """Keep jobs whose ids were known before; False for those that are still taken."""
        kept: list[Job | None] = [None] * len(jobs)
        left = [*range(len(jobs))]
        taken: list[Job] = []
        for _ in range(_ATTEMPTS):
            free: list[tuple[int, Job, int]] = []
            for place, cell in zip(
                left, await self._cells.get([jobs[place].key for place in left]), strict=True
            ):
                old = None if cell is None else Job.read(cell.data)
                if old is not None and (old.stage is not Stage.GONE or old.due > now):
                    taken.append(old)
                else:
                    turn = 0 if old is None else old.turn + 1
                    free.append((place, replace(jobs[place], turn=turn), 0 if cell is None else cell.version))
            versions = await self._cells.put([(job.key, job.packed(), version) for _, job, version in free])
            left = []
            for (place, job, _), version in zip(free, versions, strict=True):
                if version is None:
                    left.append(place)
                else:
                    kept[place] = job
            if not left:
                break
        else:
            raise BrokerUnavailable("a job's record is changed by others all the time")
        # Whoever enqueued one that is taken may have died before it had a ticket.
        waiting = [old for old in taken if old.stage is Stage.ALIVE and not old.token]
        await self._put([*[job for job in kept if job is not None], *waiting], self._clock.now())
        return [job is not None for job in kept]

    def _check_sizes(self, messages: Sequence[Message]) -> None:
        limit = self._session.max_payload
        limit -= limit // _RESERVE
        for message in messages:
            if len(message.body) > limit:
                raise MessageTooLarge(
                    f"job {message.id!r} has {len(message.body)} bytes; this NATS server takes {limit} (max_payload)",
                    size_bytes=len(message.body),
                    limit_bytes=limit,
                )

    async def _put(self, jobs: Sequence[Job], now: float) -> None:
        for queue, later in (await self._tickets.put(jobs, now)).items():
            await self._bells.ring(queue, later)

    # Claims

    async def claim(self, name: str, n: int, lease: float, wait: float) -> list[Claim]:
        """As `Broker.claim`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait
        token = token_of(name)
        await self._bells.listen(token)
        bell = self._bells.attend(token)
        try:
            while True:
                bell.clear()
                if taken := await self._claim_now(name, n, lease):
                    return taken
                left = deadline - loop.time()
                if left <= 0:
                    return []
                await self._bells.wait(bell, min(left, self._until_next(token)))
        finally:
            self._bells.leave(token, bell)

    async def _claim_now(self, name: str, n: int, lease: float) -> list[Claim]:
        queue = await self.queues.get(name)
        if queue.is_paused or n < 1:
            return []
        await self._clock.keep_right()
        await self._tickets.attend(queue.token)
        await self._tickets.move_due(queue.token, self._clock.now())
        taken = await self._claims.take(queue, n, lease)
        self._remember(taken)
        claims = [_claim(held.job) for held in taken]
        # Race: the queue may have been paused after the look above, and what came since then must not be given out.
        if claims and (await self.queues.get(name)).is_paused:
            await self.nack([Return(one.hold, counts=False, keeps_place=True) for one in claims])
            return []
        return claims

    def _until_next(self, queue: str) -> float:
        due = self._tickets.heap(queue).next_due()
        return _LOOK if due is None else min(_LOOK, max(0.0, due - self._clock.now()))

    async def renew(self, holds: Sequence[Hold], lease: float) -> list[Standing]:
        """As `Broker.renew`."""
        until = self._clock.now() + lease
        changed = await self._decide(holds, lambda _, job: replace(job, leased=until))
        standings = []
        for held in changed:
            if held is None:
                standings.append(Standing.LOST)
                continue
            if held.reply:
                await hide(self._session, held.reply, until - self._clock.now())
            standings.append(Standing.CANCELLED if held.job.is_cancelled else Standing.HELD)
        return standings

    async def ack(self, holds: Sequence[Hold]) -> list[bool]:
        """As `Broker.ack`."""
        now = self._clock.now()
        changed = await self._decide(holds, lambda _, job: _gone(job, now))
        await self._let_go(changed)
        self._cells.owe(sum(held is not None for held in changed))
        return [held is not None for held in changed]

    async def nack(self, returns: Sequence[Return]) -> list[bool]:
        """As `Broker.nack`."""
        now = self._clock.now()
        # A ticket that is given back itself is the next to be given out; a new one goes behind all others.
        kept = {
            place: held.reply
            for place, given in enumerate(returns)
            if given.keeps_place and given.delay <= 0 and (held := self._mine(given.hold)) and held.reply
        }

        def wait(place: int, job: Job) -> Job:
            given = returns[place]
            attempt = job.attempt if given.counts else max(0, job.attempt - 1)
            error = job.error if given.error is None else self._fitting(job, given.error)
            if place in kept:
                return replace(job, token="", leased=0.0, attempt=attempt, error=error)
            due = now + max(0.0, given.delay)
            return replace(
                job, turn=job.turn + 1, token="", leased=0.0, attempt=attempt, error=error, due=due
            )

        changed = await self._decide([given.hold for given in returns], wait)
        moved = [held for place, held in enumerate(changed) if place not in kept]
        await self._put([held.job for held in moved if held is not None], now)
        await self._let_go(moved)
        at_once = {place: held.job for place in kept if (held := changed[place]) is not None}
        await self._session.ask([(kept[place], b"-NAK", None) for place in at_once])
        for queue in {token_of(job.queue) for job in at_once.values()}:
            await self._bells.ring(queue)
        return [held is not None for held in changed]

    async def bury(self, burials: Sequence[Burial]) -> list[bool]:
        """As `Broker.bury`."""
        now = self._clock.now()

        def die(place: int, job: Job) -> Job:
            given = burials[place]
            error = job.error if given.error is None else self._fitting(job, given.error)
            # Why less where messages are small: a character takes up to 12 bytes, and there is more beside it.
            reason = given.reason[: min(1000, self._session.max_payload // (16 * 2 * _RESERVE))]
            return replace(
                job,
                turn=job.turn + 1,
                stage=Stage.DEAD,
                token="",
                leased=0.0,
                due=now,
                reason=reason,
                error=error,
            )

        changed = await self._decide([given.hold for given in burials], die)
        await self._put([held.job for held in changed if held is not None], now)
        await self._let_go(changed)
        return [held is not None for held in changed]

    async def _decide(self, holds: Sequence[Hold], step: Callable[[int, Job], Job]) -> list[Held | None]:
        """Change the record of each claim that is still worth something; None for the others.

        Each is tried from what this process has written last; if that is not the newest one it is read.
        """
        changed: list[Held | None] = [None] * len(holds)
        known = {place: self._mine(hold) for place, hold in enumerate(holds)}
        for _ in range(_ATTEMPTS):
            await self._read_missing(holds, known)
            tried = [(place, held) for place, held in known.items() if held is not None]
            if not tried:
                return changed
            jobs = [step(place, held.job) for place, held in tried]
            versions = await self._cells.put(
                [(job.key, job.packed(), held.version) for job, (_, held) in zip(jobs, tried, strict=True)]
            )
            known = {}
            for job, (place, held), version in zip(jobs, tried, versions, strict=True):
                if version is None:
                    known[place] = None  # changed by somebody else: to be read
                    continue
                changed[place] = self._written(holds[place], Held(job, version, held.reply))
        raise BrokerUnavailable("a job's record is changed by others all the time")

    def _mine(self, hold: Hold) -> Held | None:
        held = self._held.get(hold.token)
        return held if held is not None and held.job.id == hold.id else None

    def _written(self, hold: Hold, held: Held) -> Held:
        if held.job.token == hold.token and held.job.stage is Stage.ALIVE:
            self._held[hold.token] = held
        else:
            self._held.pop(hold.token, None)
        return held

    async def _read_missing(self, holds: Sequence[Hold], known: dict[int, Held | None]) -> None:
        missing = [place for place, held in known.items() if held is None]
        cells = await self._cells.get_named([holds[place].id for place in missing])
        for place, cell in zip(missing, cells, strict=True):
            token = holds[place].token
            job = None if cell is None else Job.read(cell.data)
            if cell is None or job is None or job.token != token or job.stage is not Stage.ALIVE or not token:
                del known[place]
                self._held.pop(token, None)
                continue
            old = self._mine(holds[place])
            known[place] = Held(job, cell.version, "" if old is None else old.reply)

    async def _let_go(self, changed: Iterable[Held | None]) -> None:
        """Acknowledge the tickets of claims that have ended, and wait until the server has done it."""
        ended = [held for held in changed if held is not None]
        await self._session.ask([(held.reply, b"+ACK", None) for held in ended if held.reply])
        # Claimed by another process: its ticket is found by its name, which has the turn of the claim.
        unknown = [held.job for held in ended if not held.reply]
        await self._tickets.take_away(
            [
                replace(job, stage=Stage.ALIVE, turn=job.turn - (job.stage is not Stage.GONE))
                for job in unknown
            ]
        )

    def _fitting(self, job: Job, error: bytes) -> bytes | None:
        """Return the error, or None if there is no room for it beside the body."""
        room = self._session.max_payload - len(job.body) - self._session.max_payload // (2 * _RESERVE)
        return error if len(error) <= room else None

    def _remember(self, taken: Iterable[Held]) -> None:
        for held in taken:
            self._held[held.job.token] = held
        if len(self._held) > _HELD:
            now = self._clock.now()
            self._held = {token: held for token, held in self._held.items() if held.job.leased > now}

    # Others' jobs

    async def delete(self, ids: Sequence[str], dead_only: bool) -> list[bool]:
        """As `Broker.delete`."""

        def step(_: int, job: Job, now: float) -> Job | None:
            is_left = job.stage is not Stage.DEAD if dead_only else job.stage is Stage.GONE
            return None if is_left or job.is_running(now) else _gone(job, now)

        changed = await self._amend(ids, step)
        await self._tickets.take_away([change.old for change in changed if change is not None])
        return [change is not None for change in changed]

    async def cancel(self, ids: Sequence[str]) -> list[CancelAnswer]:
        """As `Broker.cancel`."""

        def step(_: int, job: Job, now: float) -> Job | None:
            if job.stage is not Stage.ALIVE:
                return None
            return replace(job, is_cancelled=True) if job.is_running(now) else _gone(job, now)

        changed = await self._amend(ids, step)
        gone = [change for change in changed if change is not None and change.new.stage is Stage.GONE]
        await self._tickets.take_away([change.old for change in gone])
        return [_answer(change) for change in changed]

    async def revive(self, ids: Sequence[str]) -> list[bool]:
        """As `Broker.revive`."""
        cells = await self._cells.get_named(ids)
        now = self._clock.now()
        dead = [None if cell is None else Job.read(cell.data) for cell in cells]
        lives = [None if job is None or job.stage is not Stage.DEAD else _revived(job, now) for job in dead]
        # Why the tickets first: of a record that waits without one nothing would remind.
        await self._tickets.put([job for job in lives if job is not None], now)

        def step(place: int, job: Job, _: float) -> Job | None:
            life = lives[place]
            is_same = life is not None and job.stage is Stage.DEAD and job.turn == life.turn - 1
            return life if is_same else None

        changed = await self._amend(ids, step)
        await self._tickets.take_away([change.old for change in changed if change is not None])
        for queue in {change.new.queue for change in changed if change is not None}:
            await self._bells.ring(token_of(queue))
        return [change is not None for change in changed]

    async def _amend(
        self, ids: Sequence[str], step: Callable[[int, Job, float], Job | None]
    ) -> list[_Change | None]:
        """Change records, whoever holds them; None for those that are not there or that `step` leaves alone."""
        changed: list[_Change | None] = [None] * len(ids)
        left = [*range(len(ids))]
        for _ in range(_ATTEMPTS):
            cells = await self._cells.get_named([ids[place] for place in left])
            now = self._clock.now()
            tried: list[tuple[int, int, _Change]] = []
            for place, cell in zip(left, cells, strict=True):
                old = None if cell is None else Job.read(cell.data)
                new = None if old is None else step(place, old, now)
                if cell is not None and old is not None and new is not None:
                    tried.append((place, cell.version, _Change(old, new)))
            versions = await self._cells.put(
                [(change.new.key, change.new.packed(), version) for _, version, change in tried]
            )
            left = []
            for (place, _, change), version in zip(tried, versions, strict=True):
                if version is None:
                    left.append(place)
                else:
                    changed[place] = change
            if not left:
                self._cells.owe(sum(c is not None and c.new.stage is Stage.GONE for c in changed))
                return changed
        raise BrokerUnavailable("a job's record is changed by others all the time")

    async def pause(self, name: str, is_paused: bool) -> None:
        """As `Broker.pause` and `Broker.resume`."""
        await self.queues.change(name, lambda queue: replace(queue, is_paused=is_paused))
        await self._bells.ring(token_of(name))

    # Looking

    async def find(self, ids: Sequence[str]) -> list[Record | None]:
        """As `Broker.find`."""
        cells = await self._cells.get_named(ids)
        now = self._clock.now()
        return [None if cell is None else Job.read(cell.data).record(now) for cell in cells]

    async def records(self, place: Place, queue: str | None, offset: int, limit: int) -> list[Record]:
        """As `Broker.records`."""
        return await self._looking.records(place, queue, offset, limit)

    async def counts(self) -> Mapping[str, QueueCounts]:
        """As `Broker.counts`."""
        return await self._looking.counts()

    async def paused(self) -> frozenset[str]:
        """As `Broker.paused`."""
        return frozenset(queue.name for queue in await self.queues.all() if queue.is_paused)

    async def sweep(self, grace: float) -> int:
        """Delete the records of jobs that are gone; return how many."""
        return await self._cells.sweep(10**9, grace)


def _revived(job: Job, now: float) -> Job:
    return replace(
        job,
        stage=Stage.ALIVE,
        turn=job.turn + 1,
        enqueued=now,
        due=now,
        rank=round(now * 1e6),
        attempt=0,
        reason="",
        error=None,
        is_cancelled=False,
    )


def _answer(change: _Change | None) -> CancelAnswer:
    if change is None:
        return CancelAnswer.UNKNOWN
    return CancelAnswer.REMOVED if change.new.stage is Stage.GONE else CancelAnswer.REQUESTED


def _never(_data: bytes, _at: float) -> bool:
    """Queues are not swept."""
    return False


def _gone(job: Job, now: float) -> Job:
    return replace(
        job, stage=Stage.GONE, token="", leased=0.0, due=now + job.remember, body=b"", error=None, reason=""
    )


def _claim(job: Job) -> Claim:
    return Claim(job.hold, job.body, job.priority, job.attempt, job.enqueued, job.due, job.error)
