"""One adapter per library's way to map a function over many items.

A mapper opens a context around one warm pool and yields a `Map`. Leaving the context ends the pool. The items of
bulkhead are an iterator without a length, as a lazy map has to cope with; the others get what was passed, because
some of them need the length.

Why `keep_alive` for mpire and joblib's reusable workers: without them every call would start its processes, which
is another question (startup).
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from contestants import BULKHEAD_DIST, Contestant
from settings import StartMethod

__all__ = [
    "BULKHEAD_MAP",
    "BULKHEAD_MAP_UNORDERED",
    "EXECUTOR_MAP",
    "JOBLIB",
    "MAPPERS_BY_NAME",
    "MPIRE_MAP",
    "PEBBLE_MAP",
    "POOL_IMAP_UNORDERED",
    "POOL_MAP",
    "Map",
    "timed",
]

Map = Callable[[Callable[[Any], object], Iterable[Any], int | None], Iterable[object]]
"""Takes a function, the items and the chunk size; None is the library's default. Gives all results.

Some libraries have to know how many items there are, and take a sequence only."""


def timed(mapped: Map, fn: Callable[[Any], object], items: Sequence[Any], chunksize: int | None) -> float:
    """Return the seconds from the call to the last result.

    Raises:
        RuntimeError: There was not one result for each item.
    """
    gc.collect()
    start = time.perf_counter()
    done = len(list(mapped(fn, items, chunksize)))
    elapsed = time.perf_counter() - start
    if done != len(items):
        raise RuntimeError(f"{len(items)} items gave {done} results")
    return elapsed


@contextmanager
def _open_bulkhead(workers: int, method: StartMethod, *, ordered: bool = True) -> Iterator[Map]:
    from bulkhead import Dispatcher, Pool

    with Dispatcher([Pool(0, workers, start_method=method)]) as dispatcher:
        yield lambda fn, items, size: dispatcher.map(
            fn, iter(items), ordered=ordered, chunksize=size or "auto"
        )


@contextmanager
def _open_bulkhead_unordered(workers: int, method: StartMethod) -> Iterator[Map]:
    with _open_bulkhead(workers, method, ordered=False) as mapped:
        yield mapped


@contextmanager
def _open_stdlib_pool(workers: int, method: StartMethod) -> Iterator[Any]:
    pool = multiprocessing.get_context(method).Pool(workers)
    try:
        yield pool
    finally:
        pool.close()
        pool.join()


@contextmanager
def _open_map(workers: int, method: StartMethod) -> Iterator[Map]:
    with _open_stdlib_pool(workers, method) as pool:
        yield pool.map


@contextmanager
def _open_imap_unordered(workers: int, method: StartMethod) -> Iterator[Map]:
    with _open_stdlib_pool(workers, method) as pool:
        yield lambda fn, items, size: pool.imap_unordered(fn, items, size or 1)


@contextmanager
def _open_executor(workers: int, method: StartMethod) -> Iterator[Map]:
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method)) as executor:
        yield lambda fn, items, size: executor.map(fn, items, chunksize=size or 1)


@contextmanager
def _open_pebble(workers: int, method: StartMethod) -> Iterator[Map]:
    pebble = importlib.import_module("pebble")
    with pebble.ProcessPool(workers, context=multiprocessing.get_context(method)) as pool:
        yield lambda fn, items, size: pool.map(fn, items, chunksize=size or 1).result()


@contextmanager
def _open_mpire(workers: int, method: StartMethod) -> Iterator[Map]:
    mpire = importlib.import_module("mpire")
    pool = mpire.WorkerPool(workers, start_method=method, keep_alive=True)
    try:
        yield lambda fn, items, size: pool.map(fn, items, chunk_size=size)
    finally:
        pool.stop_and_join()


@contextmanager
def _open_joblib(workers: int, method: StartMethod) -> Iterator[Map]:
    del method  # Why: its backend loky has a start method of its own.
    joblib = importlib.import_module("joblib")

    def mapped(fn: Callable[[Any], object], items: Iterable[Any], size: int | None) -> Iterable[object]:
        parallel = joblib.Parallel(n_jobs=workers, batch_size=size or "auto")
        results: list[object] = parallel(joblib.delayed(fn)(item) for item in items)
        return results

    try:
        yield mapped
    finally:
        joblib.externals.loky.get_reusable_executor().shutdown()


BULKHEAD_MAP = Contestant("disp.map", BULKHEAD_DIST, "bulkhead", _open_bulkhead)
BULKHEAD_MAP_UNORDERED = Contestant(
    "disp.map, ordered=False", BULKHEAD_DIST, "bulkhead", _open_bulkhead_unordered
)
POOL_MAP = Contestant("multiprocessing.Pool.map", None, "multiprocessing", _open_map)
POOL_IMAP_UNORDERED = Contestant(
    "multiprocessing.Pool.imap_unordered", None, "multiprocessing", _open_imap_unordered
)
EXECUTOR_MAP = Contestant("ProcessPoolExecutor.map", None, "concurrent.futures", _open_executor)
PEBBLE_MAP = Contestant("pebble.ProcessPool.map", "pebble", "pebble", _open_pebble)
MPIRE_MAP = Contestant("mpire.WorkerPool.map", "mpire", "mpire", _open_mpire)
JOBLIB = Contestant("joblib.Parallel", "joblib", "joblib", _open_joblib)
MAPPERS_BY_NAME = {
    mapper.name: mapper
    for mapper in (
        BULKHEAD_MAP,
        BULKHEAD_MAP_UNORDERED,
        POOL_MAP,
        POOL_IMAP_UNORDERED,
        EXECUTOR_MAP,
        PEBBLE_MAP,
        MPIRE_MAP,
        JOBLIB,
    )
}
