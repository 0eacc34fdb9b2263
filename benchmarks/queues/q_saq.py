"""saq: two worker processes of 20 coroutines each."""

import asyncio
import time
from pathlib import Path

import redis
from saq import Queue

from queues.place import PORT, PROCESSES, PYTHON, URL, note_latency

queue = Queue.from_url(URL)
server = redis.Redis(port=PORT)


async def noop(ctx, *, a, b):
    return a + b


async def late(ctx, *, sent):
    note_latency(sent)


settings = {"queue": queue, "functions": [noop, late], "concurrency": 20}
WORKERS = [[str(Path(PYTHON).with_name("saq")), "queues.q_saq.settings", "--quiet"]] * PROCESSES


async def _enqueue(n):
    await queue.connect()
    for at in range(0, n, 50):
        await asyncio.gather(*(queue.enqueue("noop", a=number, b=1) for number in range(at, min(at + 50, n))))
    await queue.disconnect()


async def _enqueue_late():
    await queue.connect()
    await queue.enqueue("late", sent=time.time())
    await queue.disconnect()


def enqueue(n):
    asyncio.run(_enqueue(n))


def enqueue_late():
    asyncio.run(_enqueue_late())


def n_left(n):
    return server.zcard("saq:default:incomplete") if server.exists("saq:default:incomplete") else 0
