"""`bulkhead.ProcessPoolExecutor`: takes the place of the standard library's, in code that is not to be changed.

A dispatcher of one pool, and the executor on it. What differs from the standard library's: a worker that dies fails its
own future alone, and another takes its place; all workers start at once, in the background; the default start method is
forkserver.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any

from bulkhead import validate
from bulkhead.config import MOST_WORKERS, Pool, StartMethod
from bulkhead.dispatcher import Dispatcher
from bulkhead.errors import ConfigError, ConfigTypeError
from bulkhead.executor import PoolExecutor
from bulkhead.job import initialize

__all__ = ["ProcessPoolExecutor"]

_not_shut: weakref.WeakSet[ProcessPoolExecutor] = weakref.WeakSet()


class ProcessPoolExecutor(PoolExecutor):
    """An executor with processes of its own: a drop-in for `concurrent.futures.ProcessPoolExecutor`.

    Args:
        max_workers: Number of processes, at least 1; by default the CPUs that this process may use.
        mp_context: Names the start method. By default forkserver, or spawn if `multiprocessing.set_start_method` said
            so; never fork.
        initializer: Called once in each worker before its first call.
        initargs: Arguments of `initializer`.
        max_tasks_per_child: Calls after which a worker is replaced, at least 1; None for never. Not with start method
            fork, and spawn is the default with it, as in the standard library.

    Raises:
        ConfigError: A value cannot work; it is a ValueError, and a TypeError for one of the wrong type.

    Example:
        >>> with ProcessPoolExecutor(2) as executor:
        ...     list(executor.map(pow, [2, 3, 4], [5, 2, 1]))
        [32, 9, 4]
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: BaseContext | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
    ) -> None:
        n_workers = (
            _usable_cpus() if max_workers is None else _checked("max_workers", max_workers, MOST_WORKERS)
        )
        method = _start_method(mp_context, max_tasks_per_child)
        if initializer is not None:
            validate.function("initializer", initializer)
            if not isinstance(initargs, (tuple, list)):
                raise ConfigTypeError(f"initargs must be a tuple, not {initargs!r}")
            initializer, initargs = initialize, (initializer, *initargs)
        pool = Pool(
            0,
            n_workers,
            name="executor",
            max_jobs_per_worker=max_tasks_per_child,
            initializer=initializer,
            initargs=initargs,
            start_method=method,
        )
        dispatcher = Dispatcher([pool], max_history=0, max_timeline=0)
        super().__init__(dispatcher, dispatcher._pools[0])
        self._dispatcher = dispatcher
        self._finalizer = weakref.finalize(self, _dropped, dispatcher, os.getpid())
        self._finalizer.atexit = False
        _not_shut.add(self)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; end the processes when all calls are done. A second call may wait for that.

        Args:
            wait: Return when that is so and all callbacks have run; else it happens in the background.
            cancel_futures: Cancel the futures whose calls have not begun, but for those that are the next for a worker
                which is still coming up.
        """
        super().shutdown(wait=False, cancel_futures=cancel_futures)
        if wait:
            self._dispatcher.finalize()
            self._forget()
        elif self._finalizer.detach() is not None:
            _finalize_in_background(self._dispatcher)

    def terminate_workers(self) -> None:
        """Cancel all calls, those that run as well, and end the processes with all they have started."""
        super().shutdown(wait=False)
        self._dispatcher.finalize(cancel=True)
        self._forget()

    kill_workers = terminate_workers

    def _forget(self) -> None:
        self._finalizer.detach()
        _not_shut.discard(self)


def _dropped(dispatcher: Dispatcher, pid: int) -> None:
    """Shut down what nobody refers to any more: calls that were submitted end, then the processes."""
    if os.getpid() == pid:
        _finalize_in_background(dispatcher)


def _finalize_in_background(dispatcher: Dispatcher) -> None:
    # Why a thread: the garbage collector may call this anywhere, under a pool's lock as well; and `shutdown` must not
    # wait. Not a daemon, so that the interpreter waits for it.
    threading.Thread(target=dispatcher.finalize, name="bulkhead-shutdown").start()


@atexit.register
def _shut_forgotten() -> None:
    """Let every call that was submitted end, when the interpreter exits, also after an exception.

    Why before the dispatchers' own handler, which runs after this: it would cancel after an exception.
    """
    for executor in list(_not_shut):
        if executor._dispatcher._pid == os.getpid():
            executor.shutdown()


def _start_method(context: BaseContext | None, max_tasks: int | None) -> StartMethod | None:
    if max_tasks is not None:
        _checked("max_tasks_per_child", max_tasks)
    if context is None:
        # Why allow_none: it would fix the default. Why not fork: nobody need have chosen it. It is what multiprocessing
        # falls back to on many systems, for good as soon as any library makes a lock; and it copies threads half.
        method: Any = multiprocessing.get_start_method(allow_none=True) if max_tasks is None else "spawn"
        return None if method == "fork" else method
    if not isinstance(context, BaseContext):
        raise ConfigTypeError(f"mp_context must be a multiprocessing context, not {context!r}")
    method = context.get_start_method()
    if method == "fork" and max_tasks is not None:
        raise ConfigError(
            "max_tasks_per_child cannot be used with start method 'fork': a worker that is replaced later would be a "
            "fork of a process that has threads; give another mp_context"
        )
    return method  # type: ignore[no-any-return]


def _checked(name: str, value: int, at_most: int | None = None) -> int:
    number = validate.whole_number(name, value, at_most=at_most)
    if number <= 0:
        raise ConfigError(f"{name} must be greater than 0, not {validate.shown(number)}")
    return number


def _usable_cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
