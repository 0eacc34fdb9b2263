"""Ending claims and keeping outcomes: in one step where the place has a `Settler`, in two where it has none."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from bulkhead.backends.base import Backend, Claim, Ending, Hold, Outcome, OutcomeState, Place, Return
from bulkhead.errors import MessageTooLarge
from bulkhead.testing.conformance.contract import LONG, SHORT, Again, Contract, claims, keep, until

__all__ = ["Settling"]

SUCCEEDED, FAILED, CANCELLED = OutcomeState.SUCCEEDED, OutcomeState.FAILED, OutcomeState.CANCELLED


def _outcome(claim: Claim, state: OutcomeState = SUCCEEDED, **rest: Any) -> Outcome:
    facts = {"attempt": claim.attempt, "enqueued_at": claim.enqueued_at, "finished_at": time.time(), **rest}
    return Outcome(claim.id, claim.queue, "task", state, **facts)


def _success(claim: Claim, value: bytes = b"value", **rest: Any) -> Ending:
    return Ending(claim.hold, _outcome(claim, value=value, **rest))


def _death(claim: Claim) -> Ending:
    return Ending(claim.hold, _outcome(claim, FAILED, error=b"told"), "no use", b"error")


def _values(backend: Backend, ids: Sequence[str]) -> list[bytes | None]:
    return [outcome and outcome.value for outcome in backend.results.get_many(ids)]


def _lost(backend: Backend, again: Again) -> tuple[Claim, Claim]:
    """Return a claim that was lost, and the one of whoever has the job now."""
    keep(backend.broker, "a")
    [stale] = claims(backend.broker, lease=SHORT)
    until(lambda: backend.broker.counts()["q"].ready == 1)
    [claim] = claims(again().broker)
    return stale, claim


class Settling(Contract):
    """Tests of `Backend.settle`."""

    def test_an_ending_forgets_the_job_and_keeps_its_outcome(self, backend: Backend, again: Again) -> None:
        keep(backend.broker, "a", "b")
        found = claims(backend.broker, 2)
        ends = [Ending(found[0].hold, _outcome(found[0], value=b"1")), _success(found[1], bytes(range(256)))]
        assert backend.settle(ends) == [True, True]
        assert backend.broker.counts() == {}
        for ending, kept in zip(ends, again().results.get_many(["a", "b"]), strict=True):
            assert ending.outcome is not None
            assert kept is not None
            assert (kept.state, kept.value, kept.attempt) == (SUCCEEDED, ending.outcome.value, 1)
            assert kept.finished_at == pytest.approx(ending.outcome.finished_at, abs=0.001)
        assert [one.id for one in backend.results.outcomes(SUCCEEDED, queue="q")] == ["b", "a"]

    def test_an_ending_without_an_outcome_keeps_nothing(self, backend: Backend) -> None:
        keep(backend.broker, "a")
        [claim] = claims(backend.broker)
        assert backend.settle([Ending(claim.hold)]) == [True]
        assert backend.broker.find(["a"]) == [None]
        assert backend.results.get_many(["a"]) == [None]

    def test_an_ending_with_a_reason_makes_a_dead_letter(self, backend: Backend) -> None:
        keep(backend.broker, "a", "b")
        first, second = claims(backend.broker, 2)
        assert backend.settle([_death(first), Ending(second.hold, None, "why")]) == [True, True]
        one, other = backend.broker.find(["a", "b"])
        assert one is not None
        assert (one.place, one.reason, one.error, one.attempt) == (Place.DEAD, "no use", b"error", 1)
        assert other is not None
        assert (other.place, other.reason, other.error) == (Place.DEAD, "why", None)
        kept, nothing = backend.results.get_many(["a", "b"])
        assert kept is not None
        assert (kept.state, kept.error) == (FAILED, b"told")
        assert nothing is None

    def test_an_outcome_takes_the_place_of_what_the_job_has_saved(self, backend: Backend) -> None:
        keep(backend.broker, "a")
        [claim] = claims(backend.broker)
        backend.results.save_many([_outcome(claim, OutcomeState.RUNNING, value=b"half")])
        assert backend.settle([_success(claim, b"whole")]) == [True]
        assert _values(backend, ["a"]) == [b"whole"]
        assert {state: n for state, n in backend.results.counts().items() if n} == {SUCCEEDED: 1}

    def test_an_outcome_takes_the_place_of_that_of_a_former_job_of_the_id(self, backend: Backend) -> None:
        for value in (b"first", b"second"):
            keep(backend.broker, "a")
            if value == b"first":
                [claim] = claims(backend.broker)
                assert backend.broker.nack([Return(claim.hold)]) == [True]
            [claim] = claims(backend.broker)
            assert backend.settle([_success(claim, value)]) == [True]
        assert _values(backend, ["a"]) == [b"second"]

    def test_a_dead_letter_that_is_revived_can_end_otherwise(self, backend: Backend) -> None:
        keep(backend.broker, "a")
        [claim] = claims(backend.broker)
        assert backend.broker.nack([Return(claim.hold)]) == [True]
        [claim] = claims(backend.broker)
        assert backend.settle([_death(claim)]) == [True]
        assert backend.broker.revive(["a"]) == [True]
        [claim] = claims(backend.broker)
        assert claim.attempt == 1
        assert backend.settle([_success(claim, b"after all")]) == [True]
        assert _values(backend, ["a"]) == [b"after all"]

    def test_who_has_lost_a_job_keeps_no_outcome(self, backend: Backend, again: Again) -> None:
        stale, claim = _lost(backend, again)
        for ending in (_success(stale, b"late"), _death(stale), Ending(stale.hold)):
            assert backend.settle([ending]) == [False]
            assert backend.results.get_many(["a"]) == [None]
        [record] = backend.broker.find(["a"])
        assert record is not None
        assert (record.place, record.attempt, record.error) == (Place.RUNNING, 2, None)
        assert backend.settle([_success(claim, b"right")]) == [True]

    @pytest.mark.parametrize("is_sure", [False, True], ids=["asked", "taken for sure"])
    def test_an_end_that_comes_late_leaves_the_outcome_of_the_later_attempt(
        self, backend: Backend, again: Again, is_sure: bool
    ) -> None:
        stale, claim = _lost(backend, again)
        assert again().settle([_success(claim, b"right")]) == [True]
        # Taken for sure: as by a consumer that was frozen just behind its look.
        sure_until = time.monotonic() + LONG if is_sure else 0.0
        for ending in (_success(stale, b"late"), _death(stale), Ending(stale.hold)):
            assert backend.settle([ending], sure_until=sure_until) == [False]
        assert _values(backend, ["a"]) == [b"right"]
        assert backend.broker.counts() == {}

    def test_a_job_whose_lease_ran_out_can_be_ended_until_somebody_claims_it(self, backend: Backend) -> None:
        keep(backend.broker, "a")
        [claim] = claims(backend.broker, lease=SHORT)
        until(lambda: backend.broker.counts()["q"].ready == 1)
        assert backend.settle([_success(claim)]) == [True]
        assert backend.broker.counts() == {}
        assert _values(backend, ["a"]) == [b"value"]

    def test_an_ending_that_is_told_again_is_true_again_and_changes_nothing(
        self, backend: Backend, again: Again
    ) -> None:
        keep(backend.broker, "a", "b", "c", "new")
        found = claims(backend.broker, 3)
        ends = [_success(found[0]), _death(found[1]), Ending(found[2].hold)]
        assert backend.settle(ends) == [True, True, True]
        kept = backend.results.get_many(["a", "b", "c"])
        # Of what leaves no outcome nobody can see that it was we.
        assert again().settle(ends) == [True, True, False]
        assert backend.results.get_many(["a", "b", "c"]) == kept
        assert backend.broker.counts()["q"].dead == 1
        # Also among others that are told for the first time.
        assert backend.settle([ends[0], _success(claims(backend.broker)[0])]) == [True, True]
        assert {state: n for state, n in backend.results.counts().items() if n} == {SUCCEEDED: 2, FAILED: 1}
        other = ends[0].outcome and ends[0].outcome._replace(value=b"another")
        assert backend.settle([Ending(found[0].hold, other)], sure_until=0.0) == [False]
        assert _values(backend, ["a"]) == [b"value"]

    def test_a_hold_that_nobody_has_ends_nothing(self, backend: Backend) -> None:
        keep(backend.broker, "ready", "held")
        ready, held = claims(backend.broker, 2)
        backend.broker.nack([Return(ready.hold)])
        for claim, hold in (
            (held, Hold("unknown", "q", held.hold.token)),
            (ready, ready.hold),
            (held._replace(attempt=7), held.hold._replace(token="x")),
            (held._replace(attempt=7), held.hold._replace(token="")),
        ):
            outcome = _outcome(claim._replace(hold=hold))
            assert backend.settle([Ending(hold, outcome, reason) for reason in (None, "why")]) == [False] * 2
        assert backend.broker.counts()["q"].ready == backend.broker.counts()["q"].running == 1
        assert backend.results.get_many(["unknown", "held"]) == [None, None]

    def test_answers_come_in_the_order_of_the_endings(self, backend: Backend) -> None:
        keep(backend.broker, *"abcdef")
        a, b, c, d, e, f = claims(backend.broker, 6)
        assert backend.broker.ack([b.hold, e.hold]) == [True, True]
        ends = [_death(a), _success(b), Ending(c.hold), _success(d), _death(e), _success(f)]
        assert backend.settle(ends) == [True, False, True, True, False, True]
        assert backend.settle([]) == []
        found = backend.results.get_many(list("abcdef"))
        assert [one and one.state for one in found] == [FAILED, None, None, SUCCEEDED, None, SUCCEEDED]

    def test_3000_claims_are_ended_with_one_call(self, backend: Backend) -> None:
        names = [f"{i}" for i in range(3000)]
        keep(backend.broker, *names)
        found = claims(backend.broker, 3000)
        assert backend.settle([_success(one, one.id.encode()) for one in found]) == [True] * 3000
        assert backend.broker.counts() == {}
        assert _values(backend, names) == [name.encode() for name in names]

    def test_an_outcome_of_2_megabytes_is_kept_or_said_to_be_too_large(self, backend: Backend) -> None:
        keep(backend.broker, "a", "b")
        found = claims(backend.broker, 2)
        ends = [_success(found[0]), _success(found[1], b"x" * 2_000_000)]
        try:
            assert backend.settle(ends) == [True, True]
        except MessageTooLarge as error:
            assert error.size_bytes > error.limit_bytes > 300_000
            assert backend.results.get_many(["a", "b"]) == [None, None]
            assert backend.settle([ends[0], _success(found[1], b"small")]) == [True, True]
        else:
            assert [len(value or b"") for value in _values(backend, ["a", "b"])] == [5, 2_000_000]
        assert backend.broker.counts() == {}

    def test_a_claim_of_another_namespace_ends_nothing(self, backend: Backend, again: Again) -> None:
        other = again("other")
        keep(backend.broker, "a")
        [claim] = claims(backend.broker)
        assert other.settle([_success(claim)]) == [False]
        keep(other.broker, "a")
        [theirs] = claims(other.broker)
        assert other.settle([Ending(claim.hold)]) == [False]
        assert other.results.get_many(["a"]) == backend.results.get_many(["a"]) == [None]
        assert backend.settle([_success(claim)]) == [True]
        assert other.results.get_many(["a"]) == [None]
        assert other.settle([_success(theirs)]) == [True]

    def test_of_two_threads_that_end_a_claim_one_has_ended_it(self, backend: Backend, again: Again) -> None:
        names = [f"{i}" for i in range(40)]
        keep(backend.broker, *names)
        found = claims(backend.broker, 40)
        start = threading.Barrier(2)
        answers: dict[bytes, list[bool]] = {}

        def end(own: Backend, value: bytes) -> None:
            start.wait()
            answers[value] = [own.settle([_success(claim, value)])[0] for claim in found]

        threads = [threading.Thread(target=end, args=(again(), value)) for value in (b"one", b"other")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for at, value in enumerate(_values(backend, [claim.id for claim in found])):
            assert value in answers
            assert answers[value][at]
            if backend.settler is not None:
                assert answers[b"one"][at] != answers[b"other"][at]
        assert backend.broker.counts() == {}
