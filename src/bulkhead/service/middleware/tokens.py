"""How many may start now: the decisions of a rate limit. Pure: no clock, no registry.

The generic cell rate algorithm: all that is kept is one instant, `free_at`, when the bucket will be full again. Each
start moves it by `interval`; a start is allowed while it is less than `burst` intervals ahead.

What is reserved but has not started (the jobs are still to be claimed) counts against what is free, but moves nothing:
only the start does. So a reservation that was held for long is worth no more than the room there is when it is used,
and no window of time can see the starts of two. A reservation that nobody uses ends by itself.

Source: ITU-T I.371, the virtual scheduling algorithm.
"""

from __future__ import annotations

import math

import msgspec

__all__ = ["Bucket", "Rate", "reserved", "started"]

# A reservation ends after so long (seconds): well above the time that a claim takes.
_HELD = 5.0

# The clocks of consumers may differ by so much (seconds).
_AHEAD = 3600.0

# Sums of floats may miss a whole number by so much.
_EPSILON = 1e-6


class Rate(msgspec.Struct, frozen=True):
    """How many may start.

    Attributes:
        interval: Seconds between two starts in the long run.
        burst: How many may start at once after a pause.
    """

    interval: float
    burst: int


class Bucket(msgspec.Struct, array_like=True, frozen=True):
    """What is known of a key. Times are POSIX seconds.

    Attributes:
        free_at: When it will be full.
        held: Reservations by name: how many, and when they end.
    """

    free_at: float = 0.0
    held: dict[str, tuple[int, float]] = {}


def reserved(bucket: Bucket, rate: Rate, mark: str, n: int, now: float) -> tuple[Bucket | None, int, float]:
    """Reserve up to `n` starts under the name `mark`.

    Returns:
        What is known then, or None if nothing has changed; how many; and where there is none, the seconds until one
        may be free.
    """
    bucket = _sane(bucket, rate, now)
    held = _living(bucket, now)
    n_free = _room(bucket, rate, now) - sum(count for count, _ in held.values())
    granted = max(0, min(n, n_free))
    if not granted:
        return None, 0, max(0.0, bucket.free_at + rate.interval - rate.burst * rate.interval - now)
    return Bucket(bucket.free_at, {**held, mark: (granted, now + _HELD)}), granted, 0.0


def started(bucket: Bucket, rate: Rate, mark: str | None, n: int, now: float) -> tuple[Bucket, int, float]:
    """Let `n` jobs start, on the reservation `mark` if it still holds; the rest of it is given up.

    Returns:
        What is known then; how many may start; and the seconds until the next one after them may.
    """
    bucket = _sane(bucket, rate, now)
    held = _living(bucket, now)
    if mark is not None:
        held.pop(mark, None)
    n_free = _room(bucket, rate, now) - sum(count for count, _ in held.values())
    granted = max(0, min(n, n_free))
    free_at = max(bucket.free_at, now) + granted * rate.interval if granted else bucket.free_at
    wait = max(0.0, free_at + rate.interval - rate.burst * rate.interval - now)
    return Bucket(free_at, held), granted, wait


def _sane(bucket: Bucket, rate: Rate, now: float) -> Bucket:
    """Return what is known, or nothing if it is what no clock of ours has written: it must not stop all for ever."""
    latest = now + (rate.burst + 1) * rate.interval + _AHEAD
    return bucket if 0 <= bucket.free_at <= latest else Bucket(0.0, bucket.held)


def _living(bucket: Bucket, now: float) -> dict[str, tuple[int, float]]:
    # Why an upper bound, too: a machine whose clock is ahead must not hold something for as long as it is.
    return {mark: one for mark, one in bucket.held.items() if now < one[1] < now + 2 * _HELD}


def _room(bucket: Bucket, rate: Rate, now: float) -> int:
    ahead = max(bucket.free_at - now, 0.0)
    return math.floor(rate.burst - ahead / rate.interval + _EPSILON)
