"""What comes through a pool's pipes and its launcher's socket: answers, and other news.

All of this is read by who drives, before it takes the pool's lock. Answers go to the kernel (`answers.tell`), before
the news that were read together with them; news go to `Staff.hear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bulkhead.engines.processes.answers import Answer, decoded, recorded
from bulkhead.engines.processes.launcher import Says
from bulkhead.engines.processes.launcher_link import LauncherLink
from bulkhead.engines.processes.worker import Worker

__all__ = ["Garbled", "HungUp", "LauncherLost", "News", "Said", "Writable", "read_launcher", "read_worker"]


class Said(NamedTuple):
    """A message of the launcher; see `launcher.Says`."""

    kind: int
    number: int  # of the worker
    body: Any


class LauncherLost(NamedTuple):
    """The launcher has died."""

    link: LauncherLink


class Garbled(NamedTuple):
    """What is in a worker's result pipe is no answer."""

    worker: Worker
    why: str


class HungUp(NamedTuple):
    """A worker's result pipe is at its end."""

    worker: Worker


class Writable(NamedTuple):
    """A job pipe that was full takes more."""

    fd: int


News = Said | LauncherLost | Garbled | HungUp | Writable


def read_worker(worker: Worker, answers: list[Answer], news: list[News]) -> None:
    """Read what has come from a worker."""
    try:
        frames = worker.reader.read()
    except (MemoryError, OSError) as error:
        news.append(Garbled(worker, repr(error)))
        return
    for kind, number, body in frames:
        answers.append(decoded(worker, kind, number, body))
    if worker.reader.is_garbled:
        news.append(Garbled(worker, "something else was written into its pipe"))
    if worker.reader.is_at_end:
        news.append(HungUp(worker))


def read_launcher(
    link: LauncherLink, workers: Mapping[int, Worker], answers: list[Answer], news: list[News]
) -> None:
    """Read what has come from the launcher, and the last words of each worker that it reports gone.

    Args:
        link: To the launcher.
        workers: By number.
        answers: Gets what workers have answered.
        news: Gets the rest.
    """
    for kind, number, body in link.read():
        if kind == Says.GONE:
            _read_last_words(workers.get(number), answers)
        news.append(Said(kind, number, body))
    if link.reader.is_at_end:
        news.append(LauncherLost(link))


def _read_last_words(worker: Worker | None, answers: list[Answer]) -> None:
    """Drain the result pipe of a worker that is gone: an answer it gave before counts."""
    if worker is None:
        return
    try:
        frames = worker.reader.read_rest()
    except (MemoryError, OSError):
        frames = []
    for kind, message, body in frames:
        answers.append(decoded(worker, kind, message, body))
    answers += recorded(worker)
