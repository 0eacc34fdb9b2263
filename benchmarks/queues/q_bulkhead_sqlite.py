"""bulkhead on SQLite."""

import time

from bulkhead import App
from queues.place import PROCESSES, SQLITE, note_latency
from queues.q_bulkhead import SUCCEEDED, workers

app = App(f"sqlite:///{SQLITE}")
WORKERS = workers("queues.q_bulkhead_sqlite")


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
