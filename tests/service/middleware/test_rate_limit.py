"""So many starts in a period over all consumers, on each kind of server."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from consuming import held
from jobs import lines
from scripts import running

from bulkhead import App, BrokerUnavailable, ConfigError
from bulkhead.service.batch import HeldJob
from bulkhead.service.middleware import RateLimit
from bulkhead.service.verdicts import GiveBack


def most_in_a_window(began: list[tuple[float, float]], seconds: float) -> int:
    """Return how many starts, known from and up to when, lie within some period for certain."""
    firsts = {first for first, _ in began}
    return max(sum(at <= first and last < at + seconds for first, last in began) for at in firsts)


def take(limit: RateLimit, n: int, queue: str = "default") -> list[HeldJob]:
    jobs = limit.dequeue(queue, n, lambda n: [held(queue) for _ in range(n)])
    return [job for job in jobs if job.verdict is None]


def test_no_period_sees_more_starts_over_all_consumers(app_with: Callable[..., App]) -> None:
    limits = [RateLimit(40, 0.5) for _ in range(3)]
    for limit in limits:
        app_with(limit)
    began: list[tuple[float, float]] = []
    start = time.monotonic()

    def consume(limit: RateLimit) -> None:
        while len(began) < 90:
            assert time.monotonic() < start + 20, f"{len(began)} starts"
            before = time.monotonic()
            # A start counts from where its token is taken, somewhere in the call.
            jobs = take(limit, 8)
            began.extend([(before, time.monotonic())] * len(jobs))
            if time.monotonic() - before < 0.001:
                time.sleep(0.002)

    threads = [threading.Thread(target=consume, args=(limit,)) for limit in limits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(began) <= 40 * (time.monotonic() - start) / 0.5 + 40
    assert most_in_a_window(began, 0.5) <= 40


def test_several_starts_are_taken_in_one_step(
    app_with: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = RateLimit(1000, 1.0, burst=100)
    app = app_with(limit)
    puts: list[str] = []
    put = app.backend.registry.put
    monkeypatch.setattr(
        app.backend.registry, "put", lambda key, *a, **k: puts.append(key) or put(key, *a, **k)
    )

    assert len(take(limit, 100)) == 100

    assert len(puts) == 2  # the reservation, and its use


def test_what_was_reserved_and_not_claimed_is_free_again(app_with: Callable[..., App]) -> None:
    limit = RateLimit(5, 60.0, burst=5)
    app_with(limit)

    def gone(n: int) -> list[HeldJob]:
        raise BrokerUnavailable("gone")

    assert limit.dequeue("default", 5, lambda _: []) == []
    with pytest.raises(BrokerUnavailable):
        limit.dequeue("default", 5, gone)

    assert len(take(limit, 9)) == 5
    assert take(limit, 9) == []


def test_a_clock_that_was_set_back_keeps_nobody_from_asking_for_longer_than_a_minute(
    app_with: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = RateLimit(1, 1.0)
    app_with(limit)
    now, since = time.time(), time.monotonic()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    assert len(take(limit, 1)) == 1
    monkeypatch.setattr(time, "time", lambda: now)
    assert take(limit, 1) == []
    # The clock is right again, and the bucket has ended; a minute has gone by here.
    monkeypatch.setattr(time, "time", lambda: now + 3602)
    monkeypatch.setattr(time, "monotonic", lambda: since + 61)
    assert len(take(limit, 1)) == 1


def test_queues_count_by_themselves(app_with: Callable[..., App]) -> None:
    limit = RateLimit(2, 60.0, burst=2)
    app_with(limit)

    assert len(take(limit, 9)) == 2
    assert len(take(limit, 9, "elsewhere")) == 2


def test_a_job_that_has_to_wait_is_given_back_until_its_turn(app_with: Callable[..., App]) -> None:
    limit = RateLimit(6, 60.0, per="task", tasks=["mail"])
    app_with(limit)
    jobs = [held(task=task) for task in ("mail", "mail", "other", "mail")]

    limit.dequeue("default", 4, lambda _: jobs)

    assert [job.verdict is None for job in jobs] == [True, False, True, False]
    delays = [job.verdict.delay for job in jobs if isinstance(job.verdict, GiveBack)]
    assert delays == [pytest.approx(10.0, abs=0.5), pytest.approx(20.0, abs=0.5)]


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"n": 1, "seconds": 0},
        {"n": 1, "seconds": 1e-310},
        {"n": 1, "seconds": 1e300},
        {"n": 1, "burst": 2},
        {"n": 1, "per": "x"},
    ],
)
def test_a_bad_value_is_refused_when_it_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(options)[-1]):
        RateLimit(**options)


CONSUMER = """
import os, time
from bulkhead import App
from bulkhead.service.middleware import RateLimit
from jobs import note

app = App(os.environ["URL"], namespace=os.environ["NAMESPACE"], middlewares=[RateLimit(20, 1.0)])

@app.task(concurrency=2)
def work(folder):
    note(folder + "/ran", f"{time.monotonic()} {os.getppid()}")

if __name__ == "__main__":
    app.run(grace=5.0)
"""


def test_two_consumer_processes_keep_the_rate_together(
    tmp_path: Path, shared_url: str, namespace: str
) -> None:
    app = App(shared_url, namespace=namespace)

    @app.task
    def work(folder: str) -> None: ...

    env = {"URL": shared_url, "NAMESPACE": namespace}
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(running(CONSUMER, env=env))
        ids = app.enqueue_many(work.call(str(tmp_path)) for _ in range(36))
        for job_id in ids:
            app.wait(job_id, timeout=30)
    app.close()

    began = sorted(float(line.split()[0]) for line in lines(tmp_path / "ran"))
    assert len(began) == 36
    # 35 pauses of 0.05 s; each by itself would have taken half of that.
    assert began[-1] - began[0] >= 1.6
    # A worker may be late by some time, and the next one not: so the window is a little narrower.
    assert most_in_a_window([(at, at) for at in began], 0.7) <= 20
    assert os.getpid() not in {int(line.split()[1]) for line in lines(tmp_path / "ran")}
