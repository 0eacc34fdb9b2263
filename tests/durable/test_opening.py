"""What becomes of the message that holds a group or chain; bounds, and input that is refused. In memory, where one can
be everybody.
"""

from __future__ import annotations

import itertools

import pytest
from durable_jobs import add, consuming, give, grow
from watching import wait_until

from bulkhead import App, JobState
from bulkhead.backends.base import Return
from bulkhead.errors import (
    ConfigError,
    ConfigTypeError,
    DuplicateJobId,
    JobNotFound,
    MessageTooLarge,
    UnknownQueue,
)
from bulkhead.service import groups
from bulkhead.service.middleware.base import Middleware

SOON = 30.0


class TestOpening:
    def test_taken_apart_again_when_its_jobs_have_come_and_gone_nothing_runs_twice(self, memory_app):
        """The interleaving: a worker dies between the last enqueue and its ack, and the jobs are quick."""
        app, broker = memory_app, memory_app.backend.broker
        group = app.enqueue_group([give.call(n) for n in range(3)])
        (first,) = broker.claim("default", 1, 0.2)
        envelope = app.sealer.open(group, "default", first.body)
        ack, broker.ack = broker.ack, lambda holds: [True for _ in holds]
        app._groups.open(first, envelope)
        broker.ack = ack
        jobs = broker.claim("default", 10, 30.0)
        assert broker.ack([job.hold for job in jobs if job.id != group]) == [True, True, True]
        assert broker.nack([Return(first.hold)]) == [True]
        (second,) = broker.claim("default", 10, 30.0)
        app._groups.open(second, envelope)
        assert broker.claim("default", 10, 30.0) == []
        assert broker.find([group]) == [None]

    def test_who_has_lost_the_opener_enqueues_nothing_more(self, memory_app):
        app = memory_app
        group = app.enqueue_group([give.call(n) for n in range(3)])
        broker = app.backend.broker
        (first,) = broker.claim("default", 1, 0.01)
        wait_until(lambda: broker.claim("default", 1, 5.0))
        app._groups.open(first, app.sealer.open(group, "default", first.body))
        assert broker.find([f"{group}.0"]) == [None]

    def test_an_opener_that_kills_its_workers_becomes_a_dead_letter_that_can_be_retried(self, memory_app):
        app = memory_app
        group = app.enqueue_group([give.call(1)])
        broker = app.backend.broker
        for _ in range(20):
            wait_until(lambda: broker.claim("default", 1, 0.001))
        assert app.run_once() is None
        assert app.dead()[0].id == group
        assert app.group_status(group).counts == {"failed": 1}
        app.retry_dead(group)
        assert app.group_status(group).counts == {"queued": 1}
        assert app.run_once().id == f"{group}.0"
        assert app.run_once() is None
        assert app.group_results(group) == [1]

    def test_cancelled_while_a_worker_opens_it_no_job_is_left(self, memory_app, monkeypatch):
        """The interleaving: the mark is set behind the worker's enqueue, before it notes the group."""
        app = memory_app
        group = app.enqueue_group([give.call(n) for n in range(3)])
        (claim,) = app.backend.broker.claim("default", 1, 30.0)
        note = app._groups._note_opened

        def cancelled_first(*args):
            assert app.cancel_group(group)
            return note(*args)

        monkeypatch.setattr(app._groups, "_note_opened", cancelled_first)
        app._groups.open(claim, app.sealer.open(group, "default", claim.body))
        assert app.group_status(group).counts == {"cancelled": 3}
        assert app.backend.broker.claim("default", 10, 30.0) == []

    def test_a_chain_that_cannot_go_on_as_a_result_is_too_large_has_failed(self, memory_app, monkeypatch):
        """A server with a limit, such as NATS: the next job's message would hold the result."""
        app, broker = memory_app, memory_app.backend.broker
        enqueue = broker.enqueue_many

        def limited(messages):
            if any(len(message.body) > 10_000 for message in messages):
                raise MessageTooLarge("more than 10,000 bytes", size_bytes=20_000, limit_bytes=10_000)
            return enqueue(messages)

        monkeypatch.setattr(broker, "enqueue_many", limited)
        chain = app.enqueue_chain([grow.call(20_000), give.call(), give.call()])
        others = app.enqueue_group([grow.call(10), give.call(1)])
        with consuming():
            status = app.wait_group(chain, timeout=SOON)
            assert app.wait_group(others, timeout=SOON).state == "succeeded"
        assert status.states == ("failed", "cancelled", "cancelled")
        assert "more than 10,000 bytes" in app.job(f"{chain}.0").reason

    def test_a_group_that_is_too_large_for_the_server_is_refused_and_nothing_is_enqueued(
        self, memory_app, monkeypatch
    ):
        def refusing(messages):
            raise MessageTooLarge("more than 10 bytes", size_bytes=20, limit_bytes=10)

        with monkeypatch.context() as patch:
            patch.setattr(memory_app.backend.broker, "enqueue_many", refusing)
            with pytest.raises(MessageTooLarge):
                memory_app.enqueue_group([give.call(1)], id="mine")
        with pytest.raises(JobNotFound):
            memory_app.group_status("mine")
        assert memory_app.enqueue_group([give.call(1)], id="mine") == "mine"

    def test_a_look_is_four_calls_however_many_jobs_there_are(self, memory_app, monkeypatch):
        app = memory_app
        group = app.enqueue_group([give.call(n) for n in range(1000)])
        (claim,) = app.backend.broker.claim("default", 1, 30.0)
        app._groups.open(claim, app.sealer.open(group, "default", claim.body))
        calls = _counted(app, monkeypatch)
        assert app.group_status(group).counts == {"queued": 1000}
        assert calls == ["find", "registry.get", "find"]
        app.backend.broker.claim("default", 500, 30.0)
        calls.clear()
        assert app.group_status(group).counts == {"running": 500, "queued": 500}
        assert calls == ["find", "registry.get", "find"]


class TestMiddlewares:
    def test_jobs_pass_the_middlewares_in_the_producer(self):
        app = App("memory://", middlewares=[Stamping()])
        work = app.task(_work)
        for enqueue in (app.enqueue_group, app.enqueue_chain):
            made = enqueue([work.call(1), work.call(2)])
            (claim,) = app.backend.broker.claim("default", 1, 30.0)
            app._groups.open(claim, app.sealer.open(made, "default", claim.body))
            (job, *_) = app.backend.broker.claim("default", 2, 30.0)
            envelope = app.sealer.open(job.id, "default", job.body)
            assert envelope.headers == {"stamp": f"{made}.0"}
            for follow in envelope.on_success:
                assert follow.envelope.headers == {"stamp": f"{made}.1"}

    def test_a_job_that_another_stands_for_is_that_one_in_a_group_and_refused_in_a_chain(self):
        app = App("memory://", middlewares=[Standing()])
        work = app.task(_work)
        group = app.enqueue_group([work.call(1), work.call(2), work.call(3)])
        assert app.group_status(group).job_ids == (f"{group}.0", "stands", f"{group}.2")
        app.enqueue(work.call(4).options(id="stands"))
        app.cancel_group(group)
        assert app.job("stands").state == "queued", "it is somebody else's"
        with pytest.raises(DuplicateJobId) as raised:
            app.enqueue_chain([work.call(1), work.call(2)])
        assert raised.value.job_ids == ("stands",)


class Stamping(Middleware):
    def enqueue(self, submissions, forward):
        for one in submissions:
            one.headers["stamp"] = one.id
        forward(submissions)


class Standing(Middleware):
    def enqueue(self, submissions, forward):
        for one in submissions:
            one.duplicate_of = "stands" if one.call.args == (2,) else None
        forward([one for one in submissions if one.duplicate_of is None])


def _work(number: int) -> int:
    return number


class TestLargeGroup:
    def test_ten_thousand_jobs_are_one_message_and_all_run(self, memory_app, monkeypatch):
        app = memory_app
        sent = []
        enqueue = app.backend.broker.enqueue_many
        monkeypatch.setattr(
            app.backend.broker, "enqueue_many", lambda messages: sent.append(messages) or enqueue(messages)
        )
        group = app.enqueue_group([give.call(n) for n in range(10_000)])
        assert [len(messages) for messages in sent] == [1]
        assert len(sent[0][0].body) < 300_000  # a NATS server takes 1 MiB
        with consuming():
            assert app.group_results(group, timeout=SOON) == list(range(10_000))
        calls = _counted(app, monkeypatch)
        assert app.group_status(group).counts == {"succeeded": 10_000}
        assert len(calls) <= 2 + 2 * 10

    def test_more_than_the_bound_are_refused_before_all_are_read(self, memory_app, monkeypatch):
        monkeypatch.setattr(groups, "_MOST_JOBS", 10)
        with pytest.raises(ConfigError, match="10 at most"):
            memory_app.enqueue_group(give.call(n) for n in itertools.count())


class TestBadInput:
    @pytest.mark.parametrize("calls", ["text", None, 5, [give], [None], {"a": 1}])
    def test_what_is_no_job_is_refused(self, memory_app, calls):
        for enqueue in (memory_app.enqueue_group, memory_app.enqueue_chain):
            with pytest.raises(ConfigTypeError):
                enqueue(calls)
        assert memory_app.queues()["default"].ready == 0

    @pytest.mark.parametrize("n", [0, 101])
    def test_a_chain_has_one_to_a_hundred_jobs(self, memory_app, n):
        with pytest.raises(ConfigError, match="calls"):
            memory_app.enqueue_chain([give.call()] * n)

    def test_a_job_with_an_id_of_its_own_is_refused(self, memory_app):
        with pytest.raises(ConfigError, match=r"calls\[1\] must have no id"):
            memory_app.enqueue_group([give.call(), give.call().options(id="own")])

    def test_a_queue_that_is_unknown_is_refused(self, memory_app):
        with pytest.raises(UnknownQueue):
            memory_app.enqueue_group([give.call(), give.call().options(queue="elsewhere")])

    @pytest.mark.parametrize("options", [{"id": ""}, {"id": "x" * 181}, {"keep": 0}, {"keep": "1"}])
    def test_bad_options_are_refused(self, memory_app, options):
        with pytest.raises(ConfigError):
            memory_app.enqueue_group([give.call()], **options)


def _counted(app, monkeypatch) -> list[str]:
    """Return a list that grows by the name of each call of the backend."""
    calls: list[str] = []

    def count(part, name, label):
        call = getattr(part, name)
        monkeypatch.setattr(part, name, lambda *args, **kw: calls.append(label) or call(*args, **kw))

    for name in ("enqueue_many", "find", "cancel"):
        count(app.backend.broker, name, name)
    count(app.backend.results, "get_many", "get_many")
    count(app.backend.registry, "get", "registry.get")
    return calls


@pytest.mark.parametrize("own", ["a.1", "a.0", "x.y.12"])
@pytest.mark.parametrize("enqueue", ["enqueue_group", "enqueue_chain"])
def test_an_id_that_a_job_of_another_group_may_have_is_refused(memory_app, own, enqueue):
    with pytest.raises(ConfigError, match="digits"):
        getattr(memory_app, enqueue)([add.call(1)], id=own)
    assert memory_app.counts()[JobState.QUEUED] == 0


@pytest.mark.parametrize("enqueue", ["enqueue_group", "enqueue_chain"])
def test_a_group_whose_jobs_would_have_the_ids_of_others_is_refused(memory_app, enqueue):
    memory_app.enqueue(add.call(1).options(id="a.1"))
    with pytest.raises(DuplicateJobId) as raised:
        getattr(memory_app, enqueue)([add.call(n) for n in range(3)], id="a")
    assert raised.value.job_ids == ("a.1",)
    assert memory_app.counts()[JobState.QUEUED] == 1
