"""bulkhead, with a call of `enqueue` for each job."""

from queues.q_bulkhead import WORKERS, app, enqueue_late, late, n_left, noop

__all__ = ["WORKERS", "app", "enqueue", "enqueue_late", "late", "n_left", "noop"]


def enqueue(n):
    for number in range(n):
        noop.enqueue(number, 1)
