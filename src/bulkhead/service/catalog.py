"""Which tasks and queues an application has, and the pools that its queues run in."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bulkhead import validate
from bulkhead.config import Pool
from bulkhead.errors import ConfigError, ConfigTypeError, UnknownQueue, UnknownTask
from bulkhead.service.task import Task, TaskOptions, name

if TYPE_CHECKING:
    from bulkhead.service.app import App

__all__ = ["Catalog"]

# What of a pool the consumer decides, or each task for itself.
_NOT_OF_QUEUES = frozenset({"priority", "n_workers", "backlog", "timeout", "retry", "name"})


# Functions that, when they are called, only return something that still has to be run.
_NOT_CALLED = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)


class Catalog:
    """Tasks by name, and queues with the options of their pools. Owner: whoever imports the application's module.

    Attributes:
        tasks: The tasks by name.
    """

    def __init__(self) -> None:
        self.tasks: dict[str, Task[..., Any]] = {}
        self._queues: dict[str, Mapping[str, Any]] = {}

    def add_task(
        self,
        app: App,
        fn: Callable[..., Any],
        given: str | None,
        concurrency: int | None,
        options: TaskOptions,
    ) -> Task[..., Any]:
        """Add a task, and its queue.

        Raises:
            ConfigError: It is no function, its name is taken, or its queue has another concurrency.
        """
        validate.function("a task", fn)
        if isinstance(fn, Task):
            raise ConfigTypeError(f"{fn.name!r} is a task already")
        if any(is_one(fn) for is_one in _NOT_CALLED):
            raise ConfigTypeError(
                f"a task must return its result when it is called, and {validate.shown(fn)} is a coroutine function or "
                "a generator; call asyncio.run(...) or list(...) in a function around it"
            )
        task_name = name("name", given if given is not None else getattr(fn, "__name__", None))
        if task_name in self.tasks:
            raise ConfigError(f"there is a task {task_name!r} already; give one of them name=")
        self.add_queue(options.queue, {} if concurrency is None else {"concurrency": concurrency})
        made: Task[..., Any] = Task(app, fn, task_name, options)
        self.tasks[task_name] = made
        return made

    def find_task(self, task: str) -> Task[..., Any]:
        """Return the task of this name; raises UnknownTask."""
        found = self.tasks.get(validate.text("task", task))
        if found is None:
            known = ", ".join(sorted(self.tasks)) or "none"
            raise UnknownTask(f"there is no task {task!r}; known are: {known}")
        return found

    def add_queue(self, queue: str, given: Mapping[str, Any]) -> None:
        """Add options to those that a queue has.

        Raises:
            ConfigError: A value cannot work, or the queue has another one.
        """
        queue = name("queue", queue)
        if refused := given.keys() & _NOT_OF_QUEUES:
            raise ConfigError(f"{min(refused)} is no option of a queue; say it of the tasks")
        known = self._queues.get(queue, {})
        for option, value in given.items():
            if option in known and known[option] != value:
                raise ConfigError(
                    f"queue {queue!r} has {option}={known[option]!r} already and cannot have {value!r}, too"
                )
        merged = {**known, **given}
        _pool(0, queue, merged)  # so that a bad value is refused here
        self._queues[queue] = merged

    def queue_names(self) -> list[str]:
        """Return the names of the queues."""
        return list(self._queues)

    def known_queue(self, queue: str) -> str:
        """Return the name of a queue that there is; raises UnknownQueue."""
        if validate.text("queue", queue) not in self._queues:
            raise UnknownQueue(f"there is no queue {queue!r}; known are: {', '.join(sorted(self._queues))}")
        return queue

    def chosen(self, queues: Iterable[str] | None) -> list[str]:
        """Return the names of queues to be run: those given, each once, or all.

        Raises:
            UnknownQueue, ConfigError: There is no such queue, or none at all.
        """
        if queues is not None:
            given = validate.several("queues", queues)
            if not given:
                raise ConfigError("queues must name at least one queue, or be None for all")
            return list(dict.fromkeys(map(self.known_queue, given)))
        names = self.queue_names()
        if not names:
            raise ConfigError("the application has no queue: give it a task first")
        return names

    def pools(self, queues: Sequence[str], n_workers: int | None = None) -> list[Pool]:
        """Return the pools of these queues; their priorities are their positions."""
        changed = {} if n_workers is None else {"concurrency": n_workers}
        return [
            _pool(position, queue, {"preload": self._modules(queue), **self._queues[queue], **changed})
            for position, queue in enumerate(queues)
        ]

    def _modules(self, queue: str) -> list[str]:
        """Return the modules that the jobs of a queue need. The main module comes to workers in its own way."""
        tasks = {task.fn.__module__ for task in self.tasks.values() if task.options.queue == queue}
        return ["bulkhead.service.running", *sorted(tasks - {"__main__"})]


def _pool(priority: int, queue: str, options: Mapping[str, Any]) -> Pool:
    rest = {option: value for option, value in options.items() if option != "concurrency"}
    n_workers = options.get("concurrency", os.cpu_count() or 1)
    # Why no bound here: the consumer claims no more than it has room for.
    try:
        return Pool(priority, n_workers, backlog=None, name=queue, **{"nice": 0, **rest})
    except ConfigError as error:
        raise type(error)(str(error).replace("n_workers", "concurrency")) from None
    except TypeError as error:
        raise ConfigTypeError(f"queue {queue!r}: {error}") from None
