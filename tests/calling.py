"""A call in a thread of its own, for tests about who waits for what."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from watching import PATIENCE, wait_until

__all__ = ["Call", "at_once"]


class Call(threading.Thread):
    """`fn(*args, **kwargs)` in a thread, begun at once."""

    def __init__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(name=f"call of {getattr(fn, '__name__', fn)}", daemon=True)
        self._call = fn, args, kwargs
        self._value: Any = None
        self.error: BaseException | None = None
        self.returned_at: float | None = None
        self.start()

    def run(self) -> None:
        fn, args, kwargs = self._call
        try:
            self._value = fn(*args, **kwargs)
        except BaseException as error:
            self.error = error
        self.returned_at = time.monotonic()

    @property
    def has_returned(self) -> bool:
        return self.returned_at is not None

    def value(self, within: float = PATIENCE) -> Any:
        """Return what the call returned or raise what it raised."""
        self.join(within)
        assert not self.is_alive(), f"{self.name} has not returned within {within} s"
        if self.error is not None:
            raise self.error
        return self._value

    def until_waiting(self) -> Call:
        """Return when the thread waits inside of bulkhead: in a function `wait` there, which both sleeps and polls."""
        wait_until(self._is_waiting, f"{self.name} waits")
        return self

    def _is_waiting(self) -> bool:
        assert not self.has_returned, f"{self.name} did not wait: {self._value!r}, {self.error!r}"
        frame = sys._current_frames().get(self.ident or 0)
        while frame is not None:
            if frame.f_code.co_name == "wait" and frame.f_globals["__name__"].startswith("bulkhead."):
                return True
            frame = frame.f_back
        return False


def at_once(number: int, fn: Callable[[int], Any]) -> list[Call]:
    """Call fn(0), fn(1), … in so many threads that all begin together."""
    start = threading.Barrier(number)

    def run(index: int) -> Any:
        start.wait()
        return fn(index)

    return [Call(run, index) for index in range(number)]
