"""Counts of the items of maps, which travel in chunks: for who watches and wants to see items."""

from __future__ import annotations

from bulkhead._kernel.lifecycle import JobState
from bulkhead.chunk import Chunk

__all__ = ["MapTally", "Tally"]


class Tally:
    """What has become of the chunks that have settled, and of their items. Owner: the lock of their pool.

    Attributes:
        chunks_succeeded, chunks_failed, chunks_cancelled: Chunks, which a pool counts as jobs.
        succeeded, failed: Items. One that is sent again is counted when it has ended.
    """

    __slots__ = ("chunks_cancelled", "chunks_failed", "chunks_succeeded", "failed", "succeeded")

    def __init__(self) -> None:
        self.chunks_succeeded = self.chunks_failed = self.chunks_cancelled = 0
        self.succeeded = self.failed = 0

    def count(self, chunk: Chunk) -> None:
        """Count a chunk that has settled."""
        if chunk.state is JobState.SUCCEEDED:
            self.chunks_succeeded += 1
        elif chunk.state is JobState.FAILED:
            self.chunks_failed += 1
        else:
            self.chunks_cancelled += 1
        self.succeeded += chunk.n_ended - chunk.n_failed
        self.failed += chunk.n_failed


class MapTally(Tally):
    """The counts of one map.

    Attributes:
        name: Of its function.
        priority: Of its pool.
        total: How many items there are; None where nobody knows.
        n_read: How many have been read. Owner: the map's consumer, as of the next.
        n_unsent: How many of them failed without being sent.
    """

    __slots__ = ("n_read", "n_unsent", "name", "priority", "total")

    def __init__(self, name: str, priority: int, total: int | None) -> None:
        super().__init__()
        self.name = name
        self.priority = priority
        self.total = total
        self.n_read = 0
        self.n_unsent = 0
