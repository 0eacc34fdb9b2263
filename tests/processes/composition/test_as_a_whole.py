"""What is composed is refused, waited for, and ended as a whole."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calling import Call, at_once
from composing import HERE, THERE, accepted, fed_gate, states, there
from gates import Gate
from jobs import Greeting, echo, lines, nap, note
from linked_jobs import (
    add,
    note_fed,
    refuse,
)
from staffing import staffed
from watching import PATIENCE, wait_until

from bulkhead import (
    BarrierTimeout,
    ChainTracker,
    ConfigError,
    ConfigTypeError,
    Dispatcher,
    DispatcherFinalized,
    DuplicateJobId,
    Job,
    JobNotPicklable,
    JobsFailed,
    NestedDispatch,
    Pool,
    UnknownPriority,
    chain,
    group,
)


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
        for _ in range(3):
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


class TestDepth:
    @pytest.mark.parametrize(
        "wrap", [lambda job: group([job]), lambda job: chain([job])], ids=["group", "chain"]
    )
    def test_a_hundred_levels_run_and_can_be_looked_at(
        self, disp: Dispatcher, wrap: Callable[[Any], Any]
    ) -> None:
        handle = disp.dispatch(nested(Job(echo, 1), wrap, 100))
        found = handle.result(PATIENCE)
        while isinstance(found, list):
            (found,) = found
        assert found == 1
        assert handle.status().to_json().count("succeeded") == 101

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda job: group([job]),
            lambda job: chain([job]),
            lambda job: Job(echo).options(on_success=job),
        ],
        ids=["group", "chain", "follow-up"],
    )
    @pytest.mark.parametrize("depth", [101, 5_000])
    def test_more_are_refused_before_anything_starts(
        self, disp: Dispatcher, wrap: Callable[[Any], Any], depth: int
    ) -> None:
        before = accepted(disp)
        with pytest.raises(ConfigError, match="at most 100 deep"):
            disp.dispatch(nested(Job(echo, 1), wrap, depth))
        assert accepted(disp) == before


def nested(job: Any, wrap: Callable[[Any], Any], depth: int) -> Any:
    for _ in range(depth):
        job = wrap(job)
    return job
