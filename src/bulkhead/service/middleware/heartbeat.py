"""`Heartbeat`: which consumers live, and what they do.

consumers/<id>      what a consumer says of itself; ends by itself when it says nothing any more
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from bulkhead import validate
from bulkhead.errors import BrokerUnavailable, ConfigError
from bulkhead.service.middleware.base import Middleware

if TYPE_CHECKING:
    from bulkhead.service.app import App
    from bulkhead.service.batch import HeldJob

__all__ = ["ConsumerInfo", "Heartbeat", "consumers"]

_PREFIX = "consumers/"

# Of a consumer's jobs so many are named. Arbitrary; a bound for what is sent with each beat.
_MOST_NAMED = 100


@dataclass(frozen=True, slots=True)
class ConsumerInfo:
    """What a consumer has said of itself. Times are aware datetimes in UTC, by its own clock.

    Attributes:
        id: Its own, for as long as it lives.
        host, pid: Where it is.
        queues: Whose jobs it runs.
        n_jobs: How many jobs of each queue it holds: those that run, and those that it has claimed to run next.
        jobs: Ids of these, the first 100 of each queue.
        started_at, beat_at: When it began, and when it has said this.
    """

    id: str
    host: str
    pid: int
    queues: tuple[str, ...]
    n_jobs: dict[str, int]
    jobs: dict[str, tuple[str, ...]]
    started_at: datetime
    beat_at: datetime


_unpack = msgspec.msgpack.Decoder(ConsumerInfo).decode


class Heartbeat(Middleware):
    """Let each consumer say that it lives, and what it does, for `consumers` and `App.consumers`.

    Args:
        every: Seconds between two beats; about one at least.
        expiry: Seconds after the last beat at which a consumer is gone; more than `every`. One that ends in good order
            is gone at once.

    Raises:
        ConfigError: A value cannot work.
    """

    def __init__(self, *, every: float = 5.0, expiry: float = 20.0) -> None:
        self.every = validate.seconds("every", every, zero=True)
        self.expiry = validate.seconds("expiry", expiry)
        if self.expiry <= self.every:
            raise ConfigError(f"expiry must be more than every={every!r}, not {expiry!r}")
        self._lock = threading.Lock()  # guards what follows; the registry is called under it
        self._id, self._n_consumers = "", 0
        # By thread: consumers of one process share this, and each calls `beat` in one of its own.
        self._queues: dict[int, list[Sequence[str]]] = {}
        self._jobs: dict[int, dict[str, list[str]]] = {}
        self._started_at = datetime.now(UTC)
        self._last = float("-inf")

    def attach(self, app: App) -> None:
        """See `Middleware`."""
        self._app = app

    def started(self, queues: Sequence[str]) -> None:
        """See `Middleware`."""
        with self._lock:
            if not self._n_consumers:
                self._id, self._queues = secrets.token_hex(8), {}
                self._jobs, self._started_at = {}, datetime.now(UTC)
            self._queues.setdefault(threading.get_ident(), []).append(queues)
            self._say()
            self._n_consumers += 1

    def beat(self, queue: str, jobs: Sequence[HeldJob]) -> None:
        """See `Middleware`."""
        with self._lock:
            self._jobs.setdefault(threading.get_ident(), {})[queue] = [held.id for held in jobs]
            if time.monotonic() - self._last >= self.every:
                # The consumer says by itself that its server is out of reach; the next beat tries again.
                with contextlib.suppress(BrokerUnavailable):
                    self._say()

    def stopped(self) -> None:
        """See `Middleware`."""
        with self._lock, contextlib.suppress(BrokerUnavailable):
            self._n_consumers -= 1
            if mine := self._queues.get(threading.get_ident()):
                mine.pop()
            if not self._n_consumers:
                self._app.backend.registry.delete(_PREFIX + self._id)

    def _say(self) -> None:
        self._last = time.monotonic()
        living = {thread.ident for thread in threading.enumerate()}
        self._jobs = {thread: jobs for thread, jobs in self._jobs.items() if thread in living}
        held: dict[str, list[str]] = {}
        for one in self._jobs.values():
            for queue, ids in one.items():
                held.setdefault(queue, []).extend(ids)
        queues = dict.fromkeys(queue for some in self._queues.values() for each in some for queue in each)
        said = ConsumerInfo(
            self._id,
            socket.gethostname(),
            os.getpid(),
            tuple(queues),
            {queue: len(jobs) for queue, jobs in held.items()},
            {queue: tuple(jobs[:_MOST_NAMED]) for queue, jobs in held.items()},
            self._started_at,
            datetime.now(UTC),
        )
        self._app.backend.registry.put(_PREFIX + self._id, msgspec.msgpack.encode(said), keep=self.expiry)


def consumers(app: App) -> list[ConsumerInfo]:
    """Return the consumers that live and have a `Heartbeat`, the one that has begun first at the front.

    Raises:
        BrokerUnavailable: The server cannot be reached.
    """
    found = []
    for entry in app.backend.registry.entries(_PREFIX):
        with contextlib.suppress(msgspec.MsgspecError):  # of another version of bulkhead
            found.append(_unpack(entry.value))
    return sorted(found, key=lambda one: (one.started_at, one.id))
