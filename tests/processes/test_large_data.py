"""Large data goes through segments: right both ways, private, recycled, freed; else through the pipe (D3)."""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import pickle
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data_jobs
import numpy as np
import pytest
from calling import at_once
from data_jobs import MEGABYTE, filled, give_back, place_of, segments_of
from gates import Gate
from jobs import echo, lines, nap, nothing, pid
from open_segments import need_huge_pages
from scripts import running
from staffing import staffed
from watching import PATIENCE, is_alive, wait_until, wait_until_whole

from bulkhead import (
    Dispatcher,
    DispatcherFinalized,
    DuplicateJobId,
    Job,
    JobNotPicklable,
    NoSharedMemory,
    Pool,
    PoolFull,
    RemoteError,
    RetryPolicy,
    StartDeadlineExceeded,
    WorkerCrashed,
)
from bulkhead.engines.processes import parcels, segments, tidying

# Pools: one worker, so that the same process gets everything; two workers; one worker and a queue.
ONE, TWO, QUEUE = 0, 1, 2

KIB = 1 << 10
LARGE = 2 * MEGABYTE


@pytest.fixture(scope="module")
def disp() -> Iterator[Dispatcher]:
    # Why no history: it would keep results, and with them their segments.
    with Dispatcher([Pool(ONE, 1), Pool(TWO, 2), Pool(QUEUE, 1, backlog=5)], max_history=0) as disp:
        yield staffed(disp)


@pytest.fixture(autouse=True)
def _segments_come_back(disp: Dispatcher) -> Iterator[None]:
    """Every segment that a test has sent comes back, and is then given to the system."""
    yield
    wait_until(lambda: own_segments(disp) == {}, "all segments come back", within=5)


def own_segments(*disps: Dispatcher) -> dict[int, int]:
    """Return the segments that are lent, waited with or mapped here."""
    if segments_of(os.getpid()):
        give_back(*disps)
        if segments_of(os.getpid()):
            gc.collect()
            give_back(*disps)
    return segments_of(os.getpid())


def run(disp: Dispatcher, fn: Any, *args: Any, priority: int = ONE) -> Any:
    return disp.dispatch(Job(fn, *args).options(priority=priority)).result(PATIENCE)


# What comes through

ARRAYS = {
    "empty": np.empty(0),
    "empty, of two dimensions": np.empty((0, 5), np.int16),
    "one byte": np.ones(1, np.uint8),
    "a number": np.array(3.5),
    "large": np.arange(300_000.0),
    "in Fortran's order": np.asfortranarray(np.arange(300_000.0).reshape(500, 600)),
    "every other": np.arange(600_000.0)[::2],
    "backwards": np.arange(300_000.0)[::-1],
    "a part of three dimensions": np.arange(600_000.0).reshape(30, 100, 200)[3:20, ::3, 1:].T,
    "records": np.zeros(50_000, [("a", "i4"), ("b", "f8", (2,)), ("c", "S5")]),
    "objects": np.array([{"a": 1}, None, "text"] * 30_000, object),
    "text": np.array(["a", "bc"] * 60_000),
    "instants": np.arange(np.datetime64("2000-01-01", "s"), np.datetime64("2000-01-03", "s")),
    "of the other byte order": np.arange(300_000, dtype=">f8"),
    "truth": np.arange(300_000) % 3 == 0,
    "complex": np.arange(300_000) * 1j,
    "masked": np.ma.masked_array(np.arange(300_000), np.arange(300_000) % 7 == 0),
}


def test_arrays_of_all_kinds_come_through_both_ways_as_pickle_alone_would_bring_them(
    disp: Dispatcher,
) -> None:
    for name, array in ARRAYS.items():
        found = run(disp, echo, array)
        copy = pickle.loads(pickle.dumps(array, 5))
        assert (type(found), found.dtype, found.shape) == (type(copy), copy.dtype, copy.shape), name
        assert [found.flags[flag] for flag in FLAGS] == [copy.flags[flag] for flag in FLAGS], name
        assert (np.asarray(found) == np.asarray(array)).all(), name
        if isinstance(array, np.ma.MaskedArray):
            assert np.array_equal(found.mask, array.mask)


FLAGS = ["C_CONTIGUOUS", "F_CONTIGUOUS", "WRITEABLE", "ALIGNED"]


@pytest.mark.parametrize("kind", [np.uint8, bytes, bytearray, str])
def test_data_at_the_limits_between_pipe_and_segment_comes_through(disp: Dispatcher, kind: Any) -> None:
    for limit in (128 * KIB, parcels.LARGE_BODY):
        for size in (limit - 50, limit - 1, limit, limit + 1):
            if kind is np.uint8:
                sent: Any = filled(3, size)
            else:
                sent = "x" * size if kind is str else kind(b"x" * size)
            found = run(disp, echo, sent)
            assert type(found) is type(sent)
            assert np.array_equal(found, sent)


def test_read_only_arrays_stay_read_only_and_others_writable_whichever_way_they_go(disp: Dispatcher) -> None:
    for size in (10, LARGE):
        fixed = filled(1, size)
        fixed.flags.writeable = False
        there = run(disp, data_jobs.are_writable, [fixed, filled(2, size)])
        here = run(disp, echo, [fixed, filled(2, size)])
        assert there == [False, True]
        assert [one.flags.writeable for one in here] == [False, True]


@dataclass
class Survey:
    name: str
    values: np.ndarray
    parts: dict[str, list[Any]]


def test_arrays_large_and_small_come_through_wherever_they_stand(disp: Dispatcher) -> None:
    sent = Survey(
        "all",
        filled(1, LARGE),
        {
            "small": [filled(2, 10), filled(3, 0)],
            "mixed": [filled(4, MEGABYTE), bytearray(b"5" * MEGABYTE), b"6" * MEGABYTE, "7" * MEGABYTE],
            "odd": [filled(8, 200_001), np.empty(0)],
        },
    )
    found = run(disp, echo, sent)
    assert type(found) is Survey
    assert np.array_equal(found.values, sent.values)
    for key, parts in sent.parts.items():
        assert list(map(type, found.parts[key])) == list(map(type, parts))
        assert all(map(np.array_equal, found.parts[key], parts))
    assert found.parts["mixed"][1:] == sent.parts["mixed"][1:]


def test_an_array_that_is_passed_twice_is_one_array_in_the_job(disp: Dispatcher) -> None:
    array = filled(1, LARGE)
    assert run(disp, data_jobs.are_one, array, array)
    first, second = run(disp, echo, array, [array])[0]
    assert first is second[0]


def test_data_that_the_function_itself_carries_goes_through_a_segment(disp: Dispatcher) -> None:
    assert run(disp, functools.partial(data_jobs.where, filled(1, LARGE))).access == "rw-p"
    assert run(disp, data_jobs.Holder(filled(1, LARGE)).place).access == "rw-p"
    assert run(disp, data_jobs.Holder(filled(1, LARGE)).values, 3) == [4]


def test_an_array_in_an_exception_comes_back(disp: Dispatcher) -> None:
    error = disp.dispatch(Job(data_jobs.fail_with_array, 4, LARGE)).exception(PATIENCE)
    assert type(error) is ValueError
    assert error.args[0] == "see the array"
    assert np.array_equal(error.args[1], filled(4, LARGE))


def test_a_pickle_buffer_comes_through_and_one_whose_bytes_lie_apart_is_refused(disp: Dispatcher) -> None:
    for size in (10, LARGE):
        assert run(disp, data_jobs.total_of_buffer, pickle.PickleBuffer(b"\x02" * size)) == 2 * size
    apart = pickle.PickleBuffer(filled(0, LARGE)[::2])
    with pytest.raises(JobNotPicklable, match="contiguous"):
        disp.dispatch(Job(echo, filled(1, LARGE), apart))
    with pytest.raises(RemoteError, match="contiguous"):
        run(disp, data_jobs.scattered)


def test_an_array_that_refuses_to_be_pickled_fails_alone_and_leaves_nothing(disp: Dispatcher) -> None:
    with pytest.raises(JobNotPicklable, match="not for you"):
        disp.dispatch(Job(echo, filled(1, LARGE), data_jobs.refusing()))
    with pytest.raises(RemoteError, match="not for you"):
        run(disp, data_jobs.refusing)
    gc.collect()
    give_back(disp)
    assert segments_of(os.getpid()) == {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of their own, when they are imported
def test_a_data_frame_comes_through_mapped_and_can_be_shared(disp: Dispatcher) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"a": np.arange(200_000), "b": np.linspace(0, 1, 200_000), "c": ["x", "yy"] * 100_000}
    )
    pandas.testing.assert_frame_equal(run(disp, echo, frame), frame)
    assert run(disp, data_jobs.place_of_column, frame, "b").access == "rw-p"
    shared = disp.share(frame)
    assert run(disp, data_jobs.place_of_column, shared, "b").access == "r--p"
    assert run(disp, data_jobs.sum_of_column, [shared], "a") == frame["a"].sum()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_arrow_table_comes_through_mapped_and_can_be_shared(disp: Dispatcher) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"a": np.arange(200_000), "b": ["x", "yy"] * 100_000})
    assert run(disp, echo, table).equals(table)
    assert run(disp, data_jobs.place_of_chunk, table) is not None
    assert run(disp, data_jobs.place_of_chunk, disp.share(table)).access == "r--p"


def test_items_and_results_of_a_map_come_through(disp: Dispatcher) -> None:
    items = [filled(number, 200_000 + number) for number in range(60)]
    found = list(disp.map(data_jobs.raised_by_one, items, priority=TWO))
    assert all(np.array_equal(one, item + 1) for one, item in zip(found, items, strict=True))


def test_large_data_comes_through_under_every_start_method(start_method: str) -> None:
    with Dispatcher([Pool(0, 1, start_method=start_method)], max_history=0) as own:
        places = set()
        for number in range(3):
            found = run(own, echo, filled(number, LARGE))
            assert np.array_equal(found, filled(number, LARGE))
            places.add(run(own, data_jobs.where, filled(number, LARGE)))
            del found
        assert {place.access for place in places} == {"rw-p"}
        shared = own.share(filled(7, LARGE))
        assert run(own, data_jobs.values_in, shared) == [7]
        assert run(own, data_jobs.where, shared).access == "r--p"


# No copy but the one that is sent


def test_a_job_gets_a_private_writable_view_and_no_copy_is_made_there(disp: Dispatcher) -> None:
    array = filled(1, 40 * MEGABYTE)
    run(disp, data_jobs.measured, filled(1, MEGABYTE))
    place, is_writable, read, written = run(disp, data_jobs.measured, array)
    assert place is not None
    assert place.access == "rw-p"
    assert is_writable
    assert read < 2 * MEGABYTE
    assert written < 3 * MEGABYTE  # of the pages, that which was written to
    assert array[0] == 1


def test_a_large_array_is_entered_in_huge_pages_in_the_job_and_in_the_caller(disp: Dispatcher) -> None:
    need_huge_pages()
    size = 40 * MEGABYTE  # 640 faults if each brings 16 small pages
    for _ in range(2):  # into fresh pages and into used ones
        assert run(disp, data_jobs.faults_in_reading, filled(1, size)) < 60
        assert data_jobs.faults_in_reading(run(disp, filled, 2, size)) < 60


def test_the_caller_makes_one_copy_into_the_segment_and_none_of_a_result(disp: Dispatcher) -> None:
    array = filled(1, 40 * MEGABYTE)
    before = data_jobs.anonymous_bytes()
    tracker = disp.dispatch(Job(data_jobs.total, array))
    (sent,) = segments_of(os.getpid()).values()
    assert tracker.result(PATIENCE) == 40 * MEGABYTE
    found = run(disp, filled, 2, 40 * MEGABYTE)
    assert data_jobs.total(found) == 80 * MEGABYTE
    assert data_jobs.anonymous_bytes() - before < 8 * MEGABYTE
    assert sent == 40 * MEGABYTE
    place = place_of(found)
    assert place is not None
    assert place.access == "rw-p"


def test_writes_of_a_job_are_nobody_elses(disp: Dispatcher) -> None:
    array = filled(1, LARGE)
    for _ in range(3):
        assert run(disp, data_jobs.raise_by_one, array) == [2]
    assert np.array_equal(array, filled(1, LARGE))


@pytest.mark.parametrize("size", [LARGE // 2, LARGE, 10 * MEGABYTE + 5])
def test_what_a_job_has_written_is_not_there_for_the_next_one_in_the_same_segment(
    disp: Dispatcher, size: int
) -> None:
    places = set()
    for number in range(10):
        found, place = run(disp, data_jobs.overwrite, filled(number, size))
        assert found == [number]
        places.add(place.segment)
    assert len(places) == 1


def test_writes_into_a_result_are_nobody_elses(disp: Dispatcher) -> None:
    for number in range(1, 4):
        found = run(disp, filled, number, LARGE)
        assert np.array_equal(found, filled(number, LARGE))
        found[:] = 99
    assert run(disp, echo, [found, found])[0][0] == 99


def test_what_the_caller_does_to_an_array_after_dispatch_does_not_reach_the_job(
    disp: Dispatcher, gate: Gate
) -> None:
    disp.dispatch(gate.job(priority=QUEUE))
    array = filled(1, LARGE)
    waiting = disp.dispatch(Job(data_jobs.values_in, array).options(priority=QUEUE))
    array[:] = 2
    gate.open()
    assert waiting.result(PATIENCE) == [1]


# Recycling


def test_arrays_of_jobs_and_results_use_the_same_segments_again_and_again(disp: Dispatcher) -> None:
    there, here = set(), set()
    for number in range(30):
        there.add(run(disp, data_jobs.where, filled(number, LARGE)).segment)
        found = run(disp, filled, number, LARGE - number)
        here.add(place_of(found).segment)
        assert np.array_equal(found, filled(number, LARGE - number))
    assert len(there) == 1
    assert len(here) <= 2  # the last one is still referred to when the next is made


def test_a_job_that_keeps_its_array_makes_that_segment_unusable_and_nothing_wrong(disp: Dispatcher) -> None:
    kept = run(disp, data_jobs.keep, filled(1, LARGE))
    others = {run(disp, data_jobs.where, filled(2 + number, LARGE)).segment for number in range(50)}
    assert len(others) == 1
    assert kept.segment not in others
    assert run(disp, data_jobs.kept) == [[1]]
    run(disp, data_jobs.drop_kept)
    # Both are free now.
    again = {run(disp, data_jobs.where, filled(0, LARGE)).segment for _ in range(2)}
    assert again <= others | {kept.segment}


def test_a_job_that_keeps_a_slice_keeps_its_data(disp: Dispatcher) -> None:
    run(disp, data_jobs.keep_slice, filled(1, LARGE))
    for number in range(10):
        run(disp, nothing if number % 2 else data_jobs.where, *([] if number % 2 else [filled(2, LARGE)]))
    assert run(disp, data_jobs.kept) == [[1]]
    run(disp, data_jobs.drop_kept)


def test_arrays_that_jobs_keep_in_cycles_come_back_when_they_are_found(disp: Dispatcher) -> None:
    for number in range(5):
        assert run(disp, data_jobs.make_cycle, filled(number, LARGE)) == [number]
    run(disp, data_jobs.collect)
    wait_until(lambda: own_segments(disp) == {})


def test_memory_stays_flat_over_many_large_jobs(disp: Dispatcher) -> None:
    size = 3 * MEGABYTE

    def rounds(n: int) -> tuple[int, int]:
        for number in range(n):
            found = run(disp, data_jobs.raised_by_one, filled(number % 200, size), priority=TWO)
            assert found[-1] == number % 200 + 1
        del found
        return data_jobs.resident_bytes(), sum(memory_of(disp, TWO).values())

    first = rounds(30)
    last = rounds(170)
    assert last[0] - first[0] < 2 * size
    assert last[1] - first[1] < 2 * size
    assert last[1] < 10 * size


def memory_of(disp: Dispatcher, priority: int) -> dict[int, int]:
    """Return the segments of the caller and the workers of a pool."""
    return segments_of(os.getpid(), *(one.pid for one in disp.stats()[priority].processes if one.pid))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_segments_that_nobody_needs_go_back_to_the_system_while_the_pool_is_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Why fork: the worker inherits how long they are kept.
    monkeypatch.setattr(segments, "_KEEP_FOR", 0.2)
    monkeypatch.setattr(tidying, "_TIDY", 0.1)
    with Dispatcher([Pool(0, 1, start_method="fork")], max_history=0) as own:
        worker = run(own, pid)
        assert run(own, data_jobs.total, filled(1, LARGE)) == LARGE
        assert len(segments_of(os.getpid())) == 1
        wait_until(lambda: not segments_of(os.getpid()), "that of the job goes", within=5)
        found = run(own, filled, 1, LARGE)
        assert len(segments_of(worker)) == 1
        time.sleep(0.35)  # for nothing to happen: the result is still here
        assert np.array_equal(found, filled(1, LARGE))
        assert len(segments_of(worker)) == 1
        del found
        wait_until(lambda: not segments_of(worker), "that of the result goes", within=5)
        # One that comes free while nobody is at work, through the garbage collector.
        held = own.dispatch(Job(nap, 0.5))
        with pytest.raises(PoolFull) as caught:
            own.dispatch(Job(data_jobs.total, filled(1, LARGE)), timeout=0)
        held.result(PATIENCE)
        del caught
        gc.collect()
        wait_until(lambda: not segments_of(os.getpid()), "that of the refused job goes", within=5)
        assert run(own, pid) == worker


# Results that are kept

KEEPS_MANY = """
import resource
import data_jobs
from bulkhead import Dispatcher, Job

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    disp = Dispatcher([(0, 1), (1, 1)])
    kept = []
    for number in range(300):
        tracker = disp.dispatch(Job(data_jobs.filled, number % 250, 150_000).options(priority=number % 2))
        kept.append(tracker.result())
        assert data_jobs.total(kept[-1]) == number % 250 * 150_000
    room = data_jobs.hoard_descriptors()
    data_jobs.close_hoard()
    for number in range(20):
        disp.dispatch(Job(data_jobs.total, data_jobs.filled(1, 300_000))).result()
    assert all((one == number % 250).all() for number, one in enumerate(kept))
    shared = disp.share(data_jobs.filled(1, 300_000))
    held = shared.get()
    disp.dispatch(Job(data_jobs.keep, shared)).result()
    print("room for", room)
    # Everything is still referred to when the interpreter ends.
"""


def test_300_kept_results_all_stay_right_and_leave_descriptors_for_the_script() -> None:
    with running(KEEPS_MANY) as script:
        assert script.wait(60) == 0, script.errors()
        assert int(script.output().split()[-1]) > 50
        assert script.errors() == ""


def test_results_stay_right_when_their_worker_has_died_and_when_the_dispatcher_is_gone() -> None:
    with Dispatcher([Pool(0, 1)]) as own:
        found = [run(own, data_jobs.filled_here, number, LARGE) for number in range(4)]
        os.kill(found[0][0], signal.SIGKILL)
        wait_until(lambda: not is_alive(found[0][0]))
        wait_until_whole(own)
        for number in range(50):
            found[2:3] = [run(own, data_jobs.filled_here, number, LARGE)]
        assert found[2][0] != found[0][0]
        assert [data_jobs.values_in(array) for _, array in found] == [[0], [1], [49], [3]]
    assert [data_jobs.values_in(array) for _, array in found] == [[0], [1], [49], [3]]
    found[0][1][:] = 9
    del own
    gc.collect()
    assert [data_jobs.values_in(array) for _, array in found] == [[9], [1], [49], [3]]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_that_the_caller_forks_keeps_its_copy_of_a_result(disp: Dispatcher, tmp_path: Path) -> None:
    found = run(disp, filled, 1, LARGE)
    seen, go_on = tmp_path / "seen", tmp_path / "go on"
    child = multiprocessing.get_context("fork").Process(
        target=data_jobs.note_values, args=(found, go_on, seen)
    )
    child.start()
    inode = place_of(found).segment
    found[:100] = 5  # the child does not see this
    del found
    child._args = ()
    for number in range(50):
        other = run(disp, filled, number + 100, LARGE)
        assert np.array_equal(other, filled(number + 100, LARGE))
        assert place_of(other).segment != inode
    go_on.touch()
    child.join(PATIENCE)
    assert (child.exitcode, lines(seen)) == (0, ["[1]"])
    child.close()


def test_a_child_that_a_job_forks_goes_on_using_the_jobs_array(tmp_path: Path) -> None:
    seen, go_on = tmp_path / "seen", tmp_path / "go on"
    with Dispatcher([Pool(0, 1)], max_history=0) as own:
        for _ in range(3):
            run(own, data_jobs.total, filled(9, LARGE))
        run(own, data_jobs.fork_and_leave_reader, filled(1, LARGE), str(go_on), str(seen))
        for number in range(50):
            run(own, data_jobs.total, filled(number + 2, LARGE))
        go_on.touch()
        wait_until(lambda: lines(seen), "the child has looked")
        assert lines(seen) == ["[1]"]


def test_a_forked_copy_of_a_worker_that_returns_too_changes_no_result(tmp_path: Path) -> None:
    go_on = tmp_path / "go on"
    with Dispatcher([Pool(0, 1)], max_history=0) as own:
        run(own, filled, 9, LARGE)
        run(own, nothing)  # tells the worker that it can use that segment again
        child, found = run(own, data_jobs.fork_and_return_twice, str(go_on), LARGE)
        assert data_jobs.values_in(found) == [1]
        go_on.touch()
        wait_until(lambda: not is_alive(child), "the copy is gone")
        assert data_jobs.values_in(found) == [1]
        assert run(own, echo, 3) == 3


# Jobs that are run again


@pytest.mark.parametrize("attempt", [data_jobs.write_and_fail_at_first, data_jobs.write_and_die_at_first])
def test_a_job_that_is_run_again_gets_its_data_as_it_was(
    disp: Dispatcher, tmp_path: Path, attempt: Any
) -> None:
    marks = tmp_path / "marks"
    policy = RetryPolicy(2, initial=0.0, jitter=0.0, retry_on=(OSError, WorkerCrashed))
    array = filled(1, LARGE)
    again, values = disp.dispatch(Job(attempt, str(marks), array).options(retry=policy)).result(PATIENCE)
    assert values == [1]
    assert (str(again) in lines(marks)) == (attempt is data_jobs.write_and_fail_at_first)
    assert np.array_equal(array, filled(1, LARGE))


# However a job ends, its segment comes back (the fixture above looks)


def test_a_job_that_finds_no_room_leaves_nothing(disp: Dispatcher, gate: Gate) -> None:
    disp.dispatch(gate.job())
    job = Job(data_jobs.total, filled(1, LARGE))
    assert disp.try_dispatch(job) is None
    with pytest.raises(PoolFull):
        disp.dispatch(job, timeout=0.01)
    assert own_segments(disp) == {}
    gate.open()
    assert disp.dispatch(job).result(PATIENCE) == LARGE


def test_a_job_that_is_cancelled_or_late_while_it_waits_leaves_nothing(disp: Dispatcher, gate: Gate) -> None:
    running_job = disp.dispatch(gate.job(priority=QUEUE))
    job = Job(data_jobs.total, filled(1, LARGE))
    waiting = disp.dispatch(job.options(priority=QUEUE))
    delayed = disp.dispatch(job.options(priority=QUEUE, delay=60))
    late = disp.dispatch(job.options(priority=QUEUE, start_deadline=0.01))
    assert type(late.exception(PATIENCE)) is StartDeadlineExceeded
    assert waiting.cancel()
    assert delayed.cancel()
    assert own_segments(disp) == {}
    gate.open()
    running_job.result(PATIENCE)


def test_a_job_that_is_ended_while_it_runs_leaves_nothing(disp: Dispatcher, tmp_path: Path) -> None:
    hang = Job(data_jobs.note_and_wait_with, str(tmp_path / "begun"), filled(1, LARGE))
    late = disp.dispatch(hang.options(priority=TWO, timeout=0.5))
    cancelled = disp.dispatch(hang.options(priority=TWO))
    wait_until(lambda: len(lines(tmp_path / "begun")) == 2)
    assert cancelled.cancel()
    late.wait(PATIENCE)
    assert own_segments(disp) == {}
    wait_until_whole(disp, TWO)


def test_a_job_that_is_refused_leaves_nothing(disp: Dispatcher, gate: Gate) -> None:
    holder = disp.dispatch(gate.job(priority=QUEUE, id="mine"))
    job = Job(data_jobs.total, filled(1, LARGE)).options(priority=QUEUE, id="mine")
    with pytest.raises(DuplicateJobId):
        disp.dispatch(job)
    own = Dispatcher([Pool(0, 1)])
    own.finalize()
    with pytest.raises(DispatcherFinalized):
        own.dispatch(Job(data_jobs.total, filled(1, LARGE)))
    assert own_segments(disp) == {}
    gate.open()
    holder.result(PATIENCE)


def test_a_dispatcher_that_is_finalized_at_once_frees_what_waits(gate: Gate) -> None:
    own = Dispatcher([Pool(0, 1, backlog=3)])
    own.dispatch(gate.job())
    waiting = [own.dispatch(Job(data_jobs.total, filled(1, LARGE))) for _ in range(3)]
    own.finalize(cancel=True)
    assert [one.status().state for one in waiting] == ["cancelled"] * 3
    assert segments_of(os.getpid()) == {}


# When the system has nothing left


@contextlib.contextmanager
def limited(which: int, limit: int) -> Iterator[None]:
    """Let this process, and those it starts, have no more of something."""
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


def test_where_no_segment_can_be_made_the_pipe_serves_both_ways_and_share_raises() -> None:
    with limited(resource.RLIMIT_FSIZE, 4 * MEGABYTE), Dispatcher([Pool(0, 1)], max_history=0) as own:
        for size in (MEGABYTE, 20 * MEGABYTE, MEGABYTE):
            place = run(own, data_jobs.where, filled(3, size))
            found = run(own, data_jobs.raised_by_one, filled(3, size))
            assert np.array_equal(found, filled(4, size))
            assert found.flags.writeable
            assert (place is None) == (place_of(found) is None) == (size > 4 * MEGABYTE)
        with pytest.raises(NoSharedMemory):
            own.share(filled(3, 20 * MEGABYTE))
        shared = own.share(filled(3, MEGABYTE))
        assert run(own, data_jobs.totals, [shared, filled(3, 5 * MEGABYTE)]) == [3 * MEGABYTE, 15 * MEGABYTE]
        del shared, found
        gc.collect()
        give_back(own)
        assert segments_of(os.getpid()) == {}


@contextlib.contextmanager
def no_more_descriptors() -> Iterator[None]:
    """Let this process open nothing more."""
    with limited(resource.RLIMIT_NOFILE, max(map(int, os.listdir("/proc/self/fd"))) + 2):
        try:
            data_jobs.hoard_descriptors()
            yield
        finally:
            data_jobs.close_hoard()


def test_a_caller_without_descriptors_sends_through_the_pipe_and_goes_on(disp: Dispatcher) -> None:
    array = filled(3, LARGE)
    worker = run(disp, pid)
    for _ in range(2):
        with no_more_descriptors():
            sent = disp.dispatch(Job(data_jobs.where_and_total, array))
            place, total = sent.result(PATIENCE)
            with pytest.raises(NoSharedMemory):
                disp.share(array)
            error = disp.dispatch(Job(filled, 4, LARGE)).exception(PATIENCE)
            small = run(disp, echo, 3)
        assert (place, total, small) == (None, 3 * LARGE, 3)
        assert type(error) is RemoteError
        assert "no file descriptor is left" in str(error)
        assert run(disp, data_jobs.where, array) is not None
        assert np.array_equal(run(disp, filled, 4, LARGE), filled(4, LARGE))
        give_back(disp)
    assert run(disp, pid) == worker


LITTLE_ADDRESS_SPACE = """
import resource, psutil
import data_jobs
from bulkhead import Dispatcher, Job, JobNotPicklable, Pool, RemoteError
from watching import wait_until_whole

if __name__ == "__main__":
    with Dispatcher([Pool(0, 1)], max_history=0) as disp:
        wait_until_whole(disp)
        def run(fn, *args):
            return disp.dispatch(Job(fn, *args)).result()

        array = data_jobs.filled(3, 60 << 20)
        run(data_jobs.total, array[:1000])
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + (170 << 20), resource.RLIM_INFINITY))
        for _ in range(5):
            print(run(data_jobs.total, array) == 3 * array.size, end=" ")
        found = run(data_jobs.filled, 4, 50 << 20)
        try:
            run(data_jobs.filled, 4, 120 << 20)
        except RemoteError as error:
            print("MemoryError" in str(error) or "memory" in str(error), end=" ")
        print((found == 4).all(), run(abs, -3), disp.stats()[0].restarts)
"""


def test_a_result_that_does_not_fit_into_the_callers_address_space_fails_alone() -> None:
    with running(LITTLE_ADDRESS_SPACE) as script:
        assert script.wait(60) == 0, script.errors()
        assert script.output() == "True True True True True True True 3 0\n"
        assert script.errors() == ""


def test_a_worker_without_descriptors_answers_through_the_pipe_and_goes_on() -> None:
    pool = Pool(0, 1, initializer=resource.setrlimit, initargs=(resource.RLIMIT_NOFILE, (64, 64)))
    with Dispatcher([pool], max_history=0) as own:
        worker = run(own, pid)
        for _ in range(2):
            found = run(own, data_jobs.hoard_descriptors_and_return, 4, LARGE)
            assert np.array_equal(found, filled(4, LARGE))
            assert place_of(found) is None
            tracker = own.dispatch(Job(data_jobs.total, filled(1, LARGE)))
            error = tracker.exception(PATIENCE)
            assert type(error) is RemoteError
            assert "no file descriptor is left" in str(error)
            run(own, data_jobs.close_hoard)
            assert own_segments(own) == {}
            assert run(own, data_jobs.total, filled(1, LARGE)) == LARGE
            found = run(own, filled, 5, LARGE)
            assert np.array_equal(found, filled(5, LARGE))
            assert place_of(found) is not None
        assert run(own, pid) == worker


# Several threads


def test_threads_that_send_large_data_and_others_that_send_small_do_not_mix_it_up(disp: Dispatcher) -> None:
    def work(index: int) -> None:
        for number in range(25 if index < 3 else 60):
            value = (7 * index + number) % 200
            if index < 3:
                sent = filled(value, MEGABYTE + index)
                found = run(disp, data_jobs.raised_by_one, sent, priority=TWO)
                assert np.array_equal(found, filled(value + 1, MEGABYTE + index))
            else:
                assert run(disp, echo, value, priority=TWO) == value

    for call in at_once(11, work):
        call.value(60)
