"""bulkhead, its jobs kept where the benchmark says."""

import time
from pathlib import Path

from bulkhead import App
from bulkhead.backends.base import OutcomeState
from queues.place import JOBS, PROCESSES, PYTHON, note_latency

SUCCEEDED = OutcomeState.SUCCEEDED
app = App(JOBS)
WORKERS = [
    [
        *(str(Path(PYTHON).with_name("bulkhead")), "worker"),
        *("queues.q_bulkhead:app", "--log-level", "warning"),
    ]
]


@app.task(concurrency=PROCESSES)
def noop(a, b):
    return a + b


@app.task
def late(sent):
    note_latency(sent)


def enqueue(n):
    app.enqueue_many(noop.call(number, 1) for number in range(n))


def enqueue_late():
    late.enqueue(time.time())


def n_left(n):
    return n - app.backend.results.counts().get(SUCCEEDED, 0)
