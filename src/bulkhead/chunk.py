"""Items of a map that travel together: one job to the pool, each item with a result or an error of its own.

A chunk may be sent several times, each time for the items that are still to do: those behind one whose worker died, or
those that the retry policy allows another attempt. The sending after which nothing is left to try is its end.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from bulkhead._kernel.lifecycle import JobState
from bulkhead.errors import JobTimeout, WorkerCrashed, is_of
from bulkhead.retry import RetryPolicy
from bulkhead.tracker import JobHome, Tracker

__all__ = ["Chunk", "Outcomes"]

# Position and start (monotonic seconds) of the item that a worker runs; None before the first has begun.
Running = tuple[int, float] | None

_MISSING: Any = object()  # stands where no result has come (yet)


class Chunk(Tracker):
    """Some items of a map. Owner of the fields below: the pool's lock until it has settled, then the map's consumer.

    Items have three numbers: in the map; in the message, which may hold more items than are this chunk's; and their
    position among those that a sending is for.

    Args:
        home, payload, priority, timeout, retry: As of any job; `timeout` and `retry` count for each item.
        first: Number in the map of the message's first item.
        items: The message's items, as the user's iterable gave them.
        span: Which of them are this chunk's; None for all.
        is_star: Each item is a tuple of arguments.
        may_stop: A worker may give the rest back when it takes long.
        is_exact: It is always known which item runs. Otherwise it may be any of up to a thousand very short ones.

    Attributes:
        todo: Which items the current or next sending is for.
        is_unreadable: No worker could take its items apart; they have to be sent one by one.
        is_abandoned: Nobody wants its results any more.
        seconds: How long the last sending took; None before its end.
        last_sending: Of the last sending that is over: how many items have ended, how many failed, an error of those.
    """

    is_kept = False

    __slots__ = (
        "_errors",
        "_failed_now",
        "_last_errors",
        "_n_ended_before",
        "_n_missing",
        "_overtime",
        "_values",
        "first",
        "goes_ahead",
        "is_abandoned",
        "is_exact",
        "is_star",
        "is_unreadable",
        "items",
        "last_sending",
        "may_stop",
        "message",
        "seconds",
        "span",
        "todo",
    )

    def __init__(
        self,
        home: JobHome,
        payload: Any,
        priority: int,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
        *,
        first: int,
        items: Sequence[Any],
        span: range | None = None,
        is_star: bool,
        may_stop: bool,
        is_exact: bool = True,
    ) -> None:
        super().__init__(home, payload, priority, timeout, retry)
        self.message = (
            payload  # Why also here: a settled job loses its payload, but its rest may have to be sent
        )
        self.first = first
        self.items = items
        self.span = range(len(items)) if span is None else span
        self.is_star = is_star
        self.may_stop = may_stop
        self.is_exact = is_exact
        self.goes_ahead = False
        self.todo: Sequence[int] = self.span
        self.is_unreadable = False
        self.is_abandoned = False
        self.seconds: float | None = None
        self.last_sending: tuple[int, int, BaseException | None] = 0, 0, None
        self._n_ended_before = 0  # items that had ended before the sending under way
        self._values: list[Any] = [_MISSING] * len(self.span)
        self._n_missing = len(self.span)
        self._errors: dict[int, BaseException] = {}
        self._failed_now: list[int] = []
        self._last_errors: dict[int, BaseException] = {}  # of items that are to run another time
        self._overtime: int | None = None  # position of the item whose time was up

    # For the engine

    def take(self, position: int, values: list[Any]) -> None:
        """Note the results of items that follow each other in `todo`."""
        todo, base = self.todo, self.span.start
        # Race: a worker that is being ended may tell twice, in its answer and by what it has recorded.
        # Why the length: the memory of a damaged worker may say anything, and that is not to harm the pool.
        if not values or position + len(values) > len(todo) or not self._is_missing(todo[position]):
            return
        self._n_missing -= len(values)
        if isinstance(todo, range):
            start = todo.start + position - base
            self._values[start : start + len(values)] = values
        else:
            for index, value in zip(todo[position:], values, strict=False):
                self._values[index - base] = value

    def take_error(self, position: int, error: BaseException) -> None:
        """Note that an item has failed."""
        if position >= len(self.todo) or not self._is_missing(self.todo[position]):
            return
        index = self.todo[position]
        self._errors[index] = error
        self._failed_now.append(index)
        if not is_of(error, JobTimeout, WorkerCrashed):  # these name the item
            _note(error, f"while running item {self.first + index} of a map")

    def reject(self, error: BaseException) -> None:
        """Note that a worker could not take the items apart."""
        if len(self.todo) > 1:
            self.is_unreadable = True
        else:
            self.take_error(0, error)

    def describe(self, running: Running, span: int = 1) -> str:
        """Return what errors call the running item, which is one of so many."""
        position = self._blamed(running)
        if position is not None and span > 1 and not self.is_exact:
            last = min(position + span, len(self.todo)) - 1
            return f"one of the items {self.first + self.todo[position]} to {self.first + self.todo[last]} of a map"
        if position is None and len(self.todo) == 1:
            position = 0
        if position is None:
            return f"items {self.first + self.todo[0]} to {self.first + self.todo[-1]} of a map"
        return f"item {self.first + self.todo[position]} of a map"

    def time_left(self, running: Running, sent_at: float, now: float) -> float | None:
        """Return up to when the running item has time, or None when its time is up. All in monotonic seconds."""
        assert self.timeout is not None
        position = self._blamed(running)
        if running is None:
            began = sent_at  # the items are being unpickled: that has as much time as one of them
        elif position is None:
            began = now  # the last one has just ended
        else:
            began = running[1]
        if began + self.timeout > now:
            return began + self.timeout
        self._overtime = position
        return None

    def lose(self, running: Running, error: BaseException, span: int = 1) -> bool:
        """Note that the worker has died, after what it had recorded was taken; tell whether items are left to send.

        Args:
            running: The item that it ran.
            error: Its error.
            span: It may also be another one of so many from that position on. Then nobody is blamed: they run again,
                and this time it will be known.
        """
        position = self._blamed(running)
        self._overtime = None
        if self.is_abandoned:
            return False
        if running is None and len(self.todo) > 1:
            self.is_unreadable = True  # one of the items has killed it on arrival, nobody knows which
            return False
        if running is None:
            position, span = 0, 1
        # Why only once: what runs again is noted item by item, whatever the memory of a damaged worker says.
        if position is not None and span > 1 and not self.is_exact:
            self.is_exact = True
        elif position is not None:
            self.take_error(position, error)
        rest = [index for index in self.todo if self._is_missing(index)]
        if rest:
            self._count_sending()
            self._narrow(rest)
        return bool(rest)

    def end_round(self, attempt: int) -> BaseException | None:
        """Return an error that may be retried, with `todo` set for that, or None when nothing is to be retried.

        Args:
            attempt: Number of the attempt that has ended, from 1.
        """
        self._count_sending()
        failed, self._failed_now = self._failed_now, []
        policy = self.retry
        if policy is None or self.is_abandoned:
            return None
        again = [index for index in failed if policy.allows(attempt, self._errors[index])]
        if not again:
            return None
        self._last_errors = {index: self._errors.pop(index) for index in again}
        self._n_ended_before = self.n_ended
        self._narrow(again)
        return self._last_errors[again[0]]

    def _count_sending(self) -> None:
        failed = self._failed_now
        ended, self._n_ended_before = self.n_ended - self._n_ended_before, self.n_ended
        self.last_sending = ended, len(failed), self._errors[failed[0]] if failed else None

    # For the map

    @property
    def n_failed(self) -> int:
        """Number of its items that have failed."""
        return len(self._errors)

    @property
    def n_ended(self) -> int:
        """Number of its items that have a result or an error."""
        return len(self.span) - self._n_missing + len(self._errors)

    @property
    def is_complete(self) -> bool:
        """Tell whether every item has a result or an error, or will never have one."""
        return self.n_ended == len(self.span) or self.state is not JobState.SUCCEEDED

    def outcomes(self) -> Iterator[Any]:
        """Return the results in order; where items have failed the iterator raises in their place, and can go on."""
        if self._n_missing == 0:
            return iter(self._values)
        return Outcomes([self._outcome(index) for index in self.span])

    def runs(self) -> Iterator[tuple[range, bool]]:
        """Take the span apart into runs of items that are missing and of others; yield each with "is missing"."""
        start = self.span.start
        for index in range(start + 1, self.span.stop + 1):
            if index == self.span.stop or self._is_missing(index) != self._is_missing(start):
                yield range(start, index), self._is_missing(start)
                start = index

    def fill_from(self, other: Chunk) -> None:
        """Take over what another chunk of the same message has of this span, as settled."""
        base = self.span.start - other.span.start
        self._values = other._values[base : base + len(self.span)]
        self._errors = {index: error for index, error in other._errors.items() if index in self.span}
        self._n_missing = len(self._errors)
        self.size = other.size * len(self.span) // len(other.span)
        self.state = JobState.SUCCEEDED

    def fail(self, error: BaseException) -> None:
        """Settle it without a sending: its items cannot be sent."""
        for position in range(len(self.span)):
            # Why copies: each raise adds to an error's traceback.
            copied = copy.copy(error).with_traceback(None)
            copied.__cause__ = error.__cause__
            self.take_error(position, copied)
        self.state = JobState.SUCCEEDED

    def forget_items(self) -> None:
        """Let go of what is needed for another sending alone."""
        self.items = ()
        self.message = None

    def _outcome(self, index: int) -> tuple[Any, BaseException | None]:
        value = self._values[index - self.span.start]
        if value is not _MISSING:
            return value, None
        # Why no `or`: an error of the user's may be false (one with `__len__`).
        found = (self._errors.get(index), self._last_errors.get(index), self.error)
        return None, next((error for error in found if error is not None), None)

    def _is_missing(self, index: int) -> bool:
        return self._values[index - self.span.start] is _MISSING and index not in self._errors

    def _blamed(self, running: Running) -> int | None:
        """Return the position of the item that ran, or of the one whose time was up: since then the next has begun."""
        if self._overtime is not None:
            return self._overtime
        return running[0] if running is not None and running[0] < len(self.todo) else None

    def _narrow(self, indices: list[int]) -> None:
        is_run = indices[-1] - indices[0] == len(indices) - 1
        self.todo = range(indices[0], indices[-1] + 1) if is_run else indices


def _note(error: BaseException, text: str) -> None:
    try:
        BaseException.add_note(error, text)
    except Exception:
        pass  # a class of the user's that has its own idea of notes


class Outcomes(Iterator[Any]):
    """Iterates over results and errors, and goes on after it has raised one."""

    def __init__(self, outcomes: list[tuple[Any, BaseException | None]]) -> None:
        self._outcomes = outcomes
        self._at = 0

    def __length_hint__(self) -> int:
        return len(self._outcomes) - self._at

    def __next__(self) -> Any:
        if self._at == len(self._outcomes):
            raise StopIteration
        # Race: Ctrl-C strikes after a call. There is none between this step and the return, so no value is lost.
        value, error = self._outcomes[self._at]
        self._at += 1
        if error is None:
            return value
        if is_of(error, StopIteration):
            raise RuntimeError("an item of the map raised StopIteration") from error  # as a generator does
        raise error
