"""Which jobs a middleware is for, and the names under which it keeps things in the registry."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from bulkhead import validate
from bulkhead.errors import ConfigError, ConfigTypeError
from bulkhead.service.task import name

if TYPE_CHECKING:
    from bulkhead.service.app import App
    from bulkhead.service.middleware.base import Middleware

__all__ = ["Chosen", "be_the_only_one", "digest", "key_part"]

_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,100}")


class Chosen:
    """Jobs by queue and task.

    Args:
        queues: Of these queues alone; None is of all.
        tasks: Of the tasks with these names alone; None is of all.
    """

    def __init__(self, queues: Iterable[str] | None, tasks: Iterable[str] | None) -> None:
        self._queues = _names("queues", queues)
        self._tasks = _names("tasks", tasks)

    @property
    def is_by_task(self) -> bool:
        """Tell whether the queue alone does not say it."""
        return self._tasks is not None

    def has_queue(self, queue: str) -> bool:
        """Tell whether jobs of a queue may be among them."""
        return self._queues is None or queue in self._queues

    def has(self, queue: str, task: str) -> bool:
        """Tell whether a job is among them."""
        return self.has_queue(queue) and (self._tasks is None or task in self._tasks)


def be_the_only_one(app: App, one: Middleware, option: Callable[[Any], str]) -> None:
    """Check that no other middleware of this kind has the same name, as both would write to the same places.

    Raises:
        ConfigError: There is one.
    """
    for other in app.middlewares:
        if other is not one and type(other) is type(one) and option(other) == option(one):
            raise ConfigError(
                f"there are two middlewares {type(one).__name__} with name={option(one)!r}: "
                "give one of them another name"
            )


def key_part(text: object) -> str:
    """Return a text of the user's as a part of a registry key: itself, or its digest where it is long or unusual.

    Raises:
        ConfigTypeError: It is no str.
    """
    if not isinstance(text, str):
        raise ConfigTypeError(f"a key function must return a str or None, not {text!r}")
    return text if _PLAIN.fullmatch(text) else f"~{digest(text.encode('utf-8', 'surrogatepass'))}"


def digest(data: bytes) -> str:
    """Return 64 characters that stand for the data."""
    return hashlib.sha256(data).hexdigest()


def _names(option: str, values: Iterable[str] | None) -> frozenset[str] | None:
    if values is None:
        return None
    return frozenset(name(option, value) for value in validate.several(option, values))
