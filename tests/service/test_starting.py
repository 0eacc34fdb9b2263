"""Starting and stopping workers: once, twice, often, in odd places; and applications that are used in odd places."""

from __future__ import annotations

import importlib
import os
import tempfile
import threading
from pathlib import Path

import pytest
from consuming import consuming
from gates import Gate
from jobs import lines
from scripts import running
from traces import Traces
from watching import wait_until

from bulkhead import App, ConfigError

SOON = 20.0


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "notes")


class TestRunOnce:
    def test_runs_one_job_and_tells_what_has_become_of_it(self, anywhere, path):
        first, second = (anywhere.jot.enqueue(path, text) for text in ("a", "b"))
        done = anywhere.app.run_once()
        assert (done.id, done.state) == (first, "succeeded")
        assert lines(path) == ["a"]
        assert anywhere.app.job(second).state == "queued"

    def test_returns_none_when_nothing_is_due(self, service):
        service.echo.call(1).options(delay=60).enqueue()
        assert service.app.run_once() is None
        assert service.app.run_once("side") is None

    def test_does_not_take_what_it_cannot_read_for_an_empty_queue(self, service, path):
        from bulkhead.backends.base import Message

        service.app.backend.broker.enqueue_many([Message(f"bad-{n}", "default", b"?") for n in range(3)])
        id = service.jot.enqueue(path, "good")
        assert service.app.run_once().id == id
        assert len(service.app.dead()) == 3

    def test_tells_that_a_job_is_to_be_tried_again(self, service):
        id = service.fail.call().options(backoff=None).enqueue()
        job = service.app.run_once()
        assert (job.id, job.attempt, job.error_message) == (id, 1, "on purpose")
        assert job.state in ("queued", "retrying")


# A module of an application, which notes each process that imports it.
NOTING = """
import os
with open({log!r}, "a") as log:
    log.write(f"{{os.getpid()}}\\n")
from bulkhead import App
app = App("sqlite:///{folder}/jobs.db")
{options}
@app.task(max_retries=0)
def end():
    os._exit(1)
@app.task
def processes():
    return os.getpid(), os.getppid()
"""


class TestTheModulesOfTasks:
    @pytest.mark.parametrize("is_ahead", [True, False], ids=["as they are", "told not to be"])
    def test_are_imported_once_a_pool_and_not_by_each_worker(self, tmp_path, monkeypatch, is_ahead):
        log, name = tmp_path / "log", f"noting_{is_ahead}"
        options = "" if is_ahead else "app.queue('default', preload=[])"
        (tmp_path / f"{name}.py").write_text(NOTING.format(log=str(log), folder=tmp_path, options=options))
        monkeypatch.syspath_prepend(tmp_path)
        module = importlib.import_module(name)
        app = module.app
        app.queue("default", concurrency=1)
        workers = set()
        with consuming(app):
            for _ in range(3):
                worker, launcher = app.result(module.processes.enqueue(), timeout=SOON)
                workers.add(worker)
                app.wait(module.end.enqueue(), timeout=SOON)
        app.close()
        assert len(workers) == 3
        imported = set(map(int, lines(log))) - {os.getpid()}
        assert imported == ({launcher} if is_ahead else workers)


class TestAWorkerInAThread:
    def test_that_is_stopped_before_it_starts_is_not_stopped(self, service):
        service.app.stop()
        with service.working():
            assert service.app.result(service.add.enqueue(1, 2), timeout=SOON) == 3

    def test_can_be_started_twice_and_one_after_the_other(self, service, path):
        with service.working(), service.working():
            ids = [service.jot.enqueue(path, number) for number in range(100)]
            for id in ids:
                service.settled(id)
        with service.working():
            assert service.app.result(service.add.enqueue(1, 2), timeout=SOON) == 3
        assert sorted(map(int, lines(path))) == list(range(100))

    def test_of_each_of_two_applications_runs_its_own_jobs(self, make):
        one, two = make("sqlite", options={"namespace": "one"}), make("sqlite", options={"namespace": "two"})
        with one.working(), two.working():
            for service in (one, two):
                call = service.echo.call(service.name).options(id="same")
                service.app.enqueue(call)
            assert one.app.result("same", timeout=SOON) == one.name
            assert two.app.result("same", timeout=SOON) == two.name

    def test_of_some_queues_leaves_the_others_alone(self, service, path):
        other = service.jot_aside.enqueue(path)
        with service.working(["default"]):
            service.app.result(service.add.enqueue(1, 2), timeout=SOON)
            assert service.app.job(other).state == "queued"

    def test_a_follow_up_may_wait_in_a_queue_that_this_worker_does_not_serve(self, service):
        follow = service.echo.call().options(id="follows", queue="side")
        with service.working(["default"]):
            service.settled(service.app.enqueue(service.echo.call(5).options(on_success=follow)))
            assert service.app.job("follows").state == "queued"
        assert service.app.run_once("side").id == "follows"
        assert service.app.result("follows") == 5

    def test_leaves_nothing_behind_however_often_it_is_started(self, service):
        folders: set[Path] = set()

        def round_() -> None:
            with service.working(["side"]):
                (consumer,) = service.app._consumers
                wait_until(lambda: consumer._consumers, "it has a folder")
                folders.add(Path(consumer._consumers[0]._address).parent)
                service.app.result(service.jot_aside.enqueue(os.devnull), timeout=SOON)

        round_()
        before = Traces.now()
        for _ in range(3):
            round_()
        wait_until(lambda: not Traces.now().beyond(before))
        assert len(folders) == 4
        assert not [folder for folder in folders if folder.exists()]

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_may_start_its_processes_in_each_way(self, make, method):
        service = make("sqlite", pool={"start_method": method}, concurrency=1)
        with service.process():
            assert service.app.result(service.add.enqueue(1, 2), timeout=SOON) == 3

    def test_starts_where_the_folder_for_temporary_files_has_a_long_name(
        self, service, tmp_path, monkeypatch
    ):
        long = tmp_path / ("x" * 120)
        long.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(long))
        with service.working():
            assert service.app.result(service.add.enqueue(1, 2), timeout=SOON) == 3

    def test_bad_grace_is_refused(self, service):
        with pytest.raises(ConfigError, match="grace"):
            service.app.run(grace=-1)


class TestCallbacks:
    def test_come_in_order_for_a_job_that_fails(self, service):
        with service.working():
            id = service.telling.enqueue(False)
            service.settled(id)
            wait_until(lambda: len(service.told) == 4)
        assert service.told == [
            ("processing", id, 1),
            ("retry", id, "attempt 1"),
            ("processing", id, 2),
            ("failure", id, "attempt 2"),
        ]

    def test_come_in_order_for_a_job_that_succeeds(self, service):
        with service.working():
            id = service.telling.enqueue(True)
            service.settled(id)
            wait_until(lambda: len(service.told) == 2)
        assert service.told == [("processing", id, 1), ("success", id)]


class TestAnApplication:
    def test_can_be_used_in_a_task(self, durable, path):
        with durable.working():
            id = durable.app.result(durable.enqueue_another.enqueue(path), timeout=SOON)
            assert durable.app.result(id, timeout=SOON) == "from a worker"

    def test_in_memory_tells_a_task_that_nobody_would_see_its_jobs(self, service, path):
        with service.working():
            job = service.settled(service.enqueue_another.call(path).options(max_retries=0).enqueue())
        assert job.error_type == "BrokerUnavailable"
        assert "memory:// keeps jobs in the process that made them" in job.error_message

    def test_can_be_used_in_a_forked_copy_while_another_thread_connects(self, durable):
        with durable.app._lock:
            pid = os.fork()
            if not pid:
                try:
                    durable.echo.call(1).options(id="from the copy").enqueue()
                finally:
                    os._exit(0)
            os.waitpid(pid, 0)
        assert durable.app.job("from the copy").state == "queued"

    def test_gives_no_id_twice_in_forked_copies(self, durable):
        for _ in range(2):
            pid = os.fork()
            if not pid:
                try:
                    durable.app.enqueue_many(durable.echo.call(1) for _ in range(10))
                finally:
                    os._exit(0)
            os.waitpid(pid, 0)
        assert durable.app.queues()["default"].ready == 20

    def test_can_be_closed_and_used_again(self, durable):
        id = durable.echo.enqueue(1)
        durable.app.close()
        durable.app.close()
        assert durable.app.job(id).state == "queued"

    def test_in_the_script_that_is_run_works_in_worker_processes(self, tmp_path):
        code = f"""
import threading
from bulkhead import App

app = App("sqlite:///{tmp_path}/jobs.db")

@app.task(concurrency=1)
def double(number):
    return 2 * number

if __name__ == "__main__":
    thread = threading.Thread(target=app.run)
    thread.start()
    print("result", app.result(double.enqueue(21), timeout=30), flush=True)
    app.stop()
    thread.join()
    print("ended", flush=True)
"""
        with running(code) as script:
            assert script.wait_for_line("result") == "result 42"
            assert script.wait() == 0
            assert script.errors() == ""


def test_jobs_start_in_the_order_in_which_they_were_enqueued_and_those_of_larger_priority_first(make, path):
    service = make(concurrency=1)
    calls = [service.jot.call(path, number) for number in range(100)]
    calls += [service.jot.call(path, number).options(priority=5) for number in range(100, 120)]
    service.app.enqueue_many(calls)
    with service.working():
        wait_until(lambda: len(lines(path)) == 120)
    assert lines(path) == [str(number) for number in (*range(100, 120), *range(100))]


def test_an_application_that_was_never_used_connects_to_nothing():
    app = App("redis://203.0.113.1:6379/0")
    app.task(threading.active_count, name="count")
    assert app.tasks()
    app.close()


def test_a_worker_takes_no_more_memory_the_more_jobs_it_has_run(service, gate: Gate):
    with service.working():
        (consumer,) = service.app._consumers
        for _ in range(3):
            for id in service.app.enqueue_many([service.echo.call(1) for _ in range(300)]):
                service.settled(id)
        one = consumer._consumers[0]
        wait_until(lambda: one.n_held == 0)
        assert not one._holdings.batches()
        assert len(one._free_slots) == 2048
        assert set(one._pace._seconds) <= set(service.app.tasks())
