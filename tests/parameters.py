"""Names of parameters that are the same in every process, as running tests in parallel needs them."""

from __future__ import annotations

import re

__all__ = ["named"]


def named(value: object) -> str:
    """Return the value's repr without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
