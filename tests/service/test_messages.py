"""What lies in the queue and is no job of ours becomes a dead letter with the reason; it is not run, nor unpickled."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest
from jobs import lines
from watching import wait_until

from bulkhead import BadMessage, RemoteError
from bulkhead.backends.base import Message
from bulkhead.service.envelope import Envelope, Sealer, encoded

KEY = "a secret of some length"
OTHER_KEY = "another secret of length"

SOON = 20.0


class Bomb:
    """What is run by whoever unpickles it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def envelope(path: str, **changes) -> Envelope:
    made = Envelope("jot", encoded("msgpack", ((path, "it ran"), {})))
    return msgspec.structs.replace(made, **changes)


def put(service, body: bytes) -> str:
    id = uuid4().hex
    assert service.app.backend.broker.enqueue_many([Message(id, "default", body)]) == [True]
    return id


def sealed(service, made: Envelope, *, key: str | None = None, id: str = "") -> tuple[str, bytes]:
    id = id or uuid4().hex
    return id, Sealer(service.app.namespace, key, "msgpack").seal(id, "default", made)


@pytest.fixture(scope="module")
def signing(module_make):
    made = module_make("memory", options={"key": KEY})
    with made.working():
        made.app.result(made.pid.enqueue(), timeout=SOON)
        yield made


@pytest.fixture(scope="module")
def plain(module_make):
    made = module_make("memory")
    with made.working():
        made.app.result(made.pid.enqueue(), timeout=SOON)
        yield made


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "notes")


def assert_dead(service, id: str, reason: str, path: str) -> None:
    job = service.settled(id)
    assert job.state == "failed"
    assert reason in job.reason
    assert id in [one.id for one in service.app.dead()]
    with pytest.raises(RemoteError) as raised:
        service.app.result(id)
    assert raised.value.type_name in ("BadMessage", "UnknownTask")
    assert lines(path) == []
    # The worker goes on.
    assert service.app.result(service.add.enqueue(1, 2), timeout=SOON) == 3


class TestASigningApplication:
    def test_runs_what_it_has_signed(self, signing, path):
        id, body = sealed(signing, envelope(path), key=KEY)
        signing.app.backend.broker.enqueue_many([Message(id, "default", body)])
        assert signing.app.result(id, timeout=SOON) == "it ran"
        assert lines(path) == ["it ran"]

    def test_runs_nothing_that_was_changed(self, signing, path):
        id, body = sealed(signing, envelope(path), key=KEY)
        changed = body.replace(b"it ran", b"he ran")
        assert changed != body
        signing.app.backend.broker.enqueue_many([Message(id, "default", changed)])
        assert_dead(signing, id, "its signature is wrong", path)

    def test_runs_nothing_unsigned(self, signing, path):
        id, body = sealed(signing, envelope(path))
        signing.app.backend.broker.enqueue_many([Message(id, "default", body)])
        assert_dead(signing, id, "it is not signed", path)

    def test_runs_nothing_that_another_key_has_signed(self, signing, path):
        id, body = sealed(signing, envelope(path), key=OTHER_KEY)
        signing.app.backend.broker.enqueue_many([Message(id, "default", body)])
        assert_dead(signing, id, "its signature is wrong", path)

    def test_runs_nothing_that_was_signed_for_another_job_queue_or_namespace(self, signing, path):
        _, body = sealed(signing, envelope(path), key=KEY)
        assert_dead(signing, put(signing, body), "its signature is wrong", path)
        id = uuid4().hex
        body = Sealer(signing.app.namespace, KEY, "msgpack").seal(id, "side", envelope(path))
        signing.app.backend.broker.enqueue_many([Message(id, "default", body)])
        assert_dead(signing, id, "its signature is wrong", path)
        id = uuid4().hex
        body = Sealer("elsewhere", KEY, "msgpack").seal(id, "default", envelope(path))
        signing.app.backend.broker.enqueue_many([Message(id, "default", body)])
        assert_dead(signing, id, "its signature is wrong", path)

    def test_never_unpickles_what_it_has_not_signed(self, signing, path):
        bomb = pickle.dumps(Bomb(path))
        id, body = sealed(signing, envelope(path, payload=bomb, codec="pickle"), key=OTHER_KEY)
        signing.app.backend.broker.enqueue_many([Message(id, "default", body)])
        assert_dead(signing, id, "its signature is wrong", path)
        assert not Path(path).exists()

    def test_does_not_return_a_result_that_was_changed(self, signing):
        id = signing.echo.enqueue("good")
        assert signing.app.result(id, timeout=SOON) == "good"
        (outcome,) = signing.app.backend.results.get_many([id])
        signing.app.backend.results.save_many(
            [outcome._replace(value=outcome.value.replace(b"good", b"evil"))]
        )
        with pytest.raises(BadMessage, match="its signature is wrong"):
            signing.app.result(id)


class TestAnApplicationWithoutKey:
    def test_never_unpickles(self, plain, path):
        bomb = pickle.dumps(Bomb(path))
        id, body = sealed(plain, envelope(path, payload=bomb, codec="pickle"))
        plain.app.backend.broker.enqueue_many([Message(id, "default", body)])
        assert_dead(plain, id, "pickled arguments and is not signed", path)
        assert not Path(path).exists()

    def test_does_not_run_what_it_cannot_verify(self, plain, path):
        id, body = sealed(plain, envelope(path), key=KEY)
        plain.app.backend.broker.enqueue_many([Message(id, "default", body)])
        assert_dead(plain, id, "has no key to verify it with", path)

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            (b"", "begins with no known format"),
            (b"garbage", "begins with no known format"),
            (b"1garbage", "it is no envelope"),
            (b"1" + b"\x92" * 100_000, "it is no envelope"),
            (b"1" + msgspec.msgpack.encode(["jot", b"", "yaml"]), "there is no codec 'yaml'"),
        ],
    )
    def test_makes_dead_letters_of_what_it_cannot_read(self, plain, path, body, reason):
        assert_dead(plain, put(plain, body), reason, path)

    @pytest.mark.parametrize(
        "changes",
        [
            {"timeout": -1.0},
            {"timeout": float("nan")},
            {"max_retries": -1},
            {"backoff": (1.0, 0.5, 0.2, 10.0)},
            {"backoff": (1.0, 1.5, 2.0, 10.0)},
            {"backoff": (float("inf"), 1.5, 0.2, 10.0)},
            {"keep": -1.0},
        ],
    )
    def test_makes_dead_letters_of_jobs_whose_options_cannot_work(self, plain, path, changes):
        id, body = sealed(plain, envelope(path, **changes))
        plain.app.backend.broker.enqueue_many([Message(id, "default", body)])
        assert_dead(plain, id, "it is no envelope", path)

    def test_makes_a_dead_letter_of_a_task_that_it_does_not_know(self, plain, path):
        id, body = sealed(plain, envelope(path, task="os.system"))
        plain.app.backend.broker.enqueue_many([Message(id, "default", body)])
        assert_dead(plain, id, "there is no task 'os.system'", path)

    def test_makes_a_dead_letter_of_arguments_that_it_cannot_decode(self, plain, path):
        id, body = sealed(plain, envelope(path, payload=b"\xc1", max_retries=5))
        plain.app.backend.broker.enqueue_many([Message(id, "default", body)])
        job = plain.settled(id)
        assert job.attempt == 1
        assert "cannot be decoded" in job.reason

    def test_can_delete_and_retry_what_it_cannot_read(self, plain, path):
        app = plain.app
        app.delete_all_dead()
        ids = [put(plain, b"garbage") for _ in range(5)]
        for id in ids:
            plain.settled(id)
        assert app.queues()["default"].dead == 5
        assert app.retry_all_dead() == 5
        for id in ids:
            plain.settled(id)
        assert {job.id for job in app.dead(limit=3)} <= set(ids)
        assert len(app.dead(offset=3)) == 2
        assert app.delete_all_dead(queue="side") == 0
        assert app.delete_all_dead() == 5
        assert app.dead() == []


@pytest.mark.parametrize("codec", ["msgpack", "json", "pickle"])
def test_each_codec_carries_arguments_results_and_what_follows(make, codec):
    service = make("memory", options={"codec": codec, "key": KEY})
    value = {"a": [1, 2.5, None, True, "ü"]}
    follow = service.echo.call().options(id="follows")
    with service.working():
        id = service.app.enqueue(service.echo.call(value).options(on_success=follow))
        assert service.app.result(id, timeout=SOON) == value
        service.wait_for_job("follows")
        assert service.app.result("follows") == value
        if codec == "pickle":
            id = service.echo.enqueue({1, (2, 3)})
            assert service.app.result(id, timeout=SOON) == {1, (2, 3)}


def test_a_flood_of_what_cannot_be_read_is_buried_before_its_leases_run_out(make, monkeypatch):
    service = make(options={"lease": 0.5}, concurrency=1)
    broker = service.app.backend.broker
    bury = broker.bury

    def buried_slowly(burials):
        time.sleep(0.02)
        return bury(burials)

    monkeypatch.setattr(broker, "bury", buried_slowly)
    ids = [put(service, b"junk") for _ in range(100)]
    with service.working():
        wait_until(lambda: len(service.app.dead(limit=200)) == len(ids), "all are dead letters")
        assert {one.attempt for one in broker.find(ids)} == {1}, "some were claimed again and again"
        assert service.app.result(service.pid.enqueue(), timeout=SOON)


def test_a_result_that_cannot_be_encoded_is_a_failure_that_says_so_and_is_not_tried_again(plain, path):
    id = plain.unencodable.enqueue(path)
    job = plain.settled(id)
    assert job.attempt == 1
    assert "TypeError" in job.reason
    assert "cannot be encoded in msgpack" in job.traceback
    assert lines(path) == ["ran"]
