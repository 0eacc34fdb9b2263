"""The conformance suite finds what is wrong: each breach of a contract fails the test that is named for it."""

import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
from scripts import environment

from bulkhead import backends
from bulkhead.backends import memory
from bulkhead.backends.base import Claim, Ending, Outcome, Record
from bulkhead.backends.memory import locking
from bulkhead.backends.memory.broker import MemoryBroker
from bulkhead.backends.memory.jobs import Queue
from bulkhead.backends.memory.keeping import Kept, MemoryRegistry, MemoryResultStore
from bulkhead.backends.memory.settling import MemorySettler
from bulkhead.errors import BrokerUnavailable
from bulkhead.testing.conformance import (
    Again,
    BrokerContract,
    RegistryContract,
    ResultStoreContract,
    contract,
)

Breach = Callable[[pytest.MonkeyPatch], None]


def _claims_the_last_first(patch: pytest.MonkeyPatch) -> None:
    entry = Queue._ready_entry
    patch.setattr(
        Queue, "_ready_entry", lambda q, job: (entry(q, job)[0], -job.due_at, -job.arrival, job.stamp, job)
    )


def _ignores_priorities(patch: pytest.MonkeyPatch) -> None:
    entry = Queue._ready_entry
    patch.setattr(Queue, "_ready_entry", lambda q, job: (0.0, *entry(q, job)[1:]))


def _ignores_due_times(patch: pytest.MonkeyPatch) -> None:
    take = Queue.take
    patch.setattr(Queue, "take", lambda queue, now: take(queue, now + 0.05))


def _holds_no_lease(patch: pytest.MonkeyPatch) -> None:
    claim = MemoryBroker._claim
    patch.setattr(MemoryBroker, "_claim", lambda broker, queue, n, lease: claim(broker, queue, n, int(lease)))


def _never_ends_a_lease(patch: pytest.MonkeyPatch) -> None:
    claim = MemoryBroker._claim
    patch.setattr(
        MemoryBroker, "_claim", lambda broker, queue, n, lease: claim(broker, queue, n, lease + 3600)
    )


def _takes_any_token(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemoryBroker, "_held", lambda broker, hold: broker._jobs.get(hold.id))


def _gives_tokens_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("bulkhead.backends.memory.broker.uuid4", lambda: type("Same", (), {"hex": "same"}))


def _forgets_ids(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Kept, "get", lambda kept, key: None)


def _forgets_errors(patch: pytest.MonkeyPatch) -> None:
    claim = MemoryBroker._nack

    def nack(broker: MemoryBroker, back: object) -> bool:
        broker._jobs[back.hold.id].error = None
        return claim(broker, back)

    patch.setattr(MemoryBroker, "_nack", nack)


def _wakes_nobody(patch: pytest.MonkeyPatch) -> None:
    class Deaf(threading.Condition):
        def notify_all(self) -> None:
            pass

    patch.setattr(locking, "threading", SimpleNamespace(Condition=Deaf, Lock=threading.Lock))
    patch.setitem(contract.soonest.__kwdefaults__, "tries", 1)


def _claims_from_paused_queues(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemoryBroker, "pause", lambda broker, queue: None)


def _gives_one_job_of_100_twice(patch: pytest.MonkeyPatch) -> None:
    claim = MemoryBroker._claim

    def twice(broker: MemoryBroker, queue: str, n: int, lease: float) -> list[Claim]:
        claims = claim(broker, queue, n, lease)
        for again in [found for found in claims if found.id.endswith("99") and found.attempt == 1]:
            job = broker._jobs[again.id]
            job.visible_at = 0.0
            broker._queues[queue].put(job)
            claims += claim(broker, queue, 1, lease)
        return claims

    patch.setattr(MemoryBroker, "_claim", twice)


def _shares_namespaces(patch: pytest.MonkeyPatch) -> None:
    connect = memory.connect
    patch.setattr(memory, "connect", lambda url, namespace: connect(url, "same"))


def _lists_without_offset(patch: pytest.MonkeyPatch) -> None:
    records = MemoryBroker.records

    def first_page(*given: object, offset: int = 0, **rest: object) -> list[Record]:
        return records(*given, **rest) if offset < 20 else []

    patch.setattr(MemoryBroker, "records", first_page)


def _keeps_outcomes_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Kept, "_drop_ended", lambda kept: None)


def _keeps_the_first_outcome(patch: pytest.MonkeyPatch) -> None:
    save = MemoryResultStore.save_many

    def once(store: MemoryResultStore, outcomes: list[Outcome]) -> None:
        save(store, [outcome for outcome in outcomes if store.get_many([outcome.id]) == [None]])

    patch.setattr(MemoryResultStore, "save_many", once)


def _keeps_what_comes_too_late(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("bulkhead.backends.memory.keeping.is_outdated", lambda new, old: False)


def _lets_no_former_outcome_be_replaced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("bulkhead.backends.memory.keeping.is_outdated", lambda new, old: new.attempt < old.attempt)


def _keeps_outcomes_of_lost_claims(patch: pytest.MonkeyPatch) -> None:
    settle = MemorySettler._settle

    def carelessly(settler: MemorySettler, ending: Ending) -> bool:
        if ending.outcome is not None:
            settler._results.put(ending.outcome)
        return settle(settler, ending)

    patch.setattr(MemorySettler, "_settle", carelessly)


def _forgets_what_it_has_settled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemoryResultStore, "look", lambda store, job_id: None)


def _ignores_versions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemoryRegistry, "_is_expected", lambda registry, key, expected: True)


def _counts_versions_by_key(patch: pytest.MonkeyPatch) -> None:
    put = MemoryRegistry.put

    def numbered(registry: MemoryRegistry, key: str, value: bytes, **rest: object) -> int | None:
        entry = registry.get(key)
        registry._versions = itertools.count(1 if entry is None else entry.version + 1)
        return put(registry, key, value, **rest)

    patch.setattr(MemoryRegistry, "put", numbered)


def _takes_a_prefix_for_a_pattern(patch: pytest.MonkeyPatch) -> None:
    entries = MemoryRegistry.entries
    patch.setattr(MemoryRegistry, "entries", lambda registry, prefix: entries(registry, prefix.rstrip("*")))


BREACHES: dict[Breach, tuple[type, str]] = {
    _claims_the_last_first: (
        BrokerContract,
        "1000_jobs_are_claimed_by_priority_and_then_in_order_of_arrival",
    ),
    _ignores_priorities: (BrokerContract, "1000_jobs_are_claimed_by_priority_and_then_in_order_of_arrival"),
    _ignores_due_times: (BrokerContract, "no_job_is_claimed_before_it_is_due"),
    _holds_no_lease: (BrokerContract, "while_a_lease_holds_nobody_else_gets_the_job"),
    _never_ends_a_lease: (BrokerContract, "a_lease_that_ran_out_makes_the_job_ready"),
    _takes_any_token: (BrokerContract, "who_has_lost_a_job_changes_nothing"),
    _gives_tokens_twice: (BrokerContract, "a_token_is_never_given_twice"),
    _forgets_ids: (BrokerContract, "an_id_stays_taken_for_as_long_as_it_is_to_be_remembered"),
    _forgets_errors: (BrokerContract, "the_last_error_stays_with_the_job"),
    _wakes_nobody: (BrokerContract, "a_job_that_another_connection_enqueues_ends_the_wait"),
    _claims_from_paused_queues: (BrokerContract, "of_a_paused_queue_nothing_is_claimed"),
    _gives_one_job_of_100_twice: (BrokerContract, "8_threads_claim_1000_jobs_each_exactly_once"),
    _shares_namespaces: (BrokerContract, "namespaces_do_not_see_each_other"),
    _lists_without_offset: (BrokerContract, "ready_jobs_are_listed_in_the_order_of_claims"),
    _keeps_outcomes_for_ever: (ResultStoreContract, "an_outcome_is_kept_for_its_time_and_no_longer"),
    _keeps_the_first_outcome: (ResultStoreContract, "a_later_outcome_takes_the_place_of_an_earlier_one"),
    _keeps_what_comes_too_late: (
        ResultStoreContract,
        "an_outcome_of_an_earlier_attempt_takes_no_place",
    ),
    _lets_no_former_outcome_be_replaced: (
        ResultStoreContract,
        "an_outcome_of_a_job_enqueued_at_another_time_takes_the_place",
    ),
    _keeps_outcomes_of_lost_claims: (BrokerContract, "who_has_lost_a_job_keeps_no_outcome"),
    _forgets_what_it_has_settled: (
        BrokerContract,
        "an_ending_that_is_told_again_is_true_again_and_changes_nothing",
    ),
    _ignores_versions: (RegistryContract, "a_value_is_replaced_only_in_its_expected_version"),
    _counts_versions_by_key: (RegistryContract, "a_version_does_not_come_back_after_a_removal"),
    _takes_a_prefix_for_a_pattern: (RegistryContract, "values_are_listed_by_prefix_in_order_of_their_keys"),
}


@pytest.fixture
def again() -> Again:
    name = uuid4().hex
    return lambda namespace="one": backends.connect(f"memory://{name}", namespace)


@pytest.mark.parametrize("breach", BREACHES, ids=lambda breach: breach.__name__.strip("_"))
def test_a_breach_fails_the_test_that_is_named_for_it(
    breach: Breach, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, fact = BREACHES[breach]
    test = getattr(suite(), f"test_{fact}")
    names = test.__code__.co_varnames[1 : test.__code__.co_argcount]
    monkeypatch.setattr(contract, "PATIENCE", 0.5)

    def run() -> None:
        given: dict[str, object] = {"backend": again(), "again": again, "end": "delete"}
        test(**{name: given[name] for name in names})

    breach(monkeypatch)
    with pytest.raises((AssertionError, BrokerUnavailable, KeyError)):
        run()


def test_a_backend_of_somebody_else_is_tested_by_the_documented_lines(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/backends.md").read_text()
    code = page[page.index("import uuid") :].split("```")[0]
    (tmp_path / "test_mine.py").write_text(code)
    options = ["-q", "-p", "no:cacheprovider", "-k", "TestRegistry", "--rootdir", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
