"""Dramatiq on Redis, results kept: two processes of four threads each."""

import time
from pathlib import Path

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from queues.place import PORT, PROCESSES, PYTHON, URL, note_latency

broker = RedisBroker(url=URL)
results = RedisBackend(url=URL)
broker.add_middleware(Results(backend=results, store_results=True))
dramatiq.set_broker(broker)
server = redis.Redis(port=PORT)
WORKERS = [
    [
        str(Path(PYTHON).with_name("dramatiq")),
        "queues.q_dramatiq",
        "--processes",
        str(PROCESSES),
        "--threads",
        "4",
    ]
]


@dramatiq.actor(actor_name="noop")
def noop(a, b):
    return a + b


@dramatiq.actor(actor_name="late", store_results=False)
def late(sent):
    note_latency(sent)


keys = []


def enqueue(n):
    keys.clear()
    for number in range(n):
        message = noop.send(number, 1)
        keys.append(results.build_message_key(message))


def enqueue_late():
    late.send(time.time())


def n_left(n):
    # Results that are there are not looked for again.
    while keys and server.exists(*keys[:1000]) == len(keys[:1000]):
        del keys[:1000]
    return len(keys)
