"""Groups, chains and schedules of durable jobs, on each backend, with two consumers for all of it."""

from __future__ import annotations

from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from durable_jobs import BEATS, add, aside, fail, give, need, nothing, told, wait_after, wait_at
from watching import wait_until

from bulkhead import DuplicateJobId, JobNotFound, JobsFailed, ResultNotFound
from bulkhead.errors import ScheduleNotFound, WaitTimeout
from bulkhead.service.status import QueuedJob

SOON = 30.0


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path)


@pytest.fixture
def held_up(served):
    """The application with its main queue paused: what is enqueued stays."""
    served.pause("default")
    yield served
    served.resume("default")


class TestGroups:
    def test_results_come_in_order_whatever_queue_they_are_of(self, served):
        group = served.enqueue_group([add.call(1, 2), aside.call("x"), add.call(5, 5), aside.call(None)])
        assert served.group_results(group, timeout=SOON) == [3, "x", 10, None]
        status = served.group_status(group)
        assert (status.state, status.counts) == ("succeeded", {"succeeded": 4})
        assert status.job_ids == tuple(f"{group}.{n}" for n in range(4))
        assert served.group_status(group) == status

    def test_before_a_worker_takes_it_all_its_jobs_are_queued(self, held_up):
        group = held_up.enqueue_group([add.call(n) for n in range(3)])
        status = held_up.group_status(group)
        assert (status.state, status.counts, status.is_settled) == ("queued", {"queued": 3}, False)
        with pytest.raises(ResultNotFound):
            held_up.group_results(group)
        with pytest.raises(WaitTimeout):
            held_up.wait_group(group, timeout=0.01)
        held_up.resume("default")
        assert held_up.group_results(group, timeout=SOON) == [0, 1, 2]

    def test_a_failed_job_fails_the_group_when_all_have_settled(self, served, gate, folder):
        group = served.enqueue_group([fail.call(), wait_at.call(f"{folder}/gate")])
        wait_until(lambda: served.group_status(group).counts == {"failed": 1, "running": 1})
        assert served.group_status(group).state == "running"
        gate.open()
        status = served.wait_group(group, timeout=SOON)
        assert (status.state, status.counts) == ("failed", {"failed": 1, "succeeded": 1})
        with pytest.raises(JobsFailed) as raised:
            served.group_results(group)
        assert (raised.value.job_ids, raised.value.total) == ((f"{group}.0",), 1)
        assert raised.value.exceptions[0].type_name == "ValueError"

    def test_cancelled_before_a_worker_takes_it_it_never_runs(self, held_up):
        group = held_up.enqueue_group([add.call(n) for n in range(3)])
        assert held_up.cancel_group(group)
        status = held_up.group_status(group)
        assert (status.state, status.counts) == ("cancelled", {"cancelled": 3})
        assert not held_up.cancel_group(group)
        held_up.resume("default")
        held_up.wait(held_up.enqueue(give.call(1)), timeout=SOON)
        assert held_up.group_status(group) == status

    def test_cancelled_what_runs_is_ended_and_what_waits_never_runs(self, served, gate, folder):
        group = served.enqueue_group([wait_at.call(f"{folder}/gate", str(n)) for n in range(7)])
        wait_until(lambda: served.group_status(group).counts.get("running") == 4)
        assert served.cancel_group(group)
        status = served.wait_group(group, timeout=SOON)
        assert (status.state, status.counts) == ("cancelled", {"cancelled": 7})
        assert {served.job(job).state for job in status.job_ids} == {"cancelled"}
        assert len(gate.begun) == 4
        with pytest.raises(JobsFailed, match=r"7 of 7 jobs of .* were cancelled"):
            served.group_results(group)

    def test_an_unknown_one_is_not_found(self, served):
        for ask in (served.group_status, served.group_results, served.cancel_group):
            with pytest.raises(JobNotFound) as raised:
                ask("nowhere")
            assert raised.value.job_id == "nowhere"

    def test_a_taken_id_enqueues_nothing(self, served):
        assert served.enqueue_group([give.call(1)], id="mine") == "mine"
        for _ in range(2):
            with pytest.raises(DuplicateJobId) as raised:
                served.enqueue_group([give.call(2), give.call(3)], id="mine")
            assert raised.value.job_ids == ("mine",)
            assert served.group_results("mine", timeout=SOON) == [1]

    def test_a_group_of_none_has_succeeded(self, served):
        group = served.enqueue_group([])
        assert served.group_results(group) == []
        wait_until(lambda: served.backend.broker.find([group]) == [None])
        assert served.group_status(group).state == "succeeded"

    def test_jobs_that_follow_those_of_a_group_run(self, served):
        group = served.enqueue_group(
            [give.call(1).options(on_success=add.call(10).options(id="after")), give.call(2)]
        )
        assert served.group_results(group, timeout=SOON) == [1, 2]
        assert served.result("after", timeout=SOON) == 11

    def test_a_job_that_is_removed_by_hand_counts_as_cancelled(self, served):
        group = served.enqueue_group([give.call(1), give.call(2)])
        served.wait_group(group, timeout=SOON)
        served.delete_result(f"{group}.1")
        assert served.group_status(group).counts == {"succeeded": 1, "cancelled": 1}

    def test_jobs_that_keep_no_result_are_kept_for_the_group(self, served):
        group = served.enqueue_group([give.call(7).options(keep_result=0)])
        assert served.group_results(group, timeout=SOON) == [7]

    def test_when_its_time_is_over_it_is_not_found(self, served):
        group = served.enqueue_group([give.call(1)], keep=1.0)
        assert served.group_results(group, timeout=SOON) == [1]
        wait_until(lambda: _is_unknown(served, group))


class TestChains:
    def test_each_is_fed_what_the_one_before_has_returned(self, served):
        chain = served.enqueue_chain([add.call(1, 2), add.call(10), aside.call(), told.call("own")])
        assert served.group_results(chain, timeout=SOON) == [3, 13, 13, [[13, "own"], True, 13]]
        status = served.group_status(chain)
        assert (status.is_chain, status.state) == (True, "succeeded")
        assert status.job_ids == tuple(f"{chain}.{n}" for n in range(4))

    def test_none_is_a_result_like_any_other(self, served):
        chain = served.enqueue_chain([nothing.call(), told.call()])
        assert served.group_results(chain, timeout=SOON) == [None, [[None], True, None]]

    def test_the_first_job_follows_none(self, served):
        chain = served.enqueue_chain([told.call("a")])
        assert served.group_results(chain, timeout=SOON) == [[["a"], False, None]]

    def test_a_failed_job_ends_it_and_the_rest_never_runs(self, served):
        chain = served.enqueue_chain([give.call(1), fail.call(), give.call(), give.call()])
        status = served.wait_group(chain, timeout=SOON)
        assert status.state == "failed"
        assert status.states == ("succeeded", "failed", "cancelled", "cancelled")
        assert served.group_status(chain) == status
        with pytest.raises(JobsFailed, match="1 of 4 jobs") as raised:
            served.group_results(chain)
        assert raised.value.job_ids == (f"{chain}.1",)

    def test_a_dead_letter_that_is_retried_and_succeeds_goes_on_with_it(self, served, tmp_path):
        flag = tmp_path / "flag"
        chain = served.enqueue_chain([give.call(4), need.call(str(flag)), add.call(1)])
        assert served.wait_group(chain, timeout=SOON).state == "failed"
        flag.touch()
        served.retry_dead(f"{chain}.1")
        wait_until(lambda: served.group_status(chain).state == "succeeded")
        assert served.group_results(chain) == [4, 4, 5]

    def test_while_one_runs_those_behind_it_are_queued(self, served, gate, folder):
        chain = served.enqueue_chain([wait_at.call(f"{folder}/gate"), give.call(), give.call()])
        wait_until(lambda: served.group_status(chain).states[0] == "running")
        status = served.group_status(chain)
        assert (status.state, status.counts) == ("running", {"running": 1, "queued": 2})
        gate.open()
        assert served.group_results(chain, timeout=SOON) == ["job", "job", "job"]

    def test_cancelled_while_one_runs_it_is_ended_and_the_rest_never_runs(self, served, gate, folder):
        chain = served.enqueue_chain([give.call(1), wait_after.call(f"{folder}/gate"), give.call()])
        gate.wait_begun(1)
        assert served.cancel_group(chain)
        status = served.group_status(chain)
        assert (status.state, status.states) == ("cancelled", ("succeeded", "cancelled", "cancelled"))

    def test_when_one_job_is_cancelled_the_chain_is(self, held_up):
        chain = held_up.enqueue_chain([aside.call(1), give.call(), give.call()])
        states = ("succeeded", "queued", "queued")
        wait_until(lambda: held_up.group_status(chain).states == states, "the first job has ended")
        wait_until(lambda: held_up.backend.broker.find([f"{chain}.1"]) != [None])
        held_up.cancel(f"{chain}.1")
        assert held_up.group_status(chain).state == "cancelled"

    def test_what_else_follows_a_job_follows_too(self, served):
        call = give.call(1).options(on_success=add.call(100).options(id="beside"))
        chain = served.enqueue_chain([call, add.call(1)])
        assert served.group_results(chain, timeout=SOON) == [1, 2]
        assert served.result("beside", timeout=SOON) == 101

    def test_a_hundred_jobs_run_in_order(self, served):
        chain = served.enqueue_chain([give.call(0), *(add.call(1) for _ in range(99))])
        assert served.group_results(chain, timeout=SOON) == list(range(100))


class TestSchedules:
    """`served` has two schedules from its start on: BEATS, each enqueued by two timers."""

    def test_no_run_is_doubled_or_missing_and_each_is_enqueued_when_it_is_due(self, served):
        for name in BEATS:
            wait_until(lambda: len(_runs(served, name)) >= 3)  # noqa: B023
            runs = _runs(served, name)
            dues = sorted(runs)
            assert [later - earlier for earlier, later in pairwise(dues)] == [1000] * (len(dues) - 1)
            assert {outcome.attempt for outcome in runs.values()} == {1}
            late = sorted(outcome.enqueued_at.timestamp() - due / 1000 for due, outcome in runs.items())
            # Why the median: the machine may be loaded, and single ones are late then.
            assert late[0] >= 0
            assert late[len(late) // 2] < 0.25

    def test_a_run_that_fails_does_not_end_it(self, served):
        wait_until(lambda: len(_runs(served, "failing beat", "failed")) >= 2)

    # Why one: it takes seconds, and on each place it is the same code.
    @pytest.mark.parametrize("place", ["sqlite"], indirect=True)
    def test_it_is_listed_paused_resumed_and_cancelled_from_anywhere(self, served):
        served.add_schedule("listed", "@every 1s", give.call("x"), missed="skip")
        served.add_schedule("daily", "30 2 * * *", aside.call(), tz="Europe/Berlin")
        wait_until(lambda: _runs(served, "listed"))
        found = {one.name: one for one in served.schedules()}
        assert [*found] == sorted(found)
        daily, listed = found["daily"], found["listed"]
        assert (daily.when, daily.tz, daily.task, daily.queue) == (
            "30 2 * * *",
            "Europe/Berlin",
            "aside",
            "side",
        )
        assert (daily.missed, daily.last_due, daily.last_job_id, daily.is_paused) == (
            "once",
            None,
            None,
            False,
        )
        assert daily.next_due.astimezone(ZoneInfo("Europe/Berlin")).strftime("%H:%M") in ("02:30", "03:00")
        assert served.result(listed.last_job_id, timeout=SOON) == "x"
        served.pause_schedule("listed")
        paused = next(one for one in served.schedules() if one.name == "listed")
        assert paused.is_paused
        beats = len(_runs(served, BEATS[0]))
        wait_until(lambda: len(_runs(served, BEATS[0])) >= beats + 2)
        assert next(one for one in served.schedules() if one.name == "listed") == paused
        served.resume_schedule("listed")
        wait_until(lambda: max(_runs(served, "listed")) > paused.next_due.timestamp() * 1000 + 1000)
        served.cancel_schedule("listed")
        served.cancel_schedule("daily")
        assert not {"listed", "daily"} & {one.name for one in served.schedules()}
        for act in (served.cancel_schedule, served.pause_schedule, served.resume_schedule):
            with pytest.raises(ScheduleNotFound):
                act("listed")


def _runs(app, schedule: str, state: str = "succeeded") -> dict[int, QueuedJob]:
    """Return the outcomes of a schedule's runs by their due time."""
    jobs = app.jobs(state, limit=10_000)
    return {int(job.id.rpartition(":")[2]): job for job in jobs if job.id.startswith(f"schedule:{schedule}:")}


def _is_unknown(app, group) -> bool:
    try:
        app.group_status(group)
    except JobNotFound:
        return True
    return False
