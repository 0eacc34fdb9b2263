"""One life of one pool in a process of its own, told to the process that measures.

Run by `startup` and `idleness`: a figure about starting, ending or resting is only clean in a process
that has done nothing else. It prints one line of JSON when it has something to say. `rest` then waits
for a line on standard input, so that the caller is blocked in a read and the observer sees nothing but
the pool.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from typing import cast

from contestants import BY_NAME
from settings import StartMethod
from workload import hold, noop

HOLDS_PER_WORKER = 2
"""Enough jobs that hold a worker that a pool which starts its workers on demand has started them all."""


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
    command, name, workers, start_method, *jobs = sys.argv[1:]
    method = cast("StartMethod", start_method)
    if command == "live":
        live(name, int(workers), method)
    else:
        rest(name, int(workers), method, int(jobs[0]))


if __name__ == "__main__":
    _main()
