"""Killing a worker from outside, as an operator or the kernel's out-of-memory killer does."""

from __future__ import annotations

import os
import signal as signals
import time
from typing import TYPE_CHECKING, Literal

from bulkhead import validate
from bulkhead._kernel.lifecycle import JobState
from bulkhead.errors import ConfigError, UnknownPriority, WaitTimeout

if TYPE_CHECKING:
    from bulkhead.dispatcher import Dispatcher

__all__ = ["kill_worker"]

# Between two looks at the workers (seconds).
_PAUSE = 0.002


def kill_worker(
    dispatcher: Dispatcher,
    priority: int = 0,
    *,
    state: Literal["idle", "busy"] | None = None,
    signal: int = signals.SIGKILL,
    timeout: float = 10.0,
) -> int:
    """Send a signal to a worker of a pool; return its process id.

    Args:
        dispatcher: Whose worker.
        priority: Of its pool.
        state: Take one that has begun a job ("busy") or waits for one ("idle"); None takes either, busy ones first.
        signal: What is sent.
        timeout: Longest wait for such a worker in seconds.

    Raises:
        UnknownPriority: There is no such pool.
        ConfigError: A value cannot work.
        WaitTimeout: There was no such worker in time.

    Not guaranteed: that the worker is still in that state when the signal arrives.
    """
    if state not in (None, "idle", "busy"):
        raise ConfigError(f"state must be 'idle', 'busy' or None, not {state!r}")
    end = time.monotonic() + validate.seconds("timeout", timeout, zero=True)
    wanted = ("busy", "idle") if state is None else (state,)
    while (pid := _find(dispatcher, priority, wanted)) is None or not _send(pid, signal):
        if time.monotonic() >= end:
            raise WaitTimeout(f"pool {priority} has had no {state or 'live'} worker within {timeout} s")
        time.sleep(_PAUSE)
    return pid


def _find(dispatcher: Dispatcher, priority: int, wanted: tuple[str, ...]) -> int | None:
    pools = dispatcher.stats().pools
    if priority not in pools:
        raise UnknownPriority(f"priority {priority!r} has no pool", priority=priority, known=tuple(pools))
    # Why not all that are busy: a job that its worker has not begun is given to another one when this one dies.
    begun = {tracker.status().pid for tracker in dispatcher.jobs(JobState.RUNNING)}
    found = [
        (one.state, one.pid) for one in pools[priority].processes if one.state == "idle" or one.pid in begun
    ]
    return next((pid for state in wanted for its, pid in found if its == state), None)


def _send(pid: int, signal: int) -> bool:
    try:
        os.kill(pid, signal)
    except ProcessLookupError:  # Race: it has ended meanwhile
        return False
    return True
