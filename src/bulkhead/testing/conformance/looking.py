"""Dead letters, lists and counts."""

from __future__ import annotations

import time

import pytest

from bulkhead.backends.base import (
    Backend,
    Burial,
    CancelAnswer,
    Message,
    Place,
    QueueCounts,
    Record,
    Return,
    Standing,
)
from bulkhead.testing.conformance.contract import LONG, Again, Contract, claims, ids_of, keep, until

__all__ = ["Looking"]


class Looking(Contract):
    """Tests of `bury`, `revive`, `delete`, `find`, `records` and `counts`."""

    def _bury(self, backend: Backend, *ids: str, error: bytes | None = None) -> None:
        keep(backend.broker, *ids)
        for id in ids:
            [claim] = claims(backend.broker)
            assert claim.id == id
            assert backend.broker.bury([Burial(claim.hold, f"because {id}", error)]) == [True]
            time.sleep(0.002)  # Why: the clock may have only milliseconds

    def test_a_buried_job_is_a_dead_letter(self, backend: Backend, again: Again) -> None:
        before = time.time()
        self._bury(backend, "a", error=bytes(range(256)))
        [record] = again().broker.find(["a"])
        assert record is not None
        assert (record.id, record.queue, record.place, record.body) == ("a", "q", Place.DEAD, b"a")
        assert (record.reason, record.error) == ("because a", bytes(range(256)))
        assert (record.attempt, record.leased_until) == (1, None)
        assert before - 0.1 <= record.due_at <= time.time() + 0.1
        assert record.enqueued_at == pytest.approx(before, abs=1.0)
        assert backend.broker.claim("q", 1, LONG) == []
        assert backend.broker.cancel(["a"]) == [CancelAnswer.UNKNOWN]
        assert backend.broker.counts() == {"q": QueueCounts(dead=1)}

    def test_a_burial_without_error_keeps_the_last_one(self, backend: Backend) -> None:
        keep(backend.broker, "a")
        backend.broker.nack([Return(claims(backend.broker)[0].hold, error=b"first")])
        assert backend.broker.bury([Burial(claims(backend.broker)[0].hold, "why")]) == [True]
        [record] = backend.broker.find(["a"])
        assert record is not None
        assert (record.error, record.reason, record.attempt) == (b"first", "why", 2)

    def test_a_hold_on_a_dead_letter_is_lost(self, backend: Backend) -> None:
        keep(backend.broker, "a")
        [claim] = claims(backend.broker)
        assert backend.broker.bury([Burial(claim.hold, "Grüße ☃")]) == [True]
        assert backend.broker.bury([Burial(claim.hold, "again")]) == [False]
        assert backend.broker.ack([claim.hold]) == [False]
        assert backend.broker.nack([Return(claim.hold)]) == [False]
        assert backend.broker.renew([claim.hold], LONG) == [Standing.LOST]
        assert [record.reason for record in backend.broker.records(Place.DEAD)] == ["Grüße ☃"]

    def test_a_revived_dead_letter_is_as_if_enqueued_now(self, backend: Backend) -> None:
        broker = backend.broker
        self._bury(backend, "a", "b", error=b"failed")
        keep(broker, "c", priority=0)
        time.sleep(0.005)
        before = time.time()
        assert broker.revive(["b", "no such job", "c", "a"]) == [True, False, False, True]
        [record] = broker.find(["a"])
        assert record is not None
        assert (record.place, record.attempt, record.reason, record.error) == (Place.READY, 0, "", None)
        assert before - 0.1 <= record.enqueued_at <= time.time() + 0.1
        assert record.due_at == pytest.approx(record.enqueued_at, abs=0.002)
        assert broker.counts()["q"].ready == 3
        assert broker.counts()["q"].dead == 0
        found = claims(broker, 3)
        assert ids_of(found) == ["c", "b", "a"]
        assert [(claim.attempt, claim.error) for claim in found] == [(1, None)] * 3
        assert broker.ack([claim.hold for claim in found]) == [True] * 3

    def test_a_revived_dead_letter_is_not_cancelled(self, backend: Backend) -> None:
        keep(backend.broker, "a")
        [claim] = claims(backend.broker)
        assert backend.broker.cancel(["a"]) == [CancelAnswer.REQUESTED]
        assert backend.broker.bury([Burial(claim.hold, "why")]) == [True]
        assert backend.broker.revive(["a"]) == [True]
        assert backend.broker.revive(["a"]) == [False]
        assert backend.broker.renew([claims(backend.broker)[0].hold], LONG) == [Standing.HELD]

    def test_what_is_not_running_can_be_deleted(self, backend: Backend) -> None:
        broker = backend.broker
        self._bury(backend, "dead")
        keep(broker, "running")
        [claim] = claims(broker)
        keep(broker, "ready")
        keep(broker, "scheduled", delay=LONG)
        answers = broker.delete(["running", "ready", "no such job", "dead", "scheduled"])
        assert answers == [False, True, False, True, True]
        assert broker.delete(["ready", "dead"]) == [False, False]
        assert broker.find(["ready", "dead", "scheduled"]) == [None] * 3
        assert broker.ack([claim.hold]) == [True]
        assert broker.counts() == {}
        assert broker.revive(["dead"]) == [False]

    @pytest.mark.parametrize("removed", ["a", "c", "scheduled"])
    @pytest.mark.parametrize("is_claimed", [False, True])
    def test_removing_a_job_takes_no_other_along(
        self, backend: Backend, again: Again, removed: str, is_claimed: bool
    ) -> None:
        broker, other = backend.broker, again().broker
        if is_claimed:
            keep(broker, "first")
            claims(broker)
        keep(broker, *"abcd")
        keep(broker, "scheduled", delay=LONG)
        assert other.counts()["q"].ready == 4
        assert other.cancel([removed]) == [CancelAnswer.REMOVED]
        left = [id for id in "abcd" if id != removed]
        assert broker.counts()["q"].ready == len(left)
        assert ids_of(claims(broker, len(left))) == left

    def test_dead_letters_alone_are_deleted_where_that_is_asked_for(self, backend: Backend) -> None:
        broker = backend.broker
        keep(broker, "dead", "running", "ready")
        [dead, _] = claims(broker, 2)
        keep(broker, "scheduled", delay=LONG)
        assert broker.bury([Burial(dead.hold, "why")]) == [True]
        names = ["running", "ready", "scheduled", "no such job", "dead"]
        assert broker.delete(names, dead_only=True) == [False, False, False, False, True]
        assert broker.delete(["dead"], dead_only=True) == [False]
        assert broker.records(Place.DEAD) == []
        counts = broker.counts()["q"]
        assert (counts.ready, counts.scheduled, counts.running, counts.dead) == (1, 1, 1, 0)

    def test_jobs_are_found_in_the_order_asked_for(self, backend: Backend) -> None:
        keep(backend.broker, *"abc")
        keep(backend.broker, "d", queue="else", delay=LONG, priority=-5)
        found = backend.broker.find(["d", "no such job", "a", "d"])
        assert [record and record.id for record in found] == ["d", None, "a", "d"]
        record = found[0]
        assert record is not None
        assert (record.queue, record.place, record.priority) == ("else", Place.SCHEDULED, -5)
        assert record.due_at == pytest.approx(record.enqueued_at + LONG, abs=0.002)
        assert (record.attempt, record.leased_until, record.reason, record.error) == (0, None, "", None)
        assert not record.is_cancelled
        assert backend.broker.find([]) == []

    def _pages(self, backend: Backend, place: Place, queue: str | None, size: int = 3) -> list[Record]:
        found: list[Record] = []
        while page := backend.broker.records(place, queue=queue, offset=len(found), limit=size):
            assert len(page) <= size
            assert {record.place for record in page} == {place}
            found += page
        return found

    def test_ready_jobs_are_listed_in_the_order_of_claims(self, backend: Backend) -> None:
        broker = backend.broker
        keep(broker, "low", "low 2", priority=-1)
        keep(broker, *(f"{i}" for i in range(7)))
        keep(broker, "high", "high 2", priority=1)
        keep(broker, "other", queue="else")
        keep(broker, "scheduled", delay=LONG)
        expected = ["high", "high 2", *(f"{i}" for i in range(7)), "low", "low 2"]
        assert ids_of(self._pages(backend, Place.READY, "q")) == expected
        assert ids_of(broker.records(Place.READY, queue="q", offset=1, limit=2)) == expected[1:3]
        assert sorted(ids_of(self._pages(backend, Place.READY, None))) == sorted([*expected, "other"])
        assert broker.records(Place.READY, queue="q", offset=11) == []
        assert broker.records(Place.READY, queue="no such queue") == []

    def test_scheduled_jobs_are_listed_by_due_time(self, backend: Backend) -> None:
        for i in (3, 1, 4, 0, 2):
            keep(backend.broker, f"{i}", delay=LONG + i, priority=i, queue=f"q{i % 2}")
        assert ids_of(self._pages(backend, Place.SCHEDULED, None, 2)) == list("01234")
        assert ids_of(self._pages(backend, Place.SCHEDULED, "q1", 1)) == list("13")

    def test_running_jobs_are_listed(self, backend: Backend) -> None:
        keep(backend.broker, *"abcdefgh")
        claims(backend.broker, 7)
        keep(backend.broker, "i", queue="else")
        claims(backend.broker, queue="else")
        assert sorted(ids_of(self._pages(backend, Place.RUNNING, "q"))) == list("abcdefg")
        assert sorted(ids_of(self._pages(backend, Place.RUNNING, None))) == list("abcdefgi")

    def test_dead_letters_are_listed_newest_first(self, backend: Backend) -> None:
        self._bury(backend, *"abcdefgh")
        keep(backend.broker, "i", queue="else")
        backend.broker.bury([Burial(claims(backend.broker, queue="else")[0].hold, "why")])
        assert ids_of(self._pages(backend, Place.DEAD, "q")) == list("hgfedcba")
        assert ids_of(self._pages(backend, Place.DEAD, None)) == list("ihgfedcba")

    def test_a_list_holds_100_unless_told(self, backend: Backend) -> None:
        keep(backend.broker, *(f"{i}" for i in range(130)))
        assert len(backend.broker.records(Place.READY)) == 100
        assert len(backend.broker.records(Place.READY, limit=1000)) == 130

    def test_counts_tell_where_the_jobs_of_each_queue_are(self, backend: Backend) -> None:
        broker = backend.broker
        self._bury(backend, "dead")
        keep(broker, "running 1", "running 2")
        claims(broker, 2)
        keep(broker, "ready 1", "ready 2", "ready 3")
        keep(broker, *(f"scheduled {i}" for i in range(4)), delay=LONG)
        keep(broker, "other", queue="else", delay=LONG)
        counts = broker.counts()
        q = counts["q"]
        assert (q.ready, q.scheduled, q.running, q.dead) == (3, 4, 2, 1)
        assert counts["else"] == QueueCounts(scheduled=1)
        assert set(counts) == {"q", "else"}

    def test_latency_is_how_long_the_oldest_ready_job_has_been_due(self, backend: Backend) -> None:
        broker = backend.broker
        keep(broker, "scheduled", delay=LONG)
        assert broker.counts()["q"].latency_seconds == 0
        keep(broker, "old", delay=0.1, priority=-1)
        due = time.time() + 0.1
        until(lambda: broker.counts()["q"].latency_seconds > 0.05)
        assert broker.counts()["q"].latency_seconds == pytest.approx(time.time() - due, abs=0.1)
        keep(broker, "new", priority=1)
        assert broker.counts()["q"].latency_seconds >= 0.05
        claims(broker, 2)
        assert broker.counts()["q"].latency_seconds == 0

    def test_a_scheduled_job_is_ready_when_it_is_due(self, backend: Backend) -> None:
        keep(backend.broker, "a", delay=0.1)
        assert backend.broker.counts()["q"].scheduled == 1
        until(lambda: backend.broker.counts()["q"].ready == 1)
        assert backend.broker.records(Place.SCHEDULED) == []
        assert ids_of(backend.broker.records(Place.READY)) == ["a"]

    def test_5000_jobs_are_found_and_removed_with_one_call_each(self, backend: Backend) -> None:
        names = [f"{i}" for i in range(5000)]
        assert all(backend.broker.enqueue_many([Message(name, "q", b"") for name in names]))
        assert [record and record.id for record in backend.broker.find(names)] == names
        assert backend.broker.delete(names[:2500]) == [True] * 2500
        assert backend.broker.cancel(names) == [CancelAnswer.UNKNOWN] * 2500 + [CancelAnswer.REMOVED] * 2500
        assert backend.broker.counts() == {}
