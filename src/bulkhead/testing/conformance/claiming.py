"""Claims: due times, waiting, several claimers at once, paused queues."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from bulkhead.backends.base import Backend, Broker, Message, Place
from bulkhead.testing.conformance.contract import (
    LONG,
    SHORT,
    Again,
    Contract,
    claims,
    ids_of,
    keep,
    soonest,
    until,
)

__all__ = ["Claiming"]


class Claiming(Contract):
    """Tests of `claim`, `pause` and `resume`."""

    def test_no_more_are_claimed_than_asked_for(self, backend: Backend) -> None:
        keep(backend.broker, "a", "b", "c")
        assert ids_of(backend.broker.claim("q", 2, LONG)) == ["a", "b"]
        assert ids_of(backend.broker.claim("q", 2, LONG)) == ["c"]
        assert backend.broker.claim("q", 2, LONG) == []

    def test_a_claim_takes_from_its_queue_only(self, backend: Backend) -> None:
        keep(backend.broker, "a", queue="one")
        assert backend.broker.claim("two", 5, LONG) == []
        assert ids_of(claims(backend.broker, queue="one")) == ["a"]

    def test_a_token_is_never_given_twice(self, backend: Backend, again: Again) -> None:
        other = again().broker
        keep(backend.broker, *(str(i) for i in range(20)))
        tokens = []
        for _ in range(2):
            found = claims(backend.broker, 10, SHORT) + claims(other, 10, SHORT)
            tokens += [claim.hold.token for claim in found]
            until(lambda: backend.broker.counts()["q"].ready == 20)
        assert len(set(tokens)) == 40

    def test_no_job_is_claimed_before_it_is_due(self, backend: Backend) -> None:
        delays = [0.03 * i for i in range(6)]
        before = time.time()
        backend.broker.enqueue_many([Message(str(i), "q", b"", delay=d) for i, d in enumerate(delays)])
        after = time.time()
        for delay in delays:
            [claim] = claims(backend.broker)
            now = time.time()
            assert claim.due_at - claim.enqueued_at <= delay + 0.002
            assert before + delay - 0.002 <= claim.due_at <= after + delay + 0.002
            assert now >= claim.due_at - 0.002

    def test_a_job_is_claimed_within_100_ms_after_it_is_due(self, backend: Backend) -> None:
        def lag() -> float:
            due = time.time() + 0.1
            assert backend.broker.enqueue_many([Message(str(due), "q", b"", due_at=due)]) == [True]
            [claim] = claims(backend.broker)
            lag = time.time() - due
            assert abs(claim.due_at - due) < 0.002
            assert lag > -0.002
            return lag

        soonest(lag, bound=0.1)

    def test_100_jobs_due_at_once_are_claimed_within_100_ms(self, backend: Backend) -> None:
        def lag() -> float:
            due = time.time() + 0.15
            messages = [Message(f"{due} {i}", "q", b"", due_at=due) for i in range(100)]
            assert all(backend.broker.enqueue_many(messages))
            found = claims(backend.broker, 100)
            lag = time.time() - due
            assert ids_of(found) == [message.id for message in messages]
            return lag

        soonest(lag, bound=0.1)

    def test_waiting_for_nothing_ends_in_time(self, backend: Backend) -> None:
        def overrun() -> float:
            start = time.monotonic()
            assert backend.broker.claim("q", 5, LONG, wait=0.1) == []
            return time.monotonic() - start - 0.1

        soonest(overrun, bound=0.1)

    def test_a_job_that_another_connection_enqueues_ends_the_wait(
        self, backend: Backend, again: Again
    ) -> None:
        other = again().broker
        self._wakes(backend.broker, other)

    def test_a_job_that_the_same_connection_enqueues_ends_the_wait(self, backend: Backend) -> None:
        self._wakes(backend.broker, backend.broker)

    def _wakes(self, claimer: Broker, enqueuer: Broker) -> None:
        def lag() -> float:
            def enqueue() -> None:
                waiting.wait()
                time.sleep(
                    0.05
                )  # Why: the claimer is to be in its wait; were it not, the test would only be easier
                name = str(time.time())
                keep(enqueuer, name)
                enqueued.append(time.monotonic())

            waiting = threading.Event()
            enqueued: list[float] = []
            thread = threading.Thread(target=enqueue)
            thread.start()
            waiting.set()
            claims(claimer)
            claimed = time.monotonic()
            thread.join()
            return claimed - enqueued[0]

        soonest(lag, bound=0.04)

    def test_a_lease_that_runs_out_ends_the_wait(self, backend: Backend, again: Again) -> None:
        keep(backend.broker, "a")
        claims(backend.broker, lease=SHORT)
        start = time.monotonic()
        assert ids_of(claims(again().broker)) == ["a"]
        assert time.monotonic() - start > SHORT - 0.1

    def test_8_threads_claim_1000_jobs_each_exactly_once(self, backend: Backend, again: Again) -> None:
        def work(broker: Broker) -> list[str]:
            mine: list[str] = []
            while found := broker.claim("q", 7, LONG):
                mine += ids_of(found)
                assert all(broker.ack([claim.hold for claim in found]))
            return mine

        keep(backend.broker, *(str(i) for i in range(1000)))
        brokers = [backend.broker] * 4 + [again().broker for _ in range(4)]
        with ThreadPoolExecutor(8) as threads:
            found = [name for names in threads.map(work, brokers) for name in names]
        assert Counter(found) == Counter(str(i) for i in range(1000))
        assert backend.broker.counts() == {}

    def test_8_threads_that_enqueue_the_same_ids_keep_each_once(self, backend: Backend, again: Again) -> None:
        def work(broker: Broker) -> list[bool]:
            return broker.enqueue_many([Message(str(i), "q", b"") for i in range(50)])

        brokers = [backend.broker] * 4 + [again().broker for _ in range(4)]
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(work, brokers))
        assert [sum(kept) for kept in zip(*answers, strict=True)] == [1] * 50
        assert backend.broker.counts()["q"].ready == 50

    def test_of_a_paused_queue_nothing_is_claimed(self, backend: Backend, again: Again) -> None:
        other = again().broker
        keep(backend.broker, "a")
        keep(backend.broker, "b", queue="else")
        backend.broker.pause("q")
        backend.broker.pause("q")
        keep(other, "c")
        assert other.paused() == {"q"}
        assert other.claim("q", 5, LONG) == []
        assert other.claim("q", 5, LONG, wait=0.05) == []
        assert ids_of(claims(other, queue="else")) == ["b"]
        assert backend.broker.counts()["q"].ready == 2
        other.resume("q")
        other.resume("q")
        other.resume("never paused")
        assert backend.broker.paused() == frozenset()
        assert ids_of(claims(backend.broker, 2)) == ["a", "c"]

    def test_a_queue_without_jobs_can_be_paused(self, backend: Backend) -> None:
        backend.broker.pause("q")
        assert backend.broker.counts() == {}
        keep(backend.broker, "a")
        assert backend.broker.claim("q", 1, LONG) == []
        assert ids_of(backend.broker.records(Place.READY, queue="q")) == ["a"]

    def test_running_jobs_of_a_paused_queue_go_on(self, backend: Backend) -> None:
        keep(backend.broker, "a")
        [claim] = claims(backend.broker)
        backend.broker.pause("q")
        assert [standing.value for standing in backend.broker.renew([claim.hold], LONG)] == ["held"]
        assert backend.broker.ack([claim.hold]) == [True]

    def test_resuming_ends_the_wait_of_who_waits_for_a_paused_queue(
        self, backend: Backend, again: Again
    ) -> None:
        broker, other = backend.broker, again().broker
        keep(broker, "a")
        broker.pause("q")
        with ThreadPoolExecutor(1) as threads:
            found = threads.submit(claims, broker)
            other.resume("q")
            assert ids_of(found.result()) == ["a"]
