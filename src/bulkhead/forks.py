"""Forks of this process, as far as Python makes them: what a parent and its copy must not both do.

Attributes:
    made: Grows with each fork of this process, before it and after it: what was done when it had another value than now
        was done before or during a fork.
    depth: How many forks lie between the interpreter's start and this process. Who remembers it finds out whether it is
        a copy of itself without a system call.
"""

from __future__ import annotations

import os

__all__ = ["depth", "made"]

made = 0
depth = 0


def _before() -> None:
    global made
    made += 1


def _in_parent() -> None:
    # Race: another thread may have looked at the count after `_before`, and the fork was still to come.
    global made
    made += 1


def _in_child() -> None:
    global depth
    depth += 1


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
