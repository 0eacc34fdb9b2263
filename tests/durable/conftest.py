"""The application of `durable_jobs`, on each backend."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import durable_jobs
import pytest
from redis import Redis

from bulkhead import App

BACKENDS: dict[str, str | None] = {
    "memory": None,
    "sqlite": None,
    "redis": "redis_server",
    "redis cluster": "redis_cluster",
    "nats": "nats_server",
}

# Those that more than one process can use.
SHARED = [name for name in BACKENDS if name not in ("memory", "redis cluster")]
# Slow, as each test of killed workers takes seconds, and what a cluster has of its own is tried without killing any.
SHARED_TOO = pytest.param("redis cluster", marks=pytest.mark.slow)


# Why of the session: a server is started before a test's traces are counted.
@pytest.fixture(scope="session", params=list(BACKENDS))
def place(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    return _place(request, request.param)


@pytest.fixture(scope="session", params=[*SHARED, SHARED_TOO])
def shared_place(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    return _place(request, request.param)


def _place(request: pytest.FixtureRequest, name: str) -> Callable[[Path], str]:
    server = BACKENDS[name]
    if server is not None:
        url = request.getfixturevalue(server).url
        return lambda folder: url
    if name == "sqlite":
        return lambda folder: f"sqlite:///{folder}/jobs.db"
    return lambda folder: f"memory://{uuid4().hex}"


@pytest.fixture(scope="module")
def served(place: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """The application with two consumers; one for a whole module, as they take a second to start."""
    with durable_jobs.placed(place(tmp_path_factory.mktemp("place"))) as app, durable_jobs.consuming(2):
        for name in durable_jobs.BEATS:
            app.add_schedule(name, "@every 1s", durable_jobs.aside.call(name), missed="all")
        app.add_schedule("failing beat", "@every 1s", durable_jobs.fail.call())
        # Why so many: all workers are there before the first test looks at what it leaves behind.
        warm = [durable_jobs.nap.call(0.2) for _ in range(8)]
        side = [durable_jobs.aside.call(0.2) for _ in range(2)]
        for job in app.enqueue_many(warm + side):
            app.wait(job, timeout=60.0)
        _open_connections(app)
        yield app


def _open_connections(app: App, n: int = 24) -> None:
    """Let as many connections to a Redis be open as the consumers' threads may ever use at once."""
    if not app.url.startswith("redis"):
        return
    pids = _pids(app.url)
    # Why stopped: so that each waits for its answer, and none takes the connection of one that has got it.
    _signal(pids, signal.SIGSTOP)
    try:
        questions = (app.counts, app.paused, lambda: app.backend.registry.get("nothing"))
        with ThreadPoolExecutor(len(questions) * n) as threads:
            asked = [threads.submit(one) for one in questions for _ in range(n)]
            time.sleep(0.3)
            _signal(pids, signal.SIGCONT)
            for one in asked:
                one.result()
    finally:
        _signal(pids, signal.SIGCONT)


def _pids(url: str) -> list[int]:
    """Return the processes of a Redis, or of all nodes of a cluster."""
    with Redis.from_url(url.replace("redis+cluster:", "redis:")) as client:
        info = client.info()
        nodes = client.cluster("nodes") if info.get("cluster_enabled") else {}
    if not nodes:
        return [info["process_id"]]
    found = []
    for address in nodes:
        with Redis.from_url(f"redis://{address.partition('@')[0]}") as client:
            found.append(client.info("server")["process_id"])
    return found


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


@pytest.fixture
def shared_app(shared_place: Callable[[Path], str], tmp_path: Path) -> Iterator[App]:
    with durable_jobs.placed(shared_place(tmp_path)) as app:
        yield app


@pytest.fixture
def memory_app() -> Iterator[App]:
    with durable_jobs.placed(f"memory://{uuid4().hex}") as app:
        yield app
