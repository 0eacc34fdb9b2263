"""Waking those who wait for a queue's jobs.

Whoever has put tickets rings the queue's bell: a plain NATS message, which reaches each process that listens, and may
be lost. So it only makes things quick; who waits looks by himself some times a second. A bell for tickets that are not
due yet carries their subjects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from bulkhead.backends.nats.session import Session
from bulkhead.errors import BrokerUnavailable

__all__ = ["Bells"]

# Subjects in one message, and bytes that one takes at most.
_MOST = 500
_LONGEST = 512


class Bells:
    """Rings and hears the bells of a namespace."""

    def __init__(self, session: Session, prefix: str, heard: Callable[[str, list[str]], None]) -> None:
        self._session = session
        self._prefix = prefix
        self._heard = heard
        self._listening: set[str] = set()
        self._waiting: dict[str, set[asyncio.Event]] = {}

    async def listen(self, queue: str) -> None:
        """Hear the bell of a queue (its token) from now on."""
        if queue in self._listening:
            return
        self._listening.add(queue)
        try:
            await self._session.client.subscribe(f"{self._prefix}.{queue}", cb=self._on_bell)
        except NatsError as error:
            self._listening.discard(queue)
            raise BrokerUnavailable(f"cannot listen to the NATS server: {error}") from error

    async def ring(self, queue: str, later: Iterable[str] = ()) -> None:
        """Wake everybody who waits for this queue; `later` are the subjects of what is not due yet."""
        subjects = list(later)
        most = max(1, min(_MOST, self._session.room // _LONGEST))
        for start in range(0, max(1, len(subjects)), most):
            await self._session.tell(
                f"{self._prefix}.{queue}", "\n".join(subjects[start : start + most]).encode()
            )

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        """Wait until the bell has rung or the time is over."""
        try:
            await asyncio.wait_for(event.wait(), seconds)
        except TimeoutError:
            pass

    def attend(self, queue: str) -> asyncio.Event:
        """Return what is set whenever the bell rings, until `leave`."""
        event = asyncio.Event()
        self._waiting.setdefault(queue, set()).add(event)
        return event

    def leave(self, queue: str, event: asyncio.Event) -> None:
        """Undo `attend`."""
        waiting = self._waiting[queue]
        waiting.discard(event)
        if not waiting:
            del self._waiting[queue]

    async def _on_bell(self, message: Msg) -> None:
        queue = message.subject.rpartition(".")[2]
        if message.data:
            self._heard(queue, message.data.decode().split("\n"))
        for event in self._waiting.get(queue, ()):
            event.set()
