"""`DiscardInvalid`: a job whose arguments cannot be right is not run, and not tried again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import msgspec.inspect

from bulkhead.errors import ConfigError, ConfigTypeError, JobDiscarded
from bulkhead.service.middleware.base import Middleware
from bulkhead.service.task import name

if TYPE_CHECKING:
    from bulkhead.service.app import App
    from bulkhead.service.context import JobContext

__all__ = ["DiscardInvalid"]

_WITH_FIELDS = (msgspec.inspect.StructType, msgspec.inspect.DataclassType, msgspec.inspect.TypedDictType)

# A function that is called with the task's arguments, or a type that takes them by name.
Check = Callable[..., object] | type


class DiscardInvalid(Middleware):
    """Drop a job whose arguments do not fit its task, or do not pass the task's check.

    It has failed then, with the reason; no attempt follows and no dead letter is kept. Checked in the worker process,
    so that a check that takes long, or dies of what it sees, holds up no other job.

    Args:
        checks: By name of the task, either a function, called as the task is, which raises an exception or returns
            False for what is wrong; or a type such as a msgspec.Struct, a dataclass or a TypedDict, whose fields are
            the task's parameters, to which `msgspec.convert` must be able to convert them. The task gets its arguments
            as they were. Jobs of other tasks are only looked at for whether their arguments fit their parameters.

    Raises:
        ConfigError: A check is neither.
    """

    def __init__(self, checks: Mapping[str, Check]) -> None:
        if not isinstance(checks, Mapping):
            raise ConfigTypeError(f"checks must map names of tasks to functions or types, not {checks!r}")
        self._checks = {name("a task in checks", task): _check(task, check) for task, check in checks.items()}
        self._signatures: dict[str, inspect.Signature] = {}

    def attach(self, app: App) -> None:
        """See `Middleware`."""
        self._app = app

    def started(self, queues: Sequence[str]) -> None:
        """See `Middleware`.

        Raises:
            ConfigError: There is no task of a name that has a check.
        """
        unknown = self._checks.keys() - self._app.tasks().keys()
        if unknown:
            raise ConfigError(f"DiscardInvalid has a check for {min(unknown)!r}, and there is no such task")

    def handle(self, job: JobContext, forward: Callable[[JobContext], Any]) -> Any:
        """See `Middleware`."""
        args, kwargs = job.arguments()
        try:
            bound = self._signature(job.task).bind(*args, **kwargs)
        except TypeError as error:
            raise JobDiscarded(f"invalid arguments: {error}") from error
        check = self._checks.get(job.task)
        if check is not None:
            check(bound)
        return forward(job)

    def _signature(self, task: str) -> inspect.Signature:
        known = self._signatures.get(task)
        if known is None:
            known = self._signatures[task] = inspect.signature(self._app.find_task(task).fn)
        return known


def _check(task: str, check: Any) -> Callable[[inspect.BoundArguments], None]:
    if isinstance(check, type):
        if not isinstance(msgspec.inspect.type_info(check), _WITH_FIELDS):
            raise ConfigTypeError(
                f"the check of task {task!r} must be a function, or a msgspec.Struct, dataclass or TypedDict, "
                f"not {check!r}"
            )
        return lambda bound: _converted(bound, check)
    if not callable(check):
        raise ConfigTypeError(f"the check of task {task!r} must be a function or a type, not {check!r}")
    return lambda bound: _called(bound, check)


def _converted(bound: inspect.BoundArguments, kind: type) -> None:
    try:
        msgspec.convert(bound.arguments, kind)
    except msgspec.ValidationError as error:
        raise JobDiscarded(f"invalid arguments: {error}") from error


def _called(bound: inspect.BoundArguments, check: Callable[..., object]) -> None:
    try:
        answer = check(*bound.args, **bound.kwargs)
    except Exception as error:
        raise JobDiscarded(f"invalid arguments: {type(error).__name__}: {error}") from error
    if answer is False:
        raise JobDiscarded(f"invalid arguments: {getattr(check, '__name__', check)} said no")
