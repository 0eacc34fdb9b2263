"""The three contracts for callers in any thread and any copy of the process.

A process has one thread with an event loop, and in it one connection; the first call makes them. A forked copy of the
process has none of its parent's: its first call makes its own. What it has inherited of its parent's socket is put out
of its hands, or the server would believe the parent to be connected as long as the copy lives.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from bulkhead import forks
from bulkhead.backends.base import (
    Broker,
    Burial,
    CancelAnswer,
    Claim,
    Entry,
    Hold,
    Message,
    Outcome,
    OutcomeState,
    Place,
    QueueCounts,
    Record,
    Registry,
    ResultStore,
    Return,
    Standing,
)
from bulkhead.backends.nats.clock import Clock
from bulkhead.backends.nats.jobs import Jobs
from bulkhead.backends.nats.layout import Layout
from bulkhead.backends.nats.looping import LoopThread
from bulkhead.backends.nats.options import Options
from bulkhead.backends.nats.registry import Entries
from bulkhead.backends.nats.results import Results
from bulkhead.backends.nats.session import Session
from bulkhead.errors import BrokerUnavailable

__all__ = ["Link", "NatsBroker", "NatsRegistry", "NatsResultStore"]

_T = TypeVar("_T")

# What a forked copy has inherited and does not use: kept, as throwing it away would touch what the parent uses.
_inherited: list[object] = []


class Connected:
    """A session and the three parts that use it. Owner: the loop's thread."""

    def __init__(self, options: Options) -> None:
        layout = Layout(options)
        self.session = Session(options)
        self.clock = Clock(self.session, layout.index_stream, layout.clock)
        self.jobs = Jobs(self.session, self.clock, layout)
        self.results = Results(self.session, self.clock, layout)
        self.registry = Entries(self.session, self.clock, layout)
        self._layout = layout

    async def open(self) -> None:
        """Connect and make what is missing."""
        await self.session.open()
        self.session.prepare = self._prepare
        try:
            await self._prepare()
            await self.clock.keep_right()
        except BaseException:
            await self.session.close()
            raise

    async def _prepare(self) -> None:
        self.jobs.queues.forget()
        await self._layout.make_streams(self.session)


class _Process:
    """The thread and the connection of one process."""

    def __init__(self, options: Options) -> None:
        self.depth = forks.depth
        self.options = options
        self.loop = LoopThread(f"bulkhead nats {options.namespace}")
        self.connected: Connected | None = None
        self._opening: Any = None

    async def do(self, work: Callable[[Connected], Coroutine[Any, Any, _T]]) -> _T:
        """Run work on a connection that is made when there is none."""
        connected = await self._open()
        await connected.clock.keep_right()
        return await work(connected)

    async def close(self) -> None:
        """End the connection."""
        if self.connected is not None:
            await self.connected.session.close()
            self.connected = None

    async def _open(self) -> Connected:
        if self._opening is None:
            import asyncio

            self._opening = asyncio.Lock()
        async with self._opening:
            if self.connected is not None and not self.connected.session.is_usable:
                await self.close()
            if self.connected is None:
                connected = Connected(self.options)
                await connected.open()
                self.connected = connected
            return self.connected


class Link:
    """Hands work to the process's loop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        # Guards `_process` and `_is_closed`. Rank: taken alone.
        self._lock = threading.Lock()
        self._lock_depth = forks.depth
        self._process: _Process | None = None
        self._is_closed = False

    def call(self, work: Callable[[Connected], Coroutine[Any, Any, _T]]) -> _T:
        """Return what the work returns.

        Raises:
            BrokerUnavailable: The server cannot be reached, or this was closed.
        """
        process = self._here()
        return process.loop.run(process.do(work))

    def close(self) -> None:
        """End connection and thread. A second call does nothing."""
        self._leave_parents()
        with self._lock:
            process, self._process, self._is_closed = self._process, None, True
        if process is not None:
            try:
                process.loop.run(process.close())
            finally:
                process.loop.stop()

    def _here(self) -> _Process:
        self._leave_parents()
        with self._lock:
            if self._is_closed:
                raise BrokerUnavailable("the backend is closed")
            if self._process is None:
                self._process = _Process(self._options)
            return self._process

    def _leave_parents(self) -> None:
        """In a forked copy, let go of what is the parent's."""
        if self._lock_depth == forks.depth:
            return
        # Race: the parent may have been forked while another thread held its lock, so the copy needs a new one. Two
        # threads of the copy that come here at once: one of them may make a second connection, which is closed with
        # the process.
        self._lock_depth = forks.depth
        self._lock = threading.Lock()
        inherited, self._process = self._process, None
        if inherited is not None:
            _inherited.append(inherited)
            _put_away(inherited)


def _put_away(process: _Process) -> None:
    """Close the copy of the parent's socket without a word to the server."""
    number = process.connected.session.socket_number() if process.connected is not None else None
    if number is not None:
        # Why not closed: the number would be given to another file, which the inherited objects would then touch.
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, number, inheritable=False)
        os.close(nothing)


class NatsBroker(Broker):
    """A broker on JetStream."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def enqueue_many(self, messages: Sequence[Message]) -> list[bool]:
        """As `Broker`: two round trips for 500 jobs."""
        return self._link.call(lambda at: at.jobs.enqueue(messages))

    def claim(self, queue: str, n: int, lease: float, *, wait: float = 0.0) -> list[Claim]:
        """As `Broker`."""
        return self._link.call(lambda at: at.jobs.claim(queue, n, lease, wait))

    def renew(self, holds: Sequence[Hold], lease: float) -> list[Standing]:
        """As `Broker`."""
        return self._link.call(lambda at: at.jobs.renew(holds, lease))

    def ack(self, holds: Sequence[Hold]) -> list[bool]:
        """As `Broker`."""
        return self._link.call(lambda at: at.jobs.ack(holds))

    def nack(self, returns: Sequence[Return]) -> list[bool]:
        """As `Broker`."""
        return self._link.call(lambda at: at.jobs.nack(returns))

    def bury(self, burials: Sequence[Burial]) -> list[bool]:
        """As `Broker`."""
        return self._link.call(lambda at: at.jobs.bury(burials))

    def find(self, ids: Sequence[str]) -> list[Record | None]:
        """As `Broker`."""
        return self._link.call(lambda at: at.jobs.find(ids))

    def records(
        self, place: Place, *, queue: str | None = None, offset: int = 0, limit: int = 100
    ) -> list[Record]:
        """As `Broker`; what it costs says `looking`."""
        return self._link.call(lambda at: at.jobs.records(place, queue, offset, limit))

    def counts(self) -> Mapping[str, QueueCounts]:
        """As `Broker`; what it costs says `looking`."""
        return self._link.call(lambda at: at.jobs.counts())

    def delete(self, ids: Sequence[str], *, dead_only: bool = False) -> list[bool]:
        """As `Broker`."""
        return self._link.call(lambda at: at.jobs.delete(ids, dead_only))

    def cancel(self, ids: Sequence[str]) -> list[CancelAnswer]:
        """As `Broker`."""
        return self._link.call(lambda at: at.jobs.cancel(ids))

    def revive(self, ids: Sequence[str]) -> list[bool]:
        """As `Broker`."""
        return self._link.call(lambda at: at.jobs.revive(ids))

    def pause(self, queue: str) -> None:
        """As `Broker`."""
        self._link.call(lambda at: at.jobs.pause(queue, True))

    def resume(self, queue: str) -> None:
        """As `Broker`."""
        self._link.call(lambda at: at.jobs.pause(queue, False))

    def paused(self) -> frozenset[str]:
        """As `Broker`."""
        return self._link.call(lambda at: at.jobs.paused())

    def close(self) -> None:
        """End the connection that the three parts share."""
        self._link.close()


class NatsResultStore(ResultStore):
    """A result store in a KV bucket."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def save_many(self, outcomes: Sequence[Outcome]) -> None:
        """As `ResultStore`."""
        self._link.call(lambda at: at.results.save(outcomes))

    def get_many(self, ids: Sequence[str]) -> list[Outcome | None]:
        """As `ResultStore`."""
        return self._link.call(lambda at: at.results.get(ids))

    def delete(self, ids: Sequence[str]) -> list[bool]:
        """As `ResultStore`."""
        return self._link.call(lambda at: at.results.delete(ids))

    def outcomes(
        self, state: OutcomeState, *, queue: str | None = None, offset: int = 0, limit: int = 100
    ) -> list[Outcome]:
        """As `ResultStore`; what it costs says `results`."""
        return self._link.call(lambda at: at.results.outcomes(state, queue, offset, limit))

    def counts(self) -> Mapping[OutcomeState, int]:
        """As `ResultStore`; what it costs says `results`."""
        return self._link.call(lambda at: at.results.counts())

    def close(self) -> None:
        """End the connection that the three parts share."""
        self._link.close()


class NatsRegistry(Registry):
    """A registry in a KV bucket."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def get(self, key: str) -> Entry | None:
        """As `Registry`."""
        return self._link.call(lambda at: at.registry.get(key))

    def put(
        self, key: str, value: bytes, *, expected: int | None = None, keep: float | None = None
    ) -> int | None:
        """As `Registry`."""
        return self._link.call(lambda at: at.registry.put(key, value, expected, keep))

    def delete(self, key: str, *, expected: int | None = None) -> bool:
        """As `Registry`."""
        return self._link.call(lambda at: at.registry.delete(key, expected))

    def entries(self, prefix: str) -> list[Entry]:
        """As `Registry`; it reads the whole bucket."""
        return self._link.call(lambda at: at.registry.entries(prefix))

    def close(self) -> None:
        """End the connection that the three parts share."""
        self._link.close()
