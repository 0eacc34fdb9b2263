"""`Dispatcher(journal="run.db")`: which jobs have succeeded, kept in a file, so that a script can be started again.

    dispatch(job with an own id) ── recorded? ── yes ──▶ a tracker that has succeeded already
                                                  no ──▶ pool … answer of the worker ──▶ record ──▶ tracker succeeds

A success is in the file before anybody can see it: before its tracker has settled. So a script that is killed at any
moment finds every success that it has seen, and may run again a job whose worker had just ended. Failures and
cancellations are not recorded: such jobs run again.

The file is a result store of the durable queue (backends/sqlite); the record is the id and the pickled result. Pickle
runs code of whoever wrote the file, so a journal is to be trusted as the script itself is.

Concurrency: any thread. Pools share the file, and so wait for one another's records, some 50 µs each.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bulkhead import validate
from bulkhead.backends.base import Outcome, OutcomeState
from bulkhead.backends.sqlite import connect
from bulkhead.composition import Chain, Group
from bulkhead.errors import BulkheadError, ConfigTypeError
from bulkhead.job import FOLLOW_UPS, Job
from bulkhead.tracker import JobHome, Tracker

__all__ = ["Journal", "Journaled"]

_NAMESPACE = "journal"

# Records are kept until the file is deleted (seconds).
_FOR_EVER = 1e10

# Longer ids are refused: the store takes no longer keys.
_LONGEST_KEY = 200


class Journaled(Tracker):
    """The tracker of a job whose success is recorded."""

    __slots__ = ("journal", "key")

    def __init__(self, journal: Journal, home: JobHome, payload: Any, priority: int, *rest: Any) -> None:
        super().__init__(home, payload, priority, *rest)
        self.journal = journal


class Journal:
    """The record of successes in a file, which is made when it is not there.

    Args:
        path: The file; its folder exists.

    Raises:
        ConfigError: The path is none, or what lies there is no journal.
        BrokerUnavailable: The file cannot be opened or written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise ConfigTypeError(f"journal must be a path, not {path!r} of type {type(path).__name__}")
        self._backend = connect(f"sqlite:///{quote(os.fsencode(Path(path).absolute()))}", _NAMESPACE)
        self._results = self._backend.results

    def close(self) -> None:
        """Close the file."""
        self._backend.close()

    def tracker(self, home: JobHome, payload: Any, priority: int, *rest: Any) -> Journaled:
        """Return the tracker of a job whose success is to be recorded."""
        return Journaled(self, home, payload, priority, *rest)

    def recall(self, job_id: Hashable) -> tuple[bool, Any]:
        """Return whether a job is recorded, and its result.

        Raises:
            ConfigTypeError: The id cannot be looked up again after a restart.
            BrokerUnavailable: The file cannot be read.
            Exception: What unpickling the result raises, for instance because its class is gone.
        """
        (found,) = self._results.get_many([key_of(job_id)])
        return (False, None) if found is None or found.value is None else (True, pickle.loads(found.value))

    def record(self, job: Any) -> BaseException | None:
        """Keep a success; return an error if that cannot be done, with which the job fails instead.

        Under the pool's lock, before anybody else knows.
        """
        now = time.time()
        try:
            value = pickle.dumps(job.value, pickle.HIGHEST_PROTOCOL)
            self._results.save_many(
                [
                    Outcome(
                        key_of(job.id),
                        "",
                        job.function,
                        OutcomeState.SUCCEEDED,
                        value,
                        attempt=job.attempt,
                        enqueued_at=job.queued_at or now,
                        started_at=job.started_at or now,
                        finished_at=now,
                        keep=_FOR_EVER,
                    )
                ]
            )
        except Exception as error:
            failed = BulkheadError(
                f"job {job.id!r} has succeeded, but the journal could not record it: {error}"
            )
            failed.__cause__ = error
            return failed
        return None

    def with_stand_ins(self, job: Any) -> Any:
        """Return a job or composition in which those that have succeeded before only hand out what is recorded."""
        if isinstance(job, Group):
            return Group(tuple(map(self.with_stand_ins, job.parts)))
        if isinstance(job, Chain):
            return Chain(tuple(map(self.with_stand_ins, job.parts)))
        if not isinstance(job, Job):
            return job
        options = dict(job.checked)
        for name in FOLLOW_UPS:
            if name in options:
                options[name] = self.with_stand_ins(options[name])
        made = job
        is_recorded, value = self.recall(options["id"]) if "id" in options else (False, None)
        if is_recorded:
            made = Job(hand_out, recorded=value)
            options.pop("timeout", None)
        elif options == job.checked:
            return job
        copy = Job(made.fn)
        copy.call, copy.checked = made.call, options
        return copy


def hand_out(*_: Any, recorded: Any) -> Any:
    """Stand in for a job of a composition that has succeeded before, in a worker."""
    return recorded


def key_of(job_id: Hashable) -> str:
    """Return under what a job is recorded.

    Raises:
        ConfigTypeError: The id is not made of str, int, float, bytes, bool, None and tuples of them: others need not
            look the same in the next run.
    """
    try:
        key = repr(job_id) if _is_plain(job_id) else None
    except (ValueError, RecursionError) as error:  # an int of thousands of digits, tuples in tuples
        raise ConfigTypeError(f"with a journal, an id must be short and plain: {error}") from None
    if key is None:
        raise ConfigTypeError(
            "with a journal, an id must be made of str, int, float, bytes and tuples of them, "
            f"not {validate.shown(job_id)}"
        )
    if len(key) > _LONGEST_KEY:
        raise ConfigTypeError(
            f"with a journal, an id must have at most {_LONGEST_KEY} characters, not {len(key)}"
        )
    return key


def _is_plain(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bytes, bool)
