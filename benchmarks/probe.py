"""One life of one pool in a process of its own, told to the process that measures.

Run by `startup`, `idleness` and `memory` (see probing.py): a figure about starting, ending, resting or growing is only
clean in a process that has done nothing else. It prints one line of JSON when it has something to say. `rest` then
waits for a line on standard input, so that the caller is blocked in a read and the observer sees nothing but the pool.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import cast

from contestants import BY_NAME
from mappers import MAPPERS_BY_NAME
from settings import StartMethod
from workload import hold, ignore, noop

HOLDS_PER_WORKER = 2
"""Enough jobs that hold a worker that a pool which starts its workers on demand has started them all."""
STREAM_SAMPLES = 10
"""How often `stream` looks at the memory."""


def live(name: str, workers: int, start_method: StartMethod) -> None:
    """Time two lives of a pool: the first pays for what the process sets up once, such as a fork server."""
    print(
        json.dumps({"first": _life(name, workers, start_method), "again": _life(name, workers, start_method)})
    )


def rest(name: str, workers: int, start_method: StartMethod, jobs: int) -> None:
    """Do some jobs, then nothing until told to end."""
    with BY_NAME[name].open(workers, start_method) as session:
        session.run(hold, workers * HOLDS_PER_WORKER)
        session.run(noop, jobs)
        print(json.dumps({"resting": True}), flush=True)
        sys.stdin.readline()


def stream(name: str, workers: int, start_method: StartMethod, items: int) -> None:
    """Map over a lazy iterable; tell the memory in use on the way, and how far the iterable was read ahead."""
    samples = []
    n_read = furthest_ahead = 0

    def source() -> Iterator[int]:
        nonlocal n_read
        for item in range(items):
            n_read += 1
            yield item

    with MAPPERS_BY_NAME[name].open(workers, start_method) as mapped:
        for n_taken, _ in enumerate(mapped(ignore, source(), None), 1):
            furthest_ahead = max(furthest_ahead, n_read - n_taken)
            if n_taken % (items // STREAM_SAMPLES) == 0:
                samples.append({"items": n_taken, **_memory()})
    print(json.dumps({"samples": samples, "furthest_ahead": furthest_ahead}))


def _memory() -> dict[str, int]:
    import psutil  # Why here: `live` measures what its library imports

    caller = psutil.Process()
    others = sum(process.memory_info().rss for process in caller.children(recursive=True))
    return {"caller_rss_bytes": caller.memory_info().rss, "others_rss_bytes": others}


def _life(name: str, workers: int, start_method: StartMethod) -> dict[str, float]:
    with ExitStack() as stack:
        start = time.perf_counter()
        session = stack.enter_context(BY_NAME[name].open(workers, start_method))
        session.call(noop)
        first_result = time.perf_counter()
        session.run(hold, workers * HOLDS_PER_WORKER)
        end = time.perf_counter()
        stack.close()
        return {"first_result_seconds": first_result - start, "finalize_seconds": time.perf_counter() - end}


def _main() -> None:
    command, name, workers, start_method, *count = sys.argv[1:]
    commands: dict[str, Callable[..., None]] = {"live": live, "rest": rest, "stream": stream}
    commands[command](name, int(workers), cast("StartMethod", start_method), *map(int, count))


if __name__ == "__main__":
    _main()
