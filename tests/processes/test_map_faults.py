"""map under fire (D2): each item has its own end, whatever happens to its chunk, its worker, its pool or its reader."""

from __future__ import annotations

import _thread
import contextlib
import gc
import itertools
import os
import random
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import faulty_jobs
import pytest
from calling import Call
from jobs import lines
from map_jobs import (
    BreaksElsewhere,
    HangsElsewhere,
    Unpicklable,
    die_after_the_answer,
    do,
    fail_at_first,
    held,
    held_from_1000,
    identity,
    note_and_do,
    noted,
    outcomes,
    square,
    where,
)
from scripts import running
from staffing import staffed
from watching import assert_whole, launcher_pid, wait_until, wait_until_whole, worker_pids

from bulkhead import (
    Dispatcher,
    DispatcherFinalized,
    JobCancelled,
    JobNotPicklable,
    JobTimeout,
    Pool,
    PoolBroken,
    RemoteError,
    RetryPolicy,
    Unrecoverable,
    WorkerCrashed,
)

# Of the module's dispatcher: two workers, one worker, one worker that tries items again.
PAIR, ONE, RETRYING = range(3)


@pytest.fixture(scope="module")
def disp() -> Iterator[Dispatcher]:
    retry = RetryPolicy(3, initial=0.001)
    with Dispatcher([Pool(PAIR, 2), Pool(ONE, 1), Pool(RETRYING, 1, retry=retry)]) as disp:
        yield staffed(disp)


@pytest.fixture
def limited() -> Iterator[Dispatcher]:
    """Its one pool has a time limit."""
    with Dispatcher([Pool(0, 1, timeout=0.4)]) as disp:
        yield staffed(disp)


@pytest.fixture(autouse=True)
def _the_pools_are_whole_afterwards(disp: Dispatcher, tmp_path: Path) -> Iterator[None]:
    yield
    (tmp_path / "go").touch()
    for priority in (PAIR, ONE, RETRYING):
        assert_whole(disp, priority)


def begun(folder: Path) -> list[int]:
    return [int(line) for line in lines(folder / "begun")]


def run(disp: Dispatcher, whats: Sequence[str], priority: int = PAIR, **options: Any) -> list[Any]:
    """Map over these happenings; "" gives its number."""
    return outcomes(disp.map(do, whats, itertools.count(), priority=priority, **options))


def whats_of(n: int, **at: Sequence[int]) -> list[str]:
    whats = [""] * n
    for what, places in at.items():
        for place in places:
            whats[place] = what
    return whats


def assert_only(found: list[Any], failed: dict[int, type[BaseException]]) -> None:
    """Every item but these has its number for a result."""
    assert {n: type(one) for n, one in enumerate(found) if type(one) is not int} == failed
    assert all(one == n for n, one in enumerate(found) if n not in failed)


# Items that raise


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize("chunksize", [1, 10, "auto"])
def test_an_item_that_fails_fails_alone_and_the_next_step_goes_on_behind_it(
    disp: Dispatcher, chunksize: Any, timeout: float | None
) -> None:
    places = [0, 3, 4, 19, 29]
    found = run(disp, whats_of(30, ValueError=places), chunksize=chunksize, timeout=timeout)
    assert_only(found, dict.fromkeys(places, ValueError))
    assert len({id(found[place]) for place in places}) == len(places)


def test_an_item_that_fails_keeps_its_own_traceback_and_is_named(disp: Dispatcher) -> None:
    whats = whats_of(30, ValueError=[5], LookupError=[17])
    found = run(disp, whats, chunksize=10)
    for place, line in ((5, "ValueError: no luck"), (17, "LookupError: not there")):
        assert found[place].__notes__ == [f"while running item {place} of a map"]
        text = "".join(traceback.format_exception(found[place]))
        assert "in _raise\n" in text
        assert line in text
        assert "chunk_runner" not in str(found[place].__cause__)
        assert f"item {place} of a map" in text


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize(
    "what", ["SystemExit", "sys.exit", "KeyboardInterrupt", "GeneratorExit", "StopIteration"]
)
def test_an_item_that_raises_what_ends_others_fails_alone(
    disp: Dispatcher, what: str, timeout: float | None
) -> None:
    found = run(disp, whats_of(20, **{what: [4, 7]}), chunksize=10, timeout=timeout)
    error = RuntimeError if what == "StopIteration" else RemoteError
    assert_only(found, {4: error, 7: error})
    assert what.removeprefix("sys.").lower() in str(found[4]).lower()


@pytest.mark.parametrize("what", ["Named", "Noteless"])
def test_an_exception_that_takes_no_notes_fails_its_item_alone(disp: Dispatcher, what: str) -> None:
    found = run(disp, whats_of(20, **{what: [4]}), chunksize=10)
    assert type(found[4]).__name__ == what
    assert [one for n, one in enumerate(found) if n != 4] == [n for n in range(20) if n != 4]


# Items and results that do not come through


@pytest.mark.parametrize("chunksize", [1, 5, "auto"])
def test_an_item_that_cannot_be_sent_fails_alone(disp: Dispatcher, chunksize: Any) -> None:
    items: list[Any] = list(range(20))
    items[3], items[4], items[11] = Unpicklable(), threading.Lock(), BreaksElsewhere()
    found = outcomes(disp.map(identity, items, chunksize=chunksize))
    assert_only(found, {3: JobNotPicklable, 4: JobNotPicklable, 11: RemoteError})
    assert "ZeroDivisionError: the unpickling breaks" in str(found[11])


@pytest.mark.parametrize("chunksize", [1, 5, "auto"])
def test_an_item_that_kills_its_reader_fails_alone(disp: Dispatcher, chunksize: Any) -> None:
    items: list[Any] = list(range(12))
    items[7] = faulty_jobs.KillsItsReader()
    found = outcomes(disp.map(identity, items, chunksize=chunksize))
    assert_only(found, {7: WorkerCrashed})
    assert "item" in str(found[7])


@pytest.mark.alone
@pytest.mark.parametrize("chunksize", [1, 5])
def test_an_item_that_takes_too_long_to_be_rebuilt_fails_alone(disp: Dispatcher, chunksize: Any) -> None:
    items: list[Any] = list(range(10))
    items[7] = HangsElsewhere()
    found = outcomes(disp.map(identity, items, chunksize=chunksize, timeout=0.5))
    assert_only(found, {7: JobTimeout})


@pytest.mark.parametrize("chunksize", [10, "auto"])
def test_a_result_that_does_not_come_back_fails_its_item_alone(disp: Dispatcher, chunksize: Any) -> None:
    whats = whats_of(20, lock=[2], **{"breaks elsewhere": [3, 15]})
    found = run(disp, whats, chunksize=chunksize)
    assert_only(found, {2: RemoteError, 3: RemoteError, 15: RemoteError})
    assert "cannot be pickled" in str(found[2])
    assert "could not be unpickled in the caller" in str(found[3])


@pytest.mark.parametrize("chunksize", [1, 10, "auto"])
def test_a_result_whose_class_cannot_be_hashed_fails_its_item_alone(disp: Dispatcher, chunksize: Any) -> None:
    found = run(disp, whats_of(20, **{"class without hash": [4, 9]}), chunksize=chunksize)
    assert_only(found, {4: TypeError, 9: TypeError})


def test_a_result_that_kills_its_pickler_is_the_one_that_is_blamed(disp: Dispatcher) -> None:
    whats = [*whats_of(200), "kills its pickler", *whats_of(200)]
    assert_only(run(disp, whats, chunksize=401), {200: WorkerCrashed})


# Workers that die


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize("what", ["SIGKILL", "segfault", "os._exit"])
def test_an_item_that_kills_its_worker_fails_alone_and_is_named(
    disp: Dispatcher, what: str, timeout: float | None
) -> None:
    found = run(disp, whats_of(20, **{what: [13]}), chunksize=10, timeout=timeout)
    assert_only(found, {13: WorkerCrashed})
    assert "item 13 of a map" in str(found[13])
    assert (found[13].signal, found[13].exit_code) in [("SIGKILL", None), ("SIGSEGV", None), (None, 0)]


@pytest.mark.parametrize("chunksize", [10, "auto"])
def test_several_items_of_a_chunk_that_kill_their_workers_fail_alone(
    disp: Dispatcher, chunksize: Any
) -> None:
    places = [0, 5, 6, 9, 19]
    found = run(disp, whats_of(20, SIGKILL=places, ValueError=[1, 7]), chunksize=chunksize)
    assert_only(found, {**dict.fromkeys(places, WorkerCrashed), 1: ValueError, 7: ValueError})


def test_large_results_survive_the_worker_that_made_them(disp: Dispatcher) -> None:
    """More than the shared memory for results holds, some through the pipe, some in segments of their own."""
    whats = [*["many bytes", "array", "long error"] * 30, "SIGKILL", *["many bytes", "array"] * 5]
    with Dispatcher([(0, 1)]) as roomy:
        found = run(roomy, whats, chunksize=len(whats))
    for what, one in zip(whats, found, strict=True):
        if what == "SIGKILL":
            assert type(one) is WorkerCrashed
        elif what == "long error":
            assert str(one) == "x" * 2_000_000
        else:
            assert one == bytes(50_000 if what == "many bytes" else 300_000)


def test_errors_that_are_kept_keep_nothing_of_their_workers() -> None:
    with Dispatcher([(0, 1)]) as disp:
        staffed(disp)
        descriptors = len(os.listdir("/proc/self/fd"))
        kept = []
        for _ in range(5):
            kept += run(disp, ["breaks elsewhere", "lock", "ValueError", "SIGKILL"], chunksize=4)
        wait_until_whole(disp)
        assert [type(one) for one in kept[:4]] == [RemoteError, RemoteError, ValueError, WorkerCrashed]
        assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_a_crash_tells_what_the_item_had_printed_and_where_it_was(disp: Dispatcher) -> None:
    found = run(disp, whats_of(10, **{"speak and die": [4]}), chunksize=10)
    assert_only(found, {4: WorkerCrashed})
    assert found[4].output == "line 0\nline 1\nline 2\nlast words"
    assert "in speak_and_segfault" in found[4].stack
    assert "in do" in found[4].stack
    assert "chunk_runner" not in found[4].stack


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_no_item_runs_twice_when_one_kills_its_worker(
    disp: Dispatcher, tmp_path: Path, timeout: float | None
) -> None:
    whats = whats_of(20, SIGKILL=[4, 13])
    found = outcomes(
        disp.map(
            fail_at_first,
            itertools.repeat(tmp_path),
            whats,
            itertools.repeat(1),
            range(20),
            chunksize=20,
            timeout=timeout,
        )
    )
    assert_only(found, {4: WorkerCrashed, 13: WorkerCrashed})
    assert sorted(begun(tmp_path)) == list(range(20))


def test_a_worker_killed_from_outside_costs_the_item_that_ran_and_nothing_runs_twice(
    disp: Dispatcher, tmp_path: Path
) -> None:
    items = [*range(10), 1000, *range(10, 20)]
    reader = Call(
        outcomes, disp.map(held, itertools.repeat(tmp_path), items, priority=ONE, chunksize=len(items))
    )
    wait_until(lambda: 1000 in begun(tmp_path))
    [pid] = worker_pids(disp, ONE)
    os.kill(pid, signal.SIGKILL)
    found = reader.value()
    assert type(found.pop(10)) is WorkerCrashed
    assert found == list(range(20))
    assert begun(tmp_path) == items


def test_a_launcher_that_is_killed_costs_the_items_that_ran(disp: Dispatcher, tmp_path: Path) -> None:
    items = [*range(10), 1000, *range(10, 20)]
    reader = Call(
        outcomes, disp.map(held, itertools.repeat(tmp_path), items, priority=ONE, chunksize=len(items))
    )
    wait_until(lambda: 1000 in begun(tmp_path))
    os.kill(launcher_pid(disp, ONE), signal.SIGKILL)
    found = reader.value()
    assert type(found.pop(10)) is WorkerCrashed
    assert found == list(range(20))
    assert begun(tmp_path) == items


def storm(disp: Dispatcher, folder: Path, n_items: int, kills: int, priority: int, seed: int) -> list[Any]:
    """Kill workers at random while they run items of a millisecond; return the outcomes."""
    draw = random.Random(seed)
    n_killed = 0
    is_over = False

    def kill() -> None:
        nonlocal n_killed
        while n_killed < kills and not is_over:
            due = (n_killed + draw.random()) * 0.9 * n_items / kills
            wait_until(lambda due=due: is_over or len(begun(folder)) >= due)
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(draw.choice(worker_pids(disp, priority)), signal.SIGKILL)
                n_killed += 1

    killer = Call(kill)
    found = outcomes(disp.map(noted, itertools.repeat(folder), range(n_items), priority=priority))
    is_over = True
    killer.value()
    times_begun = Counter(begun(folder))
    assert len(found) == n_items
    assert sum(times_begun.values()) <= n_items + kills
    failed = [n for n, one in enumerate(found) if type(one) is not int]
    assert_only(found, dict.fromkeys(failed, WorkerCrashed))
    print(f"\n  {n_items} items, {n_killed} kills: {len(failed)} failed, {times_begun.total()} runs")
    assert n_killed > kills // 2
    assert len(failed) <= n_killed
    return found


def test_workers_killed_at_random_cost_the_items_that_ran_and_mix_nothing_up(
    disp: Dispatcher, tmp_path: Path
) -> None:
    storm(disp, tmp_path, 500, 12, PAIR, seed=1)


def test_with_a_retry_policy_workers_killed_at_random_cost_nothing(tmp_path: Path) -> None:
    with Dispatcher([Pool(0, 2, retry=RetryPolicy(9, initial=0.0))]) as disp:
        assert storm(disp, tmp_path, 300, 8, 0, seed=2) == list(range(300))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(5))
def test_200_workers_killed_at_random_cost_the_items_that_ran_and_mix_nothing_up(
    disp: Dispatcher, tmp_path: Path, seed: int
) -> None:
    storm(disp, tmp_path, 10_000, 200, PAIR, seed)


def mixture(disp: Dispatcher, n: int, seed: int, priority: int, **options: Any) -> None:
    """Items of every kind, in any order, while workers are killed."""
    draw = random.Random(seed)
    kinds = {
        "ValueError": ValueError,
        "SIGKILL": WorkerCrashed,
        "lock": RemoteError,
        "StopIteration": RuntimeError,
        "SystemExit": RemoteError,
        "breaks elsewhere": RemoteError,
        "kills its pickler": WorkerCrashed,
        "os._exit": WorkerCrashed,
        "hang": JobTimeout,
    }
    whats = [draw.choice(list(kinds)) if draw.random() < 0.05 else "" for _ in range(n)]
    is_over = threading.Event()

    def kill() -> int:
        n_killed = 0
        while not is_over.wait(draw.random() * 0.2):
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(draw.choice(worker_pids(disp, priority)), signal.SIGKILL)
                n_killed += 1
        return n_killed

    killer = Call(kill)
    found = run(disp, whats, priority, timeout=0.3, **options)
    is_over.set()
    n_killed = killer.value()
    assert len(found) == n
    if options.get("ordered", True):
        for number, (what, one) in enumerate(zip(whats, found, strict=True)):
            # On a busy machine the time of an innocent item may be up, too.
            expected = kinds[what] if what else int
            assert type(one) in (expected, WorkerCrashed, JobTimeout), (number, what, one)
            assert type(one) is not int or one == number
    numbers = [one for one in found if type(one) is int]
    assert len(set(numbers)) == len(numbers)
    good = {number for number, what in enumerate(whats) if not what}
    n_late = sum(type(one) is JobTimeout for one in found)
    assert good.issuperset(numbers)
    assert len(good) - len(numbers) <= n_killed + n_late


@pytest.mark.parametrize(
    "options",
    [{}, {"chunksize": 13, "buffersize": 40}, {"priority": RETRYING, "ordered": False, "chunksize": 20}],
    ids=str,
)
def test_a_mixture_of_good_and_bad_items_under_fire_has_an_end_for_each(
    disp: Dispatcher, options: dict[str, Any]
) -> None:
    mixture(disp, 200, seed=3, **{"priority": PAIR, **options})


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(6))
def test_a_large_mixture_of_good_and_bad_items_under_fire_has_an_end_for_each(
    disp: Dispatcher, seed: int
) -> None:
    chunksize = ["auto", 1, 50][seed % 3]
    mixture(disp, 3000, seed, PAIR if seed < 3 else RETRYING, chunksize=chunksize, ordered=seed != 4)


def test_results_of_a_worker_that_dies_after_its_answer_are_not_taken_for_another_chunks(
    tmp_path: Path,
) -> None:
    with Dispatcher([Pool(0, 2, retry=RetryPolicy(2, initial=0.0, retry_on=(KeyError,)))]) as disp:
        staffed(disp)
        found = outcomes(disp.map(die_after_the_answer, itertools.repeat(tmp_path), range(12), chunksize=1))
        assert_only(found, {0: LookupError})
    assert sorted(begun(tmp_path)) == list(range(12))


@pytest.mark.parametrize("what", ["fork", "fork and wait"])
def test_an_item_that_forks_and_returns_twice_counts_once(tmp_path: Path, what: str) -> None:
    whats = whats_of(20, **{what: [4]})
    with Dispatcher([(0, 1)]) as disp:
        found = outcomes(disp.map(note_and_do, itertools.repeat(tmp_path), whats, range(20), chunksize=10))
    assert found.pop(4) == "parent"
    assert found == [n for n in range(20) if n != 4]
    assert sorted(begun(tmp_path)) == list(range(20))


@pytest.mark.parametrize("what", ["close descriptors", "write everywhere"])
def test_an_item_that_damages_its_worker_costs_itself_at_most(disp: Dispatcher, what: str) -> None:
    found = run(disp, whats_of(20, **{what: [4]}), chunksize=10)
    assert_only([4 if n == 4 else one for n, one in enumerate(found)], {})


# Time limits


@pytest.mark.alone
def test_a_time_limit_counts_for_each_item_of_a_chunk(disp: Dispatcher, limited: Dispatcher) -> None:
    assert len(list(disp.map(where, [0.1] * 8, chunksize=8, timeout=0.6))) == 8
    assert len(list(limited.map(where, [0.1] * 6, chunksize=6))) == 6


@pytest.mark.alone
@pytest.mark.parametrize("chunksize", [1, 10, "auto"])
def test_an_item_that_takes_too_long_fails_alone_and_is_named(disp: Dispatcher, chunksize: Any) -> None:
    found = run(disp, whats_of(20, hang=[4]), chunksize=chunksize, timeout=0.3)
    assert_only(found, {4: JobTimeout})
    assert "item 4 of a map ran longer than 0.3 s" in str(found[4])
    assert "in do" in found[4].stack


@pytest.mark.alone
def test_several_items_that_take_too_long_fail_alone(disp: Dispatcher) -> None:
    whats = whats_of(20, hang=[0, 4], SIGKILL=[5], ValueError=[6], **{"ignore SIGTERM": [9]})
    found = run(disp, whats, chunksize=10, timeout=0.3)
    assert_only(found, {0: JobTimeout, 4: JobTimeout, 5: WorkerCrashed, 6: ValueError, 9: JobTimeout})


@pytest.mark.alone
def test_an_item_that_answers_the_signal_of_its_time_limit_leaves_the_others_alone(disp: Dispatcher) -> None:
    found = run(disp, whats_of(20, overrun=[4]), timeout=0.3)
    assert found[4] == "too late" or type(found[4]) is JobTimeout
    assert_only([4 if n == 4 else one for n, one in enumerate(found)], {})


@pytest.mark.alone
def test_the_pools_time_limit_counts_where_the_map_names_none(limited: Dispatcher) -> None:
    assert_only(run(limited, whats_of(6, hang=[2]), chunksize=3), {2: JobTimeout})
    assert len(list(limited.map(where, [0.6], timeout=20))) == 1


@pytest.mark.alone
def test_no_item_runs_twice_when_one_takes_too_long(disp: Dispatcher, tmp_path: Path) -> None:
    found = outcomes(
        disp.map(
            held, itertools.repeat(tmp_path), [*range(10), 1000, *range(10, 20)], chunksize=21, timeout=0.3
        )
    )
    assert type(found.pop(10)) is JobTimeout
    assert found == list(range(20))
    assert begun(tmp_path) == [*range(10), 1000, *range(10, 20)]


# Trying again


@pytest.mark.alone
def test_each_item_is_tried_again_as_often_as_the_pools_policy_allows(
    disp: Dispatcher, tmp_path: Path
) -> None:
    plan = [
        ("", 0),
        ("ValueError", 1),
        ("ValueError", 2),
        ("ValueError", 9),
        ("", 0),
        ("SIGKILL", 1),
        ("SIGKILL", 2),
        ("SIGKILL", 9),
        ("hang", 1),
        ("Unrecoverable", 9),
        ("", 0),
    ]
    whats, times = zip(*plan, strict=True)
    retried = disp.stats()[RETRYING].retried
    results = disp.map(
        fail_at_first,
        itertools.repeat(tmp_path),
        whats,
        times,
        range(len(plan)),
        priority=RETRYING,
        chunksize=len(plan),
        timeout=0.5,
    )
    assert_only(outcomes(results), {3: ValueError, 7: WorkerCrashed, 9: Unrecoverable})
    runs = [1, 2, 3, 3, 1, 2, 3, 3, 2, 1, 1]
    assert Counter(begun(tmp_path)) == dict(enumerate(runs))
    assert disp.stats()[RETRYING].retried - retried == 2  # the chunk's second and third round


def test_only_the_kinds_of_failure_that_the_policy_names_are_tried_again(tmp_path: Path) -> None:
    policy = RetryPolicy(3, initial=0.0, retry_on=(ValueError,))
    whats = ["ValueError", "LookupError", "", "ValueError", "SIGKILL"]
    with Dispatcher([Pool(0, 1, retry=policy)]) as disp:
        found = outcomes(
            disp.map(
                fail_at_first, itertools.repeat(tmp_path), whats, itertools.repeat(2), range(5), chunksize=5
            )
        )
    assert_only(found, {1: LookupError, 4: WorkerCrashed})
    assert Counter(begun(tmp_path)) == {0: 3, 1: 1, 2: 1, 3: 3, 4: 1}


def test_an_item_that_cannot_be_rebuilt_is_not_sent_for_ever(disp: Dispatcher) -> None:
    items = [0, BreaksElsewhere(), 2, faulty_jobs.KillsItsReader(), 4]
    found = outcomes(disp.map(identity, items, priority=RETRYING, chunksize=5))
    assert_only(found, {1: RemoteError, 3: WorkerCrashed})


# Ends of the pool


def assert_in_place(found: list[Any], items: Sequence[int], *errors: type[Exception]) -> None:
    """Each value stands in its item's place; the rest are these errors."""
    for one, item in zip(found, items, strict=False):
        assert one == item or isinstance(one, errors)
    assert len(found) <= len(items) + 1


def test_finalize_lets_accepted_items_end_and_then_the_map_says_so(tmp_path: Path) -> None:
    disp = Dispatcher([(0, 2)])
    items = [0, 1, *range(1000, 1100)]
    results = disp.map(held, itertools.repeat(tmp_path), items, chunksize=1)
    assert next(results) == 0
    reader = Call(outcomes, results)
    wait_until(lambda: len(begun(tmp_path)) == 4)
    closer = Call(disp.finalize).until_waiting()
    (tmp_path / "go").touch()
    *found, error = reader.value()
    closer.value()
    assert found == [1, 1000, 1001]
    assert type(error) is DispatcherFinalized
    assert next(results, "over") == "over"
    assert sorted(begun(tmp_path)) == [0, 1, 1000, 1001]


def test_finalize_in_the_middle_leaves_every_result_in_its_place(tmp_path: Path) -> None:
    """A chunk that was made for short items gives its rest back when the pool takes no more."""
    disp = Dispatcher([(0, 2)])
    # Why so many: more than four chunks can hold. Why all held: the other worker must not come to the end meanwhile.
    items = [*range(999), *range(1000, 31_000)]
    results = disp.map(held_from_1000, itertools.repeat(tmp_path), items)
    reader = Call(outcomes, results)
    wait_until(lambda: 1000 in begun(tmp_path))
    time.sleep(0.1)  # so that the chunk has taken long
    closer = Call(disp.finalize).until_waiting()
    (tmp_path / "go").touch()
    found = reader.value()
    closer.value()
    assert_in_place(found, items, DispatcherFinalized)
    assert found[:999] == list(range(999))
    assert type(found[-1]) is DispatcherFinalized


def test_finalize_with_cancel_ends_a_map_that_is_waited_for(tmp_path: Path) -> None:
    disp = Dispatcher([(0, 2)])
    items = [0, 1, *range(1000, 1100)]
    reader = Call(outcomes, disp.map(held, itertools.repeat(tmp_path), items, chunksize=2, timeout=50))
    wait_until(lambda: {1000, 1002} <= set(begun(tmp_path)))  # both workers are held; so 0 and 1 are done
    disp.finalize(cancel=True)
    found = reader.value()
    assert found[:2] == [0, 1]
    assert_in_place(found, items, JobCancelled, DispatcherFinalized)
    assert JobCancelled in map(type, found)
    assert type(found[-1]) is DispatcherFinalized


def test_leaving_the_with_block_by_an_exception_ends_the_map_it_was_in(tmp_path: Path) -> None:
    items = [0, *range(1000, 1100)]
    left: list[Iterator[int]] = []

    def script() -> None:
        with Dispatcher([(0, 2)]) as disp:
            left.append(disp.map(held, itertools.repeat(tmp_path), items, chunksize=1))
            for result in left[0]:
                assert result == 0
                raise LookupError

    with pytest.raises(LookupError):
        script()
    found = outcomes(left[0])
    assert_in_place(found, items[1:], JobCancelled, DispatcherFinalized)
    assert type(found[-1]) is DispatcherFinalized


def test_a_map_may_be_read_closed_or_dropped_after_finalize() -> None:
    with Dispatcher([(0, 1)]) as disp:
        maps = [disp.map(square, itertools.count(), chunksize=1) for _ in range(3)]
        assert [next(one) for one in maps] == [0, 0, 0]
        unread = disp.map(square, itertools.count())
    *found, error = outcomes(maps[0])
    assert found == [n * n for n in range(1, len(found) + 1)]
    assert type(error) is DispatcherFinalized
    maps[1].close()
    assert list(maps[1]) == []
    maps.clear()
    gc.collect()
    with pytest.raises(DispatcherFinalized):
        next(unread)
    assert next(unread, "over") == "over"


def test_a_pool_that_breaks_gives_out_what_it_has_done_and_then_says_so(tmp_path: Path) -> None:
    items = [0, 1, *range(1000, 1100)]
    with Dispatcher([Pool(0, 2, start_method="fork")]) as disp:
        results = disp.map(held, itertools.repeat(tmp_path), items, chunksize=1)
        assert next(results) == 0
        reader = Call(outcomes, results)
        wait_until(lambda: len(begun(tmp_path)) == 4)
        os.kill(launcher_pid(disp), signal.SIGKILL)
        *found, error = reader.value()
    assert found[0] == 1
    assert {type(one) for one in found[1:]} <= {WorkerCrashed, PoolBroken}
    assert type(error) is PoolBroken


def test_a_pool_whose_workers_do_not_come_up_is_an_error_of_the_map(tmp_path: Path) -> None:
    with Dispatcher(
        [Pool(0, 1, initializer=faulty_jobs.exit_at_start, initargs=(tmp_path / "log", 3))]
    ) as disp:
        found = outcomes(disp.map(square, itertools.count()))
        assert {type(one) for one in found} == {PoolBroken}
        assert {type(one) for one in outcomes(disp.map(square, [1]))} == {PoolBroken}


def test_finalize_in_the_loop_of_a_map_ends_it() -> None:
    disp = Dispatcher([(0, 1)])
    found: list[int] = []

    def script() -> None:
        for result in disp.map(square, itertools.count(), chunksize=1):
            found.append(result)
            if len(found) == 5:
                disp.finalize()

    with pytest.raises(DispatcherFinalized):
        script()
    assert found == [n * n for n in range(len(found))]
    assert 5 <= len(found) <= 8


def test_a_chunk_that_is_cancelled_by_hand_fails_its_items_and_the_map_goes_on(
    disp: Dispatcher, tmp_path: Path
) -> None:
    items = [0, 1000, 1001, 1, 2, 3]
    reader = Call(outcomes, disp.map(held, itertools.repeat(tmp_path), items, priority=ONE, chunksize=3))
    wait_until(lambda: 1000 in begun(tmp_path))
    [chunk] = [one for one in disp.jobs("running") if one.priority == ONE]
    assert chunk.cancel()
    found = reader.value()
    assert found[0] == 0
    assert {type(one) for one in found[1:3]} == {JobCancelled}
    assert found[3:] == [1, 2, 3]
    assert begun(tmp_path) == [0, 1000, 1, 2, 3]


# Ctrl-C


@pytest.mark.parametrize("chunksize", [1, 3])
def test_ctrl_c_between_two_results_loses_none_of_those_behind(disp: Dispatcher, chunksize: int) -> None:
    """A C function that consumes the results sees the signal only when bulkhead's own code is entered."""
    for place in range(12):
        signals = [signal.SIGCHLD] * 12  # which nobody handles
        signals[place] = signal.SIGINT
        results = disp.map(identity, range(12), chunksize=chunksize, priority=ONE)
        pairs = zip(results, map(_thread.interrupt_main, signals), strict=False)
        found: list[Any] = []
        n_interrupts = 0
        for _ in range(3):
            try:
                found.extend(pairs)
            except KeyboardInterrupt:
                n_interrupts += 1
        assert n_interrupts == 1
        assert [number for number, _ in found] == list(range(12))


GOES_ON = """
import itertools, signal
import map_jobs
from bulkhead import Dispatcher

found, interrupts, told = [], 0, -1

def read(results):
    global told
    for result in results:
        found.append(result)
        if told < interrupts:
            # Why here: the next interrupt comes when this is read, and has to find us in the try block below.
            told = interrupts
            print("caught", told, flush=True)

if __name__ == "__main__":
    disp = Dispatcher([(0, 2)])
    results = disp.map(map_jobs.square, itertools.count(){options})
    while interrupts < {n_interrupts}:
        try:
            read(results)
            break
        except KeyboardInterrupt:
            interrupts += 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("over", interrupts, found == [n * n for n in range(len(found))], flush=True)
    results.close()
    disp.barrier()
    stats = disp.stats()[0]
    print("rest", stats.waiting, stats.running, stats.restarts, flush=True)
    disp.finalize()
"""


@pytest.mark.parametrize("options", ["", ", chunksize=1"])
def test_a_script_that_catches_ctrl_c_in_the_middle_of_a_map_goes_on_with_the_next_result(
    options: str,
) -> None:
    n_interrupts = 20
    draw = random.Random(7)
    with running(GOES_ON.format(n_interrupts=n_interrupts, options=options)) as script:
        script.wait_for_line("caught 0")
        for number in range(1, n_interrupts + 1):
            time.sleep(draw.random() * 0.01)  # the instants are to be random
            os.kill(script.pid, signal.SIGINT)
            expected = f"caught {number}\n", "over"
            wait_until(lambda expected=expected: any(word in script.output() for word in expected))
        assert script.wait() == 0, script.errors()
        assert script.errors() == ""
        assert script.output().splitlines()[-2:] == [f"over {n_interrupts} True", "rest 0 0 0"]


FORGETFUL = """
import itertools
import map_jobs
from bulkhead import Dispatcher

if __name__ == "__main__":
    disp = Dispatcher([(0, 2)])
    results = disp.map(map_jobs.square, itertools.count())
    print("got", next(results), next(results), flush=True)
"""


def test_a_script_that_ends_in_the_middle_of_a_map_ends_without_a_word() -> None:
    with running(FORGETFUL) as script:
        assert script.wait() == 0, script.errors()
        assert script.output() == "got 0 1\n"
        assert script.errors() == ""
        assert script.processes() == []


CTRL_C = """
import itertools, time
import map_jobs
from bulkhead import Dispatcher

if __name__ == "__main__":
    with Dispatcher([(0, 2)]) as disp:
        for number, result in enumerate(disp.map(map_jobs.where, itertools.chain([0.0], itertools.repeat(60.0)))):
            print("got", number, flush=True)
"""


def test_ctrl_c_in_a_map_that_waits_ends_everything_within_two_seconds() -> None:
    with running(CTRL_C) as script:
        script.wait_for_line("got 0")
        family = script.processes()
        os.kill(script.pid, signal.SIGINT)
        pressed = time.monotonic()
        assert script.wait() == -signal.SIGINT
        wait_until(lambda: not script.processes())
        assert len(family) >= 4
        assert time.monotonic() - pressed < 2.0 + 2.0  # the promise, and what starting psutil's look takes
        assert script.errors().endswith("\nKeyboardInterrupt\n")
        assert script.errors().count("Traceback") == 1
