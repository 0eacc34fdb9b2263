"""Who waits for a job in a SQLite file: woken soon, and at rest until then."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scripts import running
from sqlite_files import OPENING, connected

from bulkhead.backends.base import Backend, Message
from bulkhead.backends.sqlite import file as sqlite_file
from bulkhead.backends.sqlite import watching
from bulkhead.backends.sqlite.broker import SqliteBroker


@pytest.mark.parametrize("told", ["by the system", "by nobody"])
def test_a_job_that_another_process_enqueues_is_claimed_within_20_ms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    code = """
for i in range(30):
    time.sleep(0.013)
    broker.enqueue_many([Message(str(i), "q", str(time.time()).encode())])
"""
    if told == "by nobody":  # as where the system has no more watches to give
        monkeypatch.setattr(watching._Watch, "made", lambda: None)
    path = tmp_path / "jobs.db"
    lags = []
    with connected(path) as backend, running(OPENING.format(url=f"sqlite:///{path}") + code) as script:
        script.wait_for_line("ready")
        while len(lags) < 30:
            for claim in backend.broker.claim("q", 1, 60.0, wait=5.0):
                lags.append(time.time() - float(claim.body))
                backend.broker.ack([claim.hold])
    lags.sort()
    print(f"median {lags[15] * 1e3:.1f} ms, worst {lags[-1] * 1e3:.1f} ms")
    assert lags[15] < 0.02


def _looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    looks: list[int] = []
    version = sqlite_file.File.version
    monkeypatch.setattr(sqlite_file.File, "version", lambda self: looks.append(1) or version(self))
    return looks


def test_who_waits_for_long_looks_once_a_second_and_takes_next_to_no_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = _looks(monkeypatch)
    with connected(tmp_path / "jobs.db") as backend:
        start, cpu = time.monotonic(), time.thread_time()
        assert backend.broker.claim("q", 1, 60.0, wait=1.0) == []
        seconds, used = time.monotonic() - start, time.thread_time() - cpu
    print(f"{len(looks)} looks, {used * 1e3:.1f} ms of CPU in {seconds:.2f} s")
    assert len(looks) <= 10
    assert used < 0.02


def test_a_flood_of_commits_that_concern_nobody_has_who_waits_look_100_times_a_second_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "jobs.db"
    with connected(path) as backend, connected(path) as other, ThreadPoolExecutor(1) as threads:
        looks = []
        ready_at = SqliteBroker._ready_at
        monkeypatch.setattr(SqliteBroker, "_ready_at", lambda *given: looks.append(1) or ready_at(*given))
        start = time.monotonic()
        waiting = threads.submit(backend.broker.claim, "q", 1, 60.0, wait=0.5)
        commits = 0
        while not waiting.done():
            other.registry.put("k", b"")
            commits += 1
        seconds = time.monotonic() - start
    print(f"{commits} commits, {len(looks)} looks in {seconds:.2f} s")
    assert commits > 100
    assert len(looks) <= 100 * seconds + 5


def _lag(claimer: Callable[[], object], enqueue: Callable[[], object]) -> float:
    """Seconds from the enqueueing to the end of a claim that had been waiting."""
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(claimer)
        time.sleep(0.02)  # it is to be in its wait; were it not, this would only be easier
        enqueue()
        start = time.monotonic()
        assert len(waiting.result()) == 1
        return time.monotonic() - start


def test_a_job_that_another_thread_enqueues_is_claimed_at_once(tmp_path: Path) -> None:
    with connected(tmp_path / "jobs.db") as backend:
        lags = [
            _lag(
                lambda: backend.broker.claim("q", 1, 60.0, wait=5.0),
                lambda i=i: backend.broker.enqueue_many([Message(f"{i}", "q", b"")]),
            )
            for i in range(15)
        ]
    print(f"median {sorted(lags)[7] * 1e3:.1f} ms")
    assert min(lags) < 0.005


def test_when_the_thread_that_leads_leaves_another_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    with connected(path) as backend, connected(path) as other:
        lags = []
        for i in range(8):
            with ThreadPoolExecutor(3) as threads:
                short = [
                    threads.submit(backend.broker.claim, f"s{n}", 1, 60.0, wait=0.01 * n) for n in (1, 2)
                ]
                lags.append(
                    _lag(
                        lambda: backend.broker.claim("q", 1, 60.0, wait=5.0),
                        lambda i=i: other.broker.enqueue_many([Message(f"{i}", "q", b"")]),
                    )
                )
                assert [wait.result() for wait in short] == [[], []]
    print(f"median {sorted(lags)[4] * 1e3:.1f} ms")
    assert sorted(lags)[4] < 0.02


def test_each_of_many_that_wait_gets_what_it_waits_for(tmp_path: Path) -> None:
    def claim(backend: Backend, queue: str) -> list[str]:
        return [claim.id for claim in backend.broker.claim(queue, 1, 60.0, wait=20.0)]

    path = tmp_path / "jobs.db"
    queues = [f"q{i}" for i in range(12)]
    with connected(path) as backend, connected(path) as other, ThreadPoolExecutor(12) as threads:
        start = time.monotonic()
        waiting = [threads.submit(claim, backend, queue) for queue in queues]
        for queue in reversed(queues):
            other.broker.enqueue_many([Message(f"for {queue}", queue, b"", delay=0.05)])
        assert [wait.result() for wait in waiting] == [[f"for {queue}"] for queue in queues]
        assert time.monotonic() - start < 10.0


def test_closing_while_many_wait_ends_them_all_and_leaves_nothing_open(tmp_path: Path) -> None:
    ended: list[str] = []

    def wait(backend: Backend) -> None:
        try:
            backend.broker.claim("q", 1, 60.0, wait=30.0)
        except ConnectionError as error:
            ended.append(str(error))

    for _ in range(5):
        with connected(tmp_path / "jobs.db") as backend:
            waiting = [threading.Thread(target=wait, args=[backend]) for _ in range(4)]
            for thread in waiting:
                thread.start()
        for thread in waiting:
            thread.join(5.0)
            assert not thread.is_alive()
    assert len(ended) == 20
    assert all("was closed" in text for text in ended)
