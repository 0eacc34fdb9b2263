"""What a task may ask about the job that it runs: `current_job()`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any, Protocol

from bulkhead.errors import (
    BrokerUnavailable,
    BulkheadError,
    ConfigError,
    ConfigTypeError,
    JobCancelled,
    Unrecoverable,
)
from bulkhead.service.envelope import Envelope, decoded, encoded
from bulkhead.validate import shown

__all__ = ["JobContext", "current_job", "running"]

# Seconds between two reports of progress that are sent, and between two looks whether the job is cancelled.
_REPORT_EVERY = 0.2
_LOOK_EVERY = 0.2

# Of a message about progress (arbitrary): it is sent anew each time.
_MESSAGE_CHARACTERS = 1000


class Line(Protocol):
    """The way from a job to the consumer that gave it out; see link.py."""

    def save(self, job_id: str, value: bytes) -> None: ...
    def report(self, job_id: str, progress: bytes) -> None: ...
    def is_cancelled(self, job_id: str) -> bool: ...


class JobContext:
    """The job that the calling task runs. Owner: the thread that runs the task.

    Attributes:
        id, queue, task: Which job it is.
        attempt: Number of this run, from 1.
        enqueued_at: When the job was enqueued, POSIX seconds by the broker's clock.
        headers: What middlewares have put in when it was enqueued.
    """

    def __init__(
        self, line: Line | None, job_id: str, queue: str, attempt: int, enqueued_at: float, envelope: Envelope
    ) -> None:
        self._line = line
        self._envelope = envelope
        self.id = job_id
        self.queue = queue
        self.task = envelope.task
        self.attempt = attempt
        self.enqueued_at = enqueued_at
        self._began = time.monotonic()
        self._last_report = self._last_look = float("-inf")
        self._is_cancelled = False
        self.saved: bytes | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        """What middlewares have put in when the job was enqueued."""
        return self._envelope.headers

    @property
    def max_retries(self) -> int:
        """How many attempts may follow the first."""
        return self._envelope.max_retries

    @property
    def seconds_left(self) -> float | None:
        """Seconds until this attempt's timeout, or None without one."""
        if self._envelope.timeout is None:
            return None
        return self._began + self._envelope.timeout - time.monotonic()

    @property
    def has_previous(self) -> bool:
        """Tell whether another job's end has made this one follow."""
        return self._envelope.previous is not None

    @property
    def previous(self) -> Any:
        """What the job that this one follows has returned; of one that has failed, its type, message and traceback.

        Raises:
            BulkheadError: It follows none; see `has_previous`.
        """
        if self._envelope.previous is None:
            raise BulkheadError(f"job {self.id} follows no other job")
        return decoded(self._envelope.codec, self._envelope.previous)

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Return the task's arguments, with what the job before has left in front.

        Raises:
            Unrecoverable: They cannot be decoded.
        """
        envelope = self._envelope
        try:
            args, kwargs = decoded(envelope.codec, envelope.payload)
            args = [*args] if not envelope.takes else [self.previous, *args]
        except Exception as error:
            raise Unrecoverable(f"the arguments of job {self.id} cannot be decoded: {error}") from error
        return args, kwargs

    def save(self, value: Any) -> None:
        """Keep this as the job's result, now; what the task returns replaces it, unless that is None.

        Raises:
            TypeError: The application's codec cannot encode it.
            BrokerUnavailable, MessageTooLarge: It could not be kept.
            BulkheadError: The job's lease is lost: it runs elsewhere, and what is saved here would be too late.
        """
        data = encoded(self._envelope.codec, value)
        if self._line is not None:
            self._line.save(self.id, data)
        self.saved = data

    def progress(self, done: float, total: float | None = None, message: str = "") -> None:
        """Tell how far the job is; who asks for the job sees it within about a second.

        Cheap to call often: one report in 0.2 s is sent, and the last of them when `done` reaches `total`.

        Args:
            done: How much is done.
            total: Of how much.
            message: Up to 1000 characters are shown.

        Raises:
            ConfigError: A number is negative or not finite, or something else is none, or no text.
        """
        done, total = _amount("done", done), None if total is None else _amount("total", total)
        if not isinstance(message, str):
            raise ConfigTypeError(f"message must be a str, not {shown(message)}")
        now = time.monotonic()
        if now - self._last_report < _REPORT_EVERY and done != total:
            return
        self._last_report = now
        if self._line is not None:
            with contextlib.suppress(BrokerUnavailable):  # it is for who looks, and no reason to fail
                self._line.report(self.id, encoded("msgpack", (done, total, _clean(message))))

    @property
    def is_cancelled(self) -> bool:
        """Tell whether somebody has asked for the job to be cancelled. About a second late.

        A job that asks has five seconds to end by itself before its process is ended; one that never asks has none.
        """
        now = time.monotonic()
        if not self._is_cancelled and self._line is not None and now - self._last_look >= _LOOK_EVERY:
            self._last_look = now
            with contextlib.suppress(BulkheadError):  # nobody knows: it goes on
                self._is_cancelled = self._line.is_cancelled(self.id)
        return self._is_cancelled

    def raise_if_cancelled(self) -> None:
        """Raise JobCancelled if somebody has asked for the job to be cancelled."""
        if self.is_cancelled:
            raise JobCancelled(f"job {self.id} was cancelled")


def _amount(option: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigTypeError(f"{option} must be a number, not {shown(value)}") from None
    if not 0 <= number < float("inf"):
        raise ConfigError(f"{option} must be finite and at least 0, not {value!r}")
    return value if type(value) is int and value < 2**63 else number


def _clean(message: str) -> str:
    return message[:_MESSAGE_CHARACTERS].encode("utf-8", "replace").decode()


running: JobContext | None = None
"""Owner: the thread of the worker process that runs jobs; it runs one at a time."""


def current_job() -> JobContext:
    """Return the job that the calling task runs.

    Raises:
        BulkheadError: No job of a queue runs in this process: the function was called directly.
    """
    if running is None:
        raise BulkheadError("current_job() was called where no job of a queue runs")
    return running
