"""What is written down of each queue: its name, which priorities its jobs have had, and whether it is paused.

Who claims reads it each time, so that a pause holds from the moment that `pause` returns, and a priority that is new
is looked at. Who enqueues adds a priority, and does so again now and then: the server may have lost it. Who claims and
finds none looks for tickets themselves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from bulkhead.backends.nats.cells import Cell, Cells
from bulkhead.backends.nats.layout import Layout
from bulkhead.backends.nats.names import token_of
from bulkhead.backends.nats.session import Session
from bulkhead.backends.nats.tickets import Tickets
from bulkhead.errors import BrokerUnavailable

__all__ = ["Queue", "Queues"]

# Attempts to change a record that others change, too; each fails only because another one has succeeded.
_ATTEMPTS = 50
# Seconds after which a priority is announced anew: somebody else may have made the stream anew, and nothing tells us.
_FRESH = 20.0


@dataclass(frozen=True, slots=True)
class Queue:
    """One queue; priorities with the most urgent first."""

    name: str
    priorities: tuple[int, ...] = ()
    is_paused: bool = False

    @property
    def token(self) -> str:
        """Its token in subjects."""
        return token_of(self.name)


class Queues:
    """The queues of a namespace."""

    def __init__(self, session: Session, cells: Cells, tickets: Tickets, layout: Layout) -> None:
        self._session = session
        self._cells = cells
        self._tickets = tickets
        self._layout = layout
        self._announced: set[tuple[str, int]] = set()
        self._since = (session.epoch, time.monotonic())

    def forget(self) -> None:
        """Announce everything anew: the streams may have been made anew."""
        self._announced.clear()
        self._since = (self._session.epoch, time.monotonic())

    async def announce(self, found: Iterable[tuple[str, int]]) -> None:
        """See to it that claimers look at these queues and priorities."""
        epoch, when = self._since
        if epoch != self._session.epoch or time.monotonic() - when > _FRESH:
            self.forget()
        for name, priority in set(found) - self._announced:
            await self.change(name, lambda queue, priority=priority: _with(queue, priority))  # type: ignore[misc]
            self._announced.add((name, priority))

    async def get(self, name: str) -> Queue:
        """Return what is known of a queue."""
        queue = _read(name, (await self._cells.get_named([name]))[0])
        if queue.priorities or not (found := await self._tickets.waiting(queue.token)):
            return queue
        # Somebody has deleted what was written down, and those who enqueue do not know.
        await self.change(name, lambda queue: _with(queue, *found))
        return _with(queue, *found)

    async def all(self) -> list[Queue]:
        """Return the queues that have ever had a job or a pause."""
        subjects = await self._tickets.listed(f"{self._layout.queues}.*")
        cells = await self._cells.get([subject.rpartition(".")[2] for subject in subjects])
        return sorted((_read("", cell) for cell in cells if cell is not None), key=lambda queue: queue.name)

    async def change(self, name: str, step: Callable[[Queue], Queue]) -> None:
        """Set what is known of a queue to what `step` makes of it."""
        for _ in range(_ATTEMPTS):
            cell = (await self._cells.get_named([name]))[0]
            queue = _read(name, cell)
            changed = step(queue)
            if changed == queue:
                return
            body = json.dumps([name, list(changed.priorities), changed.is_paused]).encode()
            version = cell.version if cell is not None else 0
            if (await self._cells.put([(token_of(name), body, version)]))[0] is not None:
                return
        raise BrokerUnavailable(f"queue {name!r} is changed by others all the time")


def _with(queue: Queue, *priorities: int) -> Queue:
    return replace(queue, priorities=tuple(sorted({*queue.priorities, *priorities}, reverse=True)))


def _read(name: str, cell: Cell | None) -> Queue:
    if cell is None:
        return Queue(name)
    name, priorities, is_paused = json.loads(cell.data)
    return Queue(name, tuple(priorities), is_paused)
