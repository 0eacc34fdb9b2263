"""What a `nats://` URL says: servers, credentials, and a few options after the `?`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from bulkhead.backends.url_options import Reader, existing_file, one_of, read_options, seconds
from bulkhead.errors import ConfigError

__all__ = ["Options", "read"]


@dataclass(frozen=True, slots=True)
class Options:
    """How to connect and what to make there.

    Attributes:
        servers: Addresses of the servers of one cluster.
        user, password, token, creds_file: How the client proves who it is; None is not used.
        ca_file: File with the certificates that a `tls://` server is checked with; None takes the system's.
        replicas: Copies that the cluster keeps of each stream.
        storage: "file" or "memory".
        timeout: Seconds after which a server that does not answer counts as gone.
    """

    servers: tuple[str, ...]
    namespace: str
    user: str | None = None
    password: str | None = None
    token: str | None = None
    creds_file: str | None = None
    ca_file: str | None = None
    replicas: int = 1
    storage: str = "file"
    timeout: float = 4.0


def read(url: str, namespace: str) -> Options:
    """Return what a URL says.

    Raises:
        ConfigError: The URL has no host, a bad port, or an option that is unknown or has a bad value.
    """
    parts = urlsplit(url)
    access, _, hosts = parts.netloc.rpartition("@")
    if parts.path not in ("", "/") or parts.fragment:
        raise ConfigError(f"url {_shown(url)!r} has a path: write nats://host:4222?option=value")
    servers = tuple(f"{parts.scheme}://{_checked(host, url)}" for host in hosts.split(","))
    return Options(servers, namespace, **_access(access), **_options(parts.query))  # type: ignore[arg-type]


def _checked(host: str, url: str) -> str:
    try:
        found = urlsplit(f"nats://{host}")
        port = found.port or 4222
    except ValueError as error:
        raise ConfigError(f"url {_shown(url)!r} has a bad address {host!r}: {error}") from error
    if not found.hostname:
        raise ConfigError(f"url {_shown(url)!r} names no host: write nats://host:4222")
    name = f"[{found.hostname}]" if ":" in found.hostname else found.hostname
    return f"{name}:{port}"


def _access(access: str) -> dict[str, str]:
    """Return user and password, or the token that stands alone before the "@"."""
    if not access:
        return {}
    user, colon, password = access.partition(":")
    if not colon:
        return {"token": unquote(user)}
    return {"user": unquote(user), "password": unquote(password)}


def _options(query: str) -> dict[str, Any]:
    given = read_options(query, _READERS)
    return given if "replicas" not in given else {**given, "replicas": int(given["replicas"])}


_READERS: dict[str, Reader] = {
    "replicas": one_of("1", "2", "3", "4", "5"),
    "storage": one_of("file", "memory"),
    "timeout": seconds(0.1, 60),
    "creds_file": existing_file,
    "ca_file": existing_file,
}


def _shown(url: str) -> str:
    """Return the URL without its secrets."""
    before, at, after = url.partition("@")
    return f"{before.partition('://')[0]}://…@{after}" if at else url
