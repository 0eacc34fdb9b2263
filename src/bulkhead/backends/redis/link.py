"""The connections to one Redis or Redis Cluster, and what its errors mean.

A link has a pool of connections for each process: a forked copy makes its own. A call takes a connection that nobody
uses, so any number of threads may call at once. redis-py never repeats a call here: whether that is right is known to
who calls. One that gives the same answer when it is carried out twice is repeated after a lost connection; any other
one is not, for the answer would be another one (a job that was kept in the first go would look like a duplicate). One
that no node of a cluster would carry out, as its slot is being moved or the cluster is down, is repeated in any case.

All keys of a namespace have the hash tag `{namespace}`, and so lie on one node of a cluster.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Never

from redis import Redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterError,
    ConnectionError,  # noqa: A004
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    TimeoutError,  # noqa: A004
    TryAgainError,
)
from redis.retry import Retry

from bulkhead import forks
from bulkhead.backends.redis.address import Address
from bulkhead.backends.redis.lines import Lines
from bulkhead.backends.redis.script import Script
from bulkhead.errors import BadMessage, BrokerUnavailable, BulkheadError, ConfigError, MessageTooLarge

__all__ = ["Link"]

Argument = bytes | str | int | float

# Seconds before each further try of a call that may be repeated: a server that starts again takes about that long.
_PAUSES = (0.1, 0.4)

_REFUSED = (AuthenticationError, AuthorizationError, NoPermissionError)

# What says: not this server, or not now.
_UNAVAILABLE = (
    ClusterError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    TimeoutError,
    TryAgainError,
    OSError,
)
_NOT_NOW = ("BUSY", "MISCONF", "NOREPLICAS", "UNBLOCKED")

# The same of a command in a script, as servers before 7 say it.
_NOT_NOW_IN_SCRIPT = re.compile(r"Error running script .*: -(MISCONF|NOREPLICAS|OOM|READONLY) ")

# Of a script that begins while its slot is being moved (common.lua).
_MOVING = "attempted to access a non local key"

# Race: a server that is sent too much at once says so and hangs up; mostly only the latter is seen, for its answer is
# dropped when more of the argument arrives.
_TOO_MUCH = "Protocol error: invalid bulk length"

# Bytes. No server can be told to take less in one argument.
_ALWAYS_TAKEN = 1024 * 1024


class Link:
    """One server or cluster, and the names of a namespace's keys there.

    Args:
        address: Where it is.
        namespace: The hash tag of all keys.
    """

    def __init__(self, address: Address, namespace: str) -> None:
        self.address = address
        self._prefix = f"{{{namespace}}}:"
        self._client: Any = None
        self._lines: Lines | None = None  # of that client; a cluster has none
        # Owner: what this value of forks.depth stands for; a copy of the process has another one.
        self._depth = -1
        self._is_closed = False
        self.queues = self.key("queues")

    def key(self, name: str) -> bytes:
        """Return the key of a name in the namespace."""
        return (self._prefix + name).encode()

    def run(
        self,
        script: Script,
        keys: Sequence[bytes] = (),
        arguments: Sequence[Argument] = (),
        *,
        is_repeatable: bool = False,
    ) -> Any:
        """Run a script with `queues` as its first key, then these; return its answer.

        Raises:
            BrokerUnavailable: The server cannot be reached; unless `is_repeatable`, it may have run the script.
            ConfigError: The server refuses the password or the user.
            MessageTooLarge: An argument is larger than the server takes.
        """
        rest = (1 + len(keys), self.queues, *keys, *arguments)

        def call(client: Any) -> Any:
            # Race: another thread may have made lines and client anew; each is as good.
            ask = client.execute_command if self._lines is None else self._lines.ask
            try:
                return ask("EVALSHA", script.sha, *rest)
            except NoScriptError:  # the server is new, or was told to forget its scripts
                return ask("EVAL", script.text, *rest)

        try:
            return self._carry_out(call, is_repeatable)
        except BrokerUnavailable as error:
            self._refuse_size(arguments, error)
            raise

    def command(self, *parts: Argument, is_repeatable: bool = True) -> Any:
        """Return the answer to one command; raises as `run`."""
        return self._carry_out(lambda client: client.execute_command(*parts), is_repeatable)

    def transaction(self, commands: Sequence[tuple[Argument, ...]]) -> list[Any]:
        """Return the answers to commands that are carried out all or none, in one round trip; raises as `run`."""

        def call(client: Any) -> list[Any]:
            with client.pipeline(transaction=True) as pipeline:
                for parts in commands:
                    pipeline.execute_command(*parts)
                answers: list[Any] = pipeline.execute()
                return answers

        answers: list[Any] = self._carry_out(call, is_repeatable=False)
        return answers

    def close(self) -> None:
        """End this process's connections, also those that a thread waits on."""
        self._is_closed = True
        client, self._client = self._client, None
        if client is not None and self._depth == forks.depth:
            if self.address.is_cluster:
                client.disconnect_connection_pools()
            else:
                client.connection_pool.disconnect()

    def _carry_out(self, call: Callable[[Any], Any], is_repeatable: bool) -> Any:
        pauses = iter(_PAUSES)
        while True:
            try:
                return call(self._connected())
            except BulkheadError:
                raise
            except Exception as error:
                may_repeat = _is_untouched(error) or (is_repeatable and _is_lost(error))
                pause = next(pauses, None) if may_repeat else None
                if pause is None or self._is_closed:
                    self._refuse(error)
            time.sleep(pause)

    def _connected(self) -> Any:
        if self._is_closed:
            raise BrokerUnavailable(f"the connection to {self.address} is closed")
        # Race: two threads of a forked copy may both make a client; each uses its own to the end, and one stays.
        client = self._client
        if client is None or self._depth != forks.depth:
            client = self._made()
            self._lines = None if self.address.is_cluster else Lines(client.connection_pool)
            self._client, self._depth = client, forks.depth
        return client

    def _made(self) -> Any:
        address = self.address
        options: dict[str, Any] = {
            "username": address.username,
            "password": address.password,
            "socket_timeout": address.timeout,
            "socket_connect_timeout": address.timeout,
            "socket_keepalive": True,
            "protocol": 2,
            **({"ssl": True, **address.tls} if address.tls else {}),
        }
        if address.is_cluster:
            nodes = [ClusterNode(host, port) for host, port in address.nodes]  # type: ignore[no-untyped-call]
            return RedisCluster(startup_nodes=nodes, retry=Retry(NoBackoff(), 0), **options)
        [(host, port)] = address.nodes
        return Redis(host=host, port=port, db=address.database, retry=Retry(NoBackoff(), 0), **options)

    def _refuse(self, error: Exception) -> Never:
        """Raise what an error of redis-py means."""
        where, message = f"Redis at {self.address}", str(error)
        if _is_refused(error):
            raise ConfigError(f"url: {where} refuses this user or password: {message}") from error
        if isinstance(error, MovedError):
            raise ConfigError(
                f"url: {where} is a node of a cluster: redis+cluster:// instead of redis://"
            ) from error
        if "Cluster mode is not enabled" in message:
            raise ConfigError(f"url: {where} is no cluster: redis:// instead of redis+cluster://") from error
        if "WRONGTYPE" in message:
            raise BadMessage(
                f"{where}: a key of the namespace {self._prefix[:-1]} holds something else than bulkhead "
                f"puts there; delete that key, or choose another namespace: {message}"
            ) from error
        # Race: closed while another thread was using a connection, redis-py may say anything.
        is_not_now = message.startswith((*_NOT_NOW, _TOO_MUCH)) or _NOT_NOW_IN_SCRIPT.match(message)
        if isinstance(error, _UNAVAILABLE) or is_not_now or _MOVING in message or self._is_closed:
            raise BrokerUnavailable(f"{where} cannot be asked: {message or type(error).__name__}") from error
        raise error

    def _refuse_size(self, arguments: Sequence[Argument], error: BrokerUnavailable) -> None:
        """Raise MessageTooLarge if that is why the server has hung up, which it does in the middle of the argument."""
        size = max((len(argument) for argument in arguments if isinstance(argument, bytes | str)), default=0)
        if size <= _ALWAYS_TAKEN:
            return
        try:
            [limit] = self.command("CONFIG GET", "proto-max-bulk-len").values()
        except Exception:  # gone, or it does not tell
            return
        if size > int(limit):
            raise MessageTooLarge(
                f"{size} bytes are more than the {int(limit)} that Redis at {self.address} takes at once "
                "(proto-max-bulk-len)",
                size_bytes=size,
                limit_bytes=int(limit),
            ) from error


def _is_untouched(error: Exception) -> bool:
    """Tell whether no node has carried the call out: each sent it on to another one, or took none."""
    return isinstance(error, ClusterError) or _MOVING in str(error)


def _is_lost(error: Exception) -> bool:
    # Why not after a timeout: the bound of the call is used up.
    return isinstance(error, ConnectionError | RedisClusterException) and not _is_refused(error)


def _is_refused(error: Exception) -> bool:
    # The cluster client wraps what the nodes have said.
    return isinstance(error, _REFUSED) or isinstance(error.__cause__, _REFUSED)
