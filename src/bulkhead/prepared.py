"""What a pool's initializer has returned, for the jobs of that worker: a model, a connection, a table."""

from __future__ import annotations

from typing import Any

from bulkhead.errors import NoWorkerState

__all__ = ["keep", "worker_state"]

_MISSING: Any = object()
_state: Any = _MISSING


def worker_state() -> Any:
    """Return what the initializer of this worker has returned; the same object for each job of the worker.

    Raises:
        NoWorkerState: This process is no worker, or its pool has no initializer.

    Example:
        >>> with Dispatcher([Pool(0, 1, initializer=dict, initargs=([("unit", "mm")],))]) as disp:
        ...     disp.dispatch(Job(worker_state)).result()
        {'unit': 'mm'}
    """
    if _state is _MISSING:
        raise NoWorkerState(
            "there is no worker state: it is what Pool(initializer=) returns, and only jobs of that pool have it"
        )
    return _state


def keep(state: Any) -> None:
    """Remember what the initializer has returned. Called once in a worker."""
    global _state
    _state = state
