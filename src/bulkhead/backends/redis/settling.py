"""Ending claims together with keeping outcomes, on Redis: one script."""

from __future__ import annotations

from collections.abc import Sequence

from bulkhead.backends.base import Ending, Settler
from bulkhead.backends.redis.link import Link
from bulkhead.backends.redis.results import columns_of
from bulkhead.backends.redis.script import script
from bulkhead.backends.redis.wire import check_size, packed, sized_batches, text

__all__ = ["RedisSettler"]

_SETTLE = script("settle", "results_common")


class RedisSettler(Settler):
    """The step that broker and results take together.

    Args:
        link: Where both are.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    def settle(self, endings: Sequence[Ending]) -> list[bool]:
        """See `Settler`."""
        sizes = [_size(ending) for ending in endings]
        check_size([max(sizes, default=0)])
        answers = [self._settle(part) for part in sized_batches(endings, sizes)]
        return [answer == ord("1") for answer in b"".join(answers)]

    def _settle(self, endings: Sequence[Ending]) -> bytes:
        holds, outcomes, reasons, errors = zip(*endings, strict=True)
        columns = (
            *zip(*holds, strict=True),
            reasons,
            [text(error) for error in errors],
            *columns_of(outcomes),
        )
        # Why only then: what has left no outcome looks lost when it is asked for again.
        is_repeatable = all(outcome is not None for outcome in outcomes)
        answers: bytes = self._link.run(_SETTLE, (), [packed(columns)], is_repeatable=is_repeatable)
        return answers


def _size(ending: Ending) -> int:
    outcome, error = ending.outcome, ending.error
    size = 0 if error is None else len(error)
    if outcome is not None:
        value, failure = outcome.value, outcome.error
        size += (0 if value is None else len(value)) + (0 if failure is None else len(failure))
    return size
