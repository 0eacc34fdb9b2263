"""One process's connection to the servers: questions and answers, in the loop's thread.

`ask` sends many requests and gathers their answers, with a bounded number outstanding. All answers come through one
subscription; the last token of the subject says which question one belongs to. While the connection is lost nats-py
makes it anew in the background; questions that were under way fail at once, others wait for it a little and then fail.

Owner: everything here belongs to the loop's thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import ssl
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from bulkhead.backends.nats.options import Options
from bulkhead.errors import BrokerUnavailable, MessageTooLarge

__all__ = ["AccessRefused", "Answer", "Question", "Session"]

_log = logging.getLogger("bulkhead.backends.nats")

# Questions under way at once. Enough to hide the way to the server and back; the server keeps up to 64 MiB per client.
_WINDOW = 512
# Bytes under way at once: bodies of some 100 KiB travel in smaller groups.
_WINDOW_BYTES = 4 * 1024 * 1024
# Seconds between two attempts to connect anew.
_RECONNECT_PAUSE = 0.2
# Seconds between two looks whether JetStream is there again; a restarted server needs a moment for it.
_JETSTREAM_PAUSE = 0.1

# Bytes of a message that its headers may take: ours take some 70.
_HEADERS = 128

# What an answer has whose stream does not exist. Such answers are short (bytes), and others are not looked through.
_NO_STREAM = b'"err_code":10059'
_LONGEST_REFUSAL = 400

# Subject, payload, headers.
Question = tuple[str, bytes, dict[str, str] | None]
# What JetStream answers, decoded.
Answer = dict[str, Any]


class AccessRefused(BrokerUnavailable):
    """The server does not accept who this says to be."""


class _Group:
    """Questions that were sent together."""

    def __init__(self, size: int) -> None:
        self.answers: list[Msg | None] = [None] * size
        self.missing = size
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self, place: int, message: Msg) -> None:
        self.answers[place] = message
        self.missing -= 1
        if not self.missing and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Session:
    """A connection, with what is done when JetStream does not know the streams (`prepare`)."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.epoch = 0  # grows when the connection was lost: what was heard before may be incomplete
        self.prepare: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._client = Client()
        self._inbox = ""
        self._numbers = 0
        self._waiting: dict[str, tuple[_Group, int]] = {}
        self._connected = asyncio.Event()
        self._refused = asyncio.Event()
        self._preparing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def client(self) -> Client:
        """The client of nats-py."""
        return self._client

    @property
    def is_usable(self) -> bool:
        """False once nats-py has given up, as it does when the server refuses the credentials."""
        return not self._client.is_closed

    @property
    def max_payload(self) -> int:
        """The largest message in bytes that the server takes, headers included."""
        return self._client.max_payload

    @property
    def room(self) -> int:
        """How much data in bytes a message can have. Why it counts: a server that gets more hangs up."""
        return self._client.max_payload - _HEADERS

    async def open(self) -> None:
        """Connect.

        Raises:
            BrokerUnavailable: No server answers in time.
            AccessRefused: It refuses the credentials.
        """
        connecting = asyncio.get_running_loop().create_task(self._connect())
        refused = asyncio.get_running_loop().create_task(self._refused.wait())
        try:
            await asyncio.wait(
                {connecting, refused}, timeout=self.options.timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if self._refused.is_set():
                raise AccessRefused(
                    f"the NATS server at {self._where()} refuses user, password, token or creds_file"
                )
            if not connecting.done():
                raise BrokerUnavailable(f"no NATS server answers at {self._where()}")
            connecting.result()
        except (NatsError, OSError, ValueError) as error:
            if isinstance(error, BrokerUnavailable):
                raise
            raise BrokerUnavailable(f"no NATS server at {self._where()}: {_told(error)}") from error
        else:
            self._connected.set()
        finally:
            for task in (connecting, refused):
                task.cancel()
            await asyncio.gather(connecting, refused, return_exceptions=True)
            if not self._connected.is_set():
                await self.close()

    async def close(self) -> None:
        """End the connection."""
        for task in self._tasks:
            task.cancel()
        self._lost(BrokerUnavailable("the backend was closed meanwhile"))
        try:
            await self._client.close()
        except (NatsError, OSError):
            pass

    def socket_number(self) -> int | None:
        """Return the descriptor of the connection, for a forked copy that has to let go of it."""
        transport = getattr(getattr(self._client, "_transport", None), "_io_writer", None)
        found = transport.get_extra_info("socket") if transport is not None else None
        return None if found is None or found.fileno() < 0 else int(found.fileno())

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the calls; what it raises is only logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    async def tell(self, subject: str, payload: bytes = b"", reply: str = "") -> None:
        """Publish without waiting for an answer. Lost when the connection is."""
        await self._ready()
        try:
            await self._client.publish(subject, payload, reply)
        except NatsError as error:
            raise BrokerUnavailable(f"NATS server at {self._where()}: {_told(error)}") from error

    async def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return JetStream's answers, in order; an answer with "error" says what was wrong with its question.

        Raises:
            BrokerUnavailable: The server cannot be reached, or JetStream does not answer.
            MessageTooLarge: A question is larger than the server takes; none was asked.
        """
        largest = max((len(payload) for _, payload, _ in questions), default=0)
        if self._client.is_connected and largest > self.room:
            raise MessageTooLarge(
                f"{largest} bytes are more than the {self.room} that this NATS server takes (max_payload)",
                size_bytes=largest,
                limit_bytes=self.room,
            )
        answers: list[Answer] = []
        for group in _groups(questions):
            answers += await self._ask_group(group)
        return answers

    async def ask_one(self, subject: str, payload: bytes = b"") -> Answer:
        """Return JetStream's answer to one question."""
        return (await self.ask([(subject, payload, None)]))[0]

    async def _ask_group(self, questions: list[Question]) -> list[Answer]:
        messages = await self._exchange(questions)
        deaf = [place for place, message in enumerate(messages) if _is_deaf(message)]
        deadline = asyncio.get_running_loop().time() + self.options.timeout
        while deaf:
            # JetStream is not up yet, or the stream is gone: nobody listens on its subjects, and reading it is refused.
            if asyncio.get_running_loop().time() > deadline:
                raise BrokerUnavailable(f"JetStream does not answer at {self._where()}: is it enabled?")
            await asyncio.sleep(_JETSTREAM_PAUSE)
            await self._prepare()
            for place, message in zip(deaf, await self._exchange([questions[i] for i in deaf]), strict=True):
                messages[place] = message
            deaf = [place for place in deaf if _is_deaf(messages[place])]
        return [json.loads(message.data or b"{}") for message in messages]

    async def _exchange(self, questions: list[Question]) -> list[Msg]:
        await self._ready()
        group = _Group(len(questions))
        names = []
        try:
            for place, (subject, payload, headers) in enumerate(questions):
                self._numbers += 1
                name = str(self._numbers)
                names.append(name)
                self._waiting[name] = (group, place)
                await self._client.publish(subject, payload, f"{self._inbox}.{name}", headers)
            await asyncio.wait_for(group.done, self.options.timeout)
        except TimeoutError as error:
            raise BrokerUnavailable(f"NATS server at {self._where()} does not answer") from error
        except NatsError as error:
            raise BrokerUnavailable(f"NATS server at {self._where()}: {_told(error)}") from error
        finally:
            for name in names:
                self._waiting.pop(name, None)
            if not group.done.cancel() and not group.done.cancelled():
                group.done.exception()  # Why: asyncio complains of errors that nobody has looked at
        return [message for message in group.answers if message is not None]

    async def _prepare(self) -> None:
        if self.prepare is None or self._preparing.locked():
            return
        async with self._preparing:
            await self.prepare()

    async def _ready(self) -> None:
        if self._client.is_connected:
            return
        try:
            await asyncio.wait_for(self._connected.wait(), self.options.timeout / 2)
        except TimeoutError as error:
            raise BrokerUnavailable(f"no connection to the NATS server at {self._where()}") from error

    async def _connect(self) -> None:
        options = self.options
        await self._client.connect(
            servers=list(options.servers),
            name=f"bulkhead {options.namespace} {os.getpid()}",
            error_cb=self._on_error,
            disconnected_cb=self._on_lost,
            reconnected_cb=self._on_found,
            closed_cb=self._on_lost,
            connect_timeout=max(1, int(options.timeout / 2)),
            reconnect_time_wait=_RECONNECT_PAUSE,  # type: ignore[arg-type]  # seconds, given to asyncio.sleep
            max_reconnect_attempts=-1,
            **_credentials(options),
        )
        self._inbox = self._client.new_inbox()
        await self._client.subscribe(f"{self._inbox}.*", cb=self._on_answer)

    async def _on_answer(self, message: Msg) -> None:
        waiting = self._waiting.pop(message.subject.rpartition(".")[2], None)
        if waiting is not None:
            group, place = waiting
            group.take(place, message)

    async def _on_lost(self) -> None:
        self._connected.clear()
        self.epoch += 1
        self._lost(BrokerUnavailable(f"the connection to the NATS server at {self._where()} was lost"))

    async def _on_found(self) -> None:
        self._connected.set()

    async def _on_error(self, error: Exception) -> None:
        if "authorization" in str(error).lower():
            self._refused.set()
        _log.debug("NATS server at %s: %s", self._where(), _told(error))

    def _lost(self, error: BrokerUnavailable) -> None:
        for group, _ in list(self._waiting.values()):
            group.fail(error)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.debug("tidying up was interrupted: %s", error)

    def _where(self) -> str:
        return ", ".join(self.options.servers)


def _groups(questions: Sequence[Question]) -> list[list[Question]]:
    groups: list[list[Question]] = []
    room = weight = 0
    for question in questions:
        if room == 0 or weight > _WINDOW_BYTES:
            groups.append([])
            room, weight = _WINDOW, 0
        groups[-1].append(question)
        room -= 1
        weight += len(question[1])
    return groups


def _is_deaf(message: Msg) -> bool:
    if message.data:
        return len(message.data) < _LONGEST_REFUSAL and _NO_STREAM in message.data
    return message.headers is not None and message.headers.get("Status") == "503"


def _credentials(options: Options) -> dict[str, Any]:
    found: dict[str, Any] = {
        "user": options.user,
        "password": options.password,
        "token": options.token,
        "user_credentials": options.creds_file,
    }
    if options.servers[0].startswith("tls:"):
        found["tls"] = ssl.create_default_context(cafile=options.ca_file)
    return {name: value for name, value in found.items() if value is not None}


def _told(error: BaseException) -> str:
    return str(error) or type(error).__name__
