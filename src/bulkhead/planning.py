"""How jobs follow one another: what is made of one dispatched composition, and who sets going what.

    chain([a, group([b, c]), d])      dispatch offers a to its pool, and promises b, c, d to theirs
      a ends      ──▶ b and c are fed its result
      b, c end    ──▶ whichever ends last: d is fed the list
    a fails       ──▶ b, c and d are cancelled

Accepted as a whole: dispatch waits for room for the first job, as for any; when it is accepted, so is all the rest,
which from then on waits in its pools as delayed jobs do, needing no room. If it is not, nothing has happened.

What may be asked for twice, and does no harm then: `begin` (by the dispatching thread, by the pool that accepts a
waiting offer, by the end of the first job: a Ctrl-C may keep the first from it), to retract promises (by the
dispatching thread, by the pool that refuses), and what follows the end of a job (see settling.py).

What happens when a job ends: its waiters are fired under its pool's lock, where they do no more than strike the job off
a list; the last one hands an errand to the thread of the pool that is next (links.py). An errand takes no lock but its
own pool's: what concerns another it hands on to that one's thread.

Nothing can follow itself: groups, chains and Jobs are made of what exists already, and cannot be changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from bulkhead._kernel.lifecycle import SETTLED, JobState
from bulkhead.composition import (
    Chain,
    ChainTracker,
    Composite,
    Group,
    GroupTracker,
    Part,
    error_of,
    leaves_of,
    value_of,
)
from bulkhead.engines.processes.later import Later, run_later
from bulkhead.engines.processes.payload import cannot
from bulkhead.engines.processes.pool import ProcessPool
from bulkhead.errors import ConfigError, JobCancelled, is_of
from bulkhead.history import History
from bulkhead.job import FOLLOW_UPS, Options, call_of, fed_call_of, name_of_job, options_of, times_of
from bulkhead.tracker import Tracker
from bulkhead.validate import shown

__all__ = ["Link", "Nowhere", "Plan"]

_NOTHING = object()  # what the first job of all is fed

# How many groups, chains and follow-ups may be inside one another. Why: each level costs frames of Python's stack here
# and in whatever looks at the handle, and more levels than a person writes are better made flat.
_DEEPEST = 100

Route = Callable[[Options], ProcessPool]


class Link(Tracker):
    """The tracker of one job of a composition.

    Attributes:
        pool: Where it runs.
        job, options: What the caller wrote.
        call: Its call, pickled, until it is fed.
        journal: Where its success is recorded, or None.
        on_success, on_failure: What follows it by its options.
        is_extra: It is (a part of) a follow-up by options: it is accepted only when it is known to run.
        plan: Of the whole, for its first job.
    """

    __slots__ = ("call", "is_extra", "job", "journal", "on_failure", "on_success", "options", "plan", "pool")

    def __init__(
        self, pool: ProcessPool, job: Any, options: Options, *, is_extra: bool, journal: Any = None
    ) -> None:
        config = pool.config
        timeout = options.get("timeout", config.timeout)
        super().__init__(pool, None, config.priority, timeout, options.get("retry", config.retry))
        self.id = options.get("id")
        self.function = name_of_job(job)
        self.pool = pool
        self.job: Any = job
        self.options = options
        self.is_extra = is_extra
        self.call: Later | None = None
        self.plan: Plan | None = None
        self.journal = journal if "id" in options else None
        self.on_success: Part | None = None
        self.on_failure: Part | None = None

    @property
    def follow_up(self) -> Any:
        """See `Tracker.follow_up`."""
        if self.state is JobState.SUCCEEDED:
            return self.on_success
        return self.on_failure if self.state is JobState.FAILED else None

    def cancel(self) -> bool:
        """See `Tracker.cancel`."""
        # Race: it is known that it is to follow, and its pool's thread has not got to it yet.
        if self.state is None:
            self.pool.links.keep(self)
        return super().cancel()

    def pack_now(self, previous: Any) -> None:
        """Pickle the job with what it is fed."""
        fn, args, kwargs = call_of(self.job) if previous is _NOTHING else fed_call_of(self.job)
        if previous is not _NOTHING:
            args = (previous, *args)
        self.payload = self.pool.pack(fn, args, kwargs, self.pool.segments)
        self.job = None

    def pack_later(self) -> None:
        """Pickle the job; what it is fed is added when it is known."""
        self.call = Later(self.pool.pack, *fed_call_of(self.job))
        self.job = None

    def send(self, previous: Any) -> None:
        """Let the job become ready. Does nothing when it has been before, or has settled."""
        if self.state in SETTLED:
            return
        call, payload = self.call, self.payload
        if call is not None:
            try:
                payload = self.pool.pack(run_later, (previous, call), {}, self.pool.segments)
            except Exception as error:
                self.pool.links.fail(self, error)
                return
            except BaseException as error:  # out of what it is fed
                self.pool.links.fail(self, cannot("the job could not be pickled", error))
                return
            self.call = None
        self.pool.links.feed(self, payload, *times_of(self.options))


class Plan:
    """One composition, or one job with follow-ups, on its way through the pools.

    Args:
        job: What is dispatched.
        route: Finds the pool for a job's options.
        history: Where ids are reserved.

    Raises:
        ConfigError: More than 100 groups, chains and follow-ups are inside one another.
        ConfigError, UnknownPriority, JobNotPicklable: A job cannot be run as it is.

    Attributes:
        head: Its first job, which decides whether the whole is accepted.
        links: All its jobs in order, follow-ups included.
    """

    def __init__(self, job: Any, route: Route, history: History, journal: Any = None) -> None:
        self._history = history
        self._journal = journal
        self.links: list[Link] = []
        self._whole = self._built(job, route, 0, is_extra=False)
        self._starters = list(_starters(self._whole, _NOTHING))
        for link, previous in self._starters:
            link.pack_now(previous)
        for link in self.links:
            if link.job is not None:
                link.pack_later()
        self.head: Any = self._starters[0][0] if self._starters else _Nobody()
        self.head.plan = self
        self._rest = [link for link in self.links if link is not self.head]
        self._wire(self._whole)

    # Building

    def _built(self, job: Any, route: Route, depth: int, *, is_extra: bool) -> Part:
        if depth > _DEEPEST:
            raise ConfigError(
                f"groups, chains and follow-ups may be at most {_DEEPEST} deep inside one another; a chain of chains "
                "can be written as one chain, and a follow-up of a follow-up as a chain that follows"
            )
        if isinstance(job, Group):
            return GroupTracker(
                [self._built(part, route, depth + 1, is_extra=is_extra) for part in job.parts]
            )
        if isinstance(job, Chain):
            return ChainTracker(
                [self._built(part, route, depth + 1, is_extra=is_extra) for part in job.parts]
            )
        call_of(job)  # raises for what is no job
        options = options_of(job)
        link = Link(route(options), job, options, is_extra=is_extra, journal=self._journal)
        self.links.append(link)
        link.on_success, link.on_failure = (
            self._built(options[name], route, depth + 1, is_extra=True) if name in options else None
            for name in FOLLOW_UPS
        )
        return link

    def _wire(self, part: Part) -> None:
        """See to it that every end of a job sets going what follows it."""
        if isinstance(part, Link):
            follow_ups = [one for one in (part.on_success, part.on_failure) if one is not None]
            for one in follow_ups:
                self._wire(one)
            if follow_ups:
                _when_settled([part], partial(self._job_ended, part))
        elif isinstance(part, Composite):
            for one in part.trackers:
                self._wire(one)
            if isinstance(part, ChainTracker):
                self._wire_steps(part.trackers)

    def _wire_steps(self, parts: tuple[Part, ...]) -> None:
        before: Part | None = None
        for source, after in pairwise((parts[0], *parts)):
            # Why not always the part before: one without jobs never ends, but has a result to hand on.
            if before is not None and leaves_of(after):
                _when_settled(leaves_of(before), partial(self._step_ended, before, source, after))
            if leaves_of(after):
                before = after

    # Being accepted

    def reserve(self) -> None:
        """Reserve the ids that the caller gave.

        Raises:
            DuplicateJobId: A live job has one of them; none is reserved.
        """
        try:
            for link in self.links:
                if link.id is not None:
                    self._history.reserve(link.id, link)
        except BaseException:
            self._release()
            raise

    def promise(self) -> None:
        """Count all jobs but the first in at their pools.

        Raises:
            DispatcherFinalized, PoolBroken: A pool takes no jobs. `withdraw` has to be called.
        """
        for link in self._rest:
            link.pool.links.promise(link)
        if self._rest:
            self.head.waiters = [_Gate(self._head_moved), *(self.head.waiters or ())]
        if isinstance(self.head, Link):
            self.head.due, self.head.start_by = times_of(self.head.options)

    def withdraw(self) -> None:
        """Undo `reserve` and `promise`: the first job is not accepted."""
        for link in self._rest:
            link.pool.links.retract(link)
        self._release()
        for link in self.links:
            # Why: this and its links hold one another, and large data should not wait for the garbage collector.
            link.payload = link.call = None

    def _release(self) -> None:
        for link in self.links:
            self._history.release(link)

    def begin(self) -> None:
        """The first job is accepted: accept the rest, and let those begin that wait for no other."""
        for link in self._rest:
            if not link.is_extra:
                link.pool.links.keep(link)
        for link, previous in self._starters[1:]:
            link.send(previous)

    def handed_over(self) -> Part:
        """As `begin`, and return the caller's handle on the whole."""
        self.begin()
        self.head.plan = None  # Why: so that nothing but the caller and the history keeps results
        return self._whole

    def _head_moved(self) -> None:
        """The first job was accepted or refused while the caller waited. Under the lock of its pool."""
        # Why not all of `withdraw`: the caller may do so at the same time, and an id may be taken again after that.
        step = self._have_retracted if self.head.state is None else self._have_begun
        self._rest[0].pool.links.submit(lambda _: step(), self.head)

    def _have_retracted(self) -> None:
        for link in self._rest:
            link.pool.links.submit(link.pool.links.retract, link)

    def _have_begun(self) -> None:
        for link in self._rest:
            if not link.is_extra:
                link.pool.links.submit(link.pool.links.keep, link)
        for link, previous in self._starters[1:]:
            link.pool.links.submit(partial(_send, previous), link)

    # What has ended; under the lock of the pool whose job was the last of it

    def _step_ended(self, before: Part, source: Part, after: Part) -> None:
        first = next(_links_of(after))
        first.pool.links.submit(lambda _: self._go_on(before, source, after), first)

    def _job_ended(self, link: Link) -> None:
        chosen = link.follow_up
        for one in leaves_of(chosen) if chosen is not None else ():
            self._history.number(one)  # Why here: who has waited for the job may ask for it at once
        first = next((one for part in (link.on_success, link.on_failure) for one in _links_of(part)), None)
        if first is not None:
            first.pool.links.submit(lambda _: self._follow(link, chosen), first)

    # What follows; in the thread of the pool that is next

    def _go_on(self, before: Part, source: Part, after: Part) -> None:
        try:
            error = error_of(before)
            if error is None:
                _feed(after, value_of(source))
            else:
                for link in _leaves(after):
                    link.pool.links.submit(partial(_call_off, before, error), link)
        except Exception as failure:  # for want of memory; whoever waits must not wait for ever
            for link in _leaves(after):
                link.pool.links.fail(link, failure)
            raise

    def _follow(self, link: Link, chosen: Part | None) -> None:
        for part in (link.on_success, link.on_failure):
            if part is not chosen:
                for one in _links_of(part):
                    one.pool.links.submit(one.pool.links.retract, one)
                    self._history.release(one)
        if chosen is None:
            link.on_success = link.on_failure = None
        elif chosen is link.on_success:
            link.on_failure = None
        else:
            link.on_success = None
        for one in _leaves(chosen):
            one.pool.links.submit(one.pool.links.keep, one)
        if chosen is not None:
            _feed(chosen, link.value if link.error is None else link.error)


class Nowhere:
    """Takes the place of a pool for what has no job: accepts at once.

    Args:
        pool: Any one of the dispatcher's; knows whether that is finalized.
    """

    def __init__(self, pool: ProcessPool) -> None:
        self.config = pool.config
        self.check_open = pool.check_open

    def dispatch(self, job: Tracker, deadline: float | None) -> bool:
        """Accept."""
        return self.try_dispatch(job)

    def try_dispatch(self, job: Tracker, waiter: object = None) -> bool:
        """Accept."""
        self.check_open()
        job.state = JobState.SUCCEEDED
        return True

    def withdraw(self, job: Tracker) -> bool:
        """Tell that the job was not accepted, if so."""
        return job.state is None


class _Nobody(Tracker):
    """The first job of what has none."""

    __slots__ = ("plan",)

    def __init__(self) -> None:
        super().__init__(None, None, 0)  # type: ignore[arg-type]  # nobody ever gets to see it
        self.plan: Plan | None = None


class _Gate:
    """Among the waiters of a job that is offered: fired when it is accepted or refused."""

    __slots__ = ("fire",)

    def __init__(self, fire: Callable[[], None]) -> None:
        self.fire = fire


class _End:
    """Among the waiters of a job: calls `then` when it has settled."""

    __slots__ = ("_job", "_then")

    def __init__(self, job: Tracker, then: Callable[[], None]) -> None:
        self._job = job
        self._then = then

    def fire(self) -> bool:
        if self._job.state in SETTLED:
            self._then()
            return False
        return self._job.state is not None  # it was offered and is accepted: its end is still to come


def _when_settled(leaves: Sequence[Tracker], then: Callable[[], None]) -> None:
    """Have `then` called, under the lock of some pool, when the last of these jobs has settled; perhaps twice."""
    # Why a set: its steps are atomic, the jobs may be those of several pools, and one may be told of twice.
    left = {id(leaf) for leaf in leaves}

    def one_has_ended(leaf: Tracker) -> None:
        left.discard(id(leaf))
        if not left:
            then()

    for leaf in leaves:
        leaf.waiters = [*(leaf.waiters or ()), _End(leaf, partial(one_has_ended, leaf))]


def _starters(part: Part, previous: Any) -> Iterator[tuple[Link, Any]]:
    """Yield the jobs that begin when a part is fed, with what they get of it."""
    if isinstance(part, Link):
        yield part, previous
    elif isinstance(part, GroupTracker):
        for one in part.trackers:
            yield from _starters(one, previous)
    elif isinstance(part, ChainTracker):
        for one in part.trackers:
            if leaves_of(one):
                yield from _starters(one, previous)
                break
            previous = value_of(one)


def _feed(part: Part, previous: Any) -> None:
    for link, fed in _starters(part, previous):
        link.pool.links.submit(partial(_send, fed), link)


def _send(previous: Any, link: Link) -> None:
    link.send(previous)


def _call_off(before: Part, error: BaseException, link: Link) -> None:
    what = f"job {shown(before.id)}" if isinstance(before, Tracker) else f"a job of {shown(before.id)}"
    is_cancelled = is_of(error, JobCancelled)
    how = "was cancelled" if is_cancelled else "has failed"
    cancelled = JobCancelled(f"job {shown(link.id)} was cancelled, as {what} before it {how}")
    # Why the first cause: in a long chain each would be the cause of the next.
    first = error.__cause__ if is_cancelled else None
    cancelled.__cause__ = error if first is None else first
    link.pool.links.call_off(link, cancelled)


def _leaves(part: Part | None) -> Iterator[Link]:
    for leaf in leaves_of(part) if part is not None else ():
        assert isinstance(leaf, Link)
        yield leaf


def _links_of(part: Part | None) -> Iterator[Link]:
    """Yield the jobs of a part, their follow-ups included."""
    for leaf in _leaves(part):
        yield leaf
        yield from _links_of(leaf.on_success)
        yield from _links_of(leaf.on_failure)
