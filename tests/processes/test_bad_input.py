"""Bad input (A10): a typed error that names the field and the value, and nothing is started or queued."""

import math
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest
from jobs import echo, nothing
from parameters import named
from staffing import staffed
from traces import Traces

from bulkhead import (
    BulkheadError,
    ConfigError,
    ConfigTypeError,
    Dispatcher,
    DuplicateJobId,
    Job,
    JobNotPicklable,
    Pool,
    RetryPolicy,
    UnknownPriority,
)

Make = Callable[[], object]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ways in which something was started meanwhile."""
    found: list[str] = []

    def watch(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in (
        (os, "fork"),
        (os, "pipe"),
        (os, "posix_spawn"),
        (subprocess.Popen, "__init__"),
        (threading.Thread, "start"),
    ):
        watch(owner, name)
    return found


@pytest.fixture
def disp() -> Iterator[Dispatcher]:
    with Dispatcher([(0, 1)]) as disp:
        yield staffed(disp)


@pytest.fixture(scope="module")
def shared() -> Iterator[Dispatcher]:
    with Dispatcher([(0, 1)]) as disp:
        yield staffed(disp)


def refuse(make: Make, error: type[BaseException], *words: str) -> BaseException:
    """Require that the call raises just this error with these words in it, and leaves no trace whatsoever."""
    before = Traces.now()
    with pytest.raises(error) as caught:
        make()
    assert Traces.now().counts() == before.counts()
    assert type(caught.value) is error
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"
    return caught.value


@pytest.mark.parametrize(
    ("pools", "error", "words"),
    [
        ([], ConfigError, ["pools", "at least one"]),
        ((), ConfigError, ["pools", "at least one"]),
        (None, ConfigTypeError, ["pools", "None"]),
        (5, ConfigTypeError, ["pools", "5"]),
        ("pools", ConfigTypeError, ["pools", "'pools'"]),
        (Pool(0, 1), ConfigTypeError, ["pools", "Pool(priority=0"]),
        ([(0, 1), (0, 2)], ConfigError, ["priority 0", "two pools"]),
        ([(1, 1), Pool(0, 1), Pool(1, 3)], ConfigError, ["priority 1", "two pools"]),
        ([(0, 1), 7], ConfigTypeError, ["pools", "7"]),
        ([(0, 1, 2)], ConfigTypeError, ["pools", "(0, 1, 2)"]),
        ([[0, 1]], ConfigTypeError, ["pools", "[0, 1]"]),
        ([(0, 0)], ConfigError, ["n_workers", "at least 1", "0"]),
        ([(1, 4), (0, -3)], ConfigError, ["n_workers", "at least 1", "-3"]),
        ([(0, 10_001)], ConfigError, ["n_workers", "at most 10000", "10001"]),
        ([(0, 10**30)], ConfigError, ["n_workers", "at most 10000"]),
        ([(0, 1.5)], ConfigTypeError, ["n_workers", "1.5", "float"]),
        ([("high", 1)], ConfigTypeError, ["priority", "'high'", "str"]),
        ([(None, 1)], ConfigTypeError, ["priority", "None"]),
        ([(0, None)], ConfigTypeError, ["n_workers", "None"]),
        ([(True, 1)], ConfigTypeError, ["priority", "True"]),
        ([(0, True)], ConfigTypeError, ["n_workers", "True"]),
    ],
    ids=str,
)
def test_bad_pools_start_nothing(
    pools: Any, error: type[BaseException], words: list[str], started: list[str]
) -> None:
    refuse(lambda: Dispatcher(pools), error, *words)
    assert started == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"job_expiry": 0}, ConfigError),
        ({"job_expiry": -1.0}, ConfigError),
        ({"job_expiry": math.nan}, ConfigError),
        ({"job_expiry": "5"}, ConfigTypeError),
        ({"job_expiry": None}, ConfigTypeError),
        ({"max_history": -1}, ConfigError),
        ({"max_history": 2.5}, ConfigTypeError),
        ({"max_history": None}, ConfigTypeError),
    ],
    ids=str,
)
def test_bad_options_of_a_dispatcher_start_nothing(
    options: dict[str, Any], error: type[BaseException], started: list[str]
) -> None:
    [(name, value)] = options.items()
    refuse(lambda: Dispatcher([(0, 1)], **options), error, name, repr(value))
    assert started == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"backlog": -1}, ConfigError),
        ({"backlog": 1.0}, ConfigTypeError),
        ({"backlog": "all"}, ConfigTypeError),
        ({"name": 5}, ConfigTypeError),
        ({"timeout": 0}, ConfigError),
        ({"timeout": -1}, ConfigError),
        ({"timeout": math.inf}, ConfigError),
        ({"timeout": "1"}, ConfigTypeError),
        ({"retry": 3}, ConfigTypeError),
        ({"nice": 20}, ConfigError),
        ({"nice": -21}, ConfigError),
        ({"nice": 0.5}, ConfigTypeError),
        ({"initializer": "setup"}, ConfigTypeError),
        ({"initargs": 5}, ConfigTypeError),
        ({"start_method": "thread"}, ConfigError),
        ({"start_method": 1}, ConfigError),
        ({"start_method": ["fork"]}, ConfigError),
    ],
    ids=str,
)
def test_bad_options_of_a_pool_raise(options: dict[str, Any], error: type[BaseException]) -> None:
    [(name, value)] = options.items()
    refuse(lambda: Pool(0, 1, **options), error, name, repr(value))


def test_every_refusal_of_an_option_is_a_value_error_and_one_of_a_type_also_a_type_error() -> None:
    assert issubclass(ConfigError, BulkheadError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigTypeError, ConfigError)
    assert issubclass(ConfigTypeError, TypeError)


def test_unknown_options_raise() -> None:
    for make in (
        lambda: Pool(0, 1, workers=2),  # type: ignore[call-arg]
        lambda: Pool(0, 1, 5),  # type: ignore[call-arg, misc]
        lambda: Dispatcher([(0, 1)], backlog=3),  # type: ignore[call-arg]
        lambda: Job(nothing).options(prio=1),  # type: ignore[call-arg]
        lambda: RetryPolicy(3, delay=1),  # type: ignore[call-arg]
    ):
        refuse(make, TypeError)


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
@pytest.mark.parametrize("part", ["initializer", "initargs"])
def test_an_initializer_that_cannot_be_sent_starts_nothing(
    start_method: Any, part: str, started: list[str]
) -> None:
    unsendable = threading.Lock()
    options = {"initializer": unsendable.acquire} if part == "initializer" else {"initargs": (unsendable,)}
    bad = Pool(0, 1, start_method=start_method, **{"initializer": echo, **options})
    refuse(lambda: Dispatcher([Pool(1, 1), bad]), JobNotPicklable, "initializer", "lock")
    assert started == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"priority": "high"}, ConfigTypeError),
        ({"priority": 1.5}, ConfigTypeError),
        ({"id": []}, ConfigTypeError),
        ({"id": True}, ConfigTypeError),
        ({"timeout": 0}, ConfigError),
        ({"timeout": -2}, ConfigError),
        ({"timeout": "1"}, ConfigTypeError),
        ({"retry": 3}, ConfigTypeError),
        ({"delay": 0}, ConfigError),
        ({"delay": -0.1}, ConfigError),
        ({"delay": math.nan}, ConfigError),
        ({"delay": "1"}, ConfigTypeError),
        ({"not_before": datetime(2030, 1, 1)}, ConfigError),  # noqa: DTZ001 - naive is what is wrong
        ({"not_before": "tomorrow"}, ConfigTypeError),
        ({"start_deadline": 0}, ConfigError),
        ({"start_deadline": -1}, ConfigError),
        ({"start_deadline": datetime(2030, 1, 1)}, ConfigError),  # noqa: DTZ001
    ],
    ids=str,
)
def test_bad_options_of_a_job_raise_for_both_shapes_of_jobs(
    shared: Dispatcher, options: dict[str, Any], error: type[BaseException]
) -> None:
    [(name, value)] = options.items()
    refuse(lambda: Job(nothing).options(**options), error, name, repr(value))
    if name != "id":
        refuse(lambda: shared.dispatch(Runnable(**options)), error, name, repr(value))
    assert shared.jobs() == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_attempts": 0}, ConfigError),
        ({"max_attempts": 2.0}, ConfigTypeError),
        ({"initial": -1}, ConfigError),
        ({"factor": 0.5}, ConfigError),
        ({"jitter": 1.5}, ConfigError),
        ({"jitter": -0.1}, ConfigError),
        ({"maximum": -1}, ConfigError),
        ({"maximum": math.inf}, ConfigError),
        ({"retry_on": (3,)}, ConfigTypeError),
        ({"retry_on": "Exception"}, ConfigTypeError),
        ({"retry_on": (int,)}, ConfigTypeError),
    ],
    ids=str,
)
def test_bad_options_of_a_retry_policy_raise(options: dict[str, Any], error: type[BaseException]) -> None:
    [name] = options
    refuse(lambda: RetryPolicy(**{"max_attempts": 3, **options}), error, name)


@pytest.mark.parametrize("job", [None, 5, "job", nothing, Job, dict, object()], ids=named)
def test_what_is_not_a_job_is_refused(shared: Dispatcher, job: Any) -> None:
    for dispatch in (shared.dispatch, shared.try_dispatch):
        refuse(lambda dispatch=dispatch: dispatch(job), ConfigTypeError, "job must be", repr(job)[:20])


def test_a_bare_function_is_refused_with_what_to_write(shared: Dispatcher) -> None:
    refuse(lambda: shared.dispatch(nothing), ConfigTypeError, "write Job(nothing, ...)")


def test_what_cannot_be_called_is_refused() -> None:
    refuse(lambda: Job(5), ConfigTypeError, "fn must be callable, not 5")  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [-1, math.nan, "1", True], ids=str)
def test_a_bad_timeout_is_refused_wherever_one_is_taken(disp: Dispatcher, timeout: Any) -> None:
    tracker = disp.dispatch(Job(nothing))
    tracker.wait()
    for call in (
        lambda: disp.dispatch(Job(nothing), timeout=timeout),
        lambda: disp.barrier(timeout=timeout),
        lambda: disp.finalize(timeout=timeout),
    ):
        before = disp.stats()[0].succeeded
        with pytest.raises(ConfigError, match="timeout"):
            call()
        assert disp.stats()[0].succeeded == before
    assert disp.dispatch(Job(echo, 1)).result() == 1


def test_a_bad_timeout_of_a_wait_is_refused_whether_or_not_the_job_has_settled(disp: Dispatcher) -> None:
    tracker = disp.dispatch(Job(nothing))
    tracker.wait()
    for wait in (tracker.wait, tracker.result, tracker.exception):
        with pytest.raises(ConfigError, match="timeout"):
            wait(-1)


def test_an_unknown_priority_names_it_and_the_known_ones_and_queues_nothing(shared: Dispatcher) -> None:
    job = Job(nothing).options(priority=7, id="seven")
    for call in (
        lambda: shared.dispatch(job),
        lambda: shared.try_dispatch(job),
        lambda: next(iter(shared.dispatch_all([job]))),
        lambda: shared.barrier(7),
    ):
        error = refuse(call, UnknownPriority, "priority 7", "[0]")
        assert isinstance(error, LookupError)
        assert isinstance(error, UnknownPriority)
        assert (error.priority, error.known) == (7, (0,))
    assert shared.jobs() == []


def test_a_job_that_cannot_be_pickled_queues_nothing_and_costs_no_worker(disp: Dispatcher) -> None:
    pids = [worker.pid for worker in disp.stats()[0].processes]
    for _ in range(3):
        refuse(lambda: disp.dispatch(Job(echo, threading.Lock()).options(id="lock")), JobNotPicklable, "lock")
    assert disp.jobs() == []
    assert disp.dispatch(Job(echo, 1).options(id="lock")).result() == 1
    assert [worker.pid for worker in disp.stats()[0].processes] == pids


def test_a_duplicate_live_id_queues_nothing(disp: Dispatcher, gate: Any) -> None:
    live = disp.dispatch(gate.job(id="same"))
    before = disp.stats()[0].running, disp.stats()[0].waiting
    refuse(lambda: disp.dispatch(Job(nothing).options(id="same")), DuplicateJobId, "'same'")
    assert (disp.stats()[0].running, disp.stats()[0].waiting) == before
    assert disp.job("same") is live
    gate.open()


def test_an_unknown_state_names_the_known_ones(shared: Dispatcher) -> None:
    refuse(lambda: shared.jobs("done"), ConfigError, "state", "'done'", "succeeded")


class Runnable:
    """A job object with attributes as asked for."""

    def __init__(self, **attributes: Any) -> None:
        self.priority = 0
        self.__dict__.update(attributes)

    def run(self) -> None:
        raise AssertionError("a job that was refused runs")
