"""Writing a file so that whoever opens it finds the old text or the new one, and each of them whole.

The text goes into a new file beside it, which then takes its name in one step. What is no file (a pipe, a terminal) is
written as it is.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write or replace a file; a link is followed, and a file that is replaced hands its mode on.

    Raises:
        OSError: It cannot be written; what was there is still there.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    beside = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        if target.exists():
            beside.chmod(target.stat().st_mode & 0o7777)
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
