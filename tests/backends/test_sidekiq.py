"""Jobs that are enqueued for Sidekiq are in Redis exactly as Sidekiq's own client would have put them there."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest
from servers import RedisServer

from bulkhead.backends.redis.sidekiq import SidekiqClient
from bulkhead.errors import BrokerUnavailable, ConfigError, ConfigTypeError


@pytest.fixture
def client(redis_server: RedisServer, namespace: str) -> Iterator[SidekiqClient]:
    with SidekiqClient(redis_server.url, namespace) as made:
        yield made


def _jobs(server: RedisServer, namespace: str, queue: str = "default") -> list[str]:
    """The jobs of a queue, the one that Sidekiq's BRPOP takes next first."""
    lines = server.cli("--raw", "lrange", f"{namespace}:queue:{queue}", "0", "-1").splitlines()
    return [line for line in reversed(lines) if line]


def test_a_job_is_json_as_sidekiq_7_writes_it(
    redis_server: RedisServer, client: SidekiqClient, namespace: str
) -> None:
    before = time.time()
    jid = client.enqueue("HardJob", ["bob", 5, 1.5, None, True, {"größe": [1]}])
    after = time.time()
    [text] = _jobs(redis_server, namespace)
    found = json.loads(text)
    created, enqueued = found["created_at"], found["enqueued_at"]
    assert before <= created <= enqueued <= after
    assert re.fullmatch(r"[0-9a-f]{24}", jid)
    assert text == (
        '{"retry":true,"queue":"default","class":"HardJob","args":["bob",5,1.5,null,true,{"größe":[1]}],'
        f'"jid":"{jid}","created_at":{created!r},"enqueued_at":{enqueued!r}}}'
    )
    assert isinstance(created, float)
    assert redis_server.cli("smembers", f"{namespace}:queues") == "default\n"


def test_times_are_whole_milliseconds_for_who_wants_them_as_sidekiq_8_writes_them(
    redis_server: RedisServer, namespace: str
) -> None:
    before = int(time.time() * 1000)
    with SidekiqClient(redis_server.url, namespace, milliseconds=True) as client:
        jid = client.enqueue("Mail::Sender", queue="critical", retry=3)
    after = int(time.time() * 1000)
    [text] = _jobs(redis_server, namespace, "critical")
    found = json.loads(text)
    created, enqueued = found["created_at"], found["enqueued_at"]
    assert before <= created <= enqueued <= after
    assert text == (
        '{"retry":3,"queue":"critical","class":"Mail::Sender","args":[],'
        f'"jid":"{jid}","created_at":{created},"enqueued_at":{enqueued}}}'
    )


def test_a_job_due_later_is_in_the_schedule_without_at_and_enqueued_at(
    redis_server: RedisServer, client: SidekiqClient, namespace: str
) -> None:
    before = time.time()
    delayed = client.enqueue("HardJob", [1], delay=60, retry=False)
    after = time.time()
    at = client.enqueue("HardJob", [2], at=4102444800.25)
    first, score, second, second_score = redis_server.cli(
        "--raw", "zrange", f"{namespace}:schedule", "0", "-1", "withscores"
    ).splitlines()
    assert before + 60 <= float(score) <= after + 60
    assert float(second_score) == 4102444800.25
    created = json.loads(first)["created_at"]
    assert first == (
        '{"retry":false,"queue":"default","class":"HardJob","args":[1],'
        f'"jid":"{delayed}","created_at":{created!r}}}'
    )
    assert json.loads(second)["jid"] == at
    assert _jobs(redis_server, namespace) == []
    assert redis_server.cli("exists", f"{namespace}:queues") == "0\n"


def test_a_job_due_in_the_past_or_now_is_in_its_queue(
    redis_server: RedisServer, client: SidekiqClient, namespace: str
) -> None:
    jids = [client.enqueue("HardJob", at=1.0), client.enqueue("HardJob", delay=0)]
    assert [json.loads(text)["jid"] for text in _jobs(redis_server, namespace)] == jids
    assert redis_server.cli("exists", f"{namespace}:schedule") == "0\n"


def test_many_jobs_are_taken_in_their_order(
    redis_server: RedisServer, client: SidekiqClient, namespace: str
) -> None:
    jids = client.enqueue_many("HardJob", ([n] for n in range(2500)))
    found = [json.loads(text) for text in _jobs(redis_server, namespace)]
    assert [job["args"] for job in found] == [[n] for n in range(2500)]
    assert [job["jid"] for job in found] == jids
    assert len(set(jids)) == 2500
    later = client.enqueue_many("HardJob", [[n] for n in range(1500)], delay=60)
    assert redis_server.cli("zcard", f"{namespace}:schedule") == "1500\n"
    assert len(later) == 1500
    assert client.enqueue_many("HardJob", []) == []


def test_other_attributes_of_a_job_are_passed_on(
    redis_server: RedisServer, client: SidekiqClient, namespace: str
) -> None:
    client.enqueue("HardJob", tags=["nightly"], backtrace=10, dead=False)
    [text] = _jobs(redis_server, namespace)
    assert text.startswith(
        '{"retry":true,"queue":"default","tags":["nightly"],"backtrace":10,"dead":false,"class":"HardJob",'
    )


def test_without_a_namespace_keys_are_sidekiqs_own(redis_server: RedisServer, namespace: str) -> None:
    with SidekiqClient(redis_server.url) as client:
        client.enqueue("HardJob", queue=namespace)
    assert redis_server.cli("llen", f"queue:{namespace}") == "1\n"
    assert redis_server.cli("sismember", "queues", namespace) == "1\n"


ENDLESS: list[object] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("args", "options", "names"),
    [
        (["hard job"], {}, "class_name"),
        ([""], {}, "class_name"),
        ([5], {}, "class_name"),
        (["HardJob", "bob"], {}, r"args\[0\]"),
        (["HardJob", [{1: 2}]], {}, r"args\[0\]\[0\] has the key 1"),
        (["HardJob", [b"raw"]], {}, r"args\[0\]\[0\]"),
        (["HardJob", [[float("nan")]]], {}, r"args\[0\]\[0\]\[0\]"),
        (["HardJob", ["\ud800"]], {}, r"args\[0\]\[0\]"),
        (["HardJob", [{"\ud800": 1}]], {}, r"a key of args\[0\]\[0\]"),
        (["HardJob", [10**5000]], {}, r"args\[0\]\[0\]"),
        (["HardJob", ENDLESS], {}, r"args\[0\] is nested"),
        (["HardJob"], {"queue": "\ud800"}, "queue"),
        (["HardJob"], {"queue": ""}, "queue"),
        (["HardJob"], {"retry": -1}, "retry"),
        (["HardJob"], {"retry": "yes"}, "retry"),
        (["HardJob"], {"at": 1.0, "delay": 1.0}, "both"),
        (["HardJob"], {"delay": -1}, "delay"),
        (["HardJob"], {"at": float("inf")}, "at"),
        (["HardJob"], {"jid": "abc"}, "'jid'"),
        (["HardJob"], {"tags": {1, 2}}, "tags"),
        (["HardJob"], {"tags": ENDLESS}, "tags is nested"),
    ],
)
def test_what_sidekiq_could_not_read_is_refused_and_not_enqueued(
    redis_server: RedisServer,
    client: SidekiqClient,
    namespace: str,
    args: list[object],
    options: dict[str, object],
    names: str,
) -> None:
    with pytest.raises(ConfigError, match=names):
        client.enqueue(*args, **options)  # type: ignore[arg-type]
    assert redis_server.cli("keys", f"{namespace}:*").strip() == ""


def test_a_url_of_another_place_is_refused() -> None:
    for url in ("redis+cluster://localhost:7000", "nats://localhost", "localhost"):
        with pytest.raises(ConfigError, match="Sidekiq"):
            SidekiqClient(url)
    with pytest.raises(ConfigTypeError):
        SidekiqClient(5)  # type: ignore[arg-type]


def test_a_closed_client_and_an_absent_server_are_told(redis_server: RedisServer) -> None:
    client = SidekiqClient(redis_server.url)
    client.close()
    client.close()
    with pytest.raises(BrokerUnavailable):
        client.enqueue("HardJob")
    with pytest.raises(BrokerUnavailable):
        SidekiqClient("redis://127.0.0.1:1")


def test_many_are_refused_as_a_whole_where_one_of_them_cannot_be_written(
    redis_server: RedisServer, client: SidekiqClient, namespace: str
) -> None:
    with pytest.raises(ConfigError, match=r"args\[1500\]"):
        client.enqueue_many("HardJob", ([n if n != 1500 else "\ud800"] for n in range(2000)))
    with pytest.raises(ConfigTypeError, match="args must be an iterable"):
        client.enqueue_many("HardJob", None)  # type: ignore[arg-type]
    assert redis_server.cli("keys", f"{namespace}:*").strip() == ""
