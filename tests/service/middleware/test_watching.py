"""Middlewares that only look, or ask less often: heartbeat, logging, poll throttle."""

import gc
import itertools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from consuming import consuming, held, placed
from scripts import running
from watching import wait_until

from bulkhead import App, Backoff, ConfigError, JobState, Unrecoverable
from bulkhead.service.batch import HeldJob
from bulkhead.service.envelope import failure_of
from bulkhead.service.middleware import ConcurrencyLimit, Heartbeat, LogJobs, PollThrottle, consumers
from bulkhead.service.verdicts import Bury, Cancel, Discard, GiveBack, Lost, Succeed, TryAgain, Verdict

CONSUMER = """
import os, time
from bulkhead import App
from bulkhead.service.middleware import Heartbeat

app = App(
    os.environ["URL"],
    namespace=os.environ["NAMESPACE"],
    lease=0.9,
    middlewares=[Heartbeat(every=0.0, expiry=1.5)],
)

@app.task(concurrency=2)
def work(seconds):
    time.sleep(seconds)

if __name__ == "__main__":
    app.run(grace=0.1)
"""


def test_living_consumers_are_listed_with_what_they_do(shared_url: str, namespace: str) -> None:
    app = App(shared_url, namespace=namespace)

    @app.task
    def work(seconds: float) -> None: ...

    began = datetime.now(UTC)
    job_id = work.enqueue(3600.0)
    env = {"URL": shared_url, "NAMESPACE": namespace}
    with running(CONSUMER, env=env) as one:
        wait_until(lambda: any(job_id in info.jobs.get("default", ()) for info in app.consumers()))
        (info,) = consumers(app)
        assert (info.host, info.pid, info.queues) == (socket.gethostname(), one.pid, ("default",))
        assert info.n_jobs == {"default": 1}
        assert began <= info.started_at <= info.beat_at <= datetime.now(UTC)

        with running(CONSUMER, env=env) as other:
            wait_until(lambda: len(app.consumers()) == 2, "the other one")
            # One that ends in good order is gone at once; one that was killed when nothing was heard of it.
            os.kill(other.pid, signal.SIGTERM)
            other.wait()
            assert [info.pid for info in app.consumers()] == [one.pid]

        one.kill_all()
        assert [info.pid for info in app.consumers()] == [one.pid]
        wait_until(lambda: app.consumers() == [], "the killed one is gone")
    app.close()


def test_no_heartbeat_no_consumers(app_with: Callable[..., App]) -> None:
    assert app_with().consumers() == []


@pytest.mark.parametrize("options", [{"expiry": 0}, {"every": -1}, {"every": 20.0, "expiry": 20.0}])
def test_a_bad_heartbeat_is_refused_when_it_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(options)[-1]):
        Heartbeat(**options)


throttled = App("memory://", middlewares=[PollThrottle(empty=0.4)])
logged = App("memory://", middlewares=[LogJobs("jobs of a test")])


@throttled.task(concurrency=1)
def quick() -> None: ...


@logged.task(
    concurrency=1, max_retries=1, backoff=Backoff(initial=0.01, factor=1.0, jitter=0.0, maximum=0.01)
)
def logging_task(how: str) -> None:
    if how == "fail":
        raise ValueError("no luck")
    if how == "hang":
        time.sleep(3600.0)
    if how == "hopeless":
        raise Unrecoverable("no use")


@pytest.fixture
def app(namespace: str) -> Iterator[App]:
    with placed(throttled, "memory://", namespace) as app:
        yield app


def test_an_empty_queue_is_asked_no_more_often_than_it_should(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, float]] = []
    claim = app.backend.broker.claim

    def claimed(queue: str, n: int, lease: float, *, wait: float = 0.0) -> Any:
        asked.append((time.monotonic(), wait))
        return claim(queue, n, lease, wait=wait)

    monkeypatch.setattr(app.backend.broker, "claim", claimed)
    with consuming(app):
        wait_until(lambda: len(asked) >= 4, "four questions")
        job_id = quick.enqueue()
        assert app.wait(job_id, timeout=10).state == JobState.SUCCEEDED

    instants = [instant for instant, _ in asked[:4]]
    assert min(later - one for one, later in itertools.pairwise(instants)) >= 0.4
    assert {wait for _, wait in asked} == {0.0}


def test_a_queue_that_brings_jobs_is_asked_at_once_but_for_the_highest_rate() -> None:
    free, bounded = PollThrottle(empty=10.0), PollThrottle(empty=0.0, every=10.0)

    for middleware, expected in ((free, 3), (bounded, 1)):

        def claim(n: int, middleware: PollThrottle = middleware) -> list[HeldJob]:
            middleware.asked("default", 1)
            return [held()]

        jobs = [middleware.dequeue("default", 1, claim) for _ in range(3)]
        assert sum(map(bool, jobs)) == expected


def test_other_queues_are_not_throttled() -> None:
    middleware = PollThrottle(empty=10.0, queues=["rare"])

    assert middleware.claim_wait("rare") == 0.0
    assert middleware.claim_wait("default") is None
    assert [bool(middleware.dequeue("default", 1, lambda _: [])) for _ in range(3)] == [False] * 3
    assert middleware.dequeue("default", 1, lambda _: [held()]) != []


@pytest.mark.parametrize("options", [{"empty": -1}, {"every": "x"}, {"queues": "rare"}])
def test_a_bad_throttle_is_refused_when_it_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        PollThrottle(**options)


def test_each_attempt_is_logged_with_its_facts(namespace: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "jobs of a test")
    with placed(logged, "memory://", namespace) as app:
        done, failed, hopeless = (logging_task.enqueue(how) for how in ("succeed", "fail", "hopeless"))
        hanging = logging_task.call("hang").options(timeout=0.3, max_retries=0).enqueue()
        with consuming(app):
            for job_id in (done, failed, hopeless, hanging):
                app.wait(job_id, timeout=20)

    records = [record.__dict__ for record in caplog.records if record.name == "jobs of a test"]
    facts = {(one["job_id"], one.get("attempt"), one["outcome"]): one for one in records}
    assert {key for key in facts if key[2] != "given_back"} == {
        (done, None, "enqueued"),
        (failed, None, "enqueued"),
        (hopeless, None, "enqueued"),
        (hanging, None, "enqueued"),
        (done, 1, "succeeded"),
        (failed, 1, "retrying"),
        (failed, 2, "failed"),
        (hopeless, 1, "failed"),
        (hanging, 1, "failed"),
    }
    assert {(one["queue"], one["task"]) for one in records} == {("default", "logging_task")}
    assert all("of logging_task in queue default" in record.getMessage() for record in caplog.records[:4])
    assert facts[done, 1, "succeeded"]["duration_seconds"] > 0
    assert facts[done, 1, "succeeded"]["levelname"] == "INFO"
    assert facts[failed, 1, "retrying"]["error_type"] == "ValueError"
    assert facts[failed, 1, "retrying"]["delay_seconds"] == pytest.approx(0.01)
    assert facts[failed, 2, "failed"]["error"] == "no luck"
    assert facts[hopeless, 1, "failed"]["levelname"] == "ERROR"
    # Also of what did not run to its end.
    assert facts[hanging, 1, "failed"]["error_type"] == "JobTimeout"
    assert 0.3 <= facts[hanging, 1, "failed"]["duration_seconds"] < 20.0


@pytest.mark.parametrize(
    ("verdict", "level", "outcome"),
    [
        (Succeed(b""), "INFO", "succeeded"),
        (TryAgain(1.0, failure_of(OSError("no luck"))), "WARNING", "retrying"),
        (Bury("its worker died", None), "ERROR", "failed"),
        (Discard("too old"), "WARNING", "discarded"),
        (Cancel(), "INFO", "cancelled"),
        (GiveBack(2.0), "DEBUG", "given_back"),
        (Lost(), "WARNING", "lost"),
    ],
)
def test_each_outcome_has_its_level(
    verdict: Verdict, level: str, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "bulkhead.jobs")

    LogJobs().settled(held(), verdict)

    (record,) = caplog.records
    assert (record.levelname, record.__dict__["outcome"]) == (level, outcome)
    assert f"of work in queue default: {outcome}, attempt 1" in record.getMessage()


def test_a_bad_logger_is_refused_when_it_is_made() -> None:
    with pytest.raises(ConfigError, match="logger"):
        LogJobs(5)  # type: ignore[arg-type]


def test_consumers_of_one_process_are_one_until_the_last_ends(app_with: Callable[..., App]) -> None:
    middleware = Heartbeat()
    app = app_with(middleware)
    middleware.started(["a", "b"])
    middleware.started(["b", "c"])
    (info,) = app.consumers()
    assert (info.queues, info.pid) == (("a", "b", "c"), os.getpid())

    middleware.stopped()
    assert app.consumers() == [info]
    middleware.stopped()
    assert app.consumers() == []


def test_consumers_of_one_process_say_together_what_they_hold(app_with: Callable[..., App]) -> None:
    middleware = Heartbeat(every=0.0)
    app = app_with(middleware)
    jobs = [held("a"), held("a"), held("b")]
    go_on, have_said = threading.Event(), threading.Barrier(3)

    def consume(queue: str, some: list[HeldJob]) -> None:
        middleware.started([queue])
        middleware.beat(queue, some)
        have_said.wait(10)
        go_on.wait(10)
        middleware.stopped()

    threads = [threading.Thread(target=consume, args=("a", jobs[:1])) for _ in range(2)]
    for thread in threads:
        thread.start()
    have_said.wait(10)
    middleware.started(["b"])
    middleware.beat("b", jobs[2:])
    (info,) = app.consumers()
    assert (info.n_jobs, set(info.queues)) == ({"a": 2, "b": 1}, {"a", "b"})

    go_on.set()
    for thread in threads:
        thread.join()
    middleware.beat("b", jobs[2:])
    (info,) = app.consumers()
    assert (info.n_jobs, info.queues) == ({"b": 1}, ("b",))
    middleware.stopped()
    assert app.consumers() == []


outside = App("memory://", middlewares=[PollThrottle(empty=30.0), ConcurrencyLimit(1)])


@outside.task(concurrency=2, max_retries=0)
def pass_through(number: int) -> int:
    return number


def test_run_once_asks_though_a_question_was_in_vain_a_moment_ago(namespace: str) -> None:
    with placed(outside, "memory://", namespace) as app:
        assert app.run_once() is None
        pass_through.enqueue(1)
        done = app.run_once()
        assert done is not None
        assert done.state == "succeeded"


def test_a_throttle_outside_a_limit_does_not_wait_for_jobs_that_nobody_asked_for(namespace: str) -> None:
    with placed(outside, "memory://", namespace) as app:
        ids = app.enqueue_many(pass_through.call(number) for number in range(5))
        with consuming(app):
            # While the limit has no room the server is not asked; or it would take minutes.
            assert [app.result(one, timeout=15) for one in ids] == [0, 1, 2, 3, 4]


def test_a_middleware_of_another_application_is_refused() -> None:
    middleware = PollThrottle()
    first = App("memory://", middlewares=[middleware])
    with pytest.raises(ConfigError, match="each application"):
        App("memory://", middlewares=[middleware])
    assert first.middlewares == (middleware,)
    del first
    gc.collect()
    App("memory://", middlewares=[middleware])
