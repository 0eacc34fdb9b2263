"""Huey on SQLite: one consumer with two worker processes."""

import time

from huey import SqliteHuey

from queues.place import SQLITE, note_latency
from queues.q_huey import workers

huey = SqliteHuey("bench", filename=SQLITE, results=True)
WORKERS = workers("queues.q_huey_sqlite")


@huey.task()
def noop(a, b):
    return a + b


@huey.task()
def late(sent):
    note_latency(sent)


def enqueue(n):
    for number in range(n):
        noop(number, 1)


def enqueue_late():
    late(time.time())


def n_left(n):
    return n - huey.result_count()
