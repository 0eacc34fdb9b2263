"""A job is not enqueued while another one stands for it, and the caller is told which."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from consuming import held, placed
from jobs import lines
from scripts import running
from watching import wait_until

from bulkhead import App, ConfigError, ConfigTypeError, DuplicateJobId, JobState, Unrecoverable
from bulkhead.errors import BrokerUnavailable
from bulkhead.service.groups import open_group
from bulkhead.service.middleware import Middleware, Submission, Unique, unique
from bulkhead.service.verdicts import Succeed

settling = App("memory://", middlewares=[Unique()])


@settling.task(concurrency=1, max_retries=0)
def settle(how: str) -> str:
    if how == "fail":
        raise Unrecoverable("no luck")
    return how


def refused(app: App, *args: Any, **kwargs: Any) -> str:
    """Return the id of the job that stands for this one."""
    with pytest.raises(DuplicateJobId) as raised:
        app.enqueue(app.call("work", *args, **kwargs))
    (job_id,) = raised.value.job_ids
    return str(job_id)


def test_the_caller_is_told_which_job_stands_for_a_duplicate(app_with: Callable[..., App]) -> None:
    app = app_with(Unique())
    first = app.enqueue(app.call("work", 1))

    assert refused(app, 1) == first
    assert app.enqueue(app.call("work", 2)) != first
    assert app.queues()["default"].ready == 2


def test_many_may_be_enqueued_where_some_are_there_already(app_with: Callable[..., App]) -> None:
    app = app_with(Unique())
    first = app.enqueue(app.call("work", 1))

    ids = app.enqueue_many([app.call("work", number) for number in (0, 1, 2, 0)], existing="keep")

    assert ids[1] == first
    assert ids[3] == ids[0]
    assert len(set(ids)) == 3
    assert app.queues()["default"].ready == 3


@pytest.mark.parametrize("how", ["succeed", "fail"])
def test_the_lock_is_released_when_its_job_has_ended(how: str, namespace: str) -> None:
    with placed(settling, "memory://", namespace) as app:
        first = settle.enqueue(how)
        done = app.run_once()
        assert done is not None
        assert done.state == (JobState.SUCCEEDED if how == "succeed" else JobState.FAILED)
        # Not only taken for released: nothing is left of it.
        assert app.backend.registry.entries("unique/") == []

        assert settle.enqueue(how) != first


def test_a_lock_that_could_not_be_released_keeps_nobody_out(
    app_with: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = app_with(Unique())
    first = app.enqueue(app.call("work", 1))
    (claim,) = app.backend.broker.claim("default", 1, 30.0)
    job = held(job_id=first)
    job.envelope = app.sealer.open(first, "default", claim.body)
    app.backend.broker.ack([claim.hold])
    with monkeypatch.context() as patch:
        patch.setattr(app.backend.registry, "get", out_of_reach)
        app.middlewares[0].settled(job, Succeed(b""))  # not even an error: who runs it would log each

    assert app.enqueue(app.call("work", 1)) != first


def test_a_job_that_was_cancelled_stands_for_none(app_with: Callable[..., App]) -> None:
    app = app_with(Unique())
    first = app.enqueue(app.call("work", 1))
    assert app.cancel(first)

    second = app.enqueue(app.call("work", 1))

    assert second != first
    assert refused(app, 1) == second


def test_a_job_that_waits_for_its_time_or_for_another_attempt_stands(app_with: Callable[..., App]) -> None:
    app = app_with(Unique())
    first = app.enqueue(app.call("work", 1).options(delay=60.0))

    assert refused(app, 1) == first


def test_a_lock_for_a_time_outlasts_its_job_and_ends_by_itself(app_with: Callable[..., App]) -> None:
    app = app_with(Unique(seconds=0.5))
    before = time.monotonic()
    first = app.enqueue(app.call("work", 1))
    app.cancel(first)
    assert refused(app, 1) == first

    def enqueued() -> bool:
        try:
            return app.enqueue(app.call("work", 1)) != first
        except DuplicateJobId:
            return False

    wait_until(enqueued, "the end of the lock")
    assert time.monotonic() - before >= 0.5


def test_equal_arguments_are_the_same_however_they_are_written(app_with: Callable[..., App]) -> None:
    app = app_with(Unique())

    def report(year: int, month: int = 1, *, tags: dict[str, int] | None = None) -> None: ...

    app.task(report)
    first = app.enqueue(app.call("report", 2024, tags={"a": 1, "b": 2}))

    for call in (
        app.call("report", year=2024, tags={"b": 2, "a": 1}),
        app.call("report", 2024, 1, tags={"a": 1, "b": 2}),
    ):
        with pytest.raises(DuplicateJobId) as raised:
            app.enqueue(call)
        assert raised.value.job_ids == (first,)
    app.enqueue(app.call("report", 2024, 2, tags={"a": 1, "b": 2}))
    app.enqueue(app.call("work", 2024))


def test_a_function_says_what_may_not_be_twice(app_with: Callable[..., App]) -> None:
    def key(job: Submission) -> str | None:
        return None if job.call.args[0] == "free" else "one at a time"

    app = app_with(Unique(key=key))
    first = app.enqueue(app.call("work", 1))

    assert refused(app, 2) == first
    assert app.enqueue(app.call("work", "free")) != app.enqueue(app.call("work", "free"))


def test_only_chosen_tasks_and_queues_are_unique(app_with: Callable[..., App]) -> None:
    app = app_with(Unique(tasks=["other"], name="a"), Unique(queues=["elsewhere"], name="b"))
    app.queue("elsewhere")

    app.enqueue(app.call("work", 1))
    app.enqueue(app.call("work", 1))
    first = app.enqueue(app.call("work", 1).options(queue="elsewhere"))

    with pytest.raises(DuplicateJobId) as raised:
        app.enqueue(app.call("work", 1).options(queue="elsewhere"))
    assert raised.value.job_ids == (first,)


def test_of_producers_at_once_exactly_one_wins(app_with: Callable[..., App]) -> None:
    apps = [app_with(Unique()) for _ in range(4)]
    for app in apps:
        app.backend  # noqa: B018 - connected before the race
    start = threading.Barrier(len(apps))
    told: list[list[str]] = []

    def produce(app: App) -> None:
        start.wait()
        told.append(app.enqueue_many([app.call("work", n) for n in range(25)], existing="keep"))

    threads = [threading.Thread(target=produce, args=(app,)) for app in apps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(told) == 4
    assert all(len(set(ids)) == 1 for ids in zip(*told, strict=True))
    assert apps[0].queues()["default"].ready == 25


def test_a_producer_that_is_too_slow_between_lock_and_job_takes_its_job_back(
    app_with: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unique, "_PENDING", 0.2)
    faster: list[str] = []

    class Slow(Middleware):
        def enqueue(self, submissions: Sequence[Submission], forward: Any) -> None:
            def overtaken() -> bool:
                try:
                    faster.append(quick.enqueue(quick.call("work", 1)))
                except DuplicateJobId:
                    return False
                return True

            wait_until(overtaken, "the end of the lock")
            forward(submissions)

    quick, slow = app_with(Unique()), app_with(Unique(), Slow())

    assert refused(slow, 1) == faster[0]
    assert slow.queues()["default"].ready == 1


def test_who_is_told_of_a_job_whose_producer_died_before_it_enqueued_it(
    app_with: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unique, "_PENDING", 0.3)
    dying, app = app_with(Unique()), app_with(Unique())
    with monkeypatch.context() as patch:
        for step in ("enqueue_many", "find"):  # so that it can take nothing back
            patch.setattr(dying.backend.broker, step, out_of_reach)
        with pytest.raises(BrokerUnavailable):
            dying.enqueue(dying.call("work", 1))

    ids = app.enqueue_many([app.call("work", n) for n in (0, 1, 1)], existing="keep")

    # Nobody is told that a job is there which never comes.
    assert [job is not None for job in app.find_jobs(ids)] == [True] * 3
    assert ids[1] == ids[2] != ids[0]


def test_who_is_as_fast_is_told_when_the_job_is_there(
    app_with: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quick = app_with(Unique()), app_with(Unique())
    send = slow.backend.broker.enqueue_many
    threads: list[threading.Thread] = []
    told: list[tuple[str, JobState]] = []

    def ask() -> None:
        job_id = refused(quick, 1)
        told.append((job_id, quick.job(job_id).state))

    def meanwhile(messages: Any) -> Any:
        threads.append(threading.Thread(target=ask))
        threads[0].start()
        threads[0].join(0.1)
        assert threads[0].is_alive()
        return send(messages)

    with monkeypatch.context() as patch:
        patch.setattr(slow.backend.broker, "enqueue_many", meanwhile)
        job_id = slow.enqueue(slow.call("work", 1))
    threads[0].join(20)

    assert told == [(job_id, JobState.QUEUED)]


def test_an_error_between_lock_and_job_releases_the_lock(app_with: Callable[..., App]) -> None:
    class Failing(Middleware):
        is_failing = True

        def enqueue(self, submissions: Sequence[Submission], forward: Any) -> None:
            if self.is_failing:
                raise OSError("no luck")
            forward(submissions)

    failing = Failing()
    app = app_with(Unique(), failing)
    with pytest.raises(OSError, match="no luck"):
        app.enqueue(app.call("work", 1))
    failing.is_failing = False

    app.enqueue(app.call("work", 1))


def test_an_error_after_the_job_was_enqueued_leaves_it_its_lock(app_with: Callable[..., App]) -> None:
    class Failing(Middleware):
        def enqueue(self, submissions: Sequence[Submission], forward: Any) -> None:
            forward(submissions)
            raise OSError("no luck")

    app = app_with(Unique(), Failing())
    with pytest.raises(OSError, match="no luck"):
        app.enqueue(app.call("work", 1))

    (job,) = app.jobs("queued")
    assert refused(app, 1) == job.id


def test_a_job_whose_own_id_is_taken_holds_no_lock(app_with: Callable[..., App]) -> None:
    app = app_with(Unique())
    app.enqueue(app.call("work", 1).options(id="own"))
    with pytest.raises(DuplicateJobId):
        app.enqueue(app.call("work", 2).options(id="own"))

    app.enqueue(app.call("work", 2))


def test_a_call_that_is_repeated_after_an_error_finds_its_own_lock(
    app_with: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = app_with(Unique())
    broker = app.backend.broker
    with monkeypatch.context() as patch:
        for step in ("enqueue_many", "find"):
            patch.setattr(broker, step, out_of_reach)
        with pytest.raises(BrokerUnavailable):
            app.enqueue(app.call("work", 1).options(id="own"))

    assert app.enqueue(app.call("work", 1).options(id="own")) == "own"
    assert refused(app, 1) == "own"


def test_a_call_that_is_repeated_after_its_job_was_kept_leaves_the_job_its_lock(
    app_with: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = app_with(Unique())
    unique_one, broker = app.middlewares[0], app.backend.broker
    with monkeypatch.context() as patch:
        patch.setattr(unique_one, "_confirm", out_of_reach)
        patch.setattr(broker, "find", out_of_reach)
        with pytest.raises(BrokerUnavailable):
            app.enqueue(app.call("work", 1).options(id="own"))

    assert refused(app, 1) == "own"
    with pytest.raises(DuplicateJobId):
        app.enqueue(app.call("work", 1).options(id="own"))
    (entry,) = app.backend.registry.entries("unique/")
    assert unique._unpack(entry.value).is_confirmed


def out_of_reach(*_: object) -> None:
    raise BrokerUnavailable("out of reach")


def test_members_of_a_group_stand_from_the_moment_that_it_is_enqueued(app_with: Callable[..., App]) -> None:
    app = app_with(Unique())
    group = app.enqueue_group([app.call("work", 1), app.call("work", 2)])

    assert refused(app, 2) == f"{group}.1"
    again = app.enqueue_group([app.call("work", 2), app.call("work", 3)])
    assert app.group_status(again).job_ids == (f"{group}.1", f"{again}.1")
    app.cancel_group(group)
    app.enqueue(app.call("work", 1))


def test_members_of_a_group_stand_while_it_is_on_its_way_to_the_server(
    app_with: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick, slow = app_with(Unique()), app_with(Unique())
    send = slow.backend.broker.enqueue_many
    stood: list[str] = []

    def meanwhile(messages: Any) -> Any:
        stood.append(refused(quick, 1))
        return send(messages)

    with monkeypatch.context() as patch:
        patch.setattr(slow.backend.broker, "enqueue_many", meanwhile)
        group = slow.enqueue_group([slow.call("work", 1)])

    assert stood == [f"{group}.0"]


def test_a_producer_that_dies_before_its_group_is_sent_blocks_others_for_a_minute_only(
    app_with: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unique, "_BRINGING", 0.3)
    app = app_with(Unique())
    with monkeypatch.context() as patch:
        for step in ("enqueue_many", "find"):  # so that it can take nothing back
            patch.setattr(app.backend.broker, step, out_of_reach)
        patch.setattr(app._groups, "_refuse_taken", lambda *_: None)
        with pytest.raises(BrokerUnavailable):
            app.enqueue_group([app.call("work", 1)], id="dead")

    def is_taken_over() -> bool:
        return app.enqueue_many([app.call("work", 1)], existing="keep") != ["dead.0"]

    assert not is_taken_over()
    wait_until(is_taken_over, "the lock is taken over")


def test_a_group_of_which_ctrl_c_leaves_open_whether_it_is_there_keeps_its_locks(
    app_with: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = app_with(Unique(seconds=60.0))
    send = app.backend.broker.enqueue_many

    def interrupted(messages: Any) -> Any:
        send(messages)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(app.backend.broker, "enqueue_many", interrupted)
        with pytest.raises(KeyboardInterrupt):
            app.enqueue_group([app.call("work", 1)], id="group")

    assert refused(app, 1) == "group.0"


def test_a_group_that_is_enqueued_again_after_an_error_has_all_its_jobs(
    app_with: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = app_with(Unique())
    calls = [app.call("work", number) for number in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(app.backend.broker, "enqueue_many", out_of_reach)
        with pytest.raises(BrokerUnavailable):
            app.enqueue_group(calls, id="group")
    app.enqueue_group(calls, id="group")

    (opener,) = app.backend.broker.find(["group"])
    assert opener is not None
    bundle = app.sealer.open("group", "default", opener.body).bundle
    assert bundle is not None
    assert [at for at, _, _ in bundle.members] == [0, 1, 2]


@pytest.mark.parametrize("options", [{}, {"seconds": 60.0}])
def test_a_group_that_is_refused_keeps_no_locks(
    options: dict[str, Any], app_with: Callable[..., App]
) -> None:
    app = app_with(Unique(**options))
    first = app.enqueue(app.call("work", "there"))
    with pytest.raises(DuplicateJobId, match="of the chain exist"):
        app.enqueue_chain([app.call("work", 1), app.call("work", "there")])
    app.enqueue_group([app.call("work", 2)], id="taken")
    with pytest.raises(DuplicateJobId):
        app.enqueue_group([app.call("work", 1), app.call("work", 3)], id="taken")

    assert app.enqueue(app.call("work", 1))
    assert app.enqueue(app.call("work", 3))
    # What was there before keeps its own.
    assert refused(app, "there") == first
    assert refused(app, 2) == "taken.0"


def test_a_group_that_the_server_did_not_take_keeps_no_locks(
    app_with: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = app_with(Unique(seconds=60.0))

    def gone(*_: Any) -> Any:
        raise BrokerUnavailable("gone")

    calls = [app.call("work", n) for n in range(150)]
    with monkeypatch.context() as patch:
        patch.setattr(app.backend.broker, "enqueue_many", gone)
        with pytest.raises(BrokerUnavailable):
            app.enqueue_group(calls)

    assert app.enqueue_group(calls)


def test_a_lock_that_cannot_be_read_is_none(app_with: Callable[..., App]) -> None:
    app = app_with(Unique())
    first = app.enqueue(app.call("work", 1))
    (entry,) = app.backend.registry.entries("unique/")
    app.backend.registry.put(entry.key, b"\xc1 nonsense")

    assert app.enqueue(app.call("work", 1)) != first


def test_a_job_of_a_chain_stands_while_those_before_it_run(app_with: Callable[..., App]) -> None:
    app = app_with(Unique())
    chain = app.enqueue_chain([app.call("work", number) for number in range(3)])
    (opener,) = app.backend.broker.claim("default", 1, 30.0)
    envelope = app.sealer.open(opener.id, opener.queue, opener.body)
    open_group(app, opener, envelope)

    assert refused(app, 2) == f"{chain}.2"
    app.cancel_group(chain)
    app.enqueue(app.call("work", 2))


PRODUCER = """
import os
from bulkhead import App
from bulkhead.service.middleware import Middleware, Unique, unique

unique._PENDING = 0.5

class Dying(Middleware):
    def enqueue(self, submissions, forward):
        os._exit(7)

def work(*args):
    pass

app = App(os.environ["URL"], namespace="crash", middlewares=[Unique(), Dying()])
app.task(work)
app.enqueue(app.call("work", 1))
"""


def test_a_producer_that_dies_between_lock_and_job_blocks_others_for_a_moment_only(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    with running(PRODUCER, env={"URL": url}) as script:
        assert script.wait() == 7
    app = App(url, namespace="crash", middlewares=[Unique()])

    @app.task
    def work(*args: object) -> None: ...

    def enqueued() -> bool:
        try:
            work.enqueue(1)
        except DuplicateJobId:
            return False
        return True

    wait_until(enqueued, "the end of the lock")
    assert app.queues()["default"].ready == 1
    app.close()


RACER = """
import os, time
from bulkhead import App
from bulkhead.service.middleware import Unique
from jobs import note

def work(*args):
    pass

app = App(os.environ["URL"], namespace="race", middlewares=[Unique()])
app.task(work)
app.backend
print("ready", flush=True)
while not os.path.exists(os.environ["GO"]):
    time.sleep(0.001)
for id in app.enqueue_many([app.call("work", n) for n in range(20)], existing="keep"):
    note(os.environ["OUT"], id)
"""


@pytest.fixture
def racers(tmp_path: Path) -> Iterator[Callable[[], list[list[str]]]]:
    env = {"URL": f"sqlite:///{tmp_path}/jobs.db", "GO": str(tmp_path / "go")}
    outs = [tmp_path / f"out-{number}" for number in range(3)]
    with (
        running(RACER, env={**env, "OUT": str(outs[0])}) as one,
        running(RACER, env={**env, "OUT": str(outs[1])}) as two,
        running(RACER, env={**env, "OUT": str(outs[2])}) as three,
    ):

        def race() -> list[list[str]]:
            for script in (one, two, three):
                script.wait_for_line("ready")
            (tmp_path / "go").touch()
            assert [script.wait() for script in (one, two, three)] == [0, 0, 0]
            return [lines(out) for out in outs]

        yield race


def test_of_producer_processes_at_once_exactly_one_wins(
    racers: Callable[[], list[list[str]]], tmp_path: Path
) -> None:
    told = racers()

    assert [len(ids) for ids in told] == [20, 20, 20]
    assert all(len(set(ids)) == 1 for ids in zip(*told, strict=True))
    app = App(f"sqlite:///{tmp_path}/jobs.db", namespace="race")
    assert app.backend.broker.counts()["default"].ready == 20
    app.close()


def test_one_that_is_listed_twice_is_refused() -> None:
    one = Unique()
    with pytest.raises(ConfigError, match="twice"):
        App("memory://", middlewares=[one, one])


@pytest.mark.parametrize("make", [lambda: App("memory://", middlewares=5), lambda: Unique(queues=5)])
def test_what_is_no_list_is_refused_by_name(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigTypeError, match=r"middlewares|queues"):
        make()


def test_two_of_the_same_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="another name"):
        App("memory://", middlewares=[Unique(tasks=["a"]), Unique(tasks=["b"])])


@pytest.mark.parametrize("options", [{"key": 5}, {"seconds": 0}, {"tasks": "work"}, {"name": ""}])
def test_a_bad_value_is_refused_when_it_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Unique(**options)


def test_a_key_that_is_no_text_is_refused(app_with: Callable[..., App]) -> None:
    app = app_with(Unique(key=lambda _: 5))  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigTypeError, match="key function"):
        app.enqueue(app.call("work", 1))
