"""A consumer whose server, pool or threads fail: nothing is lost, nothing hangs, nothing ends without a word."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from gates import Gate
from jobs import lines
from watching import wait_until

from bulkhead import BrokerUnavailable, MessageTooLarge, PoolBroken, RemoteError, ResultNotFound, backends
from bulkhead.backends.base import Backend, Ending, Message, Outcome, OutcomeState
from bulkhead.service.link import Line, Link

SOON = 20.0


class Flaky:
    """A part of a backend that fails when the test says so, before or after it has done what it was asked for."""

    def __init__(self, part: Any) -> None:
        self.part = part
        self.failing: dict[str, tuple[Exception, str]] = {}
        self.asked: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.part, name)
        if not callable(method):
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            self.asked[name] += 1
            error, when = self.failing.get(name) or self.failing.get("*") or (None, "")
            if error is None:
                return method(*args, **kwargs)
            if when == "once after":
                self.failing.pop(name)
            if when.endswith("after"):
                method(*args, **kwargs)
            raise error

        return call

    def fail(self, name: str = "*", error: Exception | None = None, when: str = "before") -> None:
        self.failing[name] = (error or BrokerUnavailable("the server is away"), when)

    def mend(self) -> None:
        self.failing.clear()


@pytest.fixture
def flaky(service):
    """An application in memory whose broker can be made to fail: `service.broker`, `service.results`."""
    backend = service.app.backend
    service.broker, service.results = Flaky(backend.broker), Flaky(backend.results)
    service.registry = Flaky(backend.registry)
    service.app._connected = (0, Backend(service.broker, service.results, service.registry))
    return service


@pytest.fixture
def whole(flaky):
    """The same where jobs and results are in one place: `service.settler`."""
    flaky.settler = Flaky(backends.connect(flaky.url, flaky.app.namespace).settler)
    parts = flaky.broker, flaky.results, flaky.registry
    flaky.app._connected = (0, Backend(*parts, settler=flaky.settler))
    return flaky


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "notes")


class TestAServerThatIsAway:
    def test_is_waited_for_and_what_ended_meanwhile_is_told(self, flaky, gate: Gate, tmp_path):
        with flaky.working():
            follow = flaky.echo.call().options(id="follows")
            id = flaky.app.enqueue(flaky.hold.call(str(tmp_path / "gate"), "a").options(on_success=follow))
            gate.wait_begun(1)
            flaky.broker.fail()
            flaky.results.fail()
            gate.open()
            wait_until(lambda: flaky.broker.asked["enqueue_many"] >= 3, "it is tried again and again")
            flaky.broker.mend()
            flaky.results.mend()
            assert flaky.app.result(id, timeout=SOON) == "a"
            flaky.wait_for_job("follows")
            assert flaky.app.result("follows") == "a"
            assert gate.begun == ["a"]

    @pytest.mark.parametrize("call", ["ack", "save_many"])
    def test_after_it_has_done_what_it_was_asked_for_makes_nothing_happen_twice(self, flaky, path, call):
        part = flaky.broker if call == "ack" else flaky.results
        with flaky.working():
            part.fail(call, when="once after")
            id = flaky.telling.enqueue(True)
            assert flaky.app.result(id, timeout=SOON) == "good"
            wait_until(lambda: ("success", id) in flaky.told)
            assert [entry[0] for entry in flaky.told] == ["processing", "success"]

    @pytest.mark.parametrize("keep_result", [60.0, 0.0])
    def test_after_it_has_taken_the_one_step_makes_nothing_happen_twice(self, whole, keep_result):
        with whole.working():
            for is_good, last in ((True, "success"), (False, "failure")):
                whole.settler.fail("settle", when="once after")
                call = whole.telling.call(is_good).options(keep_result=keep_result, max_retries=0)
                id = call.enqueue()
                wait_until(lambda: whole.told and whole.told[-1][:2] == (last, id))  # noqa: B023
        assert [entry[0] for entry in whole.told] == ["processing", "success", "processing", "failure"]
        assert whole.settler.asked["settle"] >= 4
        assert whole.broker.asked["ack"] == whole.results.asked["save_many"] == 0

    def test_until_the_job_is_somebody_elses_makes_no_success_of_it(self, whole, caplog):
        part, app = whole.settler.part, whole.app
        app.lease = 0.5
        with whole.working():
            whole.settler.fail("settle")
            id = whole.telling.enqueue(True)
            wait_until(lambda: whole.settler.asked["settle"] >= 2, "it is told in vain")
            whole.broker.fail("renew")
            whole.broker.fail("claim")
            [claim] = whole.broker.part.claim("default", 1, 60.0, wait=SOON)  # another one has it
            facts = claim.attempt, claim.enqueued_at, 1.0, 2.0
            other = Outcome(id, "default", "telling", OutcomeState.FAILED, None, b"x", *facts)
            assert part.settle([Ending(claim.hold, other)]) == [True]
            whole.settler.mend()
            wait_until(lambda: "was no longer ours" in caplog.text, "it is told")
            assert whole.results.part.get_many([id]) == [other]
            whole.broker.mend()
        assert [entry[0] for entry in whole.told] == ["processing"]

    @pytest.mark.parametrize("call", ["bury", "nack"])
    def test_after_it_has_noted_a_failure_loses_nothing(self, flaky, path, call):
        with flaky.working():
            flaky.broker.fail(call, when="once after")
            id = flaky.telling.enqueue(False)
            with pytest.raises(RemoteError, match="attempt 2"):
                flaky.app.result(id, timeout=SOON)
            wait_until(lambda: flaky.told and flaky.told[-1][0] == "failure")
            assert [entry[0] for entry in flaky.told] == ["processing", "retry", "processing", "failure"]

    def test_does_not_keep_a_worker_from_stopping(self, flaky, gate, tmp_path, monkeypatch):
        monkeypatch.setattr("bulkhead.service.consumer._LAST_WORDS", 1.0)
        working = flaky.working(grace=0.2)
        with working as worker:
            flaky.hold.enqueue(str(tmp_path / "gate"), "a")
            gate.wait_begun(1)
            flaky.broker.fail()
            began = time.monotonic()
            worker.stop()
            assert time.monotonic() - began < 20.0
        flaky.broker.mend()

    def test_at_the_start_is_an_error_at_once(self, service, monkeypatch):
        def away(*_: object) -> Backend:
            raise BrokerUnavailable("nobody answers")

        monkeypatch.setattr("bulkhead.backends.connect", away)
        with pytest.raises(BrokerUnavailable, match="nobody answers"):
            service.app.run()
        with pytest.raises(BrokerUnavailable, match="nobody answers"):
            service.add.enqueue(1, 2)

    def test_that_cannot_renew_does_not_end_jobs(self, flaky, gate, tmp_path):
        with flaky.working():
            id = flaky.hold.enqueue(str(tmp_path / "gate"), "a")
            gate.wait_begun(1)
            flaky.broker.fail("renew")
            asked = flaky.broker.asked["renew"]
            wait_until(lambda: flaky.broker.asked["renew"] > asked)
            flaky.broker.mend()
            gate.open()
            assert flaky.app.result(id, timeout=SOON) == "a"
            assert gate.begun == ["a"]


class TestWhatIsTooLarge:
    def test_a_result_leaves_the_job_successful_and_says_why_there_is_none(self, flaky):
        save = flaky.results.part.save_many

        def limited(outcomes):
            for one in outcomes:
                if one.value is not None and len(one.value) > 1000:
                    raise MessageTooLarge("a result of 2,000 bytes is more than the 1,000 that are taken")
            save(outcomes)

        flaky.results.part.save_many = limited
        try:
            with flaky.working():
                ids = [flaky.big.enqueue(size) for size in (10, 2000, 10)]
                for id in ids:
                    assert flaky.settled(id).state == "succeeded"
                assert flaky.app.result(ids[0]) == b"x" * 10
                with pytest.raises(ResultNotFound, match="a result of 2,000 bytes is more"):
                    flaky.app.result(ids[1])
        finally:
            del flaky.results.part.save_many

    def test_a_result_is_left_out_where_all_is_one_step_too_and_its_neighbours_are_kept(self, whole):
        settle = whole.settler.part.settle

        def limited(endings):
            for one in endings:
                if one.outcome.value is not None and len(one.outcome.value) > 1000:
                    raise MessageTooLarge("a result of 2,000 bytes is more than the 1,000 that are taken")
            return settle(endings)

        whole.settler.part.settle = limited
        with whole.working():
            ids = whole.app.enqueue_many([whole.big.call(size) for size in (10, 2000, 10)])
            for id in ids:
                assert whole.settled(id).state == "succeeded"
            assert whole.app.result(ids[0]) == whole.app.result(ids[2]) == b"x" * 10
            with pytest.raises(ResultNotFound, match="a result of 2,000 bytes is more"):
                whole.app.result(ids[1])

    def test_a_follow_up_makes_a_dead_letter_of_its_job_alone(self, flaky):
        enqueue = flaky.broker.part.enqueue_many

        def limited(messages):
            if any(len(one.body) > 2000 for one in messages):
                raise MessageTooLarge("a body of more than 2,000 bytes")
            return enqueue(messages)

        flaky.broker.part.enqueue_many = limited
        try:
            with flaky.working():
                calls = [flaky.big.call(size).options(on_success=flaky.pid.call()) for size in (10, 3000, 10)]
                ids = flaky.app.enqueue_many(calls)
                assert flaky.settled(ids[0]).state == flaky.settled(ids[2]).state == "succeeded"
                job = flaky.settled(ids[1])
                assert job.state == "failed"
                assert job.reason == "its end cannot be told: a body of more than 2,000 bytes"
            with pytest.raises(MessageTooLarge):
                flaky.echo.enqueue("x" * 3000)
        finally:
            del flaky.broker.part.enqueue_many


class TestWhatBreaks:
    def test_a_pool_whose_workers_do_not_come_up_ends_the_worker_and_gives_the_jobs_back(self, make):
        service = make(pool="{'initializer': no_licence}")
        ids = [service.add.enqueue(1, 2) for _ in range(10)]
        with service.working() as worker:
            worker.wait()
            error = worker.take_error()
        assert isinstance(error, PoolBroken)
        assert "no licence" in str(error)
        wait_until(lambda: all(service.app.job(id).state in ("queued", "scheduled") for id in ids))
        assert {service.app.job(id).attempt for id in ids} == {0}

    def test_a_pool_that_breaks_leaves_the_jobs_of_other_queues_their_grace(self, make, gate, tmp_path):
        service = make(pool="{'initializer': no_licence}")
        id = service.hold_aside.enqueue(str(tmp_path / "gate"), "a")
        with service.working(["default", "side"]) as worker:
            gate.wait_begun(1)
            service.app.enqueue_many([service.add.call(1, 2) for _ in range(5)])
            (consumer,) = service.app._consumers
            wait_until(lambda: consumer._has_failed.is_set())
            time.sleep(0.3)
            gate.open()
            worker.wait()
            assert isinstance(worker.take_error(), PoolBroken)
        assert service.app.job(id).state == "succeeded"

    def test_run_once_ends_with_the_error_of_its_pool(self, make):
        service = make(pool="{'initializer': no_licence}")
        id = service.add.enqueue(1, 2)
        with pytest.raises(PoolBroken, match="no licence"):
            service.app.run_once()
        assert service.app.job(id).attempt == 0

    @pytest.mark.parametrize(
        ("place", "name"),
        [
            ("QueueConsumer", "_settle_batches"),
            ("QueueConsumer", "_wait_for_room"),
            ("QueueConsumer", "look_after"),
        ],
    )
    def test_a_thread_that_cannot_go_on_ends_the_worker_with_its_error(
        self, service, monkeypatch, caplog, place, name
    ):
        def broken(*_: object) -> None:
            raise RuntimeError("a bug")

        with service.working() as worker:
            service.app.result(service.add.enqueue(1, 2), timeout=SOON)
            monkeypatch.setattr(f"bulkhead.service.queue_consumer.{place}.{name}", broken)
            with caplog.at_level(logging.CRITICAL, "bulkhead"):
                service.add.enqueue(1, 2)
                worker.wait()
            assert str(worker.take_error()) == "a bug"
        assert "cannot go on" in caplog.text

    def test_a_callback_that_exits_ends_nothing(self, service):
        with service.working():
            for _ in range(3):
                id = service.exiting_callbacks.enqueue(1)
                assert service.app.result(id, timeout=SOON) == 1

    def test_a_claim_that_raises_something_odd_is_tried_again(self, flaky):
        with flaky.working():
            flaky.broker.fail("claim", RuntimeError("odd"))
            wait_until(lambda: flaky.broker.asked["claim"] > 2)
            flaky.broker.mend()
            assert flaky.app.result(flaky.add.enqueue(1, 2), timeout=SOON) == 3


class TestALeaseThatIsLost:
    def test_and_claimed_again_by_the_same_worker_ends_the_first_run(self, make, path):
        service = make(options={"lease": 1.0}, concurrency=2)
        broker = Flaky(service.app.backend.broker)
        backend = service.app.backend
        service.app._connected = (0, Backend(broker, backend.results, backend.registry))
        with service.working():
            id = service.nap.enqueue(path, 2.0)
            wait_until(lambda: lines(path))
            (consumer,) = service.app._consumers
            first = consumer._find(id).claim.hold

            def renew(holds, lease):
                if first in holds:
                    raise BrokerUnavailable("the server is away")
                return broker.part.renew(holds, lease)

            broker.renew = renew
            n_attempts = service.app.result(id, timeout=SOON)
            wait_until(lambda: not any(one.n_held for c in service.app._consumers for one in c._consumers))
        begun = [line.split()[1] for line in lines(path) if line.startswith("begun")]
        ended = [line.split()[1] for line in lines(path) if line.startswith("ended")]
        # More than two where the machine is so busy that also a lease that is renewed runs out.
        assert 2 <= len(begun) <= n_attempts
        assert ended == begun[-1:]

    def test_refuses_what_a_job_saves(self, make, gate, tmp_path):
        service = make(options={"lease": 0.5})
        with service.working():
            id = service.hold.enqueue(str(tmp_path / "gate"), "a")
            gate.wait_begun(1)
            (consumer,) = service.app._consumers
            held = consumer._find(id)
            held.is_lost = True
            with pytest.raises(Exception, match="is lost"):
                consumer.job_saves(id, b"x")
            assert service.app.backend.results.get_many([id]) == [None]
            held.is_lost = False
            gate.open()
            service.settled(id)


def test_a_message_that_says_nothing_sensible_about_an_unknown_queue_does_not_disturb(service):
    service.app.backend.broker.enqueue_many([Message("x", "unknown", b"?")])
    with service.working():
        assert service.app.result(service.add.enqueue(1, 2), timeout=SOON) == 3
    assert service.app.queues()["unknown"].ready == 1


class Listener:
    def job_saves(self, job_id: str, value: bytes) -> None: ...
    def job_reports(self, job_id: str, progress: bytes) -> None: ...
    def is_job_cancelled(self, job_id: str) -> bool:
        return job_id == "a"


@pytest.mark.parametrize("what", ["open", "mkdtemp", "bind", "socketpair", "thread"])
def test_a_line_that_cannot_be_set_up_leaves_nothing_behind(monkeypatch, tmp_path, what):
    def refused(*_args, **_rest):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    module = {"open": os, "mkdtemp": tempfile, "bind": socket.socket, "socketpair": socket}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        if what != "thread":
            patch.setattr(module[what], what, refused)
        with pytest.raises(OSError, match="open files"):
            Link(Listener(), refused)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_folder_of_a_consumer_is_locked_so_that_who_tidies_up_leaves_it_alone():
    link = Link(Listener(), lambda name, work: threading.Thread(target=work, name=name))
    folder = os.open(Path(link.address).parent, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        link.close()
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(folder)


def test_a_consumer_without_descriptors_left_answers_its_jobs_when_it_has_some(monkeypatch):
    accept, n_refused = socket.socket.accept, 0

    def refused(ear):
        nonlocal n_refused
        n_refused += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    link = Link(Listener(), lambda name, work: threading.Thread(target=work, name=name))
    try:
        monkeypatch.setattr(socket.socket, "accept", refused)
        line = Line(link.address)
        with ThreadPoolExecutor() as threads:
            answer = threads.submit(line.is_cancelled, "a")
            wait_until(lambda: n_refused > 2, "it has tried")
            began, before = time.monotonic(), n_refused
            time.sleep(0.2)
            assert n_refused - before <= (time.monotonic() - began) / 0.05 + 1, "it knocks without a pause"
            monkeypatch.setattr(socket.socket, "accept", accept)
            assert answer.result(SOON)
        line._drop()
    finally:
        link.close()


def test_threads_are_named_and_gone_afterwards(service):
    before = set(threading.enumerate())
    with service.working():
        service.app.result(service.add.enqueue(1, 2), timeout=SOON)
        names = {thread.name for thread in set(threading.enumerate()) - before}
        assert {
            "bulkhead-default fetch",
            "bulkhead-default settle",
            "bulkhead-pulse",
            "bulkhead-link",
        } <= names
    assert set(threading.enumerate()) <= before
