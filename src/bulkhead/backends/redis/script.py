"""The Lua scripts, one for each step: no other client sees half of it, and whoever dies leaves nothing half done."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Script", "script"]

_FOLDER = Path(__file__).parent / "scripts"


@dataclass(frozen=True, slots=True)
class Script:
    """A script's text, and the name under which a server keeps it."""

    text: bytes
    sha: str


@cache
def script(name: str, *before: str) -> Script:
    """Return the script of a file, behind what all scripts have in common and what the files `before` hold."""
    parts = [(_FOLDER / f"{part}.lua").read_bytes() for part in ("common", *before, name)]
    text = b"\n".join(parts)
    return Script(text, hashlib.sha1(text, usedforsecurity=False).hexdigest())
