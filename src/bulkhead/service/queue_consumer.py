"""One queue in a consumer: what is claimed of it, what runs, and what has become of it.

    fetch thread:   room? ─▶ claim ─▶ middlewares ─▶ batches ─▶ pool
    settle thread:  what has come back ─▶ verdicts ─▶ broker (telling.py) ─▶ callbacks
    pulse thread:   looks after what takes long, is cancelled, lost, or waits in vain

No more is claimed than can begin soon (pace.py). Short jobs travel in batches (batch.py), the others one by one.

Race: the broker may be out of reach at any call. Whatever was to be told is told again until it is, or the consumer
ends; then the leases run out, and the jobs run again elsewhere.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from bulkhead.backends.base import Burial, Claim
from bulkhead.dispatcher import Dispatcher
from bulkhead.errors import BrokerUnavailable, ConfigTypeError, DispatcherFinalized
from bulkhead.job import Job
from bulkhead.service.batch import Batch, HeldJob, Marks
from bulkhead.service.envelope import failure, failure_of
from bulkhead.service.groups import open_group
from bulkhead.service.holdings import Holdings
from bulkhead.service.judging import Judged, breakage, judge, may_be_swept_away
from bulkhead.service.leases import Leases, is_unwanted
from bulkhead.service.middleware.base import Middleware
from bulkhead.service.pace import Pace
from bulkhead.service.pauses import Pauses
from bulkhead.service.running import BATCH_SECONDS, Item, run_batch
from bulkhead.service.telling import Teller, guarded
from bulkhead.service.verdicts import Bury, Cancel, GiveBack, Lost, TryAgain, Verdict, exhausted

if TYPE_CHECKING:
    from bulkhead.service.app import App

__all__ = ["QueueConsumer"]

_log = logging.getLogger("bulkhead")

# A claim waits so long for a job (seconds); so long a stop may take to be noticed.
_CLAIM_WAIT = 0.2

# Jobs that come one after the other are claimed together so often (seconds).
_GATHER = 0.005

# Middlewares that want no job, or that let no claim wait, are asked again after so long (seconds).
_ASKED_AGAIN = 0.05

# What middlewares leave out of what was claimed is given back for so long at least (seconds).
_LEFT_OUT = 1.0

# A mark that stands for this long (seconds): nothing behind it will begin. Well above what a batch may take.
_STUCK = 4 * BATCH_SECONDS

# What has waited for a worker for so long (seconds) is given back: it was claimed because its kind used to be short.
_LONGEST_WAIT = 1.0

# A worker may be the first to end of a service all of whose processes are told to: so long (seconds) it is waited for
# that we are, too. Well above what the main thread takes to see a signal that the system has given to another one.
_SWEPT = 0.8

# Pauses between attempts to reach a broker (seconds).
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0

# Something that is to be told to the broker besides what has become of jobs.
Errand = Callable[[], object]


class QueueConsumer:
    """One queue.

    Args:
        app: The application.
        name: Of the queue.
        dispatcher: Has its pool.
        priority: Of its pool.
        n_workers: Of its pool.
        address: Of the consumer's link.
        marks: Where workers mark what they run.
        free_slots: Those of the marks that no batch has. Shared by the queues.
        leases: Of the consumer.
        thread: Makes a thread whose end by an exception is the consumer's end.
        fail: Ends the consumer with an error.
    """

    def __init__(
        self,
        app: App,
        name: str,
        *,
        dispatcher: Dispatcher,
        priority: int,
        n_workers: int,
        address: str,
        marks: Marks,
        free_slots: deque[int],
        leases: Leases,
        thread: Callable[[str, Callable[[], None]], threading.Thread],
        fail: Callable[[BaseException], None],
    ) -> None:
        self.name = name
        self._app = app
        self._dispatcher = dispatcher
        self._priority = priority
        self._n_workers = n_workers
        self._address = address
        self._marks = marks
        self._free_slots = free_slots
        self._leases = leases
        self._fail = fail
        self._holdings = Holdings()
        self._pace = Pace(n_workers)
        self._pauses = Pauses()
        self._teller = Teller(app, name)
        self._done: queue.SimpleQueue[Batch | Errand | None] = queue.SimpleQueue()
        self._is_leaving = threading.Event()
        self._is_over = threading.Event()
        self._dequeue: Callable[[int], list[HeldJob]] = self._claim
        for middleware in reversed(app.middlewares):
            self._dequeue = _around(middleware, name, self._dequeue)
        self._judges = [one for one in reversed(app.middlewares) if type(one).judge is not Middleware.judge]
        self._askers = [one.asked for one in app.middlewares if type(one).asked is not Middleware.asked]
        self._fresh: dict[HeldJob, None] = {}  # what was claimed in this round. Owner: who fetches
        self._has_claimed = False  # likewise
        self._has_found_all = False  # likewise: some, and no more were due
        waits = [one.claim_wait(name) for one in app.middlewares]
        self._wait = min([_CLAIM_WAIT, *(wait for wait in waits if wait is not None)])
        self._n_openers = 0  # groups that were claimed, likewise
        self._fetcher = thread(f"{name} fetch", self._fetch)
        self._settler = thread(f"{name} settle", self._settle)

    # For the consumer

    def start(self, *, is_fetching: bool = True) -> None:
        """Begin to claim; or not, but to settle what `take_one` claims."""
        self._settler.start()
        if is_fetching:
            self._fetcher.start()

    def take_one(self) -> HeldJob | None:
        """Claim one job that is due, without waiting, and have it run; return it."""
        self._wait = 0.0
        n_openers = -1
        jobs: list[HeldJob] = []
        while not jobs and self._n_openers != n_openers:
            n_openers = self._n_openers
            jobs = self._take(1)
            if self._n_openers != n_openers:
                self._wait_for_errands()
        return jobs[0] if jobs else None

    @property
    def is_busy(self) -> bool:
        """Tell whether jobs are held, or may still be claimed."""
        return len(self._holdings) > 0 or self._fetcher.is_alive()

    @property
    def n_held(self) -> int:
        """How many jobs are held here."""
        return len(self._holdings)

    def find(self, job_id: str) -> HeldJob | None:
        """Return a job that is held here."""
        return self._holdings.find(job_id)

    def jobs(self) -> list[HeldJob]:
        """Return the jobs that are held here."""
        return self._holdings.jobs()

    def wait_idle(self, timeout: float) -> bool:
        """Wait until no job is held."""
        return self._holdings.wait_for(lambda: not len(self._holdings), timeout)

    def begin_to_leave(self) -> None:
        """Claim nothing more, and give back what has not begun."""
        self._is_leaving.set()
        self._holdings.notify()
        for batch in self._holdings.batches():
            batch.withdraw()

    def give_all_back(self) -> None:
        """Give back what runs, its processes ended."""
        for batch in self._holdings.batches():
            for held in batch.jobs:
                held.is_returned = True
            batch.end()

    def end(self) -> None:
        """End the threads. Blocking: some seconds at most, if the broker is out of reach."""
        self._is_over.set()
        self._is_leaving.set()
        self._holdings.notify()
        # Race: what the fetch thread has just claimed is given back by the settle thread, which so has to end last.
        for thread, last_words in ((self._fetcher, False), (self._settler, True)):
            if last_words:
                self._done.put(None)
            if thread.ident is not None:
                thread.join(2 * _CLAIM_WAIT + _LONGEST_PAUSE)
        self._forsake(self._holdings.jobs())

    # Fetching. Owner: the fetch thread, or who calls `take_one`.

    def _fetch(self) -> None:
        pause, last = _FIRST_PAUSE, 0.0
        while n := self._wait_for_room():
            try:
                jobs = self._take(n)
                if not jobs and (not self._has_claimed or self._wait < _ASKED_AGAIN):
                    self._wait_a_moment()
                elif self._was_in_vain():
                    self._is_leaving.wait(_ASKED_AGAIN)
                pause = _FIRST_PAUSE
                # Why: while jobs are enqueued one by one, a round trip for each would cost more than it brings. The
                # first after a pause never waits.
                now = time.monotonic()
                if jobs and len(jobs) < n // 4 and now - last < 2 * _GATHER:
                    self._is_leaving.wait(_GATHER)
                last = now
            except Exception as error:
                pause = self._hold_on(error, pause, self._is_leaving)

    def _hold_on(self, error: Exception, pause: float, unless: threading.Event) -> float:
        """Wait after an error; return for how long after the next one."""
        pause *= random.uniform(0.8, 1.2)
        is_expected = isinstance(error, BrokerUnavailable)
        _log.warning(
            "queue %s: %s; trying again in %.1f s", self.name, error, pause, exc_info=not is_expected
        )
        unless.wait(pause)
        return min(2 * pause, _LONGEST_PAUSE)

    def _wait_for_room(self) -> int:
        """Return how many jobs may be claimed; 0 when none any more."""
        self._holdings.wait_for(lambda: self._is_leaving.is_set() or self._n_wanted() > 0)
        return 0 if self._is_leaving.is_set() else self._n_wanted()

    def _n_wanted(self) -> int:
        n_held = len(self._holdings)
        room = self._pace.room()
        # Why not one by one: a claim is a round trip, which a few short jobs more do not make dearer.
        is_worth_it = room - n_held >= room // 4 or n_held < self._n_workers
        return max(0, room - n_held) if is_worth_it else 0

    def _wait_a_moment(self) -> None:
        """Wait before the middlewares are asked again; a job that ends here may change their mind."""
        if not self._is_leaving.is_set():
            self._holdings.wait(_ASKED_AGAIN)

    def _take(self, n: int) -> list[HeldJob]:
        """Let the middlewares claim up to `n` jobs, and admit what they return; the rest is given back."""
        self._fresh, self._has_claimed, self._has_found_all = {}, False, False
        chosen: list[HeldJob] = []
        try:
            chosen = _checked(self._dequeue(n), self._fresh)
        finally:
            # Also when one of them raises: then nothing is chosen.
            found = set(chosen)
            left_out = [held for held in self._fresh if held not in found]
            if chosen:
                self._pauses.begun(self.name)
            for held in left_out:
                # Why not at its place: nothing says that there is any behind it that middlewares would choose.
                held.verdict = GiveBack(max(_LEFT_OUT, self._pauses.next(self.name)), keeps_place=False)
            self._admit([*chosen, *left_out])
        return chosen

    def _was_in_vain(self) -> bool:
        """Tell whether all that could be claimed in this round is given back: the next one would find no better."""
        return self._has_found_all and all(isinstance(held.verdict, GiveBack) for held in self._fresh)

    def _wait_for_errands(self) -> None:
        """Wait until what was to be told until now is told."""
        is_told = threading.Event()
        self._done.put(is_told.set)
        while not is_told.wait(0.5) and self._settler.is_alive():
            pass

    def _claim(self, n: int) -> list[HeldJob]:
        if n < 1:
            return []
        self._has_claimed = True
        while True:
            asked = time.monotonic()
            claims = self._app.backend.broker.claim(self.name, n, self._app.lease, wait=self._wait)
            for told in self._askers:
                guarded(told, self.name, len(claims))
            self._has_found_all = 0 < len(claims) < n
            jobs = [job for claim in claims if (job := self._opened(claim)) is not None]
            for held in jobs:
                held.sure_until = self._leases.sure_until(asked)
                self._fresh[held] = None
            # Why: what cannot be read must not look like an empty queue.
            if jobs or not claims or self._is_leaving.is_set():
                break
        self._check_cancelled([held for held in jobs if held.claim.attempt > 1])
        return jobs

    def _check_cancelled(self, jobs: Sequence[HeldJob]) -> None:
        """Race: a job may have been cancelled in an earlier attempt, whose consumer died before it knew."""
        if not jobs:
            return
        try:
            self._leases.renew(jobs)
        except BrokerUnavailable as error:
            _log.warning("queue %s: %s; going on without knowing what is cancelled", self.name, error)
        for held in jobs:
            if held.is_cancelled and held.verdict is None:
                held.verdict = Cancel()

    def _opened(self, claim: Claim) -> HeldJob | None:
        try:
            envelope = self._app.sealer.open(claim.id, claim.queue, claim.body)
            if envelope.bundle is not None:
                self._n_openers += 1
                self._done.put(lambda: open_group(self._app, claim, envelope))
                return None
            task = self._app.find_task(envelope.task)
        except Exception as error:  # Why all: it must not take those that were claimed with it along
            self._done.put(_burial(self._app, claim, error))
            return None
        held = HeldJob(claim, envelope, task, self._app.sealer.bare(claim.body))
        if exhausted(envelope, claim.attempt):
            n = claim.attempt - 1
            held.verdict = Bury(
                f"{n} attempts, in the last of which its worker died or lost the lease", claim.error
            )
        return held

    def _admit(self, jobs: Sequence[HeldJob]) -> None:
        for ousted in self._holdings.add(jobs):
            ousted.is_lost = True  # the pulse thread ends its run
        if self._is_leaving.is_set():
            for held in jobs:
                held.verdict = held.verdict or GiveBack()
        to_run = [held for held in jobs if held.verdict is None]
        for held in to_run:
            self._teller.call_back(held, held.task.options.on_processing)
        unrun = [held for held in jobs if held.verdict is not None]
        if unrun:
            self._done.put(Batch(unrun, None, None))
        for some in self._batched(to_run):
            self._send(some)

    def _batched(self, jobs: Sequence[HeldJob]) -> Iterable[list[HeldJob]]:
        short: list[HeldJob] = []
        for held in jobs:
            if self._pace.is_short(held.envelope.task):
                short.append(held)
            else:
                yield [held]
        if short:
            size = self._pace.batch_size([held.envelope.task for held in short])
            for at in range(0, len(short), size):
                yield short[at : at + size]

    # Running

    def _send(self, jobs: list[HeldJob]) -> None:
        """Have jobs run; give them back if the consumer leaves. Concurrency: any thread."""
        slot = self._take_slot() if len(jobs) > 1 else None
        if slot is None and len(jobs) > 1:
            for held in jobs:
                self._send([held])
            return
        batch = Batch(jobs, slot, self._marks)
        for held in jobs:
            held.batch = batch
        self._holdings.add_batch(batch)
        try:
            if self._is_leaving.is_set():
                raise DispatcherFinalized("the consumer leaves")
            batch.tracker = self._dispatcher.dispatch(self._job(batch))
        except Exception as error:
            batch.refusal = error
            self._done.put(batch)
            return
        batch.tracker.add_done_callback(lambda _: self._done.put(batch))
        # Race: the consumer may have begun to leave meanwhile.
        if self._is_leaving.is_set():
            batch.withdraw()

    def _job(self, batch: Batch) -> Job:
        tasks = list(dict.fromkeys(held.task for held in batch.jobs))
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
            for held in batch.jobs
        ]
        job = Job(run_batch, tuple(tasks), items, self._address, batch.slot).options(priority=self._priority)
        timeout = batch.jobs[0].envelope.timeout
        return job if len(items) > 1 or timeout is None else job.options(timeout=timeout)

    def _take_slot(self) -> int | None:
        try:
            slot = self._free_slots.pop()  # Why the last one: few of them are ever written to
        except IndexError:
            return None
        self._marks.clear(slot)
        return slot

    # Looking after what is held. Owner: the pulse thread.

    def look_after(self) -> None:
        """End what is unwanted or has had its time; take back what is behind it, and what waits in vain."""
        batches = self._holdings.batches()
        for batch in batches:
            if batch.slot is not None:
                self._look_after_batch(batch)
            elif is_unwanted(batch.jobs[0]):
                batch.end()
        self._give_back_waiting(batches)

    def _look_after_batch(self, batch: Batch) -> None:
        mark, seconds = batch.standing()
        if mark is None or seconds < _STUCK:
            return
        for held in self._holdings.take_behind(batch, mark):
            self._send([held])
        running = batch.jobs[mark]
        timeout = running.envelope.timeout
        if timeout is not None and seconds > timeout:
            batch.overtime = mark
        if batch.overtime is not None or is_unwanted(running):
            batch.end()

    def _give_back_waiting(self, batches: Sequence[Batch]) -> None:
        """Give back what waits for workers that are busy for longer than was thought: another consumer may be idle."""
        latest = time.monotonic() - _LONGEST_WAIT
        old = [one for one in batches if one.made_at < latest]
        if len(old) <= self._n_workers:
            return
        begun = [one for one in old if one.has_begun()]
        waiting = [one for one in old if one not in set(begun)]
        # Why not all: the workers may not be up yet.
        spare = waiting[max(0, self._n_workers - len(begun)) :]
        for batch in begun if spare else ():
            self._pace.learn_long(batch.jobs[batch.mark or 0].envelope.task)
        for batch in spare:
            batch.withdraw()

    def let_middlewares_know(self) -> None:
        """Call their `beat`."""
        jobs = self._holdings.jobs() if self._app.middlewares else []
        for middleware in self._app.middlewares:
            guarded(middleware.beat, self.name, jobs)

    # Settling. Owner: the settle thread.

    def _settle(self) -> None:
        is_last = False
        while not is_last:
            entries = [self._done.get()]
            try:
                while True:
                    entries.append(self._done.get_nowait())
            except queue.Empty:
                pass
            is_last = None in entries
            batches = [one for one in entries if isinstance(one, Batch)]
            try:
                self._settle_batches(batches)
            except BaseException:
                self._forsake([held for batch in batches for held in batch.jobs])
                raise
            for errand in entries:
                if errand is not None and not isinstance(errand, Batch):
                    self._run_errand(errand)

    def _run_errand(self, errand: Errand) -> None:
        try:
            self._told(lambda _: errand())
        except Exception:
            _log.exception("queue %s: a message could not be dealt with; its lease runs out", self.name)

    def _settle_batches(self, batches: Sequence[Batch]) -> None:
        judged: Judged = []
        again: list[HeldJob] = []
        if any(map(may_be_swept_away, batches)):
            # Race: the signal that has ended the worker is on its way to us, and the job is not to be blamed.
            self._is_leaving.wait(_SWEPT)
        for batch in batches:
            self._holdings.drop_batch(batch)
            done, rest = judge(batch, self._pace, is_leaving=self._is_leaving.is_set())
            if batch.slot is not None:
                self._free_slots.append(batch.slot)
            if (broken := breakage(batch)) is not None:
                self._fail(broken)
            judged += done
            again += rest
        for held in again:
            self._send([held])
        self._tell([(held, self._reconsidered(held, verdict)) for held, verdict in judged])

    def _reconsidered(self, held: HeldJob, verdict: Verdict) -> Verdict:
        """Let the middlewares have their say, the innermost first."""
        for middleware in self._judges:
            try:
                verdict = _verdict(middleware.judge(held, verdict))
            except Exception:
                _log.exception("%r raised; job %s is left at %r", middleware.judge, held.id, verdict)
        return verdict

    def _tell(self, judged: Judged) -> None:
        for held, _ in judged:
            held.is_settling = True
        now = time.monotonic()
        # Why also those: whether somebody has cancelled a job that goes on is asked before it does.
        doubtful = [
            held
            for held, verdict in judged
            if not held.is_lost and (now > held.sure_until or isinstance(verdict, (TryAgain, GiveBack)))
        ]
        is_known = self._told(lambda _: self._leases.check(doubtful)) if doubtful else True
        final = [(held, _final(held, verdict) if is_known else Lost()) for held, verdict in judged]
        for held, verdict in final:
            if isinstance(verdict, TryAgain):
                # Why before it is told: another attempt may begin in that moment, and its callback come first.
                self._teller.call_back(held, held.task.options.on_retry, failure(verdict.error))
        for held, verdict in self._tell_broker([one for one in final if not isinstance(one[1], Lost)]):
            held.ending = verdict
            self._teller.report(held, verdict)
        for held, verdict in final:
            if isinstance(verdict, Lost):
                self._teller.report(held, verdict)
        self._holdings.drop([held for held, _ in final])

    def _tell_broker(self, judged: Judged, *, is_again: bool = False) -> Judged:
        """Tell what has become of jobs; return what the broker knows now."""
        if not judged:
            return []
        try:
            is_told = self._told(lambda again: self._teller.tell(judged, is_again=is_again or again))
        except Exception as error:
            # One of them is the cause, and must not take the others with it.
            if len(judged) > 1:
                return [told for one in judged for told in self._tell_broker([one], is_again=True)]
            is_told, judged = self._bury_instead(judged[0][0], error)
        return [(held, verdict if is_told and not held.is_lost else Lost()) for held, verdict in judged]

    def _bury_instead(self, held: HeldJob, error: Exception) -> tuple[bool, Judged]:
        _log.error(
            "queue %s: the end of job %s cannot be told: %s", self.name, held.id, error, exc_info=error
        )
        verdict = Bury(f"its end cannot be told: {error}", failure_of(error))
        try:
            return self._told(lambda again: self._teller.bury(held, verdict, is_again=again)), [
                (held, verdict)
            ]
        except Exception:
            _log.exception("queue %s: nor can job %s be buried; its lease runs out", self.name, held.id)
            return False, [(held, verdict)]

    def _told(self, tell: Callable[[bool], object]) -> bool:
        """Tell the broker something, again and again while it is out of reach; False when we end before that.

        Args:
            tell: Is called with whether an earlier call may have been carried out.
        """
        pause, is_again = _FIRST_PAUSE, False
        while True:
            try:
                tell(is_again)
                return True
            except BrokerUnavailable as error:
                if self._is_over.is_set():
                    _log.warning("queue %s: %s; what ended is not told, and runs again", self.name, error)
                    return False
                pause, is_again = self._hold_on(error, pause, self._is_over), True

    def _forsake(self, jobs: Sequence[HeldJob]) -> None:
        """Let go of what is still held of these jobs without a word to the broker: their leases run out."""
        lost = [held for held in jobs if self._holdings.find(held.id) is held]
        if lost:
            _log.warning("queue %s: %d jobs run again after their leases", self.name, len(lost))
        for held in lost:
            self._teller.report(held, Lost())
        self._holdings.drop(lost)


def _around(
    middleware: Middleware, name: str, forward: Callable[[int], list[HeldJob]]
) -> Callable[[int], list[HeldJob]]:
    return lambda n: middleware.dequeue(name, n, forward)


def _checked(jobs: Iterable[HeldJob], fresh: Mapping[HeldJob, None]) -> list[HeldJob]:
    """Return what middlewares have chosen of what was claimed; each once."""
    chosen = [held for held in dict.fromkeys(jobs) if held in fresh]
    for held in chosen:
        if held.verdict is not None:
            _verdict(held.verdict)
    return chosen


def _verdict(value: Verdict) -> Verdict:
    if not isinstance(value, Verdict):
        raise ConfigTypeError(f"a verdict must be one of those of bulkhead.service.verdicts, not {value!r}")
    return value


def _final(held: HeldJob, verdict: Verdict) -> Verdict:
    if held.is_lost:
        return Lost()
    return Cancel() if held.is_cancelled and isinstance(verdict, (TryAgain, GiveBack)) else verdict


def _burial(app: App, claim: Claim, error: Exception) -> Errand:
    """Return the errand that makes a dead letter of what cannot be read."""
    _log.error("queue %s: job %s becomes a dead letter: %s", claim.queue, claim.id, error)
    burial = Burial(claim.hold, str(error), failure_of(error))
    return lambda: app.backend.broker.bury([burial])
