"""A task: a function that an application knows by name, and what is to be done with its jobs. A call: one such job."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, TypeVar

from bulkhead import validate
from bulkhead.errors import ConfigError, ConfigTypeError
from bulkhead.retry import Backoff, RetryPolicy

if TYPE_CHECKING:
    from bulkhead.service.app import App

__all__ = ["DEFAULT_BACKOFF", "Callback", "Call", "Task", "TaskOptions", "job_id", "name"]

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_BACKOFF = Backoff()

LONGEST_NAME = 200
_PRIORITIES = 100

# Called in the consumer's process with the job's id and, where the row says so, the failure.
Callback = Callable[..., object]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What is to be done with the jobs of a task; see `App.task`."""

    queue: str = "default"
    priority: int = 0
    max_retries: int = 3
    timeout: float | None = None
    backoff: Backoff = DEFAULT_BACKOFF
    keep_result: float = 86400.0
    on_processing: Callback | None = None
    on_success: Callback | None = None
    on_retry: Callback | None = None
    on_failure: Callback | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "queue", name("queue", self.queue))
        put(self, "priority", priority(self.priority))
        put(
            self,
            "max_retries",
            _retries(self.max_retries),
        )
        if self.timeout is not None:
            put(self, "timeout", validate.seconds("timeout", self.timeout))
        put(self, "backoff", _backoff(self.backoff))
        put(self, "keep_result", validate.seconds("keep_result", self.keep_result, zero=True))
        for option in ("on_processing", "on_success", "on_retry", "on_failure"):
            if getattr(self, option) is not None:
                validate.function(option, getattr(self, option))


class Task(Generic[P, R]):
    """A function that an application knows by name. `App.task` makes it.

    Called directly it is the function. It is pickled as a function is: by its module and name.

    Attributes:
        name: By which jobs refer to it.
        options: What is to be done with its jobs.
    """

    def __init__(self, app: App, fn: Callable[P, R], task_name: str, options: TaskOptions) -> None:
        functools.update_wrapper(self, fn, updated=())
        # What the function has of its own is the task's, too, but for what would hide a method of ours.
        self.__dict__.update(
            {name: value for name, value in getattr(fn, "__dict__", {}).items() if not hasattr(Task, name)}
        )
        self.handler: Callable[..., Any] | None = (
            None  # with the middlewares around it; of the worker process
        )
        self.app = app
        self.fn = fn
        self.name = task_name
        self.options = options

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function here and now."""
        return self.fn(*args, **kwargs)

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call:
        """Return a job of this task, to be given to `App.enqueue_many`, a group, a chain or a schedule."""
        return Call(self, args, kwargs)

    def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Enqueue a job and return its id.

        Raises:
            ConfigTypeError: The arguments cannot be encoded.
            MessageTooLarge, BrokerUnavailable: See there.
        """
        return self.app.enqueue(self.call(*args, **kwargs))

    def __reduce__(self) -> str:
        return self.fn.__qualname__

    def __repr__(self) -> str:
        return f"<Task {self.name}>"


class Call(NamedTuple):
    """A job of a task that is not enqueued: `task.call(...)`. Immutable; may be enqueued many times."""

    task: Task[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    id: str | None = None
    queue: str | None = None
    priority: int | None = None
    delay: float = 0.0
    due_at: float | None = None
    timeout: float | None = None
    max_retries: int | None = None
    backoff: Backoff | None = None
    keep_result: float | None = None
    follows: tuple[tuple[str, Call], ...] = ()
    headers: Mapping[str, str] | None = None

    def options(
        self,
        *,
        id: str | None = None,  # noqa: A002 - as of Job.options
        queue: str | None = None,
        priority: int | None = None,
        delay: float | None = None,
        eta: datetime | float | None = None,
        timeout: float | None = None,
        max_retries: int | None = None,
        backoff: Backoff | None = None,
        keep_result: float | None = None,
        on_success: Call | None = None,
        on_error: Call | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Call:
        """Return a copy with these options added to those it has; what is not named is as the task says.

        Args:
            id: Own id, 1 to 200 characters, instead of a random one. One that is taken is not doubled.
            queue: Another queue than the task's.
            priority: Within the queue, -100 to 100; a larger one starts first.
            delay: Earliest start in seconds from the enqueue, at least 0.
            eta: Earliest start as an aware datetime or POSIX timestamp; a past one means at once.
            timeout: Longest run of one attempt in seconds.
            max_retries: How many attempts may follow the first, at least 0.
            backoff: Pauses between attempts.
            keep_result: Seconds for which its outcome is kept, at least 0; 0 keeps none.
            on_success: A job that follows when this one has succeeded, with its result as first argument.
            on_error: One that follows when this one has failed for good; its first argument is a list of the error's
                type, message and traceback.
            headers: Texts that travel with the job, for middlewares.

        Raises:
            ConfigError: A value cannot work; the message names the option.
        """
        if delay is not None and eta is not None:
            raise ConfigError(f"delay={delay!r} and eta={eta!r} exclude each other")
        changes: dict[str, Any] = {}
        checks: list[tuple[str, Any, Callable[[Any], Any]]] = [
            ("id", id, job_id),
            ("queue", queue, lambda v: name("queue", v)),
            ("priority", priority, globals()["priority"]),
            ("delay", delay, lambda v: validate.seconds("delay", v, zero=True)),
            ("due_at", eta, _posix),
            ("timeout", timeout, lambda v: validate.seconds("timeout", v)),
            ("max_retries", max_retries, _retries),
            ("backoff", backoff, _backoff),
            ("keep_result", keep_result, lambda v: validate.seconds("keep_result", v, zero=True)),
            ("headers", headers, _headers),
        ]
        for option, value, check in checks:
            if value is not None:
                changes[option] = check(value)
        if delay is not None:
            changes["due_at"] = None
        elif eta is not None:
            changes["delay"] = 0.0
        added = tuple(
            (option, _call(option, value))
            for option, value in (("on_success", on_success), ("on_error", on_error))
            if value is not None
        )
        return self._replace(follows=self.follows + added, **changes)

    def enqueue(self) -> str:
        """Enqueue it and return its id.

        Raises:
            DuplicateJobId: Its own id is taken; nothing was enqueued.
            ConfigTypeError, MessageTooLarge, BrokerUnavailable: See `Task.enqueue`.
        """
        return self.task.app.enqueue(self)


def job_id(value: object) -> str:
    """Return a job's id, checked."""
    return name("id", value)


def name(option: str, value: object) -> str:
    """Return a name of the user's, checked: 1 to 200 characters that can be printed."""
    if not isinstance(value, str):
        raise ConfigTypeError(
            f"{option} must be a str, not {validate.shown(value)} of type {type(value).__name__}"
        )
    if not 1 <= len(value) <= LONGEST_NAME:
        raise ConfigError(f"{option} must have 1 to {LONGEST_NAME} characters, not {len(value)}")
    if not value.isprintable():
        raise ConfigError(f"{option} must have only characters that can be printed, not {value!r}")
    return value


def priority(value: object) -> int:
    """Return a priority within a queue, checked."""
    return validate.whole_number("priority", value, at_least=-_PRIORITIES, at_most=_PRIORITIES)


def _retries(value: object) -> int:
    return validate.whole_number("max_retries", value, at_least=0, at_most=2**31)


def _posix(value: object) -> float:
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ConfigError(f"eta must be an aware datetime (with tzinfo), not {value!r}")
        return value.timestamp()
    return validate.seconds("eta", value, zero=True)


def _backoff(value: object) -> Backoff:
    if not isinstance(value, Backoff):
        raise ConfigTypeError(f"backoff must be a Backoff, not {validate.shown(value)}")
    if isinstance(value, RetryPolicy):
        # Why: what else it says would be passed over in silence.
        raise ConfigTypeError(
            "backoff must be a Backoff, not a RetryPolicy: attempts are said by max_retries"
        )
    return value


def _headers(value: Any) -> Mapping[str, str]:
    if not isinstance(value, Mapping) or not all(
        isinstance(text, str) for pair in value.items() for text in pair
    ):
        raise ConfigTypeError(f"headers must map str to str, not {value!r}")
    return {validate.text("headers", one): validate.text("headers", text) for one, text in value.items()}


def _call(option: str, value: object) -> Call:
    if not isinstance(value, Call):
        raise ConfigTypeError(
            f"{option} must be a job as task.call(...) makes it, not {validate.shown(value)}"
        )
    return value
