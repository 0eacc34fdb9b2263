"""map, chunks that lie with a busy worker: it goes on by itself, and no promise about them is weaker for that."""

from __future__ import annotations

import functools
import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from calling import Call
from jobs import lines, note
from map_jobs import exit_at, exit_once_at, held, held_and_do, identity, outcomes
from staffing import staffed
from watching import assert_whole, wait_until, wait_until_whole, worker_pids

from bulkhead import Dispatcher, Job, JobCancelled, Pool, WorkerCrashed

PAIR, ONE = range(2)


@pytest.fixture(scope="module")
def disp() -> Iterator[Dispatcher]:
    with Dispatcher([Pool(PAIR, 2), Pool(ONE, 1)]) as disp:
        yield staffed(disp)


@pytest.fixture(autouse=True)
def _the_pools_are_whole_afterwards(disp: Dispatcher, tmp_path: Path) -> Iterator[None]:
    yield
    (tmp_path / "go").touch()
    for priority in (PAIR, ONE):
        assert_whole(disp, priority)


def begun(folder: Path) -> list[int]:
    return [int(line) for line in lines(folder / "begun")]


def go(folder: Path) -> None:
    (folder / "go").touch()


def one_lies_ahead(disp: Dispatcher, priority: int = ONE) -> bool:
    return any(slot.is_ahead_sent for slot in disp._pools[priority]._scheduler.slots)


def reading(
    disp: Dispatcher, folder: Path, items: Sequence[int], whats: Sequence[str] = (), priority: int = ONE
) -> Call:
    """Read a map in a thread, and return when its first item runs and a chunk lies behind that."""
    every = [*whats, *[""] * (len(items) - len(whats))]
    call = Call(
        outcomes,
        disp.map(held_and_do, itertools.repeat(folder), every, items, priority=priority, chunksize=1),
    )
    wait_until(lambda: begun(folder)[:1] == [items[0]] and one_lies_ahead(disp, priority))
    return call


def test_a_worker_goes_on_while_the_caller_can_do_nothing(disp: Dispatcher, tmp_path: Path) -> None:
    call = reading(disp, tmp_path, [1000, 1, 2])
    with disp._pools[ONE].lock:
        go(tmp_path)
        wait_until(lambda: begun(tmp_path) == [1000, 1])
    assert call.value() == [1000, 1, 2]
    assert begun(tmp_path) == [1000, 1, 2]


def test_an_idle_worker_gets_what_lies_behind_a_long_item(disp: Dispatcher, tmp_path: Path) -> None:
    call = Call(
        outcomes, disp.map(held, itertools.repeat(tmp_path), [1000, *range(9)], chunksize=1, priority=PAIR)
    )
    wait_until(lambda: sorted(begun(tmp_path)) == [*range(9), 1000])
    go(tmp_path)
    assert call.value() == [1000, *range(9)]
    assert len(begun(tmp_path)) == 10


@pytest.mark.parametrize("chunksize", [1, 2, 3])
@pytest.mark.parametrize("priority", [ONE, PAIR])
def test_a_worker_that_dies_harms_nothing_of_what_lies_with_it(
    disp: Dispatcher, tmp_path: Path, chunksize: int, priority: int
) -> None:
    go(tmp_path)
    whats = ["SIGKILL" if number in (3, 4, 10) else "" for number in range(20)]
    found = outcomes(
        disp.map(
            held_and_do, itertools.repeat(tmp_path), whats, range(20), priority=priority, chunksize=chunksize
        )
    )
    assert {n for n, one in enumerate(found) if type(one) is WorkerCrashed} == {3, 4, 10}
    assert [one for one in found if type(one) is int] == [n for n in range(20) if n not in (3, 4, 10)]
    assert sorted(begun(tmp_path)) == list(range(20))


def test_a_worker_killed_from_outside_harms_nothing_of_what_lies_with_it(
    disp: Dispatcher, tmp_path: Path
) -> None:
    call = reading(disp, tmp_path, [1000, 1, 2])
    [pid] = worker_pids(disp, ONE)
    os.kill(pid, signal.SIGKILL)
    found = call.value()
    assert type(found[0]) is WorkerCrashed
    assert found[1:] == [1, 2]
    assert begun(tmp_path) == [1000, 1, 2]


def test_a_worker_may_die_of_what_it_went_on_with_before_anybody_has_read_its_answer(
    disp: Dispatcher, tmp_path: Path
) -> None:
    call = reading(disp, tmp_path, [1000, 1, 2], ["", "SIGKILL"])
    [pid] = worker_pids(disp, ONE)
    with disp._pools[ONE].lock:
        go(tmp_path)
        wait_until(lambda: begun(tmp_path) == [1000, 1])
        os.kill(pid, 0)
    found = call.value()
    assert [type(one) for one in found] == [int, WorkerCrashed, int]
    assert "item 1 of a map" in str(found[1])
    assert begun(tmp_path) == [1000, 1, 2]


def test_a_map_that_is_left_begins_nothing_of_what_lies_with_its_workers(
    disp: Dispatcher, tmp_path: Path
) -> None:
    results = disp.map(held, itertools.repeat(tmp_path), [0, 1000, *range(2, 9)], chunksize=1, priority=ONE)
    assert next(results) == 0
    wait_until(lambda: begun(tmp_path) == [0, 1000] and one_lies_ahead(disp))
    results.close()
    go(tmp_path)
    wait_until_whole(disp, ONE)
    assert begun(tmp_path) == [0, 1000]


def test_a_map_that_is_left_too_late_ends_with_the_item_that_has_begun(
    disp: Dispatcher, tmp_path: Path
) -> None:
    """The worker went on by itself, and nobody knows of it yet."""
    items = [0, 1000, *range(2, 9)]
    results = disp.map(held, itertools.repeat(tmp_path), items, chunksize=1, priority=ONE)
    assert next(results) == 0
    wait_until(lambda: begun(tmp_path) == [0, 1000] and one_lies_ahead(disp))
    with disp._pools[ONE].lock:
        go(tmp_path)
        wait_until(lambda: begun(tmp_path) == [0, 1000, 2])
        results.close()
    wait_until_whole(disp, ONE)
    assert begun(tmp_path) == [0, 1000, 2]


def test_a_dispatch_waits_for_what_lay_there_before_it_and_for_nothing_that_came_later(
    disp: Dispatcher, tmp_path: Path
) -> None:
    call = reading(disp, tmp_path, [1000, *range(8)])
    single = Call(disp.dispatch, Job(note, tmp_path / "begun", 5000).options(priority=ONE))
    wait_until(lambda: any(not job.goes_ahead for job in disp._pools[ONE]._scheduler._offers))
    go(tmp_path)
    assert call.value() == [1000, *range(8)]
    single.value().result()
    assert begun(tmp_path).index(5000) <= 3  # one lay with the worker, one was offered before


def test_finalize_with_cancel_begins_nothing_of_what_lies_with_a_worker(tmp_path: Path) -> None:
    disp = staffed(Dispatcher([Pool(ONE, 1)]))
    call = reading(disp, tmp_path, [1000, 1, 2])
    disp.finalize(cancel=True)
    found = call.value()
    assert type(found[0]) is JobCancelled
    assert begun(tmp_path) == [1000]


@pytest.mark.parametrize(
    "options", [{"max_jobs_per_worker": 100}, {"capture_output": True}, {"timeout": 20.0}], ids=str
)
def test_pools_with_limits_or_captured_output_send_nothing_ahead(tmp_path: Path, options: Any) -> None:
    with Dispatcher([Pool(0, 1, **options)]) as disp:
        staffed(disp)
        call = Call(outcomes, disp.map(held, itertools.repeat(tmp_path), [0, 1000, 2], chunksize=1))
        wait_until(lambda: begun(tmp_path) == [0, 1000])
        wait_until(lambda: disp._pools[0]._scheduler._offers)
        assert not any(slot.ahead for slot in disp._pools[0]._scheduler.slots)
        go(tmp_path)
        assert call.value() == [0, 1000, 2]


def test_two_maps_of_many_small_chunks_lose_and_mix_nothing(disp: Dispatcher) -> None:
    def read(first: int) -> list[int]:
        return list(disp.map(identity, range(first, first + 3000), chunksize=1, priority=PAIR))

    calls = [Call(read, first) for first in (0, 10_000, 20_000)]
    for call, first in zip(calls, (0, 10_000, 20_000), strict=True):
        assert call.value() == list(range(first, first + 3000))


# Very short items, which are noted by the block


@pytest.mark.parametrize("places", [{15_000}, {3, 9_000, 9_001, 19_999}], ids=str)
def test_of_very_short_items_those_fail_that_kill_their_worker_and_no_others(
    disp: Dispatcher, places: set[int]
) -> None:
    found = outcomes(disp.map(functools.partial(exit_at, frozenset(places)), range(20_000), priority=PAIR))
    assert len(found) == 20_000
    assert {n for n, one in enumerate(found) if type(one) is not int} == places
    assert all(found[n] == n for n in range(20_000) if n not in places)
    for place in places:
        assert type(found[place]) is WorkerCrashed
        assert f"item {place} of a map" in str(found[place])


def test_with_a_chunksize_the_item_that_killed_its_worker_is_known_and_does_not_run_again(
    disp: Dispatcher, tmp_path: Path
) -> None:
    fn = functools.partial(exit_once_at, tmp_path, 4_000)
    found = outcomes(disp.map(fn, range(5_000), priority=PAIR, chunksize=5_000))
    assert type(found.pop(4_000)) is WorkerCrashed
    assert found == [n for n in range(5_000) if n != 4_000]
    assert begun(tmp_path) == [4_000]


def test_with_automatic_chunks_a_very_short_item_that_killed_its_worker_runs_again_once_at_most(
    disp: Dispatcher, tmp_path: Path
) -> None:
    """It is not reported when it then succeeds. How fast its neighbours were decides whether it was noted by itself."""
    fn = functools.partial(exit_once_at, tmp_path, 17_000)
    found = outcomes(disp.map(fn, range(20_000), priority=PAIR))
    assert len(begun(tmp_path)) == (1 if type(found[17_000]) is WorkerCrashed else 2)
    found[17_000] = 17_000
    assert found == list(range(20_000))
