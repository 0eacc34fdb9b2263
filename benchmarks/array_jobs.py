"""What the benchmarks of large arrays run in workers, and in the caller.

Each array is filled with ones, so that what was read tells whether it arrived.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["LOOKS", "Look", "full", "give", "give_back", "look_at", "look_at_every_page", "look_at_one"]

Look = Callable[["Array"], int]

_given: dict[int, Array] = {}


def look_at_one(array: Array) -> int:
    """Read one element: what is shared and not read costs nothing here."""
    return int(array[0])


def look_at_every_page(array: Array) -> int:
    """Read one element of each page, so that whoever put off mapping a page has to do it now."""
    return int(array[:: mmap.PAGESIZE].sum())


LOOKS: dict[str, Look] = {"one element read": look_at_one, "every page read": look_at_every_page}


def full(size: int) -> Array:
    """Return a new array of `size` bytes whose pages are there."""
    import numpy as np

    return np.ones(size, np.uint8)


def look_at(look: Look, array: Array) -> int:
    return look(array)


def give(size: int) -> Array:
    """Return an array that this worker has made before, so that only the way back is measured."""
    if size not in _given:
        _given[size] = full(size)
    return _given[size]


def give_back(look: Look, array: Array) -> Array:
    look(array)
    return array
