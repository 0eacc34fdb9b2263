"""The thread that runs users' done callbacks: one per pool, made when the first callback is added.

Why not in the thread that drives: a callback that takes long or waits would hold up timeouts and results of the pool,
and a caller's `wait(timeout)` could last as long as somebody else's callback.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["CallbackThread", "DoneCallback", "once"]

_log = logging.getLogger("bulkhead")


class CallbackThread:
    """Runs callbacks one after the other, in the order of `submit`. Unbounded by choice: one entry per callback added.

    Concurrency: any thread.

    Args:
        name: Of the thread.
        what: What it runs, for messages.
    """

    def __init__(self, name: str, what: str = "a done callback") -> None:
        self._name = name
        self._what = what
        self._queue: queue.SimpleQueue[tuple[Callable[[Any], object], Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._has_ended = False
        self._lock = (
            threading.Lock()
        )  # guards the making and the end of the thread; nothing is acquired under it

    def prepare(self) -> None:
        """Make the thread if there is none."""
        with self._lock:
            if self._thread is None and not self._has_ended:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()
                self._thread = thread

    def submit(self, callback: Callable[[Any], object], subject: Any) -> None:
        """Have `callback(subject)` called, at once in this thread after the end; its exception is logged."""
        with self._lock:
            if not self._has_ended:
                self._queue.put((callback, subject))
                return
        self._call(callback, subject)

    def wait_until_run(self) -> None:
        """Wait until what was submitted so far has run; not in a callback. Blocking: as long as callbacks take."""
        if self._thread is None or self._thread is threading.current_thread():
            return
        has_run = threading.Event()
        self.submit(lambda _: has_run.set(), None)
        has_run.wait()

    def end(self, timeout: float | None) -> None:
        """Run what is there and end. Blocking: until that is done or `timeout`; not at all in a callback."""
        with self._lock:
            self._has_ended = True
            thread = self._thread
            self._queue.put(None)
        if thread is None:
            return
        if thread is not threading.current_thread():
            thread.join(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
            if thread.is_alive():
                _log.warning("%s is still running after finalize", self._what)

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            self._call(*entry)
            del entry  # Why: a thread that waits for the next one must not keep this job alive.

    def _call(self, callback: Callable[[Any], object], subject: Any) -> None:
        try:
            callback(subject)
        except BaseException:
            _log.exception("%s of job %r raised", self._what, getattr(subject, "id", subject))


def once(callback: Callable[[Any], object]) -> Callable[[Any], None]:
    """Return a function that calls `callback` the first time that it is called, and then forgets it."""
    left = [callback]

    def call(subject: Any) -> None:
        if left:
            left.pop()(subject)

    return call


class DoneCallback:
    """A callback in a job's list of waiters. It runs once, however often it is fired."""

    __slots__ = ("_callback", "_job", "_thread")

    def __init__(self, thread: CallbackThread, callback: Callable[[Any], object], job: Any) -> None:
        self._thread = thread
        self._callback = once(callback)
        self._job = job

    def fire(self) -> None:
        """The job has settled."""
        self._thread.submit(self._callback, self._job)
