"""What a Redis backend does besides the contracts: its keys, a server that ends, a server that refuses, waiting."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import trustme
from redis import Redis
from redis._parsers.base import BaseParser
from redis.exceptions import ConnectionError as RedisConnectionError
from servers import RedisCluster, RedisServer, wait_until

from bulkhead import backends
from bulkhead.backends.base import (
    Backend,
    Burial,
    CancelAnswer,
    Claim,
    Ending,
    Message,
    Outcome,
    OutcomeState,
    Place,
    QueueCounts,
    Return,
    Standing,
)
from bulkhead.backends.redis.lines import Lines
from bulkhead.errors import BadMessage, BrokerUnavailable, ConfigError, MessageTooLarge

T = TypeVar("T")

LEASE = 60.0
SHORT = 0.1

# Seconds within which a server that cannot be reached has to be reported; far more than it takes on a machine at rest.
BOUND = 5.0


@pytest.fixture
def backend(redis_server: RedisServer, namespace: str) -> Iterator[Backend]:
    made = backends.connect(redis_server.url, namespace)
    yield made
    made.close()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that the test may end."""
    with RedisServer(tmp_path / "redis", fsync="always") as server:
        yield server


@pytest.fixture
def owned(own: RedisServer) -> Iterator[Backend]:
    made = backends.connect(own.url)
    yield made
    made.close()


def _keep(backend: Backend, *ids: str, queue: str = "mail", **rest: object) -> None:
    messages = [Message(name, queue, b"body of " + name.encode(), **rest) for name in ids]  # type: ignore[arg-type]
    assert backend.broker.enqueue_many(messages) == [True] * len(ids)


def _claimed(backend: Backend, n: int = 100, lease: float = LEASE, **rest: float) -> list[str]:
    return [claim.id for claim in backend.broker.claim("mail", n, lease, **rest)]


def _counts(backend: Backend) -> tuple[int, int, int, int]:
    found = backend.broker.counts().get("mail", QueueCounts())
    return found.ready, found.scheduled, found.running, found.dead


# The layout, as docs/how-to/backends.md tells it.


def test_a_job_is_one_hash_and_its_id_is_in_the_sorted_set_of_its_queue(
    redis_server: RedisServer, backend: Backend, namespace: str
) -> None:
    cli, tag = redis_server.cli, f"{{{namespace}}}"
    _keep(backend, "a")
    _keep(backend, "b", priority=7, delay=60)
    assert cli("type", f"{tag}:job:a") == "hash\n"
    assert cli("hget", f"{tag}:job:a", "body") == "body of a\n"
    assert cli("hget", f"{tag}:job:a", "queue") == "mail\n"
    assert cli("zrange", f"{tag}:queue:0:mail", "0", "-1") == "a\n"
    assert cli("zrange", f"{tag}:queue:7:mail", "0", "-1") == "b\n"
    assert cli("hget", f"{tag}:queues", "mail") == "7,0\n"
    due = int(cli("zscore", f"{tag}:queue:7:mail", "b"))
    seconds, micros = map(int, cli("time").split())
    assert 0 < due - (seconds * 1_000_000 + micros) <= 60_000_000


def test_a_claimed_job_is_in_the_set_of_running_ones_scored_by_the_end_of_its_lease(
    redis_server: RedisServer, backend: Backend, namespace: str
) -> None:
    cli, tag = redis_server.cli, f"{{{namespace}}}"
    _keep(backend, "a", "b")
    [claim] = backend.broker.claim("mail", 1, LEASE)
    assert cli("zrange", f"{tag}:queue:0:mail", "0", "-1") == "b\n"
    assert cli("zrange", f"{tag}:running:mail", "0", "-1") == "a\n"
    assert cli("hget", f"{tag}:job:a", "token") == f"{claim.hold.token}\n"
    [record] = backend.broker.find(["a"])
    assert record is not None
    assert record.leased_until == pytest.approx(int(cli("zscore", f"{tag}:running:mail", "a")) / 1e6)
    backend.broker.bury([Burial(claim.hold, "no use")])
    assert cli("zrange", f"{tag}:dead:mail", "0", "-1") == "a\n"
    assert cli("hget", f"{tag}:job:a", "reason") == "no use\n"
    assert cli("exists", f"{tag}:running:mail") == "0\n"


def test_every_key_of_a_namespace_has_its_hash_tag(
    redis_server: RedisServer, backend: Backend, namespace: str
) -> None:
    before = set(redis_server.cli("keys", "*").split("\n"))
    _use_everything(backend)
    made = set(redis_server.cli("keys", "*").split("\n")) - before
    assert len(made) > 8
    assert {key for key in made if not key.startswith(f"{{{namespace}}}:")} == set()


def test_of_settled_jobs_and_expired_results_nothing_stays_behind(
    redis_server: RedisServer, backend: Backend, namespace: str
) -> None:
    _keep(backend, *map(str, range(50)))
    claims = backend.broker.claim("mail", 50, LEASE)
    assert all(backend.broker.ack([claim.hold for claim in claims]))
    done = [Outcome(claim.id, "mail", "send", OutcomeState.SUCCEEDED, keep=0.05) for claim in claims]
    backend.results.save_many(done)
    backend.registry.put("here", b"", keep=0.05)
    wait_until(lambda: backend.results.get_many(["0"]) == [None], "the results have expired")
    wait_until(lambda: backend.registry.get("here") is None, "the entry has expired")
    assert backend.broker.counts() == {}
    assert backend.registry.entries("") == []
    assert not any(backend.results.counts().values())
    # One ring, and two counters.
    left = {f"{{{namespace}}}:{name}" for name in ("bell:mail", "stamp", "version")}
    assert set(redis_server.cli("keys", f"{{{namespace}}}:*").split()) == left


def test_saving_sweeps_what_has_expired(redis_server: RedisServer, backend: Backend, namespace: str) -> None:
    def outcome(name: str, keep: float) -> Outcome:
        return Outcome(name, "mail", "send", OutcomeState.SUCCEEDED, keep=keep)

    backend.results.save_many([outcome(str(i), 0.05) for i in range(100)])
    wait_until(lambda: backend.results.get_many(["99"]) == [None], "the results have expired")
    for i in range(20):
        backend.results.save_many([outcome(f"kept {i}", 60)])
    assert redis_server.cli("zcard", f"{{{namespace}}}:results:succeeded:mail") == "20\n"
    assert redis_server.cli("zcard", f"{{{namespace}}}:results-end") == "20\n"


# Hashes that somebody deletes by hand.


def _delete_by_hand(server: RedisServer, namespace: str, *ids: str) -> None:
    keys = [f"{{{namespace}}}:job:{name}" for name in ids]
    assert server.cli("del", *keys) == f"{len(ids)}\n"


def test_a_claim_skips_jobs_whose_hash_was_deleted_and_counts_are_right_then(
    redis_server: RedisServer, backend: Backend, namespace: str
) -> None:
    _keep(backend, *map(str, range(300)))
    _delete_by_hand(redis_server, namespace, *map(str, range(0, 300, 2)))
    assert _claimed(backend, 10) == [str(i) for i in range(1, 21, 2)]
    assert _claimed(backend, 300) == [str(i) for i in range(21, 300, 2)]
    assert _counts(backend) == (0, 0, 150, 0)


@pytest.mark.parametrize("value", ["junk", "", "-1", "1e400", "nan", None])
def test_a_job_whose_hash_was_changed_by_hand_holds_up_no_other(
    redis_server: RedisServer, backend: Backend, namespace: str, value: str | None
) -> None:
    fields = ["due", "enqueued", "attempt", "priority", "body", "error", "token", "queue"]
    names = [*fields, "string", "good"]
    _keep(backend, *names)

    def change() -> None:
        for name in fields:
            key = f"{{{namespace}}}:job:{name}"
            redis_server.cli("hdel", key, name) if value is None else redis_server.cli(
                "hset", key, name, value
            )
        redis_server.cli("set", f"{{{namespace}}}:job:string", "of somebody else")

    change()
    for place in Place:
        backend.broker.records(place)
    assert "good" in _claimed(backend, lease=SHORT)
    change()
    taken: list[str] = []
    wait_until(lambda: taken.extend(_claimed(backend)) or "good" in taken, "the leases have ended")
    assert {"enqueued", "attempt", "priority"} <= set(taken)
    assert set(taken) <= {*names} - {"string"}
    backend.broker.counts()
    backend.broker.find(names)


def test_a_claimed_job_whose_hash_was_replaced_by_hand_is_lost_and_no_other(
    redis_server: RedisServer, backend: Backend, namespace: str
) -> None:
    _keep(backend, *"abcd")
    bad, *good = (claim.hold for claim in backend.broker.claim("mail", 4, LEASE))
    redis_server.cli("set", f"{{{namespace}}}:job:a", "of somebody else")
    lost, held = Standing.LOST, Standing.HELD
    assert backend.broker.renew([bad, *good], LEASE) == [lost, held, held, held]
    assert backend.broker.nack([Return(bad), Return(good[0])]) == [False, True]
    assert backend.broker.cancel(["a", "b"]) == [CancelAnswer.UNKNOWN, CancelAnswer.REMOVED]
    assert backend.broker.revive(["a"]) == [False]
    assert backend.settle([Ending(bad), Ending(good[1]), Ending(good[2])]) == [False, True, True]
    assert _counts(backend) == (0, 0, 0, 0)


def test_a_delay_beyond_all_times_is_the_last_one(backend: Backend) -> None:
    _keep(backend, "given back")
    [claim] = backend.broker.claim("mail", 1, LEASE)
    assert backend.broker.nack([Return(claim.hold, 1e300)]) == [True]
    _keep(backend, "later", delay=1e300)
    _keep(backend, "then", due_at=1e300)
    assert {one.id for one in backend.broker.records(Place.SCHEDULED)} == {"given back", "later", "then"}
    assert _counts(backend) == (0, 3, 0, 0)


@pytest.mark.parametrize("is_claimed", [False, True])
def test_a_job_whose_hash_names_another_queue_waits_there(
    redis_server: RedisServer, backend: Backend, namespace: str, is_claimed: bool
) -> None:
    _keep(backend, "a")
    if is_claimed:
        assert _claimed(backend, lease=SHORT) == ["a"]
    redis_server.cli("hset", f"{{{namespace}}}:job:a", "queue", "other")
    wait_until(
        lambda: backend.broker.claim("mail", 1, 60.0) == [] and "other" in backend.broker.counts(),
        "it is found where it is not",
    )
    assert [record.id for record in backend.broker.records(Place.READY, queue="other")] == ["a"]
    [claim] = backend.broker.claim("other", 5, 60.0)
    assert backend.broker.ack([claim.hold]) == [True]
    assert backend.broker.counts() == {}


def test_what_is_left_of_a_deleted_job_does_not_double_another_of_its_id(
    redis_server: RedisServer, backend: Backend, namespace: str
) -> None:
    _keep(backend, "a")
    _delete_by_hand(redis_server, namespace, "a")
    assert backend.broker.enqueue_many([Message("a", "other", b"")]) == [True]
    [claim] = backend.broker.claim("other", 1, 60.0)
    assert backend.broker.claim("mail", 1, 60.0) == []
    assert backend.broker.claim("other", 1, 60.0) == []
    assert backend.broker.ack([claim.hold]) == [True]


def test_a_claim_takes_no_more_than_fits_into_memory_and_leaves_the_rest(backend: Backend) -> None:
    body = bytes(6 * 1024 * 1024)
    assert all(backend.broker.enqueue_many([Message(str(n), "mail", body) for n in range(5)]))
    assert _claimed(backend, 10) == ["0", "1", "2"]
    assert _counts(backend) == (2, 0, 3, 0)
    assert _claimed(backend, 10) == ["3", "4"]
    assert backend.broker.cancel(["0"]) == [CancelAnswer.REQUESTED]


def test_when_all_hashes_were_deleted_nothing_is_claimed_and_nothing_is_left(
    redis_server: RedisServer, backend: Backend, namespace: str
) -> None:
    _keep(backend, *map(str, range(30)))
    _delete_by_hand(redis_server, namespace, *map(str, range(30)))
    assert _claimed(backend, 5) == []
    assert backend.broker.counts() == {}


def test_a_running_job_whose_hash_was_deleted_is_lost_to_its_consumer_and_gone(
    redis_server: RedisServer, backend: Backend, namespace: str
) -> None:
    _keep(backend, "a", "b", "c")
    a, b, c = (claim.hold for claim in backend.broker.claim("mail", 3, LEASE))
    _delete_by_hand(redis_server, namespace, "a", "b", "c")
    assert backend.broker.ack([a]) == [False]
    assert backend.broker.renew([b], LEASE) == [Standing.LOST]
    assert backend.broker.nack([Return(c)]) == [False]
    assert backend.broker.counts() == {}


def test_a_running_job_whose_hash_was_deleted_is_gone_when_its_lease_ends(
    redis_server: RedisServer, backend: Backend, namespace: str
) -> None:
    _keep(backend, "a")
    assert _claimed(backend, lease=SHORT) == ["a"]
    _delete_by_hand(redis_server, namespace, "a")
    wait_until(lambda: backend.broker.counts() == {}, "the lease has ended")
    assert _claimed(backend) == []


def test_lists_drop_jobs_whose_hash_was_deleted(
    redis_server: RedisServer, backend: Backend, namespace: str
) -> None:
    _keep(backend, "dead")
    [claim] = backend.broker.claim("mail", 1, LEASE)
    backend.broker.bury([Burial(claim.hold, "")])
    _keep(backend, "later", delay=60)
    _keep(backend, "ready")
    _delete_by_hand(redis_server, namespace, "dead", "later", "ready")
    for place in Place:
        assert backend.broker.records(place) == []
    assert backend.broker.counts() == {}


def test_an_id_whose_hash_was_deleted_can_be_enqueued_anew_for_another_queue(
    redis_server: RedisServer, backend: Backend, namespace: str
) -> None:
    _keep(backend, "a", queue="old")
    _delete_by_hand(redis_server, namespace, "a")
    _keep(backend, "a")
    assert backend.broker.claim("old", 1, LEASE) == []
    assert _claimed(backend) == ["a"]
    assert set(backend.broker.counts()) == {"mail"}


def test_counters_deleted_by_hand_break_no_order_and_bring_no_version_back(
    redis_server: RedisServer, backend: Backend, namespace: str
) -> None:
    _keep(backend, "a")
    first = backend.registry.put("key", b"1")
    redis_server.cli("del", f"{{{namespace}}}:stamp", f"{{{namespace}}}:version")
    _keep(backend, "b")
    assert _claimed(backend) == ["a", "b"]
    second = backend.registry.put("key", b"2")
    assert first is not None
    assert second is not None
    assert second > first


# A server that ends, freezes, or forgets.


def test_a_server_killed_between_claim_and_ack_has_lost_nothing(own: RedisServer, owned: Backend) -> None:
    _keep(owned, "a", "b", "c")
    a, b = owned.broker.claim("mail", 2, LEASE)
    owned.registry.put("key", b"value")
    owned.results.save_many([Outcome("z", "mail", "send", OutcomeState.SUCCEEDED, value=b"1")])
    own.kill()
    own.start()
    assert owned.broker.ack([a.hold]) == [True]
    assert owned.broker.renew([b.hold], LEASE) == [Standing.HELD]
    assert _claimed(owned) == ["c"]
    assert _counts(owned) == (0, 0, 2, 0)
    entry, [outcome] = owned.registry.get("key"), owned.results.get_many(["z"])
    assert entry is not None
    assert outcome is not None
    assert (entry.value, outcome.value) == (b"value", b"1")


def test_a_stopped_server_is_reported_by_every_call_and_the_next_call_connects_anew(
    own: RedisServer, owned: Backend
) -> None:
    _keep(owned, "a")
    [claim] = owned.broker.claim("mail", 1, LEASE)
    own.stop()
    calls: list[Callable[[], object]] = [
        lambda: owned.broker.enqueue_many([Message("b", "mail", b"")]),
        lambda: owned.broker.claim("mail", 1, LEASE),
        lambda: owned.broker.claim("mail", 1, LEASE, wait=30),
        lambda: owned.broker.ack([claim.hold]),
        lambda: owned.broker.counts(),
        lambda: owned.registry.put("key", b"", expected=0),
        lambda: backends.connect(own.url),
    ]
    start = time.monotonic()
    for call in calls:
        with pytest.raises(BrokerUnavailable, match=own.address):
            call()
    assert time.monotonic() - start < BOUND * 2
    own.start()
    assert owned.broker.ack([claim.hold]) == [True]
    _keep(owned, "b")


def test_a_frozen_server_is_reported_when_the_timeout_is_over(own: RedisServer) -> None:
    backend = backends.connect(f"{own.url}?timeout=0.3")
    try:
        os.kill(own.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            backend.broker.counts()
        assert 0.2 < time.monotonic() - start < BOUND
        os.kill(own.pid, signal.SIGCONT)
        assert backend.broker.counts() == {}
    finally:
        os.kill(own.pid, signal.SIGCONT)
        backend.close()


def test_an_answer_that_came_too_late_is_not_taken_for_that_to_another_question(own: RedisServer) -> None:
    backend = backends.connect(f"{own.url}?timeout=0.3")
    try:
        _keep(backend, "a")
        assert backend.broker.delete(["unknown"]) == [False]  # the server knows the script
        os.kill(own.pid, signal.SIGSTOP)
        with pytest.raises(BrokerUnavailable):
            backend.broker.delete(["a"])
        os.kill(own.pid, signal.SIGCONT)
        wait_until(lambda: backend.broker.find(["a"]) == [None], "the server has deleted the job")
        assert backend.broker.delete(["a"]) == [False]
        assert backend.broker.counts() == {}
    finally:
        os.kill(own.pid, signal.SIGCONT)
        backend.close()


def _ending(claim: Claim, value: bytes = b"value") -> Ending:
    facts = (claim.attempt, claim.enqueued_at, time.time(), time.time())
    return Ending(
        claim.hold, Outcome(claim.id, "mail", "send", OutcomeState.SUCCEEDED, value, None, *facts, keep=60.0)
    )


def test_an_end_whose_answer_never_came_is_true_when_it_is_told_again(own: RedisServer) -> None:
    backend = backends.connect(f"{own.url}?timeout=0.3")
    try:
        _keep(backend, "first", "a", "b")
        first, *rest = backend.broker.claim("mail", 3, LEASE)
        assert backend.settle([_ending(first)]) == [True]  # the server knows the script
        ends = [_ending(claim) for claim in rest]
        os.kill(own.pid, signal.SIGSTOP)
        with pytest.raises(BrokerUnavailable):
            backend.settle(ends)
        os.kill(own.pid, signal.SIGCONT)
        wait_until(lambda: backend.broker.counts() == {}, "the server has settled the jobs")
        kept = backend.results.get_many(["a", "b"])
        assert [outcome and outcome.value for outcome in kept] == [b"value", b"value"]
        assert backend.settle(ends) == [True, True]
        assert backend.results.get_many(["a", "b"]) == kept
    finally:
        os.kill(own.pid, signal.SIGCONT)
        backend.close()


def test_an_end_is_told_again_by_itself_when_the_server_hangs_up_behind_it(
    own: RedisServer, owned: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    _keep(owned, "first", "a")
    first, claim = owned.broker.claim("mail", 2, LEASE)
    assert owned.settle([_ending(first)]) == [True]
    ask, asked = Lines.ask, []

    def ask_and_lose_the_answer(lines: Lines, *parts: Any) -> Any:
        answer = ask(lines, *parts)
        asked.append(answer)
        if len(asked) == 1:
            raise RedisConnectionError("Connection closed by server.")
        return answer

    monkeypatch.setattr(Lines, "ask", ask_and_lose_the_answer)
    assert owned.settle([_ending(claim)]) == [True]
    assert asked == [b"1", b"1"]
    assert owned.broker.find(["a"]) == [None]


def _scripts_run(server: RedisServer) -> int:
    for line in server.cli("info", "commandstats").splitlines():
        if line.startswith("cmdstat_evalsha:"):
            return int(line.partition("calls=")[2].partition(",")[0])
    return 0


def test_1000_jobs_are_settled_in_one_round_trip_and_large_outcomes_in_parts(
    own: RedisServer, owned: Backend
) -> None:
    _keep(owned, "first", *map(str, range(1000)), "x", "y", "z")
    [first] = owned.broker.claim("mail", 1, LEASE)
    owned.settle([_ending(first)])
    claims = owned.broker.claim("mail", 1003, LEASE)
    own.cli("config", "resetstat")
    assert owned.settle([_ending(claim) for claim in claims[:1000]]) == [True] * 1000
    assert _scripts_run(own) == 1
    large = bytes(9 * 1024 * 1024)
    assert owned.settle([_ending(claim, large) for claim in claims[1000:]]) == [True] * 3
    assert _scripts_run(own) == 3
    assert owned.broker.counts() == {}
    assert owned.results.counts() == {OutcomeState.SUCCEEDED: 1004}


def test_an_outcome_that_an_earlier_version_has_saved_is_read_and_replaced(
    redis_server: RedisServer, backend: Backend, namespace: str
) -> None:
    fields = ("mail", "send", "succeeded", b"old", None, 3, 0.5, 1.0, 2.0, 60.0)
    with Redis.from_url(redis_server.url) as client:
        key = f"{{{namespace}}}:result:a"
        client.set(key, b"succeeded:4:mail:" + msgspec.msgpack.encode(fields), ex=60)
    old = Outcome("a", "mail", "send", OutcomeState.SUCCEEDED, b"old", None, 3, 0.5, 1.0, 2.0, 60.0)
    assert backend.results.get_many(["a"]) == [old]
    new = old._replace(value=b"new", attempt=1)
    backend.results.save_many([new])
    assert backend.results.get_many(["a"]) == [new]


def test_what_is_wrong_with_the_outcomes_leaves_the_claims_as_they_are(
    redis_server: RedisServer, backend: Backend, namespace: str
) -> None:
    _keep(backend, "a", "b")
    found = backend.broker.claim("mail", 2, LEASE)
    key = f"{{{namespace}}}:results:succeeded:mail"
    redis_server.cli("set", key, "a text")
    with pytest.raises(BadMessage):
        backend.settle([_ending(claim) for claim in found])
    assert _counts(backend) == (0, 0, 2, 0)
    redis_server.cli("del", key)
    assert backend.settle([_ending(claim) for claim in found]) == [True, True]


def test_who_waits_for_a_job_learns_that_the_server_ends_and_gets_the_job_after_its_restart(
    own: RedisServer, owned: Backend
) -> None:
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(owned.broker.claim, "mail", 1, LEASE, wait=30)
        _wait_for_listeners(own, 1)
        own.kill()
        assert isinstance(found.exception(BOUND), BrokerUnavailable)
        own.start()
        found = threads.submit(owned.broker.claim, "mail", 1, LEASE, wait=30)
        _wait_for_listeners(own, 1)
        _keep(owned, "a")
        assert [claim.id for claim in found.result(BOUND)] == ["a"]


def test_a_connection_that_the_server_has_closed_is_made_anew(own: RedisServer, owned: Backend) -> None:
    _keep(owned, "a")
    assert int(own.cli("client", "kill", "type", "normal", "skipme", "yes")) > 0
    assert _claimed(owned) == ["a"]


def test_scripts_that_the_server_has_forgotten_are_sent_again(
    redis_server: RedisServer, backend: Backend
) -> None:
    _keep(backend, "a")
    assert redis_server.cli("script", "flush") == "OK\n"
    _keep(backend, "b")
    assert _claimed(backend) == ["a", "b"]


def test_closing_ends_a_wait_of_another_thread(redis_server: RedisServer, namespace: str) -> None:
    backend = backends.connect(redis_server.url, namespace)
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(backend.broker.claim, "mail", 1, LEASE, wait=30)
        wait_until(lambda: _listeners(redis_server) > 0, "it waits")
        backend.close()
        assert isinstance(found.exception(BOUND), BrokerUnavailable)
    with pytest.raises(BrokerUnavailable, match="closed"):
        backend.broker.counts()


# A server that refuses.


@pytest.mark.parametrize("secret", ["", ":wrong@", "nobody:secret@"])
def test_a_wrong_password_is_an_error_of_the_url(tmp_path: Path, secret: str) -> None:
    with RedisServer(tmp_path, password="s3 cret/%") as server:
        with pytest.raises(ConfigError, match=f"url: Redis at {server.address} refuses") as caught:
            backends.connect(f"redis://{secret}{server.address}")
        assert "wrong" not in str(caught.value)
        backend = backends.connect(f"redis://:s3%20cret%2F%25@{server.address}")
        _keep(backend, "a")
        backend.close()


@pytest.mark.parametrize("secret", ["", ":wrong@"])
def test_a_wrong_password_of_a_cluster_is_an_error_of_the_url(tmp_path: Path, secret: str) -> None:
    with RedisServer(tmp_path, password="right", options=["--cluster-enabled", "yes"]) as server:
        with pytest.raises(ConfigError, match=f"url: Redis at {server.address} refuses"):
            backends.connect(f"redis+cluster://{secret}{server.address}")
        with pytest.raises(BrokerUnavailable, match="slots"):  # it has no slots yet
            backends.connect(f"redis+cluster://:right@{server.address}")


# Why: redis-py leaves the socket of a cluster's client that cannot be made to the collector, which complains.
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed:ResourceWarning"
)
def test_a_cluster_is_not_taken_for_one_server_nor_one_server_for_a_cluster(
    redis_server: RedisServer, redis_cluster: RedisCluster, namespace: str
) -> None:
    with pytest.raises(ConfigError, match="is no cluster: redis:// instead of"):
        backends.connect(f"redis+cluster://{redis_server.address}")
    gc.collect()
    key = f"{{{namespace}}}:queues"
    others = [node for node in redis_cluster.nodes if node.cli("exists", key).startswith("MOVED")]
    assert len(others) == 2
    for node in others:
        with pytest.raises(ConfigError, match=r"redis\+cluster:// instead of redis://"):
            backends.connect(f"redis://{node.address}", namespace)


@pytest.mark.parametrize("first", ["jobs", "all but jobs"])
def test_while_a_cluster_moves_the_slot_every_step_is_refused_and_nothing_is_lost(
    redis_cluster: RedisCluster, namespace: str, first: str
) -> None:
    backend = backends.connect(redis_cluster.url, namespace)
    _keep(backend, *(str(i) for i in range(20)))
    found = backend.broker.claim("mail", 5, LEASE)
    slot = redis_cluster.cli("cluster", "keyslot", f"{{{namespace}}}:queues").strip()
    [source] = [node for node in redis_cluster.nodes if int(node.cli("cluster", "countkeysinslot", slot))]
    target = next(node for node in redis_cluster.nodes if node is not source)
    ids = [node.cli("cluster", "myid").strip() for node in (source, target)]
    target.cli("cluster", "setslot", slot, "importing", ids[0])
    source.cli("cluster", "setslot", slot, "migrating", ids[1])

    def move(*, jobs: bool) -> None:
        keys = source.cli("cluster", "getkeysinslot", slot, "1000").split()
        keys = [key for key in keys if (":job:" in key) == jobs]
        assert (
            source.cli("migrate", "127.0.0.1", str(target.port), "", "0", "5000", "keys", *keys).strip()
            == "OK"
        )

    move(jobs=first == "jobs")
    calls: list[Callable[[], object]] = [
        lambda: _claimed(backend),
        lambda: backend.broker.renew([claim.hold for claim in found], LEASE),
        lambda: backend.settle([_ending(claim) for claim in found]),
        lambda: backend.broker.ack([claim.hold for claim in found]),
        lambda: backend.broker.nack([Return(claim.hold) for claim in found]),
        lambda: backend.broker.cancel(["1", "10"]),
        lambda: backend.broker.find(["1"]),
        lambda: backend.broker.counts(),
        lambda: _keep(backend, "new"),
        lambda: backend.registry.put("key", b"value", expected=0),
    ]
    with ThreadPoolExecutor(len(calls)) as threads:  # each of them tries again for a while
        for told in [threads.submit(call) for call in calls]:
            assert isinstance(told.exception(), BrokerUnavailable)
    move(jobs=first != "jobs")
    for node in (target, source, *redis_cluster.nodes):
        node.cli("cluster", "setslot", slot, "node", ids[1])
    assert _counts(backend) == (15, 0, 5, 0)
    assert backend.settle([_ending(claim) for claim in found]) == [True] * 5
    assert _claimed(backend) == [str(i) for i in range(5, 20)]
    backend.close()


def test_a_key_of_another_type_is_named_as_the_trouble(
    redis_server: RedisServer, backend: Backend, namespace: str
) -> None:
    redis_server.cli("set", f"{{{namespace}}}:queue:0:mail", "a text")
    with pytest.raises(BadMessage, match=f"namespace {{{namespace}}} holds something else"):
        _keep(backend, "a")


def test_more_than_redis_takes_at_once_is_too_large_and_nothing_is_kept(backend: Backend) -> None:
    huge = bytes(300 * 1024 * 1024)  # Zeros that are never touched: no memory.
    with pytest.raises(MessageTooLarge) as caught:
        backend.broker.enqueue_many(
            [Message("a", "mail", b""), Message("b", "mail", huge), Message("c", "mail", huge)]
        )
    assert caught.value.size_bytes > caught.value.limit_bytes > 0
    assert backend.broker.counts() == {}


def test_more_than_the_server_is_told_to_take_is_too_large(tmp_path: Path) -> None:
    with RedisServer(tmp_path, options=["--proto-max-bulk-len", "1mb"]) as server:
        backend = backends.connect(server.url)
        with pytest.raises(MessageTooLarge, match="proto-max-bulk-len"):
            backend.broker.enqueue_many([Message("a", "mail", bytes(2_000_000))])
        _keep(backend, "b")
        assert _claimed(backend) == ["b"]
        backend.close()


def test_so_it_is_when_its_answer_arrives_before_it_hangs_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RedisServer(tmp_path, options=["--proto-max-bulk-len", "1mb"]) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.sendall(b"*1\r\n$2000000\r\n")  # nothing is on its way when the answer comes
            answer = line.recv(4096).decode()
        assert answer.startswith("-ERR ")
        execute = Redis.execute_command

        def told(client: Redis, name: str, *args: Any) -> Any:
            if name == "EVALSHA":
                raise BaseParser.parse_error(answer[1:].strip())
            return execute(client, name, *args)

        monkeypatch.setattr(Redis, "execute_command", told)
        backend = backends.connect(server.url)
        with pytest.raises(MessageTooLarge, match="proto-max-bulk-len"):
            backend.broker.enqueue_many([Message("a", "mail", bytes(2_000_000))])
        backend.close()


def test_a_server_that_is_out_of_memory_is_unavailable(own: RedisServer, owned: Backend) -> None:
    _keep(owned, "a")
    own.cli("config", "set", "maxmemory", "1")
    with pytest.raises(BrokerUnavailable, match="maxmemory"):
        _keep(owned, "b")
    own.cli("config", "set", "maxmemory", "0")
    assert _claimed(owned) == ["a"]


def test_a_server_that_jobs_have_filled_can_be_emptied(own: RedisServer, owned: Backend) -> None:
    _keep(owned, *"abcdefg")
    succeeds, fails, waits, goes_on = owned.broker.claim("mail", 4, LEASE)
    own.cli("config", "set", "maxmemory", "1")
    assert owned.broker.renew([goes_on.hold], LEASE) == [Standing.HELD]
    assert owned.settle([_ending(succeeds), Ending(fails.hold, reason="no use")]) == [True, True]
    assert owned.broker.nack([Return(waits.hold, LEASE, error=b"not yet")]) == [True]
    assert owned.broker.cancel(["d", "e"]) == [CancelAnswer.REQUESTED, CancelAnswer.REMOVED]
    assert _claimed(owned, wait=1.0) == ["f", "g"]
    assert _counts(owned) == (0, 1, 3, 1)


@pytest.mark.parametrize("code", ["OOM", "READONLY", "MISCONF"])
def test_so_it_is_where_an_earlier_server_says_so_from_within_a_script(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    said = f"ERR Error running script (call to f_1a2b): @user_script:4: @user_script: 4: -{code} told by a command."

    def told(lines: Lines, *parts: object) -> None:
        raise BaseParser.parse_error(said)

    monkeypatch.setattr(Lines, "ask", told)
    with pytest.raises(BrokerUnavailable, match=code):
        _keep(backend, "a")


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("redis:///0", "host"),
        ("redis://localhost:port", "localhost:port"),
        ("redis://localhost:70000", "localhost:70000"),
        ("redis://localhost/one", "/one"),
        ("redis://localhost/-1", "/-1"),
        ("redis://localhost/0/1", "0/1"),
        ("redis://localhost#0", "#0"),
        ("redis://one:1,two:2", "several hosts"),
        ("redis+cluster://localhost/1", "only 0"),
        ("redis://localhost?tmeout=3", "'tmeout'"),
        ("redis://localhost?timeout=soon", "timeout"),
        ("redis://localhost?timeout=0", "timeout"),
        ("redis://localhost?timeout=nan", "timeout"),
        ("redis://localhost?timeout=1&timeout=2", "twice"),
        ("redis://localhost?ca_file=x", "without TLS"),
        ("rediss://localhost?ca_file=/no/such/file", "/no/such/file"),
        ("rediss://localhost?verify=maybe", "verify"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_and_says_what_is_wrong(url: str, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        backends.connect(url)


def test_each_database_is_a_place_of_its_own(redis_server: RedisServer, namespace: str) -> None:
    first = backends.connect(f"redis://{redis_server.address}", namespace)
    second = backends.connect(f"redis://{redis_server.address}/3?timeout=2.5", namespace)
    _keep(second, "a")
    assert first.broker.counts() == {}
    assert set(second.broker.counts()) == {"mail"}
    first.close()
    second.close()


def test_tls_with_a_certificate_that_is_checked(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    files = ["--tls-cert-file", str(tmp_path / "cert.pem"), "--tls-key-file", str(tmp_path / "key.pem")]
    trusted = ["--tls-ca-cert-file", str(tmp_path / "ca.pem"), "--tls-auth-clients", "no"]
    with RedisServer(tmp_path / "redis") as server:
        port = str(server.port + 10_000)
        for name, value in zip(*[iter([*files, *trusted, "--tls-port", port])] * 2, strict=True):
            server.cli("config", "set", name.removeprefix("--"), value)
        backend = backends.connect(f"rediss://127.0.0.1:{port}?ca_file={tmp_path}/ca.pem")
        _keep(backend, "a")
        assert _claimed(backend) == ["a"]
        backend.close()
        with pytest.raises(BrokerUnavailable, match="certificate"):
            backends.connect(f"rediss://127.0.0.1:{port}")
        backends.connect(f"rediss://127.0.0.1:{port}?verify=no").close()


def test_jobs_outlast_a_server_that_is_killed_again_and_again(own: RedisServer, owned: Backend) -> None:
    ids = [str(n) for n in range(600)]
    done: list[str] = []

    def persistently(call: Callable[[], list[T]]) -> list[T]:
        while True:
            try:
                return call()
            except BrokerUnavailable:
                time.sleep(0.01)

    def produce() -> None:
        for start in range(0, len(ids), 20):
            part = [Message(name, "mail", b"") for name in ids[start : start + 20]]
            persistently(lambda part=part: owned.broker.enqueue_many(part))

    def consume() -> None:
        while not is_over.is_set():
            claims = persistently(lambda: owned.broker.claim("mail", 5, 0.5, wait=0.1))
            holds = [claim.hold for claim in claims]
            answers = persistently(lambda holds=holds: owned.broker.ack(holds))
            done.extend(claim.id for claim, is_done in zip(claims, answers, strict=True) if is_done)

    is_over = threading.Event()
    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(produce), *(threads.submit(consume) for _ in range(3))]
        try:
            for goal in (50, 200, 400):
                wait_until(lambda goal=goal: len(done) >= goal, f"{goal} jobs are done")
                own.kill()
                own.start()
            running[0].result()
            wait_until(lambda: persistently(lambda: [owned.broker.counts()]) == [{}], "all jobs are done")
        finally:
            is_over.set()
        for each in running:
            each.result()
    # A job whose ack was carried out and not answered is done, too, and asking again says that the claim is lost.
    assert len(done) == len(set(done)) >= 550
    assert owned.broker.find(ids) == [None] * len(ids)


# Waiting.


def _listeners(server: RedisServer) -> int:
    return server.cli("client", "list").count("cmd=blpop")


def _wait_for_listeners(server: RedisServer, n: int) -> None:
    wait_until(lambda: _listeners(server) == n, f"{n} wait for jobs")


def test_one_call_that_enqueues_wakes_as_many_claimers_as_there_are_jobs(
    own: RedisServer, owned: Backend
) -> None:
    with ThreadPoolExecutor(8) as threads:
        found = [threads.submit(owned.broker.claim, "mail", 1, LEASE, wait=30) for _ in range(8)]
        _wait_for_listeners(own, 8)
        start = time.monotonic()
        _keep(owned, *map(str, range(8)))
        claimed = [claim.id for each in found for claim in each.result(BOUND)]
        assert sorted(claimed) == [str(i) for i in range(8)]
        # Far less than the second after which each would look of its own accord, times the chance to be slow.
        assert time.monotonic() - start < 0.9


def test_a_claimer_killed_while_it_waits_takes_no_job_and_no_ring_with_it(
    own: RedisServer, owned: Backend
) -> None:
    source = (
        f"from bulkhead import backends; backends.connect({own.url!r}).broker.claim('mail', 1, 60, wait=60)"
    )
    claimers = [subprocess.Popen([sys.executable, "-c", source]) for _ in range(2)]
    try:
        _wait_for_listeners(own, 2)
        claimers[0].kill()
        claimers[0].wait()
        with ThreadPoolExecutor(1) as threads:
            found = threads.submit(owned.broker.claim, "mail", 1, LEASE, wait=30)
            _wait_for_listeners(own, 2)
            _keep(owned, "a", "b")
            assert len(found.result(BOUND)) == 1
            claimers[1].wait(BOUND)
    finally:
        for claimer in claimers:
            claimer.kill()
            claimer.wait()


def test_a_claimer_that_ends_its_wait_tells_another_of_a_job_that_is_due_soon(
    own: RedisServer, owned: Backend
) -> None:
    _keep(owned, "a", delay=0.4)
    own.cli("del", "{bulkhead}:bell:mail")
    assert owned.broker.claim("mail", 1, LEASE, wait=0.05) == []
    assert own.cli("llen", "{bulkhead}:bell:mail") == "1\n"


def test_waiting_costs_a_look_a_second(own: RedisServer, owned: Backend) -> None:
    _keep(owned, "later", delay=60)
    assert _claimed(owned, wait=0.01) == []
    own.cli("config", "resetstat")
    assert _claimed(owned, wait=1.3) == []
    calls = [
        line for line in own.cli("info", "commandstats").splitlines() if line.startswith("cmdstat_evalsha:")
    ]
    assert int(calls[0].partition("calls=")[2].partition(",")[0]) <= 5


def test_a_ring_that_nobody_heard_costs_the_next_claimer_one_look(own: RedisServer, owned: Backend) -> None:
    _keep(owned, "a")
    assert _claimed(owned) == ["a"]
    own.cli("config", "resetstat")
    assert _claimed(owned, wait=0.3) == []
    assert own.cli("llen", "{bulkhead}:bell:mail") == "0\n"
    calls = [
        line for line in own.cli("info", "commandstats").splitlines() if line.startswith("cmdstat_evalsha:")
    ]
    assert int(calls[0].partition("calls=")[2].partition(",")[0]) <= 4


# A cluster.


def _use_everything(backend: Backend) -> None:
    broker = backend.broker
    _keep(backend, "a", "b", "c", "d", "e", remember=60)
    _keep(backend, "f", priority=-3, delay=60)
    a, b, c, d = broker.claim("mail", 4, LEASE)
    assert broker.renew([a.hold], LEASE) == [Standing.HELD]
    assert broker.nack([Return(b.hold, delay=0.01, error=b"why")]) == [True]
    assert broker.bury([Burial(c.hold, "no use", b"why")]) == [True]
    assert broker.cancel(["d", "e", "c"]) == [
        CancelAnswer.REQUESTED,
        CancelAnswer.REMOVED,
        CancelAnswer.UNKNOWN,
    ]
    assert broker.ack([a.hold, d.hold]) == [True, True]
    assert broker.revive(["c"]) == [True]
    broker.pause("other")
    assert broker.paused() == {"other"}
    broker.resume("other")
    broker.pause("another")
    assert broker.claim("mail", 5, LEASE, wait=1)
    assert broker.delete(["f"]) == [True]
    outcome = Outcome("a", "mail", "send", OutcomeState.FAILED, error=b"why")
    backend.results.save_many([outcome])
    assert backend.results.outcomes(OutcomeState.FAILED) == [outcome]
    backend.registry.put("key", b"value", keep=60)
    assert [entry.value for entry in backend.registry.entries("k")] == [b"value"]


def test_on_a_cluster_all_keys_of_a_namespace_are_in_one_slot_of_one_node(
    redis_cluster: RedisCluster, namespace: str
) -> None:
    backend = backends.connect(redis_cluster.url, namespace)
    _use_everything(backend)
    keys = [node.cli("keys", f"{{{namespace}}}:*").split("\n")[:-1] for node in redis_cluster.nodes]
    [found] = [some for some in keys if some and some != [""]]
    assert len(found) > 8
    assert len({redis_cluster.nodes[0].cli("cluster", "keyslot", key) for key in found}) == 1
    backend.close()


def test_on_a_cluster_a_slot_that_has_moved_is_found(redis_cluster: RedisCluster, namespace: str) -> None:
    nodes = redis_cluster.nodes
    backend = backends.connect(redis_cluster.url, namespace)
    assert backend.broker.counts() == {}
    slot = nodes[0].cli("cluster", "keyslot", f"{{{namespace}}}:queues").strip()
    names = [node.cli("cluster", "myid").strip() for node in nodes]
    assert nodes[0].cli("-c", "dbsize") is not None
    owner = next(
        n for n, node in enumerate(nodes) if not node.cli("get", f"{{{namespace}}}:none").startswith("MOVED")
    )
    target = (owner + 1) % 3
    for node in (nodes[target], *nodes):
        assert node.cli("cluster", "setslot", slot, "node", names[target]) == "OK\n"
    _keep(backend, "a")
    assert _claimed(backend) == ["a"]
    assert nodes[target].cli("exists", f"{{{namespace}}}:job:a") == "1\n"
    backend.close()


def test_on_a_cluster_a_slot_that_two_nodes_send_on_to_each_other_is_waited_for(
    redis_cluster: RedisCluster, namespace: str
) -> None:
    nodes = redis_cluster.nodes
    backend = backends.connect(redis_cluster.url, namespace)
    assert backend.broker.counts() == {}
    slot = nodes[0].cli("cluster", "keyslot", f"{{{namespace}}}:queues").strip()
    names = [node.cli("cluster", "myid").strip() for node in nodes]
    owner = next(
        n for n, node in enumerate(nodes) if not node.cli("get", f"{{{namespace}}}:none").startswith("MOVED")
    )
    other = (owner + 1) % 3

    def settle() -> None:
        for node in nodes:
            node.cli("cluster", "setslot", slot, "node", names[owner])

    # As for a moment while a slot is moved: neither takes it for its own.
    nodes[other].cli("cluster", "setslot", slot, "node", names[owner])
    nodes[owner].cli("cluster", "setslot", slot, "node", names[other])
    settling = threading.Timer(0.2, settle)
    settling.start()
    try:
        _keep(backend, "a")
    finally:
        settling.join()
    assert _claimed(backend) == ["a"]
    backend.close()


def test_on_a_cluster_a_node_that_ends_is_reported_and_used_again_when_it_is_back(
    redis_cluster: RedisCluster, namespace: str
) -> None:
    backend = backends.connect(redis_cluster.url, namespace)
    _keep(backend, "a", "b")
    [a] = backend.broker.claim("mail", 1, LEASE)
    owner = next(node for node in redis_cluster.nodes if node.cli("keys", f"{{{namespace}}}:job:b").strip())
    owner.kill()
    try:
        start = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            backend.broker.ack([a.hold])
        assert time.monotonic() - start < BOUND
    finally:
        owner.start()
    wait_until(lambda: "cluster_state:ok" in owner.cli("cluster", "info"), "the cluster is whole")
    assert backend.broker.ack([a.hold]) == [True]
    assert _claimed(backend) == ["b"]
    backend.close()
