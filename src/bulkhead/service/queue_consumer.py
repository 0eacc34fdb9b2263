"""One queue in a consumer: what is claimed of it, what runs, and what has become of it.

No more is claimed than can begin soon: so many jobs as there are workers, or what short ones use up in a moment. Short
jobs travel in batches (batch.py), the others one by one.

Race: the broker may be out of reach at any call. Whatever was to be told is told again until it is, or the consumer
ends; then the leases run out, and the jobs run again elsewhere.
"""

from __future__ import annotations

import logging
import math
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec

from bulkhead.backends.base import Burial, Claim, Standing
from bulkhead.dispatcher import Dispatcher
from bulkhead.errors import (
    BadMessage,
    BrokerUnavailable,
    BulkheadError,
    JobCancelled,
    JobTimeout,
    RemoteTraceback,
    UnknownTask,
)
from bulkhead.job import Job
from bulkhead.service.batch import NO_MARK, Batch, HeldJob, Marks
from bulkhead.service.envelope import Envelope, failure_of
from bulkhead.service.link import Link
from bulkhead.service.running import BATCH_SECONDS, FAILED, SNOOZED, Answer, Item, run_batch
from bulkhead.service.telling import Teller, guarded
from bulkhead.service.verdicts import Bury, Cancel, GiveBack, Verdict, after, exhausted

if TYPE_CHECKING:
    from bulkhead.service.app import App
    from bulkhead.service.middleware.base import Middleware

__all__ = ["QueueConsumer"]

_log = logging.getLogger("bulkhead")

# A claim waits so long for a job (seconds); so long a stop may take to be noticed.
_CLAIM_WAIT = 0.5

# Jobs that take less than this on average travel in batches (seconds), of which each should take so long.
_SHORT = 0.002
_BATCH_AIM = 0.01
_LARGEST_BATCH = 500

# So much work (seconds) is held for each worker beyond what runs, and so many jobs at most.
_HELD_AHEAD = 0.05
_MOST_HELD = 2000

# How much of an earlier measurement counts when another comes in.
_MEMORY = 0.8

# A mark that stands for this long (seconds): nothing behind it will begin. Well above what a batch may take.
_STUCK = 4 * BATCH_SECONDS

# A job that asks whether it is cancelled has so long to end by itself (seconds).
_CANCEL_GRACE = 5.0

# Pauses between attempts to reach a broker (seconds).
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0

# What a job takes of which nothing is known (seconds): it goes alone.
_UNKNOWN = 1.0


class QueueConsumer:
    """One queue: what is claimed of it, what runs, what is told.

    `_lock` guards what is held, and the batches; the broker and the pool are never called under it.
    """

    def __init__(
        self,
        app: App,
        name: str,
        priority: int,
        n_workers: int,
        dispatcher: Dispatcher,
        link: Link,
        marks: Marks,
        free_slots: deque[int],
    ) -> None:
        self.name = name
        self._app = app
        self._priority = priority
        self._n_workers = n_workers
        self._dispatcher = dispatcher
        self._address = link.address
        self._slots = marks.slots
        self._free_slots = free_slots
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._held: dict[str, HeldJob] = {}
        self._batches: set[Batch] = set()
        self._seconds: dict[str, float] = {}  # what a job of each task takes, on average
        self._done: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._is_leaving = False
        self._is_over = threading.Event()
        self._dequeue: Callable[[int], list[HeldJob]] = self._claim
        self._wait = _CLAIM_WAIT
        for middleware in reversed(app.middlewares):
            self._dequeue = _around(middleware, name, self._dequeue)
        self._fetcher = threading.Thread(target=self._fetch, name=f"bulkhead {name} fetch", daemon=True)
        self._teller = Teller(app, name)
        self._settler = threading.Thread(target=self._settle, name=f"bulkhead {name} settle", daemon=True)
        self._settler.start()

    # For the consumer

    def start(self) -> None:
        """Begin to claim."""
        self._fetcher.start()

    def take_one(self) -> str | None:
        """Claim one job that is due, without waiting, and have it run; return its id."""
        self._wait = 0.0
        jobs = self._dequeue(1)
        self._admit(jobs)
        return jobs[0].id if jobs else None

    @property
    def n_held(self) -> int:
        """How many jobs are held here."""
        return len(self._held)

    def find(self, job_id: str) -> HeldJob | None:
        """Return a job that is held here."""
        return self._held.get(job_id)

    def finish(self) -> None:
        """Wait until nothing is held. Blocking: as long as the jobs run."""
        with self._room:
            self._room.wait_for(lambda: not self._held)

    def begin_to_leave(self) -> None:
        """Claim nothing more, and give back what has not begun."""
        with self._room:
            self._is_leaving = True
            self._room.notify_all()
            waiting = [one for one in self._batches if not _has_begun(one)]
        for batch in waiting:
            self._return(batch)

    def give_all_back(self) -> None:
        """Give back what runs, its processes ended. Blocking: until the broker knows, some seconds at most."""
        with self._lock:
            batches = list(self._batches)
        for batch in batches:
            self._return(batch)
        deadline = time.monotonic() + 10.0
        with self._room:
            self._room.wait_for(lambda: not self._held, timeout=deadline - time.monotonic())
            left = len(self._held)
        if left:
            _log.warning(
                "queue %s: %d jobs could not be given back; they run again after their leases",
                self.name,
                left,
            )

    def end(self) -> None:
        """End the threads."""
        self._is_over.set()
        with self._room:
            self._is_leaving = True
            self._room.notify_all()
        self._done.put(None)
        for thread in (self._fetcher, self._settler):
            if thread.ident is not None:
                thread.join(2 * _CLAIM_WAIT + _LONGEST_PAUSE)

    def _return(self, batch: Batch) -> None:
        for held in batch.jobs:
            held.is_returned = True
        if batch.tracker is not None:
            batch.tracker.cancel()

    # Fetching. Owner: the fetch thread.

    def _fetch(self) -> None:
        pause = _FIRST_PAUSE
        while n := self._wait_for_room():
            try:
                self._admit(self._dequeue(n))
                pause = _FIRST_PAUSE
            except BrokerUnavailable as error:
                pause = self._hold_on(error, pause)
            except Exception:
                _log.exception("queue %s: claiming failed; trying again in %g s", self.name, pause)
                self._is_over.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _hold_on(self, error: BrokerUnavailable, pause: float) -> float:
        _log.warning("queue %s: %s; trying again in %g s", self.name, error, pause)
        self._is_over.wait(pause * random.uniform(0.8, 1.2))
        return min(2 * pause, _LONGEST_PAUSE)

    def _wait_for_room(self) -> int:
        """Return how many jobs may be claimed; 0 when none any more."""
        with self._room:
            self._room.wait_for(lambda: self._is_leaving or self._n_wanted() > 0)
            return 0 if self._is_leaving else self._n_wanted()

    def _n_wanted(self) -> int:
        room = self._n_room() - len(self._held)
        # Why not one by one: a claim is a round trip, which a few short jobs more do not make dearer.
        return room if room >= self._n_room() // 4 or len(self._held) < self._n_workers else 0

    def _n_room(self) -> int:
        seconds = max(self._seconds.values(), default=_UNKNOWN)
        ahead = int(self._n_workers * _HELD_AHEAD / max(seconds, 1e-6))
        return self._n_workers + min(ahead, _MOST_HELD)

    def _claim(self, n: int) -> list[HeldJob]:
        claims = self._app.backend.broker.claim(self.name, n, self._app.lease, wait=self._wait)
        held = []
        for claim in claims:
            job = self._opened(claim)
            if job is not None:
                held.append(job)
        return held

    def _opened(self, claim: Claim) -> HeldJob | None:
        try:
            envelope = self._app.sealer.open(claim.id, claim.queue, claim.body)
            if envelope.members:
                self._expand(claim, envelope)
                return None
            task = self._app.find_task(envelope.task)
        except (BadMessage, UnknownTask) as error:
            _log.error("queue %s: job %s becomes a dead letter: %s", self.name, claim.id, error)
            self._bury(Burial(claim.hold, str(error), failure_of(error)))
            return None
        held = HeldJob(claim, envelope, task, msgspec.msgpack.encode(envelope))
        if exhausted(envelope, claim.attempt):
            n = claim.attempt - 1
            held.verdict = Bury(f"its worker died or lost the lease in each of {n} attempts", claim.error)
        return held

    def _bury(self, burial: Burial) -> None:
        self._told(lambda: self._app.backend.broker.bury([burial]))

    def _expand(self, claim: Claim, envelope: Envelope) -> None:
        """Enqueue the jobs of a group. Race: done twice, the second time changes nothing, as their ids are taken."""
        messages = [self._app.message(member, member.envelope) for member in envelope.members]
        broker = self._app.backend.broker
        broker.enqueue_many(messages)
        broker.ack([claim.hold])

    def _admit(self, jobs: list[HeldJob]) -> None:
        to_run = [held for held in jobs if held.verdict is None]
        with self._lock:
            self._held.update((held.id, held) for held in jobs)
        for held in to_run:
            self._teller.call_back(held, held.task.options.on_processing)
        refused = [held for held in jobs if held.verdict is not None]
        if refused:
            self._done.put(_judged(refused))
        for batch in self._batched(to_run):
            self._send(batch)

    def _batched(self, jobs: list[HeldJob]) -> Iterable[list[HeldJob]]:
        short: list[HeldJob] = []
        for held in jobs:
            if self._seconds.get(held.envelope.task, _UNKNOWN) < _SHORT:
                short.append(held)
            else:
                yield [held]
        if short:
            seconds = sum(self._seconds[held.envelope.task] for held in short) / len(short)
            most = max(1, min(_LARGEST_BATCH, int(_BATCH_AIM / max(seconds, 1e-6))))
            size = max(1, min(most, math.ceil(len(short) / self._n_workers)))
            for at in range(0, len(short), size):
                yield short[at : at + size]

    def _send(self, jobs: list[HeldJob]) -> None:
        """Have jobs run. Concurrency: any thread."""
        tasks = list(dict.fromkeys(held.task for held in jobs))
        numbers = {task: number for number, task in enumerate(tasks)}
        items = [
            Item(
                numbers[held.task],
                held.id,
                self.name,
                held.claim.attempt,
                held.claim.enqueued_at,
                held.packed,
            )
            for held in jobs
        ]
        slot = self._take_slot() if len(jobs) > 1 else None
        batch = Batch(jobs, slot, self._slots)
        with self._lock:
            self._batches.add(batch)
            for held in jobs:
                held.batch = batch
        job = Job(run_batch, tuple(tasks), items, self._address, slot).options(priority=self._priority)
        if len(jobs) == 1 and jobs[0].envelope.timeout is not None:
            job = job.options(timeout=jobs[0].envelope.timeout)
        try:
            batch.tracker = self._dispatcher.dispatch(job)
        except BulkheadError as error:
            batch.refusal = error
            self._done.put(batch)
            return
        batch.tracker.add_done_callback(lambda _: self._done.put(batch))
        # Race: the consumer may have begun to leave between the claim and here.
        if self._is_leaving:
            self._return(batch)

    def _take_slot(self) -> int | None:
        slot = self._free_slots.popleft()
        self._slots[slot] = NO_MARK
        return slot

    # Looking after what is held. Owner: the pulse thread.

    def look_after_batches(self, now: float) -> None:
        """Take back what is behind a job that takes long, and end one that has had its time."""
        with self._lock:
            batches = [one for one in self._batches if one.slot is not None]
        for batch in batches:
            self._look_after(batch, now)

    def _look_after(self, batch: Batch, now: float) -> None:
        mark, seconds = batch.standing(now)
        if mark is None or seconds < _STUCK:
            return
        behind = []
        with self._lock:
            if batch not in self._batches:
                return
            behind = batch.jobs[mark + 1 : batch.n_kept]
            batch.n_kept = min(batch.n_kept, mark + 1)
        for held in behind:
            self._send([held])
        running = batch.jobs[mark]
        timeout = running.envelope.timeout
        if timeout is not None and seconds > timeout:
            batch.overtime = mark
        is_unwanted = running.is_lost or (running.is_cancelled and not _has_grace(running, now))
        if (batch.overtime is not None or is_unwanted) and batch.tracker is not None:
            batch.tracker.cancel()

    def beat(self) -> None:
        """Renew what is held; end what is cancelled or lost."""
        with self._lock:
            jobs = list(self._held.values())
        try:
            self._renew(jobs)
        except BrokerUnavailable as error:
            _log.warning(
                "queue %s: the leases of %d jobs could not be renewed: %s", self.name, len(jobs), error
            )
        except Exception:
            _log.exception("queue %s: the leases of %d jobs could not be renewed", self.name, len(jobs))
        for middleware in self._app.middlewares:
            guarded(middleware.beat, self.name, jobs)

    def _renew(self, jobs: list[HeldJob]) -> None:
        if not jobs:
            return
        now = time.monotonic()
        standings = self._app.backend.broker.renew([held.claim.hold for held in jobs], self._app.lease)
        for held, standing in zip(jobs, standings, strict=True):
            if standing is Standing.LOST and held.id in self._held:
                if not held.is_lost:
                    _log.warning(
                        "queue %s: the lease of job %s is lost; its run here is ended", self.name, held.id
                    )
                held.is_lost = True
            elif standing is Standing.CANCELLED and not held.is_cancelled:
                held.cancelled_at = now
                held.is_cancelled = True
            if held.is_lost or (held.is_cancelled and not _has_grace(held, now)):
                self._end_single(held)

    def _end_single(self, held: HeldJob) -> None:
        batch = held.batch
        if batch is not None and batch.slot is None and batch.tracker is not None:
            batch.tracker.cancel()

    # Settling. Owner: the settle thread.

    def _settle(self) -> None:
        while True:
            batches = [self._done.get()]
            try:
                while True:
                    batches.append(self._done.get_nowait())
            except queue.Empty:
                pass
            found = [one for one in batches if one is not None]
            try:
                self._settle_batches(found)
            except Exception:
                _log.exception(
                    "queue %s: jobs could not be settled; they run again after their leases", self.name
                )
                self._drop([held for batch in found for held in batch.jobs])
            if len(found) < len(batches):
                return

    def _settle_batches(self, batches: list[Batch]) -> None:
        verdicts: list[tuple[HeldJob, Verdict]] = []
        again: list[HeldJob] = []
        for batch in batches:
            with self._lock:
                self._batches.discard(batch)
            if batch.slot is not None:
                self._free_slots.append(batch.slot)
            done, rest = self._judge(batch)
            verdicts += done
            again += rest
        self._tell(verdicts)
        for held in again:
            self._send([held])

    def _judge(self, batch: Batch) -> tuple[list[tuple[HeldJob, Verdict]], list[HeldJob]]:
        """Return what is to become of a batch's jobs, and those that are to run again."""
        if batch.tracker is None:
            if batch.refusal is not None:
                return [(held, GiveBack(1.0)) for held in batch.jobs], []
            return [(held, held.verdict) for held in batch.jobs], []
        kept = batch.jobs[: batch.n_kept]
        error = batch.tracker.exception(0)
        if error is None:
            answers: list[Answer] = batch.tracker.result(0)
            done = [self._answered(held, answer) for held, answer in zip(kept, answers, strict=False)]
            return done, kept[len(answers) :]
        blamed = 0 if batch.slot is None else batch.mark
        verdicts: list[tuple[HeldJob, Verdict]] = []
        again: list[HeldJob] = []
        for number, held in enumerate(kept):
            if held.is_returned or held.is_lost:
                verdicts.append((held, GiveBack()))
            elif number == blamed:
                verdicts.append((held, self._failed(held, error, batch)))
            else:
                again.append(held)
        return verdicts, again

    def _answered(self, held: HeldJob, answer: Answer) -> tuple[HeldJob, Verdict]:
        if answer[0] != SNOOZED:
            held.seconds = answer[2]
            self._learn(held.envelope.task, held.seconds)
        return held, after(answer, held.envelope, held.claim.attempt, random.random())

    def _failed(self, held: HeldJob, error: BaseException, batch: Batch) -> Verdict:
        if batch.overtime is not None:
            timeout = held.envelope.timeout
            error = JobTimeout(f"job {held.id} ran longer than its timeout of {timeout} s", timeout=timeout)
        elif isinstance(error, JobCancelled):
            return Cancel()
        self._learn(held.envelope.task, _UNKNOWN)
        answer = FAILED, failure_of(error, _trace(error)), 0.0
        return after(answer, held.envelope, held.claim.attempt, random.random())

    def _learn(self, task: str, seconds: float) -> None:
        known = self._seconds.get(task)
        self._seconds[task] = seconds if known is None else _MEMORY * known + (1 - _MEMORY) * seconds

    def _tell(self, verdicts: list[tuple[HeldJob, Verdict]]) -> None:
        wanted = [(held, verdict) for held, verdict in verdicts if not held.is_lost]
        if wanted and self._told(lambda: self._teller.tell(wanted)):
            for held, verdict in wanted:
                if not held.is_lost:
                    self._teller.report(held, verdict)
        self._drop([held for held, _ in verdicts])

    def _told(self, tell: Callable[[], object]) -> bool:
        """Tell the broker something, again and again while it is out of reach; False when we end before that."""
        pause = _FIRST_PAUSE
        while True:
            try:
                tell()
                return True
            except BrokerUnavailable as error:
                if self._is_over.is_set():
                    _log.warning("queue %s: %s; what ended is not told, and runs again", self.name, error)
                    return False
                pause = self._hold_on(error, pause)

    def _drop(self, jobs: list[HeldJob]) -> None:
        with self._room:
            for held in jobs:
                if self._held.get(held.id) is held:
                    del self._held[held.id]
            self._room.notify_all()


def _around(
    middleware: Middleware, name: str, forward: Callable[[int], list[HeldJob]]
) -> Callable[[int], list[HeldJob]]:
    return lambda n: middleware.dequeue(name, n, forward)


def _judged(jobs: list[HeldJob]) -> Batch:
    """Return jobs that are not run, with what is to become of them, as the settle thread takes them."""
    return Batch(jobs, None, memoryview(b""))


def _has_begun(batch: Batch) -> bool:
    if batch.slot is not None:
        return batch.mark is not None
    return batch.tracker is not None and batch.tracker.status().state == "running"


def _has_grace(held: HeldJob, now: float) -> bool:
    """Tell whether a cancelled job may go on a little: it asks, and will learn it by itself."""
    return held.asked_at is not None and now - held.cancelled_at < _CANCEL_GRACE


def _trace(error: BaseException) -> str:
    cause = error.__cause__
    return cause.text if isinstance(cause, RemoteTraceback) else getattr(error, "stack", "") or ""
