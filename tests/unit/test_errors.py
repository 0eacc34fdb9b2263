"""Errors: what they derive from, that they survive pickling, and groups of them that can be taken apart."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

import bulkhead
from bulkhead import BulkheadError, JobsFailed, PoolBroken, Unrecoverable, WorkerCrashed, errors

FACTS: dict[str, dict[str, Any]] = {
    "UnknownPriority": {"priority": 7, "known": (1, 0)},
    "JobNotFound": {"job_id": ("a", 1)},
    "JobTimeout": {"timeout": 2.5, "pid": 7, "stack": "File x"},
    "WorkerCrashed": {
        "pid": 7,
        "signal": "SIGSEGV",
        "exit_code": None,
        "stack": "File x",
        "peak_rss_bytes": 1 << 30,
        "out_of_memory": True,
        "output": "last words",
    },
    "MemoryLimitExceeded": {"pid": 7, "stack": "File x", "rss_bytes": 3 << 30, "limit_bytes": 1 << 30},
    "BarrierTimeout": {"pending": (1, "two")},
    "RemoteError": {"type_name": "Odd", "traceback": "Traceback"},
    "PoolBroken": {},
}
BUILTINS = {
    "ConfigError": ValueError,
    "ConfigTypeError": TypeError,
    "UnknownPriority": LookupError,
    "DuplicateJobId": ValueError,
    "JobNotPicklable": pickle.PicklingError,
    "PoolFull": TimeoutError,
    "JobNotFound": LookupError,
    "JobTimeout": TimeoutError,
    "WaitTimeout": TimeoutError,
    "StartDeadlineExceeded": TimeoutError,
    "BarrierTimeout": TimeoutError,
    "DispatcherFinalized": RuntimeError,
    "NestedDispatch": RuntimeError,
    "MemoryLimitExceeded": MemoryError,
    "NoWorkerState": LookupError,
    "JobsFailed": ExceptionGroup,
}
PLAIN = [
    one
    for one in vars(errors).values()
    if isinstance(one, type) and issubclass(one, BulkheadError) and one not in (JobsFailed, errors.Snooze)
]


def failed(*excs: Exception, ids: tuple[Any, ...]) -> JobsFailed:
    return JobsFailed(f"{len(excs)} jobs failed", list(excs), job_ids=ids, total=len(excs))


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling_with_all_its_facts(kind: type[BulkheadError], protocol: int) -> None:
    facts = FACTS.get(kind.__name__, {})
    error = kind("what happened", **facts)
    error.add_note("a note")
    found = pickle.loads(pickle.dumps(error, protocol))
    assert type(found) is kind
    assert str(found) == "what happened"
    assert found.args == error.args
    assert {name: getattr(found, name) for name in facts} == facts
    assert found.__notes__ == ["a note"]
    assert vars(copy.copy(error)) == vars(error)


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
def test_every_public_error_is_exported_and_says_what_happened(kind: type[BulkheadError]) -> None:
    assert getattr(bulkhead, kind.__name__) is kind
    assert kind.__doc__


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_an_error_is_caught_by_the_builtin_that_fits(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(bulkhead, name), builtin)
    assert issubclass(getattr(bulkhead, name), BulkheadError)


@pytest.mark.parametrize(
    "kind", [kind for kind in PLAIN if kind.__name__ in FACTS and kind is not errors.JobNotFound]
)
def test_facts_that_are_not_known_have_a_default(kind: type[BulkheadError]) -> None:
    error = kind("what happened")
    for name in FACTS[kind.__name__]:
        if kind is not errors.UnknownPriority or name != "priority":
            assert not getattr(error, name)


def test_users_can_derive_from_unrecoverable() -> None:
    class BadFile(Unrecoverable):
        def __init__(self, path: str) -> None:
            super().__init__(f"{path} is damaged")

    assert str(BadFile("x")) == "x is damaged"


def test_a_remote_traceback_prints_the_workers_traceback() -> None:
    cause = errors.RemoteTraceback("Traceback: there\n")
    assert str(cause) == '\n"""\nTraceback: there\n"""'
    assert pickle.loads(pickle.dumps(cause)).text == cause.text


# JobsFailed


def test_a_group_of_failures_survives_pickling() -> None:
    group = failed(ValueError("a"), WorkerCrashed("b", pid=7), ids=("x", 2))
    found = pickle.loads(pickle.dumps(group))
    assert type(found) is JobsFailed
    assert found.message == "2 jobs failed"
    assert [type(one) for one in found.exceptions] == [ValueError, WorkerCrashed]
    assert found.exceptions[1].pid == 7
    assert (found.job_ids, found.total) == (("x", 2), 2)


def test_a_part_of_a_group_knows_the_ids_of_its_jobs() -> None:
    group = failed(ValueError("a"), KeyError("b"), ValueError("c"), ids=(10, 11, 12))
    values, others = group.split(ValueError)
    assert type(values) is type(others) is JobsFailed
    assert (values.job_ids, values.total) == ((10, 12), 2)
    assert (others.job_ids, others.total) == ((11,), 1)
    assert group.job_ids == (10, 11, 12)


def test_except_star_gets_the_ids_too() -> None:
    seen = {}
    try:
        raise failed(ValueError("a"), KeyError("b"), ids=(1, 2))
    except* ValueError as values:
        seen["values"] = values.job_ids
    except* KeyError as keys:
        seen["keys"] = keys.job_ids
    assert seen == {"values": (1,), "keys": (2,)}


def test_a_job_that_failed_with_a_group_keeps_its_id_in_each_part() -> None:
    nested = ExceptionGroup(
        "several", [ValueError("a"), ExceptionGroup("deeper", [KeyError("b"), OSError("c")])]
    )
    group = failed(nested, KeyError("d"), ids=("nested", "plain"))
    values, others = group.split(ValueError)
    assert values.job_ids == ("nested",)
    assert others.job_ids == ("nested", "plain")
    assert group.subgroup(KeyError).job_ids == ("nested", "plain")


def test_a_part_of_a_pickled_group_still_knows_its_ids() -> None:
    group = pickle.loads(pickle.dumps(failed(ValueError("a"), KeyError("b"), ids=(1, 2))))
    assert group.subgroup(KeyError).job_ids == (2,)


def test_a_part_keeps_traceback_cause_and_notes_as_any_group_does() -> None:
    group = failed(ValueError("a"), KeyError("b"), ids=(1, 2))
    group.add_note("see the log")
    cause = PoolBroken("why")
    try:
        raise group from cause
    except JobsFailed as caught:
        part = caught.subgroup(ValueError)
    assert part.__traceback__ is group.__traceback__
    assert part.__cause__ is cause
    assert part.__notes__ == ["see the log"]


def test_a_group_that_was_made_without_ids_can_be_taken_apart() -> None:
    group = JobsFailed("made by hand", [ValueError("a"), KeyError("b")])
    assert (group.job_ids, group.total) == ((), 0)
    part = group.subgroup(ValueError)
    assert part.job_ids == (None,)


@pytest.mark.parametrize("delay", ["5", None, True, float("nan"), -1])
def test_a_snooze_takes_seconds_and_nothing_else(delay: Any) -> None:
    with pytest.raises(errors.ConfigError, match="delay must be"):
        errors.Snooze(delay)


def test_a_snooze_keeps_its_delay_and_facts_when_it_is_pickled_or_copied() -> None:
    assert bulkhead.Snooze is errors.Snooze
    snooze = errors.Snooze(2.5, why="busy")
    snooze.add_note("a note")
    for same in (pickle.loads(pickle.dumps(snooze)), copy.copy(snooze)):
        assert (same.delay, same.why, str(same)) == (2.5, "busy", "snoozed for 2.5 s")
        assert same.__notes__ == ["a note"]
