"""A script that is started again goes on where it was killed (A21)."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from pathlib import Path

import jobs
import pytest
from gates import Gate
from scripts import running
from watching import wait_until

from bulkhead import (
    BrokerUnavailable,
    BulkheadError,
    ConfigError,
    ConfigTypeError,
    Dispatcher,
    DuplicateJobId,
    Job,
    Pool,
    chain,
    group,
)

N_JOBS = 1000

SCRIPT = """
import os
import jobs
from bulkhead import Dispatcher, Job

if __name__ == "__main__":
    os.chdir({folder!r})
    with Dispatcher([(0, 2)], journal="run.db") as disp, open("seen", "a") as seen:
        for number in range({n}):
            tracker = disp.dispatch(Job(jobs.note_and_give, {folder!r} + "/ran", number).options(id=number))
            tracker.add_done_callback(lambda done: print(done.id, file=seen, flush=True))
        disp.barrier()
        assert sorted(job.result() for job in disp.jobs()) == list(range({n}))
    print("done", flush=True)
"""


def lines(path: Path) -> list[int]:
    # The last line may have been cut off by a kill.
    return [int(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def recorded(path: Path) -> list[str]:
    with sqlite3.connect(path) as connection:
        found = [row[0] for row in connection.execute("SELECT id FROM outcomes")]
    connection.close()
    return found


def test_a_script_that_is_killed_ten_times_has_each_success_recorded_once(tmp_path: Path) -> None:
    code = SCRIPT.format(n=N_JOBS, folder=str(tmp_path))
    rolls = random.Random(4)
    for number in range(10):
        before = len(lines(tmp_path / "ran"))
        with running(code) as script:
            wait_until(lambda before=before: len(lines(tmp_path / "ran")) > before + 30, "jobs of this run")
            time.sleep(rolls.uniform(0, 0.01))
            os.kill(script.pid, signal.SIGKILL)
            script.wait()
        seen = {repr(one) for one in lines(tmp_path / "seen")}
        assert seen <= set(recorded(tmp_path / "run.db")), f"after kill {number + 1} a success is lost"
    ran_before = Counter(lines(tmp_path / "ran"))
    kept = set(recorded(tmp_path / "run.db"))
    assert len(kept) < N_JOBS, "the kills came too late to prove anything"
    with running(code) as script:
        assert script.wait(60) == 0
    ran = Counter(lines(tmp_path / "ran"))
    assert sorted(recorded(tmp_path / "run.db")) == sorted(map(repr, range(N_JOBS)))
    assert not [one for one in kept if ran[int(one)] != ran_before[int(one)]], "a recorded job ran again"
    # A job may run twice only if its script was killed between its end and the record: two workers, ten kills.
    assert sum(ran.values()) <= N_JOBS + 10 * 2


def test_a_recorded_job_is_not_run_again_and_answers_from_the_record(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    with Dispatcher([(0, 1)], journal=path) as disp:
        first = disp.dispatch(Job(os.getpid).options(id="pid")).result()
    with Dispatcher([(0, 1)], journal=str(path)) as disp:
        again = disp.dispatch(Job(os.getpid).options(id="pid"))
        assert again.done()
        assert again.result() == first
        assert disp.job("pid") is again
        assert again.status().state == "succeeded"
        called = []
        again.add_done_callback(called.append)
        wait_until(lambda: called == [again], "the callback")
        assert disp.try_dispatch(Job(os.getpid).options(id="pid")).result() == first
        assert [one.result() for one in disp.dispatch_all([Job(os.getpid).options(id="pid")])] == [first]
        assert disp.dispatch(Job(os.getpid)).result() != first


def test_failures_and_jobs_without_an_id_of_their_own_run_again(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    for _ in range(2):
        with Dispatcher([(0, 1)], journal=path) as disp:
            assert isinstance(disp.dispatch(Job(jobs.fail).options(id="bad")).exception(), ValueError)
            disp.dispatch(Job(pow, 2, 3)).result()
            disp.barrier(check=False)
    assert recorded(path) == []


def test_what_is_recorded_of_chains_and_groups_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    parts = [
        Job(os.getpid).options(id="a"),
        group([Job(max, 5).options(id="b"), Job(jobs.fail).options(id="c")]),
    ]
    with Dispatcher([(0, 2)], journal=path) as disp:
        tracker = disp.dispatch(chain(parts))
        tracker.wait()
        pid = disp.job("a").result()
    assert sorted(recorded(path)) == ["'a'", "'b'"]
    with Dispatcher([(0, 2)], journal=path) as disp:
        disp.dispatch(chain([parts[0], Job(min, 10**9).options(id="d")])).result()
        assert disp.job("a").result() == pid
        assert disp.job("d").result() == pid
        follower = Job(os.getpid).options(id="a", on_success=Job(max, 0).options(id="e"))
        assert disp.dispatch(follower).result() == pid
        disp.barrier()
        assert disp.job("e").result() == pid


def test_a_success_that_cannot_be_recorded_is_a_failure_that_says_so(tmp_path: Path, gate: Gate) -> None:
    path = tmp_path / "run.db"
    with Dispatcher([(0, 1)], journal=path) as disp:
        tracker = disp.dispatch(gate.job().options(id="x"))
        with sqlite3.connect(path) as connection:
            connection.execute("DROP TABLE outcomes")
        connection.close()
        gate.open()
        error = tracker.exception()
        assert isinstance(error, BulkheadError)
        assert "journal" in str(error)
        assert disp.dispatch(Job(pow, 2, 3)).result() == 8


def test_two_pools_record_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    with Dispatcher([Pool(0, 1), Pool(1, 1)], journal=path) as disp:
        for number in range(100):
            disp.dispatch(Job(abs, number).options(id=(number, "x"), priority=number % 2))
        disp.barrier()
    assert len(recorded(path)) == 100


@pytest.mark.parametrize("bad", [3, b"x", True], ids=str)
def test_a_journal_that_is_no_path_is_refused(bad: object) -> None:
    with pytest.raises(ConfigTypeError, match="journal"):
        Dispatcher([(0, 1)], journal=bad)  # type: ignore[arg-type]


def test_a_journal_that_cannot_be_opened_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, BrokerUnavailable)):
        Dispatcher([(0, 1)], journal=tmp_path / "no" / "run.db")
    (tmp_path / "text").write_text("no database, but long enough to be taken for one" * 100)
    with pytest.raises((ConfigError, BrokerUnavailable)):
        Dispatcher([(0, 1)], journal=tmp_path / "text")


def test_a_pool_that_is_refused_leaves_no_journal_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Exception, match="pickle") as caught:
        Dispatcher(
            [Pool(0, 1, initializer=jobs.note, initargs=(threading.Lock(),))], journal=tmp_path / "run.db"
        )
    assert len(os.listdir("/proc/self/fd")) == before, caught.value


def test_an_id_that_the_next_run_could_not_find_is_refused(tmp_path: Path) -> None:
    with Dispatcher([(0, 1)], journal=tmp_path / "run.db") as disp:
        deep: tuple[object, ...] = ()
        for _ in range(5000):
            deep = (deep,)
        for bad in (object(), frozenset({1}), ("a", object()), 10**5000, deep):
            with pytest.raises(ConfigTypeError, match="id"):
                disp.dispatch(Job(pow, 2, 3).options(id=bad))
        assert disp.dispatch(Job(pow, 2, 3).options(id=("a", 1, b"x", None))).result() == 8


def test_a_live_job_of_the_same_id_is_still_refused(tmp_path: Path, gate: Gate) -> None:
    with Dispatcher([(0, 1)], journal=tmp_path / "run.db") as disp:
        disp.dispatch(gate.job().options(id="x"))
        with pytest.raises(DuplicateJobId):
            disp.try_dispatch(Job(pow, 2, 3).options(id="x"))
        gate.open()
