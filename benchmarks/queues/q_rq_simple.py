"""RQ with workers that run jobs in their own process."""

from queues.q_rq import enqueue, enqueue_late, late, n_left, noop, workers

__all__ = ["WORKERS", "enqueue", "enqueue_late", "late", "n_left", "noop"]

WORKERS = workers("rq.worker.SimpleWorker")
