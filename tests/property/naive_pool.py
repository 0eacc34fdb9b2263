"""What a pool promises, in the most literal form: lists that are searched from end to end at every step.

Written from the promises (A3-A6, A8, A11, A12, A15, B3, C4, C5, C13, C15), not from the kernel: no heap, no counters
that could drift, no states but the words of the promises. Each stimulus returns what must follow from it. Two choices
are left to the kernel: which free worker takes a job, and how long it waits before it replaces one that died early.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# C15: so many workers in a row (but at least one for each slot) that died by themselves while they came up, none having
# come up between, end the pool.
FAILED_STARTS = 3

# A job that so many workers have died of before they could read it is no longer given back.
UNREAD_RETURNS = 3

SETTLED = ("succeeded", "failed", "cancelled")


@dataclass(eq=False)
class NaiveJob:
    """One job as its caller sees it."""

    number: int
    max_attempts: int = 1
    initial: float = 0.0
    factor: float = 1.0
    maximum: float = 3600.0
    retried_on: tuple[str, ...] = ()
    timeout: float | None = None
    due: float | None = None
    start_by: float | None = None
    has_items: bool = (
        False  # a chunk of a map: its timeout counts for each item, and a part of it may be done
    )
    stage: str = (
        "new"  # offered, promised, gone (withdrawn, retracted, refused, turned away), a JobState otherwise
    )
    is_fed: bool = True  # False while it waits for the job before it
    attempt: int = 0
    times_out_at: float | None = None
    item_began: float | None = None  # None before the first item of this sending
    is_cancelling: bool = False
    ended_for: str | None = None  # why its worker was told to end: "timeout", "memory"
    returns: int = 0  # in a row, unread
    turn: int = 0  # place in the line of ready jobs
    phase: int = -1

    @property
    def is_accepted(self) -> bool:
        return self.stage not in ("new", "offered", "promised", "gone")

    @property
    def is_unsettled(self) -> bool:
        return self.is_accepted and self.stage not in SETTLED

    @property
    def is_waited_for(self) -> bool:
        return self.is_unsettled or self.stage == "promised"


@dataclass
class Expected:
    """What must follow from one stimulus. Order matters for starts, accepted and refused."""

    started: list[NaiveJob] = field(default_factory=list)
    settled: list[NaiveJob] = field(default_factory=list)
    accepted: list[NaiveJob] = field(default_factory=list)
    refused: list[NaiveJob] = field(default_factory=list)
    ended: list[NaiveJob] = field(default_factory=list)  # jobs whose worker is to be ended
    sent_home: list[int] = field(default_factory=list)  # workers that are to be replaced after their answer


class NaivePool:
    """A pool, with its workers in plain words: starting, idle, busy, ending, missing."""

    def __init__(self, n_workers: int, backlog: int | None, most_jobs: int | None = None) -> None:
        self.most_jobs = most_jobs
        self.done = [0] * n_workers  # jobs of each worker, or items
        self.recycled = 0
        self.room = None if backlog is None else n_workers + backlog
        self.workers = ["starting"] * n_workers
        self.has: list[NaiveJob | None] = [None] * n_workers
        self.jobs: list[NaiveJob] = []
        self.line: list[NaiveJob] = []  # for room: offers, and submitted jobs, which are accepted already
        self.phase = 0
        self.is_broken = False
        self.is_refusing = False
        self.failed_starts = 0
        self.retried = 0
        self.turns = 0
        self.to_place: list[NaiveJob] = []  # started, and not yet seen at a worker
        self.out = Expected()

    # Questions

    def staged(self, *stages: str) -> list[NaiveJob]:
        return [job for job in self.jobs if job.stage in stages]

    @property
    def offers(self) -> list[NaiveJob]:
        return self.staged("offered")

    def ready(self) -> list[NaiveJob]:
        ready = [job for job in self.staged("queued") if job not in self.line]
        return sorted(ready, key=lambda job: job.turn)

    def unsettled(self) -> list[NaiveJob]:
        return [job for job in self.jobs if job.is_unsettled]

    def waited_for(self, phase: int) -> list[NaiveJob]:
        return [job for job in self.jobs if job.is_waited_for and job.phase == phase]

    def unfed(self) -> list[NaiveJob]:
        return [job for job in self.staged("scheduled") if not job.is_fed]

    def instants(self) -> list[float]:
        """Return when something has to happen to a job."""
        found = []
        for job in self.jobs:
            if job.stage in ("scheduled", "retrying"):
                found.append(job.due)
            if job.start_by is not None and self._has_not_started(job):
                found.append(job.start_by)
            if job.stage == "running" and not (job.ended_for or job.is_cancelling):
                found.append(job.times_out_at)
        return [instant for instant in found if instant is not None]

    def expect(self) -> Expected:
        """Return what must have followed since the last call."""
        out, self.out = self.out, Expected()
        return out

    # Callers

    def offer(self, job: NaiveJob, now: float, *, patient: bool) -> bool:
        self.jobs.append(job)
        if job.due is not None and job.due > now:
            self._accept(job, "scheduled")
            return True
        job.due = None
        if not self.line and self._has_room():
            self._accept(job, "queued")
            self._go_on(now)
            return True
        if patient:
            self.line.append(job)
            job.stage = "offered"
        else:
            job.stage = "gone"
        return False

    def submit(self, job: NaiveJob, now: float) -> None:
        self.jobs.append(job)
        self.line.append(job)
        self._accept(job, "queued")
        self._go_on(now)

    def withdraw(self, job: NaiveJob) -> None:
        self.line.remove(job)
        job.stage = "gone"

    def cancel(self, job: NaiveJob, now: float) -> bool:
        if not job.is_unsettled:
            return False
        if job.stage == "running":
            if not (job.ended_for or job.is_cancelling):
                self.out.ended.append(job)
                self.workers[self.has.index(job)] = "ending"
            job.is_cancelling = True
            return True
        self._settle(job, "cancelled")
        self._go_on(now)
        return True

    def promise(self, job: NaiveJob) -> None:
        self.jobs.append(job)
        job.stage = "promised"
        job.is_fed = False
        job.phase = self.phase

    def retract(self, job: NaiveJob) -> None:
        if job.stage == "promised":
            job.stage = "gone"

    def keep(self, job: NaiveJob) -> None:
        """Accept a promised job; one that was retracted only to be told about."""
        if job.is_accepted:
            return
        was_promised = job.stage == "promised"
        if not was_promised:
            job.phase = self.phase
        job.stage = "scheduled"
        self._take_turn(job)
        if self.is_broken:
            self._settle(job, "failed")
        elif not was_promised:
            self._settle(job, "cancelled")

    def feed(
        self, job: NaiveJob, now: float, due: float | None, start_by: float | None, *, fails: bool
    ) -> None:
        job.is_fed = True
        if fails:
            self._settle(job, "failed")
            return
        job.start_by = start_by
        self._take_turn(job)
        if due is not None and due > now:
            job.due = due
        else:
            job.stage = "queued"
        self._go_on(now)

    def refuse(self) -> None:
        self.is_refusing = True
        self._refuse_offers()

    # Workers

    def place(self, worker: int, job: NaiveJob) -> None:
        """Learn which free worker took a job that had to start."""
        assert self.workers[worker] == "idle"
        self.to_place.remove(job)
        self.workers[worker] = "busy"
        self.has[worker] = job

    def staffed(self, worker: int) -> None:
        """Learn that a missing worker is being replaced."""
        assert self.workers[worker] == "missing"
        assert not self.is_broken
        self.workers[worker] = "starting"

    def came_up(self, worker: int, now: float) -> None:
        self.workers[worker] = "idle"
        self.done[worker] = 0
        self.failed_starts = 0
        self._go_on(now)

    def answered(self, worker: int, error: str | None, now: float, n_jobs: int = 1) -> None:
        """Take an answer; `error` is a word out of `retried_on`, or None for a success. A chunk is `n_jobs` jobs."""
        if self.workers[worker] == "ending":
            return
        job = self.has[worker]
        assert job is not None
        self.workers[worker], self.has[worker] = "idle", None
        self.done[worker] += n_jobs
        if self.most_jobs is not None and self.done[worker] >= self.most_jobs:
            self.workers[worker] = "missing"
            self.recycled += 1
            self.out.sent_home.append(worker)
        if error is None:
            self._settle(job, "succeeded")
        else:
            self._fail_attempt(job, error, now)
        self._go_on(now)

    def takes_too_much(self, worker: int) -> None:
        """Learn that a worker takes more memory than any may."""
        job = self.has[worker]
        if self.workers[worker] == "busy":
            assert job is not None
            self._end(job, "memory")

    def item_begins(self, job: NaiveJob, now: float) -> None:
        assert job.has_items
        assert job.stage == "running"
        job.item_began = now

    def died(self, worker: int, now: float, *, loss: str, was_killed: bool) -> None:
        """Learn of a death; `loss` is a word of `Loss` for what its job has lost by it."""
        was, job = self.workers[worker], self.has[worker]
        self.workers[worker], self.has[worker] = "missing", None
        if job is not None:
            self._lose(job, now, loss)
        if was == "starting":
            self.failed_starts += not was_killed
            if self.failed_starts >= max(FAILED_STARTS, len(self.workers)):
                self.break_down()
        self._go_on(now)

    # Time and ruin

    def tick(self, now: float) -> None:
        for job in self.jobs:
            if job.start_by is not None and job.start_by <= now and self._has_not_started(job):
                self._miss(job)
        due = [job for job in self.staged("scheduled", "retrying") if job.due is not None and job.due <= now]
        for job in sorted(due, key=lambda job: (job.due, job.turn)):
            job.stage = "queued"
            self._take_turn(job)
        for job in self.staged("running"):
            is_ending = job.ended_for is not None or job.is_cancelling
            if job.times_out_at is not None and job.times_out_at <= now and not is_ending:
                until = self._until(job)
                if until > now:
                    job.times_out_at = until
                    continue
                self._end(job, "timeout")
        self._go_on(now)

    def break_down(self) -> None:
        if self.is_broken:
            return
        self.is_broken = True
        self._refuse_offers()
        for job in self.staged("queued", "scheduled", "retrying"):
            self._settle(job, "failed")

    # What follows

    def _end(self, job: NaiveJob, why: str) -> None:
        job.ended_for = why
        self.out.ended.append(job)
        self.workers[self.has.index(job)] = "ending"

    def _until(self, job: NaiveJob) -> float:
        """Return up to when a job may run whose time seems to be up."""
        assert job.timeout is not None
        assert job.times_out_at is not None
        return job.times_out_at if job.item_began is None else job.item_began + job.timeout

    def _go_on(self, now: float) -> None:
        """Use every free worker and all free room, the longest waiting first."""
        while True:
            ready = self.ready()
            if ready and self._n_free() > 0:
                self._start(ready[0], now)
            elif self.line and self._has_room():
                job = self.line.pop(0)
                if job.is_accepted:
                    self._take_turn(job)
                else:
                    self._accept(job, "queued")
                    self.out.accepted.append(job)
            else:
                return

    def _start(self, job: NaiveJob, now: float) -> None:
        if job.start_by is not None and job.start_by < now and job.attempt == 0:
            self._miss(job)
            return
        job.stage = "running"
        job.attempt += 1
        job.times_out_at = None if job.timeout is None else now + job.timeout
        job.item_began = None
        self.to_place.append(job)
        self.out.started.append(job)

    def _n_free(self) -> int:
        return self.workers.count("idle") - len(self.to_place)

    def _has_room(self) -> bool:
        return self.room is None or len(self.ready()) + len(self.staged("running")) < self.room

    def _has_not_started(self, job: NaiveJob) -> bool:
        return job.attempt == 0 and job.stage in ("offered", "scheduled", "queued")

    def _accept(self, job: NaiveJob, stage: str) -> None:
        job.stage = stage
        job.phase = self.phase
        self._take_turn(job)

    def _take_turn(self, job: NaiveJob) -> None:
        self.turns += 1
        job.turn = self.turns

    def _miss(self, job: NaiveJob) -> None:
        """Fail a job that did not start in time; one that was only offered is accepted first, to be told about."""
        if job.stage == "offered":
            self.line.remove(job)
            self._accept(job, "queued")
            self.out.accepted.append(job)
        self._settle(job, "failed")

    def _settle(self, job: NaiveJob, stage: str) -> None:
        assert job.is_unsettled
        if job in self.line:
            self.line.remove(job)
        job.stage = stage
        self.out.settled.append(job)

    def _fail_attempt(self, job: NaiveJob, error: str, now: float) -> None:
        job.returns = 0
        if self.is_broken or job.attempt >= job.max_attempts or error not in job.retried_on:
            self._settle(job, "failed")
            return
        job.stage = "retrying"
        job.ended_for = None
        job.due = now + min(job.initial * job.factor ** (job.attempt - 1), job.maximum)
        self._take_turn(job)
        self.retried += 1

    def _lose(self, job: NaiveJob, now: float, loss: str) -> None:
        if job.is_cancelling:
            self._settle(job, "cancelled")
        elif loss == "nothing":
            self._settle(job, "succeeded")
        elif loss == "rest" and not self.is_broken:
            self._give_back(job, returns=0)
        elif job.ended_for is not None:
            self._fail_attempt(job, job.ended_for, now)
        elif loss == "unread" and job.returns < UNREAD_RETURNS and not self.is_broken:
            self._give_back(job, returns=job.returns + 1)
        else:
            self._fail_attempt(job, "crash", now)

    def _give_back(self, job: NaiveJob, returns: int) -> None:
        job.returns = returns
        job.attempt -= 1
        job.ended_for = None
        job.stage = "queued"  # with its old turn

    def _refuse_offers(self) -> None:
        refused = [job for job in self.line if job.stage == "offered"]
        self.line = [job for job in self.line if job.stage != "offered"]
        for job in refused:
            job.stage = "gone"
        self.out.refused += refused
