"""Workers that are killed, frozen, stopped: as processes of their own, against a file."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import psutil
import pytest
from gates import Gate
from jobs import lines
from watching import is_alive, wait_until

from bulkhead.service import queue_consumer

SOON = 20.0

# What a loaded machine may add (seconds).
SLACK = 3.0


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "notes")


@pytest.fixture
def folder(tmp_path, gate) -> str:
    return str(tmp_path / "gate")


@pytest.fixture
def leased(make):
    """An application whose leases end after a second; at most one job runs in each worker."""
    return make("sqlite", options={"lease": 1.0}, concurrency=1)


@pytest.fixture
def leased_anywhere(make, shared_backend):
    """The same on each backend that several processes can use."""
    return make(shared_backend, options={"lease": 1.0}, concurrency=1)


def lose_lease(service) -> None:
    """Claim a job as a worker does that dies at once."""
    broker = service.app.backend.broker
    wait_until(lambda: broker.claim("default", 1, 0.05), "it can be claimed")


class TestALease:
    def test_is_kept_for_a_job_that_takes_longer(self, leased, path):
        with leased.process(), leased.process():
            id = leased.nap.enqueue(path, 2.0)
            assert leased.app.result(id, timeout=SOON) == 1
            assert len(lines(path)) == 2

    def test_of_a_worker_that_is_killed_ends_and_its_job_runs_elsewhere(
        self, leased_anywhere, folder, gate: Gate
    ):
        with leased_anywhere.process() as first:
            id = leased_anywhere.hold.enqueue(folder, "job")
            gate.wait_begun(1)
            with leased_anywhere.process():
                os.kill(first.pid, signal.SIGKILL)
                killed = time.monotonic()
                gate.wait_begun(2)
                assert time.monotonic() - killed < 1.0 + 1.0 + SLACK
                wait_until(lambda: not first.processes(), "its processes have ended")
                gate.open()
                assert leased_anywhere.app.result(id, timeout=SOON) == "job"
                assert leased_anywhere.app.job(id).attempt == 2

    def test_is_lost_by_a_worker_that_is_frozen_and_its_late_end_is_refused(
        self, make, file_or_server, folder, gate, path
    ):
        leased = make(file_or_server, options={"lease": 1.0}, concurrency=1)
        with leased.process() as first:
            id = leased.fail_at_first.call(path, 0).options(on_success=leased.jot.call(path + "-f")).enqueue()
            leased.settled(id)
            id = leased.hold.enqueue(folder, "job")
            gate.wait_begun(1)
            os.kill(first.pid, signal.SIGSTOP)
            with leased.process() as second:
                gate.wait_begun(2)
                gate.open()  # the first one's worker ends its run, too, and nobody hears it
                assert leased.app.result(id, timeout=SOON) == "job"
                outcome = leased.app.backend.results.get_many([id])
                first.resume()
                wait_until(lambda: "no longer ours" in first.errors() or "is lost" in first.errors())
                assert leased.app.backend.results.get_many([id]) == outcome
                # Both go on.
                ids = [leased.pid.enqueue() for _ in range(20)]
                for id in ids:
                    leased.app.result(id, timeout=SOON)
                assert second.is_running()
                assert first.is_running()

    def test_that_is_lost_ends_the_run(self, leased, path):
        with leased.process() as first:
            id = leased.nap.enqueue(path, 60)
            wait_until(lambda: lines(path))
            worker = int(lines(path)[0].split()[1])
            os.kill(first.pid, signal.SIGSTOP)
            with leased.process():
                wait_until(lambda: len(lines(path)) == 2, "it runs elsewhere")
                assert is_alive(worker)
                first.resume()
                wait_until(lambda: not is_alive(worker), "its first run is ended")
                assert leased.app.job(id).state == "running"
                assert leased.app.job(id).attempt == 2
                leased.app.cancel(id)
                leased.settled(id)

    def test_that_a_worker_loses_does_not_cost_a_job_its_only_attempt(self, service, path):
        id = service.jot.call(path, "ran").options(max_retries=0).enqueue()
        lose_lease(service)
        with service.working():
            assert service.app.result(id, timeout=SOON) == "ran"

    def test_that_is_lost_again_and_again_makes_a_dead_letter_of_the_job(self, service, path):
        id = service.jot.call(path, "ran").options(max_retries=1).enqueue()
        for _ in range(5):
            lose_lease(service)
        with service.working():
            job = service.settled(id)
        assert job.state == "failed"
        assert job.reason == "5 attempts, in the last of which its worker died or lost the lease"
        assert lines(path) == []

    def test_what_was_cancelled_in_an_attempt_whose_worker_died_is_not_run_again(self, leased, path):
        with leased.process() as worker:
            id = leased.nap.enqueue(path, 60)
            wait_until(lambda: lines(path))
            os.kill(worker.pid, signal.SIGSTOP)
            assert leased.app.cancel(id)
            os.kill(worker.pid, signal.SIGKILL)
        with leased.process():
            assert leased.settled(id).state == "cancelled"
        assert len(lines(path)) == 1


class TestAStop:
    def test_lets_running_jobs_end(self, durable, folder, gate: Gate):
        with durable.process() as worker:
            ids = [durable.hold.enqueue(folder, name) for name in ("a", "b", "c")]
            gate.wait_begun(2)
            os.kill(worker.pid, signal.SIGTERM)
            wait_until(lambda: "stopping" in worker.errors())
            time.sleep(0.3)
            assert worker.is_running()
            gate.open()
            assert worker.wait() == 0
            assert worker.output().endswith("ended\n")
        states = [durable.app.job(id).state for id in ids]
        assert sorted(states) == ["queued", "succeeded", "succeeded"]
        assert len(gate.begun) == 2

    @pytest.mark.parametrize("signals", [1, 2])
    def test_gives_back_what_does_not_end_within_the_grace_time_or_at_a_second_signal(
        self, durable, path, signals
    ):
        with durable.process(grace=0.5 if signals == 1 else 60.0) as worker:
            ids = [durable.nap.enqueue(path, 60) for _ in range(2)]
            wait_until(lambda: len(lines(path)) == 2)
            began = time.monotonic()
            for _ in range(signals):
                os.kill(worker.pid, signal.SIGTERM)
                wait_until(lambda: "stopping" in worker.errors())
            assert worker.wait() == 0
            assert time.monotonic() - began < 0.5 + 2.0 + SLACK
            assert worker.processes() == []
        for id in ids:
            job = durable.app.job(id)
            # Not a failure, and not after the lease: at once.
            assert (job.state, job.attempt) == ("queued", 0)

    def test_by_ctrl_c_is_in_good_order(self, durable, folder, gate: Gate):
        with durable.process() as worker:
            id = durable.hold.enqueue(folder, "a")
            gate.wait_begun(1)
            os.killpg(worker.pid, signal.SIGINT)
            wait_until(lambda: "stopping" in worker.errors())
            gate.open()
            assert worker.wait() == 0
            assert "Traceback" not in worker.errors()
        assert durable.app.job(id).state == "succeeded"

    def test_that_reaches_every_process_at_once_gives_back_what_ran(self, durable, path):
        with durable.process() as worker:
            ids = [durable.nap.enqueue(path, 60) for _ in range(2)]
            wait_until(lambda: len(lines(path)) == 2)
            for pid in worker.processes():
                with contextlib.suppress(ProcessLookupError):  # ended because another one has
                    os.kill(pid, signal.SIGTERM)
            worker.wait()
            wait_until(lambda: not worker.processes())
        for id in ids:
            assert (durable.app.job(id).state, durable.app.job(id).attempt) == ("queued", 0)

    def test_that_reaches_a_worker_process_long_before_the_main_process_gives_back_what_ran(
        self, service, path, monkeypatch
    ):
        monkeypatch.setattr(queue_consumer, "_SWEPT", SOON)
        with service.working() as working:
            id = service.nap.enqueue(path, 60)
            wait_until(lambda: lines(path))
            worker = int(lines(path)[0].split()[1])
            (consumer,) = next(iter(service.app._consumers))._consumers
            (batch,) = consumer._holdings.batches()
            os.kill(worker, signal.SIGTERM)
            wait_until(batch.tracker.done, "its end is known")
            time.sleep(0.1)  # not for a result: for longer than it takes to judge the job
            working.stop()
        assert (service.app.job(id).state, service.app.job(id).attempt) == ("queued", 0)

    def test_loses_nothing_that_was_being_claimed(self, durable, path):
        ids = durable.app.enqueue_many([durable.jot.call(path, number) for number in range(1000)])
        for _ in range(3):
            n_before = len(lines(path))
            with durable.process() as worker:
                wait_until(lambda: len(lines(path)) > n_before + 50)  # noqa: B023
                os.kill(worker.pid, signal.SIGTERM)
                assert worker.wait() == 0
            counts = durable.app.queues()["default"]
            assert counts.running == 0, "all of them are given back"
        with durable.process():
            for id in ids:
                durable.settled(id)
        assert sorted(map(int, lines(path))) == list(range(1000)), "each ran, and once"

    def test_by_sigkill_leaves_no_process_behind_and_no_job_is_lost(self, leased, path):
        with leased.process() as worker:
            ids = [leased.nap.enqueue(path, 0.05) for _ in range(20)]
            wait_until(lambda: len(lines(path)) > 3)
            os.kill(worker.pid, signal.SIGKILL)
            wait_until(lambda: not worker.processes())
        with leased.process():
            for id in ids:
                assert leased.settled(id).state == "succeeded"


def test_a_job_of_another_process_is_cancelled(durable, path):
    with durable.process():
        id = durable.nap.enqueue(path, 60)
        wait_until(lambda: lines(path))
        worker = int(lines(path)[0].split()[1])
        began = time.monotonic()
        assert durable.app.cancel(id)
        assert durable.settled(id).state == "cancelled"
        assert time.monotonic() - began < 2.0 + SLACK
        assert not is_alive(worker)
        assert not psutil.pid_exists(worker) or not is_alive(worker)


def test_long_jobs_are_shared_by_the_workers_that_are_idle(make, path):
    service = make("sqlite", concurrency=1)
    with service.process(), service.process():
        # Both know the task as a short one, and claim many of them at once.
        for id in service.app.enqueue_many([service.nap.call(os.devnull, 0) for _ in range(400)]):
            service.settled(id)
        began = time.monotonic()
        ids = service.app.enqueue_many([service.nap.call(path, 1.0) for _ in range(6)])
        for id in ids:
            service.settled(id)
        assert time.monotonic() - began < 5.5, "they ran one after the other"
        assert len({line.split()[1] for line in lines(path)}) == 2
