"""A dispatcher for a whole module: its workers have to be up before the first test counts processes."""

from watching import wait_until_whole

from bulkhead import Dispatcher

__all__ = ["staffed"]


def staffed(disp: Dispatcher) -> Dispatcher:
    """Return the dispatcher when every worker of every pool is up and idle."""
    for priority in disp.stats():
        wait_until_whole(disp, priority)
    return disp
