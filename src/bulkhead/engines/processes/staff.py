"""The staff of one pool: its workers, and the launcher that starts, ends and reaps them.

Here it is known which workers there are, which pipe is whose, who should be gone by when, and what follows when a
launcher dies. Workers are started and ended because the kernel has decided so; the kernel is told here what becomes of
them, but for their answers (see `answers.tell`). What a worker runs is not this module's business.

Invariant: every worker leaves by `_forget`, once, and the kernel hears of its end just after that, unless the pool is
given up or closed, the worker was sent home, or a new launcher is asked for it again.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable
from enum import Enum

from bulkhead._kernel.lifecycle import JobState
from bulkhead._kernel.records import Loss, Slot, SlotState, Verdict
from bulkhead._kernel.scheduler import Scheduler
from bulkhead.config import Pool
from bulkhead.engines.processes import deaths
from bulkhead.engines.processes.answers import Answer, recorded, tell
from bulkhead.engines.processes.chronicle import Chronicle
from bulkhead.engines.processes.driving import Driving, Waiter, fire
from bulkhead.engines.processes.heritage import Heritage
from bulkhead.engines.processes.launcher import Report, Says, Unsuitable
from bulkhead.engines.processes.launcher_link import LauncherLink
from bulkhead.engines.processes.output import PoolOutput
from bulkhead.engines.processes.poller import READABLE, WRITABLE
from bulkhead.engines.processes.reading import (
    Garbled,
    HungUp,
    LauncherLost,
    News,
    Said,
    Writable,
    read_launcher,
    read_worker,
)
from bulkhead.engines.processes.segments import Borrowed
from bulkhead.engines.processes.use import mib
from bulkhead.engines.processes.worker import Worker
from bulkhead.engines.processes.worker_main import Initializer, Kind
from bulkhead.errors import MissingMainGuard, PoolBroken, RemoteError

__all__ = ["Staff"]

# Seconds between SIGTERM and SIGKILL for a job that is timed out or cancelled.
_GRACE = 1.0

# The same for a job that takes too much memory. Why so short: it goes on taking more.
_HASTE = 0.001

# Seconds that a worker has to leave when it is sent home while the pool goes on; it may have exit handlers to run.
_LEAVE = 5.0

# Seconds that the launcher may take to report a worker that should be gone, before more is done about it.
_REPORT = 1.0

# Launchers that end before they are ready, in a row, after which the pool is broken (arbitrary). More when somebody
# outside kills them.
_MAX_LAUNCHERS = 3
_MAX_KILLED_LAUNCHERS = 50

_log = logging.getLogger("bulkhead")


class _Push(Enum):
    """What is done about a worker that should be gone, one after the other."""

    END = 1  # tell the launcher
    CUT = 2  # cut its life line
    LAUNCHER = 3  # kill the launcher, which cannot be well


class Staff:
    """The workers of one pool and their launcher, which is started at once.

    Owner: the pool's lock, but for `read` and `wait_until_gone`. Others look at the attributes and change none.

    Args:
        config: The pool.
        setup: What workers are told first.
        heritage: The descriptors that go with it.
        driving: Whose poller watches the pipes.
        scheduler: The kernel, which is told of workers that are gone and when the pool has to be given up.
        carry_out: Does what the kernel has decided, as of an instant. For the one piece of news, the end of a launcher,
            on which the kernel is told more than one thing that depend on each other.
        borrowed: Where it is noted what the workers have lent.
        output: Where what they print goes; None when that is not captured.
        chronicle: Where it is noted what became of them.

    Attributes:
        workers: By number, from the moment they are asked for until they are forgotten.
        by_result_pipe: Those that are listened to, by descriptor.
        overdue: Workers that should be gone by an instant (monotonic seconds), and what is done about them then.
        busy_seconds: Of workers that are gone.
    """

    def __init__(
        self,
        config: Pool,
        setup: bytes,
        heritage: Heritage,
        driving: Driving,
        *,
        scheduler: Scheduler,
        carry_out: Callable[[float], None],
        borrowed: Borrowed,
        output: PoolOutput | None,
        chronicle: Chronicle,
    ) -> None:
        self._label = config.label
        self._method = config.start_method or "forkserver"
        self._inherited: Initializer | None = (
            (config.initializer, config.initargs, {}) if config.initializer else None
        )
        self._is_preloading = True
        self._preload: Iterable[str] = config.preload
        self._setup = setup
        self._heritage = heritage
        self._driving = driving
        self._scheduler = scheduler
        self._carry_out = carry_out
        self._borrowed = borrowed
        self._output = output
        self._chronicle = chronicle
        self.workers: dict[int, Worker] = {}
        self.by_result_pipe: dict[int, Worker] = {}
        self._blocked: dict[int, Worker] = {}  # by descriptor of the job pipe, while it takes no more
        self.overdue: dict[Worker, tuple[float, _Push]] = {}
        self.busy_seconds = 0.0
        self._deserted: list[Waiter] = []  # who waits until no worker is left
        self._workers_made = 0
        self._has_warned = False
        self._launchers_lost = 0
        self._is_dismissed = False
        self._link = self._launch()

    # What the pool wants done

    def start(self, slot: Slot) -> None:
        """Start a worker for a vacant slot."""
        if self._link.fd < 0:
            # The launcher is lost and not replaced; the pool is broken or ends.
            slot.state = SlotState.VACANT
            return
        self._workers_made += 1
        try:
            worker = Worker(self._workers_made, slot, self._borrowed)
            if self._output is not None:
                self._output.attach(worker)
            worker.exchange.hand_down(self._heritage.fds)
        except OSError as error:  # no descriptors left, most likely; the next try may find some
            _log.warning("%s: a worker cannot be started: %s", self._label, error)
            failure = PoolBroken(f"{self._label} is given up, its workers cannot be started: {error}")
            failure.__cause__ = error
            self._scheduler.worker_gone(slot, failure, time.monotonic())
            return
        slot.worker = worker
        self.workers[worker.number] = worker
        self._chronicle.asked(worker, time.monotonic())
        names = () if worker.output is None else worker.output.names
        self._link.start(worker.number, worker.give_away(), names)
        worker.close_theirs()
        self.by_result_pipe[worker.reader.fd] = worker
        self._driving.poller.register(worker.reader.fd, READABLE)
        if not worker.writer.write(Kind.SETUP, 0, self._setup):
            self.block(worker)

    def block(self, worker: Worker) -> None:
        """See to it that the rest of a message is sent when the pipe takes more."""
        fd = worker.writer.fd
        if fd not in self._blocked:
            self._blocked[fd] = worker
            self._driving.poller.register(fd, WRITABLE)
            self._driving.wake()

    def end(self, worker: Worker, now: float) -> None:
        """End a worker with all it has started; it is reported gone when it is."""
        self._push(worker, _Push.END, now)

    def send_home(self, worker: Worker, now: float) -> None:
        """Let a worker that has answered leave by itself; its slot gets another one."""
        self._warn_if_at_once(worker)
        worker.leave_slot()
        self._unblock(worker)
        worker.writer.close()
        self.overdue[worker] = now + _LEAVE, _Push.END

    def _warn_if_at_once(self, worker: Worker) -> None:
        """Say, once, when a single job is too much: then each job pays for a new worker."""
        usage, wear = worker.usage(), self._scheduler.wear
        limit = None if wear is None else wear.max_rss_bytes
        if self._has_warned or limit is None or usage.jobs > 1 or usage.rss_bytes <= limit:
            return
        self._has_warned = True
        text = (
            "%s: a worker took %s after its first job, more than the limit of %s, and is replaced; "
            "if most jobs do, raise the limit"
        )
        _log.warning(text, self._label, mib(usage.rss_bytes), mib(limit))

    def push_overdue(self, now: float) -> None:
        """Do more about the workers that should have been reported gone by now."""
        for worker, (instant, push) in list(self.overdue.items()):
            if now >= instant:
                self._push(worker, push, now)

    def next_push(self) -> float:
        """Return when `push_overdue` should be called next, in monotonic seconds; there are overdue workers."""
        return min(instant for instant, _ in self.overdue.values())

    def dismiss(self) -> None:
        """Send the workers home, with no replacement: idle ones leave by themselves, the others are ended."""
        self._is_dismissed = True
        for worker in self.workers.values():
            if worker.slot.state is SlotState.IDLE:
                worker.writer.close()
            elif not worker.is_leaving:
                self._link.end(worker.number, 0.0)

    def end_all(self) -> None:
        """End every worker, without grace."""
        for worker in self.workers.values():
            self._link.end(worker.number, 0.0)

    def cut_all(self) -> None:
        """Cut every life line: the kernel kills what is left."""
        for worker in self.workers.values():
            worker.cut()

    def give_up(self) -> None:
        """Have every worker killed and hear no more of them. The kernel is told nothing."""
        self._forget_all()
        self._stop_hearing()

    def close(self, patience: float) -> None:
        """Forget every worker and end the launcher, which is killed if it does not leave within `patience` seconds."""
        self._forget_all()
        self._link.close(patience)
        self._inherited = None

    def wait_until_gone(self, patience: float) -> None:
        """Wait until no worker is left, `patience` seconds at most. Without the lock."""
        waiter = Waiter()
        with self._driving.lock:
            if not self.workers:
                return
            self._deserted.append(waiter)
        self._driving.wait(waiter, time.monotonic() + patience)

    def close_copy(self) -> None:
        """Close the descriptors in a forked copy of the caller, and touch nobody."""
        for worker in self.workers.values():
            worker.close()
        self._link.abandon()

    # What comes from workers and launcher

    def read(self, fd: int, answers: list[Answer], news: list[News]) -> None:
        """Read from a descriptor that is no result pipe. Without the lock, by who drives."""
        if fd == self._link.fd:
            read_launcher(self._link, self.workers, answers, news)
        elif fd in self._blocked:
            news.append(Writable(fd))

    def hear(self, news: News, now: float) -> None:
        """Deal with a piece of news, and tell the kernel; who calls carries out what that decides."""
        match news:
            case Said(Says.STARTED, number, pid):
                self._started(number, pid)
            case Said(Says.GONE, number, report):
                self._gone(number, report, now)
            case Said(Says.READY):
                self._launchers_lost = 0
                self._link.is_ready = True
            case Said(Says.UNSUITABLE, _, why):
                self._launcher_unsuitable(why)
            case LauncherLost(link):
                self._launcher_lost(link, now)
            case Garbled(worker, why):
                self._garbled(worker, why)
            case HungUp(worker):
                self._hung_up(worker, now)
            case Writable(fd):
                self._resume(fd)

    def _started(self, number: int, pid: int) -> None:
        worker = self.workers.get(number)
        if worker is not None:
            worker.pid = pid
            if self._output is not None:
                self._output.listen(worker)

    def _gone(self, number: int, report: Report, now: float) -> None:
        worker = self.workers.get(number)
        if worker is None:
            return
        if worker.is_leaving:
            self._forget(worker)
            return
        slot = worker.slot
        job, verdict = slot.job, slot.verdict
        due = None if job is None else job.due
        self._chronicle.close(worker, worker.jobs, worker.busy_seconds)
        if job is not None:
            worker.busy_seconds += now - worker.began
        loss, error = deaths.meaning(worker, report, self._label)
        self._chronicle.gone(worker, verdict, None if self._is_dismissed else error, now)
        self._forget(worker)
        was_killed = report.signal == signal.SIGKILL and worker.failure is None
        self._scheduler.worker_gone(slot, error, now, loss=loss, was_killed=was_killed)
        if job is not None and not (loss is Loss.UNREAD and job.state is JobState.QUEUED):
            self._chronicle.lost(worker, job, due, error, now)
        if isinstance(error.__cause__, MissingMainGuard):
            self._scheduler.break_down(error)

    def _garbled(self, worker: Worker, why: str) -> None:
        worker.failure = RemoteError(f"the worker's answer cannot be read: {why}")
        self._stop_reading(worker)
        self._link.end(worker.number, 0.0)

    def _hung_up(self, worker: Worker, now: float) -> None:
        self._stop_reading(worker)
        if worker.number in self.workers:
            self.overdue.setdefault(worker, (now + _REPORT, _Push.END))

    def _resume(self, fd: int) -> None:
        worker = self._blocked.get(fd)
        if worker is not None and worker.writer.resume():
            self._unblock(worker)

    # Workers that should be gone, and that are

    def _push(self, worker: Worker, push: _Push, now: float) -> None:
        """Do more about a worker that should have been reported gone: the launcher may be stopped or stuck."""
        if push is _Push.END:
            grace = _HASTE if worker.slot.verdict is Verdict.MEMORY else _GRACE
            self._link.end(worker.number, grace)
            self.overdue[worker] = now + grace + _REPORT, _Push.CUT
        elif push is _Push.CUT:
            worker.cut()
            self.overdue[worker] = now + _REPORT, _Push.LAUNCHER
        else:
            del self.overdue[worker]
            self._link.kill()

    def _forget_all(self) -> None:
        for worker in list(self.workers.values()):
            self._forget(worker)  # closes the life line, so the kernel kills it
        fire(self._deserted)

    def _forget(self, worker: Worker) -> None:
        del self.workers[worker.number]
        self._stop_reading(worker)
        self._unblock(worker)
        if self._output is not None:
            self._output.forget(worker)
        self.overdue.pop(worker, None)
        self.busy_seconds += worker.busy_seconds
        self._chronicle.gone(worker, None, None, time.monotonic())
        if worker.slot.worker is worker:
            worker.slot.worker = None
        worker.close()
        if not self.workers:
            fire(self._deserted)

    def _stop_reading(self, worker: Worker) -> None:
        if self.by_result_pipe.pop(worker.reader.fd, None) is not None:
            self._driving.poller.unregister(worker.reader.fd)

    def _unblock(self, worker: Worker) -> None:
        if self._blocked.pop(worker.writer.fd, None) is not None:
            self._driving.poller.unregister(worker.writer.fd)

    # The launcher

    def _launch(self) -> LauncherLink:
        link = LauncherLink(
            self._method,
            is_preloading=self._is_preloading,
            preload=tuple(self._preload),
            inherited=self._inherited,
        )
        self._driving.poller.register(link.fd, READABLE)
        return link

    def _stop_hearing(self) -> None:
        if self._link.fd >= 0:
            self._driving.poller.unregister(self._link.fd)

    def _launcher_unsuitable(self, why: Unsuitable) -> None:
        if why.lacks_guard:
            cause = MissingMainGuard(why.text)
            error = PoolBroken(f"{self._label} cannot start workers: {why.text}")
            error.__cause__ = cause
            self._scheduler.break_down(error)
        if why.is_of_main:
            self._is_preloading = False
        else:
            _log.warning(
                "%s: its workers have to import the modules of preload themselves: %s", self._label, why.text
            )
            self._preload = ()
        self._relaunch()

    def _launcher_lost(self, link: LauncherLink, now: float) -> None:
        """The launcher has died. Its workers go with it: nobody could reap or end them any more."""
        if link is not self._link:
            return
        self._launchers_lost += 1
        if not self._link.is_ready:  # an import may have ended it
            self._is_preloading, self._preload = False, ()
        was_staffed = [w for w in self.workers.values() if w.pid is not None]
        for worker in was_staffed:
            worker.cut()
        for worker in was_staffed:
            self._mourn(worker, now)
        limit = _MAX_KILLED_LAUNCHERS if self._link.was_killed() else _MAX_LAUNCHERS
        if self._method == "fork" or self._launchers_lost >= limit:
            self._scheduler.break_down(
                PoolBroken(f"{self._label} is given up: its launcher process {link.pid} ended")
            )
        self._relaunch()

    def _mourn(self, worker: Worker, now: float) -> None:
        """See the end of a worker whose life line was cut, and count what it answered before."""
        end = now + _REPORT
        answers: list[Answer] = []
        while not worker.reader.is_at_end and time.monotonic() < end:
            read_worker(worker, answers, [])
            time.sleep(0.001)
        if self._output is not None:
            answers = self._output.last_answers(worker, _REPORT) + answers
        answers += recorded(worker)
        sent = worker.message
        for answer in answers:
            tell(self._scheduler, *answer, now)
        self._carry_out(now)
        # A job that went to it just now was never read; of one that it had before nothing is known.
        # What was sent ahead it may have begun by itself.
        last_read = sent if worker.message == sent else worker.last_read
        report = deaths.UNKNOWN._replace(last_read=last_read, signal=signal.SIGKILL)
        self._gone(worker.number, report, now)

    def _relaunch(self) -> None:
        """Replace the launcher and ask the new one for the workers that the old one had not started."""
        self._stop_hearing()
        self._link.close(0.2)
        unborn = list(self.workers.values())
        for worker in unborn:
            self._forget(worker)
        if self._scheduler.broken is not None or self._is_dismissed:
            for worker in unborn:
                self._scheduler.worker_gone(worker.slot, PoolBroken("not started"), time.monotonic())
            return
        self._link = self._launch()
        for worker in unborn:
            self.start(worker.slot)
