"""Several processes on one SQLite file: who sees what when, who is killed where, who forks."""

import json
import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from scripts import Script, running
from sqlite_files import OPENING, connected
from watching import wait_until

from bulkhead.backends.base import Backend, Message, OutcomeState, Place
from bulkhead.backends.sqlite import file as sqlite_file
from bulkhead.errors import BrokerUnavailable


def _script(path: Path, code: str) -> str:
    return OPENING.format(url=f"sqlite:///{path}") + code


def test_4_processes_claim_1000_jobs_each_exactly_once(tmp_path: Path) -> None:
    code = """
while "q" not in broker.counts():
    time.sleep(0.001)
mine = []
while claims := broker.claim("q", 5, 60.0):
    assert all(broker.ack([claim.hold for claim in claims]))
    mine += [claim.id for claim in claims]
say("mine", json.dumps(mine))
"""
    path = tmp_path / "jobs.db"
    with connected(path) as backend, ExitStack() as stack:
        scripts = [stack.enter_context(running(_script(path, code))) for _ in range(4)]
        for script in scripts:
            script.wait_for_line("ready")
        backend.broker.enqueue_many([Message(f"{i}", "q", b"") for i in range(1000)])
        found = [json.loads(script.wait_for_line("mine")[5:]) for script in scripts]
        assert backend.broker.counts() == {}
    print([len(mine) for mine in found])
    assert Counter(name for mine in found for name in mine) == Counter(f"{i}" for i in range(1000))


STORM = """
me = os.getpid()
n = 0
while True:
    names = [f"{me}-{n}-{i}" for i in range(20)]
    assert all(broker.enqueue_many([Message(name, "q", b"x" * 500, remember=60.0) for name in names]))
    say("kept", *names)
    claims = broker.claim("q", 15, 1.0)
    settled = claims[:10]
    results.save_many([Outcome(c.id, "q", "t", OutcomeState.SUCCEEDED, c.id.encode()) for c in settled])
    say("saved", *(c.id for c in settled))
    acked = broker.ack([c.hold for c in settled])
    say("acked", *(c.id for c, is_done in zip(settled, acked) if is_done))
    broker.nack([Return(c.hold, 0.01) for c in claims[10:12]])
    broker.bury([Burial(c.hold, "why") for c in claims[12:13]])
    backend.registry.put("n", str(n).encode())
    n += 1
"""


def _said(script: Script, word: str) -> list[str]:
    lines = script.output().split("\n")[:-1]
    return [name for line in lines if line.startswith(word) for name in line.split()[1:]]


def _storm(path: Path, rounds: int) -> None:
    kept: list[str] = []
    acked: list[str] = []
    saved: list[str] = []
    chance = random.Random(1)
    with connected(path) as backend:
        for _ in range(rounds):
            with running(_script(path, STORM)) as one, running(_script(path, STORM)) as two:
                for script in (one, two):
                    script.wait_for_line("acked")
                    # Why seconds: the kill is to strike anywhere.
                    time.sleep(chance.uniform(0.0, 0.1))
                    os.kill(script.pid, signal.SIGKILL)
                    script.wait()
                    # Nobody who is alive is held up by the dead.
                    start = time.monotonic()
                    backend.broker.pause("unused")
                    assert time.monotonic() - start < 2.0
                for script in (one, two):
                    kept += _said(script, "kept")
                    acked += _said(script, "acked")
                    saved += _said(script, "saved")
        with sqlite3.connect(path) as reader:
            assert reader.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        reader.close()
        _check(backend, kept, acked, saved)


def _check(backend: Backend, kept: list[str], acked: list[str], saved: list[str]) -> None:
    assert max(Counter(acked).values()) == 1
    gone = [name for name, record in zip(kept, backend.broker.find(kept), strict=True) if record is None]
    # Not compared with `gone`: one may have acked what another had enqueued and could not tell of any more.
    assert not any(backend.broker.find(acked))
    # An ack may have been done of which the killed one could not tell; its outcome had been saved before.
    assert None not in backend.results.get_many(saved)
    assert None not in backend.results.get_many(gone)
    # Leases end: what is left can be claimed, dead letters apart.
    wait_until(lambda: backend.broker.counts()["q"].running == 0, "the leases to end")
    wait_until(lambda: backend.broker.counts()["q"].scheduled == 0, "the delays to end")
    dead = {record.id for record in backend.broker.records(Place.DEAD, limit=10**6)}
    rest = {claim.id for claim in backend.broker.claim("q", 10**6, 60.0)}
    print(f"{len(kept)} kept, {len(gone)} gone, {len(acked)} acked, {len(rest)} left, {len(dead)} dead")
    assert set(kept) - set(gone) <= rest | dead


def test_processes_that_are_killed_lose_nothing_and_hold_nothing(tmp_path: Path) -> None:
    _storm(tmp_path / "jobs.db", rounds=2)


@pytest.mark.slow
def test_100_processes_that_are_killed_lose_nothing_and_hold_nothing(tmp_path: Path) -> None:
    _storm(tmp_path / "jobs.db", rounds=50)


def test_a_process_killed_in_the_middle_of_its_transaction_leaves_nothing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    code = """
def half(connection):
    connection.execute("DELETE FROM jobs")
    connection.execute("INSERT INTO paused VALUES ('bulkhead', 'q')")
    say("amid")
    time.sleep(1000)

broker._file.change(half)
"""
    with connected(path) as backend:
        backend.broker.enqueue_many([Message("a", "q", b"")])
        with running(_script(path, code)) as script:
            script.wait_for_line("amid")
            os.kill(script.pid, signal.SIGKILL)
            script.wait()
            start = time.monotonic()
            assert backend.broker.enqueue_many([Message("b", "q", b"")]) == [True]
            assert time.monotonic() - start < 1.0
        assert backend.broker.paused() == frozenset()
        assert [claim.id for claim in backend.broker.claim("q", 5, 60.0)] == ["a", "b"]


def test_a_process_whose_lease_ran_out_while_it_was_stopped_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    code = """
[claim] = broker.claim("q", 1, 0.3)
say("claimed")
time.sleep(0.1)
while broker.find(["a"])[0].attempt < 2:
    time.sleep(0.01)
say("late", broker.ack([claim.hold]), broker.renew([claim.hold], 60.0)[0].value)
"""
    with connected(path) as backend:
        backend.broker.enqueue_many([Message("a", "q", b"")])
        with running(_script(path, code)) as script:
            script.wait_for_line("claimed")
            os.kill(script.pid, signal.SIGSTOP)
            claims = []
            while not claims:
                claims = backend.broker.claim("q", 1, 60.0, wait=5.0)
            script.resume()
            assert script.wait_for_line("late") == "late [False] lost"
        assert claims[0].attempt == 2
        assert backend.broker.ack([claims[0].hold]) == [True]


def test_many_that_wait_do_not_keep_the_log_from_being_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    body = b"x" * 1_000_000
    with ExitStack() as stack:
        backend = stack.enter_context(connected(path))
        waiters = [stack.enter_context(connected(path)) for _ in range(4)]
        with ThreadPoolExecutor(4) as threads:
            waits = [threads.submit(waiter.broker.claim, "else", 1, 60.0, wait=60.0) for waiter in waiters]
            for i in range(40):
                backend.broker.enqueue_many([Message(f"{i}", "q", body)])
                backend.broker.delete([f"{i}"])
            size = (tmp_path / "jobs.db-wal").stat().st_size
            backend.broker.enqueue_many([Message(f"for {i}", "else", b"") for i in range(4)])
            assert sorted(len(wait.result()) for wait in waits) == [1, 1, 1, 1]
    print(f"{size / 1e6:.1f} MB")
    assert size < 40e6


def test_a_fork_beside_a_thread_that_waits_leaves_both_sides_able(tmp_path: Path) -> None:
    with connected(tmp_path / "jobs.db") as backend, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(backend.broker.claim, "q", 1, 60.0, wait=30.0)
        time.sleep(0.05)
        child = _fork(lambda: backend.broker.enqueue_many([Message("a", "q", b"from the copy")]) == [True])
        assert [claim.body for claim in waiting.result()] == [b"from the copy"]
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert backend.broker.counts()["q"].running == 1


def test_forks_in_the_middle_of_everything_lose_nothing(tmp_path: Path) -> None:
    with connected(tmp_path / "jobs.db") as backend:
        stop = threading.Event()
        kept: list[str] = []

        def enqueue(who: int) -> None:
            n = 0
            while not stop.is_set():
                backend.broker.enqueue_many([Message(f"{who}-{n}", "q", b"")])
                kept.append(f"{who}-{n}")
                n += 1

        with ThreadPoolExecutor(3) as threads:
            running = [threads.submit(enqueue, who) for who in range(3)]
            for i in range(15):
                child = _fork(
                    lambda i=i: backend.broker.enqueue_many([Message(f"child {i}", "q", b"")]) == [True]
                )
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            stop.set()
            for thread in running:
                thread.result()
        kept += [f"child {i}" for i in range(15)]
        assert backend.broker.counts()["q"].ready == len(kept)
        assert None not in backend.broker.find(kept)


def test_what_a_copy_writes_after_its_parent_has_closed_is_kept(tmp_path: Path) -> None:
    with connected(tmp_path / "jobs.db") as backend:
        backend.broker.enqueue_many([Message("a", "q", b"")])
        backend.broker.counts()
        ready, tell_ready = os.pipe()
        closed, tell_closed = os.pipe()

        def write_late() -> bool:
            os.close(tell_closed)
            backend.broker.enqueue_many([Message("b", "q", b"")])
            os.write(tell_ready, b"!")
            os.read(closed, 1)
            return backend.broker.enqueue_many([Message("c", "q", b"")]) == [True]

        child = _fork(write_late)
        os.read(ready, 1)
        backend.close()  # who believes to be the last one here removes the log
        os.write(tell_closed, b"!")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for end in (ready, tell_ready, closed, tell_closed):
            os.close(end)
    with connected(tmp_path / "jobs.db") as again:
        assert [claim.id for claim in again.broker.claim("q", 5, 60.0)] == ["a", "b", "c"]


def test_a_copy_made_in_the_middle_of_a_transaction_is_told_to_connect_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "_FORK_PATIENCE", 0.05)
    path = tmp_path / "jobs.db"
    amid, go_on = threading.Event(), threading.Event()

    def half(connection: sqlite3.Connection) -> None:
        amid.set()
        go_on.wait()

    def is_told() -> bool:
        try:
            backend.broker.counts()
        except BrokerUnavailable as error:
            return "connect anew" in str(error)
        return False

    with connected(path) as backend, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(backend.broker._file.change, half)
        amid.wait()
        child = _fork(is_told)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        go_on.set()
        waiting.result()
        assert backend.broker.enqueue_many([Message("a", "q", b"")]) == [True]


def _fork(work) -> int:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads beside a fork are what is tested
        child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(20)
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return child


@pytest.mark.slow
def test_100_000_jobs_go_in_with_one_call_and_out_in_their_order(tmp_path: Path) -> None:
    with connected(tmp_path / "jobs.db") as backend:
        names = [f"{i}" for i in range(100_000)]
        assert all(backend.broker.enqueue_many([Message(name, "q", b"") for name in names]))
        assert (
            backend.broker.enqueue_many([Message(name, "q", b"") for name in names[::1000]]) == [False] * 100
        )
        found = []
        while claims := backend.broker.claim("q", 1000, 60.0):
            found += [claim.id for claim in claims]
            assert all(backend.broker.ack([claim.hold for claim in claims]))
        assert found == names


def test_outcomes_of_a_journal_are_there_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    code = """
for i in range(10**6):
    results.save_many([Outcome(str(i), "q", "t", OutcomeState.SUCCEEDED, b"x")])
    say("saved", i)
"""
    with running(_script(path, code).replace("run.db", "run.db?synchronous=full")) as script:
        wait_until(lambda: len(_said(script, "saved")) > 200, "200 outcomes")
        os.kill(script.pid, signal.SIGKILL)
        script.wait()
        saved = _said(script, "saved")
    with connected(path) as backend:
        assert None not in backend.results.get_many(saved)
        assert backend.results.counts()[OutcomeState.SUCCEEDED] - len(saved) in (0, 1)
