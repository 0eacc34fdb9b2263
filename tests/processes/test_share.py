"""Shared objects: placed once, mapped read only by every worker of every pool, freed when nobody needs them (D4)."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import multiprocessing
import operator
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import data_jobs
import numpy as np
import pytest
from calling import at_once
from data_jobs import MEGABYTE, Holder, filled, give_back, segments_of, shared_by
from faulty_jobs import fork_and_return_twice
from gates import Gate
from jobs import echo, lines, note
from scripts import running
from staffing import staffed
from watching import PATIENCE, bytes_moved, wait_until, wait_until_whole, worker_pids

from bulkhead import (
    BulkheadError,
    Dispatcher,
    Job,
    JobNotPicklable,
    NestedDispatch,
    Pool,
    RemoteError,
    RetryPolicy,
    Shared,
    WorkerCrashed,
)

LARGE = 2 * MEGABYTE


@pytest.fixture(scope="module")
def disp() -> Iterator[Dispatcher]:
    # Why: a worker keeps for half a second what the last job was given, and each test waits until it is given back.
    brief = data_jobs.keep_shared_briefly
    pools = [Pool(0, 2, initializer=brief), Pool(1, 1, backlog=5, initializer=brief)]
    with Dispatcher(pools, max_history=0) as disp:
        yield staffed(disp)


@pytest.fixture(autouse=True)
def _memory_is_freed(disp: Dispatcher) -> Iterator[None]:
    """When a test is over, nobody refers to a shared object any more."""
    yield

    def is_freed() -> bool:
        give_back(disp)
        if segments_of(os.getpid()):
            gc.collect()
        return not segments_of(os.getpid()) and not shared_by(*all_pids(disp))

    wait_until(is_freed, "everything shared is freed", within=5)


def everywhere(disp: Dispatcher) -> dict[int, int]:
    """Return the segments that the caller or a worker refers to."""
    return segments_of(os.getpid(), *all_pids(disp))


def all_pids(disp: Dispatcher) -> list[int]:
    return [pid for priority in disp.stats() for pid in worker_pids(disp, priority)]


def run(disp: Dispatcher, fn: Any, *args: Any, priority: int = 0) -> Any:
    return disp.dispatch(Job(fn, *args).options(priority=priority)).result(PATIENCE)


def inode_of(shared: Shared) -> int:
    """Return the segment of the only shared object that there is."""
    (inode,) = segments_of(os.getpid())
    return inode


# What a job gets


def test_every_worker_of_every_pool_maps_the_same_memory_and_nobody_copies(
    disp: Dispatcher, tmp_path: Path
) -> None:
    size = 24 * MEGABYTE
    shared = disp.share(filled(1, size))
    inode = inode_of(shared)
    mark, gate = tmp_path / "read", tmp_path / "gate"
    jobs = [
        disp.dispatch(Job(data_jobs.read_and_note, str(mark), str(gate), shared).options(priority=p))
        for p in (0, 0, 1)
    ]
    wait_until(lambda: len(lines(mark)) == 3)
    parts = [data_jobs.shares_of(int(pid), inode) for pid in lines(mark)]
    assert [resident for resident, _ in parts] == pytest.approx([size] * 3, rel=0.01)
    assert sum(share for _, share in parts) == pytest.approx(size, rel=0.01)  # counted once
    gate.touch()
    assert [(place.segment, place.access) for _, place in (job.result(PATIENCE) for job in jobs)] == [
        (inode, "r--p")
    ] * 3


@pytest.mark.slow
def test_a_gigabyte_that_four_workers_read_is_in_memory_once(tmp_path: Path) -> None:
    size = 1 << 30
    mark, gate = tmp_path / "read", tmp_path / "gate"
    before = data_jobs.shared_memory_bytes()
    with Dispatcher([Pool(0, 2), Pool(1, 2)]) as own:
        array = np.zeros(size, np.uint8)
        array[:: 1 << 12] = 1
        shared = own.share(array)
        del array
        jobs = [
            own.dispatch(Job(data_jobs.read_and_note, str(mark), str(gate), shared).options(priority=p))
            for p in (0, 0, 1, 1)
        ]
        wait_until(lambda: len(lines(mark)) == 4, within=60)
        parts = [data_jobs.shares_of(int(pid), inode_of(shared)) for pid in lines(mark)]
        assert [resident for resident, _ in parts] == pytest.approx([size] * 4, rel=0.01)
        assert sum(share for _, share in parts) == pytest.approx(size, rel=0.01)
        assert data_jobs.shared_memory_bytes() - before < 1.2 * size
        gate.touch()
        assert {place.segment for _, place in (job.result(PATIENCE) for job in jobs)} == {inode_of(shared)}
        del shared, jobs
        wait_until(lambda: data_jobs.shared_memory_bytes() - before < 0.2 * size)


@pytest.mark.parametrize("write", [data_jobs.write_into, data_jobs.force_write_into])
def test_a_write_into_a_shared_array_raises_and_changes_nothing(
    disp: Dispatcher, write: Callable[..., None]
) -> None:
    shared = disp.share(filled(1, LARGE))
    with pytest.raises(ValueError, match=r"read-only|WRITEABLE"):
        run(disp, write, shared)
    assert [run(disp, data_jobs.values_in, shared, priority=p) for p in (0, 1)] == [[1], [1]]
    assert np.array_equal(shared.get(), filled(1, LARGE))


def test_a_job_that_writes_into_whatever_it_has_open_changes_no_shared_object(disp: Dispatcher) -> None:
    shared = disp.share([filled(1, LARGE), {"a": 1}])
    run(disp, data_jobs.write_into_descriptors, b"x" * 100_000, shared)
    assert run(disp, data_jobs.values_and_places, shared)[0][1] == [1]
    assert run(disp, data_jobs.values_and_places, shared, priority=1)[1] == {"a": 1}


def test_handles_may_stand_anywhere_in_the_arguments_beside_other_data(disp: Dispatcher) -> None:
    large, small, plain = disp.share(filled(1, LARGE)), disp.share(filled(2, 10)), disp.share({"three": 3})
    places = {size: inode for inode, size in segments_of(os.getpid()).items()}
    found = run(
        disp,
        data_jobs.values_and_places,
        [large, {"deep": [Holder({"large": large, "small": small}), filled(4, LARGE)]}, plain, (plain, None)],
    )
    (first, ones), deep, threes, again = found
    assert ones == [1]
    assert first.segment == places[max(places)]
    held, (place, fours) = deep["deep"]
    assert held["large"] == (first, [1])
    assert (held["small"][0].access, held["small"][1]) == ("r--p", [2])
    assert (place.access, fours) == ("rw-p", [4])
    assert (threes, again) == ({"three": 3}, [{"three": 3}, None])


def test_handles_may_be_keyword_arguments_and_attributes_of_job_objects(disp: Dispatcher) -> None:
    shared = disp.share(filled(3, LARGE))
    assert disp.dispatch(Job(data_jobs.values_in, array=shared)).result(PATIENCE) == [3]
    assert disp.dispatch(Sum(shared)).result(PATIENCE) == 3 * LARGE
    assert run(disp, functools.partial(data_jobs.values_in, shared)) == [3]


class Sum:
    priority = 1

    def __init__(self, array: Any) -> None:
        self.array = array

    def run(self) -> int:
        return data_jobs.total(self.array)


def test_one_handle_twice_in_a_job_is_one_object_there(disp: Dispatcher) -> None:
    shared = disp.share([filled(1, LARGE)])
    assert run(disp, data_jobs.are_one, shared, shared)


def test_a_lambda_takes_handles_along_where_cloudpickle_is_installed(disp: Dispatcher) -> None:
    pytest.importorskip("cloudpickle")
    shared = disp.share(filled(6, LARGE))
    assert run(disp, lambda: int(shared[0]) + int(shared[-1])) == 12


def test_the_items_of_a_map_can_all_be_given_the_same_shared_object(disp: Dispatcher) -> None:
    table = disp.share(np.arange(LARGE))
    found = list(disp.map(operator.getitem, itertools.repeat(table), range(0, 5000, 5)))
    assert found == list(range(0, 5000, 5))


SHARED = {
    "nothing": None,
    "no bytes": b"",
    "an empty array": np.empty(0),
    "an empty bytearray": bytearray(),
    "arrays, the last one empty": [filled(1, 200_001), np.empty(0), filled(2, 3), np.empty((0, 3))],
    "a number": 7,
    "a dict": {"one": 1, "two": [2, 2]},
    "text": "x" * LARGE,
    "bytes": b"x" * LARGE,
    "an array in Fortran's order": np.asfortranarray(np.arange(300_000.0).reshape(500, 600)),
    "every other": np.arange(300_000)[::2],
    "objects": np.array([{"a": 1}, None] * 1000, object),
    "a function": operator.add,
    "a class": Holder,
}


def test_things_of_all_kinds_can_be_shared(disp: Dispatcher) -> None:
    for name, value in SHARED.items():
        shared = disp.share(value)
        for found in (run(disp, echo, shared), shared.get()):
            assert type(found) is type(value), name
            assert is_equal(found, value), name
        assert shared.nbytes > 0
        assert repr(shared.nbytes) in repr(shared)


def is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(np.array_equal, one, other))
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def test_what_is_no_buffer_is_rebuilt_for_each_job(disp: Dispatcher) -> None:
    words = disp.share({"one": 1})
    for _ in range(2):
        assert run(disp, data_jobs.add_to, words, priority=1) == {"one": 1, "added": 1}
    assert words.get() == {"one": 1}


def test_the_object_is_what_it_was_when_it_was_shared(disp: Dispatcher) -> None:
    array = filled(1, LARGE)
    shared = disp.share(array)
    array[:] = 2
    assert run(disp, data_jobs.values_in, shared) == [1]
    assert data_jobs.values_in(shared.get()) == [1]


def test_a_job_may_return_the_shared_object_or_a_part_of_it(disp: Dispatcher) -> None:
    shared = disp.share(np.arange(LARGE))
    found = run(disp, echo, shared)
    assert np.array_equal(found, np.arange(LARGE))
    part = run(disp, operator.getitem, shared, slice(10, 20))
    assert part.tolist() == list(range(10, 20))
    del shared
    assert np.array_equal(found, np.arange(LARGE))


def test_a_handle_costs_some_hundred_bytes_however_large_the_object_is(disp: Dispatcher) -> None:
    shared = disp.share(filled(1, 30 * MEGABYTE))
    run(disp, len, shared)
    before = bytes_moved()
    for _ in range(10):
        run(disp, len, shared)
    assert (
        bytes_moved() - before
    ) / 10 < 1500  # also what it costs to look, the answer, and what wakes a thread


def test_a_handle_works_with_every_dispatcher_also_after_the_one_that_made_it_is_finalized(
    disp: Dispatcher,
) -> None:
    with Dispatcher([Pool(0, 1)], max_history=0) as own:
        shared = own.share(filled(1, LARGE))
        assert run(own, data_jobs.values_in, shared) == [1]
        assert run(disp, data_jobs.values_in, shared) == [1]
    assert run(disp, data_jobs.values_in, shared) == [1]
    assert data_jobs.values_in(shared.get()) == [1]


# When it is freed


def test_it_is_freed_when_the_last_handle_goes(disp: Dispatcher) -> None:
    shared = disp.share(filled(1, LARGE))
    other = shared
    inode = inode_of(shared)
    assert [run(disp, data_jobs.values_in, shared, priority=p) for p in (0, 0, 1)] == [[1]] * 3
    del shared
    assert inode in everywhere(disp)
    del other
    assert inode not in segments_of(os.getpid())
    wait_until(lambda: inode not in everywhere(disp))


def test_a_handle_may_be_dropped_while_jobs_that_have_it_wait_and_run(disp: Dispatcher, gate: Gate) -> None:
    disp.dispatch(gate.job(priority=1))
    shared = disp.share(filled(1, LARGE))
    inode = inode_of(shared)
    waiting = [disp.dispatch(Job(data_jobs.values_in, shared).options(priority=1)) for _ in range(3)]
    cancelled = disp.dispatch(Job(data_jobs.values_in, shared).options(priority=1))
    del shared
    gc.collect()
    assert inode in segments_of(os.getpid())
    assert cancelled.cancel()
    gate.open()
    assert [job.result(PATIENCE) for job in waiting] == [[1]] * 3
    wait_until(lambda: inode not in everywhere(disp))


def test_a_worker_that_keeps_a_part_keeps_it_right(disp: Dispatcher) -> None:
    shared = disp.share(filled(1, LARGE))
    run(disp, data_jobs.keep_slice, shared, priority=1)
    del shared
    for number in range(5):
        run(disp, data_jobs.total, filled(number, LARGE), priority=1)
    assert run(disp, data_jobs.kept, priority=1) == [[1]]
    run(disp, data_jobs.drop_kept, priority=1)


def test_what_get_has_given_outlives_the_handle(disp: Dispatcher) -> None:
    shared = disp.share(filled(1, LARGE))
    found = shared.get()
    del shared
    gc.collect()
    assert data_jobs.values_in(found) == [1]
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 2


def test_a_worker_that_dies_takes_nothing_with_it(disp: Dispatcher, tmp_path: Path) -> None:
    shared = disp.share(filled(1, LARGE))
    for _ in range(2):
        assert type(disp.dispatch(Job(die_with, shared)).exception(PATIENCE)) is WorkerCrashed
        assert run(disp, data_jobs.values_in, shared) == [1]
    again = RetryPolicy(2, initial=0.0, jitter=0.0, retry_on=(WorkerCrashed,))
    job = Job(die_at_first, str(tmp_path / "mark"), shared).options(retry=again)
    assert disp.dispatch(job).result(PATIENCE) == [1]
    wait_until_whole(disp)


def die_with(array: np.ndarray) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_first(mark: str, array: np.ndarray) -> list[int]:
    if not lines(mark):
        note(mark, "first")
        die_with(array)
    return data_jobs.values_in(array)


def test_threads_may_share_send_and_drop_at_the_same_time(disp: Dispatcher) -> None:
    common = disp.share(filled(200, LARGE))

    def work(index: int) -> None:
        for number in range(12):
            value = 10 * index + number
            own = disp.share(filled(value, 150_000 + index))
            found = run(disp, data_jobs.totals, [own, common, filled(value, 150_000)])
            assert found == [value * (150_000 + index), 200 * LARGE, value * 150_000]

    for call in at_once(6, work):
        call.value(60)


# What is refused


def test_128_handles_go_into_a_job_and_one_more_is_refused_with_advice(disp: Dispatcher) -> None:
    shared = [disp.share(number) for number in range(129)]
    with pytest.raises(JobNotPicklable, match="128 shared objects, not 129; share them together, as a tuple"):
        disp.dispatch(Job(sum, shared))
    assert run(disp, data_jobs.call, sum, shared[:128]) == sum(range(128))
    assert run(disp, sum, disp.share(tuple(range(129)))) == sum(range(129))


def test_a_handle_inside_a_shared_object_is_refused_with_advice(disp: Dispatcher) -> None:
    inner = disp.share(filled(1, LARGE))
    for value in (inner, [inner], {"deep": Holder((1, inner))}):
        with pytest.raises(JobNotPicklable, match="it holds a Shared; pass that to the job beside it"):
            disp.share(value)


def pickled_by_a_pipe(value: Any) -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        ours.send(value)
        theirs.recv()


@pytest.mark.parametrize(
    "way",
    [
        *(functools.partial(pickle.dumps, protocol=protocol) for protocol in range(5)),
        lambda shared: pickle.loads(pickle.dumps(shared, 5)),
        copy.copy,
        copy.deepcopy,
        pickled_by_a_pipe,
    ],
)
def test_a_handle_cannot_be_pickled_or_copied_and_the_error_says_so(
    disp: Dispatcher, way: Callable[[Shared], Any]
) -> None:
    shared = disp.share(filled(1, LARGE))
    with pytest.raises(BulkheadError, match="a Shared can be sent to jobs of a Dispatcher alone"):
        way(shared)
    assert run(disp, data_jobs.values_in, shared) == [1]


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_a_handle_among_the_initializers_arguments_is_refused(disp: Dispatcher, start_method: str) -> None:
    shared = disp.share(filled(1, LARGE))
    with pytest.raises(BulkheadError, match="Shared"):
        Dispatcher(
            [Pool(0, 1, initializer=data_jobs.set_kept, initargs=(shared,), start_method=start_method)]
        )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (threading.Lock, "lock"),
        (data_jobs.refusing, "not for you"),
        (lambda: [filled(1, LARGE), data_jobs.refusing()], "not for you"),
        (data_jobs.scattered, "contiguous"),
        (lambda: (number for number in range(3)), "generator"),
    ],
    ids=["lock", "refusing", "refusing in a list", "scattered", "generator"],
)
def test_what_cannot_be_pickled_cannot_be_shared(
    disp: Dispatcher, make: Callable[[], Any], words: str
) -> None:
    with pytest.raises(JobNotPicklable, match=words):
        disp.share(make())


def test_a_lambda_can_be_shared_where_cloudpickle_is_installed_and_nowhere_else(
    disp: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cloudpickle")
    table = filled(3, LARGE)
    shared = disp.share(lambda number: int(table[number]) + number)
    assert run(disp, data_jobs.call, shared, 4) == 7
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(JobNotPicklable, match="lambda"):
        disp.share(lambda number: number)


def test_a_shared_object_that_cannot_be_rebuilt_fails_its_jobs_alone(disp: Dispatcher) -> None:
    shared = disp.share(data_jobs.Breaks())
    for _ in range(2):
        error = disp.dispatch(Job(echo, shared)).exception(PATIENCE)
        assert type(error) is RemoteError
        assert "ZeroDivisionError" in str(error)
    assert run(disp, echo, 3) == 3


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_copy_of_the_caller_can_read_what_was_shared_and_cannot_share(disp: Dispatcher) -> None:
    shared = disp.share(filled(1, LARGE))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            is_right = data_jobs.values_in(shared.get()) == [1]
            try:
                disp.share(1)
            except NestedDispatch:
                code = 0 if is_right else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert run(disp, data_jobs.values_in, shared) == [1]


def test_a_job_that_forks_and_returns_twice_does_no_harm_to_what_is_shared(disp: Dispatcher) -> None:
    shared = disp.share(filled(1, LARGE))
    assert run(disp, data_jobs.call, fork_and_return_twice) == "parent"
    assert run(disp, data_jobs.values_in, shared) == [1]


SCRIPT = """
import numpy as np
from bulkhead import Dispatcher, Job

class Config:
    def __init__(self, table):
        self.table = table

def look_up(config, number):
    return int(config.table[number])

if __name__ == "__main__":
    disp = Dispatcher([(0, 2), (1, 1)])
    config = disp.share(Config(np.arange(1_000_000)))
    print([disp.dispatch(Job(look_up, config, n).options(priority=n % 2)).result() for n in range(4)])
    held = config.get().table
"""


def test_objects_of_a_script_can_be_shared_and_its_end_says_nothing() -> None:
    with running(SCRIPT) as script:
        assert script.wait(PATIENCE) == 0, script.errors()
        assert (script.output(), script.errors()) == ("[0, 1, 2, 3]\n", "")
