"""Jobs that are dropped: they have failed with a reason, and leave no dead letter."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec
import pytest
from consuming import consuming, held, placed
from watching import wait_until

from bulkhead import App, Backoff, ConfigError, JobDiscarded, JobState, Unrecoverable
from bulkhead.service.app import QueuedJob
from bulkhead.service.context import JobContext
from bulkhead.service.envelope import Envelope, encoded, failure_of
from bulkhead.service.middleware import DiscardAfter, DiscardInvalid, DiscardTooOld, Middleware
from bulkhead.service.verdicts import Discard, TryAgain


class Mail(msgspec.Struct):
    to: str
    size: int = 0


def is_short(text: str) -> bool:
    return len(text) < 10


dropping = App(
    "memory://",
    middlewares=[
        DiscardTooOld(30.0, tasks=["fresh"]),
        DiscardAfter(2, tasks=["fail", "give_up"]),
        DiscardInvalid({"mail": Mail, "say": is_short}),
    ],
)
QUICK = Backoff(initial=0.01, factor=1.0, jitter=0.0, maximum=0.01)


@dropping.task(concurrency=1, backoff=QUICK)
def fail(text: str) -> None:
    raise ValueError(text)


@dropping.task(backoff=QUICK)
def give_up() -> None:
    raise Unrecoverable("no use")


@dropping.task(backoff=QUICK)
def mail(to: str, size: int = 0) -> str:
    return to


@dropping.task(backoff=QUICK)
def say(text: str) -> str:
    return text


@dropping.task(backoff=QUICK)
def note(told: list[str]) -> list[str]:
    return told


@pytest.fixture
def app(namespace: str) -> Iterator[App]:
    with placed(dropping, "memory://", namespace) as app:
        yield app


def failed(job: QueuedJob) -> tuple[str | None, str | None]:
    assert job.state == JobState.FAILED
    return job.error_type, job.error_message


def test_what_follows_a_failure_follows_a_job_that_is_dropped(app: App) -> None:
    app.enqueue(fail.call("no luck").options(on_error=note.call().options(id="follows")))
    with consuming(app):
        wait_until(lambda: app.find_jobs(["follows"])[0] is not None, "it is enqueued")
        kind, text, *_ = app.result("follows", timeout=20)
    assert (kind, "no luck" in text) == ("Discarded", True)


def test_jobs_are_dropped_and_the_others_run(app: App) -> None:
    twice = fail.enqueue("no luck")
    invalid = app.enqueue_many(
        [
            mail.call("a@example.org", size="large"),  # type: ignore[arg-type]
            say.call("a text that is too long"),
            say.call("one", "too many"),  # type: ignore[call-arg]
        ]
    )
    valid = app.enqueue_many([mail.call("b@example.org", size=5), say.call("short")])
    hopeless = give_up.enqueue()
    with consuming(app):
        jobs = {job_id: app.wait(job_id, timeout=20) for job_id in (twice, *invalid, *valid, hopeless)}

    kind, reason = failed(jobs[twice])
    assert kind == "Discarded"
    assert reason == "discarded after 2 failed attempts; the last one with ValueError: no luck"
    assert jobs[twice].attempt == 2
    assert [failed(jobs[job_id])[1] for job_id in invalid] == [
        "invalid arguments: Expected `int`, got `str` - at `$.size`",
        "invalid arguments: is_short said no",
        "invalid arguments: too many positional arguments",
    ]
    assert all(jobs[job_id].attempt == 1 for job_id in invalid)
    assert [jobs[job_id].state for job_id in valid] == [JobState.SUCCEEDED] * 2
    # What is hopeless before its attempts are used up is a dead letter as ever, and the only one.
    assert [job.id for job in app.dead()] == [hopeless]


@pytest.mark.parametrize(("age", "is_dropped"), [(29.0, False), (31.0, True)])
def test_a_job_that_is_too_old_is_not_run(age: float, is_dropped: bool) -> None:
    middleware = DiscardTooOld(30.0)
    job = held(age=age)

    middleware.dequeue("default", 1, lambda _: [job])

    assert (job.verdict is not None) is is_dropped
    if is_dropped:
        assert "too old: enqueued 31." in job.verdict.reason


def test_a_job_that_waited_too_long_in_the_queue_has_failed(
    app_with: Callable[..., App],
) -> None:
    app = app_with(DiscardTooOld(0.05))
    job_id = app.enqueue(app.call("work"))
    time.sleep(0.1)
    (claim,) = app.backend.broker.claim("default", 1, 30.0)
    job = held()
    job.claim = claim

    app.middlewares[0].dequeue("default", 1, lambda _: [job])

    assert job.id == job_id
    assert job.verdict is not None


def test_what_dying_workers_had_claimed_runs_again_and_not_for_ever(app_with: Callable[..., App]) -> None:
    middleware = DiscardAfter(1)
    app = app_with(middleware)
    app.enqueue(app.call("work"))
    verdicts = []
    for attempt in range(1, 6):
        (claim,) = _claimed(app)  # by a worker that dies, perhaps before the job has begun
        assert claim.attempt == attempt
        job = held()
        job.claim = claim
        middleware.dequeue("default", 1, lambda _, job=job: [job])
        verdicts.append(job.verdict)

    assert verdicts[:4] == [None] * 4
    assert verdicts[4].reason == (
        "discarded after 4 attempts, in the last of which its worker died or lost the lease"
    )


def test_a_failure_is_the_last_one_whatever_the_attempts_before_have_ended_with() -> None:
    job = held()
    job.claim = job.claim._replace(attempt=2)

    verdict = DiscardAfter(2).judge(job, TryAgain(1.0, failure_of(ValueError("no luck"))))

    assert verdict == Discard("discarded after 2 failed attempts; the last one with ValueError: no luck")


def _claimed(app: App) -> list[Any]:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        claims = app.backend.broker.claim("default", 1, 0.1, wait=0.5)
        if claims:
            return claims
    return []


def handled(middleware: DiscardInvalid, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    envelope = Envelope("checked", encoded("msgpack", (args, kwargs)))
    ran: list[Any] = []
    middleware.handle(
        JobContext(None, "id", "default", 1, 0.0, envelope), lambda job: ran.append(job.arguments())
    )
    return ran


@dataclass
class AsDataclass:
    a: int
    b: str = ""


class AsTypedDict(TypedDict, total=False):
    a: int
    b: str


def refuses(a: int, b: str = "") -> None:
    if not isinstance(a, int):
        raise TypeError("a is no int")


@pytest.mark.parametrize("check", [AsDataclass, AsTypedDict, refuses, lambda a, b="": isinstance(a, int)])
def test_types_and_functions_check_arguments(check: Any) -> None:
    middleware = DiscardInvalid({"checked": check})
    app = App("memory://", middlewares=[middleware])

    @app.task
    def checked(a: int, b: str = "") -> None: ...

    assert handled(middleware, (1,), {"b": "x"}) == [([1], {"b": "x"})]
    with pytest.raises(JobDiscarded, match="invalid arguments"):
        handled(middleware, ("one",), {})


def test_a_check_of_a_task_that_does_not_exist_keeps_the_consumer_from_starting(namespace: str) -> None:
    app = App("memory://", namespace=namespace, middlewares=[DiscardInvalid({"sned": refuses})])
    app.queue("default", concurrency=1)

    with pytest.raises(ConfigError, match="'sned'"):
        app.run()
    app.close()


@pytest.mark.parametrize(
    "make",
    [
        lambda: DiscardTooOld(0),
        lambda: DiscardTooOld("x"),  # type: ignore[arg-type]
        lambda: DiscardAfter(0),
        lambda: DiscardAfter(1, tasks="fail"),
        lambda: DiscardInvalid(refuses),  # type: ignore[arg-type]
        lambda: DiscardInvalid({"mail": 5}),  # type: ignore[dict-item]
        lambda: DiscardInvalid({"mail": App}),
    ],
)
def test_a_bad_value_is_refused_when_it_is_made(make: Callable[[], Middleware]) -> None:
    with pytest.raises(ConfigError):
        make()
