"""arq: two worker processes of up to 100 coroutines each."""

import asyncio
import time

import redis
from arq import create_pool
from arq.connections import RedisSettings

from queues.place import PORT, PROCESSES, PYTHON, note_latency

settings = RedisSettings(host="127.0.0.1", port=PORT)
server = redis.Redis(port=PORT)


async def noop(ctx, a, b):
    return a + b


async def late(ctx, sent):
    note_latency(sent)


class WorkerSettings:
    functions = (noop, late)
    redis_settings = settings
    max_jobs = 100
    poll_delay = 0.05


WORKERS = [[PYTHON, "-m", "arq", "queues.q_arq.WorkerSettings"]] * PROCESSES


async def _enqueue(n):
    pool = await create_pool(settings)
    for at in range(0, n, 100):
        await asyncio.gather(*(pool.enqueue_job("noop", number, 1) for number in range(at, min(at + 100, n))))
    await pool.aclose()


async def _enqueue_late():
    pool = await create_pool(settings)
    await pool.enqueue_job("late", time.time())
    await pool.aclose()


def enqueue(n):
    asyncio.run(_enqueue(n))


def enqueue_late():
    asyncio.run(_enqueue_late())


def n_left(n):
    return server.zcard("arq:queue")
