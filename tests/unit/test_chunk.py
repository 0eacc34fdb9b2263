"""A chunk's books: what each of its items has come to, and what is still to be sent."""

from __future__ import annotations

from typing import Any

import pytest
from map_jobs import outcomes

from bulkhead import JobState, JobTimeout, RemoteError, RetryPolicy, Unrecoverable, WorkerCrashed
from bulkhead.chunk import Chunk, Outcomes


def a_chunk(n: int = 6, *, first: int = 100, retry: RetryPolicy | None = None, **options: Any) -> Chunk:
    """Return a chunk whose items are the letters from "a" on."""
    items = [chr(ord("a") + number) for number in range(n)]
    options = {"is_star": False, "may_stop": False, **options}
    return Chunk(
        None, b"message", 0, options.pop("timeout", None), retry, first=first, items=items, **options
    )


def crash(text: str = "gone") -> WorkerCrashed:
    return WorkerCrashed(text, pid=1, signal="SIGKILL")


def told(chunk: Chunk) -> list[Any]:
    """Settle the chunk; return what it gives out, errors by their type."""
    chunk.state = JobState.SUCCEEDED
    return [type(one) if isinstance(one, Exception) else one for one in outcomes(chunk.outcomes())]


def runs(chunk: Chunk) -> list[tuple[list[int], bool]]:
    return [(list(span), is_missing) for span, is_missing in chunk.runs()]


# Results and errors


def test_results_are_given_out_in_the_order_of_the_items_in_whatever_order_they_came() -> None:
    chunk = a_chunk()
    chunk.take(4, ["E", "F"])
    chunk.take(0, ["A"])
    assert chunk.n_ended == 3
    chunk.take(1, ["B", "C", "D"])
    chunk.state = JobState.SUCCEEDED
    assert chunk.is_complete
    assert list(chunk.outcomes()) == list("ABCDEF")


def test_none_is_a_result_and_nothing_is_not() -> None:
    chunk = a_chunk(3)
    chunk.take(0, [None, None])
    chunk.state = JobState.SUCCEEDED
    assert (chunk.n_ended, chunk.is_complete) == (2, False)
    chunk.take(2, [None])
    assert list(chunk.outcomes()) == [None] * 3


def test_an_error_stands_in_the_place_of_its_item_and_reading_goes_on() -> None:
    chunk = a_chunk()
    chunk.take(0, ["A", "B"])
    chunk.take_error(2, ValueError("of c"))
    chunk.take(3, ["D", "E", "F"])
    assert chunk.end_round(1) is None
    assert told(chunk) == ["A", "B", ValueError, "D", "E", "F"]


def test_what_is_told_twice_counts_once() -> None:
    """A worker that is ended may have answered: its records are read at its answer and at its death."""
    chunk = a_chunk(4)
    for _ in range(2):
        chunk.take(0, ["A", "B"])
    assert chunk.n_ended == 2
    chunk.state = JobState.CANCELLED
    chunk.error = ValueError("cancelled")
    found = outcomes(chunk.outcomes())
    assert found[:2] == ["A", "B"]
    assert [type(one) for one in found[2:]] == [ValueError, ValueError]


def test_what_a_damaged_worker_tells_of_items_that_are_not_there_is_ignored() -> None:
    chunk = a_chunk(3)
    chunk.take_error(3, ValueError("of nobody"))
    chunk.take(3, ["D"])
    chunk.take(2, ["C", "D"])
    assert chunk.n_ended == 0
    chunk.take(0, ["A", "B", "C"])
    assert told(chunk) == ["A", "B", "C"]


def test_an_error_is_named_after_its_item_of_the_whole_map() -> None:
    error = ValueError("no")
    a_chunk(first=1000).take_error(3, error)
    assert error.__notes__ == ["while running item 1003 of a map"]


def test_errors_that_name_the_item_themselves_are_left_as_they_are() -> None:
    chunk = a_chunk()
    errors = [RemoteError("no"), Unrecoverable("no"), crash(), JobTimeout("late", timeout=1.0, pid=1)]
    for position, error in enumerate(errors):
        chunk.take_error(position, error)
    assert [len(getattr(error, "__notes__", [])) for error in errors] == [1, 1, 0, 0]


class Noteless(Exception):
    __notes__ = ()

    def add_note(self, text: str) -> None:
        raise NotImplementedError


def test_an_exception_that_takes_no_notes_is_kept_without() -> None:
    chunk = a_chunk(1)
    chunk.take_error(0, Noteless())
    assert told(chunk) == [Noteless]


def test_a_chunk_that_failed_as_a_whole_gives_its_error_for_what_has_not_ended() -> None:
    chunk = a_chunk(4)
    chunk.take(0, ["A"])
    chunk.take_error(2, ValueError())
    chunk.state, chunk.error = JobState.FAILED, crash()
    assert chunk.is_complete
    assert [type(one) for one in outcomes(chunk.outcomes())] == [
        str,
        WorkerCrashed,
        ValueError,
        WorkerCrashed,
    ]


@pytest.mark.parametrize("error", [StopIteration("odd"), ValueError("odd")])
def test_outcomes_go_on_behind_any_error(error: Exception) -> None:
    found = outcomes(Outcomes([(1, None), (None, error), (3, None), (None, error)]))
    assert [found[0], found[2]] == [1, 3]
    assert len(found) == 4


# A worker that dies


def test_the_item_that_ran_is_blamed_and_the_rest_is_to_be_sent() -> None:
    chunk = a_chunk()
    chunk.take(0, ["A", "B"])
    assert chunk.lose((2, 0.0), crash())
    assert list(chunk.todo) == [3, 4, 5]
    chunk.take(0, ["D", "E", "F"])
    assert chunk.end_round(1) is None
    assert told(chunk) == ["A", "B", WorkerCrashed, "D", "E", "F"]


def test_items_whose_results_died_with_the_worker_are_sent_again() -> None:
    chunk = a_chunk()
    chunk.take(0, ["A"])
    assert chunk.lose((4, 0.0), crash())
    assert list(chunk.todo) == [1, 2, 3, 5]
    chunk.take(0, ["B", "C"])
    chunk.take_error(2, ValueError())
    chunk.take(3, ["F"])
    assert told(chunk) == ["A", "B", "C", ValueError, WorkerCrashed, "F"]


def test_of_very_short_items_nobody_is_blamed_at_first_and_they_run_again_noted_one_by_one() -> None:
    chunk = a_chunk(8, is_exact=False)
    chunk.take(0, ["A", "B"])
    assert chunk.lose((2, 0.0), crash(), 4)
    assert list(chunk.todo) == [2, 3, 4, 5, 6, 7]
    assert chunk.is_exact
    chunk.take(0, ["C"])
    assert chunk.lose((1, 0.0), crash(), 1)
    chunk.take(0, ["E", "F", "G", "H"])
    assert told(chunk) == ["A", "B", "C", WorkerCrashed, "E", "F", "G", "H"]


def test_who_is_not_known_is_asked_for_once_only() -> None:
    """The memory of a worker that an item has damaged may say anything."""
    chunk = a_chunk(3, is_exact=False)
    assert chunk.lose((0, 0.0), crash(), 2**64 - 1)
    assert chunk.lose((0, 0.0), crash(), 2**64 - 1)
    chunk.take(0, ["B", "C"])
    assert told(chunk) == [WorkerCrashed, "B", "C"]


def test_a_block_of_very_short_items_is_named_as_such() -> None:
    chunk = a_chunk(8, is_exact=False)
    assert chunk.describe((2, 0.0), 4) == "one of the items 102 to 105 of a map"
    assert chunk.describe((6, 0.0), 4) == "one of the items 106 to 107 of a map"
    assert chunk.describe((2, 0.0), 1) == "item 102 of a map"


def test_the_last_item_that_kills_its_worker_leaves_nothing_to_send() -> None:
    chunk = a_chunk(3)
    chunk.take(0, ["A", "B"])
    assert not chunk.lose((2, 0.0), crash())
    assert told(chunk) == ["A", "B", WorkerCrashed]


def test_a_worker_that_dies_when_all_is_recorded_costs_nothing() -> None:
    chunk = a_chunk(2)
    chunk.take(0, ["A", "B"])
    assert not chunk.lose((2**64 - 1, 0.0), crash())
    assert told(chunk) == ["A", "B"]


def test_an_item_whose_result_has_come_is_not_blamed() -> None:
    chunk = a_chunk(3)
    chunk.take(0, ["A", "B"])
    assert chunk.lose((1, 0.0), crash())
    assert list(chunk.todo) == [2]


def test_items_that_kill_their_reader_have_to_go_one_by_one() -> None:
    chunk = a_chunk()
    assert not chunk.lose(None, crash())
    assert chunk.is_unreadable
    chunk.state = JobState.SUCCEEDED
    assert not chunk.is_complete
    assert runs(chunk) == [([0, 1, 2, 3, 4, 5], True)]


def test_the_only_item_is_blamed_when_its_reader_dies() -> None:
    chunk = a_chunk(1)
    assert not chunk.lose(None, crash())
    assert not chunk.is_unreadable
    assert told(chunk) == [WorkerCrashed]


def test_items_that_no_worker_can_take_apart_have_to_go_one_by_one() -> None:
    several, one = a_chunk(), a_chunk(1)
    for chunk in (several, one):
        chunk.reject(RemoteError("garbled"))
        assert chunk.end_round(1) is None
        chunk.state = JobState.SUCCEEDED
    assert (several.is_unreadable, several.is_complete) == (True, False)
    assert (one.is_unreadable, told(one)) == (False, [RemoteError])


def test_nothing_of_an_abandoned_chunk_is_sent_again() -> None:
    chunk = a_chunk(retry=RetryPolicy(5))
    chunk.is_abandoned = True
    chunk.take_error(0, ValueError())
    assert not chunk.lose((1, 0.0), crash())
    assert chunk.end_round(1) is None


# Another attempt


def test_only_what_the_policy_allows_is_tried_again() -> None:
    chunk = a_chunk(retry=RetryPolicy(3, retry_on=(ValueError, WorkerCrashed)))
    chunk.take(0, ["A"])
    chunk.take_error(1, ValueError())
    chunk.take_error(2, LookupError())
    chunk.take_error(3, Unrecoverable())
    chunk.lose((4, 0.0), crash())
    chunk.take(0, ["F"])
    assert isinstance(chunk.end_round(1), ValueError)
    assert list(chunk.todo) == [1, 4]
    chunk.take(0, ["B"])
    chunk.take_error(1, ValueError())
    assert isinstance(chunk.end_round(2), ValueError)
    assert list(chunk.todo) == [4]
    chunk.take_error(0, ValueError())
    assert chunk.end_round(3) is None
    assert told(chunk) == ["A", "B", LookupError, Unrecoverable, ValueError, "F"]


def test_items_that_will_not_get_their_next_attempt_keep_their_last_error() -> None:
    chunk = a_chunk(3, retry=RetryPolicy(2))
    chunk.take(0, ["A"])
    chunk.take_error(1, ValueError())
    chunk.take_error(2, LookupError())
    assert chunk.end_round(1) is not None
    chunk.state, chunk.error = JobState.FAILED, crash()  # the pool has broken meanwhile
    assert [type(one) for one in outcomes(chunk.outcomes())] == [str, ValueError, LookupError]


# Time limits


def test_the_time_of_each_item_counts_from_its_own_start() -> None:
    chunk = a_chunk(timeout=10.0)
    assert chunk.time_left((0, 100.0), 100.0, 105.0) == 110.0
    assert chunk.time_left((3, 108.0), 100.0, 111.0) == 118.0
    assert chunk.time_left((3, 108.0), 100.0, 118.0) is None


def test_items_that_are_being_read_have_the_time_of_one() -> None:
    chunk = a_chunk(timeout=10.0)
    assert chunk.time_left(None, 100.0, 105.0) == 110.0
    assert chunk.time_left(None, 100.0, 110.0) is None


def test_when_the_last_item_has_ended_there_is_time_to_say_so() -> None:
    chunk = a_chunk(timeout=10.0)
    assert chunk.time_left((2**64 - 1, 100.0), 90.0, 200.0) == 210.0


def test_the_item_that_took_too_long_is_blamed_although_the_next_has_begun_since() -> None:
    chunk = a_chunk(timeout=10.0)
    assert chunk.time_left((2, 100.0), 90.0, 110.0) is None
    assert "item 102 " in chunk.describe((3, 110.0))
    assert chunk.lose((3, 110.0), JobTimeout("late", timeout=10.0, pid=1))
    assert list(chunk.todo) == [0, 1, 3, 4, 5]
    assert "item 103 " in chunk.describe((2, 110.0))  # the third of what is to be done now


# Parts


def test_a_chunk_is_taken_apart_into_runs_of_what_is_there_and_what_is_missing() -> None:
    chunk = a_chunk(8)
    chunk.take(1, ["B"])
    chunk.take_error(2, ValueError())
    chunk.take(7, ["H"])
    expected = [([0], True), ([1, 2], False), ([3, 4, 5, 6], True), ([7], False)]
    assert runs(chunk) == expected
    part = a_chunk(8, span=range(1, 3))
    part.fill_from(chunk)
    assert part.is_complete
    assert told(part) == ["B", ValueError]


def test_a_part_of_a_part_keeps_its_items_places() -> None:
    whole = a_chunk(8, span=range(2, 8))
    whole.take(0, ["C", "D"])
    assert runs(whole) == [([2, 3], False), ([4, 5, 6, 7], True)]
    rest = a_chunk(8, span=range(4, 8))
    rest.take(1, ["F"])
    rest.take_error(2, ValueError())
    assert runs(rest) == [([4], True), ([5, 6], False), ([7], True)]
    part = a_chunk(8, span=range(5, 7))
    part.fill_from(rest)
    assert told(part) == ["F", ValueError]


@pytest.fixture
def gone() -> Chunk:
    chunk = a_chunk(3)
    chunk.fail(RemoteError("cannot be sent"))
    return chunk


def test_a_chunk_that_cannot_be_sent_has_an_error_for_each_item(gone: Chunk) -> None:
    assert gone.state is JobState.SUCCEEDED
    assert gone.is_complete
    assert told(gone) == [RemoteError] * 3
