"""Every option value that cannot work raises a typed error that names the option and the value (A10)."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import re
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from parameters import named as named_parameter

from bulkhead import ConfigError, ConfigTypeError, Dispatcher, Job, Pool, RetryPolicy, Unrecoverable
from bulkhead.config import niceness_step, pools_from
from bulkhead.job import call_of, options_of, run_object

INFINITE, NOT_A_NUMBER = math.inf, math.nan
TYPE_ERROR, VALUE_ERROR = ConfigTypeError, ConfigError
NAIVE = datetime(2030, 1, 1)  # noqa: DTZ001 - refused for being naive
AWARE = datetime(2030, 1, 1, tzinfo=UTC)

NOT_SECONDS = [
    (0, VALUE_ERROR),
    (-1.5, VALUE_ERROR),
    (INFINITE, VALUE_ERROR),
    (NOT_A_NUMBER, VALUE_ERROR),
    (True, TYPE_ERROR),
    ("5", TYPE_ERROR),
    ([1], TYPE_ERROR),
    (1j, TYPE_ERROR),
]
NOT_WHOLE = [(1.0, TYPE_ERROR), ("1", TYPE_ERROR), (True, TYPE_ERROR), (None, TYPE_ERROR)]

BAD_POOLS = [
    *(("priority", value, kind) for value, kind in NOT_WHOLE),
    *(("n_workers", value, kind) for value, kind in [*NOT_WHOLE, (0, VALUE_ERROR), (-3, VALUE_ERROR)]),
    *(
        ("backlog", value, kind)
        for value, kind in [(-1, VALUE_ERROR), (INFINITE, TYPE_ERROR), ("9", TYPE_ERROR)]
    ),
    *(("timeout", value, kind) for value, kind in NOT_SECONDS),
    ("name", 5, TYPE_ERROR),
    ("name", b"x", TYPE_ERROR),
    ("retry", 3, TYPE_ERROR),
    ("retry", RetryPolicy, TYPE_ERROR),
    ("nice", 20, VALUE_ERROR),
    ("nice", -21, VALUE_ERROR),
    ("nice", 1.5, TYPE_ERROR),
    *(
        (option, value, kind)
        for option in ("max_jobs_per_worker", "max_memory_per_worker", "hard_memory_limit")
        for value, kind in [
            (0, VALUE_ERROR),
            (-1, VALUE_ERROR),
            (True, TYPE_ERROR),
            ("1 GB", TYPE_ERROR),
            (1e9, TYPE_ERROR),
            (INFINITE, TYPE_ERROR),
        ]
    ),
    ("cpus", 1, TYPE_ERROR),
    ("cpus", "01", TYPE_ERROR),
    ("cpus", [-1], VALUE_ERROR),
    ("cpus", [10**6], VALUE_ERROR),
    ("cpus", [0, 0], VALUE_ERROR),
    ("initializer", "setup", TYPE_ERROR),
    ("initargs", "abc", TYPE_ERROR),
    ("initargs", {1: 2}, TYPE_ERROR),
    ("start_method", "thread", VALUE_ERROR),
    ("start_method", 7, VALUE_ERROR),
    ("start_method", ["fork"], VALUE_ERROR),
    ("capture_output", "loud", VALUE_ERROR),
    ("capture_output", None, TYPE_ERROR),
    ("capture_output", 1, TYPE_ERROR),
    ("forward_logging", "yes", TYPE_ERROR),
    ("forward_logging", None, TYPE_ERROR),
]

BAD_POLICIES = [
    *(("max_attempts", value, kind) for value, kind in [*NOT_WHOLE, (0, VALUE_ERROR), (-1, VALUE_ERROR)]),
    *(
        (name, value, kind)
        for name in ("initial", "jitter", "maximum")
        for value, kind in NOT_SECONDS
        if value != 0
    ),
    *(("factor", value, kind) for value, kind in NOT_SECONDS),
    ("factor", 0.5, VALUE_ERROR),
    ("jitter", 1.5, VALUE_ERROR),
    ("retry_on", "ValueError", TYPE_ERROR),
    ("retry_on", [ValueError], TYPE_ERROR),
    ("retry_on", ValueError("x"), TYPE_ERROR),
]

BAD_OPTIONS = [
    *(("priority", value, kind) for value, kind in NOT_WHOLE if value is not None),
    *((name, value, kind) for name in ("timeout", "delay") for value, kind in NOT_SECONDS),
    *((name, value, kind) for name in ("not_before", "start_deadline") for value, kind in NOT_SECONDS),
    ("not_before", NAIVE, VALUE_ERROR),
    ("start_deadline", NAIVE, VALUE_ERROR),
    ("retry", 3, TYPE_ERROR),
    ("id", [1], TYPE_ERROR),
    ("id", True, TYPE_ERROR),
]


def named(entry: object) -> str:
    return repr(entry) if not isinstance(entry, type) else entry.__name__


def assert_names(error: ConfigError, option: str, value: object, kind: type[ConfigError]) -> None:
    assert type(error) is kind
    assert isinstance(error, ValueError)
    assert option in str(error)
    assert repr(value) in str(error)


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test when a dispatcher makes a pool."""

    def start(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a pool was made")

    monkeypatch.setattr("bulkhead.dispatcher.ProcessPool", start)


class Runnable:
    """A job of the shape that brings its options as attributes."""

    def __init__(self, **options: Any) -> None:
        self.__dict__.update(options)

    def run(self) -> str:
        return "ran"


# Pool


@pytest.mark.parametrize(("option", "value", "kind"), BAD_POOLS, ids=named)
def test_a_pool_refuses_a_value_that_cannot_work(option: str, value: Any, kind: type[ConfigError]) -> None:
    with pytest.raises(ConfigError) as caught:
        Pool(**{"priority": 0, "n_workers": 1, option: value})
    assert_names(caught.value, option, value, kind)


def test_a_number_of_workers_of_too_many_digits_to_show_is_refused() -> None:
    with pytest.raises(ConfigError, match="n_workers must be at most 10000"):
        Pool(0, 10**5000)


def test_a_pool_takes_every_value_that_can_work() -> None:
    retry = RetryPolicy(2)
    pool = Pool(
        -7,
        3,
        backlog=None,
        name="thumbnails",
        timeout=Fraction(1, 2),
        retry=retry,
        nice=-20,
        initializer=print,
        initargs=["ready"],
        start_method="spawn",
        capture_output="plain",
        forward_logging=True,
    )
    assert (pool.priority, pool.n_workers, pool.backlog) == (-7, 3, None)
    assert (pool.timeout, pool.retry, pool.nice) == (0.5, retry, -20)
    assert pool.initargs == ("ready",)
    assert pool.label == "thumbnails"
    assert Pool(4, 1).label == "pool 4"


def test_numbers_of_other_types_become_plain_ones() -> None:
    class Three:
        def __index__(self) -> int:
            return 3

    pool = Pool(Three(), Three(), timeout=Decimal("1.5"))
    assert type(pool.priority) is type(pool.n_workers) is int
    assert (pool.priority, pool.n_workers, pool.timeout) == (3, 3, 1.5)


def test_a_pool_is_a_frozen_value() -> None:
    pool = Pool(0, 1, name="a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        pool.n_workers = 2
    assert pool == Pool(0, 1, name="a")
    assert hash(pool) == hash(Pool(0, 1, name="a"))
    assert pickle.loads(pickle.dumps(pool)) == pool
    assert dataclasses.replace(pool, n_workers=2).n_workers == 2
    with pytest.raises(ConfigError, match="n_workers"):
        dataclasses.replace(pool, n_workers=0)


@pytest.mark.parametrize("cpus", [[True], ["0"], [0.0], [None]], ids=repr)
def test_cpus_are_whole_numbers(cpus: Any) -> None:
    with pytest.raises(ConfigTypeError, match="cpus must be a whole number") as caught:
        Pool(0, 1, cpus=cpus)
    assert repr(cpus[0]) in str(caught.value)


@pytest.mark.parametrize("cpus", [(), [], set(), range(0)], ids=repr)
def test_no_cpu_at_all_is_refused(cpus: Any) -> None:
    with pytest.raises(ConfigError, match="cpus must name at least one CPU"):
        Pool(0, 1, cpus=cpus)


def test_the_usable_cpus_are_named_where_another_one_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=rf"cpus .*{re.escape(str(sorted(os.sched_getaffinity(0))))}"):
        Pool(0, 1, cpus=[10**6])


def test_cpus_may_come_in_any_iterable_and_in_any_order() -> None:
    mine = sorted(os.sched_getaffinity(0))
    for given in (mine, reversed(mine), set(mine), tuple(mine), iter(mine)):
        assert Pool(0, 1, cpus=given).cpus == tuple(mine)


def test_a_system_that_does_not_let_cpus_be_chosen_is_told_of_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(ConfigError, match="cpus is not supported on this system"):
        Pool(0, 1, cpus=[0])


def test_a_soft_limit_beyond_the_hard_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_memory_per_worker=3 .* hard_memory_limit=2") as caught:
        Pool(0, 1, max_memory_per_worker=3, hard_memory_limit=2)
    assert type(caught.value) is ConfigError
    pool = Pool(0, 1, max_memory_per_worker=2, hard_memory_limit=2, max_jobs_per_worker=1)
    assert (pool.max_memory_per_worker, pool.hard_memory_limit, pool.max_jobs_per_worker) == (2, 2, 1)


# The pools of a dispatcher


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("pools", "words"),
    [
        ([], ["pools", "none"]),
        (None, ["pools", "None"]),
        (5, ["pools", "5"]),
        ("01", ["pools", "'01'"]),
        (Pool(0, 1), ["pools", "Pool("]),
        ([(0, 1), 7], ["pools", "7"]),
        ([(0, 1, 2)], ["pools", "(0, 1, 2)"]),
        ([(0,)], ["pools", "(0,)"]),
        ([[0, 1]], ["pools", "[0, 1]"]),
        ([(0, 0)], ["n_workers", "0"]),
        ([(0, -2)], ["n_workers", "-2"]),
        ([("0", 1)], ["priority", "'0'"]),
        ([(3, 1), Pool(3, 2)], ["priority", "3", "two pools"]),
        ([(3, 1), (0, 1), (3, 1)], ["priority", "3", "two pools"]),
    ],
    ids=repr,
)
def test_a_dispatcher_refuses_pools_that_cannot_work_and_starts_nothing(pools: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Dispatcher(pools)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        *(("job_expiry", value, kind) for value, kind in NOT_SECONDS),
        ("max_history", -1, VALUE_ERROR),
        ("max_history", 1.5, TYPE_ERROR),
        ("max_history", None, TYPE_ERROR),
    ],
    ids=named,
)
def test_a_dispatcher_refuses_options_that_cannot_work_and_starts_nothing(
    option: str, value: Any, kind: type[ConfigError]
) -> None:
    with pytest.raises(ConfigError) as caught:
        Dispatcher([(0, 1)], **{option: value})
    assert_names(caught.value, option, value, kind)


def test_pools_may_come_from_any_iterable_and_are_ranked_by_priority() -> None:
    made = pools_from(entry for entry in [(-1, 1), Pool(5, 2), (0, 3)])
    assert [(pool.priority, pool.n_workers) for pool in made] == [(5, 2), (0, 3), (-1, 1)]


def test_the_most_urgent_pool_is_not_niced_and_the_others_more_the_lower_they_rank() -> None:
    steps = [niceness_step(rank) for rank in range(10)]
    assert steps[0] == 0
    assert steps == sorted(steps)
    assert steps[1] > 0
    assert max(steps) <= 19


# RetryPolicy


@pytest.mark.parametrize(("option", "value", "kind"), BAD_POLICIES, ids=named)
def test_a_retry_policy_refuses_a_value_that_cannot_work(
    option: str, value: Any, kind: type[ConfigError]
) -> None:
    with pytest.raises(ConfigError) as caught:
        RetryPolicy(**{"max_attempts": 3, option: value})
    assert_names(caught.value, option, value, kind)


def test_the_one_wrong_type_in_retry_on_is_named() -> None:
    with pytest.raises(ConfigTypeError, match="retry_on must be exception types, not <class 'int'>"):
        RetryPolicy(3, retry_on=(ValueError, int))


def test_the_defaults_of_a_retry_policy_are_the_documented_ones() -> None:
    policy = RetryPolicy(3)
    assert (policy.initial, policy.factor, policy.jitter, policy.maximum) == (1.0, 1.6, 0.2, 3600.0)
    assert policy.retry_on == (Exception,)


def test_pauses_grow_from_attempt_to_attempt_up_to_the_maximum() -> None:
    policy = RetryPolicy(9, initial=1.0, factor=2.0, jitter=0.0, maximum=10.0)
    assert [policy.pause(attempt, 0.5) for attempt in range(1, 7)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


@pytest.mark.parametrize(("draw", "pause"), [(0.0, 0.8), (0.25, 0.9), (0.5, 1.0), (0.75, 1.1), (1.0, 1.2)])
def test_a_pause_is_spread_evenly_over_the_jitter(draw: float, pause: float) -> None:
    assert RetryPolicy(2).pause(1, draw) == pytest.approx(pause)


def test_jitter_never_exceeds_the_maximum() -> None:
    policy = RetryPolicy(2, initial=10.0, maximum=10.0, jitter=1.0)
    assert policy.pause(1, 0.999) == 10.0
    assert policy.pause(1, 0.0) == 0.0


@pytest.mark.parametrize("attempt", [1, 2, 1000, 2000, 10**6])
def test_no_attempt_is_too_many_for_a_pause(attempt: int) -> None:
    assert RetryPolicy(10**7, initial=0).pause(attempt, 0.5) == 0.0
    assert 0 < RetryPolicy(10**7, jitter=0).pause(attempt, 0.5) <= 3600.0


def test_a_single_exception_type_will_do_for_retry_on() -> None:
    assert RetryPolicy(2, retry_on=OSError).retry_on == (OSError,)


@pytest.mark.parametrize(
    ("attempt", "error", "is_allowed"),
    [
        (1, OSError(), True),
        (1, FileNotFoundError(), True),
        (2, OSError(), True),
        (3, OSError(), False),
        (1, ValueError(), False),
        (1, Unrecoverable(), False),
    ],
    ids=repr,
)
def test_another_attempt_is_allowed_by_number_and_type(
    attempt: int, error: Exception, is_allowed: bool
) -> None:
    assert RetryPolicy(3, retry_on=(OSError, Unrecoverable)).allows(attempt, error) is is_allowed


# Job


@pytest.mark.parametrize(("option", "value", "kind"), BAD_OPTIONS, ids=named)
def test_a_job_refuses_an_option_that_cannot_work(option: str, value: Any, kind: type[ConfigError]) -> None:
    with pytest.raises(ConfigError) as caught:
        Job(print).options(**{option: value})
    assert_names(caught.value, option, value, kind)


@pytest.mark.parametrize(
    ("option", "value", "kind"), [entry for entry in BAD_OPTIONS if entry[0] != "id"], ids=named
)
def test_an_object_with_run_is_checked_like_a_job(option: str, value: Any, kind: type[ConfigError]) -> None:
    with pytest.raises(ConfigError) as caught:
        options_of(Runnable(**{option: value}))
    assert_names(caught.value, option, value, kind)


def test_delay_and_not_before_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"delay=1\.0 and not_before="):
        Job(print).options(delay=1).options(not_before=AWARE)
    with pytest.raises(ConfigError, match="delay=1 and not_before="):
        options_of(Runnable(delay=1, not_before=AWARE))


@pytest.mark.parametrize("fn", [5, None, "print"])
def test_a_job_wants_something_to_call(fn: Any) -> None:
    with pytest.raises(ConfigTypeError, match=f"fn must be callable, not {fn!r}"):
        Job(fn)


@pytest.mark.parametrize("job", [None, 5, "job", print, lambda: 1, Runnable, object()], ids=named_parameter)
def test_what_is_no_job_is_refused_with_a_hint_where_one_fits(job: Any) -> None:
    with pytest.raises(ConfigTypeError) as caught:
        call_of(job)
    assert_names(caught.value, "job", job, ConfigTypeError)
    assert ("write Job(" in str(caught.value)) == callable(job)


def test_options_add_up_and_leave_the_first_job_as_it_was() -> None:
    first = Job(pow, 2, 10)
    second = first.options(priority=1, timeout=5).options(
        timeout=6, id="x", not_before=AWARE, start_deadline=9
    )
    assert options_of(first) == {}
    assert options_of(second) == {
        "priority": 1,
        "timeout": 6.0,
        "id": "x",
        "not_before": AWARE,
        "start_deadline": 9.0,
    }
    assert call_of(second) == (pow, (2, 10), {})


def test_a_function_may_have_arguments_of_any_name() -> None:
    job = Job(dict, fn=1, args=2, kwargs=3, self=4, options=5, id=6)
    fn, args, kwargs = call_of(job)
    assert fn(*args, **kwargs) == {"fn": 1, "args": 2, "kwargs": 3, "self": 4, "options": 5, "id": 6}


def test_an_object_with_run_brings_its_options_and_keeps_its_own_id() -> None:
    retry = RetryPolicy(2)
    job = Runnable(priority=3, timeout=2, retry=retry, delay=0.5, start_deadline=4, id="mine")
    assert options_of(job) == {
        "priority": 3,
        "timeout": 2.0,
        "retry": retry,
        "delay": 0.5,
        "start_deadline": 4.0,
    }
    fn, args, kwargs = call_of(job)
    assert fn is run_object
    assert fn(*args, **kwargs) == "ran"


def test_a_job_shows_what_it_would_run() -> None:
    job = Job(pow, 2, mod=7).options(priority=1, id="x")
    assert repr(job) == "Job(pow, 2, mod=7).options(priority=1, id='x')"


def test_a_job_survives_pickling() -> None:
    job = pickle.loads(pickle.dumps(Job(pow, 2, 10).options(priority=1)))
    assert call_of(job) == (pow, (2, 10), {})
    assert options_of(job) == {"priority": 1}
