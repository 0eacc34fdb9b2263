"""What a broker keeps, in which order it gives it out, and which ids are taken."""

from __future__ import annotations

import time

import pytest

from bulkhead.backends.base import Backend, Burial, Message, Place
from bulkhead.errors import MessageTooLarge
from bulkhead.testing.conformance.contract import (
    LONG,
    ODD_NAMES,
    SHORT,
    TICK,
    Again,
    Contract,
    claims,
    ids_of,
    keep,
    until,
)

__all__ = ["Enqueueing"]


class Enqueueing(Contract):
    """Tests of `enqueue_many`, and of the order of claims."""

    def test_a_job_comes_as_it_was_enqueued(self, backend: Backend) -> None:
        before = time.time()
        assert backend.broker.enqueue_many([Message("a", "q", b"body", priority=7)]) == [True]
        after = time.time()
        [claim] = claims(backend.broker)
        assert (claim.id, claim.queue, claim.body, claim.priority) == ("a", "q", b"body", 7)
        assert (claim.attempt, claim.error) == (1, None)
        assert before - 0.1 <= claim.enqueued_at <= after + 0.1
        assert claim.due_at == pytest.approx(claim.enqueued_at, abs=0.002)

    def test_nothing_enqueued_is_nothing_done(self, backend: Backend) -> None:
        assert backend.broker.enqueue_many([]) == []
        assert backend.broker.counts() == {}

    def test_1000_jobs_are_claimed_by_priority_and_then_in_order_of_arrival(self, backend: Backend) -> None:
        priorities = (-100, 0, 100, 7, -3)
        messages = [Message(str(i), "q", b"", priority=priorities[i * 3 % 5]) for i in range(1000)]
        for start in range(0, 1000, 50):
            assert all(backend.broker.enqueue_many(messages[start : start + 50]))
        found = [claim.id for _ in range(10) for claim in claims(backend.broker, 100)]
        expected = sorted(messages, key=lambda message: -message.priority)
        assert found == [message.id for message in expected]

    def test_jobs_of_one_call_are_claimed_one_by_one_in_their_order(self, backend: Backend) -> None:
        names = [f"{i * 7919 % 50}" for i in range(50)]
        keep(backend.broker, *names)
        assert [claims(backend.broker)[0].id for _ in names] == names

    def test_equals_are_claimed_in_order_of_their_due_times(self, backend: Backend) -> None:
        broker = backend.broker
        keep(broker, "late", delay=0.12)
        keep(broker, "early", delay=0.06)
        keep(broker, "now")
        keep(broker, "past", due_at=1.0)
        keep(broker, "urgent", priority=1, delay=0.1)
        until(lambda: broker.counts()["q"].ready == 5)
        assert ids_of(claims(broker, 5)) == ["urgent", "now", "past", "early", "late"]

    def test_an_instant_takes_the_place_of_a_delay(self, backend: Backend) -> None:
        keep(backend.broker, "a", delay=1000.0, due_at=time.time() - 5)
        assert ids_of(claims(backend.broker)) == ["a"]

    def test_a_taken_id_is_refused_and_changes_nothing(self, backend: Backend) -> None:
        broker = backend.broker
        keep(broker, "a", queue="q")
        [first] = broker.find(["a"])
        other = Message("a", "elsewhere", b"other", priority=9, delay=5.0)
        assert broker.enqueue_many([other, Message("b", "q", b""), other]) == [False, True, False]
        assert broker.find(["a"]) == [first]
        assert set(broker.counts()) == {"q"}

    def test_an_id_is_taken_by_the_first_of_one_call(self, backend: Backend) -> None:
        messages = [Message("a", "q", b"1"), Message("a", "q", b"2"), Message("b", "q", b"3")]
        assert backend.broker.enqueue_many(messages) == [True, False, True]
        assert [claim.body for claim in claims(backend.broker, 2)] == [b"1", b"3"]

    @pytest.mark.parametrize("place", [Place.SCHEDULED, Place.RUNNING, Place.DEAD])
    def test_the_id_of_a_job_is_taken_wherever_it_is(self, backend: Backend, place: Place) -> None:
        broker = backend.broker
        keep(broker, "a", delay=LONG if place is Place.SCHEDULED else 0.0)
        found = [] if place is Place.SCHEDULED else claims(broker)
        if place is Place.DEAD:
            assert broker.bury([Burial(found[0].hold, "why")]) == [True]
        assert broker.enqueue_many([Message("a", "q", b"")]) == [False]
        [record] = broker.find(["a"])
        assert record is not None
        assert record.place is place

    def test_an_id_is_free_at_once_when_nobody_is_to_remember_it(self, backend: Backend) -> None:
        keep(backend.broker, "a", "b")
        backend.broker.ack([claim.hold for claim in claims(backend.broker)])
        assert backend.broker.delete(["b"]) == [True]
        keep(backend.broker, "a", "b")

    @pytest.mark.parametrize("end", ["ack", "delete", "cancel"])
    def test_an_id_stays_taken_for_as_long_as_it_is_to_be_remembered(
        self, backend: Backend, again: Again, end: str
    ) -> None:
        broker = backend.broker
        keep(broker, "long", remember=LONG)
        keep(broker, "a", remember=SHORT)
        start = time.monotonic()
        if end == "ack":
            assert broker.ack([claim.hold for claim in claims(broker, 2)]) == [True, True]
        else:
            getattr(broker, end)(["long", "a"])
        assert broker.find(["a"]) == [None]
        assert broker.counts() == {}
        refused = broker.enqueue_many([Message("a", "q", b"")]) == [False]
        assert refused or time.monotonic() - start > SHORT - TICK
        until(lambda: broker.enqueue_many([Message("a", "q", b"")]) == [True])
        assert time.monotonic() - start > SHORT - TICK
        assert again().broker.enqueue_many([Message("long", "q", b"")]) == [False]

    def test_bodies_are_any_bytes(self, backend: Backend) -> None:
        bodies = [b"", bytes(range(256)), b"\0", bytes(range(256)) * 1200, b"\r\n"]
        messages = [Message(str(i), "q", body) for i, body in enumerate(bodies)]
        assert all(backend.broker.enqueue_many(messages))
        assert [claim.body for claim in claims(backend.broker, len(bodies))] == bodies
        assert [record.body for record in backend.broker.find(["0", "1", "3"]) if record] == [
            bodies[0],
            bodies[1],
            bodies[3],
        ]

    def test_a_body_of_2_megabytes_is_kept_or_said_to_be_too_large(self, backend: Backend) -> None:
        body = b"x" * 2_000_000
        messages = [Message("small", "q", b""), Message("large", "q", body)]
        try:
            assert backend.broker.enqueue_many(messages) == [True, True]
        except MessageTooLarge as error:
            assert error.size_bytes >= len(body) > error.limit_bytes > 300_000
            assert backend.broker.find(["small", "large"]) == [None, None]
        else:
            assert claims(backend.broker, 2)[1].body == body

    def test_ids_are_any_text_and_each_is_another(self, backend: Backend) -> None:
        keep(backend.broker, *ODD_NAMES)
        found = claims(backend.broker, len(ODD_NAMES))
        assert ids_of(found) == list(ODD_NAMES)
        records = backend.broker.find(ODD_NAMES)
        assert [record and record.id for record in records] == list(ODD_NAMES)
        assert all(backend.broker.ack([claim.hold for claim in found]))

    def test_names_of_queues_are_any_text_and_each_is_another(self, backend: Backend) -> None:
        broker = backend.broker
        for number, name in enumerate(ODD_NAMES):
            keep(broker, f"{number}", queue=name)
        assert set(broker.counts()) == set(ODD_NAMES)
        broker.pause(ODD_NAMES[-1])
        broker.pause(ODD_NAMES[0])
        assert broker.paused() == {ODD_NAMES[0], ODD_NAMES[-1]}
        for number, name in list(enumerate(ODD_NAMES))[1:-1]:
            [claim] = claims(broker, queue=name)
            assert (claim.id, claim.queue) == (f"{number}", name)
            assert ids_of(broker.records(Place.RUNNING, queue=name)) == [f"{number}"]

    def test_5000_jobs_go_in_with_one_call_and_out_again(self, backend: Backend) -> None:
        broker = backend.broker
        names = [str(i) for i in range(5000)]
        keep(broker, *names)
        assert broker.counts()["q"].ready == 5000
        assert broker.enqueue_many([Message(name, "q", b"") for name in names]) == [False] * 5000
        found = claims(broker, 5000)
        assert ids_of(found) == names
        assert broker.ack([claim.hold for claim in found]) == [True] * 5000
        assert broker.counts() == {}
