"""NATS: the server stops, is killed, refuses or is not there; processes that share it are killed."""

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import TypeVar
from uuid import uuid4

import psutil
import pytest
from scripts import Script, running
from servers import NatsServer

from bulkhead import backends
from bulkhead.backends.base import Backend, Message, Outcome, OutcomeState, Place, Standing
from bulkhead.errors import BrokerUnavailable, ConfigError, MessageTooLarge
from bulkhead.testing.conformance.contract import LONG, claims, ids_of, keep, until

T = TypeVar("T")

OPENING = """
import os, sys, time
from bulkhead import backends
from bulkhead.backends.base import *

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

broker = backends.connect({url!r}, {namespace!r}).broker
say("ready")
"""


@contextmanager
def connected(url: str, namespace: str = "here") -> Iterator[Backend]:
    backend = backends.connect(url, namespace)
    try:
        yield backend
    finally:
        backend.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    """A server of this test alone."""
    with NatsServer(tmp_path / "nats") as server:
        yield server


def persistently(call: Callable[[], T]) -> T:
    """Repeat a call as the contract allows it, until the server is there."""
    deadline = time.monotonic() + 20.0
    while True:
        try:
            return call()
        except BrokerUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("end", ["kill", pytest.param("stop", marks=pytest.mark.slow)])
def test_what_was_claimed_before_a_restart_is_acked_after_it_and_nothing_is_lost(
    server: NatsServer, end: str
) -> None:
    with connected(server.url) as backend:
        broker = backend.broker
        keep(broker, *(f"{i}" for i in range(300)))
        keep(broker, "dead")
        settled = claims(broker, 100)
        assert all(broker.ack([claim.hold for claim in settled]))
        held = claims(broker, 100)
        getattr(server, end)()
        server.start()
        assert (
            persistently(lambda: broker.renew([claim.hold for claim in held], LONG)) == [Standing.HELD] * 100
        )
        assert all(persistently(lambda: broker.ack([claim.hold for claim in held])))
        rest = claims(broker, 101)
        done = Counter(ids_of([*settled, *held, *rest]))
        assert len(done) == 301
        assert set(done.values()) == {1}
        assert broker.claim("q", 1, LONG, wait=1.5) == []
        assert all(broker.ack([claim.hold for claim in rest]))
        assert broker.counts() == {}


@pytest.mark.parametrize("end", ["kill", pytest.param("stop", marks=pytest.mark.slow)])
def test_what_is_scheduled_dead_paused_or_kept_survives_a_restart(server: NatsServer, end: str) -> None:
    with connected(server.url) as backend:
        broker = backend.broker
        keep(broker, *(f"soon {i}" for i in range(20)), delay=0.3)
        keep(broker, "much later", delay=60.0)
        broker.pause("other")
        backend.results.save_many([Outcome("a", "q", "t", OutcomeState.SUCCEEDED, b"value")])
        backend.results.save_many([Outcome("b", "q", "t", OutcomeState.SUCCEEDED, b"value")])
        assert backend.results.delete(["b"]) == [True]
        version = backend.registry.put("key", b"value")
        getattr(server, end)()
        time.sleep(0.3)
        server.start()
        due = persistently(lambda: claims(broker, 20))
        assert ids_of(due) == [f"soon {i}" for i in range(20)]
        assert ids_of(broker.records(Place.SCHEDULED)) == ["much later"]
        assert broker.paused() == {"other"}
        [outcome, none] = backend.results.get_many(["a", "b"])
        assert outcome is not None
        assert outcome.value == b"value"
        assert none is None
        entry = backend.registry.get("key")
        assert entry is not None
        assert entry.version == version


def test_settled_jobs_stay_settled_when_the_server_is_killed_at_once(server: NatsServer) -> None:
    """JetStream writes deletions down late: with records that are deleted, many of these came back."""
    with connected(server.url) as backend:
        broker = backend.broker
        keep(broker, *(f"{i}" for i in range(1500)))
        while found := broker.claim("q", 500, LONG):
            assert all(broker.ack([claim.hold for claim in found]))
        server.kill()
        server.start()
        assert persistently(lambda: broker.claim("q", 10, LONG, wait=1.5)) == []
        assert broker.find([f"{i}" for i in range(1500)]) == [None] * 1500


def test_jobs_go_in_and_out_while_the_server_is_killed_again_and_again(server: NatsServer) -> None:
    done: Counter[str] = Counter()
    total = 600

    def work() -> None:
        with connected(server.url) as backend:
            while len(done) < total:
                for claim in persistently(lambda: backend.broker.claim("q", 7, 2.0, wait=0.2)):
                    if persistently(lambda claim=claim: backend.broker.ack([claim.hold])) == [True]:  # type: ignore[misc]
                        done[claim.id] += 1
                    elif backend.broker.find([claim.id]) == [None]:
                        done[claim.id] += 1  # acked by a call whose answer was lost with the connection

    with connected(server.url) as backend:
        workers = [Thread(target=work) for _ in range(3)]
        for worker in workers:
            worker.start()
        for start in range(0, total, 20):
            messages = [Message(f"{i}", "q", b"") for i in range(start, start + 20)]
            persistently(lambda messages=messages: backend.broker.enqueue_many(messages))  # type: ignore[misc]
            if start in (100, 300, 500):
                server.kill()
                server.start()
        for worker in workers:
            worker.join(60.0)
        assert len(done) == total
        until(lambda: backend.broker.counts() == {})


def test_a_server_that_is_gone_is_told_within_seconds_and_costs_no_cpu(server: NatsServer) -> None:
    with connected(f"{server.url}?timeout=1.5") as backend:
        keep(backend.broker, "a")
        server.kill()
        start, cpu = time.monotonic(), time.process_time()
        for call in (
            lambda: backend.broker.claim("q", 1, LONG, wait=0.5),
            lambda: backend.broker.enqueue_many([Message("b", "q", b"")]),
            lambda: backend.results.counts(),
        ):
            before = time.monotonic()
            with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1"):
                call()
            assert time.monotonic() - before < 8.0
        seconds, used = time.monotonic() - start, time.process_time() - cpu
        print(f"{used:.3f} s of CPU in {seconds:.1f} s")
        assert used < 0.1 * seconds
        server.start()
        assert ids_of(persistently(lambda: claims(backend.broker))) == ["a"]


def test_a_claimer_that_waits_goes_on_when_the_server_is_back(server: NatsServer) -> None:
    found: list[str] = []

    def wait() -> None:
        found.extend(ids_of(persistently(lambda: claims(backend.broker))))

    with connected(server.url) as backend, connected(server.url) as other:
        waiter = Thread(target=wait)
        waiter.start()
        time.sleep(0.2)
        server.kill()
        server.start()
        persistently(lambda: other.broker.enqueue_many([Message("a", "q", b"")]))
        waiter.join(20.0)
    assert found == ["a"]


def test_a_server_that_comes_back_empty_gets_its_streams_anew(server: NatsServer, tmp_path: Path) -> None:
    with connected(server.url) as backend:
        keep(backend.broker, "a")
        claims(backend.broker)
        server.kill()
        (server.folder / "jetstream").rename(tmp_path / "away")
        server.start()
        assert persistently(lambda: backend.broker.enqueue_many([Message("b", "q", b"")])) == [True]
        assert ids_of(persistently(lambda: claims(backend.broker))) == ["b"]


def test_after_a_restart_with_an_empty_store_a_consumer_that_was_first_sees_what_another_process_enqueues(
    server: NatsServer, tmp_path: Path
) -> None:
    with connected(server.url) as producer, connected(server.url) as consumer:
        keep(producer.broker, "a")
        claims(consumer.broker)
        server.kill()
        (server.folder / "jetstream").rename(tmp_path / "away")
        server.start()
        assert persistently(lambda: consumer.broker.claim("q", 1, LONG)) == []
        assert persistently(lambda: producer.broker.enqueue_many([Message("b", "q", b"")])) == [True]
        assert ids_of(claims(consumer.broker)) == ["b"]


@pytest.mark.parametrize("stream", ["{}-jobs", "{}-ready", "{}-index", "KV_{}-results", "KV_{}-registry"])
def test_a_stream_that_somebody_has_deleted_is_made_anew_by_whoever_misses_it(
    nats_server: NatsServer, stream: str
) -> None:
    namespace = uuid4().hex[:12]
    with connected(nats_server.url, namespace) as backend:
        broker = backend.broker

        def delete() -> None:
            subject = f"$JS.API.STREAM.DELETE.{stream.format(namespace)}"
            answer = broker._link.call(lambda at: at.session.ask_one(subject))  # type: ignore[attr-defined]
            assert answer["success"]

        delete()
        assert broker.claim("q", 1, LONG) == []
        assert backend.results.get_many(["a"]) == [None]
        assert backend.registry.entries("") == []
        delete()
        keep(broker, "a")
        assert ids_of(claims(broker)) == ["a"]


def test_a_consumer_that_is_killed_gives_its_job_to_another_within_its_lease_and_a_second(
    server: NatsServer,
) -> None:
    code = OPENING.format(url=server.url, namespace="here") + (
        'claim = broker.claim("q", 1, 1.0, wait=10)[0]\n'
        'say("claimed", claim.id, claim.hold.token, time.time())\n'
        "time.sleep(60)\n"
    )
    with connected(server.url) as backend:
        keep(backend.broker, "a")
        with running(code) as script:
            _, _, token, since = script.wait_for_line("claimed").split()
            os.kill(script.pid, 9)
            script.wait()
            [claim] = backend.broker.claim("q", 1, LONG, wait=10)
            took = time.time() - float(since)
        print(f"claimed again after {took:.2f} s")
        assert 0.9 < took < 2.0
        assert (claim.id, claim.attempt) == ("a", 2)
        assert backend.broker.ack([claim.hold.__class__("a", "q", token)]) == [False]
        assert backend.broker.ack([claim.hold]) == [True]


def test_two_processes_share_a_queue_and_each_job_is_claimed_once(server: NatsServer) -> None:
    code = OPENING.format(url=server.url, namespace="here") + (
        "while found := broker.claim('q', 10, 60, wait=0.6):\n"
        "    assert all(broker.ack([claim.hold for claim in found]))\n"
        "    say('got', *[claim.id for claim in found])\n"
        "say('end')\n"
    )
    with connected(server.url) as backend:
        with running(code) as one, running(code) as two:
            for script in (one, two):
                script.wait_for_line("ready")
            n_kept = 0
            # Why more than 500: on a busy machine one of them may have taken these before the other has begun.
            while n_kept < 500 or not all("got" in script.output() for script in (one, two)):
                assert n_kept < 20_000, "one of them gets nothing"
                keep(backend.broker, *(f"{i}" for i in range(n_kept, n_kept + 50)))
                n_kept += 50
            for script in (one, two):
                script.wait_for_line("end")
            shares = [_got(script) for script in (one, two)]
        assert sorted(map(int, shares[0] + shares[1])) == list(range(n_kept))
        assert min(map(len, shares)) > 0
        assert backend.broker.counts() == {}


def test_a_job_that_another_process_enqueues_is_claimed_within_20_ms(server: NatsServer) -> None:
    code = OPENING.format(url=server.url, namespace="here") + (
        "for i in range(20):\n"
        "    time.sleep(0.02)\n"
        "    broker.enqueue_many([Message(str(i), 'q', str(time.time()).encode())])\n"
        "for i in range(20):\n"
        "    time.sleep(0.02)\n"
        "    broker.enqueue_many([Message(f'd{i}', 'q', str(time.time() + 0.1).encode(), delay=0.1)])\n"
    )
    lags: list[float] = []
    with connected(server.url) as backend, running(code):
        while len(lags) < 40:
            for claim in backend.broker.claim("q", 1, LONG, wait=5.0):
                lags.append(time.time() - float(claim.body))
                backend.broker.ack([claim.hold])
    at_once, delayed = sorted(lags[:20]), sorted(lags[20:])
    print(f"median {at_once[10] * 1e3:.1f} ms at once, {delayed[10] * 1e3:.1f} ms after the due time")
    assert at_once[10] < 0.02
    assert delayed[10] < 0.03


def test_a_forked_copy_does_not_keep_its_parents_connection_open(server: NatsServer, tmp_path: Path) -> None:
    # The script's parent uses the backend, forks, closes it; the copy lives on.
    code = OPENING.format(url=server.url, namespace="here") + (
        "backend = backends.connect({url!r}, 'forked')\n"
        "backend.broker.enqueue_many([Message('a', 'q', b'')])\n"
        "read, write = os.pipe()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    [claim] = backend.broker.claim('q', 1, 60)\n"
        "    os.write(write, b'x')\n"
        "    time.sleep(60)\n"
        "os.read(read, 1)\n"
        "say('before', os.getpid(), child)\n"
        "assert backend.broker.find(['a'])[0].place is Place.RUNNING\n"
        "backend.close()\n"
        "say('closed')\n"
        "time.sleep(60)\n"
    ).replace("{url!r}", repr(server.url))
    with running(code) as script:
        _, parent, child = script.wait_for_line("before").split()
        script.wait_for_line("closed")
        port = int(server.url.rpartition(":")[2])
        until(lambda: _lines_to(int(parent), port) == 1)  # the one of OPENING
        assert _lines_to(int(child), port) == 2  # its own, and its copy of that one
        at_server = [
            line for line in psutil.Process(server.pid).net_connections("tcp") if line.status == "ESTABLISHED"
        ]
        assert len(at_server) == 2


def test_what_is_too_large_for_the_server_is_refused_before_anything_is_kept(tmp_path: Path) -> None:
    with NatsServer(tmp_path, config="max_payload: 65536") as server, connected(server.url) as backend:
        with pytest.raises(MessageTooLarge) as caught:
            backend.broker.enqueue_many([Message("small", "q", b""), Message("large", "q", bytes(65536))])
        assert caught.value.size_bytes == 65536
        assert caught.value.limit_bytes == 57344
        assert backend.broker.counts() == {}
        keep(backend.broker, "small")
        assert backend.broker.enqueue_many([Message("fits", "q", bytes(57344))]) == [True]
        [_, claim] = claims(backend.broker, 2)
        assert len(claim.body) == 57344
        for call in (
            lambda: backend.results.save_many([Outcome("a", "q", "t", OutcomeState.SUCCEEDED, bytes(65536))]),
            lambda: backend.registry.put("key", bytes(65536)),
        ):
            with pytest.raises(MessageTooLarge):
                call()


def test_a_server_without_jetstream_is_named_as_that(tmp_path: Path) -> None:
    with _bare(tmp_path, "") as url, pytest.raises(BrokerUnavailable, match="JetStream"):
        backends.connect(f"{url}?timeout=0.5")


def test_nobody_at_the_address_is_told_within_seconds() -> None:
    start = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:9"):
        backends.connect("nats://127.0.0.1:9?timeout=1")
    assert time.monotonic() - start < 5.0


def test_user_and_password_or_token_of_the_url_are_given(tmp_path: Path) -> None:
    with NatsServer(tmp_path / "a", config="authorization { user: me, password: 's:e/c' }") as server:
        with connected(f"nats://me:s%3Ae%2Fc@{server.address}") as backend:
            keep(backend.broker, "a")
        with pytest.raises(ConfigError, match="refuses") as caught:
            backends.connect(f"nats://me:wrong@{server.address}")
        assert "wrong" not in str(caught.value)
    with (
        NatsServer(tmp_path / "b", config="authorization { token: secret }") as server,
        connected(f"nats://secret@{server.address}") as backend,
    ):
        keep(backend.broker, "a")


def test_the_permissions_that_the_documentation_names_are_enough(tmp_path: Path) -> None:
    publish = '"here.>", "$KV.here-results.>", "$KV.here-registry.>", "$JS.API.>", "$JS.ACK.>"'
    allowed = f'publish: [{publish}], subscribe: ["here.bell.*", "_INBOX.>"]'
    config = f"authorization {{ users: [{{ user: me, password: pw, permissions: {{ {allowed} }} }}] }}"
    with (
        NatsServer(tmp_path, config=config) as server,
        connected(f"nats://me:pw@{server.address}") as backend,
    ):
        keep(backend.broker, "a", "b")
        keep(backend.broker, "later", delay=0.05)
        found = claims(backend.broker, 3)
        assert backend.broker.renew([claim.hold for claim in found], LONG) == [Standing.HELD] * 3
        assert backend.broker.ack([claim.hold for claim in found]) == [True] * 3
        assert backend.broker.counts() == {}
        backend.results.save_many([Outcome("a", "q", "t", OutcomeState.SUCCEEDED)])
        assert backend.results.counts() == {OutcomeState.SUCCEEDED: 1}
        assert backend.registry.put("key", b"value") is not None


def test_tls_checks_the_server_by_the_given_certificate(tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    )
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        [*command.split(), "-keyout", str(key), "-out", str(cert), *names], check=True, capture_output=True
    )
    config = f'tls {{ cert_file: "{cert}", key_file: "{key}" }}'
    with NatsServer(tmp_path / "nats", config=config) as server:
        with connected(f"tls://{server.address}?ca_file={cert}") as backend:
            keep(backend.broker, "a")
        with pytest.raises(BrokerUnavailable):
            backends.connect(f"tls://{server.address}?timeout=1")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nats://host?replica=3", "replica"),
        ("nats://host?replicas=9", "replicas"),
        ("nats://host?storage=tape", "storage"),
        ("nats://host?timeout=soon", "timeout"),
        ("nats://host?timeout=0", "timeout"),
        ("nats://host?creds_file=/nowhere", "creds_file"),
        ("nats://host:port", "port"),
        ("nats://", "host"),
        ("nats://a,,b", "host"),
        ("nats://host/path", "path"),
    ],
)
def test_a_bad_url_is_refused_before_anything_starts(url: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        backends.connect(url)


def test_an_error_about_the_url_does_not_show_the_password() -> None:
    with pytest.raises(ConfigError) as caught:
        backends.connect("nats://me:secret@host?no=1")
    assert "secret" not in str(caught.value)


def test_memory_storage_is_what_the_url_asks_for(server: NatsServer) -> None:
    with connected(f"{server.url}?storage=memory") as backend:
        keep(backend.broker, "a")
        assert ids_of(claims(backend.broker)) == ["a"]
    folders = [path.name for path in (server.folder / "jetstream").rglob("here-jobs")]
    assert folders == []


def _got(script: Script) -> list[str]:
    lines = [line.split() for line in script.output().splitlines()]
    return [word for line in lines if line[0] == "got" for word in line[1:]]


def _lines_to(pid: int, port: int) -> int:
    lines = psutil.Process(pid).net_connections("tcp")
    return sum(bool(line.raddr) and line.raddr.port == port for line in lines)


@contextmanager
def _bare(folder: Path, config: str) -> Iterator[str]:
    """A server without JetStream."""

    class Bare(NatsServer):
        def _arguments(self) -> list[str]:
            return ["-a", "127.0.0.1", "-p", str(self.port)]

        def _is_ready(self) -> bool:
            return bool(super()._is_ready()) or True

    with Bare(folder) as server:
        yield server.url
