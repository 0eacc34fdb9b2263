"""Limits of jobs at once: over all consumers, and in each."""

import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from consuming import consuming, held, placed
from gates import Gate, pass_gate
from jobs import lines, note
from scripts import Script, running
from watching import wait_until

from bulkhead import App, BrokerUnavailable, ConfigError, JobState
from bulkhead.service.batch import HeldJob
from bulkhead.service.middleware import ConcurrencyLimit, LocalLimit, RateLimit, local_limit
from bulkhead.service.verdicts import Bury, GiveBack, Succeed

DONE = Succeed(b"")


class Line:
    """Jobs that wait in a queue, and how many of them are out, of each task."""

    def __init__(self, jobs: list[HeldJob]) -> None:
        self.lock = threading.Lock()
        self.waiting = deque(jobs)
        self.out: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.most_of_all = 0
        self.n_done = 0

    def claim(self, n: int) -> list[HeldJob]:
        with self.lock:
            return [self.waiting.popleft() for _ in range(min(n, len(self.waiting)))]

    def begin(self, job: HeldJob) -> None:
        with self.lock:
            self.out[job.envelope.task] += 1
            self.most |= self.out
            self.most_of_all = max(self.most_of_all, self.out.total())

    def end(self, job: HeldJob) -> None:
        with self.lock:
            self.out[job.envelope.task] -= 1
            self.n_done += 1

    def give_back(self, job: HeldJob) -> None:
        job.verdict = None
        with self.lock:
            self.waiting.append(job)


def consume(limit: ConcurrencyLimit, line: Line, n: int) -> None:
    """Be a consumer with room for four jobs."""
    while line.n_done < n:
        running = []
        for job in limit.dequeue("default", 4, line.claim):
            if job.verdict is None:
                line.begin(job)
                running.append(job)
            else:
                line.give_back(job)
        time.sleep(0.001)
        for job in running:
            line.end(job)
            limit.settled(job, DONE)


@pytest.mark.parametrize("per", ["queue", "task", "all"])
def test_no_more_run_at_once_over_all_consumers(per: Any, app_with: Callable[..., App]) -> None:
    limits = [ConcurrencyLimit(5, per=per) for _ in range(3)]
    apps = [app_with(limit) for limit in limits]
    line = Line([held(task=f"task-{number % 2}") for number in range(60)])

    threads = [threading.Thread(target=consume, args=(limit, line, 60)) for limit in limits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert line.n_done == 60
    assert 2 <= (max(line.most.values()) if per == "task" else line.most_of_all) <= 5
    # Nothing is left of it, so that all permits are free.
    assert apps[0].backend.registry.entries("permits/") == []


def reserved(limit: ConcurrencyLimit, n: int = 5, queue: str = "default") -> list[HeldJob]:
    """Let a consumer take what it can get."""
    return limit.dequeue(queue, n, lambda n: [held(queue) for _ in range(n)])


def test_permits_of_a_consumer_that_is_gone_come_back_after_the_lease(app_with: Callable[..., App]) -> None:
    killed, other = ConcurrencyLimit(5), ConcurrencyLimit(5)
    app_with(killed, lease=0.4)
    app_with(other, lease=0.4)
    began = time.monotonic()  # Why before: the lease may begin long before the call returns
    assert len(reserved(killed)) == 5

    wait_until(lambda: len(reserved(other)) == 5, "the permits of the one that is gone")

    assert time.monotonic() - began >= 0.3


def test_permits_of_a_consumer_that_beats_stay(app_with: Callable[..., App]) -> None:
    alive, other = ConcurrencyLimit(5), ConcurrencyLimit(5)
    app_with(alive, lease=0.4)
    app_with(other, lease=0.4)
    jobs = reserved(alive)

    end = time.monotonic() + 1.2
    while time.monotonic() < end:
        alive.beat("default", jobs)
        assert reserved(other) == []
        time.sleep(0.02)

    for job in jobs:
        alive.settled(job, DONE)
    assert len(reserved(other)) == 5


def test_a_consumer_that_stood_still_counts_again_when_it_goes_on(app_with: Callable[..., App]) -> None:
    stopped, other, third = ConcurrencyLimit(5), ConcurrencyLimit(5), ConcurrencyLimit(5)
    for limit in (stopped, other, third):
        app_with(limit, lease=0.8)  # within which the rest of the test is done, on a busy machine, too
    reserved(stopped)
    wait_until(lambda: reserved(other, 2), "the permits of the one that stood still")

    stopped.beat("default", [])

    # Seven are in use now; before two of them have ended none is given out.
    assert reserved(third) == []


def test_what_one_takes_that_stood_still_before_its_next_beat_is_its_own(
    app_with: Callable[..., App],
) -> None:
    stopped, other = ConcurrencyLimit(5), ConcurrencyLimit(5)
    for limit in (stopped, other):
        app_with(limit, lease=0.3)
    reserved(stopped, 1)
    wait_until(lambda: not other._app.backend.registry.entries("permits-alive/"), "nobody lives")

    assert len(reserved(stopped, 1)) == 1

    assert len(reserved(other)) == 3


def test_one_that_could_not_tell_that_it_ended_tells_that_it_lives_when_it_begins_again(
    app_with: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, other = ConcurrencyLimit(5), ConcurrencyLimit(5)
    app, _ = app_with(limit), app_with(other)
    registry = app.backend.registry
    limit.started(["default"])
    for job in reserved(limit, 1):
        limit.settled(job, DONE)

    def gone(*args: Any, **kwargs: Any) -> Any:
        raise BrokerUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "delete", gone)
        limit.stopped()
    for entry in registry.entries("permits-alive/"):
        registry.delete(entry.key)  # its time is over
    limit.started(["default"])

    assert len(reserved(limit, 2)) == 2

    assert len(reserved(other)) == 3


def test_what_the_consumer_has_not_claimed_is_free_for_others(app_with: Callable[..., App]) -> None:
    one, other = ConcurrencyLimit(5), ConcurrencyLimit(5)
    app_with(one)
    app_with(other)

    assert one.dequeue("default", 5, lambda n: [held()]) != []

    assert len(reserved(other)) == 4


def test_what_was_reserved_is_free_when_claiming_fails(app_with: Callable[..., App]) -> None:
    one, other = ConcurrencyLimit(5), ConcurrencyLimit(5)
    app_with(one)
    app_with(other)

    def claim(n: int) -> list[HeldJob]:
        raise BrokerUnavailable("gone")

    with pytest.raises(BrokerUnavailable):
        one.dequeue("default", 5, claim)

    assert len(reserved(other)) == 5


def test_a_release_that_could_not_be_told_is_told_at_the_next_beat(
    app_with: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = ConcurrencyLimit(5), ConcurrencyLimit(5)
    app, _ = app_with(one), app_with(other)
    jobs = reserved(one)

    def gone(*args: Any, **kwargs: Any) -> Any:
        raise BrokerUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(app.backend.registry, "get", gone)
        for job in jobs:
            one.settled(job, DONE)
    assert reserved(other) == []

    one.beat("default", [])

    assert len(reserved(other)) == 5


def test_a_permit_of_which_the_answer_was_lost_is_not_lost_itself(
    app_with: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = ConcurrencyLimit(5), ConcurrencyLimit(5)
    app, _ = app_with(one), app_with(other)
    reserved(one, 1)
    put = app.backend.registry.put

    def carried_out_but_not_answered(*args: Any, **kwargs: Any) -> Any:
        put(*args, **kwargs)
        raise BrokerUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(app.backend.registry, "put", carried_out_but_not_answered)
        with pytest.raises(BrokerUnavailable):
            reserved(one, 4)
    assert reserved(other) == []

    one.beat("default", [])

    assert len(reserved(other)) == 4


def test_queues_keys_and_names_count_by_themselves(app_with: Callable[..., App]) -> None:
    limit, other = ConcurrencyLimit(2), ConcurrencyLimit(3, name="other")
    app_with(limit, other)

    assert len(reserved(limit)) == 2
    assert len(reserved(limit, queue="elsewhere")) == 2
    assert len(reserved(other)) == 3


def test_a_job_that_finds_no_permit_is_given_back_and_those_of_other_tasks_go_on(
    app_with: Callable[..., App],
) -> None:
    limit = ConcurrencyLimit(2, per="task", tasks=["slow"])
    app_with(limit)
    jobs = [held(task=task) for task in ("slow", "slow", "quick", "slow", "quick")]

    limit.dequeue("default", 5, lambda _: jobs)

    assert [job.verdict is None for job in jobs] == [True, True, True, False, True]
    verdict = jobs[3].verdict
    assert isinstance(verdict, GiveBack)
    assert 0 < verdict.delay <= 1.0


def test_a_function_says_what_is_counted(app_with: Callable[..., App]) -> None:
    limit = ConcurrencyLimit(1, per=lambda job: None if job.id == "free" else job.id[0])
    app_with(limit)
    jobs = [held(job_id=job_id) for job_id in ("a1", "a2", "b1", "free")]

    limit.dequeue("default", 4, lambda _: jobs)

    assert [job.verdict is None for job in jobs] == [True, False, True, True]


def by_customer(job: HeldJob) -> str:
    return job.envelope.headers["customer"]


@pytest.mark.parametrize("per", [by_customer, lambda job: 5])
@pytest.mark.parametrize("kind", [ConcurrencyLimit, LocalLimit, RateLimit])
def test_a_job_of_which_nobody_can_say_what_it_counts_as_is_a_dead_letter_and_others_go_on(
    kind: Any, per: Any
) -> None:
    limit = kind(2, per=lambda job: per(job) if job.id == "odd" else None)
    App("memory://", middlewares=[limit])
    jobs = [held(job_id=job_id) for job_id in ("one", "odd", "two")]

    assert limit.dequeue("default", 3, lambda _: jobs) == jobs

    assert [job.verdict is None for job in jobs] == [True, False, True]
    verdict = jobs[1].verdict
    assert isinstance(verdict, Bury)
    assert "customer" in verdict.reason or "must return a str" in verdict.reason


@pytest.mark.parametrize("per", ["queue", "task"])
def test_a_local_limit_counts_what_this_consumer_holds(per: Any) -> None:
    limit = LocalLimit(3, per=per)

    def take(n: int) -> list[HeldJob]:
        jobs = limit.dequeue("default", n, lambda n: [held() for _ in range(n)])
        return [job for job in jobs if job.verdict is None]

    jobs = take(5)
    assert len(jobs) == 3
    assert take(5) == []
    limit.settled(jobs[0], GiveBack())

    assert len(take(5)) == 1


def test_keys_of_which_no_job_asks_any_more_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_limit, "_MANY", 10)
    monkeypatch.setattr(local_limit, "FORGOTTEN", 0.05)
    limit = LocalLimit(1, per=lambda job: job.id.partition("/")[0])
    for number in range(10):
        limit.dequeue("default", 5, lambda _, n=number: [held(job_id=f"{n}/{m}") for m in range(2)])
    assert len(limit._waiting) == 10
    time.sleep(0.1)

    limit.dequeue("default", 5, lambda _: [held(job_id=f"last/{m}") for m in range(2)])

    assert list(limit._waiting) == ["last"]


@pytest.mark.parametrize("options", [{"n": 0}, {"n": "5"}, {"n": 1, "per": "host"}, {"n": 1, "queues": "q"}])
@pytest.mark.parametrize("kind", [ConcurrencyLimit, LocalLimit])
def test_a_bad_value_is_refused_when_it_is_made(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(options)[-1]):
        kind(**options)


local = App("memory://", middlewares=[LocalLimit(2)])


@local.task(concurrency=4, max_retries=0)
def hold(folder: str, seconds: float, dies: bool = False) -> None:
    note(f"{folder}/ran", f"{time.monotonic()} 1")
    time.sleep(seconds)
    if dies:
        os._exit(3)
    note(f"{folder}/ran", f"{time.monotonic()} -1")


def most_at_once(path: Path) -> int:
    n = most = 0
    for line in sorted(lines(path), key=lambda line: float(line.split()[0])):
        n += int(line.split()[1])
        most = max(most, n)
    return most


def test_a_consumer_runs_no_more_than_its_local_limit(tmp_path: Path, namespace: str) -> None:
    with placed(local, "memory://", namespace) as app:
        ids = app.enqueue_many(hold.call(str(tmp_path), 0.03) for _ in range(12))
        with consuming(app):
            states = [app.wait(job_id, timeout=20).state for job_id in ids]

    assert states == [JobState.SUCCEEDED] * 12
    assert most_at_once(tmp_path / "ran") == 2


def test_a_job_that_crashes_gives_its_place_back(tmp_path: Path, namespace: str) -> None:
    with placed(local, "memory://", namespace) as app:
        app.enqueue_many(hold.call(str(tmp_path), 0.0, True) for _ in range(4))
        last = hold.enqueue(str(tmp_path), 0.0)
        with consuming(app):
            assert app.wait(last, timeout=20).state == JobState.SUCCEEDED


crowded = App("memory://", middlewares=[ConcurrencyLimit(1, per="task", tasks=["wait_at"])])


@crowded.task(concurrency=2, max_retries=0)
def wait_at(folder: str) -> str:
    return pass_gate(folder, "one")


@crowded.task
def quick() -> None: ...


def test_300_jobs_that_wait_for_a_permit_keep_no_consumer_busy_and_others_from_nothing(
    gate: Gate, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with placed(crowded, f"sqlite:///{tmp_path}/jobs.db", namespace) as app:
        claimed: list[list[str]] = []
        broker = app.backend.broker
        claim = broker.claim

        def noted(*args: Any, **rest: Any) -> Any:
            found = claim(*args, **rest)
            claimed.append([one.id for one in found])
            return found

        monkeypatch.setattr(broker, "claim", noted)
        app.enqueue_many(wait_at.call(str(tmp_path / "gate")) for _ in range(301))
        with consuming(app, grace=0.1):
            app.wait(quick.enqueue(), timeout=20)
            wait_until(lambda: len({one for some in claimed for one in some}) == 302, "each was claimed")
            before, began = len(claimed), time.monotonic()
            for _ in range(15):
                app.wait(quick.enqueue(), timeout=20)
                time.sleep(0.1)
            # With a claim for each of them it was 170 a second and more.
            assert (len(claimed) - before) / (time.monotonic() - began) < 60
            assert len(gate.begun) == 1
            gate.open()


@pytest.mark.parametrize("kind", [ConcurrencyLimit, LocalLimit, partial(RateLimit, seconds=60, burst=9)])
def test_no_more_go_on_than_the_consumer_has_room_for_when_it_searches(
    kind: Any, app_with: Callable[..., App]
) -> None:
    limit = kind(9, per="task")
    app_with(limit)
    limit._search["default"] = 50
    jobs = limit.dequeue("default", 2, lambda n: [held(task=f"task-{at % 5}") for at in range(n)])
    assert len(jobs) == 50
    assert sum(job.verdict is None for job in jobs) == 2
    assert [job.verdict for job in jobs if job.verdict is not None] == [GiveBack(0.0)] * 48
    assert len(limit.dequeue("default", 2, lambda n: [held() for _ in range(n)])) == 2


CONSUMER = """
import os, time
from bulkhead import App
from bulkhead.service.middleware import ConcurrencyLimit
from jobs import note

app = App(
    os.environ["URL"],
    namespace=os.environ["NAMESPACE"],
    lease=float(os.environ["LEASE"]),
    middlewares=[ConcurrencyLimit(5, per=os.environ["PER"])],
)

@app.task(concurrency=4)
def work(folder, seconds):
    note(folder + "/ran", f"{time.monotonic()} 1 {os.getppid()}")
    time.sleep(seconds)
    note(folder + "/ran", f"{time.monotonic()} -1 {os.getppid()}")

if __name__ == "__main__":
    print("ready", flush=True)
    app.run(grace=5.0)
"""


@pytest.fixture
def producer(shared_url: str, namespace: str) -> Iterator[App]:
    app = App(shared_url, namespace=namespace)

    def work(folder: str, seconds: float) -> None: ...

    app.task(work)
    yield app
    app.close()


@pytest.fixture
def start(shared_url: str, namespace: str) -> Iterator[Callable[..., Script]]:
    """Start a consumer process of four workers."""
    with ExitStack() as stack:

        def begin(per: str, lease: float) -> Script:
            env = {"URL": shared_url, "NAMESPACE": namespace, "LEASE": str(lease), "PER": per}
            return stack.enter_context(running(CONSUMER, env=env))

        yield begin


@pytest.mark.parametrize(
    ("shared_url", "per"),
    [
        ("sqlite", "queue"),
        pytest.param("sqlite", "task", marks=pytest.mark.slow),
        pytest.param("redis", "queue", marks=pytest.mark.slow),
        pytest.param("redis", "task", marks=pytest.mark.slow),
    ],
    indirect=["shared_url"],
)
def test_three_consumers_of_four_workers_run_no_more_than_five_jobs_at_once(
    per: str, start: Callable[..., Script], producer: App, tmp_path: Path
) -> None:
    ids = producer.enqueue_many(producer.call("work", str(tmp_path), 0.02) for _ in range(100))
    scripts = [start(per, 10.0) for _ in range(3)]

    for job_id in ids:
        assert producer.wait(job_id, timeout=40).state == JobState.SUCCEEDED

    assert 3 <= most_at_once(tmp_path / "ran") <= 5
    assert len({line.split()[2] for line in lines(tmp_path / "ran")}) >= 2, "one consumer has run all of them"
    for script in scripts:
        os.kill(script.pid, signal.SIGTERM)
    assert [script.wait() for script in scripts] == [0, 0, 0]
    assert producer.backend.registry.entries("permits") == []


def test_the_permits_of_a_killed_consumer_come_back_after_the_lease(
    start: Callable[..., Script], producer: App, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    killed = start("queue", 1.5)
    producer.enqueue_many(producer.call("work", str(tmp_path), 3600.0) for _ in range(8))
    wait_until(lambda: len(lines(ran)) == 4, "four jobs of the first consumer")
    start("queue", 1.5)
    wait_until(lambda: len(lines(ran)) == 5, "one job of the second")

    killed.kill_all()
    at = time.monotonic()

    # The second one has room for three more, for which there is no permit before the four of the first come back.
    wait_until(lambda: len(lines(ran)) == 8, "four jobs of the second")
    assert min(float(line.split()[0]) for line in lines(ran)[5:]) - at > 0.5


def test_a_consumer_that_ends_leaves_the_permits_of_another_one_of_its_process(
    app_with: Callable[..., App],
) -> None:
    shared, other = ConcurrencyLimit(5), ConcurrencyLimit(5)
    app_with(shared, lease=0.4)
    app_with(other, lease=0.4)
    shared.started(["default"])
    shared.started(["default"])
    jobs = reserved(shared)

    shared.stopped()

    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        shared.beat("default", jobs)
        assert reserved(other) == []
        time.sleep(0.02)
