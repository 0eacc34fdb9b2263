"""What any middleware can rely on: order, what an exception does, and that nothing that was claimed is forgotten."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from consuming import consuming, placed
from jobs import lines, note
from watching import wait_until

from bulkhead import App, ConfigTypeError, JobDiscarded, JobState
from bulkhead.backends.base import QueueCounts
from bulkhead.service.batch import HeldJob
from bulkhead.service.context import JobContext
from bulkhead.service.middleware import Middleware, Submission
from bulkhead.service.verdicts import Bury, Discard, GiveBack, Succeed, Verdict


class Noting(Middleware):
    """Notes what it sees: here what happens in this process, in the file that a job names what its worker sees."""

    def __init__(self, name: str) -> None:
        self.name = name

    def enqueue(
        self, submissions: Sequence[Submission], forward: Callable[[Sequence[Submission]], None]
    ) -> None:
        seen.append(f"enqueue {self.name} in")
        forward(submissions)
        seen.append(f"enqueue {self.name} out")

    def dequeue(self, queue: str, n: int, forward: Callable[[int], list[HeldJob]]) -> list[HeldJob]:
        began = len(seen)
        seen.append(f"dequeue {self.name} in")
        jobs = forward(n)
        seen.append(f"dequeue {self.name} out")
        if not jobs:
            del seen[began:]
        return jobs

    def handle(self, job: JobContext, forward: Callable[[JobContext], Any]) -> Any:
        path = job.arguments()[0][0]
        note(path, f"handle {self.name} in")
        try:
            return forward(job)
        finally:
            note(path, f"handle {self.name} out")

    def judge(self, job: HeldJob, verdict: Verdict) -> Verdict:
        seen.append(f"judge {self.name}")
        return verdict


seen: list[str] = []


class Scripted(Middleware):
    """Does in `dequeue` what a test tells it to do; counts what becomes of jobs."""

    def __init__(self) -> None:
        self.begin_anew()

    def begin_anew(self) -> None:
        self.script: Callable[[list[HeldJob]], list[HeldJob]] = lambda jobs: jobs
        self.judging: Callable[[Verdict], Any] = lambda verdict: verdict
        self.is_asking = True
        self.n_asked = 0
        self.forwarded: Counter[str] = Counter()
        self.settled_jobs: list[tuple[str, Verdict]] = []

    def dequeue(self, queue: str, n: int, forward: Callable[[int], list[HeldJob]]) -> list[HeldJob]:
        self.n_asked += 1
        if not self.is_asking:
            return []
        jobs = forward(n)
        self.forwarded.update(held.id for held in jobs)
        return self.script(jobs)

    def judge(self, job: HeldJob, verdict: Verdict) -> Verdict:
        return self.judging(verdict)  # type: ignore[no-any-return]

    def settled(self, job: HeldJob, verdict: Verdict) -> None:
        self.settled_jobs.append((job.id, verdict))


class Raising(Middleware):
    """Raises in `handle`, for jobs that say so."""

    def handle(self, job: JobContext, forward: Callable[[JobContext], Any]) -> Any:
        if "handle" in job.headers:
            raise JobDiscarded("not wanted") if job.headers["handle"] == "discard" else OSError("no luck")
        return forward(job)


ordered = App("memory://", middlewares=[Noting("first"), Noting("second")])
scripted_middleware = Scripted()
scripted = App("memory://", middlewares=[scripted_middleware, Raising()])
for one in (ordered, scripted):
    one.queue("default", concurrency=1)


@ordered.task
def noted(path: str) -> None:
    note(path, "task")


@scripted.task(max_retries=0)
def work(value: int = 0) -> int:
    return value


@pytest.fixture
def app(namespace: str) -> Iterator[App]:
    scripted_middleware.begin_anew()
    with placed(scripted, "memory://", namespace) as app:
        yield app


@pytest.fixture
def middleware(app: App) -> Scripted:
    return scripted_middleware


def test_the_first_one_listed_is_outermost(tmp_path: Path, namespace: str) -> None:
    seen.clear()
    path = tmp_path / "seen"
    with placed(ordered, "memory://", namespace) as app:
        noted.enqueue(str(path))
        assert seen == ["enqueue first in", "enqueue second in", "enqueue second out", "enqueue first out"]
        seen.clear()

        done = app.run_once()

    assert done is not None
    assert done.state == JobState.SUCCEEDED
    assert seen == [
        "dequeue first in",
        "dequeue second in",
        "dequeue second out",
        "dequeue first out",
        "judge second",
        "judge first",
    ]
    assert lines(path) == [
        "handle first in",
        "handle second in",
        "task",
        "handle second out",
        "handle first out",
    ]


def test_what_is_raised_in_enqueue_reaches_the_caller_and_nothing_is_enqueued(
    app_with: Callable[..., App],
) -> None:
    class Refusing(Middleware):
        def enqueue(self, submissions: Any, forward: Any) -> None:
            raise PermissionError("not today")

    app = app_with(Refusing())
    with pytest.raises(PermissionError, match="not today"):
        app.enqueue(app.call("work"))

    assert app.queues()["default"].ready == 0


def test_what_is_raised_in_dequeue_is_logged_and_what_was_claimed_runs_later(
    app: App, middleware: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    def once(jobs: list[HeldJob]) -> list[HeldJob]:
        if jobs:
            middleware.script = lambda jobs: jobs
            raise OSError("no luck")
        return jobs

    middleware.script = once
    ids = [work.enqueue(number) for number in range(5)]
    with consuming(app):
        # Well below the lease of 30 s: the claims were given back, and did not have to run out.
        jobs = [app.wait(job_id, timeout=10) for job_id in ids]

    assert [job.state for job in jobs] == [JobState.SUCCEEDED] * 5
    assert [job.attempt for job in jobs] == [1] * 5
    assert "no luck" in caplog.text
    given_back = [job_id for job_id, verdict in middleware.settled_jobs if isinstance(verdict, GiveBack)]
    assert given_back
    assert all(middleware.forwarded[job_id] == 2 for job_id in given_back)


def test_what_is_raised_in_handle_is_the_failure_of_the_job(app: App) -> None:
    job_id = work.call(1).options(headers={"handle": "fail"}).enqueue()

    done = app.run_once()

    assert done is not None
    assert (done.id, done.state, done.error_type) == (job_id, JobState.FAILED, "OSError")
    assert [dead.id for dead in app.dead()] == [job_id]


def test_a_job_that_handle_discards_has_failed_and_leaves_no_dead_letter(app: App) -> None:
    work.call(1).options(headers={"handle": "discard"}, max_retries=5).enqueue()

    done = app.run_once()

    assert done is not None
    assert (done.state, done.error_type, done.error_message) == (JobState.FAILED, "Discarded", "not wanted")
    assert app.dead() == []


def test_who_wants_no_job_is_asked_again_soon_and_not_all_the_time(app: App, middleware: Scripted) -> None:
    middleware.is_asking = False
    job_id = work.enqueue(1)
    with consuming(app):
        wait_until(lambda: middleware.n_asked >= 3, "asked again")
        before, cpu = middleware.n_asked, time.thread_time()
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            time.sleep(0.05)
        # Twenty times a second at most; who spins comes to thousands.
        assert middleware.n_asked - before <= 12
        assert time.thread_time() - cpu < 0.4
        middleware.is_asking = True
        assert app.wait(job_id, timeout=10).state == JobState.SUCCEEDED


def test_what_is_left_out_is_given_back_uncounted(app: App, middleware: Scripted) -> None:
    def once(jobs: list[HeldJob]) -> list[HeldJob]:
        if jobs:
            middleware.script = lambda jobs: jobs
        return []

    middleware.script = once
    job_id = work.enqueue(1)
    with consuming(app):
        job = app.wait(job_id, timeout=10)

    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
    assert middleware.settled_jobs == [
        (job_id, GiveBack(1.0, keeps_place=False)),
        (job_id, middleware.settled_jobs[1][1]),
    ]


def test_a_job_with_a_verdict_is_not_run(app: App, middleware: Scripted) -> None:
    def discard(jobs: list[HeldJob]) -> list[HeldJob]:
        for held in jobs:
            held.verdict = Discard("nobody wants it")
        return jobs

    middleware.script = discard
    job_id = work.enqueue(1)

    done = app.run_once()

    assert done is not None
    assert (done.state, done.error_message) == (JobState.FAILED, "nobody wants it")
    assert middleware.settled_jobs == [(job_id, Discard("nobody wants it"))]


def test_a_verdict_that_is_none_counts_as_raised(
    app: App, middleware: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(jobs: list[HeldJob]) -> list[HeldJob]:
        for held in jobs:
            held.verdict = "drop it"
        return jobs

    middleware.script = spoil
    job_id = work.enqueue(1)

    with pytest.raises(ConfigTypeError, match="drop it"):
        app.run_once()

    assert app.job(job_id).state in (JobState.SCHEDULED, JobState.QUEUED)  # the pause may be over
    assert app.job(job_id).attempt == 0


def test_judge_decides_what_becomes_of_a_job(app: App, middleware: Scripted) -> None:
    middleware.judging = lambda verdict: Bury("a dead letter all the same", None)
    job_id = work.enqueue(1)

    app.run_once()

    assert [(dead.id, dead.reason) for dead in app.dead()] == [(job_id, "a dead letter all the same")]


@pytest.mark.parametrize("answer", [None, "succeed", OSError])
def test_a_judge_that_fails_changes_nothing(
    answer: Any, app: App, middleware: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    def judge(verdict: Verdict) -> Any:
        if answer is OSError:
            raise OSError("no luck")
        return answer

    middleware.judging = judge
    work.enqueue(1)

    done = app.run_once()

    assert done is not None
    assert done.state == JobState.SUCCEEDED
    assert "judge" in caplog.text


def test_each_claimed_job_is_settled_once(app: App, middleware: Scripted) -> None:
    """Also when many short jobs travel together, some are left out, some discarded, and some of the rounds raise."""
    rounds = iter(range(10**6))

    def mix(jobs: list[HeldJob]) -> list[HeldJob]:
        number = next(rounds)
        if jobs and number % 5 == 4:
            raise OSError("no luck")
        for held in jobs[3::7]:
            held.verdict = Discard("every seventh")
        return jobs[:-1] if len(jobs) > 5 and number < 10 else jobs

    middleware.script = mix
    app.enqueue_many(work.call(number) for number in range(300))
    with consuming(app):
        wait_until(lambda: app.queues()["default"] == QueueCounts())

    settled = Counter(job_id for job_id, _ in middleware.settled_jobs)
    assert settled == middleware.forwarded
    ended = Counter(
        job_id for job_id, verdict in middleware.settled_jobs if isinstance(verdict, (Succeed, Discard))
    )
    assert len(ended) == 300
    assert set(ended.values()) == {1}


def test_started_comes_before_the_first_claim_and_stopped_last(namespace: str) -> None:
    events: list[str] = []

    class Watching(Middleware):
        def started(self, queues: Sequence[str]) -> None:
            events.append(f"started {list(queues)} {threading.current_thread().name}")

        def dequeue(self, queue: str, n: int, forward: Any) -> list[HeldJob]:
            if events[-1] != "dequeue":
                events.append("dequeue")
            return forward(n)  # type: ignore[no-any-return]

        def stopped(self) -> None:
            events.append("stopped")

    app = App("memory://", namespace=namespace, middlewares=[Watching()])
    app.queue("quick", concurrency=1)
    with consuming(app):
        wait_until(lambda: "dequeue" in events)
    app.close()

    assert events == ["started ['quick'] consumer of a test", "dequeue", "stopped"]


def test_a_consumer_does_not_start_when_started_raises(namespace: str) -> None:
    stopped: list[Middleware] = []

    class Watching(Middleware):
        def stopped(self) -> None:
            stopped.append(self)

    class Refusing(Watching):
        def started(self, queues: Sequence[str]) -> None:
            raise PermissionError("not today")

    first = Watching()
    app = App("memory://", namespace=namespace, middlewares=[first, Refusing(), Watching()])
    app.queue("quick", concurrency=1)

    with pytest.raises(PermissionError, match="not today"):
        app.run()
    app.close()
    assert stopped == [first]
