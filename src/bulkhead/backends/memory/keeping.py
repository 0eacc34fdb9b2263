"""What is kept for a time: outcomes, registry values, ids that stay taken."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from bulkhead.backends.base import Entry, Outcome, OutcomeState, Registry, ResultStore, is_outdated
from bulkhead.backends.memory.locking import Guard

__all__ = ["Kept", "MemoryRegistry", "MemoryResultStore"]

T = TypeVar("T")


class Kept(Generic[T]):
    """Values by key, each gone after its time. Not thread-safe: its owner has a lock.

    Invariant: each key with an end has its (end, key) in `_ends`; what is there beside these is stale and skipped.
    """

    def __init__(self) -> None:
        self._values: dict[str, tuple[float, T]] = {}
        self._ends: list[tuple[float, str]] = []

    def put(self, key: str, value: T, end: float) -> None:
        """Keep a value until `end`, POSIX seconds or infinite, in the place of an earlier one."""
        self._values[key] = (end, value)
        if end != float("inf"):
            heapq.heappush(self._ends, (end, key))
        # Why: values that are replaced all the time must not leave an entry each for as long as they were to be kept.
        if len(self._ends) > 2 * len(self._values) + 64:
            self._ends = [(end, key) for key, (end, _) in self._values.items() if end != float("inf")]
            heapq.heapify(self._ends)

    def get(self, key: str) -> T | None:
        """Return the value of a key."""
        self._drop_ended()
        found = self._values.get(key)
        return None if found is None else found[1]

    def pop(self, key: str) -> T | None:
        """Remove a value and return it."""
        self._drop_ended()
        found = self._values.pop(key, None)
        return None if found is None else found[1]

    def __iter__(self) -> Iterator[T]:
        self._drop_ended()
        return iter([value for _, value in self._values.values()])

    def _drop_ended(self) -> None:
        now = time.time()
        while self._ends and self._ends[0][0] <= now:
            end, key = heapq.heappop(self._ends)
            if key in self._values and self._values[key][0] == end:
                del self._values[key]


class MemoryResultStore(ResultStore):
    """Outcomes in a dictionary."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._kept: Kept[Outcome] = Kept()

    def save_many(self, outcomes: Sequence[Outcome]) -> None:
        """See `ResultStore`."""
        with self._guard:
            for outcome in outcomes:
                old = self.look(outcome.id)
                if old is None or not is_outdated(outcome, old):
                    self.put(outcome)

    def put(self, outcome: Outcome) -> None:
        """Keep an outcome. Concurrency: who calls has the guard."""
        self._kept.put(outcome.id, outcome, time.time() + outcome.keep)

    def look(self, id: str) -> Outcome | None:
        """Return what is kept. Concurrency: who calls has the guard."""
        return self._kept.get(id)

    def get_many(self, ids: Sequence[str]) -> list[Outcome | None]:
        """See `ResultStore`."""
        with self._guard:
            return [self._kept.get(id) for id in ids]

    def delete(self, ids: Sequence[str]) -> list[bool]:
        """See `ResultStore`."""
        with self._guard:
            return [self._kept.pop(id) is not None for id in ids]

    def outcomes(
        self, state: OutcomeState, *, queue: str | None = None, offset: int = 0, limit: int = 100
    ) -> list[Outcome]:
        """See `ResultStore`."""
        with self._guard:
            found = [kept for kept in self._kept if kept.state is state and queue in (None, kept.queue)]
        found.sort(key=lambda outcome: -outcome.finished_at)
        return found[offset : offset + limit]

    def counts(self) -> Mapping[OutcomeState, int]:
        """See `ResultStore`."""
        with self._guard:
            return Counter(outcome.state for outcome in self._kept)


class MemoryRegistry(Registry):
    """Entries in a dictionary; versions are counted over all keys, so that none comes back."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._kept: Kept[Entry] = Kept()
        self._versions = itertools.count(1)

    def get(self, key: str) -> Entry | None:
        """See `Registry`."""
        with self._guard:
            return self._kept.get(key)

    def put(
        self, key: str, value: bytes, *, expected: int | None = None, keep: float | None = None
    ) -> int | None:
        """See `Registry`."""
        with self._guard:
            if not self._is_expected(key, expected):
                return None
            entry = Entry(key, value, next(self._versions))
            self._kept.put(key, entry, float("inf") if keep is None else time.time() + keep)
            return entry.version

    def delete(self, key: str, *, expected: int | None = None) -> bool:
        """See `Registry`."""
        with self._guard:
            return self._is_expected(key, expected) and self._kept.pop(key) is not None

    def entries(self, prefix: str) -> list[Entry]:
        """See `Registry`."""
        with self._guard:
            found = [entry for entry in self._kept if entry.key.startswith(prefix)]
        return sorted(found, key=lambda entry: entry.key)

    def _is_expected(self, key: str, expected: int | None) -> bool:
        if expected is None:
            return True
        entry = self._kept.get(key)
        return expected == (0 if entry is None else entry.version)
