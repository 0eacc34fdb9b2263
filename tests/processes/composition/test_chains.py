"""Chains: each job is fed the result of the one before (A19)."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calling import Call, at_once
from composing import HERE, THERE, break_down, fed_gate, states, there
from gates import Gate
from jobs import echo, fail, instant, lines, nap, note, nothing
from linked_jobs import (
    Doubler,
    add,
    crash,
    describe,
    fed_and_failing_at_first,
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
    ChainTracker,
    Dispatcher,
    Job,
    JobCancelled,
    JobNotPicklable,
    JobsFailed,
    JobTimeout,
    Pool,
    PoolBroken,
    RetryPolicy,
    WorkerCrashed,
    chain,
    group,
)


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
