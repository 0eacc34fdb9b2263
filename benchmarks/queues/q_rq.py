"""RQ: two workers, each of which forks a process for every job, as it does by default."""

import time

import redis
from rq import Queue

from queues.place import PORT, PROCESSES, PYTHON, URL, note_latency

server = redis.Redis(port=PORT)
queue = Queue("default", connection=server)
CLASS = "rq.worker.Worker"


def noop(a, b):
    return a + b


def late(sent):
    note_latency(sent)


def workers(worker_class):
    one = [PYTHON, "-m", "rq.cli", "worker", "-u", URL, "-w", worker_class, "--quiet", "default"]
    return [one] * PROCESSES


WORKERS = workers(CLASS)


def enqueue(n):
    for at in range(0, n, 1000):
        queue.enqueue_many(
            [Queue.prepare_data(noop, args=(number, 1)) for number in range(at, min(at + 1000, n))]
        )


def enqueue_late():
    queue.enqueue(late, time.time())


def n_left(n):
    return n - server.zcard(queue.finished_job_registry.key)
