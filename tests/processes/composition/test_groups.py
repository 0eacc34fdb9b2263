"""Groups: jobs that are dispatched and awaited together (A19)."""

from __future__ import annotations

import json

import pytest
from calling import Call
from composing import THERE, accepted, states, there
from gates import Gate
from jobs import Greeting, echo, fail, pid
from watching import PATIENCE

from bulkhead import (
    Dispatcher,
    GroupTracker,
    Job,
    JobCancelled,
    JobsFailed,
    PoolFull,
    WaitTimeout,
    chain,
    group,
)


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
