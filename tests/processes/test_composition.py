"""Groups, chains and follow-up jobs (A19, A20) on real workers."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calling import Call, at_once
from gates import Gate
from jobs import Greeting, echo, fail, instant, lines, nap, note, nothing, pid
from linked_jobs import (
    Doubler,
    add,
    crash,
    describe,
    fed_and_failing_at_first,
    fed_pass,
    hang,
    instants,
    note_fed,
    numbers,
    refuse,
    total,
    unsendable,
)
from staffing import staffed
from watching import PATIENCE, wait_until, worker_pids

from bulkhead import (
    BarrierTimeout,
    ChainTracker,
    ConfigError,
    ConfigTypeError,
    Dispatcher,
    DispatcherFinalized,
    DuplicateJobId,
    GroupTracker,
    Job,
    JobCancelled,
    JobNotPicklable,
    JobsFailed,
    JobTimeout,
    NestedDispatch,
    Pool,
    PoolBroken,
    PoolFull,
    RetryPolicy,
    UnknownPriority,
    WaitTimeout,
    WorkerCrashed,
    chain,
    group,
)

HERE, THERE = 0, 1


@pytest.fixture(scope="module")
def disp() -> Iterator[Dispatcher]:
    with Dispatcher([(HERE, 2), (THERE, 1)]) as disp:
        for priority in (HERE, THERE):
            # Why: threads that are made when they are first needed, and stay until the end.
            ahead = Job(nothing).options(priority=priority, on_success=Job(echo).options(priority=priority))
            disp.dispatch(ahead).add_done_callback(repr)
        disp.barrier()
        yield staffed(disp)


@pytest.fixture
def own() -> Iterator[Dispatcher]:
    """For large data: free memory is kept for the next jobs until the end, and results as long as they are known."""
    with Dispatcher([(HERE, 2), (THERE, 1)], max_history=0) as disp:
        yield disp


@pytest.fixture(autouse=True)
def _everything_has_settled(request: pytest.FixtureRequest) -> Iterator[None]:
    """When a test is over, the module's dispatcher has nothing left and nobody's promise."""
    yield
    if "disp" in request.fixturenames:
        disp = request.getfixturevalue("disp")
        disp.barrier(timeout=PATIENCE, check=False)
        for pool in disp._pools.values():
            assert pool._scheduler.unsettled == 0
            assert pool._scheduler.promised_jobs() == []
        assert disp._history._reserved == {}


def there(job: Job) -> Job:
    return job.options(priority=THERE)


def accepted(disp: Dispatcher) -> int:
    return sum(
        one.waiting + one.running + one.delayed + one.succeeded + one.failed + one.cancelled
        for one in disp.stats().pools.values()
    )


def states(handle: Any) -> list[str]:
    return [leaf.status().state for leaf in handle.leaves]


class TestGroup:
    def test_its_result_is_the_list_of_results_in_order(self, disp: Dispatcher) -> None:
        handle = disp.dispatch(group([Job(echo, 1), there(Job(echo, None)), Greeting("you"), Job(echo, "x")]))
        assert isinstance(handle, GroupTracker)
        one, nothing_, hello, x = handle.result(PATIENCE)
        assert (one, nothing_, x) == (1, None, "x")
        assert hello.startswith("hello you")
        assert handle.status().state == "succeeded"
        assert handle.exception() is None

    def test_its_jobs_are_jobs_of_their_own(self, disp: Dispatcher) -> None:
        handle = disp.dispatch(group([Job(echo, number) for number in range(5)]))
        assert handle.wait(PATIENCE)
        assert list(handle.id) == list(range(handle.id[0], handle.id[0] + 5))
        assert [disp.job(one).result() for one in handle.id] == [0, 1, 2, 3, 4]
        assert [tracker.id for tracker in handle.trackers] == list(handle.id)

    def test_its_jobs_run_side_by_side(self, disp: Dispatcher, gate: Gate) -> None:
        handle = disp.dispatch(group([gate.job("a"), gate.job("b"), gate.job("c", priority=THERE)]))
        assert set(gate.wait_begun(3)) == {"a", "b", "c"}
        assert handle.status().state == "running"
        assert not handle.done()
        assert not handle.wait(0)
        with pytest.raises(WaitTimeout):
            handle.result(0)
        gate.open()
        assert handle.result(PATIENCE) == ["a", "b", "c"]
        assert handle.done()

    def test_failed_jobs_stop_no_other_and_are_raised_together(self, disp: Dispatcher) -> None:
        handle = disp.dispatch(group([Job(fail, "first"), Job(echo, 1), there(Job(fail, "second"))]))
        with pytest.raises(JobsFailed) as failure:
            handle.result(PATIENCE)
        assert [str(error) for error in failure.value.exceptions] == ["first", "second"]
        assert failure.value.job_ids == (handle.id[0], handle.id[2])
        assert handle.trackers[1].result() == 1

    def test_its_status_is_the_same_however_often_it_is_asked_for(self, disp: Dispatcher) -> None:
        handle = disp.dispatch(group([Job(fail), Job(echo, 1)]))
        handle.wait(PATIENCE)
        seen = [handle.status() for _ in range(5)]
        assert seen == [seen[0]] * 5
        assert seen[0].state == "failed"
        assert {repr(handle.exception()) for _ in range(5)} == {repr(handle.exception())}

    def test_its_status_can_be_written_as_json(self, disp: Dispatcher) -> None:
        handle = disp.dispatch(group([Job(echo, 1), chain([Job(echo, 2), Job(fail)])]))
        handle.wait(PATIENCE)
        told = json.loads(handle.status().to_json())
        assert told["state"] == "failed"
        assert told["finished_at"] >= told["started_at"] >= told["queued_at"]
        assert [job["state"] for job in told["jobs"]] == ["succeeded", "failed"]
        assert [job["id"] for job in told["jobs"][1]["jobs"]] == list(handle.id[1])

    def test_of_no_job_has_succeeded_with_no_result(self, disp: Dispatcher) -> None:
        before = accepted(disp)
        handle = disp.dispatch(group([]))
        assert handle.result(0) == []
        assert handle.status().state == "succeeded"
        assert disp.dispatch(group([group([])])).result(0) == [[]]
        assert not handle.cancel()
        called: list[object] = []
        handle.add_done_callback(called.append)
        assert called == [handle]
        assert disp.try_dispatch(group([])).result(0) == []  # type: ignore[union-attr]
        assert accepted(disp) == before

    def test_a_job_that_is_named_twice_runs_twice(self, disp: Dispatcher) -> None:
        job = Job(pid)
        both = group([job, job])
        handles = [disp.dispatch(both) for _ in range(2)]
        assert len({leaf.id for handle in handles for leaf in handle.leaves}) == 4
        assert all(handle.result(PATIENCE) for handle in handles)

    def test_is_accepted_as_a_whole_when_its_first_job_is(self, disp: Dispatcher, gate: Gate) -> None:
        held = [disp.dispatch(gate.job(f"held-{number}")) for number in range(2)]
        gate.wait_begun(2)
        many = group([*(Job(echo, number) for number in range(20)), there(Job(echo, "there"))])
        before = accepted(disp)
        assert disp.try_dispatch(many) is None
        with pytest.raises(PoolFull):
            disp.dispatch(many, timeout=0.01)
        assert accepted(disp) == before

        waiting = Call(disp.dispatch, many).until_waiting()
        assert accepted(disp) == before
        gate.open("held-0")
        handle = waiting.value()
        assert handle.result(PATIENCE) == [*range(20), "there"]
        gate.open()
        assert all(one.result(PATIENCE) for one in held)

    def test_begins_as_a_whole_even_if_the_dispatching_thread_does_not_come_back(
        self, disp: Dispatcher, gate: Gate
    ) -> None:
        held = [disp.dispatch(gate.job(f"held-{number}")) for number in range(2)]
        gate.wait_begun(2)
        # dispatch_all leaves the group with the pool, which accepts it while nobody looks.
        trackers = disp.dispatch_all([there(Job(echo, 1)), group([Job(echo, 2), there(Job(echo, 3))])])
        assert next(trackers).result(PATIENCE) == 1
        waiting = Call(next, trackers).until_waiting()
        gate.open()
        handle = waiting.value()
        assert isinstance(handle, GroupTracker)
        assert handle.result(PATIENCE) == [2, 3]
        assert list(trackers) == []
        assert all(one.result(PATIENCE) for one in held)

    def test_cancel_takes_out_what_has_not_settled(self, disp: Dispatcher, gate: Gate) -> None:
        handle = disp.dispatch(group([Job(echo, 1), gate.job("held"), *(gate.job() for _ in range(3))]))
        gate.wait_begun(1)
        handle.trackers[0].wait(PATIENCE)
        assert handle.cancel()
        assert handle.wait(PATIENCE)
        assert states(handle) == ["succeeded", *["cancelled"] * 4]
        assert handle.status().state == "cancelled"
        with pytest.raises(JobCancelled, match="4 jobs of the group"):
            handle.result()
        assert not handle.cancel()


class TestChain:
    def test_each_job_is_fed_the_result_of_the_one_before(self, disp: Dispatcher) -> None:
        handle = disp.dispatch(
            chain([Job(echo, 1), there(Job(add, 10)), Job(add, number=100), Doubler(THERE)])
        )
        assert isinstance(handle, ChainTracker)
        assert handle.result(PATIENCE) == 222
        assert [tracker.result() for tracker in handle.trackers] == [1, 11, 111, 222]
        assert [tracker.priority for tracker in handle.trackers] == [HERE, THERE, HERE, THERE]
        assert handle.status().state == "succeeded"

    def test_none_is_a_result_like_any_other(self, disp: Dispatcher, tmp_path: Path) -> None:
        fed = tmp_path / "fed"
        handle = disp.dispatch(chain([Job(nothing), Job(note_fed, str(fed)), there(Job(note_fed, str(fed)))]))
        assert handle.result(PATIENCE) is None
        assert lines(fed) == ["None", "None"]

    def test_goes_on_while_nobody_waits_for_it(self, disp: Dispatcher, tmp_path: Path) -> None:
        fed = tmp_path / "fed"
        disp.dispatch(chain([Job(echo, "a"), there(Job(note_fed, str(fed))), Job(note_fed, str(fed))]))
        wait_until(lambda: lines(fed) == ["'a'", "'a'"], "the chain has run")

    def test_a_group_in_it_is_fed_and_feeds(self, disp: Dispatcher) -> None:
        fan = group([Job(add, 1), there(Job(add, 2)), chain([Job(add, 3), Doubler()])])
        handle = disp.dispatch(chain([Job(echo, 10), fan, Job(total), Job(add, 1)]))
        assert handle.result(PATIENCE) == 11 + 12 + 26 + 1
        assert handle.trackers[1].result() == [11, 12, 26]

    def test_it_may_begin_with_a_group(self, disp: Dispatcher) -> None:
        parts = group(
            [Job(echo, 1), group([there(Job(echo, 2)), Job(echo, 3)]), chain([Job(echo, 4), Job(add, 1)])]
        )
        handle = disp.dispatch(chain([parts, Job(echo)]))
        assert handle.result(PATIENCE) == [1, [2, 3], 5]

    def test_a_group_of_no_job_hands_on_an_empty_list(self, disp: Dispatcher) -> None:
        none = group([])
        assert disp.dispatch(chain([none, Job(total)])).result(PATIENCE) == 0
        assert disp.dispatch(chain([Job(echo, 5), none, Job(total)])).result(PATIENCE) == 0
        assert disp.dispatch(chain([Job(echo, 5), none])).result(PATIENCE) == []
        assert disp.dispatch(chain([none])).result(PATIENCE) == []
        inner = chain([none, Job(total)])
        handle = disp.dispatch(chain([Job(echo, 5), inner, Job(add, 7)]))
        assert handle.result(PATIENCE) == 7
        assert handle.trackers[0].result() == 5

    def test_a_failed_job_fails_it_and_the_rest_never_runs(self, disp: Dispatcher, tmp_path: Path) -> None:
        ran = tmp_path / "ran"
        rest = [Job(note_fed, str(ran)), group([there(Job(note_fed, str(ran))), Job(note_fed, str(ran))])]
        handle = disp.dispatch(chain([Job(echo, 1), there(Job(refuse)), *rest]))
        with pytest.raises(ValueError, match="will not take 1"):
            handle.result(PATIENCE)
        assert states(handle) == ["succeeded", "failed", "cancelled", "cancelled", "cancelled"]
        assert handle.status().state == "failed"
        with pytest.raises(JobCancelled, match=f"as job {handle.id[1]} before it has failed") as cancelled:
            handle.trackers[2].result()
        assert cancelled.value.__cause__ is handle.trackers[1].exception()
        assert [tracker.status().attempt for tracker in handle.leaves[2:]] == [0, 0, 0]
        disp.barrier(check=False)
        assert lines(ran) == []

    def test_a_failed_job_of_a_group_in_it_fails_it(self, disp: Dispatcher, tmp_path: Path) -> None:
        ran = tmp_path / "ran"
        handle = disp.dispatch(
            chain([group([Job(fail, "one"), there(Job(echo, 1))]), Job(note_fed, str(ran)), Job(echo)])
        )
        with pytest.raises(JobsFailed) as failure:
            handle.result(PATIENCE)
        assert failure.value.job_ids == (handle.id[0][0],)
        assert states(handle) == ["failed", "succeeded", "cancelled", "cancelled"]
        assert lines(ran) == []

    @pytest.mark.parametrize("position", ["first", "later"])
    def test_a_crash_fails_it(self, disp: Dispatcher, position: str) -> None:
        jobs = [Job(crash, None) if position == "first" else Job(crash), there(Job(echo))]
        handle = disp.dispatch(chain(jobs if position == "first" else [Job(nothing), *jobs]))
        with pytest.raises(WorkerCrashed):
            handle.result(PATIENCE)
        assert states(handle)[-2:] == ["failed", "cancelled"]

    def test_a_timeout_counts_for_one_job_of_it(self, disp: Dispatcher) -> None:
        slow = [Job(nap, 0.3).options(timeout=20.0), Job(hang).options(timeout=0.2), Job(echo)]
        handle = disp.dispatch(chain(slow))
        with pytest.raises(JobTimeout):
            handle.result(PATIENCE)
        assert states(handle) == ["succeeded", "failed", "cancelled"]

    def test_retries_of_a_job_count_within_it(self, disp: Dispatcher, tmp_path: Path) -> None:
        retry = RetryPolicy(3, initial=0.01)
        flaky = Job(fed_and_failing_at_first, str(tmp_path / "attempts"), 2).options(retry=retry)
        handle = disp.dispatch(chain([Job(echo, 10), flaky, Job(add, 1)]))
        assert handle.result(PATIENCE) == 14
        assert [tracker.status().attempt for tracker in handle.leaves] == [1, 3, 1]

    def test_a_later_job_is_scheduled_until_it_is_fed(self, disp: Dispatcher, gate: Gate) -> None:
        handle = disp.dispatch(chain([gate.job("held"), there(Job(echo)), Job(echo)]))
        gate.wait_begun(1)
        assert states(handle) == ["running", "scheduled", "scheduled"]
        assert disp.jobs("scheduled") == list(handle.trackers[1:])
        assert [disp.stats()[one].delayed for one in (HERE, THERE)] == [1, 1]
        gate.open()
        assert handle.result(PATIENCE) == "held"

    def test_cancelling_a_later_job_cancels_those_after_it(self, disp: Dispatcher, gate: Gate) -> None:
        handle = disp.dispatch(chain([gate.job("held"), there(Job(echo)), Job(echo), Job(echo)]))
        gate.wait_begun(1)
        assert handle.trackers[2].cancel()
        wait_until(lambda: handle.trackers[3].done(), "the cascade")
        assert states(handle) == ["running", "scheduled", "cancelled", "cancelled"]
        assert not handle.done()
        gate.open()
        assert handle.wait(PATIENCE)
        assert states(handle) == ["succeeded", "succeeded", "cancelled", "cancelled"]
        assert handle.status().state == "cancelled"
        with pytest.raises(JobCancelled):
            handle.result()

    def test_cancel_ends_what_runs_and_the_rest_never_does(self, disp: Dispatcher, gate: Gate) -> None:
        handle = disp.dispatch(chain([Job(echo, 1), there(fed_gate(gate, "held")), fed_gate(gate, "never")]))
        gate.wait_begun(1)
        assert handle.cancel()
        assert handle.wait(PATIENCE)
        assert states(handle) == ["succeeded", "cancelled", "cancelled"]
        assert gate.begun == ["held"]
        assert not handle.cancel()

    def test_a_delay_counts_from_the_end_of_the_job_before(self, disp: Dispatcher) -> None:
        handle = disp.dispatch(chain([Job(instant), Job(instants).options(delay=0.15)]))
        first, second = handle.result(PATIENCE)
        assert second - first >= 0.15

    def test_a_start_deadline_counts_from_the_end_of_the_job_before(self, disp: Dispatcher) -> None:
        handle = disp.dispatch(chain([Job(nap, 0.4), Job(instants).options(start_deadline=0.3)]))
        (_, ended), began = handle.result(PATIENCE)
        assert ended <= began < ended + 0.3

    def test_own_ids_belong_to_its_jobs(self, disp: Dispatcher) -> None:
        handle = disp.dispatch(chain([Job(echo, 1).options(id="load"), Job(add, 1).options(id="save")]))
        assert handle.result(PATIENCE) == 2
        assert handle.id == ("load", "save")
        assert disp.job("save").result() == 2

    def test_what_the_caller_changes_after_the_dispatch_does_not_reach_a_later_job(
        self, own: Dispatcher, gate: Gate
    ) -> None:
        small, large = [1, 2], np.zeros(1 << 20, dtype=np.uint8)
        handle = own.dispatch(chain([gate.job("held"), Job(echo, small, large)]))
        small.append(3)
        large[:] = 1
        gate.open()
        (_, got_small, got_large), _ = handle.result(PATIENCE)
        assert got_small == [1, 2]
        assert not got_large.any()
        assert got_large.flags.writeable

    def test_large_results_and_shared_objects_travel_as_in_any_job(self, own: Dispatcher) -> None:
        shared = own.share(np.arange(1 << 18))
        handle = own.dispatch(
            chain([Job(numbers, 1 << 18), there(Job(add, shared)), Job(echo, shared, [shared])])
        )
        (doubled, again, [once_more]), _ = handle.result(PATIENCE)
        assert (doubled == 2 * np.arange(1 << 18)).all()
        assert (again == once_more).all()

    def test_what_cannot_be_sent_on_fails_the_job_that_was_to_get_it(self, disp: Dispatcher) -> None:
        handle = disp.dispatch(chain([Job(unsendable), there(Job(echo)), Job(echo)]))
        with pytest.raises(JobNotPicklable):
            handle.result(PATIENCE)
        assert states(handle) == ["succeeded", "failed", "cancelled"]

    def test_many_threads_dispatch_chains_that_cross_the_pools_both_ways(self, disp: Dispatcher) -> None:
        def run(index: int) -> list[int]:
            first, second = (HERE, THERE) if index % 2 else (THERE, HERE)
            jobs = [Job(add, 1).options(priority=(first, second)[turn % 2]) for turn in range(6)]
            begin = Job(echo, index).options(priority=second)
            return [disp.dispatch(chain([begin, *jobs])).result(PATIENCE) for _ in range(15)]

        calls = at_once(4, run)
        assert [call.value() for call in calls] == [[index + 6] * 15 for index in range(4)]

    def test_a_thousand_jobs_long(self, disp: Dispatcher) -> None:
        handle = disp.dispatch(chain([Job(echo, 0), *(Job(add, 1) for _ in range(1000))]))
        assert handle.result(PATIENCE) == 1000
        broken = disp.dispatch(chain([Job(fail), *(Job(add, 1) for _ in range(1000))]))
        assert broken.wait(PATIENCE)
        assert states(broken) == ["failed", *["cancelled"] * 1000]


def fed_gate(gate: Gate, name: str) -> Job:
    return Job(fed_pass, str(gate._folder), name)


class TestWhatCannotWork:
    @pytest.mark.parametrize("make", [group, chain])
    @pytest.mark.parametrize("jobs", [Job(echo), 5, None, "jobs", {Job(echo): 1}])
    def test_other_things_than_an_iterable_of_jobs(self, make: Any, jobs: object) -> None:
        with pytest.raises(ConfigTypeError, match="jobs must be an iterable of jobs"):
            make(jobs)

    @pytest.mark.parametrize("make", [group, chain])
    def test_something_in_it_that_is_no_job(self, make: Any) -> None:
        with pytest.raises(ConfigTypeError, match=r"jobs\[1\] of a .*write Job\(echo, ...\)"):
            make([Job(echo), echo])

    def test_a_chain_of_no_job(self) -> None:
        with pytest.raises(ConfigError, match="at least one"):
            chain([])

    def test_follow_ups_that_are_no_jobs(self) -> None:
        with pytest.raises(ConfigTypeError, match="on_success: job must be"):
            Job(echo).options(on_success=echo)
        with pytest.raises(ConfigTypeError, match="on_failure"):
            Job(echo).options(on_failure=[Job(echo)])

    @pytest.mark.parametrize("place", ["group", "later in a chain", "on_success", "on_failure"])
    @pytest.mark.parametrize(
        ("bad", "error"),
        [
            (Job(echo, threading.Lock()), JobNotPicklable),
            (Job(echo).options(priority=7), UnknownPriority),
            (Job(echo).options(id="live"), DuplicateJobId),
            (Greeting("x", timeout=-1), ConfigError),
        ],
    )
    def test_one_job_that_cannot_be_run_is_an_error_before_anything_starts(
        self, disp: Dispatcher, gate: Gate, tmp_path: Path, place: str, bad: Any, error: type[Exception]
    ) -> None:
        live = disp.dispatch(gate.job("live", id="live"))
        ran = tmp_path / "ran"
        good = Job(note, str(ran), "good").options(id="good")
        before = accepted(disp)
        whole = {
            "group": lambda: group([good, there(Job(echo)), bad, Job(echo)]),
            "later in a chain": lambda: chain([good, group([there(Job(echo)), bad])]),
            "on_success": lambda: good.options(on_success=bad),
            "on_failure": lambda: chain([good, Job(echo).options(on_failure=bad)]),
        }[place]
        for call in (disp.dispatch, disp.try_dispatch, lambda job: next(disp.dispatch_all([job]))):
            with pytest.raises(error):
                call(whole())
        assert accepted(disp) == before
        assert disp._history._reserved == {}
        gate.open()
        assert live.result(PATIENCE) == "live"
        assert disp.dispatch(Job(echo, 1).options(id="good")).result(PATIENCE) == 1
        assert lines(ran) == []

    def test_an_id_that_two_jobs_of_a_group_have(self, disp: Dispatcher) -> None:
        twin = Job(echo, 1).options(id="twin")
        with pytest.raises(DuplicateJobId):
            disp.dispatch(group([twin, twin]))
        assert disp.dispatch(twin).result(PATIENCE) == 1

    def test_handles_stay_in_the_process_that_dispatched(self, disp: Dispatcher) -> None:
        handle = disp.dispatch(group([Job(echo, 1)]))
        with pytest.raises(NestedDispatch):
            pickle.dumps(handle)

    def test_dispatch_after_finalize(self) -> None:
        disp = Dispatcher([(HERE, 1), (THERE, 1)])
        disp.finalize()
        for job in (group([]), group([Job(echo)]), chain([Job(echo), there(Job(echo))])):
            with pytest.raises(DispatcherFinalized):
                disp.dispatch(job)


class TestFollowUps:
    def test_success_is_followed_by_a_job_that_gets_the_result(
        self, disp: Dispatcher, tmp_path: Path
    ) -> None:
        ran = tmp_path / "ran"
        job = Job(echo, 20).options(on_success=there(Job(add, 1)), on_failure=Job(note_fed, str(ran)))
        tracker = disp.dispatch(job)
        assert tracker.result(PATIENCE) == 20
        assert tracker.follow_up.result(PATIENCE) == 21
        assert tracker.follow_up.priority == THERE
        assert disp.job(tracker.follow_up.id) is tracker.follow_up
        disp.barrier()
        assert lines(ran) == []

    def test_failure_is_followed_by_a_job_that_gets_the_exception(
        self, disp: Dispatcher, tmp_path: Path
    ) -> None:
        ran = tmp_path / "ran"
        job = Job(fail, "oh").options(on_failure=there(Job(describe)), on_success=Job(note_fed, str(ran)))
        tracker = disp.dispatch(job)
        with pytest.raises(ValueError, match="oh"):
            tracker.result(PATIENCE)
        assert tracker.follow_up.result(PATIENCE) == ("ValueError", "oh")
        disp.barrier(check=False)
        assert lines(ran) == []

    def test_nothing_follows_before_the_job_has_settled(self, disp: Dispatcher, gate: Gate) -> None:
        tracker = disp.dispatch(gate.job("held", on_success=Job(echo), on_failure=Job(describe)))
        gate.wait_begun(1)
        assert tracker.follow_up is None
        assert disp.jobs("scheduled") == []
        assert disp.stats()[HERE].delayed == 0
        gate.open()
        tracker.wait(PATIENCE)
        assert isinstance(tracker.follow_up.id, int)  # at once
        assert tracker.follow_up.result(PATIENCE) == "held"

    def test_a_job_without_follow_ups_has_none(self, disp: Dispatcher) -> None:
        tracker = disp.dispatch(Job(echo, 1))
        tracker.wait(PATIENCE)
        assert tracker.follow_up is None

    def test_the_follow_up_that_is_not_needed_leaves_no_trace(self, disp: Dispatcher) -> None:
        before = disp.stats(), len(disp.jobs())
        other = there(Job(describe).options(id="other"))
        disp.dispatch(Job(echo, 1).options(on_failure=other)).wait(PATIENCE)
        disp.barrier()
        after = disp.stats(), len(disp.jobs())
        assert after[0][THERE].cancelled == before[0][THERE].cancelled
        assert after[1] == before[1] + 1
        assert disp.dispatch(Job(echo, 1).options(id="other")).result(PATIENCE) == 1

    @pytest.mark.parametrize(
        ("job", "told"),
        [
            (Job(crash, None), "WorkerCrashed"),
            (Job(hang, None).options(timeout=0.1), "JobTimeout"),
            (Job(echo, 1).options(delay=0.2, start_deadline=0.05), "StartDeadlineExceeded"),
        ],
    )
    def test_every_kind_of_failure_is_followed(self, disp: Dispatcher, job: Job, told: str) -> None:
        tracker = disp.dispatch(job.options(on_failure=there(Job(describe))))
        tracker.wait(PATIENCE)
        assert tracker.follow_up.result(PATIENCE)[0] == told

    def test_failure_is_followed_when_the_retries_are_used_up(self, disp: Dispatcher, tmp_path: Path) -> None:
        attempts, ran = tmp_path / "attempts", tmp_path / "ran"
        flaky = Job(fed_and_failing_at_first, 0, str(attempts), 2)
        flaky = flaky.options(on_failure=Job(note_fed, str(ran)), on_success=Job(add, 100))
        tracker = disp.dispatch(flaky.options(retry=RetryPolicy(3, initial=0.01)))
        assert tracker.result(PATIENCE) == 3
        assert tracker.follow_up.result(PATIENCE) == 103
        attempts.unlink()
        tracker = disp.dispatch(flaky.options(retry=RetryPolicy(2, initial=0.01)))
        tracker.wait(PATIENCE)
        tracker.follow_up.wait(PATIENCE)
        assert lines(ran) == ["OSError('attempt 2 fails')"]

    def test_a_cancelled_job_is_followed_by_neither(
        self, disp: Dispatcher, gate: Gate, tmp_path: Path
    ) -> None:
        ran = tmp_path / "ran"
        follow_up = Job(note_fed, str(ran))
        running = disp.dispatch(gate.job("held", on_success=follow_up, on_failure=follow_up))
        waiting = disp.dispatch(Job(echo, 1).options(delay=60.0, on_success=follow_up, on_failure=follow_up))
        gate.wait_begun(1)
        for tracker in (running, waiting):
            assert tracker.cancel()
            assert tracker.wait(PATIENCE)
            assert tracker.follow_up is None
        disp.barrier()
        assert lines(ran) == []

    def test_a_follow_up_that_fails_is_a_failed_job_of_its_own(self, disp: Dispatcher) -> None:
        tracker = disp.dispatch(Job(echo, 1).options(on_success=Job(refuse)))
        with pytest.raises(JobsFailed) as failure:
            disp.barrier()
        assert tracker.result() == 1
        assert failure.value.job_ids == (tracker.follow_up.id,)

    def test_follow_ups_may_be_followed_and_may_be_groups_and_chains(self, disp: Dispatcher) -> None:
        last = Job(refuse).options(on_failure=Job(describe))
        job = Job(echo, 1).options(on_success=chain([Job(add, 1), group([Job(add, 1), there(last)])]))
        tracker = disp.dispatch(job)
        tracker.wait(PATIENCE)
        whole = tracker.follow_up
        assert isinstance(whole.exception(PATIENCE), JobsFailed)
        assert whole.trackers[1].trackers[0].result() == 3
        assert whole.leaves[2].follow_up.result(PATIENCE) == ("ValueError", "will not take 2")

    def test_jobs_of_chains_and_groups_may_have_follow_ups(self, disp: Dispatcher, tmp_path: Path) -> None:
        ran = tmp_path / "ran"
        noting = there(Job(note_fed, str(ran)))
        first = Job(echo, 1).options(on_success=noting, on_failure=Job(describe))
        handle = disp.dispatch(
            chain([first, Job(refuse), Job(echo).options(on_success=noting, on_failure=noting)])
        )
        with pytest.raises(ValueError, match="will not take 1"):
            handle.result(PATIENCE)
        disp.barrier(check=False)
        assert lines(ran) == ["1"]
        assert handle.leaves[0].follow_up.result() == 1
        assert handle.leaves[2].follow_up is None

    def test_an_object_that_runs_has_no_follow_ups_of_its_own(self, disp: Dispatcher) -> None:
        job = Greeting("x")
        job.on_success = job  # type: ignore[attr-defined]
        tracker = disp.dispatch(job)
        tracker.result(PATIENCE)
        assert tracker.follow_up is None
        followed = disp.dispatch(Job(Greeting("x").run).options(on_success=Job(echo)))
        followed.wait(PATIENCE)
        assert followed.follow_up.result(PATIENCE).startswith("hello")

    def test_dispatch_all_takes_them(self, disp: Dispatcher) -> None:
        jobs = [there(Job(echo, number)).options(on_success=Job(add, 100)) for number in range(10)]
        mixed = [*jobs, chain([Job(echo, 1), there(Job(add, 1))]), group([]), group([Job(echo, 3)])]
        trackers = list(disp.dispatch_all(mixed))
        disp.barrier()
        followed = [
            one.follow_up.result() for one in trackers if not isinstance(one, (ChainTracker, GroupTracker))
        ]
        assert followed == list(range(100, 110))
        composed = [one.result() for one in trackers if isinstance(one, (ChainTracker, GroupTracker))]
        assert sorted(composed, key=repr) == [2, [3], []]

    def test_an_iterator_that_is_left_early_leaves_no_promise(self, disp: Dispatcher, gate: Gate) -> None:
        held = disp.dispatch(gate.job("held", priority=THERE))
        gate.wait_begun(1)
        jobs = [Job(echo, 1), *(there(Job(echo, 2)).options(on_success=Job(echo)) for _ in range(3))]
        trackers = disp.dispatch_all(jobs)
        assert next(trackers).result(PATIENCE) == 1
        Call(next, trackers).until_waiting()
        gate.open()
        assert held.result(PATIENCE) == "held"


class TestCallbacks:
    def test_a_callback_of_the_whole_is_called_once_at_its_end(self, disp: Dispatcher, gate: Gate) -> None:
        called: list[Any] = []
        handle = disp.dispatch(chain([gate.job("a"), there(Job(echo)), group([Job(echo), there(Job(echo))])]))
        handle.add_done_callback(lambda whole: called.append((whole, whole.done(), whole.result())))
        assert called == []
        gate.open()
        wait_until(lambda: called, "the callback")
        late = threading.Event()
        handle.add_done_callback(lambda _: late.set())
        assert late.wait(PATIENCE)
        assert called == [(handle, True, ["a", "a"])]
        with pytest.raises(ConfigTypeError):
            handle.add_done_callback(5)  # type: ignore[arg-type]

    def test_a_callback_that_waits_for_the_rest_of_the_chain_gets_it(
        self, disp: Dispatcher, gate: Gate
    ) -> None:
        got: list[object] = []
        handle = disp.dispatch(chain([gate.job("a"), there(Job(echo)), Job(echo)]))
        handle.trackers[0].add_done_callback(lambda _: got.append(handle.result(PATIENCE)))
        gate.open()
        wait_until(lambda: got, "the callback")
        assert got == ["a"]

    def test_a_failing_callback_is_logged_and_the_chain_goes_on(
        self, disp: Dispatcher, gate: Gate, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(_: object) -> None:
            raise ZeroDivisionError("the callback is broken")

        handle = disp.dispatch(chain([gate.job("a"), there(Job(echo))]))
        handle.trackers[0].add_done_callback(broken)
        handle.add_done_callback(broken)
        gate.open()
        assert handle.result(PATIENCE) == "a"
        wait_until(
            lambda: caplog.text.count("ZeroDivisionError: the callback is broken") == 2, "both are logged"
        )

    def test_a_whole_can_be_awaited(self, disp: Dispatcher) -> None:
        async def run() -> list[Any]:
            good = disp.dispatch(chain([Job(nap, 0.05), there(Job(echo))]))
            bad = disp.dispatch(group([Job(fail, "oh"), Job(echo, 1)]))
            with pytest.raises(JobsFailed):
                await bad
            return [await good, await disp.dispatch(group([]))]

        (began, ended), empty = asyncio.run(run())
        assert ended > began
        assert empty == []


class TestBarrier:
    def test_waits_for_all_that_follows_what_was_dispatched(self, disp: Dispatcher, tmp_path: Path) -> None:
        ran = tmp_path / "ran"
        slow = [Job(nap, 0.02), there(Job(echo)), Job(note_fed, str(ran))]
        for turn in range(1, 9):
            disp.dispatch(chain(slow))
            disp.dispatch(there(Job(nap, 0.01)).options(on_success=Job(note_fed, str(ran))))
            report = disp.barrier(timeout=PATIENCE)
            assert len(lines(ran)) == 2 * turn
            assert report.succeeded == 5

    def test_of_one_pool_waits_for_what_will_come_from_another(self, disp: Dispatcher, gate: Gate) -> None:
        handle = disp.dispatch(chain([gate.job("held"), there(Job(echo))]))
        gate.wait_begun(1)
        barrier = Call(disp.barrier, THERE).until_waiting()
        gate.open()
        report = barrier.value()
        assert handle.done()
        assert report.pools[THERE].succeeded == 1

    def test_that_runs_out_of_time_names_what_is_pending(self, disp: Dispatcher, gate: Gate) -> None:
        handle = disp.dispatch(chain([gate.job("held"), there(Job(echo))]))
        followed = disp.dispatch(gate.job("too", on_success=there(Job(echo))))
        with pytest.raises(BarrierTimeout) as late:
            disp.barrier(timeout=0.01)
        assert set(late.value.pending) == {*handle.id, followed.id}
        with pytest.raises(BarrierTimeout, match="2 jobs have not settled") as late:
            disp.barrier(THERE, timeout=0.01)
        assert late.value.pending == (handle.id[1],)
        gate.open()
        assert disp.barrier().succeeded == 4

    def test_reports_a_failed_job_once_and_those_after_it_as_cancelled(self, disp: Dispatcher) -> None:
        handle = disp.dispatch(chain([Job(echo, 1), there(Job(refuse)), Job(echo), Job(echo)]))
        with pytest.raises(JobsFailed) as failure:
            disp.barrier()
        assert failure.value.job_ids == (handle.id[1],)
        assert disp.barrier().failed_count == 0

    def test_does_not_wait_for_chains_that_other_threads_dispatch_meanwhile(
        self, disp: Dispatcher, gate: Gate
    ) -> None:
        first = disp.dispatch(gate.job("first"))
        barrier = Call(disp.barrier).until_waiting()
        second = disp.dispatch(chain([gate.job("second"), there(Job(echo))]))
        gate.wait_begun(2)
        gate.open("first")
        assert barrier.value().succeeded == 1
        assert first.done()
        assert not second.done()
        gate.open()
        assert second.result(PATIENCE) == "second"


class TestFinalize:
    def test_lets_a_chain_and_its_follow_ups_end(self, tmp_path: Path) -> None:
        ran = tmp_path / "ran"
        noting = Job(note_fed, str(ran))
        with Dispatcher([(HERE, 1), (THERE, 1)]) as disp:
            handle = disp.dispatch(
                chain([Job(nap, 0.1), there(Job(len)), Job(add, 1).options(on_success=there(noting))])
            )
        assert handle.result(0) == 3
        assert lines(ran) == ["3"]

    def test_with_cancel_cancels_what_would_follow(self, gate: Gate, tmp_path: Path) -> None:
        ran = tmp_path / "ran"
        noting = there(Job(note_fed, str(ran)))
        disp = Dispatcher([(HERE, 1), (THERE, 1)])
        handle = disp.dispatch(
            chain([gate.job("held", on_success=noting, on_failure=noting), noting, Job(echo)])
        )
        gate.wait_begun(1)
        disp.finalize(cancel=True)
        assert states(handle) == ["cancelled"] * 3
        assert handle.leaves[0].follow_up is None
        assert lines(ran) == []

    def test_that_runs_out_of_time_cancels_what_would_follow(self, gate: Gate) -> None:
        disp = Dispatcher([(HERE, 1), (THERE, 1)])
        handle = disp.dispatch(chain([Job(echo, 1), fed_gate(gate, "held"), there(Job(echo))]))
        gate.wait_begun(1)
        disp.finalize(timeout=0.01)
        assert states(handle) == ["succeeded", "cancelled", "cancelled"]

    def test_refuses_a_chain_that_waits_for_room_as_a_whole(self, gate: Gate) -> None:
        disp = Dispatcher([(HERE, 1), (THERE, 1)])
        held = disp.dispatch(gate.job("held"))
        gate.wait_begun(1)
        waiting = Call(disp.dispatch, chain([Job(echo, 1), there(Job(echo))])).until_waiting()
        lazy = disp.dispatch_all([there(Job(echo, 1)), Job(echo, 1).options(on_success=there(Job(echo)))])
        assert next(lazy).result(PATIENCE) == 1
        lost = Call(next, lazy).until_waiting()
        ending = Call(disp.finalize).until_waiting()
        with pytest.raises(DispatcherFinalized):
            waiting.value()
        with pytest.raises(DispatcherFinalized):
            lost.value()
        gate.open()
        ending.value()
        assert held.result(0) == "held"
        assert [job.id for job in disp.jobs()] == [0, 1]

    def test_races_dispatch_and_a_chain_is_refused_or_ends_as_a_whole(self) -> None:
        for _ in range(4):
            disp = Dispatcher([Pool(HERE, 2, backlog=50), Pool(THERE, 1)])
            staffed(disp)
            handles: list[ChainTracker] = []

            def keep_on(index: int, disp: Dispatcher = disp, handles: list[Any] = handles) -> None:
                while True:
                    try:
                        handles.append(disp.dispatch(chain([Job(echo, 1), there(Job(add, 1)), Job(add, 1)])))
                    except DispatcherFinalized:
                        return

            calls = at_once(3, keep_on)
            wait_until(lambda handles=handles: len(handles) > 20, "some chains")
            disp.finalize()
            for call in calls:
                call.value()
            assert [handle.result(0) for handle in handles] == [3] * len(handles)
            assert len(disp.jobs("succeeded")) == 3 * len(handles)


class TestAcrossPools:
    def test_a_full_pool_does_not_hold_up_the_one_whose_jobs_it_is_to_follow(
        self, disp: Dispatcher, gate: Gate
    ) -> None:
        held = disp.dispatch(gate.job("held", priority=THERE))
        gate.wait_begun(1)
        handles = [disp.dispatch(chain([Job(echo, number), there(Job(add, 1))])) for number in range(20)]
        assert [handle.trackers[0].result(PATIENCE) for handle in handles] == list(range(20))
        assert [disp.dispatch(Job(echo, number)).result(PATIENCE) for number in range(20)] == list(range(20))
        assert not any(handle.done() for handle in handles)
        wait_until(lambda: disp.stats()[THERE].waiting == 20, "all are fed")
        assert held.status().state == "running"
        gate.open()
        assert [handle.result(PATIENCE) for handle in handles] == list(range(1, 21))

    def test_what_follows_starts_in_the_order_in_which_it_was_fed(
        self, disp: Dispatcher, gate: Gate, tmp_path: Path
    ) -> None:
        ran = tmp_path / "ran"
        held = disp.dispatch(gate.job("held", priority=THERE))
        gate.wait_begun(1)
        for number in range(10):
            handle = disp.dispatch(chain([Job(echo, number), there(Job(note_fed, str(ran)))]))
            wait_until(lambda handle=handle: states(handle)[1] == "queued", "it is fed")
        late = Call(disp.dispatch, there(Job(note, str(ran), "late"))).until_waiting()
        gate.open()
        held.wait(PATIENCE)
        late.value().wait(PATIENCE)
        assert lines(ran) == [*map(str, range(10)), "late"]

    def test_a_broken_pool_fails_the_job_that_was_to_run_there(self, gate: Gate) -> None:
        with Dispatcher([Pool(HERE, 1), Pool(THERE, 1)]) as disp:
            staffed(disp)
            follow_up = there(Job(describe))
            handle = disp.dispatch(
                chain([gate.job("held", on_success=there(Job(echo))), there(Job(echo)), Job(echo)])
            )
            followed = disp.dispatch_all([Job(fail).options(on_failure=follow_up)])
            gate.wait_begun(1)
            break_down(disp, THERE)
            gate.open()
            with pytest.raises(PoolBroken):
                handle.result(PATIENCE)
            assert states(handle) == ["succeeded", "failed", "cancelled"]
            with pytest.raises(PoolBroken):
                handle.leaves[0].follow_up.result(PATIENCE)
            with pytest.raises(PoolBroken):
                list(followed)
            assert disp.dispatch(Job(echo, 1)).result(PATIENCE) == 1
            disp.barrier(timeout=PATIENCE, check=False)

    def test_a_ruined_pool_fails_the_job_that_was_to_run_there(self, gate: Gate) -> None:
        with Dispatcher([Pool(HERE, 1), Pool(THERE, 1)]) as disp:
            staffed(disp)
            handle = disp.dispatch(
                chain([gate.job("held", on_success=there(Job(echo))), there(Job(echo)), Job(echo)])
            )
            gate.wait_begun(1)
            pool = disp._pools[THERE]
            with pool.lock:
                pool._acting.ruin(ZeroDivisionError("a bug"))
            gate.open()
            with pytest.raises(PoolBroken):
                handle.result(PATIENCE)
            with pytest.raises(PoolBroken):
                handle.leaves[0].follow_up.result(PATIENCE)
            assert states(handle) == ["succeeded", "failed", "cancelled"]
            disp.barrier(timeout=PATIENCE, check=False)

    def test_workers_that_die_between_two_jobs_lose_nothing(self, disp: Dispatcher) -> None:
        handles = [disp.dispatch(chain([Job(echo, 1), there(Job(add, 1)), Job(add, 1)])) for _ in range(30)]
        for pid_ in worker_pids(disp, THERE):
            os.kill(pid_, signal.SIGKILL)
        for handle in handles:
            assert handle.wait(PATIENCE)
            assert states(handle) in (["succeeded"] * 3, ["succeeded", "failed", "cancelled"])
        assert sum(handle.status().state == "failed" for handle in handles) <= 1


def break_down(disp: Dispatcher, priority: int) -> None:
    """Let a pool give up, as it does when its workers die at every start."""
    pool = disp._pools[priority]
    with pool.lock, pool._guard:
        pool._scheduler.break_down(PoolBroken("workers die at every start"))
        pool._carry_out(0.0)


def test_ctrl_c_while_a_chain_waits_for_room_leaves_nothing_of_it(disp: Dispatcher, gate: Gate) -> None:
    held = [disp.dispatch(gate.job()) for _ in range(2)]
    gate.wait_begun(2)
    before = accepted(disp)
    striker = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    striker.start()
    with pytest.raises(KeyboardInterrupt):
        disp.dispatch(chain([Job(echo, 1).options(id="one"), there(Job(echo)).options(id="two"), Job(echo)]))
    striker.join()
    assert accepted(disp) == before
    assert [pool._scheduler.promised_jobs() for pool in disp._pools.values()] == [[], []]
    assert disp._history._reserved == {}
    gate.open()
    assert all(one.result(PATIENCE) for one in held)


def test_results_are_freed_with_the_handle() -> None:
    with Dispatcher([(HERE, 1), (THERE, 1)], max_history=0) as disp:
        jobs = [Job(numbers, 10), there(Job(add, 1)).options(on_success=Job(len), on_failure=Job(describe))]
        handle = disp.dispatch(chain([Job(numbers, 10), group([Job(echo), there(Job(add, 1))])]))
        single = disp.dispatch(Job(numbers, 10).options(on_success=jobs[1]))
        listed = list(disp.dispatch_all([chain(jobs)]))
        disp.barrier()
        whole = [handle, single, single.follow_up, *listed]
        arrays = [leaf.value for one in whole for leaf in getattr(one, "leaves", (one,))]
        watched = [weakref.ref(array) for array in arrays if isinstance(array, np.ndarray)]
        assert len(watched) == 7
        gc.disable()
        try:
            del handle, single, listed, whole, arrays
            wait_until(
                lambda: not any(one() is not None for one in watched), "all are freed without the collector"
            )
        finally:
            gc.enable()


def test_chains_run_under_every_start_method(start_method: Any) -> None:
    with Dispatcher(
        [Pool(HERE, 1, start_method=start_method), Pool(THERE, 1, start_method=start_method)]
    ) as disp:
        handle = disp.dispatch(
            chain([Job(echo, 1), there(Job(add, 1)), Doubler(), group([there(Job(add, 5))])])
        )
        assert handle.result(PATIENCE) == [9]


SCRIPT = """
from bulkhead import Dispatcher, Job, chain

def double(number): return 2 * number

class Triple:
    priority = 0
    def run(self, number): return 3 * number

if __name__ == "__main__":
    with Dispatcher([(0, 1)]) as disp:
        print(disp.dispatch(chain([Job(double, 1), Job(double), Triple(), Job(lambda n, m: n + m, 1)])).result())
"""


@pytest.mark.parametrize("is_file", [True, False])
def test_what_the_main_module_defines_can_be_a_later_job(tmp_path: Path, is_file: bool) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    call = [sys.executable, str(path)] if is_file else [sys.executable, "-c", SCRIPT]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("13\n", "")


class Storm:
    """Random compositions of jobs that succeed, fail, crash and run late, of both pools."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def composition(self, depth: int = 0) -> Any:
        draw = self._random.random()
        if draw < (0.35 if depth else 0.0) or depth >= 3:
            return self._job(depth)
        parts = [self.composition(depth + 1) for _ in range(self._random.randint(0 if draw < 0.4 else 1, 3))]
        return group(parts) if draw < 0.65 or not parts else chain(parts)

    def _job(self, depth: int) -> Job:
        draw = self._random.random()
        job = Job(
            stormy, "fail" if draw < 0.08 else "crash" if draw < 0.11 else "late" if draw < 0.13 else "go on"
        )
        job = job.options(priority=self._random.choice([HERE, THERE]), timeout=0.05 if draw < 0.13 else None)
        if self._random.random() < 0.1:
            job = job.options(retry=RetryPolicy(2, initial=0.001))
        if self._random.random() < 0.1:
            job = job.options(delay=0.002)
        if depth < 5 and self._random.random() < 0.15:
            job = job.options(on_success=self.composition(depth + 2))
        if depth < 5 and self._random.random() < 0.3:
            job = job.options(on_failure=self._job(depth + 2))
        return job


def stormy(*given: str) -> str:
    fate = given[-1]
    if fate == "fail":
        raise ValueError("no luck")
    if fate == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "late":
        time.sleep(60)
    return fate


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))])
def test_in_a_storm_every_job_settles_once_and_follows_the_rules(seed: int) -> None:
    storm = Storm(seed)
    wholes = [storm.composition() for _ in range(60)]
    with Dispatcher([Pool(HERE, 3, backlog=10), Pool(THERE, 2)]) as disp:
        handles: list[Any] = []

        def dispatch(index: int) -> None:
            for whole in wholes[index::3]:
                handle = disp.dispatch(whole) if index else next(disp.dispatch_all([whole]))
                handles.append(handle)
                if len(handles) % 17 == 0:
                    handle.cancel()

        for call in at_once(3, dispatch):
            call.value(60)
        report = disp.barrier(timeout=60, check=False)
        assert all(pool._scheduler.unsettled == 0 for pool in disp._pools.values())
        assert disp._history._reserved == {}
        for handle in handles:
            check(handle)
        known = disp.jobs()
        assert len({job.id for job in known}) == len(known)
        leaves = sum(count_of(handle) for handle in handles)
        assert leaves == len(known) == report.succeeded + report.failed_count + report.cancelled


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_in_a_storm_that_is_cancelled_every_job_settles(seed: int) -> None:
    storm = Storm(seed)
    wholes = [storm.composition() for _ in range(60)]
    disp = Dispatcher([Pool(HERE, 2, backlog=10), Pool(THERE, 2)])
    handles: list[Any] = []

    def dispatch(index: int) -> None:
        try:
            for whole in wholes[index::3]:
                handles.append(disp.dispatch(whole))
        except DispatcherFinalized:
            pass

    calls = at_once(3, dispatch)
    wait_until(lambda: len(handles) > 5 + 3 * seed % 40, "some are under way")
    disp.finalize(cancel=True)
    for call in calls:
        call.value()
    for handle in handles:
        check(handle, within=5.0)
    assert all(pool._scheduler.unsettled == 0 for pool in disp._pools.values())


def check(part: Any, within: float = 0.0) -> None:
    """Prove that what became of a part is what its jobs and its form say."""
    assert part.wait(within)
    if isinstance(part, ChainTracker):
        ends = [state_of(one) for one in part.trackers]
        first = next((at for at, end in enumerate(ends) if end != "succeeded"), len(ends))
        assert all(
            end == "cancelled"
            for one, end in zip(part.trackers[first + 1 :], ends[first + 1 :], strict=True)
            if getattr(one, "leaves", (one,))
        )
        assert state_of(part) == (ends[first] if first < len(ends) else "succeeded")
    for one in getattr(part, "trackers", ()):
        check(one, within)
    if not hasattr(part, "trackers") and part.follow_up is not None:
        check(part.follow_up, within)


def state_of(part: Any) -> str:
    return part.status().state.value


def count_of(part: Any) -> int:
    """Return how many jobs there are in a part, with all that has followed them."""
    leaves = getattr(part, "leaves", (part,))
    return len(leaves) + sum(count_of(one.follow_up) for one in leaves if one.follow_up is not None)
