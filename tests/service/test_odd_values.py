"""What a user may pass, return or raise by mistake: each is an error that says so, and none disturbs another job."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from watching import wait_until

from bulkhead import App, BadMessage, ConfigError, ConfigTypeError, MessageTooLarge, RemoteError, UnknownTask
from bulkhead.backends.base import Burial
from bulkhead.errors import BrokerUnavailable, BulkheadError
from bulkhead.service.envelope import decoded, encoded
from bulkhead.service.status import progress_key
from bulkhead.service.verdicts import GiveBack, TryAgain

SOON = 20.0

LONE = "\ud800"


@pytest.fixture
def folder(monkeypatch):
    """The folder for temporary files, which has nothing else in it."""
    made = Path(tempfile.mkdtemp(prefix="t"))  # short: a socket lies in it
    monkeypatch.setenv("TMPDIR", str(made))
    monkeypatch.setattr(tempfile, "tempdir", str(made))
    yield made
    shutil.rmtree(made)


class TestAnArgumentOfAnotherType:
    @pytest.mark.parametrize("value", [None, 5, 1.5, "no", b"no"], ids=repr)
    def test_is_refused_where_several_are_expected(self, service, value):
        app = service.app
        for use in (
            app.enqueue_many,
            app.find_jobs,
            lambda value: App("memory://", middlewares=value),
            lambda value: app.run(5 if value is None else value),
        ):
            with pytest.raises(ConfigTypeError, match="must be an iterable"):
                use(value)

    def test_no_queue_is_not_taken_for_all(self, service):
        with pytest.raises(ConfigError, match="at least one queue"):
            service.app.run([])

    @pytest.mark.parametrize("value", [[], {}, 5, b"no"], ids=repr)
    def test_is_refused_where_a_name_is_expected(self, anywhere, value):
        app = anywhere.app
        for use in (
            app.call,
            app.find_task,
            app.pause,
            app.resume,
            app.run_once,
            lambda value: app.run([value]),
            lambda value: app.jobs("queued", queue=value),
            lambda value: app.jobs("succeeded", queue=value),
            lambda value: app.dead(queue=value),
            lambda value: app.retry_all_dead(queue=value),
            lambda value: app.delete_all_dead(queue=value),
        ):
            with pytest.raises(ConfigTypeError, match="must be a str"):
                use(value)

    def test_that_cannot_be_written_is_refused(self, anywhere):
        app = anywhere.app
        for use in (
            lambda: app.jobs("queued", queue=LONE),
            lambda: app.dead(queue=LONE),
            lambda: anywhere.echo.call().options(headers={"a": LONE}),
            lambda: anywhere.echo.call().options(headers={LONE: "a"}),
            lambda: app.jobs("queued", offset=10**30),
        ):
            with pytest.raises(ConfigError):
                use()

    def test_a_key_may_be_any_text(self):
        App("memory://", key=LONE * 16)

    def test_a_task_of_an_odd_name_is_unknown(self, service):
        with pytest.raises(UnknownTask):
            service.app.find_task("")


class TestJson:
    @pytest.mark.parametrize(
        "value", [float("nan"), float("inf"), b"bytes", {1}, {(1, 2): 3}, LONE], ids=repr
    )
    def test_refuses_what_it_would_have_to_change(self, make, value):
        service = make(options={"codec": "json"})
        with pytest.raises(ConfigTypeError, match="cannot be encoded in json"):
            service.echo.enqueue([value])

    @pytest.mark.parametrize("value", [None, True, 2**80, 1.5, "text \0 ü 😀", [], {"a": [None]}], ids=repr)
    def test_carries_what_it_has_a_form_for(self, value):
        assert decoded("json", encoded("json", value)) == value


class TestALongDelay:
    @pytest.mark.parametrize("seconds", [1e12, 1e300])
    def test_does_not_spoil_the_lists(self, anywhere, seconds):
        id = anywhere.echo.call().options(delay=seconds).enqueue()
        assert anywhere.app.job(id).state == "scheduled"
        (job,) = anywhere.app.jobs("scheduled")
        assert job.due_at >= datetime(9000, 1, 1, tzinfo=UTC)


class TestATaskThatSnoozes:
    def test_for_no_time_at_all_has_failed_and_holds_up_nobody(self, anywhere):
        with anywhere.working():
            for delay in (float("nan"), float("inf"), -1.0, "soon", None):
                id = anywhere.snooze_oddly.enqueue(delay)
                with pytest.raises(RemoteError, match="delay must be"):
                    anywhere.app.result(id, timeout=SOON)
            assert anywhere.app.result(anywhere.add.enqueue(1, 2), timeout=SOON) == 3

    @pytest.mark.parametrize("delay", [float("nan"), -1.0])
    def test_a_verdict_has_a_delay_that_can_be(self, delay):
        with pytest.raises(ConfigError, match="delay must be"):
            GiveBack(delay)
        with pytest.raises(ConfigError, match="delay must be"):
            TryAgain(delay, b"")


class TestAValueThatAFileDoesNotTake:
    def test_is_no_reason_to_try_again(self, durable):
        durable.echo.enqueue()
        broker = durable.app.backend.broker
        (claim,) = broker.claim("default", 1, 30.0)
        with pytest.raises(BulkheadError, match="does not take") as raised:
            broker.bury([Burial(claim.hold, None, None)])  # type: ignore[arg-type]
        assert not isinstance(raised.value, BrokerUnavailable)


class TestARecordThatIsDamaged:
    def test_is_a_dead_letter_and_those_that_were_claimed_with_it_run(self, durable):
        ids = durable.app.enqueue_many(durable.add.call(n, 1) for n in range(20))
        with contextlib.closing(sqlite3.connect(durable.folder / "jobs.db")) as file, file:
            file.execute("UPDATE jobs SET body = 5 WHERE id = ?", (ids[3],))
        with durable.working():
            for number, id in enumerate(ids):
                if number != 3:
                    assert durable.app.result(id, timeout=SOON) == number + 1
                    assert durable.app.job(id).attempt == 1
            wait_until(lambda: [job.id for job in durable.app.dead()] == [ids[3]], "it is a dead letter")
        assert durable.app.job(ids[3]).state == "failed"

    def test_in_any_column_holds_up_nobody(self, durable):
        columns = ["rank", "attempt", "enqueued", "due", "error"]
        ids = durable.app.enqueue_many(durable.add.call(n, 1) for n in range(6))
        with contextlib.closing(sqlite3.connect(durable.folder / "jobs.db")) as file, file:
            for id, column in zip(ids, columns, strict=False):
                file.execute(f"UPDATE jobs SET {column} = 'odd' WHERE id = ?", (id,))
        assert len(durable.app.jobs("queued")) == 6
        assert durable.app.queues()["default"].ready == 6
        with durable.working():
            assert [durable.app.result(id, timeout=SOON) for id in ids] == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize("value", [b"", b"odd", b"\x05", b"\x91\x01", b"\x94\x01\x02\x03\x04"])
    def test_of_progress_is_left_out(self, service, value):
        id = service.echo.enqueue()
        service.app.backend.broker.claim("default", 1, 30.0)
        service.app.backend.registry.put(progress_key(id), value)
        assert service.app.job(id).progress is None
        assert [job.id for job in service.app.jobs("running")] == [id]

    def test_of_a_group_is_an_error_that_says_so(self, service):
        service.app.backend.registry.put("groups/odd", b"odd")
        for use in (service.app.group_status, service.app.group_results, service.app.cancel_group):
            with pytest.raises(BadMessage, match="groups/odd"):
                use("odd")


class TestRunOnce:
    def test_tells_of_a_job_of_which_nothing_is_kept(self, service):
        calls = [service.echo.call(1), service.give_up.call(os.devnull)]
        ids = service.app.enqueue_many(call.options(keep_result=0) for call in calls)
        jobs = [service.app.run_once(), service.app.run_once()]
        assert [job.id for job in jobs] == ids
        assert [(job.state, job.attempt) for job in jobs] == [("succeeded", 1), ("failed", 1)]
        assert service.app.run_once() is None


class TestProgress:
    def test_that_means_nothing_is_refused_and_any_size_is_taken(self, service):
        nan = float("nan")
        with service.working():
            for told in (("one", 2, ""), (1, "two", ""), (1, 2, 3), (-1, 2, ""), (nan, None, "")):
                with pytest.raises(RemoteError, match="must be"):
                    service.app.result(service.report.enqueue(*told), timeout=SOON)
            id = service.report.enqueue(2.0**80, 2.0**80, "x" * 1_000_000)
            assert service.app.result(id, timeout=SOON) == "went on"


class TestWhatAJobSays:
    def test_has_an_answer_of_its_own_in_a_forked_copy_and_when_it_is_too_large(self, service):
        with service.working():
            assert service.app.result(service.ask_in_a_copy.enqueue(), timeout=SOON) is True
            with pytest.raises(RemoteError, match="larger") as raised:
                service.app.result(service.save.enqueue(260 << 20), timeout=SOON)
        assert raised.value.type_name == MessageTooLarge.__name__

    def test_that_cannot_be_read_ends_that_line_alone(self, service, folder):
        with service.working():
            # Race: the folder is there before its link, and the link before anybody listens.
            assert service.app.result(service.add.enqueue(0, 1), timeout=SOON) == 1
            (address,) = folder.glob("*/link")
            for said in (b"\0\0\0\x01\xc1", b"\0\0\0\x01\x05"):
                with socket.socket(socket.AF_UNIX) as line:
                    line.settimeout(SOON)
                    line.connect(str(address))
                    line.sendall(said)
                    assert line.recv(1) == b""
            assert service.app.result(service.add.enqueue(1, 2), timeout=SOON) == 3


class TestTheFolderOfAWorker:
    def test_that_was_killed_is_removed_by_the_next_one_and_that_of_one_that_lives_is_not(
        self, durable, folder
    ):
        with durable.process() as killed:
            durable.app.result(durable.echo.enqueue(1), timeout=SOON)
            (first,) = folder.iterdir()
            with durable.process(grace=1.0) as living:
                wait_until(lambda: len(list(folder.iterdir())) == 2, "both have one")
                os.kill(killed.pid, signal.SIGKILL)
                killed.wait()
                with durable.working(grace=0.0):
                    wait_until(lambda: not first.exists(), "it is removed")
                    durable.app.result(durable.echo.enqueue(1), timeout=SOON)
                (left,) = folder.iterdir()
                assert (left / "link").exists()
                os.kill(living.pid, signal.SIGTERM)
                living.wait()
