"""A worker's main process: it claims jobs, has them run in the dispatcher's pools, and tells the broker.

    broker ── claim ──▶ QueueConsumer (one a queue) ── batches ──▶ pool of that queue (dispatcher.py)
       ▲                     │ fetch thread                              │ done callback
       └── ack, nack, bury ──┴ settle thread ◀───────────────────────────┘
    pulse thread: renews the leases of all that is held, looks after batches, lets the middlewares know
    link thread:  answers the jobs' own questions (link.py)
    timer thread: enqueues what schedules are due (schedules.py)

Guarantees: what is claimed is acked after the work and its outcome are done, or given back, or its lease runs out; a
job whose lease is lost here is ended here. Each queue has threads and a pool of its own and starves no other. A thread
that cannot go on, or a pool that gives up, ends the whole consumer with its error: it never stays as one that looks
alive and does nothing.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from bulkhead.backends.base import OutcomeState
from bulkhead.dispatcher import Dispatcher
from bulkhead.errors import BrokerUnavailable, BulkheadError, ConfigError
from bulkhead.service.batch import SLOTS, HeldJob, Marks, marks_path
from bulkhead.service.leases import Leases
from bulkhead.service.link import Link
from bulkhead.service.queue_consumer import QueueConsumer
from bulkhead.service.schedules import Timer
from bulkhead.service.status import progress_key
from bulkhead.service.telling import guarded, outcome_of

if TYPE_CHECKING:
    from bulkhead.service.app import App

__all__ = ["Consumer"]

_log = logging.getLogger("bulkhead")

# Between two renewals (seconds), at most; they come three times as often as leases would run out.
_PULSE = 1.0

# Between two looks at batches (seconds), at most.
_BATCH_PULSE = 0.1

# A thread that waits for orders looks up so often (seconds).
_LOOK_UP = 0.5

# When the grace is over, the broker has so long to learn what is given back (seconds).
_LAST_WORDS = 5.0


class Consumer:
    """Runs the jobs of some queues. One use: `run` or `run_once`.

    Args:
        app: The application.
        queues: Their names.
        n_workers: Instead of the queues' own concurrency.
    """

    def __init__(self, app: App, queues: Sequence[str], n_workers: int | None = None) -> None:
        self._app = app
        _check_tasks(app, queues)
        self._pools = app.catalog.pools(queues, n_workers)
        self._queues = queues
        # Why a queue and no event: a signal handler may put something in while this thread is anywhere.
        self._orders: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._has_failed = threading.Event()
        self._has_ended = threading.Event()
        self._leases = Leases(app)
        self._consumers: list[QueueConsumer] = []

    def run(self, *, grace: float) -> None:
        """Work until a signal or `stop`; then end within about `grace` seconds.

        Raises:
            BulkheadError: What has made it impossible to go on.
        """
        with _signals_handled(self.stop), self._working(), self._timing():
            for one in self._consumers:
                one.start()
            self._error = self._wait_for_order()
            self._leave(grace)
        if self._error is not None:
            raise self._error

    def _wait_for_order(self) -> BaseException | None:
        # Race: the system may give a signal to another thread (it does to a process that was just continued), which
        # wakes nobody; its handler runs when this thread does something next.
        while True:
            with contextlib.suppress(queue.Empty):
                return self._orders.get(timeout=_LOOK_UP)

    def run_once(self) -> HeldJob | None:
        """Run one job, if one is due; return it."""
        with self._working():
            (consumer,) = self._consumers
            consumer.start(is_fetching=False)
            try:
                held = consumer.take_one()
                while not consumer.wait_idle(0.5):
                    self._raise_failure()
                self._raise_failure()
            except BaseException:
                self._leave(0.0)
                raise
        return held

    def stop(self) -> None:
        """Let `run` end, as at a signal: once in good order, twice at once. Also before it has begun."""
        self._orders.put(None)

    def _fail(self, error: BaseException) -> None:
        # Why once: an order that comes while we leave means to hurry, and the other queues' jobs have their grace.
        if not self._has_failed.is_set():
            self._has_failed.set()
            self._orders.put(error)

    def _raise_failure(self) -> None:
        with contextlib.suppress(queue.Empty):
            error = self._orders.get_nowait()
            if error is not None:
                raise error

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        app = self._app
        app.backend  # noqa: B018 - a server that cannot be reached is told before anything starts
        with contextlib.ExitStack() as stack:
            link = Link(self, self._thread)
            stack.callback(link.close)
            marks = Marks(marks_path(link.address), create=True)
            stack.callback(marks.close)
            for middleware in app.middlewares:
                middleware.started(list(self._queues))
                stack.callback(guarded, middleware.stopped)
            dispatcher = Dispatcher(self._pools, max_history=0, max_timeline=0)
            stack.callback(self._end, dispatcher)
            free_slots = deque(range(SLOTS))
            for pool in self._pools:
                self._consumers.append(
                    QueueConsumer(
                        app,
                        pool.name or "",
                        dispatcher=dispatcher,
                        priority=pool.priority,
                        n_workers=pool.n_workers,
                        address=link.address,
                        marks=marks,
                        free_slots=free_slots,
                        leases=self._leases,
                        thread=self._thread,
                        fail=self._fail,
                    )
                )
            self._pulse_thread = self._thread("pulse", self._pulse)
            self._pulse_thread.start()
            yield

    @contextlib.contextmanager
    def _timing(self) -> Iterator[None]:
        """Keep the declared schedules, and enqueue what is due meanwhile."""
        self._app.put_schedules()
        timer = Timer(self._app, self._thread)
        timer.start()
        try:
            yield
        finally:
            timer.end()

    def _leave(self, grace: float) -> None:
        _log.info("stopping: jobs that run have %g s to end", grace)
        for one in self._consumers:
            one.begin_to_leave()
        self._wait_idle(grace)
        for one in self._consumers:
            one.give_all_back()
        self._wait_idle(_LAST_WORDS, is_hurried=True)
        n_left = sum(one.n_held for one in self._consumers)
        if n_left:
            _log.warning("%d jobs could not be given back; they run again after their leases", n_left)

    def _wait_idle(self, seconds: float, *, is_hurried: bool = False) -> None:
        """Wait for the queues to hold nothing, or for another order."""
        deadline = time.monotonic() + seconds
        while any(one.is_busy for one in self._consumers) and time.monotonic() < deadline:
            if is_hurried:
                time.sleep(0.01)
                continue
            with contextlib.suppress(queue.Empty):
                self._error = self._orders.get(timeout=0.02) or self._error
                return

    def _end(self, dispatcher: Dispatcher) -> None:
        for one in self._consumers:
            one.end()
        self._has_ended.set()
        if hasattr(self, "_pulse_thread"):
            self._pulse_thread.join()
        dispatcher.finalize(cancel=True)

    def _thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """Return a thread whose end by an exception is ours."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                _log.critical("the thread %r cannot go on; the worker ends", name, exc_info=True)
                self._fail(error)

        # The prefix tells pools that it is none of the user's.
        return threading.Thread(target=run, name=f"bulkhead-{name}", daemon=True)

    # The pulse thread

    def _pulse(self) -> None:
        interval = min(self._app.lease / 3, _PULSE)
        next_beat = time.monotonic() + interval
        while not self._has_ended.wait(min(_BATCH_PULSE, interval)):
            for one in self._consumers:
                one.look_after()
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + interval
                self._renew(interval)
                for one in self._consumers:
                    one.let_middlewares_know()

    def _renew(self, interval: float) -> None:
        # Why not all: what was claimed a moment ago has most of its lease left, and mostly ends before the next.
        latest = self._leases.sure_until(time.monotonic() - interval / 2)
        jobs = [held for one in self._consumers for held in one.jobs() if held.sure_until <= latest]
        try:
            self._leases.renew(jobs)
        except BrokerUnavailable as error:
            _log.warning("the leases of %d jobs could not be renewed: %s", len(jobs), error)
        except Exception:
            _log.exception("the leases of %d jobs could not be renewed", len(jobs))

    # What jobs ask (link.py)

    def job_saves(self, job_id: str, value: bytes) -> None:
        """Keep a result before the job's end.

        Raises:
            BulkheadError: The job is no longer ours.
            MessageTooLarge, BrokerUnavailable: It could not be kept.
        """
        held = self._find(job_id)
        if held is not None and not held.is_lost and time.monotonic() > held.sure_until:
            self._leases.renew([held])
        if held is None or held.is_lost:
            raise BulkheadError(f"the lease of job {job_id} is lost: what it saves is not kept")
        if held.envelope.keep:
            sealed = self._app.sealer.seal_value(job_id, held.envelope.codec, value)
            self._app.backend.results.save_many([outcome_of(held, OutcomeState.RUNNING, value=sealed)])

    def job_reports(self, job_id: str, progress: bytes) -> None:
        """Keep how far a job is."""
        held = self._find(job_id)
        if held is not None:
            held.has_reported = True
            self._app.backend.registry.put(progress_key(job_id), progress, keep=3600.0)

    def is_job_cancelled(self, job_id: str) -> bool:
        """Tell a job whether it was cancelled."""
        held = self._find(job_id)
        if held is None:
            return False
        held.asked_at = time.monotonic()
        return held.is_cancelled

    def _find(self, job_id: str) -> HeldJob | None:
        return next((held for one in self._consumers if (held := one.find(job_id)) is not None), None)


def _check_tasks(app: App, queues: Sequence[str]) -> None:
    for task in app.tasks().values():
        if task.options.queue not in queues:
            continue
        try:
            pickle.dumps(task)
        except Exception as error:
            raise ConfigError(
                f"task {task.name!r} cannot be found by worker processes ({error}): "
                "make it a function at the top level of a module, under its own name"
            ) from error


@contextlib.contextmanager
def _signals_handled(stop: Callable[[], None]) -> Iterator[None]:
    """Have SIGTERM, SIGINT and SIGHUP call `stop` meanwhile, where this is the main thread.

    SIGHUP is left alone where it is ignored, as under nohup, or the program has a use of its own for it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM, signal.SIGINT]
    closed = signal.getsignal(signal.SIGHUP)
    if closed is not signal.SIG_IGN and closed in (signal.SIG_DFL, signal.getsignal(signal.SIGTERM)):
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stop()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
