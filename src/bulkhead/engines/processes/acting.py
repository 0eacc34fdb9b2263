"""The kernel decides, this acts: carries its instructions out, and lets it know what has happened meanwhile.

One turn of whoever drives: what has come through the pipes is read and unpickled without the lock, because the users'
code that runs there may take long and may call us. Then, under the lock, the kernel is told of it and of what is due,
and what it decides is done.

What can end this: `ruin`. Should an exception come out of the middle of a change (of a signal handler of the user's,
for want of memory, by a bug), the kernel's state cannot be trusted. Then the pool is given up loudly: every job that
has not settled fails with PoolBroken, every process is killed, nobody waits for ever.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from bulkhead._kernel.records import JobRecord, Slot
from bulkhead._kernel.scheduler import (
    AcceptOffer,
    EndWorker,
    RefuseOffer,
    Scheduler,
    SendAhead,
    SendHome,
    SettleJob,
    StartJob,
    StartWorker,
)
from bulkhead.chunk import Chunk
from bulkhead.config import Pool
from bulkhead.engines.base import Ledger
from bulkhead.engines.processes import chunks
from bulkhead.engines.processes.answers import Answer, tell
from bulkhead.engines.processes.chronicle import Chronicle
from bulkhead.engines.processes.driving import Driving, Errand, reentered
from bulkhead.engines.processes.heritage import Heritage
from bulkhead.engines.processes.memory_watch import MemoryWatch
from bulkhead.engines.processes.output import PoolOutput
from bulkhead.engines.processes.payload import cannot
from bulkhead.engines.processes.reading import News, read_worker
from bulkhead.engines.processes.segments import Borrowed, SegmentPool
from bulkhead.engines.processes.settling import Settling, fire_waiters
from bulkhead.engines.processes.staff import Staff
from bulkhead.engines.processes.tidying import Tidying
from bulkhead.engines.processes.worker import Worker
from bulkhead.engines.processes.worker_main import Kind
from bulkhead.errors import PoolBroken
from bulkhead.validate import shown

__all__ = ["Acting"]

# How often deadlines are looked at while one answer follows the other (seconds).
_TICK = 0.001

# An answer that came within this time (seconds) after its job lets expect the next one soon (arbitrary).
_SOON = 100e-6

# How often it is tried to give a pool up while exceptions strike, out of a signal handler that raises again and again.
_RUIN_TRIES = 20

# Why: a class's attribute is looked up at each use, on the way of every job.
_JOB = Kind.JOB


class Acting:
    """What one pool does, with the staff that does it and the driver's role. Makes the first launcher.

    Every change of the kernel's state happens under `driving.lock` and inside `guard`, and ends with `carry_out`.

    Args:
        config: The pool.
        scheduler: Its kernel.
        setup: What its workers are told first.
        heritage: The descriptors that go with it.
        ledger: Says when it wants to be swept.
        settling: Tells who waits for the jobs that settle.
        segments: Where the large parts of jobs wait for their worker.
        chronicle: Remembers attempts and workers.

    Attributes:
        driving: The driver's role, which makes the turns.
        staff: The workers.
        guard: Goes around each change.
        output: What the workers print and log; None when that is not wanted here.
    """

    def __init__(
        self,
        config: Pool,
        scheduler: Scheduler,
        *,
        setup: bytes,
        heritage: Heritage,
        ledger: Ledger,
        settling: Settling,
        segments: SegmentPool,
        chronicle: Chronicle,
    ) -> None:
        self._label = config.label
        self._scheduler = scheduler
        self._ledger = ledger
        self._settling = settling
        self._segments = segments
        self._borrowed = Borrowed()  # what workers have sent of their own
        self.driving = Driving(
            f"bulkhead-{config.label}", self._work, self._next_deadline, self._is_answer_near
        )
        self.output = PoolOutput.wanted_by(config, self.driving)
        # Owner of the rest: the lock.
        self.guard = _Guard(self.ruin)
        self._ruin: PoolBroken | None = None
        self._is_given_up = False
        self._tick_at = 0.0  # when to look at deadlines again
        self._last_took = 0.0  # from the last answered job to its answer, seconds
        self._dropped: deque[Chunk] = deque()  # whose consumer is gone. Why a deque: see `drop`
        self.staff = Staff(
            config,
            setup,
            heritage,
            self.driving,
            scheduler=scheduler,
            carry_out=self.carry_out,
            borrowed=self._borrowed,
            output=self.output,
            chronicle=chronicle,
        )
        self._tidying = Tidying(segments, self._borrowed, self.staff)
        limit = config.hard_memory_limit
        self._memory = None if limit is None else MemoryWatch(limit, scheduler, self.staff)

    # Carrying out

    def carry_out(self, now: float) -> None:
        """Do what the kernel has decided. Under the lock."""
        instructions = self._scheduler.instructions
        if not instructions:
            return
        for instruction in instructions:
            kind = type(instruction)
            if kind is StartJob:
                self._start_job(instruction.slot.worker, instruction.job, now)  # type: ignore[union-attr]
            elif kind is SettleJob:
                self._settling.settle(instruction.job, instruction.phase_is_over)  # type: ignore[union-attr]
            elif kind is AcceptOffer or kind is RefuseOffer:
                fire_waiters(instruction.job)  # type: ignore[union-attr]
            elif kind is StartWorker:
                self.staff.start(instruction.slot)  # type: ignore[union-attr]
            elif kind is SendAhead:
                self._send_ahead(instruction.slot, instruction.job)  # type: ignore[union-attr]
            elif kind is EndWorker:
                self.staff.end(instruction.slot.worker, now)  # type: ignore[union-attr]
            elif kind is SendHome:
                self.staff.send_home(instruction.slot.worker, now)  # type: ignore[union-attr]
        instructions.clear()

    def abandon(self, abandoned: Iterable[Chunk], now: float) -> None:
        """See to it that no more items of these chunks begin. Under the lock."""
        for chunk in abandoned:
            chunks.abandon(chunk, self._scheduler, now)
        self.carry_out(now)

    def drop(self, dropped: Iterable[Chunk]) -> None:
        """As `abandon`, soon. Safe inside the garbage collector, which may run under any lock."""
        self._dropped.extend(dropped)
        self.driving.wake()

    def _start_job(self, worker: Worker, job: JobRecord, now: float) -> None:
        worker.message += 1
        worker.began = now
        job.started_at = time.time()
        job.pid = worker.pid
        if type(job.payload) is not bytes or worker.let_go:
            self._start_noted(worker, job, now)
        elif not worker.writer.write(_JOB, worker.message, job.payload):
            self.staff.block(worker)
        if job.timeout is not None:
            self._scheduler.arm_timeout(job, now)
            self.driving.hurry(now + job.timeout)
        if self._memory is not None:
            self.driving.hurry(self._memory.begin(now))

    def _send_ahead(self, slot: Slot, job: JobRecord) -> None:
        """Send a chunk to a worker that is still busy with another one."""
        if slot.ahead is not job:
            return  # it has been started since, or is in line again
        worker: Worker = slot.worker
        assert isinstance(job, Chunk)
        if not worker.may_have_ahead():
            return  # it waits here, and starts when the worker has answered
        number = worker.next_ahead()
        slot.is_ahead_sent = True
        order = chunks.order(job, 1 - worker.half, is_ahead=True)
        body = worker.exchange.wrap(job.payload, number, tuple(order))
        if not worker.writer.write(Kind.NOTED, number, body):
            self.staff.block(worker)

    def _start_noted(self, worker: Worker, job: JobRecord, now: float) -> None:
        # Why a tuple: a class of ours is looked up on both sides, each time.
        order = tuple(chunks.order(job, worker.half)) if isinstance(job, Chunk) else None
        try:
            body = worker.exchange.wrap(job.payload, worker.message, order)
        except OSError as error:
            failure: BaseException | None = cannot("the job's data could not be sent in shared memory", error)
            if isinstance(job, Chunk):
                failure = chunks.ended(job, failure)
            self._scheduler.attempt_ended(worker.slot, failure, now)
            return
        if not worker.writer.write(Kind.NOTED, worker.message, body):
            self.staff.block(worker)

    # Driving: what happens at each step

    def _next_deadline(self) -> float | None:
        deadline = self._scheduler.next_deadline
        sweep = self._ledger.next_sweep()
        if sweep is not None and (deadline is None or sweep < deadline):
            deadline = sweep
        if self.staff.overdue:
            overdue = self.staff.next_push()
            deadline = overdue if deadline is None else min(deadline, overdue)
        if self.output is not None:
            patience = self.output.next_deadline()
            if patience is not None and (deadline is None or patience < deadline):
                deadline = patience
        if self._segments.is_used or self._borrowed.is_used:
            tidying = self._tidying.plan()
            if tidying is not None and (deadline is None or tidying < deadline):
                deadline = tidying
        if self._memory is not None:
            look = self._memory.plan()
            if look is not None and (deadline is None or look < deadline):
                deadline = look
        # Whoever polls until then finds that something is due.
        self._tick_at = 0.0
        return deadline

    def _is_answer_near(self) -> bool:
        return self._last_took < _SOON and self._scheduler.running > 0

    def _work(self, events: list[tuple[int, int]], polled_at: float, errand: Errand | None) -> None:
        """Do what the polled events ask for, the errand, and what was due at `polled_at`."""
        driving, staff = self.driving, self.staff
        try:
            news: list[News] = []
            answers: list[Answer] = []
            for fd, _ in events:
                worker = staff.by_result_pipe.get(fd)
                if worker is not None:
                    read_worker(worker, answers, news)
                elif driving.is_alarm(fd):
                    driving.silence()
                elif self.output is None or not self.output.read(fd):
                    staff.read(fd, answers, news)
            if self.output is not None:
                self.output.collect(answers, news, staff.workers)
            with driving.lock:
                if self._ruin is None:
                    guard = self.guard
                    guard.is_active = True
                    try:
                        self._digest(answers, news, polled_at, errand)
                    except BaseException as error:
                        self.ruin(error)
                        raise
                    finally:
                        guard.is_active = False
        except BaseException as error:
            with driving.lock:
                self.ruin(error)
            raise

    def _digest(
        self, answers: list[Answer], news: list[News], polled_at: float, errand: Errand | None
    ) -> None:
        """Tell the kernel what was read, and do what it decides. Under the lock."""
        now = time.monotonic()
        if self.output is not None:
            answers, news = self.output.due(answers, news, self.staff.workers, self.staff.overdue)
        scheduler = self._scheduler
        for worker, kind, number, size, value, error in answers:
            self._last_took = now - worker.began
            tell(scheduler, worker, kind, number, size, value, error, now)
        if errand is not None:
            errand(now)
        self.carry_out(now)
        for one in news:
            self.staff.hear(one, now)
            # Race: what the kernel has decided about a worker must be done before the next news of it.
            self.carry_out(now)
        while self._dropped:
            self.abandon([self._dropped.popleft()], now)
        if polled_at >= self._tick_at:
            # Why not now: unpickling may have taken long, and an answer that came meanwhile is not read yet.
            self._tick(polled_at)
            self.carry_out(now)
            self._tick_at = polled_at + _TICK

    def _tick(self, now: float) -> None:
        deadline = self._scheduler.next_deadline
        if deadline is not None and deadline <= now:
            self._scheduler.tick(now)
        sweep = self._ledger.next_sweep()
        if sweep is not None and sweep <= now:
            self._ledger.sweep()
        if self._tidying.due is not None and self._tidying.due <= now:
            self._tidying.tidy(now)
        if self._memory is not None and self._memory.due is not None and self._memory.due <= now:
            self._memory.look(now)
        if self.staff.overdue:
            self.staff.push_overdue(now)

    # Ruin

    def ruin(self, error: BaseException) -> None:
        """Give everything up after `error` came out of the middle of a change. Under the lock; does no harm twice."""
        if self._is_given_up:
            return
        if self._ruin is None:
            self._ruin = PoolBroken(
                f"{self._label} was hit by {shown(error)} in the middle of a change and is given up"
            )
            self._ruin.__cause__ = error
            self.staff.give_up()
        for tries_left in reversed(range(_RUIN_TRIES)):
            try:
                self._settling.fail_rest(self._ruin)
                break
            except BaseException:  # Race: a second one has struck, and the first is the caller's already
                if not tries_left:
                    raise
        self._is_given_up = True
        self.driving.wake()


class _Guard:
    """Around a change of the kernel's state, inside the lock: an exception that comes out of it ruins the pool.

    Why not the lock as well: a Ctrl-C between its acquisition in `__enter__` and the block would leave it locked.
    """

    def __init__(self, ruin: Callable[[BaseException], None]) -> None:
        self.is_active = False
        self._ruin = ruin

    def __enter__(self) -> None:
        if self.is_active:
            raise reentered()
        self.is_active = True

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None:
                self._ruin(error)
        finally:
            self.is_active = False
