"""Checks of option values: each returns the value in its plain form or raises a ConfigError that names the option."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from bulkhead.errors import ConfigError, ConfigTypeError

__all__ = ["function", "seconds", "several", "shown", "text", "whole_number"]


def whole_number(option: str, value: Any, *, at_least: int | None = None, at_most: int | None = None) -> int:
    """Return `value` as an int; anything with `__index__` will do (NumPy integers), a bool will not."""
    if isinstance(value, bool):
        raise ConfigTypeError(f"{option} must be a whole number, not {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise ConfigTypeError(
            f"{option} must be a whole number, not {value!r} of type {type(value).__name__}"
        ) from None
    if at_least is not None and number < at_least:
        raise ConfigError(f"{option} must be at least {at_least}, not {shown(number)}")
    if at_most is not None and number > at_most:
        raise ConfigError(f"{option} must be at most {at_most}, not {shown(number)}")
    return number


def seconds(option: str, value: Any, *, zero: bool = False) -> float:
    """Return `value` as a finite number of seconds above 0 (or at least 0 with `zero`)."""
    if isinstance(value, (bool, str, bytes)):
        raise ConfigTypeError(f"{option} must be a number of seconds, not {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigTypeError(
            f"{option} must be a number of seconds, not {value!r} of type {type(value).__name__}"
        ) from None
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        bound = "at least 0" if zero else "above 0"
        raise ConfigError(f"{option} must be a finite number of seconds {bound}, not {value!r}")
    return number


def several(option: str, value: Any) -> list[Any]:
    """Return the items of an iterable; a text, bytes or a mapping is none of ours."""
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, bytearray, Mapping)):
        raise ConfigTypeError(
            f"{option} must be an iterable such as a list, not {shown(value)} of type {type(value).__name__}"
        )
    return list(value)


def text(option: str, value: Any) -> str:
    """Return `value` if it is a str that can be written in UTF-8."""
    if not isinstance(value, str):
        raise ConfigTypeError(f"{option} must be a str, not {shown(value)} of type {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{option} must be text that can be written in UTF-8, not {value!r}") from None
    return value


def function(option: str, value: Any) -> Any:
    """Return `value` if it can be called."""
    if not callable(value):
        raise ConfigTypeError(f"{option} must be callable, not {value!r} of type {type(value).__name__}")
    return value


def shown(value: object) -> str:
    """Return the `repr` of a value of the user's for a message, or its type where there is none: never raises."""
    try:
        return repr(value)
    except Exception:  # a class of the user's; an int of more digits than are turned into text
        return f"<{type(value).__qualname__}>"
