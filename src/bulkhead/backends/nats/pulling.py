"""Taking messages from a pull consumer without waiting on the server.

Every request says `no_wait`: the server gives what it has and then says that there is no more, so a request is over
when its answer is there, and no message can be on its way to somebody who has gone. Who wants to wait listens to the
queue's bell (`bells`) and asks again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from bulkhead.backends.nats.layout import check_answer
from bulkhead.backends.nats.session import Session
from bulkhead.errors import BrokerUnavailable

__all__ = ["NoAnswer", "Pull"]

# Nanoseconds after which the server drops a consumer that was made for one scan and was not deleted.
_PASSING = 30 * 10**9


class NoAnswer(BrokerUnavailable):
    """The server is there, but the consumer does not answer: there is none, or it is confused."""


class Pull:
    """One consumer, seen from this process; `created` is when it was made, as the server says it."""

    def __init__(self, session: Session, stream: str, consumer: str, created: str = "") -> None:
        self.created = created
        self._session = session
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._inbox = session.client.new_inbox()
        self._requests = 0
        self._subscription: Subscription | None = None
        # One request at a time, as what comes does not say which it belongs to.
        self._lock = asyncio.Lock()
        self._messages: list[Msg] = []
        self._wanted = 0
        self._over: asyncio.Future[None] | None = None

    async def fetch(self, n: int) -> list[Msg]:
        """Return up to `n` messages that are there now.

        Raises:
            NoAnswer: There is no answer in time.
        """
        async with self._lock:
            await self._listen()
            self._requests += 1
            self._wanted = n
            self._over = asyncio.get_running_loop().create_future()
            if len(self._messages) < n:
                await self._request(n - len(self._messages))
            taken, self._messages = self._messages[:n], self._messages[n:]
            return taken

    async def close(self) -> None:
        """Stop listening."""
        if self._subscription is not None:
            try:
                await self._subscription.unsubscribe()
            except NatsError:
                pass

    @classmethod
    @asynccontextmanager
    async def passing(cls, session: Session, stream: str, subjects: str, start: int) -> AsyncIterator[Pull]:
        """Give a consumer that only lives for one scan."""
        config: dict[str, Any] = {
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": max(1, start),
            "ack_policy": "none",
            "replay_policy": "instant",
            "filter_subject": subjects,
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": _PASSING,
        }
        body = json.dumps({"stream_name": stream, "config": config}).encode()
        made = check_answer(
            await session.ask_one(f"$JS.API.CONSUMER.CREATE.{stream}", body), f"reading {stream}"
        )
        pull = cls(session, stream, made["name"])
        try:
            yield pull
        finally:
            await pull.close()
            await session.ask_one(f"$JS.API.CONSUMER.DELETE.{stream}.{made['name']}")

    async def _listen(self) -> None:
        if self._subscription is None:
            self._subscription = await self._session.client.subscribe(f"{self._inbox}.*", cb=self._on_message)

    async def _request(self, n: int) -> None:
        assert self._over is not None
        body = b'{"batch":%d,"no_wait":true}' % n
        try:
            await self._session.tell(self._subject, body, f"{self._inbox}.{self._requests}")
            await asyncio.wait_for(self._over, self._session.options.timeout / 4)
        except TimeoutError as error:
            raise NoAnswer(f"NATS server: no answer from the consumer of {self._subject}") from error

    async def _on_message(self, message: Msg) -> None:
        assert self._over is not None
        if not message.subject.startswith(self._inbox):
            self._messages.append(message)
            if len(self._messages) < self._wanted:
                return
        elif message.subject != f"{self._inbox}.{self._requests}":
            return  # the end of a request that was given up
        if not self._over.done():
            self._over.set_result(None)
