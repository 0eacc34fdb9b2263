"""The URL of a Redis: where it is, how to talk to it. What cannot be meant is refused before anything is connected.

- `redis://[[user]:password@]host[:port][/database][?timeout=seconds]`
- `rediss://…` is the same with TLS, and has the options ca_file, cert_file, key_file and verify=no
- `redis+cluster://host[:port][,host[:port]…]` names any nodes of a Redis Cluster; `rediss+cluster://` with TLS
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from bulkhead.backends.url_options import Reader, existing_file, one_of, read_options, seconds
from bulkhead.errors import ConfigError

__all__ = ["Address"]

_PORT = 6379
_DATABASES = 10_000  # arbitrary; a server has 16 unless it is told otherwise


@dataclass(frozen=True, slots=True)
class Address:
    """Where a Redis is.

    Attributes:
        nodes: Host and port; several only of a cluster.
        timeout: Longest wait in seconds for a connection, and for an answer.
        tls: Arguments of redis-py's connection for TLS, or None without TLS.
    """

    nodes: tuple[tuple[str, int], ...]
    is_cluster: bool
    database: int
    username: str | None
    password: str | None
    timeout: float = 3.0
    tls: dict[str, Any] | None = None

    @classmethod
    def of(cls, url: str) -> Address:
        """Read a URL.

        Raises:
            ConfigError: A part is missing, wrong or unknown; the message names it and not the password.
        """
        parts = urlsplit(url)
        is_cluster, has_tls = parts.scheme.endswith("+cluster"), parts.scheme.startswith("rediss")
        login, _, hosts = parts.netloc.rpartition("@")
        username, _, password = login.partition(":")
        given = _options(parts, has_tls)
        return cls(
            nodes=_nodes(hosts, is_cluster),
            is_cluster=is_cluster,
            database=_database(parts.path, is_cluster),
            username=unquote(username) or None,
            password=unquote(password) or None,
            timeout=given.pop("timeout", 3.0),
            tls=_tls(given) if has_tls else None,
        )

    def __str__(self) -> str:
        return ", ".join(f"{host}:{port}" for host, port in self.nodes)


def _nodes(hosts: str, is_cluster: bool) -> tuple[tuple[str, int], ...]:
    nodes = tuple(map(_node, hosts.split(",")))
    if len(nodes) > 1 and not is_cluster:
        raise ConfigError(f"url names several hosts, {hosts!r}; only redis+cluster:// takes more than one")
    return nodes


def _node(text: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"url has a host or port that cannot be read, {text!r}: {error}") from None
    if not host:
        raise ConfigError("url must name a host, as in redis://localhost:6379/0")
    return host, port or _PORT


def _database(path: str, is_cluster: bool) -> int:
    text = path.strip("/")
    if not text:
        return 0
    if not (text.isascii() and text.isdigit()) or int(text) >= _DATABASES:
        raise ConfigError(
            f"url must have the number of a database behind the host, as in /0, and not {path!r}"
        )
    if is_cluster and int(text):
        raise ConfigError(f"url names database {text}, and a Redis Cluster has only 0")
    return int(text)


def _options(parts: SplitResult, has_tls: bool) -> dict[str, Any]:
    if parts.fragment:
        raise ConfigError(f"url has {'#' + parts.fragment!r} at its end, which means nothing")
    if not has_tls and (of_tls := [name for name, _ in parse_qsl(parts.query) if name in _TLS_OPTIONS]):
        raise ConfigError(f"url has the option {of_tls[0]!r}, which has no meaning without TLS (rediss://)")
    return read_options(parts.query, _OPTIONS | (_TLS_OPTIONS if has_tls else {}))


def _tls(given: dict[str, Any]) -> dict[str, Any]:
    verify = given.get("verify", "yes") == "yes"
    return {
        "ssl_ca_certs": given.get("ca_file"),
        "ssl_certfile": given.get("cert_file"),
        "ssl_keyfile": given.get("key_file"),
        "ssl_cert_reqs": "required" if verify else "none",
        "ssl_check_hostname": verify,
    }


_OPTIONS: dict[str, Reader] = {"timeout": seconds(0.1, 3600)}
_TLS_OPTIONS: dict[str, Reader] = {
    "ca_file": existing_file,
    "cert_file": existing_file,
    "key_file": existing_file,
    "verify": one_of("yes", "no"),
}
