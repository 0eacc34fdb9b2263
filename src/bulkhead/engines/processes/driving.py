"""Whoever waits, drives: which thread polls a pool's pipes, who sleeps meanwhile, and who takes over.

At any time at most one thread has the driver's role: it polls, and under the pool's lock it does what the events ask
for. A thread that has to wait for something (a free slot, a result, a barrier) takes the role if nobody has it and
keeps it until its own wish is fulfilled; otherwise it sleeps until its wish is fulfilled or the role is passed to it.
So a script that dispatches from one thread never pays for a thread switch.

The background thread drives when nobody else does: for timeouts, retries, callbacks and dead workers. It steps in when
the role has been free for `_HESITATION`, so that it does not compete with a caller that comes back every few
microseconds, and gives the role up as soon as a caller waits. With nothing to do it sleeps in the poll, without limit.

Guarantees:
- Whenever the role is free and there is a thread that sleeps for its wish, one such thread is being woken.
- Whenever the role is free otherwise, the background thread takes it within `_HESITATION`.
- No thread waits longer than its deadline (plus one step).

Lock rank: the pool's lock is the only lock here; nothing else is acquired while it is held.

Prior art: the leader/follower pattern (Schmidt, 2000).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from bulkhead.engines.processes.interrupts import hold, release
from bulkhead.engines.processes.poller import READABLE, Alarm, make_poller
from bulkhead.errors import NestedDispatch

__all__ = ["Bell", "Driving", "Errand", "Waiter", "fire", "reentered"]

_log = logging.getLogger("bulkhead")

# How long the role may be free before the background thread takes it (seconds). Longer than the usual pause between
# two dispatches of a script in full swing, shorter than anybody notices.
_HESITATION = 0.005

# How long a caller looks for events before it sleeps in the poll (seconds); each look gives the CPU away. Why: an
# answer to a small job is there after some ten microseconds, and waking a sleeper costs more than that. Why not while
# jobs compute: who gives the CPU away to them gets it back after milliseconds; who sleeps is woken by the answer.
_LOOK_FOR = 30e-6
_give_way = getattr(os, "sched_yield", lambda: None)

# Longest single wait (seconds): system calls have limits of some weeks. Whoever waits longer waits again.
_LONGEST = 86_400.0

# What is to be done under the lock when the kernel knows of the answers that have come, as of an instant (monotonic
# seconds). What the kernel decides upon it is carried out.
Errand = Callable[[float], None]

# So many jobs have to wait before somebody who submits them takes the role from the background thread (arbitrary). It
# gets it back within `_HESITATION`, which is too long for a few jobs.
_CROWD = 64

_BACKGROUND = object()
_NOT_POLLING = float("-inf")


def reentered() -> NestedDispatch:
    """Return the error for a call out of the middle of a change that this very thread is making."""
    return NestedDispatch(
        "called while this thread is at work inside bulkhead: by a signal handler, a destructor or the unpickling of a "
        "result; let a handler set a flag or raise an exception, and do the rest outside"
    )


class Waiter:
    """One thread's wish. Owner: the pool's lock, but for `is_done`, which any thread may read."""

    __slots__ = ("_bed", "is_done", "polls_with")

    def __init__(self) -> None:
        self.is_done = False
        self.polls_with: Alarm | None = None  # what ends the poll that its thread is in
        self._bed: threading.Lock | None = None

    def fire(self) -> None:
        """The wish is fulfilled."""
        self.is_done = True
        if self.polls_with is not None:
            self.polls_with.ring()
        if self._bed is not None:
            self.wake()

    def wake(self) -> None:
        """Let the sleeping thread look again."""
        bed = self._bed
        if bed is not None:
            if bed.locked():  # Race: an exception may strike after each step, and this is done again then
                bed.release()
            self._bed = None

    def make_bed(self) -> threading.Lock:
        """Return the lock whose release ends the sleep."""
        self._bed = threading.Lock()
        self._bed.acquire()
        return self._bed


def fire(waiters: list[Any]) -> None:
    """Wake everybody on the list, under the lock, and empty it."""
    while waiters:
        waiters[-1].fire()
        waiters.pop()  # Race: in this order, so that whom an exception strikes is woken again


class Bell:
    """A wish that is fulfilled again and again. Owner: the pool's lock, but for `is_rung`, which any thread may read.

    Attributes:
        waiter: Of the thread that waits for it.
    """

    __slots__ = ("is_rung", "waiter")

    def __init__(self) -> None:
        self.is_rung = False
        self.waiter: Waiter | None = None

    def ring(self) -> None:
        """Wake who waits; under the lock."""
        self.is_rung = True
        if self.waiter is not None:
            self.waiter.fire()
            self.waiter = None


class Driving:
    """The driver's role of one pool, with the lock, the poller and the background thread that belong to it.

    Args:
        name: Of the background thread.
        work: Does what the polled events ask for, and what was due at an instant at which all that had come is among
            these events, with an errand if there is one; called by the driver, without the lock, while Ctrl-C is held
            off.
        next_deadline: When `work` has to be called even without events, in monotonic seconds; called under the lock.
        is_answer_near: Tells whether an answer should come within microseconds.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[list[tuple[int, int]], float, Errand | None], None],
        next_deadline: Callable[[], float | None],
        is_answer_near: Callable[[], bool],
    ) -> None:
        # Why an RLock: a signal handler of the user's may look at the pool while its own thread has the lock.
        self.lock = threading.RLock()
        self.poller = make_poller()
        self._alarm = Alarm()
        self.poller.register(self._alarm.fd, READABLE)
        self._work = work
        self._next_deadline = next_deadline
        self._is_answer_near = is_answer_near
        # Owner of the rest: the lock.
        self._role: object | None = None
        self._role_thread: int | None = None
        self._is_at_work = False  # whether the driver is beyond its poll; written by it alone
        self._sleepers: deque[Waiter] = deque()
        self._polls_until: float | None = _NOT_POLLING
        self._turns = 0  # how often the role was taken
        self._gate = threading.Lock()  # the background thread's bed
        self._gate.acquire()
        self._is_gate_shut = False  # whether the background thread waits for it without limit
        self._is_urgent = False  # whether the background thread should not hesitate
        self._is_in_the_way = False  # whether it should give the role up, though nobody waits
        self._is_closed = False
        self._thread = threading.Thread(target=self._background, name=name, daemon=True)

    def begin(self) -> None:
        """Start the background thread."""
        self._thread.start()

    def wait(self, waiter: Waiter, deadline: float | None = None) -> bool:
        """Drive, or sleep while another thread does, until the wish is fulfilled; False at the deadline.

        Raises:
            NestedDispatch: Called by a signal handler that has interrupted this very thread in the middle of its work.
        """
        beneath: object | None = None
        try:
            while not waiter.is_done:
                patience = None if deadline is None else deadline - time.monotonic()
                if self._role is waiter or self._take_role(waiter):
                    self._step(waiter, patience)
                elif self._role_thread == threading.get_ident():
                    beneath = self._take_over(waiter)
                else:
                    self._sleep(waiter, patience)
                if patience is not None and patience <= 0:
                    break
        finally:
            # Race: a Ctrl-C may strike at the very call. It must not leave the role with a thread that has gone, so
            # there is a second try, here where no step lies between it and the first.
            try:
                self.leave(waiter, beneath)
            except KeyboardInterrupt:
                self.leave(waiter, beneath)
                raise
        return waiter.is_done

    def try_role(self, waiter: Waiter) -> bool:
        """Under the lock: take the driver's role if nobody has it. Who takes it calls `wait` or `leave`."""
        if self._role is None:
            self._role = waiter
            self._role_thread = threading.get_ident()
            self._turns += 1
            return True
        return False

    def crowd_in(self, n_waiting: int) -> None:
        """Under the lock: have the background thread leave the role to whoever submits so many jobs that wait."""
        if n_waiting >= _CROWD and self._role is _BACKGROUND and not self._is_in_the_way:
            self._is_in_the_way = True
            self._alarm.ring()

    def leave(self, waiter: Waiter, beneath: object | None = None) -> None:
        """Give the role back, if the waiter has it, and let somebody else drive. Does no harm twice.

        Args:
            waiter: Who leaves.
            beneath: The waiter of the same thread that had the role before, if a signal handler has taken it over.
        """
        with self.lock:
            self.resign(waiter, beneath)

    def resign(self, waiter: Waiter, beneath: object | None = None) -> None:
        """Under the lock: `leave`."""
        if self._role is waiter:
            self._role = beneath
            if beneath is None:
                self._role_thread = None
            else:
                # Race: its wish may have been fulfilled meanwhile, and it goes on with the poll that it was in.
                self._alarm.ring()
        elif waiter in self._sleepers:
            self._sleepers.remove(waiter)
        # Race: also a waiter that never drove may have been woken to take over and have run out of time instead.
        if self._sleepers or self._is_gate_shut:
            self._pass_on()

    def hurry(self, instant: float | None) -> None:
        """Under the lock: make the polling thread look again if it would sleep beyond `instant`."""
        if instant is not None and (self._polls_until is None or instant < self._polls_until):
            self._alarm.ring()

    def wake(self) -> None:
        """Under the lock: make the polling thread look again."""
        self._alarm.ring()

    def glance(self, waiter: Waiter, errand: Errand) -> bool:
        """Do what has come already, with the errand, if nobody drives; tell whether that fulfilled the wish.

        Who calls has Ctrl-C held off. If the wish is fulfilled the waiter has left; otherwise it may have the role now,
        and who calls goes on with `wait` or `leave`.

        Raises:
            NestedDispatch: As `wait`.
        """
        self._refuse_within()
        with self.lock:
            if not self.try_role(waiter):
                return False
        now = time.monotonic()
        try:
            events = self.poller.poll(0)
        except (OSError, ValueError):
            if not self._is_closed:
                raise
            return False  # another thread has finalized meanwhile
        if events:
            self._is_at_work = True
            try:
                self._work(events, now, errand)
            finally:
                self._is_at_work = False
        return waiter.is_done

    def call_background(self) -> None:
        """Have the background thread drive soon if nobody does: somebody waits who cannot drive."""
        with self.lock:
            self._is_urgent = self._role is None
            self._pass_on()

    def silence(self) -> None:
        """Take note of a wake-up."""
        self._alarm.silence()

    def is_alarm(self, fd: int) -> bool:
        """Tell whether `fd` is the descriptor of wake-ups."""
        return fd == self._alarm.fd

    def end_background(self) -> None:
        """Let the background thread end, and wait for that unless it is the one that calls."""
        with self.lock:
            self._is_closed = True
            self._open_gate()
        self._alarm.ring()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def close(self) -> None:
        """Close the descriptors; nobody waits or drives any more."""
        self.poller.close()
        self._alarm.close()

    # The role

    def _take_role(self, waiter: Waiter) -> bool:
        self._refuse_within()
        with self.lock:
            return self.try_role(waiter)

    def _take_over(self, waiter: Waiter) -> object | None:
        """Take the role from a waiter of this thread, which cannot go on before we return: this is a signal handler."""
        self._refuse_within()
        with self.lock:
            if self._is_at_work:
                raise reentered()
            beneath, self._role = self._role, waiter
            return beneath

    def _refuse_within(self) -> None:
        """Raise NestedDispatch if this thread has the lock: what it is at is half done, and nobody else can drive."""
        if self.lock._is_owned():  # type: ignore[attr-defined]  # as threading.Condition does
            raise reentered()

    def _sleep(self, waiter: Waiter, patience: float | None) -> None:
        self._refuse_within()
        with self.lock:
            # Race: the driver may have fulfilled the wish, or left, since we looked.
            if waiter.is_done or self._role is None:
                return
            bed = waiter.make_bed()
            self._sleepers.append(waiter)
            if self._role is _BACKGROUND:
                self._alarm.ring()
        if not bed.acquire(timeout=-1 if patience is None else min(max(patience, 0), _LONGEST)):
            with self.lock:
                # Why: it may lie down again; who was on the list twice would stay there, and be woken in vain.
                if waiter in self._sleepers:
                    self._sleepers.remove(waiter)

    def _pass_on(self) -> None:
        if self._role is not None:
            return
        if self._sleepers:
            self._sleepers.popleft().wake()
        elif self._is_gate_shut:
            self._open_gate()

    def _open_gate(self) -> None:
        if self._is_gate_shut:
            self._is_gate_shut = False
            self._gate.release()

    # Driving

    def _step(self, waiter: Waiter | None, patience: float | None) -> None:
        # Why the time before a first look: what came before it is read before anything is called late; when the wait
        # that follows has come to a deadline, the next step finds it due.
        now = time.monotonic()
        try:
            events = self.poller.poll(0) or self._events(waiter, patience)
        except (OSError, ValueError):
            if not self._is_closed:
                raise
            return  # a signal handler has finalized meanwhile, and that fulfils every wish
        self._go_to_work(events, now)

    def _go_to_work(self, events: list[tuple[int, int]], now: float) -> None:
        is_held = hold()
        self._is_at_work = True
        try:
            self._work(events, now, None)
        finally:
            self._is_at_work = False
            if is_held:
                release()

    def _events(self, waiter: Waiter | None, patience: float | None) -> list[tuple[int, int]]:
        """Wait for events until the next deadline, or until `patience` is at its end."""
        with self.lock:
            if waiter is not None:
                # Race: another thread may fulfil the wish (a refused offer, a cancelled job): before, or it rings.
                if waiter.is_done:
                    return []
                waiter.polls_with = self._alarm
            deadline = self._next_deadline()
            now = time.monotonic()
            if patience is not None and (deadline is None or now + patience < deadline):
                deadline = now + patience
            self._polls_until = deadline
        events = self._poll(waiter, None if deadline is None else min(max(deadline - now, 0), _LONGEST))
        # Race: without the lock; whoever reads the old values rings for nothing, whoever reads the new ones has put
        # down its deadline before the next step asks for it.
        self._polls_until = _NOT_POLLING
        if waiter is not None:
            waiter.polls_with = None
        return events

    def _poll(self, waiter: Waiter | None, timeout: float | None) -> list[tuple[int, int]]:
        poll = self.poller.poll
        if waiter is not None and timeout != 0 and self._is_answer_near():
            give_up = time.perf_counter() + _LOOK_FOR
            while time.perf_counter() < give_up:
                _give_way()
                events = poll(0)
                if events:
                    return events
        return poll(timeout)

    def _background(self) -> None:
        seen = -1
        while not self._is_closed:
            with self.lock:
                is_free = self._role is None
                is_same_turn = self._turns == seen
                is_mine = is_free and (is_same_turn or self._is_urgent)
                if is_mine:
                    self._role = _BACKGROUND
                    self._role_thread = threading.get_ident()
                    self._is_urgent = False
                # A caller that drives for long opens the gate when it leaves; until then there is nothing to look at.
                self._is_gate_shut = is_same_turn and not is_free
                patience = -1 if self._is_gate_shut else _HESITATION
                seen = self._turns
            if is_mine:
                self._drive_in_background()
            else:
                self._gate.acquire(timeout=patience)
            if is_mine or patience < 0:
                seen = -1  # Why: whoever left or was passed the role may want it (again) at once.

    def _drive_in_background(self) -> None:
        try:
            while self._role is _BACKGROUND:
                self._step(None, None)
                with self.lock:
                    if self._sleepers or self._is_closed or self._is_in_the_way:
                        self._is_in_the_way = False
                        self._role = None
                        self._pass_on()
        except BaseException:  # the pool has given itself up; whoever still waits for its end may drive
            _log.exception("%s: driving failed", self._thread.name)
            with self.lock:
                self._role = None
                self._pass_on()
