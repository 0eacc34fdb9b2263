"""Short jobs travel together; whatever happens to one of them is put down to that one alone."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections import Counter
from pathlib import Path
from uuid import uuid4

import pytest
from jobs import lines
from watching import wait_until

from bulkhead import JobCancelled

SOON = 20.0


@pytest.fixture(scope="module")
def one(module_make):
    """An application with a single worker process, which knows its tasks as short ones."""
    service = module_make("memory", concurrency=1)
    with service.working():
        learn(service)
        yield service


@pytest.fixture(scope="module")
def two(module_make):
    """The same with two."""
    service = module_make("memory", concurrency=2)
    with service.working():
        learn(service)
        yield service


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "notes")


def learn(service) -> None:
    """Let the worker learn that these tasks are short."""
    notes = str(service.folder / uuid4().hex)
    calls = [service.echo.call(1), service.brief.call(os.devnull), service.die.call(notes, 0)]
    for _ in range(3):
        for id in service.app.enqueue_many([call for _ in range(50) for call in calls]):
            service.settled(id)


def enqueue_together(service, calls) -> list[str]:
    """Enqueue jobs that are claimed in one go."""
    service.app.pause("default")
    ids = service.app.enqueue_many(calls)
    service.app.resume("default")
    return ids


def test_short_jobs_travel_together(one):
    (consumer,) = one.app._consumers
    dispatcher = consumer._consumers[0]._dispatcher
    before = dispatcher.stats()[0].succeeded
    ids = enqueue_together(one, [one.echo.call(number) for number in range(400)])
    assert [one.app.result(id, timeout=SOON) for id in ids] == list(range(400))
    assert dispatcher.stats()[0].succeeded - before < 100, "messages to the pool"


def test_a_job_that_kills_its_worker_is_the_only_one_that_has_failed(two, path):
    calls = [two.echo.call(number) for number in range(60)]
    calls[30] = two.die.call(path).options(max_retries=1)
    ids = enqueue_together(two, calls)
    for number, id in enumerate(ids):
        if number != 30:
            assert two.app.result(id, timeout=SOON) == number
            assert two.app.job(id).attempt == 1
    assert two.settled(ids[30]).reason.startswith("failed 2 times: WorkerCrashed")
    assert lines(path) == ["1", "2"]
    learn(two)


def test_a_job_whose_worker_is_told_to_end_has_not_had_its_time(two, path):
    """The consumer waits a moment to see whether it is told to, as well."""
    calls = [two.echo.call(number) for number in range(20)]
    calls[3] = two.die.call(path, by=signal.SIGTERM).options(max_retries=0, timeout=0.2)
    ids = enqueue_together(two, calls)
    assert two.settled(ids[3]).reason.startswith("failed: WorkerCrashed")
    assert [two.app.result(id, timeout=SOON) for id in ids[:3] + ids[4:]] == [0, 1, 2, *range(4, 20)]
    learn(two)


def test_what_has_ended_before_its_worker_dies_does_not_run_again(two, path):
    calls = [two.jot.call(path, number) for number in range(100)]
    for number in (20, 77):
        calls[number] = two.die.call(path + "-die").options(max_retries=0)
    for id in two.app.enqueue_many([two.jot.call(os.devnull) for _ in range(100)]):
        two.settled(id)
    ids = enqueue_together(two, calls)
    for id in ids:
        two.settled(id)
    assert Counter(lines(path)) == Counter(str(number) for number in range(100) if number not in (20, 77))
    assert lines(path + "-die") == ["1", "1"]
    learn(two)


def test_a_job_that_exits_is_the_only_one_that_has_failed_and_the_others_run_once(two, path):
    calls = [two.jot.call(path, number) for number in range(40)]
    calls[20] = two.leave.call(3)
    for _ in range(3):
        for id in two.app.enqueue_many(
            [two.leave.call(0) for _ in range(20)] + [two.jot.call(os.devnull)] * 20
        ):
            two.settled(id)
    ids = enqueue_together(two, calls)
    for id in ids:
        two.settled(id)
    assert two.app.job(ids[20]).error_type == "SystemExit"
    assert Counter(lines(path)) == Counter(str(number) for number in range(40) if number != 20)


def test_jobs_behind_one_that_takes_long_run_elsewhere(two, path):
    calls = [two.brief.call(path, 0.0).options(timeout=30) for _ in range(40)]
    calls[5] = two.brief.call(path, 3.0).options(timeout=30)
    ids = enqueue_together(two, calls)
    began = time.monotonic()
    for id in ids[6:]:
        two.settled(id)
    assert time.monotonic() - began < 2.5, "they have waited for it"
    assert two.app.job(ids[5]).state == "running"
    assert two.settled(ids[5]).state == "succeeded"
    assert len(lines(path)) == 40, "each ran once"
    learn(two)


def test_a_timeout_ends_the_job_that_takes_too_long_and_no_other(two, path):
    calls = [two.brief.call(path, 0.0) for _ in range(40)]
    calls[5] = two.brief.call(path, 60.0)
    ids = enqueue_together(two, calls)
    job = two.settled(ids[5])
    assert job.error_type == "JobTimeout"
    assert "0.3 s" in job.error_message
    for number, id in enumerate(ids):
        if number != 5:
            assert two.settled(id).state == "succeeded"
            assert two.app.job(id).attempt == 1
    learn(two)


def test_a_cancelled_job_is_ended_and_no_other(two, path):
    calls = [two.brief.call(path, 0.0).options(timeout=60) for _ in range(40)]
    calls[5] = two.brief.call(path, 60.0).options(timeout=100)
    ids = enqueue_together(two, calls)
    wait_until(lambda: "60.0" in lines(path))
    assert two.app.cancel(ids[5])
    with pytest.raises(JobCancelled):
        two.app.result(ids[5], timeout=SOON)
    for number, id in enumerate(ids):
        if number != 5:
            assert two.settled(id).state == "succeeded"
    assert lines(path).count("60.0") == 1
    learn(two)


def test_more_batches_than_there_are_marks_run_one_by_one(make, path, monkeypatch):
    monkeypatch.setattr("bulkhead.service.consumer.SLOTS", 1)
    service = make(concurrency=2)
    with service.working():
        learn(service)
        ids = enqueue_together(service, [service.jot.call(path, number) for number in range(500)])
        for id in ids:
            service.settled(id)
    assert Counter(lines(path)) == Counter(map(str, range(500)))


def test_on_a_full_disk_jobs_run_one_by_one(make, path, monkeypatch):
    """A mapped page for which the disk has no room would kill who writes to it."""
    given: list[int] = []

    def set_aside(descriptor: int, start: int, size: int) -> None:
        given.append(size)
        if len(given) > 1:  # the first is the room for the marks
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", set_aside)
    service = make(concurrency=2)
    with service.working():
        learn(service)
        ids = enqueue_together(service, [service.jot.call(path, number) for number in range(50)])
        for id in ids:
            service.settled(id)
    assert len(given) > 1
    assert Counter(lines(path)) == Counter(map(str, range(50)))


@pytest.mark.slow
def test_workers_that_are_killed_in_the_middle_of_batches_lose_nothing(make, path):
    service = make(concurrency=2)
    with service.working():
        learn(service)
        n_jobs = 5000
        ids = service.app.enqueue_many(
            [service.jot.call(path, number).options(max_retries=20) for number in range(n_jobs)]
        )
        (consumer,) = service.app._consumers
        dispatcher = consumer._consumers[0]._dispatcher
        while service.app.job(ids[-1]).state != "succeeded":
            for process in dispatcher.stats()[0].processes:
                if process.pid and process.state == "busy":
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, 9)
            time.sleep(0.05)
        for id in ids:
            assert service.settled(id).state == "succeeded"
    assert set(lines(path)) == set(map(str, range(n_jobs)))
