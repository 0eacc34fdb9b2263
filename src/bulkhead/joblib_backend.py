"""A parallel backend for joblib, and so for scikit-learn: `register()`, then `backend="bulkhead"`.

    Parallel ── batches ──▶ submit ──▶ PoolExecutor of this call ──▶ a pool of its own, or a dispatcher's
       ▲                                                                  │
       └── done callbacks, in the pool's callback thread ◀── futures ◀────┘

joblib cuts the work into batches, reads its input in the callback thread, and collects results and errors by itself.
What is left for a backend: workers, sending batches, and ending what runs when a call fails, times out or is
interrupted. The backend that a `parallel_config` holds serves no call itself: each Parallel gets one of its own, so
that calls at the same time (generators, threads) neither share statistics nor abort one another.

Who ends the workers: joblib tells nobody when a `parallel_config` is left, but lets go of the backend. The pool hangs
on the backend and on the calls that run, and a ProcessPoolExecutor that is dropped ends its processes. Nothing here
may make a cycle of references.

Not here: memory maps in a folder, as loky has them. Large arrays travel in shared memory, as with any job.

Source: joblib's ParallelBackendBase; loky's backend for what nested calls and thread limits should be.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from bulkhead import forks, native_threads
from bulkhead.errors import BulkheadError, ConfigTypeError
from bulkhead.executor import PoolExecutor
from bulkhead.job import name_of
from bulkhead.process_pool_executor import ProcessPoolExecutor

try:
    import joblib
    from joblib.parallel import (
        AutoBatchingMixin,
        FallbackToBackend,
        ParallelBackendBase,
        SequentialBackend,
    )
except ImportError as error:
    raise ImportError("bulkhead.joblib_backend needs joblib: pip install joblib") from error

__all__ = ["BulkheadBackend", "register"]

# Seconds that a failed call waits for its batches to be cancelled. That takes milliseconds, except where the garbage
# collector aborts a call in a thread that holds a lock of the pool: then it happens after this.
_ABORT_SECONDS = 1.0

# The calls that run. Cancelled at exit, when nobody is left to take their results.
_running: weakref.WeakSet[PoolExecutor] = weakref.WeakSet()

_is_in_worker = False


def register(executor: PoolExecutor | None = None) -> None:
    """Make `backend="bulkhead"` known to joblib, in this process. A second call replaces the first.

    Args:
        executor: Of `Dispatcher.executor`: calls run in that pool. By default each `parallel_config` block, and each
            Parallel outside of one, has workers of its own.

    Raises:
        ConfigTypeError: `executor` is something else.

    Example:
        >>> register()
        >>> with joblib.parallel_config(backend="bulkhead", n_jobs=2):
        ...     joblib.Parallel()(joblib.delayed(pow)(2, n) for n in range(4))
        [1, 2, 4, 8]
    """
    _check(executor)
    joblib.register_parallel_backend("bulkhead", partial(BulkheadBackend, executor=executor))


class BulkheadBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]  # joblib has no types
    """What joblib makes for `backend="bulkhead"`. Its methods are for joblib.

    Args:
        nesting_level: How many Parallel calls are around this; joblib's to say.
        inner_max_num_threads: Threads that native libraries may use in each worker; by default the CPUs divided by the
            workers. Not with an `executor`, whose pool has an initializer for such things.
        executor: Of `Dispatcher.executor`; None for workers of its own.
    """

    default_n_jobs = -1
    supports_retrieve_callback = True

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        *,
        executor: PoolExecutor | None = None,
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        _check(executor)
        self._given = executor
        self._kept: ProcessPoolExecutor | None = None  # workers for the next call
        self._model: Callable[[], BulkheadBackend | None] = lambda: None  # what this is a copy of
        self._parallel: Callable[[], Any] = lambda: None  # whose calls this serves
        # From `configure` to `terminate`: where the workers are, and this call's own executor on the same pool.
        self._executor: PoolExecutor | None = None
        self._calls: PoolExecutor | None = None

    @property
    def supports_inner_max_num_threads(self) -> bool:
        """Tell whether the number of native threads can be chosen here."""
        return self._given is None

    @property
    def parallel(self) -> Any:
        """Return the Parallel that this works for."""
        return self._parallel()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return how many workers there are for so many jobs; negative numbers count from the end, as in joblib."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if _is_in_worker or (self.nesting_level or 0) > 0:
            return 1
        if n_jobs is None:
            n_jobs = self.default_n_jobs
        if self._given is None:
            return n_jobs if n_jobs > 0 else max(joblib.cpu_count() + 1 + n_jobs, 1)
        n_workers = self._given._max_workers
        return min(n_jobs, n_workers) if n_jobs > 0 else max(n_workers + 1 + n_jobs, 1)

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        executor: PoolExecutor | None = None,
        **_options: Any,
    ) -> int:
        """Get ready for calls of `parallel`, and return the number of workers.

        Raises:
            FallbackToBackend: joblib is to take another backend: a copy of this, or none for a single job.
            RuntimeError: The executor is shut down.
        """
        if self.parallel is not parallel:
            raise FallbackToBackend(self._copy_for(parallel, executor))
        n_workers = self.effective_n_jobs(n_jobs)
        if n_workers == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        executor = self._given or self._own_executor(n_workers)
        self._calls = _calls_on(executor)
        self._executor = executor
        return n_workers

    def start_call(self) -> None:
        """Begin a call: forget the batches that a failed call of the same Parallel has cut and not submitted.

        Why here: joblib (1.6) keeps them in the Parallel, and would submit them as part of this call.
        """
        left = getattr(self.parallel, "_ready_batches", None)
        while left is not None and not left.empty():
            left.get_nowait()

    def submit(self, func: Any, callback: Callable[[Any], object] | None = None) -> Future[Any]:
        """Have a batch run in a worker, then `callback` called with its future. Its errors are the future's."""
        calls = self._calls
        future: Future[Any]
        try:
            if calls is None:  # Race: the call has failed, and the callback thread did not know yet.
                raise RuntimeError("the call of Parallel is over")
            future = calls.submit(_Batch(func))
            if calls.is_shut:  # Race: it was aborted while this batch was on its way.
                calls.cancel_all()
        except Exception as error:
            # Why: joblib calls this in the callback thread, where nobody would hear of it and the call would not end.
            future = Future()
            future.set_exception(error)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        """Return what the batch has returned, or raise what it has raised."""
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Cancel what waits of this call and end what runs; the pool stays usable. Blocking: a second at most."""
        executor, calls = self._executor, self._calls
        if executor is None or calls is None or calls.is_shut:
            return
        # Why a thread: joblib aborts a call whose generator is garbage, and the collector may run under any lock.
        # Not a daemon, so that the interpreter waits for it.
        thread = threading.Thread(target=calls.cancel_all, name="bulkhead-abort")
        thread.start()
        if ensure_ready:
            self._calls = _calls_on(executor)
        thread.join(_ABORT_SECONDS)

    def terminate(self) -> None:
        """Let go of the workers. They end, unless a `parallel_config` holds them for further calls."""
        self._executor = self._calls = None
        self.reset_batch_stats()

    def _copy_for(self, parallel: Any, executor: PoolExecutor | None) -> BulkheadBackend:
        copy = BulkheadBackend(
            self.nesting_level, self.inner_max_num_threads, executor=executor or self._given
        )
        copy._model = weakref.ref(self)
        copy._parallel = weakref.ref(parallel)
        return copy

    def _own_executor(self, n_workers: int) -> ProcessPoolExecutor:
        """Return the workers that the model keeps, if there are so many, or new ones, for it to keep."""
        model = self._model()
        kept = model._kept if model is not None else None
        if kept is not None and kept._max_workers == n_workers and _is_usable(kept):
            return kept
        env = self._prepare_worker_env(n_jobs=n_workers)
        made = ProcessPoolExecutor(n_workers, initializer=native_threads.limit, initargs=(env,))
        if model is not None:
            # Race: of two threads that are here at once, one has its workers for a single call. Others that were kept
            # end with the last call that runs on them.
            model._kept = made
        return made


class _Batch:
    """A batch of calls on its way to a worker.

    `__module__` says "__main__" of one with a function or an argument from there. Why: workers that cannot import that
    module (a notebook, standard input) get such calls by value, and the batch hides what it holds. `__qualname__` is
    for timelines.
    """

    def __init__(self, calls: Any) -> None:
        self._calls = calls
        if any(map(_is_from_main, calls.items)):
            self.__module__ = "__main__"
        for fn, _, _ in calls.items[:1]:
            self.__qualname__ = name_of(fn)

    def __call__(self) -> Any:
        global _is_in_worker
        if not _is_in_worker:
            _is_in_worker = True
            register()  # so that a nested call may name the backend, too
        return self._calls()

    def __reduce__(self) -> Any:
        return _Batch, (self._calls,)


def _is_from_main(call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]) -> bool:
    fn, args, kwargs = call
    makers = (fn, *map(type, args), *map(type, kwargs.values()))
    return any(getattr(maker, "__module__", None) == "__main__" for maker in makers)


def _check(executor: object) -> None:
    if executor is not None and not isinstance(executor, PoolExecutor):
        raise ConfigTypeError(f"executor must be one of Dispatcher.executor(), not {executor!r}")


def _calls_on(executor: PoolExecutor) -> PoolExecutor:
    """Return an executor for one call: on the same pool, with a book of its own. Keeps the given one alive."""
    if executor.is_shut:
        raise RuntimeError("the executor is shut down")
    calls = PoolExecutor(executor, executor._pool)
    _running.add(calls)
    return calls


def _is_usable(executor: ProcessPoolExecutor) -> bool:
    if executor._depth != forks.depth:
        return False  # this process is a fork of the one whose workers they are
    try:
        executor._pool.check_open()
    except BulkheadError:
        return False
    return True


@atexit.register
def _cancel_running() -> None:
    """Cancel the calls that run. Why before the executors' own handlers, which run after this: they would wait."""
    for calls in list(_running):
        if calls._depth == forks.depth:
            calls.cancel_all()
