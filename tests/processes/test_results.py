"""What comes back (B7): results, exceptions with their traceback, and what can be neither pickled nor rebuilt."""

import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
from faulty_jobs import grant_room, no_room, withhold_room
from jobs import echo, fail, pid
from staffing import staffed

from bulkhead import Dispatcher, Job, Pool, RemoteError, Tracker
from bulkhead.engines.processes.segments import SegmentPool


@pytest.fixture(scope="module")
def disp(start_method: str) -> Iterator[Dispatcher]:
    with Dispatcher([Pool(0, 1, start_method=start_method)]) as disp:
        yield staffed(disp)


@pytest.fixture(autouse=True)
def _the_worker_survives(disp: Dispatcher) -> Iterator[None]:
    """Whatever a job answers, its worker goes on."""
    before = disp.dispatch(Job(pid)).result()
    yield
    assert disp.dispatch(Job(pid)).result(10) == before
    assert disp.stats()[0].restarts == 0


@pytest.mark.parametrize("value", [None, 0, "", b"", [], {"a": [1, (2, 3)]}, float("inf"), 2**1000], ids=repr)
def test_a_result_comes_back_as_it_was(disp: Dispatcher, value: object) -> None:
    result = disp.dispatch(Job(echo, value)).result(10)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize("size", [1, 65_000, 65_519, 65_536, 1_000_000, 30_000_000])
def test_arguments_and_results_of_any_size_come_through(disp: Dispatcher, size: int) -> None:
    text = bytes(range(256)) * (size // 256) + b"\xff" * (size % 256)
    assert disp.dispatch(Job(echo, text)).result(30) == text


def test_they_come_through_the_pipe_when_there_is_no_shared_memory_for_them(
    disp: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SegmentPool, "place", no_room)
    disp.dispatch(Job(withhold_room)).result(10)
    for size in (300_000, 1_000_000, 30_000_000):
        text = bytes(range(256)) * (size // 256)
        assert disp.dispatch(Job(echo, text)).result(30) == text
    disp.dispatch(Job(grant_room)).result(10)


def test_an_exception_comes_back_with_type_arguments_and_remote_traceback(disp: Dispatcher) -> None:
    error = disp.dispatch(Job(fail, "really")).exception(10)
    assert type(error) is ValueError
    assert error.args == ("really",)
    shown = "".join(traceback.format_exception(error))
    assert 'jobs.py", line ' in shown
    assert "raise ValueError(text)" in shown
    # The worker's own frames are nobody's business.
    assert "worker_main" not in shown


def test_causes_notes_and_groups_come_along_as_text(disp: Dispatcher) -> None:
    error = disp.dispatch(Job(_fail_in_several_ways)).exception(10)
    assert type(error) is ExceptionGroup
    assert [type(one) for one in error.exceptions] == [KeyError, FileNotFoundError]
    shown = "".join(traceback.format_exception(error))
    for text in ("the cause", "the note", "the key", "direct cause of"):
        assert text in shown


def test_an_exception_of_the_users_comes_back_as_its_type_with_its_facts(disp: Dispatcher) -> None:
    error = disp.dispatch(Job(_raise, Detailed("text", code=7))).exception(10)
    assert isinstance(error, Detailed)
    assert (str(error), error.code) == ("text", 7)


class Detailed(Exception):
    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class WrongInit(Exception):
    """Pickles, but cannot be rebuilt: its __init__ wants more than args holds."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)


class Unpicklable(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class Mute(Exception):
    """Its text cannot be made, and neither can its pickle."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __reduce__(self) -> NoReturn:
        raise RuntimeError("no pickle")


class Disguised(Exception):
    """Comes out of pickle as something else."""

    def __reduce__(self) -> Any:
        return str, ("not an exception",)


class HeavyToRebuild(Exception):
    """Is rebuilt in the worker, which proves it, and fails in the caller."""

    def __reduce__(self) -> Any:
        return _only_elsewhere, (_caller(),)


def _raise_wrong_init() -> None:
    raise WrongInit("the text", 3)


def _raise_unpicklable() -> None:
    raise Unpicklable("the text")


def _raise_local() -> None:
    class LocalError(Exception):
        pass

    raise LocalError("the text")


def _raise_mute() -> None:
    raise Mute


def _raise_disguised() -> None:
    raise Disguised("the text")


def _raise_exit() -> None:
    raise SystemExit("the text")


def _raise_interrupt() -> None:
    raise KeyboardInterrupt("the text")


def _raise_base() -> None:
    raise BaseException("the text")


def _raise_generator_exit() -> None:
    raise GeneratorExit("the text")


@pytest.mark.parametrize(
    ("fn", "type_name"),
    [
        (_raise_wrong_init, "WrongInit"),
        (_raise_unpicklable, "Unpicklable"),
        (_raise_local, "_raise_local.<locals>.LocalError"),
        (_raise_disguised, "Disguised"),
        (_raise_exit, "SystemExit"),
        (_raise_interrupt, "KeyboardInterrupt"),
        (_raise_base, "BaseException"),
        (_raise_generator_exit, "GeneratorExit"),
    ],
)
def test_what_cannot_be_brought_back_arrives_as_a_remote_error_with_its_text(
    disp: Dispatcher, fn: Callable[[], None], type_name: str
) -> None:
    tracker = disp.dispatch(Job(fn))
    error = _remote_error(tracker)
    assert str(error) == f"{type_name}: the text"
    assert error.type_name == type_name
    assert f"in {fn.__name__}" in error.traceback
    assert "the text" in error.traceback
    assert "in " + fn.__name__ in "".join(traceback.format_exception(error))
    status = tracker.status()
    assert (status.error_type, status.traceback) == (type_name, error.traceback)


def test_an_exception_without_text_arrives_as_a_remote_error(disp: Dispatcher) -> None:
    tracker = disp.dispatch(Job(_raise_mute))
    assert _remote_error(tracker).type_name == "Mute"
    assert tracker.status().error_type == "Mute"
    assert tracker.status().error_message


def test_an_exception_that_can_be_rebuilt_only_in_the_worker_arrives_as_a_remote_error(
    disp: Dispatcher,
) -> None:
    error = _remote_error(disp.dispatch(Job(_raise_heavy)))
    assert error.type_name == "HeavyToRebuild"
    assert "the text" in error.traceback


def _raise_heavy() -> None:
    raise HeavyToRebuild("the text")


def _caller() -> int:
    import os

    return os.getpid()


def _only_elsewhere(where: int) -> Exception:
    import os

    if os.getpid() != where:
        raise RuntimeError("rebuilt in the wrong process")
    return HeavyToRebuild("the text")


# Results that do not come through


class BreaksInPickle:
    def __reduce__(self) -> NoReturn:
        raise ZeroDivisionError("the pickling breaks")


class BreaksInUnpickle:
    def __init__(self, error: type[BaseException] = ZeroDivisionError) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return _break, (self.error,)


def _break(error: type[BaseException]) -> NoReturn:
    raise error("the unpickling breaks")


def _make_lock() -> object:
    return threading.Lock()


def _make_generator() -> object:
    return (number for number in range(3))


def _make_breaking() -> object:
    return [BreaksInPickle()]


def _make_breaking_elsewhere(error: type[BaseException]) -> object:
    return {"deep": BreaksInUnpickle(error)}


def _make_lambda() -> Callable[[int], int]:
    base = 40
    return lambda number: base + number


def _make_deep() -> object:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    return deep


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (_make_lock, ["lock", "cannot be pickled"]),
        (_make_generator, ["generator", "cannot be pickled"]),
        (_make_breaking, ["list", "cannot be pickled", "ZeroDivisionError: the pickling breaks"]),
        (_make_deep, ["list", "cannot be pickled", "RecursionError"]),
    ],
)
def test_a_result_that_cannot_be_pickled_fails_the_job_with_the_reason(
    disp: Dispatcher, fn: Callable[[], object], words: list[str]
) -> None:
    text = str(_remote_error(disp.dispatch(Job(fn))))
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, GeneratorExit])
def test_a_result_that_cannot_be_rebuilt_in_the_caller_fails_the_job_with_the_reason(
    disp: Dispatcher, error: type[BaseException]
) -> None:
    text = str(_remote_error(disp.dispatch(Job(_make_breaking_elsewhere, error))))
    assert "could not be unpickled in the caller" in text
    assert f"{error.__name__}: the unpickling breaks" in text


def test_a_job_that_cannot_be_rebuilt_in_the_worker_fails_with_the_reason(disp: Dispatcher) -> None:
    text = str(_remote_error(disp.dispatch(Job(echo, BreaksInUnpickle()))))
    assert "could not be unpickled in the worker" in text
    assert "ZeroDivisionError: the unpickling breaks" in text


def test_a_lambda_as_a_result_comes_back_where_cloudpickle_is_installed(disp: Dispatcher) -> None:
    pytest.importorskip("cloudpickle")
    assert disp.dispatch(Job(_make_lambda)).result(10)(2) == 42


def _remote_error(tracker: Tracker) -> RemoteError:
    error = tracker.exception(20)
    assert type(error) is RemoteError
    assert tracker.status().state == "failed"
    return error


def _raise(error: Exception) -> None:
    raise error


def _fail_in_several_ways() -> None:
    try:
        raise LookupError("the cause")
    except LookupError as cause:
        first = KeyError("the key")
        first.add_note("the note")
        raise ExceptionGroup("several", [first, OSError(2, "no file")]) from cause
