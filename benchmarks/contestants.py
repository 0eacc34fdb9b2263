"""One adapter per library, so that each benchmark is written once.

A contestant opens a context around one pool of processes and yields a `Session`. Leaving the context
ends the pool in the orderly way of that library: what was accepted is done, then the processes end.
Libraries are imported when opened, so that one that is absent costs a line in the table and nothing
else.

Why each adapter is spelt out: an executor is left by `shutdown`, a `multiprocessing.Pool` by `close` and
`join` (its own `with` would terminate it), mpire by `stop_and_join`. The jobs of a peer are all
submitted, then all results collected, as its users do.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from settings import StartMethod

__all__ = [
    "BULKHEAD",
    "BULKHEAD_DIST",
    "BULKHEAD_EXECUTOR",
    "BY_NAME",
    "CONTESTANTS",
    "EXECUTOR",
    "STDLIB_POOL",
    "Contestant",
    "Fn",
    "Session",
    "installed",
]

Fn = Callable[[], object]
S = TypeVar("S")
T = TypeVar("T")
OpenPool = Callable[[int, StartMethod], AbstractContextManager[S]]


@dataclass(frozen=True)
class Session:
    """One open pool: `run` does n jobs from the first submit to the last result, `call` one job with arguments."""

    run: Callable[[Fn, int], None]
    call: Callable[..., Any]


@dataclass(frozen=True)
class Contestant(Generic[S]):
    """A library, or one way of using it.

    Attributes:
        name: As in the tables.
        distribution: What to look up the version of; None for the standard library.
        module: What must be importable.
        open: Takes the number of workers and the start method; gives what a benchmark wants to use of the pool.
    """

    name: str
    distribution: str | None
    module: str
    open: OpenPool[S]

    def used_by(self, opener: OpenPool[T]) -> Contestant[T]:
        """Return the same library, used in another way."""
        return Contestant(self.name, self.distribution, self.module, opener)

    def is_installed(self) -> bool:
        try:
            importlib.import_module(self.module)
        except ImportError:
            return False
        return True

    def version(self) -> str:
        if self.distribution is None:
            return "standard library"
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "from source" if self.is_installed() else "not installed"


def installed(contestants: Iterable[Contestant[S]]) -> list[str]:
    """Return the names of those that can take part."""
    return [contestant.name for contestant in contestants if contestant.is_installed()]


@contextmanager
def _open_bulkhead(
    workers: int, method: StartMethod, *, backlog: int = 0, collect: bool = False
) -> Iterator[Session]:
    from bulkhead import Dispatcher, Job, Pool

    pool = Pool(0, workers, backlog=backlog, start_method=method)
    with Dispatcher([pool]) as dispatcher:

        def run(fn: Fn, jobs: int) -> None:
            before = dispatcher.stats()[0].succeeded
            trackers = [dispatcher.dispatch(Job(fn)) for _ in range(jobs)]
            dispatcher.barrier()
            if collect:
                for tracker in trackers:
                    tracker.result()
            done = dispatcher.stats()[0].succeeded - before
            if done != jobs:
                raise RuntimeError(f"{jobs} jobs were dispatched and {done} succeeded")

        yield Session(run, lambda fn, *args: dispatcher.dispatch(Job(fn, *args)).result())


@contextmanager
def _open_bulkhead_collecting(workers: int, method: StartMethod) -> Iterator[Session]:
    with _open_bulkhead(workers, method, collect=True) as session:
        yield session


@contextmanager
def _open_bulkhead_backlog(workers: int, method: StartMethod) -> Iterator[Session]:
    with _open_bulkhead(workers, method, backlog=1000) as session:
        yield session


@contextmanager
def _open_bulkhead_executor(workers: int, method: StartMethod) -> Iterator[Session]:
    from bulkhead import Dispatcher, Pool

    with Dispatcher([Pool(0, workers, start_method=method)]) as dispatcher:
        yield _executor_session(dispatcher.executor())


@contextmanager
def _open_stdlib_pool(workers: int, method: StartMethod) -> Iterator[Session]:
    pool = multiprocessing.get_context(method).Pool(workers)
    try:
        yield _pool_session(pool.apply_async, lambda result: result.get())
    finally:
        pool.close()
        pool.join()


@contextmanager
def _open_stdlib_pool_fork(workers: int, method: StartMethod) -> Iterator[Session]:
    del method  # Why: this row shows what the standard library's usual default on Linux gives.
    with _open_stdlib_pool(workers, "fork") as session:
        yield session


@contextmanager
def _open_executor(workers: int, method: StartMethod) -> Iterator[Session]:
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, mp_context=context) as executor:
        yield _executor_session(executor)


@contextmanager
def _open_loky(workers: int, method: StartMethod) -> Iterator[Session]:
    loky = importlib.import_module("loky")
    with loky.ProcessPoolExecutor(workers, context=multiprocessing.get_context(method)) as executor:
        yield _executor_session(executor)


@contextmanager
def _open_pebble(workers: int, method: StartMethod) -> Iterator[Session]:
    pebble = importlib.import_module("pebble")
    # Leaving its `with` closes and joins.
    with pebble.ProcessPool(workers, context=multiprocessing.get_context(method)) as pool:
        yield _pool_session(pool.schedule, lambda future: future.result())


@contextmanager
def _open_mpire(workers: int, method: StartMethod) -> Iterator[Session]:
    mpire = importlib.import_module("mpire")
    pool = mpire.WorkerPool(workers, start_method=method)
    try:
        yield _pool_session(pool.apply_async, lambda result: result.get())
    finally:
        pool.stop_and_join()


@contextmanager
def _open_deadpool(workers: int, method: StartMethod) -> Iterator[Session]:
    deadpool = importlib.import_module("deadpool")
    with deadpool.Deadpool(workers, mp_context=method) as executor:
        yield _executor_session(executor)


def _pool_session(submit: Callable[..., Any], collect: Callable[[Any], Any]) -> Session:
    """`submit` takes a function and a tuple of arguments."""

    def run(fn: Fn, jobs: int) -> None:
        for pending in [submit(fn) for _ in range(jobs)]:
            collect(pending)

    return Session(run, lambda fn, *args: collect(submit(fn, args)))


def _executor_session(executor: Any) -> Session:
    def run(fn: Fn, jobs: int) -> None:
        for future in [executor.submit(fn) for _ in range(jobs)]:
            future.result()

    return Session(run, lambda fn, *args: executor.submit(fn, *args).result())


BULKHEAD_DIST = "bulkhead-pool"
BULKHEAD = Contestant("bulkhead", BULKHEAD_DIST, "bulkhead", _open_bulkhead)
BULKHEAD_EXECUTOR = Contestant("bulkhead executor.submit", BULKHEAD_DIST, "bulkhead", _open_bulkhead_executor)
STDLIB_POOL = Contestant("multiprocessing.Pool", None, "multiprocessing", _open_stdlib_pool)
EXECUTOR = Contestant("ProcessPoolExecutor", None, "concurrent.futures", _open_executor)
CONTESTANTS = (
    BULKHEAD,
    Contestant("bulkhead, each result read", BULKHEAD_DIST, "bulkhead", _open_bulkhead_collecting),
    Contestant("bulkhead, backlog=1000", BULKHEAD_DIST, "bulkhead", _open_bulkhead_backlog),
    BULKHEAD_EXECUTOR,
    STDLIB_POOL,
    Contestant("multiprocessing.Pool, fork", None, "multiprocessing", _open_stdlib_pool_fork),
    EXECUTOR,
    Contestant("loky", "loky", "loky", _open_loky),
    Contestant("pebble", "pebble", "pebble", _open_pebble),
    Contestant("mpire", "mpire", "mpire", _open_mpire),
    Contestant("deadpool", "deadpool-executor", "deadpool", _open_deadpool),
)
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}
