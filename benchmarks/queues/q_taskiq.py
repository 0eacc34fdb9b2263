"""taskiq on Redis streams: two worker processes."""

import asyncio
import time
from pathlib import Path

import redis
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from queues.place import PORT, PROCESSES, PYTHON, URL, note_latency

broker = RedisStreamBroker(url=URL).with_result_backend(RedisAsyncResultBackend(redis_url=URL))
server = redis.Redis(port=PORT)
WORKERS = [
    [
        *(str(Path(PYTHON).with_name("taskiq")), "worker", "queues.q_taskiq:broker"),
        *("--workers", str(PROCESSES), "--log-level", "ERROR"),
    ]
]
keys = []


@broker.task
async def noop(a: int, b: int) -> int:
    return a + b


@broker.task
def late(sent: float) -> None:
    note_latency(sent)


async def _enqueue(n):
    await broker.startup()
    for at in range(0, n, 100):
        tasks = await asyncio.gather(*(noop.kiq(number, 1) for number in range(at, min(at + 100, n))))
        keys.extend(task.task_id for task in tasks)
    await broker.shutdown()


async def _enqueue_late():
    await broker.startup()
    await late.kiq(time.time())
    await broker.shutdown()


def enqueue(n):
    keys.clear()
    asyncio.run(_enqueue(n))


def enqueue_late():
    asyncio.run(_enqueue_late())


def n_left(n):
    while keys and server.exists(*keys[:1000]) == len(keys[:1000]):
        del keys[:1000]
    return len(keys)
