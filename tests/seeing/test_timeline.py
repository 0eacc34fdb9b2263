"""The timeline: what ran where and when, as data, as a page's data and as a trace."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from gates import Gate
from jobs import Greeting, echo, fail, nap, nothing
from watching import wait_until, wait_until_whole

from bulkhead import ConfigError, Dispatcher, Job, Pool, RetryPolicy, UnknownPriority, chain
from bulkhead.instrumentation.timeline import Timeline
from bulkhead.spans import Span


def spans_of(timeline: Timeline, function: str) -> list[Span]:
    return [span for span in timeline.spans if span.function == function]


@pytest.fixture(scope="module")
def run() -> Timeline:
    """A run in which everything happens once."""
    with Dispatcher([Pool(0, 2, name="wide", backlog=None), Pool(1, 1, name="urgent")]) as disp:
        wait_until_whole(disp)
        disp.dispatch(Job(nap, 0.05).options(id="the nap"))
        disp.dispatch(Job(_die))
        disp.dispatch(Job(fail).options(retry=RetryPolicy(2, initial=0.01)))
        disp.dispatch(Job(time.sleep, 60).options(timeout=0.2))
        disp.dispatch(Greeting("you", priority=1))
        cancelled = disp.dispatch(Job(_hang).options(priority=1))
        wait_until(lambda: cancelled.status().started_at is not None, "the start")
        cancelled.cancel()
        disp.barrier(check=False)
        results = disp.map(_item, range(400), chunksize=100)
        failures = 0
        while True:
            try:
                next(results)
            except StopIteration:
                break
            except KeyError:
                failures += 1
        disp.barrier(0)
    assert failures == 1
    return disp.timeline()


def test_each_way_to_end_is_told_apart(run: Timeline) -> None:
    found = {
        name: [span.outcome for span in spans_of(run, name)] for name in ("nap", "_die", "fail", "sleep")
    }
    assert found == {
        "nap": ["succeeded"],
        "_die": ["crashed"],
        "fail": ["retried", "failed"],
        "sleep": ["timed out"],
    }
    assert [span.outcome for span in spans_of(run, "_hang")] == ["cancelled"]


def test_an_attempt_knows_its_job_its_worker_and_its_error(run: Timeline) -> None:
    [nap_span] = spans_of(run, "nap")
    assert (nap_span.job, nap_span.attempt, nap_span.pool, nap_span.error) == ("the nap", 1, 0, None)
    assert 0.05 <= nap_span.seconds == nap_span.busy_seconds
    assert nap_span.pid in {life.pid for life in run.workers if life.slot == nap_span.slot and life.pool == 0}

    first, second = spans_of(run, "fail")
    assert (first.job, first.attempt) == (second.job, second.attempt - 1)
    assert first.error == second.error == "ValueError: no luck"
    [died] = spans_of(run, "_die")
    assert died.error is not None
    assert died.error.startswith(f"WorkerCrashed: worker process {died.pid} exited with code 3")
    assert [span.function for span in run.spans if span.pool == 1] == ["Greeting", "_hang"]


def test_chunks_of_a_map_tell_how_many_items_they_had(run: Timeline) -> None:
    chunks = spans_of(run, "_item")
    assert [chunk.items for chunk in chunks] == [100] * 4
    assert sorted((chunk.outcome, chunk.failed_items) for chunk in chunks) == [
        ("failed", 1),
        ("succeeded", 0),
        ("succeeded", 0),
        ("succeeded", 0),
    ]
    assert [chunk.error for chunk in chunks if chunk.failed_items] == ["KeyError: 123"]


def test_barriers_mark_the_phases(run: Timeline) -> None:
    first, second = run.barriers
    assert (first.pool, first.succeeded, first.failed, first.cancelled) == (None, 2, 3, 1)
    assert (second.pool, second.succeeded, second.failed) == (0, 4, 0)
    assert first.began <= first.ended <= second.began <= second.ended <= run.seconds
    assert all(span.ended <= first.ended for span in run.spans if span.function != "_item")
    assert all(span.began >= first.ended for span in spans_of(run, "_item"))


def test_workers_are_told_from_their_start_to_their_end(run: Timeline) -> None:
    ends = {(life.pool, life.end.partition(":")[0], life.is_crash) for life in run.workers}
    assert ends == {
        (0, "WorkerCrashed", True),
        (0, "ended", False),  # the one whose job timed out
        (1, "ended", False),  # the one whose job was cancelled
        (0, "", False),
        (1, "", False),
    }
    for life in run.workers:
        assert life.ready is not None
        assert life.gone is not None
        assert 0 <= life.asked <= life.ready <= life.gone <= run.seconds


def test_a_slot_runs_one_attempt_at_a_time_within_the_life_of_its_worker(run: Timeline) -> None:
    lives = {(life.pool, life.worker): life for life in run.workers}
    by_slot: dict[tuple[int, int], list[Span]] = {}
    for span in run.spans:
        by_slot.setdefault((span.pool, span.slot), []).append(span)
        life = lives[span.pool, span.worker]
        assert life.ready <= span.began <= span.ended <= life.gone  # type: ignore[operator]
    assert set(by_slot) == {(0, 0), (0, 1), (1, 0)}
    for spans in by_slot.values():
        for one, other in itertools.pairwise(sorted(spans, key=lambda span: span.began)):
            assert one.ended <= other.began


def test_the_summary_adds_up(run: Timeline) -> None:
    urgent, wide = run.summary()
    assert (urgent.name, urgent.attempts, urgent.outcomes) == ("urgent", 2, {"succeeded": 1, "cancelled": 1})
    assert (wide.attempts, wide.items) == (9, 400)
    assert wide.busy_seconds == pytest.approx(sum(span.seconds for span in run.spans if span.pool == 0))
    assert 0 < wide.utilisation <= 1


def test_a_timeline_is_frozen(run: Timeline) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.seconds = 0.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.spans[0].job = 0  # type: ignore[misc]


def test_the_trace_is_in_the_trace_event_format(run: Timeline, tmp_path: Path) -> None:
    run.save_chrome_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())

    events = trace["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(run.spans)
    for event in events:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["ph"] in ("X", "M", "i")
        if event["ph"] != "M":
            assert event["ts"] >= 0
    assert all(event["dur"] >= 0 for event in spans)
    names = {(event["name"], event["args"].get("name")) for event in events if event["ph"] == "M"}
    assert {
        ("process_name", "urgent (priority 1)"),
        ("process_name", "wide (priority 0)"),
        ("thread_name", "worker slot 1"),
    } <= names
    places = {(event["pid"], event["tid"]) for event in spans}
    assert places == {(1, 1), (2, 1), (2, 2)}
    instants = [(event["name"], event["s"]) for event in events if event["ph"] == "i"]
    assert ("barrier 1", "g") in instants
    assert ("barrier 2", "p") in instants
    assert ("worker crashed", "t") in instants
    [died] = [event for event in spans if event["name"] == "_die"]
    assert died["args"]["outcome"] == "crashed"


# What runs, what waits


def test_what_runs_now_is_shown_up_to_now(gate: Gate) -> None:
    with Dispatcher([Pool(0, 1)]) as disp:
        disp.dispatch(gate.job("held"))
        gate.wait_begun(1)
        [span] = disp.timeline().spans
        assert (span.function, span.outcome) == ("pass_gate", "running")
        assert span.ended == pytest.approx(disp.timeline().seconds, abs=5)
        assert [life.gone for life in disp.timeline().workers] == [None]
        gate.open()
        disp.barrier()
        assert [span.outcome for span in disp.timeline().spans] == ["succeeded"]


def test_the_wait_for_a_worker_is_told_and_a_delay_is_no_wait() -> None:
    with Dispatcher([Pool(0, 1, backlog=None)]) as disp:
        wait_until_whole(disp)
        disp.dispatch(Job(nap, 0.2))
        disp.dispatch(Job(echo, 1))
        disp.barrier()
        disp.dispatch(Job(nothing).options(delay=0.3))
        disp.barrier()
    timeline = disp.timeline()
    [first], [second], [delayed] = (spans_of(timeline, name) for name in ("nap", "echo", "nothing"))
    assert first.waited < 0.1
    assert second.waited == pytest.approx(first.seconds, abs=0.05)
    assert delayed.waited < 0.2
    [pool] = timeline.summary()
    assert pool.waits is not None
    assert pool.waits.max == pytest.approx(second.waited)


def test_a_pause_before_the_next_attempt_is_no_wait() -> None:
    with Dispatcher([Pool(0, 1)]) as disp:
        disp.dispatch(Job(fail).options(retry=RetryPolicy(3, initial=0.2, factor=1.0, jitter=0.0)))
        disp.barrier(check=False)
    attempts = disp.timeline().spans
    assert [span.attempt for span in attempts] == [1, 2, 3]
    assert all(later.began - earlier.ended >= 0.15 for earlier, later in itertools.pairwise(attempts))
    assert all(span.waited < 0.15 for span in attempts[1:])


# What it costs, and what it keeps


def test_short_attempts_are_gathered_and_none_is_lost() -> None:
    with Dispatcher([Pool(0, 2)]) as disp:
        for _ in range(3000):
            disp.dispatch(Job(nothing))
        disp.dispatch(Job(fail))
        for _ in range(10):
            disp.dispatch(Job(pow, 2, 3))
        disp.barrier(check=False)
        during = disp.timeline()
    for timeline in (during, disp.timeline()):
        short = spans_of(timeline, "nothing")
        assert sum(span.jobs for span in short) == 3000
        assert len(short) < 1500
        assert all(span.jobs == 1 or span.seconds < 0.03 for span in short)
        assert all(span.busy_seconds <= span.seconds + 1e-6 for span in short)
        assert sum(span.jobs for span in spans_of(timeline, "pow")) == 10
        assert [span.outcome for span in spans_of(timeline, "fail")] == ["failed"]
        busy = disp.stats()[0].busy_seconds
        assert sum(span.busy_seconds for span in timeline.spans) == pytest.approx(busy, rel=0.01)


def test_links_of_a_chain_and_jobs_of_an_executor_have_their_functions_name() -> None:
    with Dispatcher([Pool(0, 1)]) as disp:
        chained = disp.dispatch(chain([Job(echo, 3), Job(pow, 2)]))
        assert chained.result() == 9
        assert disp.executor().submit(nap, 0.003).result()
    assert [span.function for span in disp.timeline().spans] == ["echo", "pow", "nap"]


def test_attempts_that_can_be_seen_are_not_gathered() -> None:
    with Dispatcher([Pool(0, 1)]) as disp:
        trackers = [disp.dispatch(Job(nap, 0.003)) for _ in range(10)]
        disp.barrier()
    spans = spans_of(disp.timeline(), "nap")
    assert [(span.job, span.jobs) for span in spans] == [(tracker.id, 1) for tracker in trackers]


def test_nothing_is_lost_of_a_worker_that_is_recycled() -> None:
    with Dispatcher([Pool(0, 1, max_jobs_per_worker=10)]) as disp:
        for _ in range(35):
            disp.dispatch(Job(nothing))
        disp.barrier()
    timeline = disp.timeline()
    assert sum(span.jobs for span in timeline.spans) == 35
    assert [life.end for life in timeline.workers] == ["recycled"] * 3 + [""]


def test_the_last_attempts_are_kept_and_it_is_told_from_when_on() -> None:
    with Dispatcher([Pool(0, 1), Pool(1, 1)], max_timeline=5) as disp:
        for number in range(12):
            disp.dispatch(Job(fail, number))
        disp.dispatch(Job(echo, 1).options(priority=1))
        disp.barrier(check=False)
    timeline = disp.timeline()
    kept = [span.job for span in timeline.spans if span.pool == 0]
    assert kept == [7, 8, 9, 10, 11]
    urgent, wide = timeline.pools
    assert urgent.since == 0.0
    assert wide.since == pytest.approx(timeline.spans[-5].ended)


def test_none_are_kept_when_none_are_wanted() -> None:
    with Dispatcher([Pool(0, 1)], max_timeline=0) as disp:
        disp.dispatch(Job(fail))
        disp.dispatch(Job(nothing))
        disp.barrier(check=False)
        assert disp.timeline().spans == ()
    assert len(disp.timeline().workers) == 1


def test_the_bound_may_be_as_large_as_one_likes() -> None:
    with Dispatcher([Pool(0, 1)], max_timeline=10**30) as disp:
        disp.dispatch(Job(nothing)).result()
        assert len(disp.timeline().spans) == 1


def test_ids_that_are_large_numbers_are_written_exactly(tmp_path: Path) -> None:
    ids = [2**53 + 1, 10**5000, -7]
    with Dispatcher([Pool(0, 1)]) as disp:
        for number in ids:
            disp.dispatch(Job(fail).options(id=number))
        disp.barrier(check=False)
    timeline = disp.timeline()
    assert [span.job for span in timeline.spans] == ids
    timeline.save_html(tmp_path / "page.html")
    timeline.save_chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [one["args"]["job"] for one in events if one["ph"] == "X"] == ["9007199254740993", "<int>", -7]


def test_neither_tracker_nor_result_nor_argument_nor_error_is_kept_alive() -> None:
    with Dispatcher([Pool(0, 1)], max_history=0) as disp:
        tracker = disp.dispatch(Job(echo, _Thing()))
        result = weakref.ref(tracker.result())
        failed = disp.dispatch(Job(_fail_with_thing))
        error = weakref.ref(failed.exception())
        trackers = weakref.ref(tracker), weakref.ref(failed)
        disp.barrier(check=False)
        del tracker, failed
        gc.collect()
        assert [span.function for span in disp.timeline().spans] == ["echo", "_fail_with_thing"]
        assert [ref() for ref in (*trackers, result, error)] == [None] * 4


def test_an_error_whose_text_breaks_is_told_by_its_type() -> None:
    with Dispatcher([Pool(0, 1)]) as disp:
        disp.dispatch(Job(_fail_unspeakably))
        disp.barrier(check=False)
        [span] = disp.timeline().spans
    assert span.error == "_Unspeakable"


@pytest.mark.parametrize(
    ("value", "message"), [(-1, "max_timeline"), (1.5, "max_timeline"), ("9", "max_timeline")]
)
def test_a_bound_that_is_none_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Dispatcher([Pool(0, 1)], max_timeline=value)


def test_a_dispatcher_that_ran_nothing_has_an_empty_timeline(tmp_path: Path) -> None:
    with Dispatcher([Pool(0, 1)]) as disp, pytest.raises(UnknownPriority):
        disp.dispatch(Job(nothing).options(priority=4))
    timeline = disp.timeline()
    assert timeline.spans == ()
    assert timeline.summary()[0].waits is None
    timeline.save_html(tmp_path / "empty.html")
    timeline.save_chrome_trace(tmp_path / "empty.json")


def test_a_name_that_would_end_the_script_does_not(tmp_path: Path) -> None:
    with Dispatcher([Pool(0, 1, name="</script><b>&")]) as disp:
        disp.dispatch(Job(nothing).options(id="</script><script>alert(1)</script>"))
        disp.barrier()
    disp.timeline().save_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("</script>") == 2


class _Thing:
    """Something that a weak reference can watch."""


class _Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class _Failure(Exception):
    """An error that a weak reference can watch."""


def _fail_with_thing() -> None:
    raise _Failure("no luck")


def _fail_unspeakably() -> None:
    raise _Unspeakable(_Thing)


def _die() -> None:
    os._exit(3)


def _hang() -> None:
    time.sleep(60)


def _item(number: int) -> int:
    if number == 123:
        raise KeyError(number)
    return number
