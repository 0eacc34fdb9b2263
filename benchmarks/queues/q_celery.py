"""Celery on Redis: one worker with two prefork processes."""

import time

import redis
from celery import Celery

from queues.place import PORT, PROCESSES, PYTHON, URL, note_latency

app = Celery("queues.q_celery", broker=URL, backend=URL)
app.conf.update(worker_prefetch_multiplier=64, task_acks_late=True, worker_hijack_root_logger=False)
server = redis.Redis(port=PORT)
WORKERS = [
    [
        *(PYTHON, "-m", "celery", "-A", "queues.q_celery", "worker", "--pool", "prefork"),
        *("--concurrency", str(PROCESSES), "--loglevel", "ERROR"),
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),
    ]
]


@app.task(name="noop")
def noop(a, b):
    return a + b


@app.task(name="late", ignore_result=True)
def late(sent):
    note_latency(sent)


keys = []


def enqueue(n):
    keys.clear()
    with app.producer_pool.acquire(block=True) as producer:
        for number in range(n):
            keys.append(f"celery-task-meta-{noop.apply_async((number, 1), producer=producer).id}")


def enqueue_late():
    late.apply_async((time.time(),))


def n_left(n):
    while keys and server.exists(*keys[:1000]) == len(keys[:1000]):
        del keys[:1000]
    return len(keys)
