"""When a schedule is due: a text of five cron fields, a nickname such as @daily, or "@every 1h30m". Pure: no clock.

What becomes of a clock change is cron's own rule, which cronsim follows: a fixed time that a day does not have comes
when the gap ends, and one that it has twice comes the first time; where the minute or the hour begins with "*" the
schedule goes by real time, so it comes as often as its minutes do.

Instants are POSIX milliseconds.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timezone, tzinfo
from typing import Literal
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from bulkhead.errors import ConfigError, ConfigTypeError

__all__ = ["MISSED", "MOST_RUNS", "Decision", "Missed", "Timing", "decide", "timing", "zone_name"]

Missed = Literal["skip", "once", "all"]
MISSED = ("skip", "once", "all")

# Later than this (milliseconds), a run that is to be skipped when it was missed is. Short of a minute, so that a
# schedule of each minute never has two runs at once; long enough for a worker that is restarted.
_LATE = 30_000

# So many missed runs are caught up with at most: one call of the broker.
MOST_RUNS = 1000

_NICKNAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}

_EVERY = re.compile(r"(?:(\d{1,6})d)?(?:(\d{1,8})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", re.ASCII)
_UNITS = (86_400_000, 3_600_000, 60_000, 1_000)

# Where a search backwards begins, and what it is multiplied with while it has not found enough.
_FIRST_WINDOW = 60_000
_WIDER = 4


class Timing(ABC):
    """The instants at which something is due, each later than the one before, without end."""

    @abstractmethod
    def after(self, instant: int) -> int:
        """Return the first that is later than `instant`."""

    @abstractmethod
    def last(self, n: int, first: int, now: int) -> list[int]:
        """Return the last `n`, at least 1, of those from `first` to `now`, in order. `first` is one of them."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be enqueued now, in order, and when there will be more."""

    runs: tuple[int, ...]
    next_due: int


def decide(timing: Timing, next_due: int, missed: Missed, now: int) -> Decision:
    """Return what a schedule's definition makes of the moment.

    A run is missed when the one after it is due, too, or when it is more than 30 seconds late. Of missed runs "skip"
    enqueues none, "once" the last one unless a later run is enqueued anyhow, "all" each of them, but no more than the
    last 1000.

    Args:
        timing: When it is due.
        next_due: The first run that nobody has seen to.
        missed: The policy.
        now: This moment.
    """
    if now < next_due:
        return Decision((), next_due)
    runs = timing.last(MOST_RUNS if missed == "all" else 1, next_due, now)
    if missed == "skip" and now - runs[-1] > _LATE:
        runs = []
    return Decision(tuple(runs), timing.after(now))


def timing(when: str, tz: str = "UTC", anchor: int = 0) -> Timing:
    """Return when a text says.

    Args:
        when: Five cron fields, a nickname, or "@every" and a duration in days, hours, minutes and seconds.
        tz: Name of the time zone in which cron fields are meant.
        anchor: From when "@every" counts.

    Raises:
        ConfigError: The text or the zone means nothing, or the text no instant within 50 years.
    """
    zone = _zone(tz)
    if not isinstance(when, str):
        raise ConfigTypeError(f"when must be a str such as '*/5 * * * *' or '@every 10s', not {when!r}")
    text = " ".join(when.split())
    if text.lower().startswith("@every"):
        return _Every(_period(when, text[len("@every") :].replace(" ", "").lower()), anchor)
    if text.startswith("@"):
        if text.lower() not in _NICKNAMES:
            known = ", ".join(_NICKNAMES)
            raise ConfigError(f"when must be one of {known}, '@every 10s' or five cron fields, not {when!r}")
        text = _NICKNAMES[text.lower()]
    if len(text.split(" ")) != 5:
        raise ConfigError(
            f"when must be five cron fields, a nickname such as @daily or '@every 10s', not {when!r}"
        )
    made = _Cron(when, text, zone)
    made.after(anchor)
    return made


def zone_name(tz: object) -> str:
    """Return the name of a time zone, checked.

    Raises:
        ConfigError: There is no such zone, or it has no name that another process would know.
    """
    if isinstance(tz, ZoneInfo):
        if tz.key is None:
            raise ConfigError(
                "tz must have a name that other processes know; this ZoneInfo was made from a file"
            )
        tz = tz.key
    elif isinstance(tz, timezone):
        if tz is not UTC:
            raise ConfigError(f"tz must be the name of a time zone or a ZoneInfo, not {tz!r}")
        tz = "UTC"
    if not isinstance(tz, str):
        raise ConfigTypeError(f"tz must be the name of a time zone or a ZoneInfo, not {tz!r}")
    _zone(tz)
    return tz


class _Every(Timing):
    """Whole multiples of a period after an instant."""

    def __init__(self, period: int, anchor: int) -> None:
        self._period = period
        self._anchor = anchor

    def after(self, instant: int) -> int:
        """See `Timing`. The first is a period after the anchor."""
        n = (instant - self._anchor) // self._period + 1
        return self._anchor + max(n, 1) * self._period

    def last(self, n: int, first: int, now: int) -> list[int]:
        """See `Timing`."""
        latest = self.after(now) - self._period
        earliest = max(first, latest - (n - 1) * self._period)
        return list(range(earliest, latest + 1, self._period)) or [first]


class _Cron(Timing):
    """Five cron fields in a time zone."""

    def __init__(self, when: str, fields: str, zone: tzinfo) -> None:
        self._when = when
        self._fields = fields
        self._zone = zone

    def after(self, instant: int) -> int:
        """See `Timing`."""
        return next(self._from(instant))

    def last(self, n: int, first: int, now: int) -> list[int]:
        """See `Timing`. Searched backwards: in a year there are half a million minutes."""
        window = _FIRST_WINDOW
        while True:
            start = max(first - 1, now - window)
            found = []
            for due in self._from(start):
                if due > now:
                    break
                found.append(due)
            if len(found) >= n or start < first:
                return found[-n:] or [first]
            window *= _WIDER

    def _from(self, instant: int) -> Iterator[int]:
        """Yield what is due later than `instant`."""
        last = instant
        try:
            for due in CronSim(self._fields, datetime.fromtimestamp(instant / 1000, self._zone)):
                at = round(due.timestamp() * 1000)
                # Why: it goes by the local time, and begins with the first of two hours when this is the second.
                if at > last:
                    last = at
                    yield at
        except (CronSimError, ValueError, AssertionError, OverflowError) as error:
            raise ConfigError(
                f"when is not five cron fields, a nickname or @every: {self._when!r}: {error}"
            ) from None
        raise ConfigError(f"when must come at some time within 50 years, and {self._when!r} does not")


def _period(when: str, text: str) -> int:
    found = _EVERY.fullmatch(text)
    numbers = [int(part or 0) for part in found.groups()] if found else []
    period = sum(number * unit for number, unit in zip(numbers, _UNITS, strict=False))
    if not 1_000 <= period <= 366 * 86_400_000:
        raise ConfigError(
            f"when must be '@every' and a duration from 1s to 366d, such as 10s, 5m or 1h30m, not {when!r}"
        )
    return period


def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError) as error:
        raise ConfigError(
            f"tz must be the name of a time zone such as 'Europe/Berlin', not {name!r}: {error}; where the "
            "system has no time zones, install the package tzdata"
        ) from None
