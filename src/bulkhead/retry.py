"""When a failed attempt is tried again, and after how long."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from bulkhead import validate
from bulkhead.errors import ConfigError, ConfigTypeError, Unrecoverable, is_of

__all__ = ["Backoff", "RetryPolicy"]


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses between attempts: exponential, with jitter.

    Args:
        initial: Seconds before the second attempt, at least 0.
        factor: The pause grows by this from attempt to attempt; at least 1.
        jitter: Each pause is drawn evenly from ± this share of it, 0 to 1.
        maximum: Longest pause in seconds.

    Source: the defaults are those of taylorchu/work and Bifrost's kin; backoff with jitter as in AWS' "Exponential
    Backoff And Jitter" (Brooker, 2015).
    """

    _: KW_ONLY
    initial: float = 1.0
    factor: float = 1.6
    jitter: float = 0.2
    maximum: float = 3600.0

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "initial", validate.seconds("initial", self.initial, zero=True))
        put(self, "factor", validate.seconds("factor", self.factor))
        put(self, "jitter", validate.seconds("jitter", self.jitter, zero=True))
        put(self, "maximum", validate.seconds("maximum", self.maximum, zero=True))
        if self.factor < 1:
            raise ConfigError(f"factor must be at least 1, not {self.factor}")
        if self.jitter > 1:
            raise ConfigError(f"jitter must be at most 1, not {self.jitter}")

    def pause(self, attempt: int, draw: float) -> float:
        """Return the seconds between a failed attempt and the next.

        Args:
            attempt: The attempt that failed, from 1.
            draw: A number from [0, 1) that picks the place within the jitter.
        """
        try:
            pause = min(self.initial * self.factor ** (attempt - 1), self.maximum)
        except OverflowError:
            pause = self.maximum if self.initial else 0.0
        return min(pause * (1 + self.jitter * (2 * draw - 1)), self.maximum)


@dataclass(frozen=True, slots=True)
class RetryPolicy(Backoff):
    """Try a failed job again, with exponential backoff and jitter; its slot is free meanwhile.

    Args:
        max_attempts: Runs in all, the first included; at least 1.
        initial, factor, jitter, maximum: See `Backoff`.
        retry_on: Exception types worth another attempt, matched as `except` does it. A crash is a `WorkerCrashed`, a
            timeout a `JobTimeout`: name the types to retry some kinds of failure and not others. `Unrecoverable` is
            never retried.

    Example:
        >>> RetryPolicy(3, initial=1.0, jitter=0.0).pause(attempt=2, draw=0.5)
        1.6
    """

    max_attempts: int
    _: KW_ONLY
    retry_on: tuple[type[BaseException], ...] = (Exception,)

    def __post_init__(self) -> None:
        # Why not super(): a dataclass with slots is another class than the one that super() would look in.
        Backoff.__post_init__(self)
        put = object.__setattr__
        put(self, "max_attempts", validate.whole_number("max_attempts", self.max_attempts, at_least=1))
        put(self, "retry_on", _exception_types(self.retry_on))

    def allows(self, attempt: int, error: BaseException) -> bool:
        """Tell whether another attempt may follow `attempt`, which failed with `error`."""
        return (
            attempt < self.max_attempts and not is_of(error, Unrecoverable) and is_of(error, *self.retry_on)
        )


def _exception_types(value: object) -> tuple[type[BaseException], ...]:
    types = value if isinstance(value, tuple) else (value,)
    for one in types:
        if not (isinstance(one, type) and issubclass(one, BaseException)):
            raise ConfigTypeError(f"retry_on must be exception types, not {one!r}")
    return types
