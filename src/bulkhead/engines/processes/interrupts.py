"""Keeping a Ctrl-C out of the middle of a change.

Python raises KeyboardInterrupt in the main thread between any two steps. Around a change of a pool's state the main
thread therefore swaps the handler of SIGINT for one that takes a note, and raises the exception when the change is
complete. That lasts some ten microseconds at a time, costs less than one, and leaves the handler as it was. A second
Ctrl-C is raised at once, so that not even a result whose unpickling never ends can hold the user up.

Only Python's own handler is swapped: one of the user's keeps its place. What it raises, and what handlers of other
signals raise, may hit a change; then the pool is given up (see `ruin` in acting.py).

Why `_signal`: the functions of `signal` convert their arguments to enums, which takes twenty times as long.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType

__all__ = ["calm", "hold", "release"]

_SIGINT = int(signal.SIGINT)
_default = signal.default_int_handler
_get_ident = threading.get_ident
_get_handler = _signal.getsignal
_set_handler = _signal.signal
_MAIN_THREAD = threading.main_thread().ident

# Owner: the main thread.
_is_noted = False


def hold() -> bool:
    """Let no KeyboardInterrupt through from now on; True when `release` has to be called."""
    if _get_ident() != _MAIN_THREAD or _get_handler(_SIGINT) is not _default:
        return False
    _set_handler(_SIGINT, _note)
    return True


def release() -> None:
    """Let them through again; raises the one that came meanwhile."""
    global _is_noted
    _set_handler(_SIGINT, _default)
    if _is_noted:
        _is_noted = False
        raise KeyboardInterrupt


def calm() -> AbstractContextManager[None]:
    """`hold` and `release` as a context, for what is not on the way of every job."""
    return _Calm()


class _Calm:
    # Why no generator: it takes three times as long, and a map goes through several for each chunk.

    __slots__ = ("_is_held",)

    def __enter__(self) -> None:
        self._is_held = hold()

    def __exit__(self, *_: object) -> None:
        if self._is_held:
            release()


def _note(_number: int, _frame: FrameType | None) -> None:
    global _is_noted
    if _is_noted:
        _is_noted = False
        _set_handler(_SIGINT, _default)
        raise KeyboardInterrupt
    _is_noted = True
