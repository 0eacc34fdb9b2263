"""A worker's main process: it claims jobs, has them run in the dispatcher's pools, and tells the broker.

    broker ── claim ──▶ QueueConsumer (one a queue) ── batches ──▶ pool of that queue (dispatcher.py)
       ▲                     │ fetch thread                              │ done callback
       └── ack, nack, bury ──┴ settle thread ◀───────────────────────────┘
    pulse thread: renews the leases of all that is held, looks after batches, lets the middlewares know
    link thread:  answers the jobs' own questions (link.py)

Guarantees: what is claimed is acked after the work and its outcome are done, or given back, or its lease runs out; a
job whose lease is lost here is ended here. Each queue has threads and a pool of its own and starves no other.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from bulkhead.backends.base import OutcomeState
from bulkhead.dispatcher import Dispatcher
from bulkhead.errors import ConfigError
from bulkhead.service.batch import SLOTS, HeldJob, Marks, marks_path
from bulkhead.service.link import Link
from bulkhead.service.queue_consumer import QueueConsumer
from bulkhead.service.status import progress_key
from bulkhead.service.telling import outcome_of

if TYPE_CHECKING:
    from bulkhead.service.app import App

__all__ = ["Consumer"]

_log = logging.getLogger("bulkhead")

# Between two renewals (seconds), at most; they come three times as often as leases would run out.
_PULSE = 1.0

# Between two looks at batches (seconds), at most.
_BATCH_PULSE = 0.1


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
        self._pools = app.pools(queues, n_workers)
        self._queues = queues
        self._is_stopping = threading.Event()
        self._is_hurried = threading.Event()
        self._has_ended = threading.Event()
        self._pulse_thread = threading.Thread(target=self._pulse, name="bulkhead pulse", daemon=True)

    def run(self, *, grace: float) -> None:
        """Work until a signal or `stop`; then end within about `grace` seconds."""
        self._start()
        try:
            with _signals_handled(self.stop):
                for one in self._consumers:
                    one.start()
                while not self._is_stopping.wait(1.0):
                    pass
                self._leave(grace)
        finally:
            self._end()

    def run_once(self) -> str | None:
        """Run one job, if one is due; return its id."""
        self._start()
        try:
            (consumer,) = self._consumers
            job_id = consumer.take_one()
            consumer.finish()
            return job_id
        finally:
            self._end()

    def stop(self) -> None:
        """Let `run` end, as at a signal: once in good order, twice at once."""
        if self._is_stopping.is_set():
            self._is_hurried.set()
        self._is_stopping.set()

    def _start(self) -> None:
        app = self._app
        app.backend  # noqa: B018 - a server that cannot be reached is told before anything starts
        self._link = Link(self)
        self._marks = Marks(marks_path(self._link.address), create=True)
        try:
            self._dispatcher = Dispatcher(self._pools, max_history=1000)
        except BaseException:
            self._marks.close()
            self._link.close()
            raise
        free_slots = deque(range(SLOTS))
        self._consumers = [
            QueueConsumer(
                app,
                pool.name or "",
                pool.priority,
                pool.n_workers,
                self._dispatcher,
                self._link,
                self._marks,
                free_slots,
            )
            for pool in self._pools
        ]
        self._pulse_thread.start()

    def _leave(self, grace: float) -> None:
        _log.info("stopping: jobs that run have %g s to end", grace)
        deadline = time.monotonic() + grace
        for one in self._consumers:
            one.begin_to_leave()
        while any(one.n_held for one in self._consumers):
            if self._is_hurried.wait(0.02) or time.monotonic() > deadline:
                break
        for one in self._consumers:
            one.give_all_back()

    def _end(self) -> None:
        for one in self._consumers:
            one.end()
        self._has_ended.set()
        self._pulse_thread.join()
        self._dispatcher.finalize(cancel=True)
        self._marks.close()
        self._link.close()

    def _pulse(self) -> None:
        interval = min(self._app.lease / 3, _PULSE)
        next_beat = time.monotonic() + interval
        while not self._has_ended.wait(min(_BATCH_PULSE, interval)):
            now = time.monotonic()
            for one in self._consumers:
                one.look_after_batches(now)
            if now < next_beat:
                continue
            next_beat = now + interval
            for one in self._consumers:
                one.beat()

    # What jobs ask (link.py)

    def job_saves(self, job_id: str, value: bytes) -> None:
        """Keep a result before the job's end."""
        held = self._find(job_id)
        if held is not None:
            sealed = self._app.sealer.seal_value(job_id, held.envelope.codec, value)
            self._app.backend.results.save_many([outcome_of(held, OutcomeState.RUNNING, value=sealed)])

    def job_reports(self, job_id: str, progress: bytes) -> None:
        """Keep how far a job is."""
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
    """Have SIGTERM and SIGINT call `stop` meanwhile, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: stop()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
