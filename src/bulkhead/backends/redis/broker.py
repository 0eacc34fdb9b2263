"""The broker on Redis.

Waiting for jobs: each queue has a bell, a list that takes one ring. Whoever makes a job claimable rings, and a claimer
that found nothing waits for the ring (BLPOP), but no longer than until the next job is due, and at most a second. So

- a ring between the look and the wait is not missed: the list keeps it;
- a ring wakes one claimer, not all; if that one leaves due jobs behind, its claim rings for the next one;
- a claimer that knows of a job due soon and ends its wait rings for another one, which may not know of it;
- a claimer that dies with the ring in hand delays the others by a second at most.

Prior art: taylorchu/work for Go has one hash per job and sorted sets by due time, too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from bulkhead.backends.base import (
    Broker,
    Burial,
    CancelAnswer,
    Claim,
    Ending,
    Hold,
    Message,
    Place,
    QueueCounts,
    Record,
    Return,
    Standing,
)
from bulkhead.backends.redis.link import Link
from bulkhead.backends.redis.script import Script, script
from bulkhead.backends.redis.settling import RedisSettler
from bulkhead.backends.redis.wire import MAX_BATCH, batches, check_size, micros, millis, packed, text

__all__ = ["RedisBroker"]

# Longest sleep in seconds of a claimer that waits, as the scripts assume (`ring_if_soon`).
_LOOK_AGAIN = 1.0

# Shortest BLPOP in seconds: 0 would be for ever.
_SHORTEST = 0.001

_ENQUEUE = script("enqueue")
_CLAIM = script("claim")
_RENEW = script("renew")
_NACK = script("nack")
_REMOVE = script("remove")
_REVIVE = script("revive")
_FIND = script("find")
_RECORDS = script("records")
_COUNTS = script("counts")
_RESUME = script("resume")

_STANDINGS = {ord("h"): Standing.HELD, ord("c"): Standing.CANCELLED, ord("l"): Standing.LOST}
_CANCELS = {ord("r"): CancelAnswer.REMOVED, ord("q"): CancelAnswer.REQUESTED, ord("u"): CancelAnswer.UNKNOWN}

# Ids, priorities, attempts, when enqueued, when due, bytes of the bodies, bytes of the errors (-1: none).
_Columns = tuple[list[str], list[int], list[int], list[int], list[int], list[int], list[int]]
_columns = msgspec.msgpack.Decoder(_Columns).decode


class RedisBroker(Broker):
    """Jobs in a Redis.

    Args:
        link: Where they are. Closed with the broker.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._settler = RedisSettler(link)
        self._paused = link.key("paused")
        self._stamp = link.key("stamp")
        # Why half: a wait that the server ends must not look like a server that does not answer.
        self._longest_wait = min(_LOOK_AGAIN, link.address.timeout / 2)

    def enqueue_many(self, messages: Sequence[Message]) -> list[bool]:
        """See `Broker`."""
        check_size([len(message.body) for message in messages])
        answers: list[bool] = []
        for part in batches(messages):
            ids, queues, bodies, priorities, delays, dues, remembers = zip(*part, strict=True)
            columns = (
                *(ids, queues, [text(body) for body in bodies], priorities),
                [micros(delay) if due is None else 0 for delay, due in zip(delays, dues, strict=True)],
                [_due(due) for due in dues],
                [millis(seconds) if seconds > 0 else 0 for seconds in remembers],
            )
            answers += _yes(self._link.run(_ENQUEUE, [self._stamp], [packed(columns)]))
        return answers

    def claim(self, queue: str, n: int, lease: float, *, wait: float = 0.0) -> list[Claim]:
        """See `Broker`."""
        deadline = time.monotonic() + wait
        look = partial(self._look, queue, n, lease)
        claims, pause = look("wait" if wait > 0 else "return")
        while not claims and (left := deadline - time.monotonic()) > 0:
            self._listen(queue, min(left, pause))
            claims, pause = look("wait" if time.monotonic() < deadline else "leave")
        while claims and len(claims) < n and len(claims) % MAX_BATCH == 0:
            more, _ = self._look(queue, n - len(claims), lease, "return")
            if not more:
                break
            claims += more
        return claims

    def renew(self, holds: Sequence[Hold], lease: float) -> list[Standing]:
        """See `Broker`."""
        answers = self._each(_RENEW, holds, _holds, micros(lease), is_repeatable=True)
        return [_STANDINGS[answer] for answer in answers]

    def ack(self, holds: Sequence[Hold]) -> list[bool]:
        """See `Broker`."""
        return self._settler.settle([Ending(hold) for hold in holds])

    def nack(self, returns: Sequence[Return]) -> list[bool]:
        """See `Broker`."""
        check_size([len(back.error or b"") for back in returns])
        return _yes(self._each(_NACK, returns, _returns))

    def bury(self, burials: Sequence[Burial]) -> list[bool]:
        """See `Broker`."""
        return self._settler.settle(
            [Ending(dead.hold, None, dead.reason or "", dead.error) for dead in burials]
        )

    def find(self, ids: Sequence[str]) -> list[Record | None]:
        """See `Broker`."""
        found: list[Record | None] = []
        for part in batches(ids):
            rows = self._link.run(_FIND, (), [packed(part)], is_repeatable=True)
            found += [row and _record(row) for row in rows]
        return found

    def records(
        self, place: Place, *, queue: str | None = None, offset: int = 0, limit: int = 100
    ) -> list[Record]:
        """See `Broker`."""
        chosen = () if queue is None else (queue,)
        arguments = (place.value, offset, limit, *chosen)
        return [_record(row) for row in self._link.run(_RECORDS, (), arguments, is_repeatable=True)]

    def counts(self) -> Mapping[str, QueueCounts]:
        """See `Broker`."""
        rows = self._link.run(_COUNTS, is_repeatable=True)
        return {
            queue.decode(): QueueCounts(ready, scheduled, running, dead, latency / 1e6)
            for queue, ready, scheduled, running, dead, latency in rows
        }

    def delete(self, ids: Sequence[str], *, dead_only: bool = False) -> list[bool]:
        """See `Broker`."""
        return [
            answer == ord("r") for answer in self._each(_REMOVE, ids, list, "dead" if dead_only else "delete")
        ]

    def cancel(self, ids: Sequence[str]) -> list[CancelAnswer]:
        """See `Broker`."""
        return [_CANCELS[answer] for answer in self._each(_REMOVE, ids, list, "cancel")]

    def revive(self, ids: Sequence[str]) -> list[bool]:
        """See `Broker`."""
        return _yes(self._each(_REVIVE, ids, list))

    def pause(self, queue: str) -> None:
        """See `Broker`."""
        self._link.command("SADD", self._paused, queue)

    def resume(self, queue: str) -> None:
        """See `Broker`."""
        self._link.run(_RESUME, [self._paused], [queue], is_repeatable=True)

    def paused(self) -> frozenset[str]:
        """See `Broker`."""
        return frozenset(name.decode() for name in self._link.command("SMEMBERS", self._paused))

    def close(self) -> None:
        """End the connections."""
        self._link.close()

    def _look(self, queue: str, n: int, lease: float, after: str) -> tuple[list[Claim], float]:
        """Return what can be claimed now, and for how many seconds it is no use to look again."""
        token = os.urandom(9).hex() + "-"
        arguments = (queue, min(n, MAX_BATCH), micros(lease), token, after)
        keys = (self._paused, self._link.key(f"running:{queue}"))
        next_due, *found = self._link.run(_CLAIM, keys, arguments)
        if found:
            return _claims(queue, token, *found), 0.0
        return [], self._longest_wait if next_due < 0 else min(self._longest_wait, next_due / 1e6)

    def _listen(self, queue: str, seconds: float) -> None:
        bell = self._link.key(f"bell:{queue}")
        self._link.command("BLPOP", bell, f"{max(seconds, _SHORTEST):.6f}", is_repeatable=False)

    def _each(
        self,
        step: Script,
        things: Sequence[Any],
        columns: Callable[[Sequence[Any]], Any],
        *arguments: str | int,
        is_repeatable: bool = False,
    ) -> bytes:
        """Return a character for each of the things, as the script says."""
        answers = [
            self._link.run(step, (), [packed(columns(part)), *arguments], is_repeatable=is_repeatable)
            for part in batches(things)
        ]
        return b"".join(answers)


def _due(due_at: float | None) -> int:
    # 0 stands for none; an instant long past is as good as any other past one.
    return 0 if due_at is None else max(1, micros(due_at))


def _holds(holds: Sequence[Hold]) -> tuple[tuple[str, ...], ...]:
    return tuple(zip(*holds, strict=True))


def _returns(returns: Sequence[Return]) -> tuple[Sequence[Any], ...]:
    return (
        *_holds([back.hold for back in returns]),
        [micros(back.delay) for back in returns],
        [back.counts for back in returns],
        [text(back.error) for back in returns],
        [back.keeps_place for back in returns],
    )


def _yes(answers: bytes) -> list[bool]:
    return [answer == ord("1") for answer in answers]


def _claims(queue: str, token: str, columns: bytes, texts: bytes) -> list[Claim]:
    claims = []
    start = 0
    rows = zip(*_columns(columns), strict=True)
    for n, (id, priority, attempt, enqueued, due, size, error_size) in enumerate(rows, start=1):
        middle = start + size
        error = None
        end = middle
        if error_size >= 0:
            end += error_size
            error = texts[middle:end]
        hold = Hold(id, queue, f"{token}{n}")
        claims.append(Claim(hold, texts[start:middle], priority, attempt, enqueued / 1e6, due / 1e6, error))
        start = end
    return claims


def _record(row: list[Any]) -> Record:
    id, place, queue, priority, attempt, enqueued, due, leased, reason, is_cancelled, body, error = row
    return Record(
        id=id.decode(),
        queue=queue.decode(),
        place=Place(place.decode()),
        body=body,
        priority=int(priority),
        attempt=int(attempt),
        enqueued_at=float(enqueued) / 1e6,
        due_at=float(due) / 1e6,
        leased_until=None if leased is None else float(leased) / 1e6,
        reason=reason.decode(),
        error=error,
        is_cancelled=is_cancelled == b"1",
    )
