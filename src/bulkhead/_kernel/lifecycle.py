"""The states of a job and the only table of how it may move between them.

Not responsible for when a move happens: that is the scheduler's. Guarantee: no job leaves a settled state, because no
event has a row that starts there, and every other state has a way to each settled one.

Source: the table form follows h11's `_state.py`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NoReturn

__all__ = [
    "ACCEPT",
    "CANCEL",
    "DUE",
    "FAIL",
    "RETRY",
    "RETURN",
    "SCHEDULE",
    "SETTLED",
    "START",
    "SUCCEED",
    "JobState",
]


class JobState(StrEnum):
    """Where a job is on its way; the values are the lower-case names."""

    SCHEDULED = "scheduled"
    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    # Why: Enum hashes in Python, and the states are dictionary keys on the way of every job.
    __hash__ = str.__hash__


SETTLED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


class Event(dict["JobState | None", JobState]):
    """One event's rows of the table: from which state to which. None is a job that is not accepted yet."""

    def __init__(self, name: str, rows: dict[JobState | None, JobState]) -> None:
        super().__init__(rows)
        self.name = name

    def __missing__(self, state: JobState | None) -> NoReturn:
        raise AssertionError(f"a {state} job cannot {self.name}")


_S = JobState

ACCEPT = Event("be accepted", {None: _S.QUEUED})
SCHEDULE = Event("be scheduled", {None: _S.SCHEDULED})
DUE = Event("become due", {_S.SCHEDULED: _S.QUEUED, _S.RETRYING: _S.QUEUED})
START = Event("start", {_S.QUEUED: _S.RUNNING})
RETURN = Event("return unread", {_S.RUNNING: _S.QUEUED})
SUCCEED = Event("succeed", {_S.RUNNING: _S.SUCCEEDED})
RETRY = Event("be retried", {_S.RUNNING: _S.RETRYING})
FAIL = Event(
    "fail",
    dict.fromkeys((_S.SCHEDULED, _S.QUEUED, _S.RUNNING, _S.RETRYING), _S.FAILED),
)
CANCEL = Event(
    "be cancelled",
    dict.fromkeys((_S.SCHEDULED, _S.QUEUED, _S.RUNNING, _S.RETRYING), _S.CANCELLED),
)

EVENTS = (ACCEPT, SCHEDULE, DUE, START, RETURN, SUCCEED, RETRY, FAIL, CANCEL)


def diagram() -> str:
    """Return the table as a Mermaid state diagram; the documentation holds a copy that a test compares."""
    lines = ["stateDiagram-v2"]
    for event in EVENTS:
        for before, after in event.items():
            lines.append(f"    {before or '[*]'} --> {after}: {event.name}")
    lines += [f"    {state} --> [*]" for state in JobState if state in SETTLED]
    return "\n".join(lines) + "\n"
