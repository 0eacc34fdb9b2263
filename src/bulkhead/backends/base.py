"""What a place to keep jobs has to do: the contracts of broker, result store and registry.

The service knows nothing of SQLite, Redis or NATS; a backend knows nothing of tasks, retries or results' types. Bodies,
values and errors are bytes that a backend only keeps. Three contracts, one connection:

- **Broker**: the jobs that are not settled, and the dead letters.
- **ResultStore**: what became of those that are settled, for a while.
- **Registry**: small named values with a version (schedules, groups, permits of limits, who is alive).

A place that has jobs and outcomes side by side can have a fourth: a **Settler**, which ends claims and keeps their
outcomes in one step. Where there is none, `apart.py` takes two.

Rules that hold for all of them:

- Every method may be called from any thread, and in a forked copy of the process, which makes a connection of its own.
- Instants are POSIX seconds and are compared with the server's clock, in milliseconds or finer; a delay counts from the
  moment that the server takes the call.
- A method that takes many things is one round trip per 1,000 or fewer and carries out each of them or, when it raises,
  none, some or all: every call can be repeated.
- A server that cannot be reached raises `BrokerUnavailable` within a few seconds; the call may have been carried out.
  The next call connects anew.

What comes with each job is a NamedTuple, which is made in half the time of a frozen dataclass.

`bulkhead.testing.conformance` has the tests that every backend passes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

__all__ = [
    "Backend",
    "Broker",
    "Burial",
    "CancelAnswer",
    "Claim",
    "Ending",
    "Entry",
    "Hold",
    "Message",
    "Outcome",
    "OutcomeState",
    "Place",
    "QueueCounts",
    "Record",
    "Registry",
    "ResultStore",
    "Return",
    "Settler",
    "Standing",
    "is_outdated",
]


class Place(Enum):
    """Where a job that is not settled is."""

    READY = "ready"  # can be claimed now; a lease that ran out makes a job ready again
    SCHEDULED = "scheduled"  # not due yet: a delay, or the pause before another attempt
    RUNNING = "running"  # claimed, and the lease holds
    DEAD = "dead"  # a dead letter


class Standing(Enum):
    """What a claim is worth when it is renewed."""

    HELD = "held"
    CANCELLED = "cancelled"  # held and renewed, but somebody has asked for the job to be cancelled
    LOST = "lost"  # the lease ran out and the job is somebody else's, or it is gone


class CancelAnswer(Enum):
    """What a cancellation has done."""

    REMOVED = "removed"  # it was not running and is gone
    REQUESTED = "requested"  # it is running; its consumer learns it when it renews next
    UNKNOWN = "unknown"  # there is no such job, or it is a dead letter


class OutcomeState(Enum):
    """What became of a job."""

    RUNNING = "running"  # not settled: a value that the job has saved before its end
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Message(NamedTuple):
    """A job to be kept.

    Attributes:
        id: Unique in the namespace; 1 to 200 characters.
        queue: Name of its queue.
        body: What is to be run; the backend does not look into it.
        priority: Within the queue a larger one is claimed first; -100 to 100. Equals are claimed in order of their due
            times, and those due at once in order of arrival.
        delay: Seconds until it is due, counted by the server; 0 is at once. Ignored where `due_at` is given.
        due_at: POSIX time before which it is not due; a past one means at once.
        remember: Seconds for which its id stays taken after it is settled or removed; 0 frees it at once.
    """

    id: str
    queue: str
    body: bytes
    priority: int = 0
    delay: float = 0.0
    due_at: float | None = None
    remember: float = 0.0


class Hold(NamedTuple):
    """Names a claim: the job and the token of the attempt. A token is never given twice."""

    id: str
    queue: str
    token: str


class Claim(NamedTuple):
    """A job that the claimer may run until the lease ends.

    Attributes:
        attempt: 1 for the first claim; given back with `counts=False` it is not counted.
        enqueued_at: When the job was enqueued, POSIX seconds by the server's clock.
        due_at: When it became due, likewise.
        error: What was left with the last `nack`, or None.
    """

    hold: Hold
    body: bytes
    priority: int
    attempt: int
    enqueued_at: float
    due_at: float
    error: bytes | None = None

    @property
    def id(self) -> str:
        """The job's id."""
        return self.hold.id

    @property
    def queue(self) -> str:
        """The job's queue."""
        return self.hold.queue


@dataclass(frozen=True, slots=True)
class Return:
    """A job that is given back, to be claimed again after `delay` seconds.

    Attributes:
        counts: False if the attempt is not to be counted: the job has not failed.
        error: Kept with the job; None keeps what there was.
        keeps_place: When the delay is over it is claimed before all that became due after it did, as if it had never
            been claimed, and its due time is the earlier one; else it is one that becomes due then. NATS can do that
            only without a delay.
    """

    hold: Hold
    delay: float = 0.0
    counts: bool = True
    error: bytes | None = None
    keeps_place: bool = False


@dataclass(frozen=True, slots=True)
class Burial:
    """A claimed job that becomes a dead letter.

    Attributes:
        reason: A short text for people.
        error: The last failure in the service's encoding; None keeps what there was.
    """

    hold: Hold
    reason: str
    error: bytes | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """What a broker knows of a job that is not settled.

    Attributes:
        attempt: How often it was claimed, without those that were not to be counted.
        enqueued_at, due_at: POSIX seconds by the server's clock; of a dead letter `due_at` is when it was buried.
        leased_until: When the lease of a running job ends, else None.
        reason: Of a dead letter: why, else "".
        error: What the last `nack` or `bury` left, or None.
        is_cancelled: Somebody has asked for this job to be cancelled while it was running.
    """

    id: str
    queue: str
    place: Place
    body: bytes
    priority: int
    attempt: int
    enqueued_at: float
    due_at: float
    leased_until: float | None = None
    reason: str = ""
    error: bytes | None = None
    is_cancelled: bool = False


@dataclass(frozen=True, slots=True)
class QueueCounts:
    """How many jobs of a queue are where; `latency_seconds` is how long the oldest ready one has been due, or 0."""

    ready: int = 0
    scheduled: int = 0
    running: int = 0
    dead: int = 0
    latency_seconds: float = 0.0


class Broker(ABC):
    """Keeps jobs until they are settled. Nothing that was enqueued is lost, whoever dies."""

    @abstractmethod
    def enqueue_many(self, messages: Sequence[Message]) -> list[bool]:
        """Keep these jobs; False stands for one whose id is taken, which is not kept and changes nothing.

        In order: of two of a queue and priority that are due at once the first is claimed first. All jobs of one call
        with 1,000 or fewer are kept or none, where the server can do that (not NATS).

        Raises:
            MessageTooLarge: A body is larger than the server takes; none of this call was kept.
        """

    @abstractmethod
    def claim(self, queue: str, n: int, lease: float, *, wait: float = 0.0) -> list[Claim]:
        """Take up to `n` jobs that are due, or whose lease has run out, for `lease` seconds.

        Where there is none, wait up to `wait` seconds for the first: a job enqueued by another process is seen within
        some 20 ms, one that becomes due likewise. May return early with none. Of a paused queue none is given.
        Two claimers never get the same job while a lease holds.
        """

    @abstractmethod
    def renew(self, holds: Sequence[Hold], lease: float) -> list[Standing]:
        """Let these leases end `lease` seconds from now; in the order given, what each is worth."""

    @abstractmethod
    def ack(self, holds: Sequence[Hold]) -> list[bool]:
        """Forget these jobs: they are settled. False where the claim was lost, and the job stays as it is.

        A lease that has run out is not lost as long as nobody else has claimed the job.
        """

    @abstractmethod
    def nack(self, returns: Sequence[Return]) -> list[bool]:
        """Give these jobs back; False where the claim was lost. A requested cancellation stays requested."""

    @abstractmethod
    def bury(self, burials: Sequence[Burial]) -> list[bool]:
        """Make these jobs dead letters; False where the claim was lost."""

    @abstractmethod
    def find(self, ids: Sequence[str]) -> list[Record | None]:
        """Return what is known of these jobs, in the order given."""

    @abstractmethod
    def records(
        self, place: Place, *, queue: str | None = None, offset: int = 0, limit: int = 100
    ) -> list[Record]:
        """Return the jobs in a place: in order of claims, or scheduled ones by due time, dead ones newest first."""

    @abstractmethod
    def counts(self) -> Mapping[str, QueueCounts]:
        """Return the counts of each queue that holds a job."""

    @abstractmethod
    def delete(self, ids: Sequence[str], *, dead_only: bool = False) -> list[bool]:
        """Remove jobs that are ready, scheduled or dead, or dead ones alone; False for any other, or an unknown one."""

    @abstractmethod
    def cancel(self, ids: Sequence[str]) -> list[CancelAnswer]:
        """Remove jobs that are not running; ask the consumers of those that are to end them.

        A job whose lease ran out is not running, whatever its consumer may think.
        """

    @abstractmethod
    def revive(self, ids: Sequence[str]) -> list[bool]:
        """Make dead letters ready again, as if enqueued now, with attempt 0; False for what is no dead letter.

        What was the reason and the error, and whether it was cancelled, is forgotten.
        """

    @abstractmethod
    def pause(self, queue: str) -> None:
        """Let no job of this queue be claimed, by any consumer, until `resume`. Running ones go on."""

    @abstractmethod
    def resume(self, queue: str) -> None:
        """Undo `pause`."""

    @abstractmethod
    def paused(self) -> frozenset[str]:
        """Return the names of the paused queues."""


class Outcome(NamedTuple):
    """What became of a job.

    Attributes:
        task: Name of what was run.
        value: The result in the service's encoding, or None when there is none.
        error: The failure in the service's encoding, or None.
        attempt: The attempt that ended it.
        enqueued_at, started_at, finished_at: POSIX seconds.
        keep: Seconds for which the store keeps it.
    """

    id: str
    queue: str
    task: str
    state: OutcomeState
    value: bytes | None = None
    error: bytes | None = None
    attempt: int = 1
    enqueued_at: float = 0.0
    started_at: float = 0.0
    finished_at: float = 0.0
    keep: float = 86400.0


def is_outdated(new: Outcome, old: Outcome) -> bool:
    """Tell whether an outcome comes too late to take the place of one that is kept.

    That is so when both are of the same job (enqueued at the same instant; the same id enqueued anew, or a dead letter
    revived, is another one) and the one kept is of a later attempt, or of the same one and not `RUNNING` any more. Why
    numbers do: one is only given twice when the first attempt was given back uncounted, and has no outcome.
    """
    if new.enqueued_at != old.enqueued_at:
        return False
    return (new.attempt, new.state is not OutcomeState.RUNNING) < (
        old.attempt,
        old.state is not OutcomeState.RUNNING,
    )


class ResultStore(ABC):
    """Keeps outcomes for the time that each of them names."""

    @abstractmethod
    def save_many(self, outcomes: Sequence[Outcome]) -> None:
        """Keep these; a later outcome of the same id takes the place of an earlier one, unless it `is_outdated`.

        Raises:
            MessageTooLarge: A value or error is larger than the server takes; none of this call was kept.
        """

    @abstractmethod
    def get_many(self, ids: Sequence[str]) -> list[Outcome | None]:
        """Return what is kept, in the order given."""

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> list[bool]:
        """Forget these; False for what is not kept."""

    @abstractmethod
    def outcomes(
        self, state: OutcomeState, *, queue: str | None = None, offset: int = 0, limit: int = 100
    ) -> list[Outcome]:
        """Return those in a state, the one finished last first."""

    @abstractmethod
    def counts(self) -> Mapping[OutcomeState, int]:
        """Return how many are kept in each state; states without one may be left out."""


class Ending(NamedTuple):
    """A claim that ends, and what is kept of it.

    Attributes:
        hold: The claim.
        outcome: What became of the job, under its id; None where nothing is to be kept.
        reason: Why the job becomes a dead letter; None forgets it.
        error: Of a dead letter, as in `Burial`.
    """

    hold: Hold
    outcome: Outcome | None = None
    reason: str | None = None
    error: bytes | None = None


class Settler(ABC):
    """Ends claims and keeps outcomes in one step: nobody, and no death, comes between the two."""

    @abstractmethod
    def settle(self, endings: Sequence[Ending]) -> list[bool]:
        """End these claims, each together with keeping its outcome; False where the claim was lost: nothing is changed.

        Whoever never got the answer asks again: an ending that was carried out is True again as long as its outcome is
        kept. (One without an outcome is False then, like any claim that has ended.)

        Raises:
            MessageTooLarge: An outcome or error is larger than the server takes; none of a round trip was carried out.
        """


@dataclass(frozen=True, slots=True)
class Entry:
    """A value of the registry; `version` is above 0, changes with each put and never comes back for its key.

    Not even when the key is removed, or its time ends, and it is put anew.
    """

    key: str
    value: bytes
    version: int


class Registry(ABC):
    """Small named values. A key is up to 300 characters; values are meant to be up to some 100 KiB."""

    @abstractmethod
    def get(self, key: str) -> Entry | None:
        """Return the value of a key."""

    @abstractmethod
    def put(
        self, key: str, value: bytes, *, expected: int | None = None, keep: float | None = None
    ) -> int | None:
        """Set a value, atomically.

        Args:
            key: Its name.
            value: The new value.
            expected: The version that it must have now, 0 for "there is none"; None sets it whatever there is.
            keep: Seconds after which it is gone unless it is put again; None keeps it.

        Returns:
            The new version, or None when the version was not the expected one and nothing was changed.
        """

    @abstractmethod
    def delete(self, key: str, *, expected: int | None = None) -> bool:
        """Remove a value; False if there is none, or it has not the expected version."""

    @abstractmethod
    def entries(self, prefix: str) -> list[Entry]:
        """Return all values whose key begins with `prefix`, by key."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One connected place: its three contracts.

    Attributes:
        others: Places that are closed with it: those that its parts were taken from.
        settler: Of a place that can end a claim and keep its outcome in one step.
    """

    broker: Broker
    results: ResultStore
    registry: Registry
    others: tuple[Backend, ...] = ()
    settler: Settler | None = None

    def settle(self, endings: Sequence[Ending], *, sure_until: float = 0.0) -> list[bool]:
        """End claims and keep their outcomes: as `Settler`, or in two steps as `apart.Apart`.

        Args:
            endings: What ends.
            sure_until: Until when all these claims hold for certain (monotonic seconds): where it takes two steps, they
                are looked at once more behind that.
        """
        if self.settler is not None:
            return self.settler.settle(endings)
        from bulkhead.backends.apart import Apart  # Why here: it is made of the contracts above

        return Apart(self.broker, self.results, sure_until).settle(endings)

    def close(self) -> None:
        """End the connections. Nothing can be asked afterwards; closing again does nothing."""
        for part in (self.broker, self.results, self.registry, *self.others):
            closing = getattr(part, "close", None)
            if closing is not None:
                closing()
