"""What becomes of jobs: on each backend what depends on it, in memory the rest. One worker serves the whole module."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from uuid import uuid4

import pytest
from gates import Gate
from jobs import lines
from watching import wait_until

from bulkhead import (
    JobCancelled,
    JobNotFound,
    RemoteError,
    WaitTimeout,
)

# Generous: the machine may be loaded.
SOON = 20.0


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "notes")


class TestOnEachBackend:
    @pytest.fixture
    def _nothing_is_left_behind(self) -> None:
        """Not after each of these: connections are made as they are needed. `served_anywhere` looks at the end."""

    def test_a_job_returns_its_result(self, served_anywhere):
        id = served_anywhere.add.enqueue(2, b=3)
        assert served_anywhere.app.result(id, timeout=SOON) == 5
        job = served_anywhere.app.job(id)
        assert (job.state, job.attempt, job.task, job.queue) == ("succeeded", 1, "add", "default")
        assert job.enqueued_at <= job.started_at <= job.finished_at

    def test_many_jobs_each_run_once(self, served_anywhere, path):
        calls = [served_anywhere.jot.call(path, number) for number in range(1000)]
        ids = served_anywhere.app.enqueue_many(calls)
        for number, id in enumerate(ids):
            assert served_anywhere.app.result(id, timeout=SOON) == number
        assert Counter(map(int, lines(path))) == Counter(range(1000))

    def test_a_failing_job_is_tried_again_until_it_succeeds(self, served_anywhere, path):
        id = served_anywhere.fail_at_first.enqueue(path, 2)
        assert served_anywhere.app.result(id, timeout=SOON) == "at last"
        assert lines(path) == ["1", "2", "3"]
        assert served_anywhere.app.job(id).attempt == 3

    def test_a_job_without_further_attempts_is_a_dead_letter_until_it_is_retried(self, served_anywhere, path):
        app = served_anywhere.app
        id = served_anywhere.fail.call(path, "broken").options(max_retries=1).enqueue()
        with pytest.raises(RemoteError, match="broken") as raised:
            app.result(id, timeout=SOON)
        assert raised.value.type_name == "ValueError"
        assert "raise ValueError(message)" in raised.value.traceback
        job = app.job(id)
        assert job.state == "failed"
        assert job.reason == "failed 2 times: ValueError: broken"
        assert id in [one.id for one in app.dead(queue="default")]

        app.retry_dead(id)
        wait_until(lambda: len(lines(path)) == 4)
        served_anywhere.settled(id)
        assert lines(path) == ["1", "2", "1", "2"]

        app.delete_dead(id)
        with pytest.raises(JobNotFound):
            app.delete_dead(id)
        with pytest.raises(JobNotFound):
            app.retry_dead(id)

    def test_unrecoverable_is_not_tried_again(self, served_anywhere, path):
        id = served_anywhere.give_up.enqueue(path)
        assert served_anywhere.settled(id).reason == "unrecoverable: Unrecoverable: useless"
        assert lines(path) == ["1"]

    def test_a_snoozed_job_runs_again_and_no_attempt_is_counted(self, served_anywhere, path):
        id = served_anywhere.snooze.call(path, 3, 0.05).options(max_retries=0).enqueue()
        assert served_anywhere.app.result(id, timeout=SOON) == 1
        assert lines(path) == ["1", "1", "1", "1"]

    def test_a_job_whose_worker_dies_is_tried_again(self, served_anywhere, path):
        id = served_anywhere.die.enqueue(path, 1)
        assert served_anywhere.app.result(id, timeout=SOON) == "alive"
        assert lines(path) == ["1", "2"]

    def test_a_job_that_takes_too_long_is_ended(self, served_anywhere, path):
        id = served_anywhere.nap.call(path, 60).options(timeout=0.2, max_retries=0).enqueue()
        with pytest.raises(RemoteError) as raised:
            served_anywhere.app.result(id, timeout=SOON)
        assert raised.value.type_name == "JobTimeout"
        assert len(lines(path)) == 1

    def test_a_follow_up_gets_the_result_as_its_first_argument(self, served_anywhere):
        app = served_anywhere.app
        follow = served_anywhere.add.call(10).options(id=uuid4().hex)
        app.enqueue(served_anywhere.add.call(1, 2).options(on_success=follow))
        served_anywhere.wait_for_job(follow.id)
        assert app.result(follow.id, timeout=SOON) == 13

    def test_a_follow_up_of_a_failed_job_gets_the_error(self, served_anywhere):
        app = served_anywhere.app
        follow = served_anywhere.echo.call().options(id=uuid4().hex)
        never = served_anywhere.echo.call().options(id=uuid4().hex)
        app.enqueue(
            served_anywhere.fail.call(message="so").options(max_retries=0, on_error=follow, on_success=never)
        )
        served_anywhere.wait_for_job(follow.id)
        kind, message, trace = app.result(follow.id, timeout=SOON)
        assert (kind, message) == ("ValueError", "so")
        assert "raise ValueError" in trace
        assert app.find_jobs([never.id]) == [None]

    def test_a_queued_a_scheduled_and_a_running_job_can_be_cancelled(
        self, served_anywhere, gate: Gate, tmp_path
    ):
        app = served_anywhere.app
        folder = str(tmp_path / "gate")
        running = [served_anywhere.hold.enqueue(folder, name) for name in ("a", "b")]
        gate.wait_begun(2)
        queued = served_anywhere.hold.enqueue(folder, "c")
        scheduled = served_anywhere.hold.call(folder, "d").options(delay=3600).enqueue()
        assert app.job(queued).state in ("queued", "running")
        assert app.job(scheduled).state == "scheduled"
        for id in (queued, scheduled, *running):
            assert app.cancel(id)
        for id in (queued, scheduled, *running):
            with pytest.raises(JobCancelled):
                app.result(id, timeout=SOON)
            assert app.job(id).state == "cancelled"
            assert not app.cancel(id)
        assert sorted(gate.begun) == ["a", "b"]

    def test_a_paused_queue_starts_nothing_until_it_is_resumed(self, served_anywhere, path):
        app = served_anywhere.app
        app.pause("side")
        try:
            assert app.paused() == {"side"}
            id = served_anywhere.jot_aside.enqueue(path, "x")
            with pytest.raises(WaitTimeout):
                app.wait(id, timeout=0.4)
            assert app.job(id).state == "queued"
        finally:
            app.resume("side")
        assert app.result(id, timeout=SOON) == ["x"]
        assert app.paused() == frozenset()

    def test_results_can_be_deleted_and_are_kept_as_long_as_is_said(self, served_anywhere):
        app = served_anywhere.app
        id = served_anywhere.add.enqueue(1, 1)
        app.result(id, timeout=SOON)
        assert app.delete_result(id)
        assert not app.delete_result(id)
        with pytest.raises(JobNotFound):
            app.result(id)
        brief = served_anywhere.add.call(1, 1).options(keep_result=0.2).enqueue()
        wait_until(lambda: app.find_jobs([brief])[0] is None, "it is forgotten")
        none = served_anywhere.add.call(1, 1).options(keep_result=0).enqueue()
        wait_until(lambda: app.find_jobs([none])[0] is None, "it is forgotten")

    def test_lists_and_counts_tell_where_jobs_are(self, served_anywhere, gate, tmp_path, path):
        app = served_anywhere.app
        running = [served_anywhere.hold.enqueue(str(tmp_path / "gate"), name) for name in ("a", "b")]
        gate.wait_begun(2)
        app.pause("side")
        time.sleep(0.3)  # a claim that was waiting has ended
        queued = [served_anywhere.jot_aside.enqueue(path) for _ in range(3)]
        later = served_anywhere.jot_aside.call(path).options(delay=3600).enqueue()
        assert [job.id for job in app.jobs("queued", queue="side")] == queued
        assert [job.id for job in app.jobs("queued", queue="side", offset=1, limit=1)] == queued[1:2]
        assert [job.id for job in app.jobs("scheduled")] == [later]
        assert {job.id for job in app.jobs("running")} == set(running)
        counts = app.queues()["side"]
        assert (counts.ready, counts.scheduled, counts.running) == (3, 1, 0)
        assert app.queues()["default"].running == 2
        assert app.counts()["running"] == 2
        app.cancel(later)
        app.resume("side")
        gate.open()
        for id in (*queued, *running):
            served_anywhere.settled(id)
        done = app.jobs("succeeded", queue="side", limit=3)
        assert {job.id for job in done} == set(queued)
        assert [job.finished_at for job in done] == sorted((job.finished_at for job in done), reverse=True)
        assert later in [job.id for job in app.jobs("cancelled")]


class TestWithItsConsumer:
    """A job that asks its consumer something opens a connection, so these have workers of their own."""

    def test_progress_is_seen_while_the_job_runs_and_gone_afterwards(self, anywhere, gate, tmp_path):
        with anywhere.working():
            app = anywhere.app
            id = anywhere.report_and_wait.enqueue(str(tmp_path / "gate"))
            gate.wait_begun(1)
            wait_until(lambda: (job := app.job(id)).progress is not None and job.progress.message == "ready")
            assert (app.job(id).progress.done, app.job(id).progress.total) == (100, 100)
            gate.open()
            assert anywhere.settled(id).progress is None
            wait_until(lambda: not app.backend.registry.entries("progress/"))

    def test_what_a_job_saves_is_there_before_its_end(self, anywhere, gate, tmp_path):
        with anywhere.working():
            app = anywhere.app
            folder = str(tmp_path / "gate")
            kept = anywhere.save_and_wait.enqueue(folder, [1, 2])
            replaced = anywhere.save_and_wait.enqueue(folder, "early", "late")
            gate.wait_begun(2)
            assert app.result(kept) == [1, 2]
            assert app.result(replaced) == "early"
            assert app.job(kept).state == "running"
            gate.open()
            for id in (kept, replaced):
                anywhere.settled(id)
            assert app.result(kept) == [1, 2]
            assert app.result(replaced) == "late"

    def test_a_job_that_asks_can_tidy_up_when_it_is_cancelled(self, service, path):
        with service.working():
            id = service.ask_until_cancelled.enqueue(path)
            wait_until(lambda: lines(path) == ["asks"])
            (consumer,) = service.app._consumers
            wait_until(lambda: (held := consumer._find(id)) is not None and held.asked_at is not None)
            assert service.app.cancel(id)
            with pytest.raises(JobCancelled):
                service.app.result(id, timeout=SOON)
            assert lines(path) == ["asks", "tidied up"]

    def test_a_job_knows_which_it_is(self, service):
        with service.working():
            call = service.describe.call().options(timeout=50, max_retries=5, headers={"trace": "1"})
            id = service.app.enqueue(call)
            told = service.app.result(id, timeout=SOON)
            assert (told["id"], told["queue"], told["task"]) == (id, "default", "describe")
            assert (told["attempt"], told["max_retries"], told["previous"]) == (1, 5, "none")
            assert told["headers"] == {"trace": "1"}
            assert 40 < told["seconds_left"] <= 50
            assert abs(told["enqueued_at"] - time.time()) < 60
            for value in ([1, None], None):
                follow = service.describe.call().options(id=uuid4().hex)
                service.app.enqueue(service.echo.call(value).options(on_success=follow))
                service.wait_for_job(follow.id)
                assert service.app.result(follow.id, timeout=SOON)["previous"] == value
