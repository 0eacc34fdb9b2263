"""Which segments this process has: in tests that fill and map them without another process."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from data_jobs import segments_of

__all__ = ["entered_as_huge", "kept_segments", "need_huge_pages", "start_counting"]

_before: set[int] = set()


def start_counting() -> None:
    """Do not count the segments that are there now: a test before, if it failed, may have left them."""
    _before.clear()
    _before.update(kept_segments())


def kept_segments() -> set[int]:
    """Return the segments that this process has open or mapped."""
    return set(segments_of(os.getpid())) - _before


def need_huge_pages() -> None:
    """Skip a test where the system gives segments none; that is a failure where everything has to be there (CI)."""
    folder = Path("/sys/kernel/mm/transparent_hugepage")
    release = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
    is_new = sys.platform == "linux" and release >= (6, 1)
    if not is_new or not folder.is_dir() or "[deny]" in (folder / "shmem_enabled").read_text():
        reason = "the system gives segments no huge pages (Linux 6.1 and later do)"
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)


def entered_as_huge(segment: int) -> dict[str, int]:
    """Return how much of a segment this process has entered as huge pages (bytes), by the access of each mapping."""
    found: dict[str, int] = {}
    access = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            access = words[1] if words[4] == str(segment) else None
        elif access is not None and words[0] in ("ShmemPmdMapped:", "FilePmdMapped:"):
            found[access] = found.get(access, 0) + int(words[1]) * 1024
    return found
