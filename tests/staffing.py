"""A dispatcher for a whole module: its workers have to be up before a test counts processes."""

import time

from watching import is_alive, wait_until_whole

from bulkhead import Dispatcher, dispatcher

__all__ = ["staffed", "wait_until_staffed"]

# How long a test waits for workers that replace what the test before has ended (seconds).
_WAIT = 2.0


def staffed(disp: Dispatcher) -> Dispatcher:
    """Return the dispatcher when every worker of every pool is up and idle."""
    for priority in disp.stats():
        wait_until_whole(disp, priority)
    return disp


def wait_until_staffed() -> None:
    """Wait until all dispatchers that are open have all their workers; not for ever, as a pool may be broken."""
    deadline = time.monotonic() + _WAIT
    while any(map(_lacks_workers, list(dispatcher._not_finalized))) and time.monotonic() < deadline:
        time.sleep(0.005)


def _lacks_workers(disp: Dispatcher) -> bool:
    for stats in disp.stats().pools.values():
        pids = [one.pid for one in stats.processes if one.pid and one.state in ("idle", "busy")]
        if sum(map(is_alive, pids)) < stats.workers:
            return True
    return False
