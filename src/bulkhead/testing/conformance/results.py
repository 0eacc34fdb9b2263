"""The tests of a result store."""

from __future__ import annotations

import time

import pytest

from bulkhead.backends.base import Backend, Outcome, OutcomeState
from bulkhead.errors import MessageTooLarge
from bulkhead.testing.conformance.contract import ODD_NAMES, SHORT, TICK, Again, Contract, ids_of, until

__all__ = ["ResultStoreContract"]

RUNNING, SUCCEEDED = OutcomeState.RUNNING, OutcomeState.SUCCEEDED
FAILED, CANCELLED = OutcomeState.FAILED, OutcomeState.CANCELLED


def _outcome(id: str, state: OutcomeState = SUCCEEDED, **rest: object) -> Outcome:
    return Outcome(id, "q", "task", state, **rest)  # type: ignore[arg-type]


class ResultStoreContract(Contract):
    """The tests of a result store."""

    def test_an_outcome_comes_back_as_it_was_saved(self, backend: Backend, again: Again) -> None:
        now = time.time()
        full = Outcome(
            "a", "q", "näme", FAILED, b"value", b"error", 3, now - 2.125, now - 1.5, now, keep=1000.0
        )
        plain = Outcome("b", "q2", "t", CANCELLED)
        backend.results.save_many([full, plain])
        found = again().results.get_many(["b", "no such job", "a"])
        assert found[1] is None
        for saved, kept in ((plain, found[0]), (full, found[2])):
            assert kept is not None
            for instant in ("enqueued_at", "started_at", "finished_at"):
                assert getattr(kept, instant) == pytest.approx(getattr(saved, instant), abs=0.001)
            same = {
                name: getattr(saved, name) for name in ("enqueued_at", "started_at", "finished_at", "keep")
            }
            assert kept._replace(**same) == saved

    def test_nothing_saved_is_nothing_kept(self, backend: Backend) -> None:
        backend.results.save_many([])
        assert backend.results.get_many([]) == []
        assert backend.results.get_many(["a"]) == [None]
        assert not any(backend.results.counts().values())
        assert backend.results.outcomes(SUCCEEDED) == []

    def test_values_and_errors_are_any_bytes_or_none(self, backend: Backend) -> None:
        values = [None, b"", bytes(range(256)), bytes(range(256)) * 1200]
        backend.results.save_many(
            [_outcome(f"{i}", value=value, error=values[-1 - i]) for i, value in enumerate(values)]
        )
        found = backend.results.get_many(["0", "1", "2", "3"])
        assert [outcome and outcome.value for outcome in found] == values
        assert [outcome and outcome.error for outcome in found] == values[::-1]

    def test_a_value_of_2_megabytes_is_kept_or_said_to_be_too_large(self, backend: Backend) -> None:
        value = b"x" * 2_000_000
        try:
            backend.results.save_many([_outcome("a", value=value)])
        except MessageTooLarge as error:
            assert error.size_bytes >= len(value) > error.limit_bytes > 300_000
            assert backend.results.get_many(["a"]) == [None]
        else:
            [kept] = backend.results.get_many(["a"])
            assert kept is not None
            assert kept.value == value

    def test_a_later_outcome_takes_the_place_of_an_earlier_one(self, backend: Backend) -> None:
        store = backend.results
        store.save_many([_outcome("a", RUNNING, value=b"half")])
        assert store.counts()[RUNNING] == 1
        store.save_many([_outcome("a", FAILED, error=b"1"), _outcome("a", SUCCEEDED, value=b"2", attempt=2)])
        [kept] = store.get_many(["a"])
        assert kept is not None
        assert (kept.state, kept.value, kept.error, kept.attempt) == (SUCCEEDED, b"2", None, 2)
        assert {state: n for state, n in store.counts().items() if n} == {SUCCEEDED: 1}
        assert store.outcomes(RUNNING) == store.outcomes(FAILED) == []
        assert ids_of(store.outcomes(SUCCEEDED)) == ["a"]

    def test_an_outcome_of_an_earlier_attempt_takes_no_place(self, backend: Backend) -> None:
        store, now = backend.results, time.time()
        store.save_many([_outcome("a", SUCCEEDED, value=b"2", attempt=2, enqueued_at=now)])
        store.save_many([_outcome("a", FAILED, error=b"1", attempt=1, enqueued_at=now), _outcome("b")])
        store.save_many([_outcome("a", RUNNING, value=b"half", attempt=2, enqueued_at=now)])
        assert sorted(ids_of(store.outcomes(SUCCEEDED))) == ["a", "b"]
        assert store.outcomes(FAILED) == store.outcomes(RUNNING) == []
        [kept] = store.get_many(["a"])
        assert kept is not None
        assert (kept.state, kept.value, kept.attempt) == (SUCCEEDED, b"2", 2)
        several = [
            _outcome("c", SUCCEEDED, attempt=10, enqueued_at=now),
            _outcome("c", FAILED, enqueued_at=now),
        ]
        store.save_many(several)
        [kept] = store.get_many(["c"])
        assert kept is not None
        assert kept.state is SUCCEEDED

    def test_an_outcome_of_a_job_enqueued_at_another_time_takes_the_place(self, backend: Backend) -> None:
        store, now = backend.results, time.time()
        for enqueued_at in (now, now - 60, now + 60):  # Why also before: clocks are set
            store.save_many([_outcome("a", SUCCEEDED, attempt=2, enqueued_at=enqueued_at)])
            store.save_many([_outcome("a", FAILED, attempt=1, enqueued_at=enqueued_at + 0.1)])
            [kept] = store.get_many(["a"])
            assert kept is not None
            assert (kept.state, kept.attempt) == (FAILED, 1)

    def test_an_outcome_of_another_queue_takes_the_place_too(self, backend: Backend) -> None:
        backend.results.save_many([Outcome("a", "one", "t", SUCCEEDED)])
        backend.results.save_many([Outcome("a", "two", "t", SUCCEEDED)])
        assert backend.results.outcomes(SUCCEEDED, queue="one") == []
        assert ids_of(backend.results.outcomes(SUCCEEDED, queue="two")) == ["a"]

    def test_an_outcome_is_kept_for_its_time_and_no_longer(self, backend: Backend) -> None:
        store = backend.results
        start = time.monotonic()
        store.save_many([_outcome("short", keep=SHORT), _outcome("long")])
        seen = store.get_many(["short"])[0] is not None
        assert seen or time.monotonic() - start > SHORT - TICK
        until(lambda: store.get_many(["short"]) == [None])
        assert time.monotonic() - start > SHORT - TICK
        assert ids_of(store.outcomes(SUCCEEDED)) == ["long"]
        assert store.counts()[SUCCEEDED] == 1
        assert store.delete(["short"]) == [False]

    def test_the_last_outcome_says_how_long_it_is_kept(self, backend: Backend) -> None:
        store = backend.results
        store.save_many([_outcome("a", keep=0.1), _outcome("b"), _outcome("gone", keep=0.2)])
        store.save_many([_outcome("a"), _outcome("b", keep=0.1)])
        until(lambda: store.get_many(["b", "gone"]) == [None, None])
        assert store.get_many(["a"]) != [None]
        assert ids_of(store.outcomes(SUCCEEDED)) == ["a"]

    def test_an_outcome_can_be_deleted(self, backend: Backend) -> None:
        store = backend.results
        store.save_many([_outcome("a"), _outcome("b")])
        assert store.delete(["a", "no such job"]) == [True, False]
        assert store.delete(["a"]) == [False]
        assert store.delete([]) == []
        assert store.get_many(["a"]) == [None]
        assert ids_of(store.outcomes(SUCCEEDED)) == ["b"]
        assert store.counts()[SUCCEEDED] == 1

    def test_outcomes_of_a_state_are_listed_the_last_finished_first(self, backend: Backend) -> None:
        store = backend.results
        now = time.time()
        for i in (3, 1, 4, 0, 2):
            queue = f"q{i % 2}"
            store.save_many([Outcome(f"{i}", queue, "t", FAILED, finished_at=now + i)])
            store.save_many([Outcome(f"ok {i}", queue, "t", SUCCEEDED, finished_at=now - i)])
        assert ids_of(store.outcomes(FAILED)) == list("43210")
        assert ids_of(store.outcomes(FAILED, offset=1, limit=2)) == list("32")
        assert ids_of(store.outcomes(FAILED, queue="q0")) == list("420")
        assert ids_of(store.outcomes(FAILED, queue="q0", offset=2, limit=5)) == list("0")
        assert ids_of(store.outcomes(SUCCEEDED, limit=2)) == ["ok 0", "ok 1"]
        assert store.outcomes(FAILED, offset=5) == store.outcomes(FAILED, queue="no such queue") == []
        assert store.outcomes(CANCELLED) == []
        assert {state: n for state, n in store.counts().items() if n} == {FAILED: 5, SUCCEEDED: 5}

    def test_a_list_holds_100_unless_told(self, backend: Backend) -> None:
        backend.results.save_many([_outcome(f"{i}", finished_at=float(i)) for i in range(130)])
        assert len(backend.results.outcomes(SUCCEEDED)) == 100
        assert len(backend.results.outcomes(SUCCEEDED, limit=1000)) == 130

    def test_ids_queues_and_tasks_are_any_text(self, backend: Backend) -> None:
        store = backend.results
        store.save_many([Outcome(name, name, name, SUCCEEDED) for name in ODD_NAMES])
        found = store.get_many(ODD_NAMES)
        for name, kept in zip(ODD_NAMES, found, strict=True):
            assert kept is not None
            assert (kept.id, kept.queue, kept.task) == (name, name, name)
            assert ids_of(store.outcomes(SUCCEEDED, queue=name)) == [name]
        assert store.delete(ODD_NAMES) == [True] * len(ODD_NAMES)

    def test_5000_outcomes_are_saved_got_and_deleted_with_one_call_each(self, backend: Backend) -> None:
        names = [f"{i}" for i in range(5000)]
        backend.results.save_many([_outcome(name, value=name.encode()) for name in names])
        found = backend.results.get_many(names)
        assert [outcome and outcome.value for outcome in found] == [name.encode() for name in names]
        assert backend.results.counts()[SUCCEEDED] == 5000
        assert backend.results.delete(names) == [True] * 5000

    def test_namespaces_do_not_see_each_others_outcomes(self, backend: Backend, again: Again) -> None:
        other = again("other").results
        backend.results.save_many([_outcome("a", value=b"one")])
        assert other.get_many(["a"]) == [None]
        other.save_many([_outcome("a", value=b"other"), _outcome("b")])
        assert other.delete(["a"]) == [True]
        assert backend.results.counts()[SUCCEEDED] == 1
        [kept] = backend.results.get_many(["a"])
        assert kept is not None
        assert kept.value == b"one"

    def test_a_forked_copy_saves_over_a_connection_of_its_own(self, backend: Backend) -> None:
        backend.results.save_many([_outcome("a")])

        def work() -> bool:
            backend.results.save_many([_outcome("b")])
            return backend.results.get_many(["a"]) != [None]

        saved = 2 if self.shares_with_fork(work) else 1
        assert backend.results.counts()[SUCCEEDED] == saved
