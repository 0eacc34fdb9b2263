"""Ending claims together with keeping outcomes, in memory: under the one lock."""

from __future__ import annotations

from collections.abc import Sequence

from bulkhead.backends.base import Ending, Settler
from bulkhead.backends.memory.broker import MemoryBroker
from bulkhead.backends.memory.keeping import MemoryResultStore
from bulkhead.backends.memory.locking import Guard

__all__ = ["MemorySettler"]


class MemorySettler(Settler):
    """The step that broker and results take together."""

    def __init__(self, guard: Guard, broker: MemoryBroker, results: MemoryResultStore) -> None:
        self._guard = guard
        self._broker = broker
        self._results = results

    def settle(self, endings: Sequence[Ending]) -> list[bool]:
        """See `Settler`."""
        with self._guard:
            return [self._settle(ending) for ending in endings]

    def _settle(self, ending: Ending) -> bool:
        outcome = ending.outcome
        if not self._broker.end(ending):
            return outcome is not None and self._results.look(outcome.id) == outcome
        if outcome is not None:
            self._results.put(outcome)
        return True
