"""From a call to a message in its queue: the job as it travels, through the middlewares, to the broker."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from bulkhead import forks, validate
from bulkhead.backends.base import Message
from bulkhead.errors import ConfigError, ConfigTypeError
from bulkhead.service.envelope import Envelope, Follow, encoded
from bulkhead.service.middleware.base import Middleware, Submission
from bulkhead.service.task import Call

if TYPE_CHECKING:
    from bulkhead.service.app import App

__all__ = ["Put", "Submitting"]

# A round trip carries so many jobs.
_PER_CALL = 1000

# For how long an id stays taken after the job that had it is settled, where somebody may use it again (seconds).
_REMEMBER = 86400.0

Put = Callable[[Sequence[Submission]], None]


class Submitting:
    """Enqueues an application's jobs. Concurrency: any thread, and forked copies."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._ids = _Ids()

    def next_id(self) -> str:
        """Return an id that nobody else has."""
        return self._ids.next()

    def submission(self, call: Call) -> Submission:
        """Return a job as it enters the middlewares.

        Raises:
            ConfigError: It is no job of this application, or its arguments cannot be encoded.
            UnknownQueue: There is no such queue.
        """
        if not isinstance(call, Call):
            raise ConfigTypeError(f"jobs are made by task.call(...); this is {validate.shown(call)}")
        queue = self._queue_of(call)
        try:
            envelope = self.envelope(call)
        except RecursionError:
            raise ConfigError(
                f"a job of task {call.task.name!r} cannot be enqueued: too many others follow it one behind the other"
            ) from None
        return Submission(call.id or self.next_id(), call.id is not None, call, queue, envelope)

    def submit(self, submissions: Sequence[Submission], forward: Put | None = None) -> None:
        """Pass jobs through the middlewares, and what comes through on to `forward`, by default the broker."""
        put = self._enqueue if forward is None else forward
        for middleware in reversed(self._app.middlewares):
            put = _around(middleware, put)
        put(submissions)

    def envelope(self, call: Call, *, takes: bool = False) -> Envelope:
        """Return a job as it travels.

        Raises:
            ConfigTypeError: Its arguments cannot be encoded.
        """
        options = call.task.options
        codec = self._app.sealer.codec
        backoff = call.backoff or options.backoff
        return Envelope(
            call.task.name,
            _arguments(call, codec),
            codec,
            options.timeout if call.timeout is None else call.timeout,
            options.max_retries if call.max_retries is None else call.max_retries,
            (backoff.initial, backoff.factor, backoff.jitter, backoff.maximum),
            options.keep_result if call.keep_result is None else call.keep_result,
            self._follows(call, "on_success"),
            self._follows(call, "on_error"),
            None,
            takes,
            dict(call.headers) if call.headers else {},
        )

    def _follows(self, call: Call, wanted: str) -> tuple[Follow, ...]:
        if not call.follows:
            return ()
        return tuple(self.follow(one) for kind, one in call.follows if kind == wanted)

    def follow(self, call: Call, *, takes: bool = True) -> Follow:
        """Return a job that is enqueued when another has ended.

        Raises:
            UnknownQueue, ConfigTypeError, ConfigError: It could not be enqueued.
        """
        return Follow(
            call.id or self.next_id(),
            self._queue_of(call),
            _priority_of(call),
            call.delay,
            call.due_at,
            self.envelope(call, takes=takes),
        )

    def message(self, follow: Follow, envelope: Envelope) -> Message:
        """Return a follow-up job as the broker keeps it."""
        body = self._app.sealer.seal(follow.id, follow.queue, envelope)
        return Message(
            follow.id, follow.queue, body, follow.priority, follow.delay, follow.due_at, remember=_REMEMBER
        )

    def _enqueue(self, submissions: Sequence[Submission]) -> None:
        broker = self._app.backend.broker
        for at in range(0, len(submissions), _PER_CALL):
            part = submissions[at : at + _PER_CALL]
            for one, is_new in zip(part, broker.enqueue_many(list(map(self._message, part))), strict=True):
                # Race: a call that is repeated after a lost connection finds the job of its own first try. Nobody else
                # can have made an id that is not the caller's own.
                if not is_new and one.is_own_id:
                    one.duplicate_of = one.id

    def _message(self, one: Submission) -> Message:
        call, envelope = one.call, one.envelope
        if one.headers:
            envelope = msgspec.structs.replace(envelope, headers={**envelope.headers, **one.headers})
        return Message(
            one.id,
            one.queue,
            self._app.sealer.seal(one.id, one.queue, envelope),
            _priority_of(call),
            call.delay,
            call.due_at,
            _REMEMBER if one.is_own_id else 0.0,
        )

    def _queue_of(self, call: Call) -> str:
        if call.task.app is not self._app:
            raise ConfigError(f"task {call.task.name!r} belongs to another application")
        return self._app.catalog.known_queue(call.queue or call.task.options.queue)


class _Ids:
    """Ids that are nowhere else: random for each process, then counted. Why not random ones: they cost 2 µs each."""

    def __init__(self) -> None:
        self._depth = -1
        self._prefix = ""
        self._numbers = itertools.count()

    def next(self) -> str:
        if self._depth != forks.depth:
            self._prefix = secrets.token_hex(8)
            self._depth = forks.depth
        return f"{self._prefix}-{next(self._numbers):x}"


def _around(middleware: Middleware, forward: Put) -> Put:
    if type(middleware).enqueue is Middleware.enqueue:
        return forward
    return lambda submissions: middleware.enqueue(submissions, forward)


def _priority_of(call: Call) -> int:
    return call.task.options.priority if call.priority is None else call.priority


def _arguments(call: Call, codec: str) -> bytes:
    try:
        return encoded(codec, (call.args, dict(call.kwargs)))
    except Exception as error:
        raise ConfigTypeError(
            f"the arguments of task {call.task.name!r} cannot be encoded in {codec}: {error}; pass plain values, or "
            'make the application with codec="pickle" and a key'
        ) from error
