"""What follows the "?" of a backend's URL: each option known, given once, and checked by its reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from bulkhead.errors import ConfigError

__all__ = ["Reader", "existing_file", "one_of", "read_options", "seconds"]

# Gets the option's name and text, and returns its value or raises a ConfigError that names it.
Reader = Callable[[str, str], Any]


def read_options(query: str, readers: Mapping[str, Reader]) -> dict[str, Any]:
    """Return the options that a URL gives, by name.

    Raises:
        ConfigError: One is unknown, given twice, or has a bad value.
    """
    given: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in readers:
            raise ConfigError(f"url has the option {name!r}, which is unknown; known: {', '.join(readers)}")
        if name in given:
            raise ConfigError(f"url has the option {name!r} twice")
        given[name] = readers[name](name, text)
    return given


def seconds(low: float, high: float) -> Reader:
    """Return the reader of a number of seconds within these bounds."""

    def read(name: str, text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not low <= number <= high:
            raise ConfigError(f"option {name} of the url must be {low:g} to {high:g} seconds, not {text!r}")
        return number

    return read


def one_of(*texts: str) -> Reader:
    """Return the reader of one of these texts, in small letters or others."""

    def read(name: str, text: str) -> str:
        if text.lower() not in texts:
            raise ConfigError(f"option {name} of the url must be {' or '.join(texts)}, not {text!r}")
        return text.lower()

    return read


def existing_file(name: str, text: str) -> str:
    """Return the path of a file that is there."""
    if not Path(text).is_file():
        raise ConfigError(f"option {name} of the url must name a file, and there is none at {text!r}")
    return text
