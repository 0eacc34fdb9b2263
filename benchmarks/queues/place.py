"""Where the queues are: the servers that bench_queue.py has started."""

from __future__ import annotations

import os
import sys
import time

PORT = int(os.environ.get("BENCH_REDIS_PORT", "6379"))
URL = f"redis://127.0.0.1:{PORT}/0"
NATS = f"nats://127.0.0.1:{os.environ.get('BENCH_NATS_PORT', '4222')}"
SQLITE = os.environ.get("BENCH_SQLITE", "bench.db")
JOBS = {"redis": URL, "nats": NATS, "sqlite": f"sqlite:///{SQLITE}"}[os.environ.get("BENCH_PLACE", "redis")]
PYTHON = sys.executable
PROCESSES = 2


def note_latency(sent: float) -> None:
    """Keep how long ago `sent` was."""
    import redis

    now = time.time()
    with redis.Redis(port=PORT) as server:
        server.rpush("latencies", now - sent)
