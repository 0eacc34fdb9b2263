"""Follow-up jobs and callbacks (A20)."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from calling import Call
from composing import HERE, THERE, there
from gates import Gate
from jobs import Greeting, echo, fail, lines, nap
from linked_jobs import (
    add,
    crash,
    describe,
    fed_and_failing_at_first,
    hang,
    note_fed,
    refuse,
)
from watching import PATIENCE, wait_until

from bulkhead import (
    ChainTracker,
    ConfigTypeError,
    Dispatcher,
    GroupTracker,
    Job,
    JobsFailed,
    RetryPolicy,
    chain,
    group,
)


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
        waiting = Call(next, trackers).until_waiting()
        gate.open()
        assert held.result(PATIENCE) == "held"
        assert (
            waiting.value().result(PATIENCE) == 2
        )  # and the other two, if they were not accepted yet, never are


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
