"""What a consumer holds of one queue: the jobs that it has claimed and not settled, and the batches on their way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from bulkhead.service.batch import Batch, HeldJob

__all__ = ["Holdings"]


class Holdings:
    """Jobs by id, and batches in the order in which they were sent. Concurrency: any thread.

    The lock guards both; neither the broker nor the pool is called under it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._jobs: dict[str, HeldJob] = {}
        self._batches: dict[Batch, None] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def find(self, job_id: str) -> HeldJob | None:
        """Return the job with this id, if it is held."""
        return self._jobs.get(job_id)

    def jobs(self) -> list[HeldJob]:
        """Return the jobs."""
        with self._changed:
            return list(self._jobs.values())

    def add(self, jobs: Iterable[HeldJob]) -> list[HeldJob]:
        """Hold these; return those of the same ids that were held so far.

        Race: a lease that ran out is claimed again by the very consumer that has lost it, while its run goes on.
        """
        with self._changed:
            ousted = [self._jobs[held.id] for held in jobs if held.id in self._jobs]
            self._jobs.update((held.id, held) for held in jobs)
            return ousted

    def drop(self, jobs: Iterable[HeldJob]) -> None:
        """Hold these no longer."""
        with self._changed:
            for held in jobs:
                if self._jobs.get(held.id) is held:
                    del self._jobs[held.id]
            self._changed.notify_all()

    def batches(self) -> list[Batch]:
        """Return the batches on their way, the one sent first first."""
        with self._changed:
            return list(self._batches)

    def add_batch(self, batch: Batch) -> None:
        """Note that a batch is on its way."""
        with self._changed:
            self._batches[batch] = None

    def drop_batch(self, batch: Batch) -> None:
        """Note that a batch has come back."""
        with self._changed:
            self._batches.pop(batch, None)

    def take_behind(self, batch: Batch, number: int) -> list[HeldJob]:
        """Take what is behind a job of a batch out of it; nothing when it has come back meanwhile."""
        with self._changed:
            if batch not in self._batches:
                return []
            behind = batch.jobs[number + 1 : batch.n_kept]
            batch.n_kept = min(batch.n_kept, number + 1)
            return behind

    def wait_for(self, condition: Callable[[], object], timeout: float | None = None) -> bool:
        """Wait until a condition holds, which is looked at when jobs are dropped, or at `notify`."""
        with self._changed:
            return bool(self._changed.wait_for(condition, timeout))

    def wait(self, timeout: float) -> None:
        """Wait for a job to be dropped, or `notify`."""
        with self._changed:
            self._changed.wait(timeout)

    def notify(self) -> None:
        """Have conditions looked at."""
        with self._changed:
            self._changed.notify_all()
