"""A thread with an event loop, and a way to hand it coroutines from any thread.

Owner: the thread; other threads only use `run` and `stop`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from bulkhead.errors import BrokerUnavailable

__all__ = ["LoopThread"]

_T = TypeVar("_T")


class LoopThread:
    """Runs an event loop until `stop`."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        # Guards `_stopped`: what is handed over before the loop is told to stop is cancelled by it, and nothing is
        # handed over afterwards, or its caller would wait for ever. Rank: taken alone.
        self._lock = threading.Lock()
        self._stopped = False
        # Why a daemon: a program that forgets to close its backend ends all the same.
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Return what the coroutine returns, or raise what it raises.

        Blocking: as long as the coroutine takes; the coroutines of this package bound each of their waits. When the
        wait is interrupted (Ctrl-C), the coroutine is cancelled.
        """
        with self._lock:
            if self._stopped:
                work.close()
                raise BrokerUnavailable("the backend is closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError as error:
            raise BrokerUnavailable("the backend was closed meanwhile") from error
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Cancel what runs in the loop, end it and wait for the thread. A second call does nothing."""
        with self._lock:
            if not self._stopped:
                self._stopped = True
                self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _live(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._cancel_all()
        finally:
            self._loop.close()

    def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
