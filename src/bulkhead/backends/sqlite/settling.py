"""Ending claims together with keeping outcomes, in a file: one transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from bulkhead.backends.base import Ending, Settler
from bulkhead.backends.sqlite.broker import SqliteBroker
from bulkhead.backends.sqlite.file import File
from bulkhead.backends.sqlite.results import SqliteResultStore
from bulkhead.backends.sqlite.sizes import check_size

__all__ = ["SqliteSettler"]


class SqliteSettler(Settler):
    """The step that broker and results take together."""

    def __init__(self, file: File, broker: SqliteBroker, results: SqliteResultStore) -> None:
        self._file = file
        self._broker = broker
        self._results = results

    def settle(self, endings: Sequence[Ending]) -> list[bool]:
        """See `Settler`."""
        self._results.check_sizes(one.outcome for one in endings if one.outcome is not None)
        for one in endings:
            if one.error is not None:
                check_size("the failure of a job", one.error)
        return self._file.change_many(endings, self._settle)

    def _settle(self, connection: sqlite3.Connection, endings: Sequence[Ending]) -> list[bool]:
        answers = self._broker.end(connection, endings)
        ended = [one.outcome for one, is_done in zip(endings, answers, strict=True) if is_done]
        self._results.put(connection, [outcome for outcome in ended if outcome is not None])
        if all(answers):
            return answers
        return [
            is_done or self._was_settled(connection, one)
            for one, is_done in zip(endings, answers, strict=True)
        ]

    def _was_settled(self, connection: sqlite3.Connection, ending: Ending) -> bool:
        outcome = ending.outcome
        return outcome is not None and self._results.look(connection, outcome.id) == outcome
