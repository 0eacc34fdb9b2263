"""What an application says at the call, before anything runs: options, queues, enqueueing, lists. No worker here."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest

from bulkhead import (
    App,
    Backoff,
    BrokerUnavailable,
    ConfigError,
    ConfigTypeError,
    DuplicateJobId,
    JobNotFound,
    ResultNotFound,
    RetryPolicy,
    UnknownQueue,
    UnknownTask,
    WaitTimeout,
)


def task_of(app: App, **options):
    return app.task(lambda *args: args, **options) if not options else app.task(**options)(lambda *args: args)


class TestTheUrl:
    @pytest.mark.parametrize("url", ["jobs.db", "mysql://x", "", "http://x", "sqlite//x"])
    def test_with_an_unknown_scheme_is_refused(self, url):
        with pytest.raises(ConfigError, match="url must begin with one of memory://"):
            App(url)
        with pytest.raises(ConfigError, match="must begin with one of"):
            App("memory://", results=url)

    def test_that_is_no_text_is_refused(self):
        with pytest.raises(ConfigTypeError, match="url must be a str"):
            App(7)

    @pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+cluster", "nats"])
    def test_whose_client_library_is_missing_names_the_command_that_installs_it(self, scheme):
        package = "nats" if scheme == "nats" else "redis"
        code = f"""
import sys
sys.modules[{package!r}] = None
from bulkhead import App, MissingExtra
app = App("{scheme}://127.0.0.1:1")
try:
    app.queues()
except MissingExtra as error:
    assert isinstance(error, ImportError)
    print(error)
"""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
        )
        extra = "nats" if scheme == "nats" else "redis"
        assert f"pip install 'bulkhead-pool[{extra}]'" in done.stdout, done

    def test_needs_msgspec_and_says_how_to_install_it(self):
        code = """
import sys
sys.modules["msgspec"] = None
from bulkhead import Dispatcher, MissingExtra
try:
    from bulkhead import App
except MissingExtra as error:
    print(error)
"""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
        )
        assert "pip install 'bulkhead-pool[queue]'" in done.stdout, done

    @pytest.mark.parametrize("url", ["sqlite:////nowhere/at/all/jobs.db", "sqlite:///"])
    def test_of_a_file_that_cannot_be_is_refused_when_it_is_opened(self, url):
        with pytest.raises(ConfigError):
            App(url).queues()

    def test_of_results_may_be_another(self, make, tmp_path):
        service = make("sqlite", options={"results": f"sqlite:///{tmp_path}/results.db"})
        id = service.add.enqueue(1, 2)
        assert service.app.cancel(id)
        only_jobs = App(service.url, namespace=service.app.namespace)
        only_results = App(f"sqlite:///{tmp_path}/results.db", namespace=service.app.namespace)
        assert service.app.job(id).state == "cancelled"
        assert only_jobs.find_jobs([id]) == [None]
        assert only_results.job(id).state == "cancelled"
        only_jobs.close()
        only_results.close()


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"namespace": "a b"}, "namespace must be"),
            ({"namespace": ""}, "namespace must be"),
            ({"codec": "yaml"}, "codec must be one of"),
            ({"codec": "pickle"}, "needs key="),
            ({"key": "short"}, "at least 16 bytes"),
            ({"key": 7}, "key must be bytes or a str"),
            ({"lease": 0}, "lease must be"),
            ({"lease": 0.01}, "lease must be 0.1 s to"),
            ({"lease": 1e300}, "lease must be 0.1 s to"),
            ({"lease": float("nan")}, "lease must be"),
            ({"middlewares": [object()]}, "middlewares must be instances"),
            ({"results": "ftp://host"}, "results: url must begin with"),
        ],
    )
    def test_of_an_application_are_checked(self, options, message):
        with pytest.raises(ConfigError, match=message):
            App("memory://", **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"queue": ""}, "queue must have 1 to 200"),
            ({"queue": "a\nb"}, "queue must have only"),
            ({"concurrency": 0}, "concurrency must be at least 1"),
            ({"priority": 101}, "priority must be at most 100"),
            ({"max_retries": -1}, "max_retries must be at least 0"),
            ({"timeout": 0}, "timeout must be"),
            ({"timeout": -1}, "timeout must be"),
            ({"backoff": 3}, "backoff must be a Backoff"),
            ({"backoff": RetryPolicy(9)}, "attempts are said by max_retries"),
            ({"keep_result": -1}, "keep_result must be"),
            ({"on_success": 3}, "on_success must be callable"),
            ({"name": ""}, "name must have"),
        ],
    )
    def test_of_a_task_are_checked(self, options, message):
        app = App("memory://")
        with pytest.raises(ConfigError, match=message):
            task_of(app, **options)
        assert app.tasks() == {}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"delay": -1}, "delay must be"),
            ({"delay": float("inf")}, "delay must be"),
            ({"delay": "1"}, "delay must be a number"),
            ({"delay": 1, "eta": 5.0}, "exclude each other"),
            ({"eta": datetime(2030, 1, 1)}, "aware datetime"),  # noqa: DTZ001
            ({"eta": -3}, "eta must be"),
            ({"id": ""}, "id must have"),
            ({"id": 7}, "id must be a str"),
            ({"id": "x" * 201}, "1 to 200"),
            ({"priority": -101}, "priority must be at least -100"),
            ({"timeout": 0}, "timeout must be"),
            ({"max_retries": 2**40}, "max_retries must be at most"),
            ({"headers": {"a": 1}}, "headers must map"),
            ({"on_success": print}, "on_success must be a job"),
        ],
    )
    def test_of_a_job_are_checked(self, service, options, message):
        with pytest.raises(ConfigError, match=message):
            service.echo.call(1).options(**options)
        assert service.app.counts()["queued"] == 0

    def test_a_queue_that_is_given_another_concurrency_is_an_error_and_one_that_is_left_out_is_not(self):
        app = App("memory://")
        task_of(app, queue="q1", concurrency=5, name="a")
        task_of(app, queue="q1", name="b")
        task_of(app, queue="q1", concurrency=5, name="c")
        with pytest.raises(ConfigError, match="concurrency=5 already and cannot have 10"):
            task_of(app, queue="q1", concurrency=10, name="d")
        assert sorted(app.tasks()) == ["a", "b", "c"]
        with pytest.raises(ConfigError, match="concurrency=5 already"):
            app.queue("q1", concurrency=6)
        app.queue("q1", hard_memory_limit=1 << 30)
        with pytest.raises(ConfigError, match="hard_memory_limit"):
            app.queue("q1", hard_memory_limit=1 << 31)
        with pytest.raises(ConfigError, match="timeout is no option of a queue"):
            app.queue("q1", timeout=3)
        with pytest.raises(ConfigTypeError, match="colour"):
            app.queue("q1", colour="red")

    def test_a_function_that_only_returns_what_is_still_to_be_run_is_no_task(self):
        async def later() -> None: ...

        async def some_later():
            yield

        def some():
            yield

        for fn in (later, some_later, some):
            with pytest.raises(ConfigTypeError, match="must return its result"):
                App("memory://").task(fn)

    def test_two_tasks_of_one_name_are_an_error(self):
        app = App("memory://")
        task_of(app, name="a")
        with pytest.raises(ConfigError, match="there is a task 'a' already"):
            task_of(app, name="a")
        with pytest.raises(ConfigTypeError):
            app.task(7)
        with pytest.raises(ConfigTypeError, match="task already"):
            app.task(app.tasks()["a"])

    def test_what_the_function_carries_hides_nothing_of_the_task(self):
        def marked() -> str:
            return "ran"

        marked.enqueue = marked.handler = "of another library"
        marked.colour = "blue"
        task = App("memory://").task(marked)
        assert (task.colour, task(), task.handler) == ("blue", "ran", None)
        assert task.app.job(task.enqueue()).state == "queued"

    def test_a_task_is_still_the_function(self, service):
        assert service.add(2, 3) == 5
        assert service.add.__name__ == "add"


class TestEnqueueing:
    def test_gives_ids_in_order_and_each_is_new(self, anywhere):
        ids = anywhere.app.enqueue_many(anywhere.echo.call(number) for number in range(2500))
        assert len(set(ids)) == 2500
        assert [job.id for job in anywhere.app.jobs("queued", limit=10_000)] == ids

    @pytest.mark.slow
    def test_takes_a_hundred_thousand_jobs_in_a_few_seconds(self, durable):
        began = time.monotonic()
        durable.app.enqueue_many(durable.echo.call(number) for number in range(100_000))
        assert time.monotonic() - began < 30
        assert durable.app.queues()["default"].ready == 100_000

    def test_an_own_id_that_is_taken_is_not_doubled(self, anywhere):
        app, call = anywhere.app, anywhere.echo.call(1).options(id="mine")
        assert app.enqueue(call) == "mine"
        with pytest.raises(DuplicateJobId) as raised:
            app.enqueue(call)
        assert raised.value.job_ids == ("mine",)
        with pytest.raises(DuplicateJobId, match="1 of 2"):
            app.enqueue_many([call, anywhere.echo.call(2)])
        assert app.enqueue_many([call, call.options(id="other")], existing="keep") == ["mine", "other"]
        assert app.queues()["default"].ready == 3
        with pytest.raises(ConfigError, match="existing must be"):
            app.enqueue_many([call], existing="double")

    def test_nothing_is_enqueued_when_one_job_cannot_be(self, service):
        app = service.app
        with pytest.raises(ConfigTypeError, match="arguments of task 'echo' cannot be encoded in msgpack"):
            app.enqueue_many([service.echo.call(1), service.echo.call(object())])
        with pytest.raises(ConfigTypeError, match=r"jobs are made by task.call"):
            app.enqueue_many([service.echo.call(1), service.echo])
        with pytest.raises(UnknownQueue, match="no queue 'typo'; known are: default, side"):
            app.enqueue_many([service.echo.call(1), service.echo.call(1).options(queue="typo")])
        assert app.enqueue_many([]) == []
        assert app.counts()["queued"] == 0

    def test_a_follow_up_that_nobody_would_run_is_refused(self, service):
        follow = service.echo.call().options(queue="typo")
        with pytest.raises(UnknownQueue):
            service.app.enqueue(service.echo.call(1).options(on_success=follow))
        other = task_of(App("memory://"), name="other")
        with pytest.raises(ConfigError, match="belongs to another application"):
            service.app.enqueue(service.echo.call(1).options(on_error=other.call()))
        with pytest.raises(ConfigError, match="belongs to another application"):
            service.app.enqueue(other.call())

    def test_too_many_follow_ups_one_behind_the_other_are_refused(self, service):
        call = service.echo.call()
        for _ in range(2000):
            call = service.echo.call().options(on_success=call)
        with pytest.raises(ConfigError, match="too many others follow it"):
            service.app.enqueue(call)
        assert service.app.counts()["queued"] == 0

    def test_a_state_that_is_not_listed_is_refused(self, service):
        service.echo.call().options(delay=100.0).enqueue()
        with pytest.raises(ConfigError, match=r"not 'retrying'; those that wait .* among the scheduled"):
            service.app.jobs("retrying")
        for state in ("nope", None, 5, ["queued"]):
            with pytest.raises(ConfigError, match="state must be one of queued, scheduled"):
                service.app.jobs(state)

    def test_an_unknown_task_is_an_error_at_the_call(self, service):
        with pytest.raises(UnknownTask, match="there is no task 'nope'; known are: add,"):
            service.app.call("nope", 1)
        assert service.app.enqueue(service.app.call("add", 1, 2))

    def test_a_job_with_a_delay_or_an_instant_is_scheduled_and_a_past_one_is_queued(self, anywhere):
        app = anywhere.app
        in_an_hour = datetime.now(UTC) + timedelta(hours=1)
        first = anywhere.echo.call(1).options(eta=in_an_hour.timestamp() - 10).enqueue()
        second = anywhere.echo.call(1).options(eta=in_an_hour).enqueue()
        third = anywhere.echo.call(1).options(delay=3700).enqueue()
        past = anywhere.echo.call(1).options(eta=1000.0).enqueue()
        assert [job.id for job in app.jobs("scheduled")] == [first, second, third]
        assert [job.id for job in app.jobs("queued")] == [past]
        assert abs(app.job(second).due_at - in_an_hour) < timedelta(milliseconds=2)

    def test_a_server_that_cannot_be_reached_is_an_error_of_its_own(self, tmp_path):
        folder = tmp_path / "jobs.db"
        folder.mkdir()
        app = App(f"sqlite:///{folder}")
        task = task_of(app, name="a")
        with pytest.raises((BrokerUnavailable, ConfigError)):
            task.enqueue()
        with pytest.raises((BrokerUnavailable, ConfigError)):
            app.queues()


class TestLooking:
    def test_the_same_id_in_two_namespaces_is_two_jobs(self, make):
        one = make("sqlite", options={"namespace": "one"})
        two = make("sqlite", options={"namespace": "two"})
        assert one.url == two.url
        for each in (one, two):
            assert each.echo.call(each.name).options(id="same").enqueue() == "same"
        assert one.app.cancel("same")
        assert one.app.job("same").state == "cancelled"
        assert two.app.job("same").state == "queued"
        assert two.app.counts()["cancelled"] == 0

    def test_what_is_unknown_is_an_error_of_its_own(self, anywhere):
        app = anywhere.app
        for ask in (app.job, app.result, app.cancel, app.retry_dead, app.delete_dead):
            with pytest.raises(JobNotFound, match="nobody"):
                ask("nobody")
        with pytest.raises(JobNotFound):
            app.wait("nobody", timeout=1)
        assert not app.delete_result("nobody")
        id = anywhere.echo.enqueue(1)
        with pytest.raises(ResultNotFound, match="is queued and has left no result"):
            app.result(id)
        with pytest.raises(WaitTimeout, match="it is queued"):
            app.result(id, timeout=0.05)
        for ask in (app.pause, app.resume, app.run_once):
            with pytest.raises(UnknownQueue):
                ask("typo")
        with pytest.raises(UnknownQueue):
            app.run(["typo"])

    @pytest.mark.parametrize(
        "options", [{"state": "lost"}, {"offset": -1}, {"limit": 0}, {"limit": 10_001}, {"limit": "9"}]
    )
    def test_bad_lists_are_refused(self, service, options):
        with pytest.raises(ConfigError):
            service.app.jobs(**{"state": "queued", **options})

    def test_an_application_without_queues_cannot_run(self):
        with pytest.raises(ConfigError, match="has no queue"):
            App("memory://").run()

    def test_a_task_that_workers_cannot_find_is_told_before_anything_starts(self):
        app = App("memory://")
        task_of(app, name="nameless")
        with pytest.raises(ConfigError, match="cannot be found by worker processes"):
            app.run()

    def test_a_url_with_a_password_is_not_shown(self):
        assert "secret" not in repr(App("redis://user:secret@host"))

    def test_the_default_backoff_is_as_promised(self):
        default = Backoff()
        assert (default.initial, default.factor, default.jitter, default.maximum) == (1.0, 1.6, 0.2, 3600.0)
