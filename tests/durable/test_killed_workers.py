"""Workers as processes of their own that are killed or stopped in the middle, on each server that several can use."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
from durable_jobs import aside, consuming, give, note, note_previous
from jobs import lines
from scripts import Script, running
from watching import wait_until

from bulkhead import App

SOON = 60.0

WORKER = """
from durable_jobs import app

if __name__ == "__main__":
    app.backend
    print("ready", flush=True)
    app.run(grace=0.1)
"""

# A worker that is killed or stopped when it enqueues the first or second thousand of a group. From its first claim
# until then it claims nothing: stopped in the middle of a claim it would keep the whole file of SQLite locked.
DYING = """
import os
import signal
import time

from durable_jobs import app

if __name__ == "__main__":
    broker = app.backend.broker
    enqueue, claim = broker.enqueue_many, broker.claim
    n_calls, n_claims, is_back = 0, 0, False

    def enqueue_many(messages):
        global n_calls, is_back
        n_calls += 1
        if n_calls != {at}:
            return enqueue(messages)
        print("dying", flush=True)
        os.kill(os.getpid(), signal.{signal})
        time.sleep(0.5)  # another thread may be the one that takes the signal, and this one goes on until it has
        kept = enqueue(messages)
        is_back = True
        print("kept", sum(kept), flush=True)
        return kept

    def claim_once(*args, **options):
        global n_claims
        if n_claims and not is_back:
            time.sleep(0.1)
            return []
        claims = claim(*args, **options)
        n_claims += len(claims)
        return claims

    broker.enqueue_many, broker.claim = enqueue_many, claim_once
    app.run(["default"])
"""


@contextlib.contextmanager
def worker(app: App, code: str = WORKER) -> Iterator[Script]:
    with running(code, env={"BULKHEAD_URL": app.url, "BULKHEAD_NAMESPACE": app.namespace}) as script:
        yield script


def test_killed_while_it_takes_a_group_apart_another_does_the_rest_and_each_job_runs_once(
    shared_app, tmp_path
):
    app, path = shared_app, str(tmp_path / "notes")
    group = app.enqueue_group([note.call(path, str(n)) for n in range(1200)])
    with worker(app, DYING.format(at=2, signal="SIGKILL")) as script:
        script.wait_for_line("dying")
        assert script.wait() == -signal.SIGKILL
    counts = app.group_status(group).counts
    assert sum(counts.values()) == 1200
    with consuming(queues=["default"]):
        assert app.wait_group(group, timeout=SOON).counts == {"succeeded": 1200}
    # Why not each line once: what the killed worker had begun of the first thousand runs again.
    assert {*lines(path)} == {str(n) for n in range(1200)}
    assert len(lines(path)) <= 1200 + 100
    assert app.group_results(group) == [str(n) for n in range(1200)]


def test_stopped_while_it_takes_a_group_apart_what_it_does_later_changes_nothing(shared_app, tmp_path):
    app, path = shared_app, str(tmp_path / "notes")
    group = app.enqueue_group([note.call(path, str(n)) for n in range(10)])
    with worker(app, DYING.format(at=1, signal="SIGSTOP")) as script:
        script.wait_for_line("dying")
        wait_until(script.is_stopped)
        with consuming(queues=["default"]):
            status = app.wait_group(group, timeout=SOON)
            assert status.state == "succeeded", (status, app.dead())
            script.resume()
            assert script.wait_for_line("kept") == "kept 0"
            later = app.enqueue_many([note.call(path, f"later {n}") for n in range(20)])
            for job in later:
                app.wait(job, timeout=SOON)
    assert Counter(lines(path)) == Counter([*map(str, range(10)), *(f"later {n}" for n in range(20))])


@pytest.mark.slow
def test_chains_go_on_whoever_is_killed_and_no_job_begins_before_the_one_before_has_ended(
    shared_app, tmp_path
):
    app, path = shared_app, tmp_path
    chains = [
        app.enqueue_chain([give.call(n), *(note_previous.call(str(path / str(n))) for _ in range(5))])
        for n in range(40)
    ]
    deadline = time.monotonic() + SOON
    while not all(app.group_status(chain).is_settled for chain in chains) and time.monotonic() < deadline:
        with worker(app) as script:
            script.wait_for_line("ready")
            time.sleep(random.uniform(0.5, 2.5))
            os.kill(script.pid, signal.SIGKILL)
    for n, chain in enumerate(chains):
        assert app.group_results(chain) == [n] * 6
        begun = list(dict.fromkeys(lines(path / str(n))))
        assert begun == [f"{chain}.{link}" for link in range(1, 6)]


@pytest.mark.slow
def test_schedules_come_each_time_and_once_while_workers_are_killed_and_stopped(shared_app):
    app = shared_app
    names = [f"s{n}" for n in range(5)]
    for name in names:
        app.add_schedule(name, "@every 1s", aside.call(name), missed="all")
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(worker(app)) for _ in range(3)]
        for one in workers:
            one.wait_for_line("ready")
        while time.monotonic() < began + 25:
            time.sleep(random.uniform(0.1, 0.6))
            victim = random.randrange(3)
            if random.random() < 0.3:
                os.kill(workers[victim].pid, signal.SIGKILL)
                workers[victim] = stack.enter_context(worker(app))
            else:
                os.kill(workers[victim].pid, signal.SIGSTOP)
                time.sleep(random.uniform(0.0, 2.0))
                workers[victim].resume()
        for name in names:
            app.pause_schedule(name)
        wait_until(
            lambda: sum(app.counts()[state] for state in ("queued", "scheduled", "running")) == 0, within=SOON
        )
    dues: dict[str, list[int]] = {name: [] for name in names}
    for job in app.jobs("succeeded", limit=10_000):
        _, name, due = job.id.split(":")
        dues[name].append(int(due))
    for name in names:
        found = sorted(dues[name])
        assert len(found) >= 20
        assert {later - earlier for earlier, later in pairwise(found)} == {1000}
