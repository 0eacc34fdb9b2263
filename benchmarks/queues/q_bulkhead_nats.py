"""bulkhead on NATS JetStream."""

import time

from bulkhead import App
from queues.place import NATS, PROCESSES, note_latency
from queues.q_bulkhead import SUCCEEDED, workers

app = App(NATS)
WORKERS = workers("queues.q_bulkhead_nats")


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
