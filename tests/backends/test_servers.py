"""The servers that tests talk to keep their data and their port over a stop and a kill."""

import os
import socket
from pathlib import Path

import pytest
from servers import NatsServer, RedisCluster, RedisServer, Server


@pytest.mark.parametrize("end", ["stop", "kill"])
@pytest.mark.parametrize("fsync", ["always", "no"])
def test_redis_keeps_data_and_port_over_its_end(tmp_path: Path, end: str, fsync: str) -> None:
    with RedisServer(tmp_path, fsync=fsync) as server:
        port = server.port
        server.cli("set", "colour", "green")
        getattr(server, end)()
        _assert_closed(port)
        server.start()
        assert (server.port, server.cli("get", "colour")) == (port, "green\n")
    _assert_closed(port)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_nats_keeps_its_port_and_has_jetstream_after_its_end(tmp_path: Path, end: str) -> None:
    with NatsServer(tmp_path, config="max_payload: 65536") as server:
        port = server.port
        getattr(server, end)()
        _assert_closed(port)
        server.start()
        assert server.port == port
        with socket.create_connection(("127.0.0.1", port)) as line:
            assert b'"max_payload":65536' in line.recv(4096)
    _assert_closed(port)


def test_the_shared_redis_answers(redis_server: RedisServer) -> None:
    assert redis_server.cli("ping") == "PONG\n"


def test_the_nodes_of_the_cluster_share_the_slots_and_a_key_is_found_from_any(
    redis_cluster: RedisCluster,
) -> None:
    for name in ("a", "b", "c", "d"):
        assert redis_cluster.cli("set", f"{{{name}}}key", name) == "OK\n"
    assert sum(int(node.cli("dbsize")) > 0 for node in redis_cluster.nodes) > 1
    assert [redis_cluster.cli("get", f"{{{name}}}key") for name in "abcd"] == [f"{name}\n" for name in "abcd"]


def test_the_shared_nats_server_runs(nats_server: NatsServer) -> None:
    os.kill(nats_server.pid, 0)


def test_a_missing_server_is_an_error_that_says_what_to_install(tmp_path: Path) -> None:
    class Absent(RedisServer):
        program = "no-such-server"

    with pytest.raises(FileNotFoundError, match="apt-get install redis-server nats-server"):
        Absent(tmp_path).start()


def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    server: Server = RedisServer(tmp_path, options=["--no-such-option", "1"])
    with pytest.raises(ChildProcessError, match="no-such-option"):
        server.start()


def _assert_closed(port: int) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=2)
