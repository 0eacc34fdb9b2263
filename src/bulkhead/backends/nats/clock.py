"""The server's time, as the server itself has stamped it.

NATS has no question for the time; but each message that a stream keeps has the instant at which the server took it.
So a message is published to a subject that keeps one, and read back: the stamp lies between the publishing and the
answer, which bounds the error by half the way there and back (0.1 ms in one machine, some ms elsewhere). What lies
between two measurements is counted by this machine's clock of elapsed time, which also runs while it is suspended.

So the wall clock of a client means nothing; what differs between two clients is half a round trip and the drift of
their clocks within 30 seconds.
"""

from __future__ import annotations

import time
from datetime import datetime

from bulkhead.backends.nats.session import Session
from bulkhead.errors import BrokerUnavailable

__all__ = ["Clock", "instant_of"]

# Seconds after which the clock is measured again: a drift of 100 ppm makes 3 ms of it.
_FRESH = 30.0
# Measurements of which the one with the shortest way counts.
_SAMPLES = 3
_ELAPSED = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock:
    """Says what time it is on the server."""

    def __init__(self, session: Session, stream: str, subject: str) -> None:
        self._session = session
        self._stream = stream
        self._subject = subject
        self._offset = 0.0
        self._measured = -_FRESH
        self._epoch = -1

    def now(self) -> float:
        """Return POSIX seconds by the server's clock, as last measured."""
        return time.clock_gettime(_ELAPSED) + self._offset

    async def keep_right(self) -> None:
        """Measure again when the last time is long ago, or the server may be another one."""
        elapsed = time.clock_gettime(_ELAPSED)
        if elapsed - self._measured < _FRESH and self._epoch == self._session.epoch:
            return
        self._epoch = self._session.epoch
        samples = [await self._sample() for _ in range(_SAMPLES)]
        self._offset = min(samples)[1]
        self._measured = elapsed

    async def _sample(self) -> tuple[float, float]:
        """Return how uncertain a measurement is, and the offset."""
        before = time.clock_gettime(_ELAPSED)
        _, answer = await self._session.ask(
            [
                (self._subject, b"", None),
                (
                    f"$JS.API.STREAM.MSG.GET.{self._stream}",
                    b'{"last_by_subj":"%b"}' % self._subject.encode(),
                    None,
                ),
            ]
        )
        after = time.clock_gettime(_ELAPSED)
        if "message" not in answer:
            raise BrokerUnavailable(f"the NATS server does not keep what is published: {answer.get('error')}")
        return after - before, instant_of(answer["message"]["time"]) - (before + after) / 2


def instant_of(stamp: str) -> float:
    """Return POSIX seconds for a time as the server writes it: RFC 3339 with up to nine digits, in UTC."""
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")
