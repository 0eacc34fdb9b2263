"""What a claim is worth: leases, stale tokens, ack, nack, cancellation."""

from __future__ import annotations

import time

import pytest

from bulkhead.backends.base import Backend, Burial, CancelAnswer, Claim, Hold, Place, Return, Standing
from bulkhead.testing.conformance.contract import (
    LONG,
    SHORT,
    TICK,
    Again,
    Contract,
    claims,
    ids_of,
    keep,
    until,
)

__all__ = ["Leasing"]


class Leasing(Contract):
    """Tests of `renew`, `ack`, `nack` and `cancel`, and of claims that were lost."""

    def test_while_a_lease_holds_nobody_else_gets_the_job(self, backend: Backend, again: Again) -> None:
        keep(backend.broker, "a")
        start = time.monotonic()
        [claim] = claims(backend.broker, lease=SHORT)
        other = again().broker
        found: list[Claim] = []
        while not found:
            found = other.claim("q", 1, LONG)
        assert time.monotonic() - start > SHORT - TICK
        assert (found[0].id, found[0].attempt) == ("a", 2)
        assert found[0].hold.token != claim.hold.token

    def test_a_lease_that_ran_out_makes_the_job_ready(self, backend: Backend) -> None:
        keep(backend.broker, "a")
        claims(backend.broker, lease=SHORT)
        [record] = backend.broker.find(["a"])
        assert record is not None
        assert record.place is Place.RUNNING
        assert record.leased_until == pytest.approx(time.time() + SHORT, abs=0.1)
        until(lambda: backend.broker.counts()["q"].ready == 1)
        [record] = backend.broker.find(["a"])
        assert record is not None
        assert (record.place, record.leased_until, record.attempt) == (Place.READY, None, 1)
        assert ids_of(backend.broker.records(Place.READY)) == ["a"]
        assert backend.broker.records(Place.RUNNING) == []

    def _lapsed(self, backend: Backend) -> Claim:
        keep(backend.broker, "a")
        [claim] = claims(backend.broker, lease=SHORT)
        until(lambda: backend.broker.counts()["q"].ready == 1)
        return claim

    def test_a_job_whose_lease_ran_out_can_be_acked_until_somebody_claims_it(self, backend: Backend) -> None:
        claim = self._lapsed(backend)
        assert backend.broker.ack([claim.hold]) == [True]
        assert backend.broker.counts() == {}

    def test_a_lease_that_ran_out_can_be_renewed_until_somebody_claims_the_job(
        self, backend: Backend
    ) -> None:
        claim = self._lapsed(backend)
        assert backend.broker.renew([claim.hold], LONG) == [Standing.HELD]
        assert backend.broker.claim("q", 1, LONG) == []
        assert backend.broker.ack([claim.hold]) == [True]

    def test_a_job_whose_lease_ran_out_can_be_given_back_until_somebody_claims_it(
        self, backend: Backend
    ) -> None:
        claim = self._lapsed(backend)
        assert backend.broker.nack([Return(claim.hold, delay=LONG)]) == [True]
        assert backend.broker.counts()["q"].scheduled == 1

    def test_who_has_lost_a_job_changes_nothing(self, backend: Backend, again: Again) -> None:
        stale = self._lapsed(backend).hold
        [claim] = claims(again().broker)
        broker = backend.broker
        assert broker.ack([stale]) == [False]
        assert broker.nack([Return(stale, error=b"late")]) == [False]
        assert broker.bury([Burial(stale, "late", b"late")]) == [False]
        assert broker.renew([stale], LONG) == [Standing.LOST]
        [record] = broker.find(["a"])
        assert record is not None
        assert (record.place, record.error, record.attempt) == (Place.RUNNING, None, 2)
        assert broker.ack([claim.hold]) == [True]

    def test_a_hold_that_nobody_has_is_lost(self, backend: Backend) -> None:
        broker = backend.broker
        keep(broker, "ready", "held")
        [_ready, held] = claims(broker, 2)
        broker.nack([Return(_ready.hold)])
        wrong = held.hold._replace(token="x")
        for hold in (Hold("unknown", "q", held.hold.token), _ready.hold, wrong, wrong._replace(token="")):
            assert broker.ack([hold]) == [False]
            assert broker.nack([Return(hold)]) == [False]
            assert broker.bury([Burial(hold, "why")]) == [False]
            assert broker.renew([hold], LONG) == [Standing.LOST]
        assert broker.counts()["q"].ready == broker.counts()["q"].running == 1

    def test_a_job_is_settled_once(self, backend: Backend) -> None:
        keep(backend.broker, "a")
        [claim] = claims(backend.broker)
        assert backend.broker.ack([claim.hold]) == [True]
        assert backend.broker.ack([claim.hold]) == [False]
        assert backend.broker.nack([Return(claim.hold)]) == [False]
        assert backend.broker.renew([claim.hold], LONG) == [Standing.LOST]
        assert backend.broker.find(["a"]) == [None]

    def test_answers_come_in_the_order_of_the_holds(self, backend: Backend) -> None:
        broker = backend.broker
        keep(broker, *"abcdef")
        found = [claim.hold for claim in claims(broker, 6)]
        assert broker.ack([found[1], found[3]]) == [True, True]
        assert broker.cancel(["e"]) == [CancelAnswer.REQUESTED]
        lost, held = Standing.LOST, Standing.HELD
        assert broker.renew(found, LONG) == [held, lost, held, lost, Standing.CANCELLED, held]
        assert broker.nack([Return(hold, delay=LONG) for hold in found[:2]]) == [True, False]
        assert broker.bury([Burial(hold, "why") for hold in found[2:4]]) == [True, False]
        assert broker.ack(found) == [False, False, False, False, True, True]
        assert broker.ack([]) == broker.nack([]) == broker.bury([]) == []
        assert broker.renew([], LONG) == []

    def test_a_renewed_lease_holds_longer(self, backend: Backend, again: Again) -> None:
        keep(backend.broker, "a", "b")
        [renewed, _other] = claims(backend.broker, 2, lease=SHORT)
        assert backend.broker.renew([renewed.hold], LONG) == [Standing.HELD]
        assert ids_of(claims(again().broker)) == ["b"]
        [record] = backend.broker.find(["a"])
        assert record is not None
        assert (record.place, record.attempt) == (Place.RUNNING, 1)
        assert record.leased_until == pytest.approx(time.time() + LONG, abs=1.0)
        assert backend.broker.ack([renewed.hold]) == [True]

    def test_a_lease_can_be_renewed_for_less(self, backend: Backend) -> None:
        keep(backend.broker, "a")
        [claim] = claims(backend.broker)
        assert backend.broker.renew([claim.hold], SHORT) == [Standing.HELD]
        assert claims(backend.broker)[0].attempt == 2

    def test_a_failed_attempt_counts(self, backend: Backend) -> None:
        keep(backend.broker, "a", priority=3)
        for attempt in (1, 2, 3):
            [claim] = claims(backend.broker)
            assert (claim.attempt, claim.priority, claim.body) == (attempt, 3, b"a")
            assert backend.broker.nack([Return(claim.hold)]) == [True]
            [record] = backend.broker.find(["a"])
            assert record is not None
            assert (record.place, record.attempt) == (Place.READY, attempt)

    def test_an_attempt_that_is_not_to_count_does_not(self, backend: Backend) -> None:
        keep(backend.broker, "a")
        for _ in range(3):
            [claim] = claims(backend.broker)
            assert claim.attempt == 1
            assert backend.broker.nack([Return(claim.hold, counts=False)]) == [True]
        [record] = backend.broker.find(["a"])
        assert record is not None
        assert record.attempt == 0

    def test_the_last_error_stays_with_the_job(self, backend: Backend) -> None:
        errors = [(bytes(range(256)), bytes(range(256))), (None, bytes(range(256))), (b"", b"")]
        keep(backend.broker, "a")
        for left, seen in errors:
            [claim] = claims(backend.broker)
            assert backend.broker.nack([Return(claim.hold, error=left)]) == [True]
            [record] = backend.broker.find(["a"])
            assert record is not None
            assert record.error == seen
        assert claims(backend.broker)[0].error == b""

    def test_a_job_given_back_with_a_delay_comes_when_that_is_over(self, backend: Backend) -> None:
        keep(backend.broker, "a")
        [claim] = claims(backend.broker)
        before = time.time()
        assert backend.broker.nack([Return(claim.hold, delay=0.1)]) == [True]
        [record] = backend.broker.find(["a"])
        assert record is not None
        assert record.place is Place.SCHEDULED
        [later] = claims(backend.broker)
        assert time.time() >= before + 0.098
        assert later.due_at == pytest.approx(before + 0.1, abs=0.1)
        assert later.enqueued_at == pytest.approx(claim.enqueued_at, abs=0.002)

    def test_a_job_given_back_comes_after_those_that_were_due_before(self, backend: Backend) -> None:
        keep(backend.broker, "a", "b")
        [claim] = claims(backend.broker)
        time.sleep(0.005)  # Why: the clock may have only milliseconds
        assert backend.broker.nack([Return(claim.hold)]) == [True]
        assert ids_of(claims(backend.broker, 2)) == ["b", "a"]

    def test_a_job_given_back_at_its_place_is_the_next_again(self, backend: Backend) -> None:
        broker = backend.broker
        keep(broker, *"abcd")
        first = claims(broker, 2)
        back = [Return(claim.hold, counts=False, keeps_place=True) for claim in first]
        assert broker.nack(back) == [True, True]
        assert ids_of(broker.records(Place.READY)) == ["a", "b", "c", "d"]
        assert broker.counts()["q"].ready == 4
        again = claims(broker, 3)
        assert ids_of(again) == ["a", "b", "c"]
        assert [claim.attempt for claim in again] == [1, 1, 1]
        assert again[0].due_at == pytest.approx(first[0].due_at, abs=1e-5)
        assert broker.ack([claim.hold for claim in first]) == [False, False]
        assert broker.ack([claim.hold for claim in again]) == [True, True, True]

    def test_a_job_given_back_for_a_while_keeps_its_place_behind_it(self, backend: Backend) -> None:
        broker = backend.broker
        keep(broker, "a", "b")
        [claim] = claims(broker)
        assert broker.nack([Return(claim.hold, 0.2, keeps_place=True)]) == [True]
        [record] = broker.find(["a"])
        assert record is not None
        assert (record.place, record.attempt) == (Place.SCHEDULED, 1)
        assert record.due_at == pytest.approx(time.time() + 0.2, abs=0.1)
        assert ids_of(broker.records(Place.SCHEDULED)) == ["a"]
        assert (broker.counts()["q"].scheduled, broker.counts()["q"].ready) == (1, 1)
        assert ids_of(broker.records(Place.READY)) == ["b"]
        keep(broker, "c")
        until(lambda: broker.counts()["q"].ready == 3)
        order = ["a", "b", "c"] if self.keeps_places else ["b", "c", "a"]
        if self.keeps_places:
            assert ids_of(broker.records(Place.READY)) == order
        assert ids_of(claims(broker, 3)) == order

    def test_a_job_given_back_for_a_while_can_be_removed_meanwhile(self, backend: Backend) -> None:
        broker = backend.broker
        keep(broker, "a", "b", "c")
        back = [Return(claim.hold, LONG, keeps_place=True) for claim in claims(broker, 3)]
        assert broker.nack(back) == [True, True, True]
        assert broker.delete(["a"]) == [True]
        assert broker.cancel(["b"]) == [CancelAnswer.REMOVED]
        assert broker.counts()["q"].scheduled == 1
        assert ids_of(broker.records(Place.SCHEDULED)) == ["c"]
        assert broker.find(["a", "b"]) == [None, None]

    def test_cancelling_removes_what_is_not_running(self, backend: Backend, again: Again) -> None:
        broker = backend.broker
        keep(broker, "ready")
        keep(broker, "scheduled", delay=LONG)
        removed, unknown = CancelAnswer.REMOVED, CancelAnswer.UNKNOWN
        assert again().broker.cancel(["ready", "no such job", "scheduled"]) == [removed, unknown, removed]
        assert broker.cancel(["ready", "scheduled"]) == [unknown, unknown]
        assert broker.claim("q", 5, LONG) == []
        assert broker.counts() == {}
        assert broker.cancel([]) == []

    def test_cancelling_asks_the_one_who_runs_the_job(self, backend: Backend, again: Again) -> None:
        broker = backend.broker
        keep(broker, "a", "b")
        found = claims(broker, 2)
        assert again().broker.cancel(["a"]) == [CancelAnswer.REQUESTED]
        assert again().broker.cancel(["a"]) == [CancelAnswer.REQUESTED]
        records = broker.find(["a", "b"])
        assert [record and record.is_cancelled for record in records] == [True, False]
        holds = [claim.hold for claim in found]
        assert broker.renew(holds, LONG) == [Standing.CANCELLED, Standing.HELD]
        assert broker.renew(holds, LONG) == [Standing.CANCELLED, Standing.HELD]
        assert broker.ack(holds) == [True, True]

    def test_a_requested_cancellation_outlasts_the_attempt(self, backend: Backend) -> None:
        broker = backend.broker
        keep(broker, "a")
        [claim] = claims(broker)
        assert broker.cancel(["a"]) == [CancelAnswer.REQUESTED]
        assert broker.nack([Return(claim.hold)]) == [True]
        [claim] = claims(broker, lease=SHORT)
        assert broker.renew([claim.hold], SHORT) == [Standing.CANCELLED]
        [claim] = claims(broker)  # the lease ran out
        assert broker.renew([claim.hold], LONG) == [Standing.CANCELLED]

    def test_a_job_given_back_after_a_cancellation_can_be_removed(self, backend: Backend) -> None:
        keep(backend.broker, "a")
        [claim] = claims(backend.broker)
        assert backend.broker.cancel(["a"]) == [CancelAnswer.REQUESTED]
        assert backend.broker.nack([Return(claim.hold)]) == [True]
        assert backend.broker.cancel(["a"]) == [CancelAnswer.REMOVED]

    def test_a_job_whose_lease_ran_out_is_not_running_when_it_is_cancelled(self, backend: Backend) -> None:
        claim = self._lapsed(backend)
        assert backend.broker.cancel(["a"]) == [CancelAnswer.REMOVED]
        assert backend.broker.ack([claim.hold]) == [False]
        assert backend.broker.renew([claim.hold], LONG) == [Standing.LOST]
