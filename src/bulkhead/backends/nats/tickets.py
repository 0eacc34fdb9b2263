"""Tickets: what says where to look for a job.

A job that can be claimed has a ticket in the work queue (`ready`); one that is scheduled has one in `later`, a dead one
in `dead`. A ticket is nothing but its subject: queue, priority, the id's token and the turn. It grants nothing, the
record decides; so a ticket too many costs a look, and only a ticket too few would hurt.

Invariant: a job that is alive or dead has at least one ticket that leads to it. Whoever changes a record puts the new
ticket before the old one is taken away; whoever finds an old ticket puts the right one before dropping it (`put`).

Those that are scheduled are moved by whoever claims from the queue, or puts something into it, when they are due. Each
process has a heap of what it has heard of, and reads the list anew when it begins, when its connection was lost, and
once a minute. Two processes that move the same one put the same ticket, of which the server keeps one.
"""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Iterable, Sequence

from bulkhead.backends.nats.cells import forget, read_cell
from bulkhead.backends.nats.job import Job, Stage
from bulkhead.backends.nats.layout import Layout, check_answer
from bulkhead.backends.nats.names import token_of
from bulkhead.backends.nats.session import Question, Session

__all__ = ["Heap", "Tickets", "order_of", "ticket_facts"]

# What is kept of a queue that nobody claims from here; more is forgotten, and read when somebody does.
_UNATTENDED = 1000
# Seconds after which the list of those scheduled is read again, in case that a bell was lost.
_FRESH = 60.0
# Tickets that are moved in one go.
_BATCH = 1000
# What the server answers if the subject has a message already, by expectation and by limit.
_THERE_IS_ONE = (10071, 10077)
_NEW = {"Nats-Expected-Last-Subject-Sequence": "0"}


class Heap:
    """The scheduled tickets of one queue that this process knows of, by due time."""

    def __init__(self) -> None:
        self.is_attended = False
        self.read_at = -_FRESH
        self.epoch = -1
        self._heap: list[tuple[tuple[int, int], str]] = []
        self._known: set[str] = set()

    def add(self, subjects: Iterable[str]) -> None:
        """Note these."""
        for subject in subjects:
            if subject not in self._known:
                self._known.add(subject)
                heapq.heappush(self._heap, (order_of(subject), subject))
        if not self.is_attended and len(self._heap) > _UNATTENDED:
            self._heap.clear()
            self._known.clear()
            self.epoch = -1

    def next_due(self) -> float | None:
        """Return when the next one is due, POSIX seconds."""
        return self._heap[0][0][0] / 1e6 if self._heap else None

    def take_due(self, now: float, most: int) -> list[str]:
        """Return those that are due, in order, and forget them."""
        taken: list[str] = []
        while self._heap and self._heap[0][0][0] <= now * 1e6 and len(taken) < most:
            subject = heapq.heappop(self._heap)[1]
            self._known.discard(subject)
            taken.append(subject)
        return taken


class Tickets:
    """Puts, moves, lists and takes away tickets."""

    def __init__(self, session: Session, layout: Layout) -> None:
        self._session = session
        self._layout = layout
        self._heaps: dict[str, Heap] = {}

    def ready_subject(self, job: Job) -> str:
        """Return the subject of a job's ticket in the work queue."""
        return f"{self._layout.ready}.{token_of(job.queue)}.{job.priority}.{job.key}.{job.turn}"

    def later_subject(self, job: Job) -> str:
        """Return the subject of a scheduled job's ticket."""
        due = f"{round(job.due * 1e6)}-{job.rank}"
        return f"{self._layout.later}.{token_of(job.queue)}.{due}.{job.priority}.{job.key}.{job.turn}"

    def dead_subject(self, job: Job) -> str:
        """Return the subject of a dead letter's ticket."""
        return f"{self._layout.dead}.{token_of(job.queue)}.{round(job.due * 1e6)}.{job.key}.{job.turn}"

    def subject(self, job: Job, now: float) -> str:
        """Return the subject of the ticket that a job should have."""
        if job.stage is Stage.DEAD:
            return self.dead_subject(job)
        # Why `enqueued`: one without a delay was due at once, even if this process's clock is a little behind.
        return self.later_subject(job) if job.due > max(now, job.enqueued) else self.ready_subject(job)

    async def put(self, jobs: Sequence[Job], now: float) -> dict[str, list[str]]:
        """Put the tickets of jobs, where they are missing; by queue (its token), those which are not due."""
        subjects = [self.subject(job, now) for job in jobs]
        await self._put_missing(subjects)
        later: dict[str, list[str]] = {}
        for job, subject in zip(jobs, subjects, strict=True):
            subjects_of_queue = later.setdefault(token_of(job.queue), [])
            if subject.startswith(f"{self._layout.later}."):
                subjects_of_queue.append(subject)
        for queue, found in later.items():
            self.heap(queue).add(found)
        return later

    async def take_away(self, jobs: Sequence[Job]) -> None:
        """Remove every ticket of these jobs and turns, wherever it is."""
        listed = [self.dead_subject(job) for job in jobs if job.stage is Stage.DEAD]
        alive = [job for job in jobs if job.stage is not Stage.DEAD]
        # The others never were scheduled.
        listed += [self.later_subject(job) for job in alive if job.due > job.enqueued]
        await self._take_from_index(listed)
        await self._take_from_queue([self.ready_subject(job) for job in alive])

    def heap(self, queue: str) -> Heap:
        """Return what is known of the scheduled tickets of a queue (its token)."""
        return self._heaps.setdefault(queue, Heap())

    async def attend(self, queue: str) -> Heap:
        """Return the same, complete up to the bells that were lost in the last minute."""
        heap = self.heap(queue)
        heap.is_attended = True
        now = time.monotonic()
        if heap.epoch != self._session.epoch or now - heap.read_at > _FRESH:
            epoch = self._session.epoch
            heap.add(await self.listed(f"{self._layout.later}.{queue}.>"))
            heap.epoch, heap.read_at = epoch, now
        return heap

    async def move_due(self, queue: str, now: float) -> None:
        """Put tickets into the work queue for those that are due, as far as this process has heard of them."""
        heap = self.heap(queue)
        while subjects := heap.take_due(now, _BATCH):
            try:
                await self._move(subjects)
            except BaseException:
                heap.add(subjects)
                raise

    async def _move(self, subjects: list[str]) -> None:
        moved = []
        for subject in subjects:
            _, queue, _, priority, key, turn = subject.rsplit(".", 5)
            moved.append(f"{self._layout.ready}.{queue}.{priority}.{key}.{turn}")
        # Race: another process may have moved it already; then the server refuses this one, or it leads nowhere.
        await self._put_missing(moved)
        await self._take_from_index(subjects)

    async def _take_from_index(self, subjects: Sequence[str]) -> None:
        subject = f"$JS.API.STREAM.PURGE.{self._layout.index_stream}"
        await self._session.ask([(subject, f'{{"filter":"{one}"}}'.encode(), None) for one in subjects])

    async def _take_from_queue(self, subjects: Sequence[str]) -> None:
        # Why not by a purge: when no message of its subject is left, server 2.9 takes it for one of the whole stream
        # and lets every consumer begin behind all tickets that there are.
        stream = self._layout.ready_stream
        subject = f"$JS.API.STREAM.MSG.GET.{stream}"
        answers = await self._session.ask(
            [(subject, f'{{"last_by_subj":"{one}"}}'.encode(), None) for one in subjects]
        )
        found = [cell.version for answer in answers if (cell := read_cell(answer)) is not None]
        await forget(self._session, stream, found)

    async def waiting(self, queue: str) -> set[int]:
        """Return of which priorities there are tickets of a queue (its token) in the work queue. Cost: as `listed`."""
        found = await self.listed(f"{self._layout.ready}.{queue}.>", self._layout.ready_stream)
        return {int(subject.rsplit(".", 3)[1]) for subject in found}

    async def listed(self, subjects: str, stream: str | None = None) -> list[str]:
        """Return the subjects of the index, or a stream, that match, in any order. Cost: 300,000 per second."""
        found: list[str] = []
        subject = f"$JS.API.STREAM.INFO.{stream or self._layout.index_stream}"
        while True:
            body = json.dumps({"subjects_filter": subjects, "offset": len(found)}).encode()
            answer = check_answer(await self._session.ask_one(subject, body), "listing tickets")
            page = answer["state"].get("subjects") or {}
            found += page
            if not page or len(found) >= answer.get("total", 0):
                return found

    async def _put_missing(self, subjects: Sequence[str]) -> None:
        # Why two ways: the work queue itself refuses a second one, and headers would make reading tickets slower.
        ready = f"{self._layout.ready}."
        questions: list[Question] = [
            (subject, b"", None if subject.startswith(ready) else _NEW) for subject in subjects
        ]
        for answer in await self._session.ask(questions):
            if answer.get("error", {}).get("err_code") not in _THERE_IS_ONE:
                check_answer(answer, "putting a ticket")


def ticket_facts(subject: str) -> tuple[str, int]:
    """Return the id's token and the turn of a ticket."""
    _, key, turn = subject.rsplit(".", 2)
    return key, int(turn)


def order_of(later: str) -> tuple[int, int]:
    """Return when a scheduled ticket is due, in microseconds, and its rank."""
    due, _, rank = later.rsplit(".", 5)[2].partition("-")
    return int(due), int(rank)
