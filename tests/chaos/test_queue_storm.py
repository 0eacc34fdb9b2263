"""Consumers, workers and servers are killed while jobs run; afterwards every job has had its effect (E5)."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import psutil
import pytest
from scripts import environment
from servers import NatsServer, RedisCluster, RedisServer
from watching import wait_until

from bulkhead import App, BrokerUnavailable
from bulkhead.backends.base import QueueCounts

LEASE = 2.0
N_PRODUCERS = N_CONSUMERS = 3

# Seconds that a consumer has to end when it is told to.
GRACE = 10

# Seconds between two blows.
PAUSE = 0.4


class Storm:
    """Producers, consumers and what befalls them. All processes are gone when it ends."""

    def __init__(self, url: str, folder: Path, n_jobs: int, seed: int) -> None:
        self.folder = folder
        self.n_jobs = n_jobs
        self.blows: Counter[str] = Counter()
        self._rolls = random.Random(seed)
        self._environment = environment() | {
            "STORM_URL": url,
            "STORM_FOLDER": str(folder),
            "STORM_LEASE": str(LEASE),
        }
        self._log = (folder / "consumers.log").open("ab")
        self._consumers: list[subprocess.Popen[bytes]] = []
        self._app = App(url, lease=LEASE)

    def run(self, restart: Callable[[], None] | None, patience: float) -> None:
        share = -(-self.n_jobs // N_PRODUCERS)
        producers = [
            self._launch("-m", "storm_app", str(first), str(min(share, self.n_jobs - first)))
            for first in range(0, self.n_jobs, share)
        ]
        self._consumers = [self._consumer() for _ in range(N_CONSUMERS)]
        deadline = time.monotonic() + patience
        while any(one.poll() is None for one in producers) or not self._is_done():
            assert time.monotonic() < deadline, f"not done: {self.counts()}, {self._n_effects()} effects"
            self._strike(restart)
            time.sleep(self._rolls.uniform(0, PAUSE))
        assert [one.wait() for one in producers] == [0] * len(producers)

    def end(self) -> None:
        for one in self._consumers:
            one.send_signal(signal.SIGCONT)
            one.terminate()
        try:
            for one in self._consumers:
                one.wait(GRACE + 10)
        finally:
            for one in self._consumers:
                one.kill()
                one.wait()
            self._app.close()
            self._log.close()

    def counts(self) -> QueueCounts:
        return self._app.backend.broker.counts().get("default", QueueCounts())

    def _n_effects(self) -> int:
        return sum(len(path.read_bytes().split()) for path in self.folder.glob("effects-*"))

    def check(self) -> None:
        effects = Counter(
            int(line) for path in self.folder.glob("effects-*") for line in path.read_text().split()
        )
        missing = set(range(self.n_jobs)) - effects.keys()
        repeats = sum(effects.values()) - len(effects)
        print(f"\n{self.n_jobs} jobs, {dict(self.blows)}: {repeats} repeats, {len(missing)} missing")
        assert not missing
        assert self.counts() == QueueCounts(), "a lease or a dead letter is left"
        ids = [f"job-{number}" for number in range(self.n_jobs)]
        found = self._app.find_jobs(ids)
        assert {None if one is None else one.state.value for one in found} == {"succeeded"}

    # What befalls them

    def _strike(self, restart: Callable[[], None] | None) -> None:
        blow = self._rolls.choice(
            ["worker"] * 6 + ["consumer"] + ["stop"] + ["server"] * (restart is not None)
        )
        victim = self._rolls.randrange(N_CONSUMERS)
        consumer = self._consumers[victim]
        if blow == "server" and restart is not None:
            if self.blows["server"] >= 3:
                return
            restart()
        elif blow == "stop":
            if self.blows["stop"] >= 3:
                return
            consumer.send_signal(signal.SIGSTOP)
            wakes = threading.Timer(2 * LEASE, lambda: _wake(consumer))
            wakes.start()
        elif blow == "consumer":
            consumer.kill()
            consumer.wait()
            self._consumers[victim] = self._consumer()
        else:
            workers = _workers_of(consumer.pid)
            if not workers:
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._rolls.choice(workers), signal.SIGKILL)
        self.blows[blow] += 1

    def _is_done(self) -> bool:
        try:
            one = self.counts()
        except BrokerUnavailable:
            return False
        return one.ready + one.scheduled + one.running == 0

    def _consumer(self) -> subprocess.Popen[bytes]:
        return self._launch("-m", "bulkhead", "worker", "storm_app:app", "--grace", str(GRACE))

    def _launch(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=self._environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )


def _wake(consumer: subprocess.Popen[bytes]) -> None:
    if consumer.poll() is None:
        consumer.send_signal(signal.SIGCONT)


def _workers_of(pid: int) -> list[int]:
    """Return processes that run jobs, or start those that do."""
    try:
        return [one.pid for one in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


class Place(Protocol):
    url: str

    def restart(self) -> None: ...


@contextlib.contextmanager
def sqlite(folder: Path) -> Iterator[tuple[str, Callable[[], None] | None]]:
    yield f"sqlite:///{folder}/jobs.db", None


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[tuple[str, Callable[[], None] | None]]:
    with RedisServer(folder / "redis", fsync="always") as server:

        def restart() -> None:
            server.kill()
            time.sleep(0.5)
            server.start()

        yield server.url, restart


@contextlib.contextmanager
def redis_cluster(folder: Path) -> Iterator[tuple[str, Callable[[], None] | None]]:
    with RedisCluster(folder / "cluster") as cluster:

        def restart() -> None:
            for node in cluster.nodes:
                node.kill()
            time.sleep(0.5)
            for node in cluster.nodes:
                node.start()

        yield cluster.url, restart


@contextlib.contextmanager
def nats(folder: Path) -> Iterator[tuple[str, Callable[[], None] | None]]:
    with NatsServer(folder / "nats") as server:

        def restart() -> None:
            server.kill()
            time.sleep(0.5)
            server.start()

        yield server.url, restart


PLACES = {"sqlite": sqlite, "redis": redis, "redis cluster": redis_cluster, "nats": nats}


def weather(place: str, folder: Path, n_jobs: int, patience: float) -> None:
    with PLACES[place](folder) as (url, restart):
        storm = Storm(url, folder, n_jobs, seed=5)
        try:
            storm.run(restart, patience)
            wait_until(lambda: storm.counts() == QueueCounts(), "the last leases are over", within=3 * LEASE)
            storm.check()
        finally:
            storm.end()


@pytest.mark.parametrize("place", ["redis", pytest.param("sqlite", marks=pytest.mark.slow)])
def test_no_job_is_lost_in_a_small_storm(place: str, tmp_path: Path) -> None:
    weather(place, tmp_path, 400, 60)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("place", PLACES)
def test_no_job_is_lost_in_a_storm(place: str, tmp_path: Path) -> None:
    weather(place, tmp_path, 20_000, 500)
