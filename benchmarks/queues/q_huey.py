"""Huey on Redis: one consumer with two worker processes."""

import time
from pathlib import Path

from huey import RedisHuey

from queues.place import PORT, PROCESSES, PYTHON, note_latency

huey = RedisHuey("bench", host="127.0.0.1", port=PORT, results=True)


@huey.task()
def noop(a, b):
    return a + b


@huey.task()
def late(sent):
    note_latency(sent)


def workers(module):
    program = str(Path(PYTHON).with_name("huey_consumer"))
    return [[program, f"{module}.huey", "-w", str(PROCESSES), "-k", "process", "-q"]]


WORKERS = workers("queues.q_huey")


def enqueue(n):
    for number in range(n):
        noop(number, 1)


def enqueue_late():
    late(time.time())


def n_left(n):
    return n - huey.result_count()
