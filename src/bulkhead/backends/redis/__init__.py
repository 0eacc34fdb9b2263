"""Redis (6 or later) and Redis Cluster as the place of jobs, results and registry.

| file | which problem |
|---|---|
| address.py | the URL |
| link.py | connections, what is repeated, what errors mean |
| script.py, scripts/ | the Lua scripts, one for each step |
| wire.py | lists as one argument; units |
| broker.py, results.py, registry.py, settling.py | the contracts |
| sidekiq.py | jobs for the workers of a Sidekiq |

docs/how-to/backends.md has the layout of the keys.
"""

from __future__ import annotations

from bulkhead.backends.base import Backend
from bulkhead.backends.redis.address import Address
from bulkhead.backends.redis.broker import RedisBroker
from bulkhead.backends.redis.link import Link
from bulkhead.backends.redis.registry import RedisRegistry
from bulkhead.backends.redis.results import RedisResults
from bulkhead.backends.redis.settling import RedisSettler

__all__ = ["connect"]


def connect(url: str, namespace: str) -> Backend:
    """Return the backend of a Redis; see `bulkhead.backends.connect`.

    Raises:
        ConfigError: The URL cannot be meant, or the server refuses the password.
        BrokerUnavailable: The server cannot be reached.
    """
    link = Link(Address.of(url), namespace)
    try:
        link.command("EXISTS", link.queues)
    except BaseException:
        link.close()
        raise
    return Backend(RedisBroker(link), RedisResults(link), RedisRegistry(link), settler=RedisSettler(link))
