"""Who else may be there: another namespace, a forked copy, a connection that is closed."""

from __future__ import annotations

from bulkhead.backends.base import Backend, Message
from bulkhead.testing.conformance.contract import LONG, Again, Contract, claims, keep

__all__ = ["Sharing"]


class Sharing(Contract):
    """Tests of what the connections of a broker share."""

    def test_namespaces_do_not_see_each_other(self, backend: Backend, again: Again) -> None:
        broker, other = backend.broker, again("other").broker
        keep(broker, "a")
        assert other.find(["a"]) == [None]
        assert other.counts() == {}
        assert other.claim("q", 1, LONG) == []
        keep(other, "a", priority=5)
        other.pause("q")
        assert broker.paused() == frozenset()
        [claim] = claims(broker)
        assert claim.priority == 0
        assert other.ack([claim.hold]) == [False]
        assert other.delete(["a"]) == [True]
        assert broker.ack([claim.hold]) == [True]

    def test_a_namespace_that_begins_like_another_is_another(self, backend: Backend, again: Again) -> None:
        keep(backend.broker, "a")
        keep(again("on").broker, "a", queue="on")
        keep(again("one-more").broker, "a", queue="more")
        assert set(backend.broker.counts()) == {"q"}
        assert set(again("on").broker.counts()) == {"on"}

    def test_a_second_connection_sees_what_the_first_does(self, backend: Backend, again: Again) -> None:
        other = again().broker
        keep(backend.broker, "a")
        [claim] = claims(other)
        assert backend.broker.counts()["q"].running == 1
        assert backend.broker.ack([claim.hold]) == [True]
        assert other.find(["a"]) == [None]

    def test_closing_one_connection_leaves_the_others(self, backend: Backend, again: Again) -> None:
        other = again()
        keep(backend.broker, "a")
        other.broker.counts()
        other.close()
        other.close()
        [claim] = claims(backend.broker)
        assert backend.broker.ack([claim.hold]) == [True]

    def test_a_forked_copy_makes_a_connection_of_its_own(self, backend: Backend) -> None:
        broker = backend.broker

        def work() -> bool:
            [claim] = broker.claim("q", 1, LONG)
            return (
                claim.id == "a"
                and broker.ack([claim.hold]) == [True]
                and broker.enqueue_many([Message("c", "q", b"from the copy")]) == [True]
            )

        keep(broker, "a", "b")
        expected = ["b", "c"] if self.shares_with_fork(work) else ["a", "b"]
        assert [claim.id for claim in claims(broker, 2)] == expected

    def test_forked_copies_share_the_jobs(self, backend: Backend) -> None:
        keep(backend.broker, *(f"{i}" for i in range(30)))
        for i in range(3):
            shared = self.shares_with_fork(lambda: len(backend.broker.claim("q", 10, LONG)) == 10)
            assert backend.broker.counts()["q"].running == (10 * (i + 1) if shared else 0)
