"""An initializer runs once in each worker, before its first job, in workers that take another's place too."""

import os
import signal
from pathlib import Path

import pytest
from jobs import echo, lines, note, pid
from staffing import staffed
from watching import wait_until, wait_until_whole, worker_pids

from bulkhead import Dispatcher, Job, NoWorkerState, Pool, worker_state

_settings: dict[str, object] = {}


def prepare(path: str, **settings: object) -> None:
    note(path, os.getpid())
    _settings.update(settings)


def prepare_with(path: str, colour: str) -> None:
    prepare(path, colour=colour)


def colour() -> tuple[int, object]:
    return os.getpid(), _settings.get("colour")


def test_each_worker_is_prepared_once_before_its_first_job(start_method: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    pool = Pool(0, 2, initializer=prepare_with, initargs=(str(ran), "red"), start_method=start_method)
    with staffed(Dispatcher([pool, (1, 1)])) as disp:
        answers = [disp.dispatch(Job(colour)).result() for _ in range(20)]
        assert {found for _, found in answers} == {"red"}
        assert sorted(map(int, lines(ran))) == sorted(worker_pids(disp))
        assert disp.dispatch(Job(colour).options(priority=1)).result()[1] is None
    assert "colour" not in _settings


def test_a_worker_that_takes_anothers_place_is_prepared_too(usual_start_method: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    pool = Pool(0, 1, initializer=prepare_with, initargs=(str(ran), "red"), start_method=usual_start_method)
    with staffed(Dispatcher([pool])) as disp:
        first = disp.dispatch(Job(pid)).result()
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: disp.stats()[0].restarts == 1)
        wait_until_whole(disp)
        second, found = disp.dispatch(Job(colour)).result()
    assert found == "red"
    assert lines(ran) == [str(first), str(second)]


def make_ledger(*entries: str) -> list[str]:
    """What a pool's initializer may well make: something that each worker has of its own."""
    return list(entries)


def enter(entry: str) -> tuple[int, list[str]]:
    worker_state().append(entry)
    return os.getpid(), list(worker_state())


def test_jobs_get_what_the_initializer_of_their_worker_has_returned(usual_start_method: str) -> None:
    pool = Pool(0, 2, initializer=make_ledger, initargs=("made",), start_method=usual_start_method)
    with staffed(Dispatcher([pool])) as disp:
        states: dict[int, list[str]] = {}
        for entry in map(str, range(12)):
            pid, found = disp.dispatch(Job(enter, entry)).result(20)
            assert found == [*states.get(pid, ["made"]), entry]
            states[pid] = found
    with pytest.raises(NoWorkerState):
        worker_state()


def test_the_state_of_a_recycled_worker_goes_and_the_next_one_has_its_own() -> None:
    with Dispatcher([Pool(0, 1, initializer=make_ledger, max_jobs_per_worker=2)]) as disp:
        found = [disp.dispatch(Job(enter, str(number))).result(20)[1] for number in range(4)]
    assert found == [["0"], ["0", "1"], ["2"], ["2", "3"]]


def test_none_is_a_state_and_a_pool_without_initializer_has_none() -> None:
    with Dispatcher([Pool(0, 1, initializer=pid_and_nothing), (1, 1)]) as disp:
        assert disp.dispatch(Job(worker_state).options(priority=0)).result(20) is None
        error = disp.dispatch(Job(worker_state).options(priority=1)).exception(20)
        assert isinstance(error, NoWorkerState)
        assert "Pool(initializer=)" in str(error)


def pid_and_nothing() -> None:
    os.getpid()


def test_an_initializer_may_be_a_closure_where_cloudpickle_is_installed(
    start_method: str, tmp_path: Path
) -> None:
    pytest.importorskip("cloudpickle")
    ran = tmp_path / "ran"

    def prepare_here() -> None:
        note(ran, "prepared")

    with Dispatcher([Pool(0, 1, initializer=prepare_here, start_method=start_method)]) as disp:
        assert disp.dispatch(Job(echo, 1)).result() == 1
    assert lines(ran) == ["prepared"]
