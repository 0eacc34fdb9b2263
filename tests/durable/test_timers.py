"""What timers do to one another and to what is kept, step by step: one test is all of them, in memory, with a clock."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from uuid import uuid4

import msgspec
import pytest
from durable_jobs import consuming
from watching import wait_until

from bulkhead import App, ScheduleNotFound
from bulkhead.backends.base import Place
from bulkhead.errors import BrokerUnavailable, ConfigError, ConfigTypeError, MessageTooLarge
from bulkhead.service import schedules
from bulkhead.service.middleware.base import Middleware
from bulkhead.service.schedules import Timer

HOUR = 3600.0


class Clock:
    """POSIX seconds that the test moves. Begins two hours ago, so that what it calls due is due for the broker."""

    def __init__(self) -> None:
        self.now = float(int(time.time()) - 2 * HOUR)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(schedules, "_now", lambda: round(made.now * 1000))
    return made


@pytest.fixture
def app() -> Iterator[App]:
    made = make_app()
    yield made
    made.close()


def make_app(url: str = "", **options) -> App:
    made = App(url or f"memory://{uuid4().hex}", **options)
    made.task(work)
    made.task(other)
    return made


def timer_of(app: App, clock: Clock) -> Timer:
    """A timer that only ticks when it is told to."""
    return Timer(app, lambda name, work: threading.Thread(target=work), clock)


def work(*args):
    return args


def other(*args):
    return args


def add(app: App, when: str = "@every 10s", name: str = "s", **options) -> None:
    app.add_schedule(name, when, app.call("work", 1), **options)


def ids(app: App) -> list[str]:
    return [one.id for place in (Place.READY, Place.SCHEDULED) for one in app.backend.broker.records(place)]


def run(clock: Clock, seconds: float, name: str = "s") -> str:
    """The id of the run that is due so long after now."""
    return f"schedule:{name}:{round((clock.now + seconds) * 1000)}"


def settle(app: App) -> int:
    """Have what is ready come and go."""
    claims = app.backend.broker.claim("default", 100, 30.0)
    app.backend.broker.ack([one.hold for one in claims])
    return len(claims)


def known(app: App, name: str = "s") -> schedules.Schedule:
    return next(one for one in app.schedules() if one.name == name)


def between(app: App, part: str, name: str, act: Callable[[], object], monkeypatch) -> None:
    """Have `act` happen before the next call of a method of the backend."""
    owner = getattr(app.backend, part)
    call = getattr(owner, name)

    def first(*args, **options):
        monkeypatch.setattr(owner, name, call)
        act()
        return call(*args, **options)

    monkeypatch.setattr(owner, name, first)


class TestTicks:
    def test_a_run_is_enqueued_when_it_is_due_and_the_next_one_is_waited_for(self, app, clock):
        add(app)
        timer, due = timer_of(app, clock), run(clock, 10)
        clock.now += 9.5
        assert 0.5 <= timer.tick() <= 0.55
        assert ids(app) == []
        clock.now += 0.5
        assert timer.tick() == 1.0
        assert ids(app) == [due]
        assert (known(app).last_job_id, known(app).next_due) == (due, _utc(clock.now + 10))

    def test_runs_of_many_schedules_are_one_call(self, app, clock, monkeypatch):
        for number in range(50):
            add(app, name=f"s{number}")
        sent = []
        enqueue = app.backend.broker.enqueue_many
        monkeypatch.setattr(app.backend.broker, "enqueue_many", lambda m: sent.append(len(m)) or enqueue(m))
        clock.now += 10
        timer_of(app, clock).tick()
        assert sent == [50]

    @pytest.mark.parametrize(("missed", "expected"), [("skip", [5]), ("once", [5]), ("all", [1, 2, 3, 4, 5])])
    def test_what_was_missed_while_no_worker_was_there(self, app, clock, missed, expected):
        add(app, missed=missed)
        due = [run(clock, 10 * n) for n in expected]
        clock.now += 55
        timer_of(app, clock).tick()
        assert ids(app) == due

    def test_what_is_skipped_is_not_enqueued_later_either(self, app, clock):
        add(app, "@every 1h", missed="skip")
        clock.now += HOUR + 31
        timer = timer_of(app, clock)
        timer.tick()
        timer.tick()
        assert (ids(app), known(app).last_due) == ([], None)
        assert known(app).next_due == _utc(clock.now + HOUR - 31)

    def test_a_clock_that_is_fast_enqueues_early_and_the_job_waits_until_it_is_due(self, app, clock):
        clock.now = time.time() + 1000
        add(app)
        clock.now += 10.001
        timer_of(app, clock).tick()
        (job,) = app.jobs("scheduled")
        assert abs(job.due_at.timestamp() - clock.now) < 0.01

    def test_jobs_that_follow_a_run_have_ids_of_their_own_in_each_run(self, app, clock):
        follow = app.call("other").options(on_error=app.call("work"))
        app.add_schedule("s", "@every 10s", app.call("work").options(on_success=follow))
        for _ in range(2):
            clock.now += 10
            timer_of(app, clock).tick()
        found = []
        for record in app.backend.broker.records(Place.READY):
            (then,) = app.sealer.open(record.id, record.queue, record.body).on_success
            found += [then.id, then.envelope.on_error[0].id]
        first, second = ids(app)
        assert found == [f"{first}.0", f"{first}.1", f"{second}.0", f"{second}.1"]


class TestInterleavings:
    def test_two_timers_at_once_enqueue_a_run_once(self, app, clock, monkeypatch):
        add(app)
        due = run(clock, 10)
        clock.now += 10
        between(app, "broker", "enqueue_many", timer_of(app, clock).tick, monkeypatch)
        timer_of(app, clock).tick()
        assert ids(app) == [due]
        assert known(app).next_due == _utc(clock.now + 10)

    def test_one_that_was_killed_between_enqueue_and_advance_is_made_up_for(self, app, clock, monkeypatch):
        add(app)
        due = run(clock, 10)
        clock.now += 10

        def die():
            raise KeyboardInterrupt

        between(app, "registry", "put", die, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            timer_of(app, clock).tick()
        assert settle(app) == 1
        timer_of(app, clock).tick()
        assert ids(app) == []
        assert (known(app).last_job_id, known(app).next_due) == (due, _utc(clock.now + 10))

    def test_one_that_was_stopped_before_its_enqueue_is_refused_when_the_job_has_come_and_gone(
        self, app, clock, monkeypatch
    ):
        add(app)
        clock.now += 10

        def meanwhile():
            timer_of(app, clock).tick()
            assert settle(app) == 1
            clock.now += 25
            timer_of(app, clock).tick()

        between(app, "broker", "enqueue_many", meanwhile, monkeypatch)
        timer_of(app, clock).tick()
        assert ids(app) == [run(clock, -5)]
        assert known(app).next_due == _utc(clock.now + 5)

    def test_one_that_was_stopped_for_long_before_it_enqueues_reads_anew(self, app, clock, monkeypatch):
        add(app)
        clock.now += 10
        sent = []
        monkeypatch.setattr(
            app.backend.broker, "enqueue_many", lambda messages: sent.extend(messages) or [True]
        )
        entries = app.backend.registry.entries

        def stopped(prefix):
            found = entries(prefix)
            clock.now += 61
            return found

        monkeypatch.setattr(app.backend.registry, "entries", stopped)
        timer = timer_of(app, clock)
        timer.tick()
        assert sent == []
        monkeypatch.setattr(app.backend.registry, "entries", entries)
        timer.tick()
        assert [one.id for one in sent] == [run(clock, -1)]

    def test_paused_between_enqueue_and_advance_it_stays_paused(self, app, clock, monkeypatch):
        add(app)
        clock.now += 10
        between(app, "broker", "enqueue_many", lambda: app.pause_schedule("s"), monkeypatch)
        timer_of(app, clock).tick()
        assert len(ids(app)) == 1  # it was due before
        clock.now += 100
        timer_of(app, clock).tick()
        assert len(ids(app)) == 1
        app.resume_schedule("s")
        timer_of(app, clock).tick()
        assert len(ids(app)) == 1
        assert known(app).next_due > _utc(clock.now)

    def test_cancelled_between_enqueue_and_advance_it_stays_cancelled(self, app, clock, monkeypatch):
        add(app)
        clock.now += 10
        between(app, "broker", "enqueue_many", lambda: app.cancel_schedule("s"), monkeypatch)
        timer_of(app, clock).tick()
        assert app.schedules() == []

    def test_changed_between_read_and_advance_the_new_one_stays(self, app, clock, monkeypatch):
        add(app)
        clock.now += 10
        between(app, "registry", "put", lambda: None, monkeypatch)
        between(app, "broker", "enqueue_many", lambda: add(app, "@every 1h"), monkeypatch)
        timer_of(app, clock).tick()
        assert (known(app).when, known(app).next_due) == ("@every 1h", _utc(clock.now + HOUR))

    def test_a_pause_and_a_timer_at_once_lose_neither(self, app, clock, monkeypatch):
        add(app)
        clock.now += 10
        between(app, "registry", "put", timer_of(app, clock).tick, monkeypatch)
        app.pause_schedule("s")
        assert known(app).is_paused
        assert known(app).last_due == _utc(clock.now)


class TestTrouble:
    def test_a_run_that_cannot_be_enqueued_keeps_back_neither_others_nor_the_next(
        self, app, clock, monkeypatch, caplog
    ):
        add(app, name="bad")
        add(app, name="good")
        enqueue = app.backend.broker.enqueue_many

        def picky(messages):
            if any("bad" in one.id for one in messages):
                raise MessageTooLarge("too large")
            return enqueue(messages)

        monkeypatch.setattr(app.backend.broker, "enqueue_many", picky)
        due = run(clock, 10, "good")
        clock.now += 10
        timer_of(app, clock).tick()
        assert ids(app) == [due]
        assert known(app, "bad").next_due == _utc(clock.now + 10)
        assert "schedule 'bad': its run could not be enqueued" in caplog.text

    def test_out_of_reach_the_server_is_asked_again_and_the_run_is_late(self, app, clock, monkeypatch):
        add(app)
        due = run(clock, 10)
        clock.now += 10

        def fail():
            raise BrokerUnavailable("gone")

        between(app, "broker", "enqueue_many", fail, monkeypatch)
        timer = timer_of(app, clock)
        with pytest.raises(BrokerUnavailable):
            timer.tick()
        clock.now += 3
        timer.tick()
        assert ids(app) == [due]

    def test_a_schedule_of_a_task_that_a_worker_does_not_have_is_left_to_others(self, app, clock):
        add(app)
        due = run(clock, 10)
        clock.now += 10
        stranger = App(app.url)
        stranger.task(other)
        timer_of(stranger, clock).tick()
        assert ids(app) == []
        timer_of(app, clock).tick()
        assert ids(app) == [due]
        stranger.close()

    def test_an_entry_that_cannot_be_read_is_told_once_and_left_alone(self, app, clock, caplog):
        app.backend.registry.put("schedules/odd", b"?")
        add(app)
        clock.now += 10
        timer = timer_of(app, clock)
        timer.tick()
        timer.tick()
        assert len(ids(app)) == 1
        assert caplog.text.count("schedule 'odd' is skipped") == 1
        assert [one.name for one in app.schedules()] == ["s"]

    @pytest.mark.parametrize(
        "changed",
        [
            {"next_due": -(2**62)},
            {"next_due": 2**63},
            {"next_due": float("nan")},
            {"anchor": -(2**40)},
            {"last_due": 2**62},
            {"when": "61 * * * *"},
            {"tz": "Nowhere/At_All"},
            {"missed": "perhaps"},
            {"body": b"nonsense"},
            {"task": None},
        ],
        ids=lambda changed: " ".join(changed),
    )
    def test_an_entry_that_nobody_can_have_written_costs_only_itself(self, changed, app, clock, caplog):
        for name in ("a", "m", "z"):
            app.add_schedule(name, "@every 1m", app.call("work"))
        key = "schedules/m"
        names = schedules._Kept.__struct_fields__
        fields = msgspec.msgpack.decode(app.backend.registry.get(key).value)
        spoilt = {**dict(zip(names, fields, strict=True)), **changed}
        app.backend.registry.put(key, msgspec.msgpack.encode(list(spoilt.values())))
        clock.now += 90
        timer = timer_of(app, clock)

        for _ in range(3):
            timer.tick()
            seen = [one.name for one in app.schedules()]

        assert [one for one in seen if one != "m"] == ["a", "z"]
        assert len(app.backend.broker.records(Place.READY)) == 2
        told = [one.getMessage() for one in caplog.records if "schedule 'm'" in one.getMessage()]
        assert 1 <= len(told) <= 2  # by the timer, and by who has asked for the list
        app.cancel_schedule("m")
        assert [one.name for one in app.schedules()] == ["a", "z"]

    def test_a_job_that_was_not_sealed_with_the_key_is_never_enqueued(self, app, clock, caplog):
        add(app)
        signed = make_app(app.url, key="k" * 16)
        clock.now += 10
        timer_of(signed, clock).tick()
        assert ids(app) == []
        assert "not signed" in caplog.text
        timer_of(app, clock).tick()
        assert len(ids(app)) == 1, "it is left to those who can read it"
        signed.close()

    def test_pickled_arguments_come_through_where_they_are_signed(self, clock):
        app = make_app(codec="pickle", key="k" * 16)
        app.add_schedule("s", "@every 10s", app.call("work", {1, 2}, complex(1, 2)))
        clock.now += 10
        timer_of(app, clock).tick()
        (job,) = app.jobs("queued")
        assert job.task == "work"
        app.close()

    def test_runs_pass_the_middlewares(self, clock):
        seen = []

        class Seeing(Middleware):
            def enqueue(self, submissions, forward):
                seen.extend((one.id, one.call.task.name, one.call.args) for one in submissions)
                forward(submissions)

        app = make_app(middlewares=[Seeing()])
        add(app)
        due = run(clock, 10)
        clock.now += 10
        timer_of(app, clock).tick()
        assert seen == [(due, "work", (1,))]
        app.close()


class TestDeclarations:
    def test_to_declare_one_connects_to_nothing(self):
        app = make_app("redis://127.0.0.1:1/0")
        app.schedule("s", "@daily", app.call("work"))
        with pytest.raises(BrokerUnavailable):
            app.put_schedules()

    def test_put_again_unchanged_it_goes_on_where_it_was(self, app, clock):
        app.schedule("s", "@every 10s", app.call("work").options(on_success=app.call("other")))
        app.put_schedules()
        before = known(app)
        clock.now += 25
        again = make_app(app.url)
        again.schedule("s", "@every 10s", again.call("work").options(on_success=again.call("other")))
        again.put_schedules()
        assert known(again) == before
        again.close()

    def test_with_other_arguments_its_times_stay_and_with_other_times_it_begins_anew(self, app, clock):
        add(app)
        app.pause_schedule("s")
        clock.now += 4
        app.add_schedule("s", "@every 10s", app.call("other"))
        assert (known(app).task, known(app).next_due) == ("other", _utc(clock.now + 6))
        app.add_schedule("s", "@every 20s", app.call("other"))
        assert (known(app).next_due, known(app).is_paused) == (_utc(clock.now + 20), True)

    def test_taken_out_of_the_code_it_goes_on_and_is_told(self, app, clock, caplog):
        app.schedule("old", "@daily", app.call("work"))
        app.put_schedules()
        again = make_app(app.url)
        again.schedule("new", "@daily", again.call("work"))
        with caplog.at_level(logging.INFO, "bulkhead"):
            again.put_schedules()
        assert [one.name for one in again.schedules()] == ["new", "old"]
        assert "cancel_schedule('old') would end it" in caplog.text
        again.close()

    def test_the_same_name_twice_is_refused_unless_it_is_the_same_schedule(self, app):
        app.schedule("s", "@daily", app.call("work", 1))
        app.schedule("s", "@daily", app.call("work", 1))
        with pytest.raises(ConfigError, match="there is a schedule 's' already"):
            app.schedule("s", "@daily", app.call("work", 2))


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"name": ""}, "name must have"),
            ({"name": "x" * 151}, "name must have up to 150"),
            ({"name": "a\nb"}, "name must have only"),
            ({"name": 5}, "name must be a str"),
            ({"when": "daily"}, "when must be"),
            ({"tz": "Europe/Bonn"}, "tz must be"),
            ({"missed": "twice"}, "missed must be one of skip, once, all"),
            ({"call": work}, "call must be a job"),
        ],
    )
    def test_a_bad_value_is_refused_by_name(self, app, options, match):
        given = {"name": "s", "when": "@daily", "call": app.call("work"), **options}
        for schedule in (app.schedule, app.add_schedule):
            with pytest.raises(ConfigError, match=match):
                schedule(given.pop("name"), given.pop("when"), given.pop("call"), **given)
            given = {"name": "s", "when": "@daily", "call": app.call("work"), **options}
        assert app.schedules() == []

    @pytest.mark.parametrize("options", [{"id": "own"}, {"delay": 1.0}, {"eta": 1.0}])
    def test_a_job_that_says_itself_when_or_who_it_is_is_refused(self, app, options):
        with pytest.raises(ConfigError, match="call must have n"):
            app.schedule("s", "@daily", app.call("work").options(**options))

    def test_a_follow_up_with_an_id_of_its_own_is_refused(self, app):
        call = app.call("work").options(on_success=app.call("other").options(id="own"))
        with pytest.raises(ConfigError, match="nor what follows"):
            app.schedule("s", "@daily", call)

    def test_arguments_that_cannot_be_encoded_are_refused(self, app):
        with pytest.raises(ConfigTypeError):
            app.schedule("s", "@daily", app.call("work", object()))

    def test_an_unknown_name_is_not_found(self, app):
        for act in (app.pause_schedule, app.resume_schedule, app.cancel_schedule):
            with pytest.raises(ScheduleNotFound):
                act("nowhere")


def test_a_worker_that_starts_does_with_missed_runs_what_each_schedule_says(memory_app, monkeypatch):
    """A worker comes back: three schedules were kept an hour and a minute ago, the last runs were due a minute ago."""
    app, then = memory_app, round((time.time() - HOUR - 60) * 1000)
    with monkeypatch.context() as patch:
        patch.setattr(schedules, "_now", lambda: then)
        for missed in ("skip", "once", "all"):
            app.add_schedule(missed, "@every 10m", app.call("give", missed), missed=missed)
    last = then + 6 * 600_000
    with consuming():
        wait_until(lambda: len(app.jobs("succeeded")) == 7)
    expected = {f"schedule:all:{then + n * 600_000}" for n in range(1, 7)} | {f"schedule:once:{last}"}
    assert {job.id for job in app.jobs("succeeded")} == expected
    assert {one.name: one.last_due for one in app.schedules()}["skip"] is None


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(round(seconds * 1000) / 1000, UTC)
