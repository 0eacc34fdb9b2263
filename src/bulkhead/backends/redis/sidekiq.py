"""Jobs for Sidekiq, the job queue of Ruby: enqueued from Python in its format, run by its workers.

A job is a JSON object in the list `queue:<name>`, whose name is in the set `queues`; one that is due later is in the
sorted set `schedule`, scored by its due time in seconds, and Sidekiq itself moves it to its queue. Nothing else of
bulkhead is involved: no broker, no results.

Up to version 7 Sidekiq writes `created_at` and `enqueued_at` as seconds with a fraction, from 8 on as whole
milliseconds. Version 8 still reads the former, and 7 takes the latter for seconds of the distant future; so seconds are
the default.

Source: the job format of Sidekiq's wiki, and Sidekiq::Client of 7 and 8.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any, Self

from bulkhead.backends.redis.address import Address
from bulkhead.backends.redis.link import Link
from bulkhead.backends.redis.wire import batches
from bulkhead.errors import ConfigError, ConfigTypeError
from bulkhead.validate import seconds, several, shown, text, whole_number

__all__ = ["SidekiqClient"]

_CLASS = re.compile(r"[A-Z]\w*(::[A-Z]\w*)*")

# Python turns no longer number into text (4,300 digits).
_MOST_BITS = 14_000

_OWN = frozenset({"class", "args", "queue", "retry", "jid", "at", "created_at", "enqueued_at"})


class SidekiqClient:
    """Enqueues jobs for the workers of a Sidekiq.

    Args:
        url: `redis://` or `rediss://`, as for a backend; Sidekiq does not run on a cluster.
        namespace: What the application's redis-namespace puts before each key, or None: Sidekiq 7 and later have none.
        milliseconds: Write times as Sidekiq 8 does. By default they are such that every version reads them.

    Raises:
        ConfigError: The URL or an option cannot be meant, or the server refuses the password.
        BrokerUnavailable: The server cannot be reached.

    Concurrency: any thread; a forked copy of the process makes connections of its own.
    """

    def __init__(self, url: str, namespace: str | None = None, *, milliseconds: bool = False) -> None:
        address = Address.of(_scheme_checked(url))
        self._prefix = "" if namespace is None else f"{_text('namespace', namespace)}:"
        self._milliseconds = milliseconds
        self._link = Link(address, "sidekiq")
        try:
            self._link.command("EXISTS", self._key("queues"))
        except BaseException:
            self._link.close()
            raise

    def enqueue(
        self,
        class_name: str,
        args: Sequence[Any] = (),
        *,
        queue: str = "default",
        at: float | None = None,
        delay: float | None = None,
        retry: bool | int = True,
        **attributes: Any,
    ) -> str:
        """Enqueue one job; as `enqueue_many`.

        Returns:
            The job's id (Sidekiq's jid): 24 hexadecimal digits.
        """
        [jid] = self.enqueue_many(
            class_name, [args], queue=queue, at=at, delay=delay, retry=retry, **attributes
        )
        return jid

    def enqueue_many(
        self,
        class_name: str,
        args: Iterable[Sequence[Any]],
        *,
        queue: str = "default",
        at: float | None = None,
        delay: float | None = None,
        retry: bool | int = True,
        **attributes: Any,
    ) -> list[str]:
        """Enqueue a job for each list of arguments, 1,000 in a round trip, which are enqueued all or none.

        Args:
            class_name: The Ruby class whose `perform` is run.
            args: Of each job the arguments: what JSON has, nothing else.
            queue: Name of the queue.
            at: POSIX time before which it is not to run; a past one means at once.
            delay: The same in seconds from now. Not together with `at`.
            retry: True for Sidekiq's 25 retries, False for none, or how many.
            attributes: What else the job is to have: `tags`, `backtrace`, `dead`, `retry_for` …

        Returns:
            The jobs' ids, in order.

        Raises:
            ConfigError: A class name, queue or argument that Sidekiq could not read. Nothing was enqueued.
            BrokerUnavailable: The server cannot be reached; some of the jobs may have been enqueued.
        """
        due = _due(at, delay)
        common = _common(class_name, queue, retry, attributes)
        calls = [_arguments(f"args[{n}]", each) for n, each in enumerate(several("args", args))]
        jids: list[str] = []
        for part in batches(calls):
            jobs = [self._job(common, each) for each in part]
            if due is None:
                self._push(queue, jobs)
            else:
                self._schedule(due, jobs)
            jids += [job["jid"] for job in jobs]
        return jids

    def close(self) -> None:
        """End the connections; closing again does nothing."""
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _now(self) -> float | int:
        return int(time.time() * 1000) if self._milliseconds else time.time()

    def _job(self, common: dict[str, Any], args: list[Any]) -> dict[str, Any]:
        return {**common, "args": args, "jid": secrets.token_hex(12), "created_at": self._now()}

    def _push(self, queue: str, jobs: list[dict[str, Any]]) -> None:
        now = self._now()
        texts = [_json({**job, "enqueued_at": now}) for job in jobs]
        commands = [("SADD", self._key("queues"), queue), ("LPUSH", self._key(f"queue:{queue}"), *texts)]
        self._link.transaction(commands)

    def _schedule(self, due: float, jobs: list[dict[str, Any]]) -> None:
        pairs = [part for job in jobs for part in (repr(due), _json(job))]
        self._link.command("ZADD", self._key("schedule"), *pairs, is_repeatable=True)


def _scheme_checked(url: str) -> str:
    if not isinstance(url, str):
        raise ConfigTypeError(f"url must be a str, not {shown(url)} of type {type(url).__name__}")
    scheme = url.partition("://")[0]
    if scheme not in {"redis", "rediss"}:
        raise ConfigError(f"url must begin with redis:// or rediss:// for Sidekiq, not {scheme!r}")
    return url


def _common(class_name: str, queue: str, retry: bool | int, attributes: dict[str, Any]) -> dict[str, Any]:
    if not _CLASS.fullmatch(_text("class_name", class_name)):
        raise ConfigError(
            f'class_name must be that of a Ruby class, as in "Mail::Sender", not {class_name!r}'
        )
    if not isinstance(retry, bool):
        retry = whole_number("retry", retry, at_least=0, at_most=2**31)
    for name in attributes.keys() & _OWN:
        raise ConfigError(f"{name!r} cannot be given as an attribute of a job: it is set by its own argument")
    return {
        "retry": retry,
        "queue": _text("queue", queue),
        **{text("the name of an attribute", name): _plain(name, value) for name, value in attributes.items()},
        "class": class_name,
    }


def _due(at: float | None, delay: float | None) -> float | None:
    """Return the due time, or None for a job that is due now: Sidekiq, too, puts such a one into its queue."""
    if at is not None and delay is not None:
        raise ConfigError("at and delay cannot both be given")
    now = time.time()
    if delay is not None:
        due = now + seconds("delay", delay, zero=True)
    else:
        due = now if at is None else seconds("at", at, zero=True)
    return due if due > now else None


def _text(option: str, value: Any) -> str:
    if not text(option, value):
        raise ConfigError(f"{option} must not be empty")
    return str(value)


def _arguments(option: str, value: Any) -> Any:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ConfigTypeError(
            f"{option} must be a list of arguments, not {shown(value)} of type {type(value).__name__}"
        )
    return _plain(option, list(value))


def _plain(option: str, value: Any) -> Any:
    try:
        return _native(option, value)
    except RecursionError:
        raise ConfigError(f"{option} is nested too deeply, or holds itself") from None


def _native(where: str, value: Any) -> Any:
    """Return a value that JSON has, tuples as lists; refuse what json would turn into something else."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text(where, value)
    if isinstance(value, int):
        return _whole(where, value)
    if isinstance(value, float):
        if value - value != 0:
            raise ConfigError(f"{where} is {value!r}, which JSON does not have")
        return value
    if isinstance(value, list | tuple):
        return [_native(f"{where}[{n}]", each) for n, each in enumerate(value)]
    if isinstance(value, dict):
        return {_key(where, key): _native(f"{where}[{key!r}]", each) for key, each in value.items()}
    raise ConfigTypeError(
        f"{where} is {shown(value)} of type {type(value).__name__}, which JSON does not have"
    )


def _whole(where: str, value: int) -> int:
    if value.bit_length() > _MOST_BITS:
        raise ConfigError(f"{where} is a number of {value.bit_length()} bits; {_MOST_BITS} are taken")
    return value


def _key(where: str, key: Any) -> str:
    if not isinstance(key, str):
        raise ConfigTypeError(f"{where} has the key {shown(key)}, and JSON has only text for keys")
    return text(f"a key of {where}", key)


def _json(job: dict[str, Any]) -> str:
    return json.dumps(job, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
