"""Places to keep durable jobs. A URL says which: `connect` reads it.

One folder (or module) for each kind of server, named as its URL scheme, with a function
`connect(url, namespace) -> Backend`. Importing one imports its client library; nothing else of bulkhead does.
"""

from __future__ import annotations

import importlib
import re
from urllib.parse import urlsplit

from bulkhead.backends.base import Backend
from bulkhead.errors import ConfigError, ConfigTypeError, MissingExtra

__all__ = ["check", "connect"]

# Scheme of the URL: module that connects, extra that has its client library.
_SCHEMES = {
    "memory": ("memory", "queue"),
    "sqlite": ("sqlite", "queue"),
    "redis": ("redis", "redis"),
    "rediss": ("redis", "redis"),
    "redis+cluster": ("redis", "redis"),
    "rediss+cluster": ("redis", "redis"),
    "nats": ("nats", "nats"),
    "tls": ("nats", "nats"),
}

# Why so narrow: it becomes part of keys, subjects and bucket names, where braces, dots and blanks have a meaning.
_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check(url: str, namespace: str) -> str:
    """Return the scheme of a URL that `connect` can take; nothing is connected.

    Raises:
        ConfigError: The scheme is none of those known, or the namespace has other characters than letters, digits,
            "_" and "-".
    """
    for option, value in (("url", url), ("namespace", namespace)):
        if not isinstance(value, str):
            raise ConfigTypeError(f"{option} must be a str, not {value!r} of type {type(value).__name__}")
    if not _NAMESPACE.fullmatch(namespace):
        raise ConfigError(f'namespace must be 1 to 64 letters, digits, "_" or "-", not {namespace!r}')
    scheme = urlsplit(url).scheme
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise ConfigError(f"url must begin with one of {known} and not be {url!r}")
    return scheme


def connect(url: str, namespace: str = "bulkhead") -> Backend:
    """Return the backend of a URL.

    Args:
        url: `memory://`, `sqlite:///relative.db`, `sqlite:////absolute.db`, `redis://host:6379/0`, `rediss://…`,
            `redis+cluster://host:7000`, `nats://host:4222`; options follow a `?`, as the backend's module says.
        namespace: Jobs of different namespaces do not see each other.

    Raises:
        ConfigError: As `check`; or an option of the URL is unknown or has a bad value.
        MissingExtra: The client library is not installed.
        BrokerUnavailable: The server cannot be reached.
    """
    scheme = check(url, namespace)
    module, extra = _SCHEMES[scheme]
    try:
        chosen = importlib.import_module(f"bulkhead.backends.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("bulkhead"):
            raise
        raise MissingExtra(
            f"{scheme}:// needs the package {error.name}, which is not installed: pip install 'bulkhead-pool[{extra}]'",
            name=error.name,
        ) from error
    backend: Backend = chosen.connect(url, namespace)
    return backend
