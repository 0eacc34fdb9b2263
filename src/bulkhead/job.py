"""What to run: a function with its arguments, or any picklable object with `run()` and `priority`."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Hashable, Iterable
from datetime import datetime
from typing import Any

from bulkhead import validate
from bulkhead.errors import ConfigError, ConfigTypeError
from bulkhead.retry import RetryPolicy

__all__ = [
    "FOLLOW_UPS",
    "Composition",
    "Job",
    "Options",
    "call_of",
    "fed_call_of",
    "initialize",
    "name_of",
    "name_of_job",
    "options_of",
    "run_each",
    "run_object",
    "times_of",
]

Options = dict[str, Any]
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

_NO_OPTIONS: Options = {}

# Options that name what is dispatched when the job has settled.
FOLLOW_UPS = ("on_success", "on_failure")


class Composition:
    """Jobs that are dispatched together; see composition.py."""

    __slots__ = ()


class Job:
    """A function call to be run in a worker.

    The function and its arguments are pickled when the job is dispatched, so a Job can be dispatched many times and
    later changes of its arguments do not reach runs under way.

    Args:
        fn: The function; importable by name in the worker, or any closure when cloudpickle is installed.
        *args: Its positional arguments.
        **kwargs: Its keyword arguments.

    Example:
        >>> Job(pow, 2, 10).options(priority=1, timeout=5.0)
        Job(pow, 2, 10).options(priority=1, timeout=5.0)
    """

    __slots__ = ("call", "checked")

    def __init__(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        if not callable(fn):
            validate.function("fn", fn)
        self.call = fn, args, kwargs
        self.checked = _NO_OPTIONS

    def options(
        self,
        *,
        priority: int | None = None,
        id: Hashable | None = None,  # noqa: A002 - the fixed public name
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
        delay: float | None = None,
        not_before: datetime | float | None = None,
        start_deadline: datetime | float | None = None,
        on_success: Any = None,
        on_failure: Any = None,
    ) -> Job:
        """Return a copy of the job with these options added to those it has.

        Args:
            priority: The pool; by default the only pool, else pool 0.
            id: Own id instead of the next number; must be unique among live jobs.
            timeout: Longest run of one attempt in seconds.
            retry: When to try again after a failure.
            delay: Earliest start in seconds after the dispatch, above 0.
            not_before: Earliest start as an aware datetime or POSIX timestamp; a past one means at once.
            start_deadline: Latest start, as an aware datetime or in seconds after the dispatch; a job that has not
                started by then fails with StartDeadlineExceeded.
            on_success: A job (or a group or chain) that follows when this one has succeeded; it gets the result as its
                first argument. `Tracker.follow_up` tracks it.
            on_failure: One that follows when this one has failed, its retries included; it gets the exception. A
                cancelled job is followed by neither.

        Raises:
            ConfigError: A value cannot work; the message names the option.
        """
        given = {
            "priority": priority,
            "id": id,
            "timeout": timeout,
            "retry": retry,
            "delay": delay,
            "not_before": not_before,
            "start_deadline": start_deadline,
            "on_success": on_success,
            "on_failure": on_failure,
        }
        job = Job(self.fn)
        job.call = self.call
        job.checked = _checked({**self.checked, **{k: v for k, v in given.items() if v is not None}})
        return job

    @property
    def fn(self) -> Callable[..., Any]:
        """The function."""
        return self.call[0]

    @property
    def args(self) -> tuple[Any, ...]:
        """Its positional arguments."""
        return self.call[1]

    @property
    def kwargs(self) -> dict[str, Any]:
        """Its keyword arguments."""
        return self.call[2]

    def __repr__(self) -> str:
        named = getattr(self.fn, "__qualname__", repr(self.fn))
        parts = [named, *map(repr, self.args), *(f"{k}={v!r}" for k, v in self.kwargs.items())]
        text = f"Job({', '.join(parts)})"
        if self.checked:
            text += f".options({', '.join(f'{k}={v!r}' for k, v in self.checked.items())})"
        return text


def call_of(job: object) -> Call:
    """Return what the worker has to call for `job`.

    Raises:
        ConfigTypeError: It is neither a Job nor an object with a `run` method.
    """
    if isinstance(job, Job):
        return job.call
    if isinstance(job, type) or not callable(getattr(job, "run", None)):
        hint = f"; for a function write Job({getattr(job, '__name__', 'fn')}, ...)" if callable(job) else ""
        raise ConfigTypeError(
            f"job must be a Job or an object with run() and priority, not {job!r} of type {type(job).__name__}{hint}"
        )
    return run_object, (job,), {}


def fed_call_of(job: object) -> Call:
    """Return what the worker has to call for a job that gets something as its first argument: of an object its `run`.

    Raises:
        ConfigTypeError: It is neither a Job nor an object with a `run` method.
    """
    call = call_of(job)
    return call if isinstance(job, Job) else (job.run, (), {})  # type: ignore[attr-defined]


def options_of(job: object) -> Options:
    """Return the checked options that a job brings: those of a Job, or the attributes of a run object.

    An attribute `id` of a run object is not taken for the job's id: too many classes have one of their own meaning. Nor
    are follow-up jobs, which so cannot refer to themselves.
    """
    if isinstance(job, Job):
        return job.checked
    found = {name: getattr(job, name, None) for name in _CHECKS if name not in _OF_JOBS_ALONE}
    return _checked({name: value for name, value in found.items() if value is not None})


def name_of(fn: Callable[..., Any], args: tuple[Any, ...] = ()) -> str:
    """Return what a call is named for who watches: its function, or the class of an object with `run()`."""
    if fn is run_object and args:
        return type(args[0]).__qualname__
    if isinstance(fn, functools.partial):
        return name_of(fn.func)
    name = getattr(fn, "__qualname__", None)
    return name if type(name) is str else type(fn).__qualname__


def name_of_job(job: object) -> str:
    """Return what a job is named for who watches."""
    return name_of(job.fn) if isinstance(job, Job) else type(job).__qualname__


def run_object(job: Any) -> Any:
    """Run a job object in the worker."""
    return job.run()


def run_each(fn: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Call a function with each of the arguments, in the worker."""
    return [fn(*args) for args in calls]


def initialize(initializer: Callable[..., object], /, *args: Any) -> object:
    """Call an executor's initializer in the worker; log its error as the standard library's workers do."""
    try:
        return initializer(*args)
    except BaseException:
        logging.getLogger("concurrent.futures").critical("Exception in initializer:", exc_info=True)
        raise


def times_of(options: Options) -> tuple[float | None, float | None]:
    """Return earliest and latest start, in monotonic seconds, of a job that is dispatched, or fed, now."""
    due = start_by = None
    if "delay" in options:
        due = time.monotonic() + options["delay"]
    elif "not_before" in options:
        due = time.monotonic() + _seconds_until(options["not_before"])
    if "start_deadline" in options:
        value = options["start_deadline"]
        is_instant = isinstance(value, datetime)
        start_by = time.monotonic() + (_seconds_until(value) if is_instant else value)
    return due, start_by


def _seconds_until(instant: datetime | float) -> float:
    posix = instant.timestamp() if isinstance(instant, datetime) else instant
    return posix - time.time()


def _checked(options: Options) -> Options:
    if "delay" in options and "not_before" in options:
        raise ConfigError(
            f"delay={options['delay']!r} and not_before={options['not_before']!r} exclude each other"
        )
    return {name: _CHECKS[name](name, value) for name, value in options.items()}


def _job_id(option: str, value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        raise ConfigTypeError(f"{option} must be hashable, not {value!r}") from None
    if isinstance(value, bool):
        raise ConfigTypeError(f"{option} must not be a bool: {value!r}")
    return value  # type: ignore[no-any-return]


def _policy(option: str, value: Any) -> RetryPolicy:
    if not isinstance(value, RetryPolicy):
        raise ConfigTypeError(f"{option} must be a RetryPolicy, not {value!r}")
    return value


def _instant(option: str, value: Any) -> datetime | float:
    if not isinstance(value, datetime):
        return validate.seconds(option, value)
    if value.tzinfo is None:
        raise ConfigError(f"{option} must be an aware datetime (with tzinfo), not {value!r}")
    return value


def _follow_up(option: str, value: Any) -> Any:
    if not isinstance(value, Composition):
        try:
            call_of(value)
        except ConfigTypeError as error:
            raise ConfigTypeError(f"{option}: {error}") from None
    return value


_OF_JOBS_ALONE = ("id", *FOLLOW_UPS)

_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "priority": validate.whole_number,
    "id": _job_id,
    "timeout": validate.seconds,
    "retry": _policy,
    "delay": validate.seconds,
    "not_before": _instant,
    "start_deadline": _instant,
    "on_success": _follow_up,
    "on_failure": _follow_up,
}
