"""Waiting until anybody has changed the file.

SQLite has no way to be told; it only tells cheaply whether there was a change since one looked last. The system tells
when the log is written to (inotify), which every commit does, so that who waits need not look all the time. Of the
threads that wait, one leads: it waits for the system and wakes the others.

- What this process changes wakes its waiting threads at once (`tell`).
- What another process commits is seen within a few milliseconds; where the system has no watch left to give, within 15.
- Under a flood of commits by others each waiting thread is told 100 times a second at most.
- While nothing happens there is no wake-up but that at the end of the wait.

Race: the log is written to before its commit can be seen, by a moment or, with synchronous=full, by as long as the disk
takes. So the leader goes on looking for a while after each write.
"""

from __future__ import annotations

import ctypes
import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["Changes"]

Version = tuple[int, int, int]

# Seconds between two looks where the system does not tell. Why: a job is to be seen within 20 ms.
_POLL = 0.015

# Shortest time in seconds between two changes that are reported, so that a flood of them costs little.
_SPACING = 0.01

# After a write: (seconds since then, seconds between two looks until then).
_EAGER = ((0.01, 0.002), (0.25, _POLL))

# Seconds that closing waits for the thread that leads, which has been woken.
_CLOSING = 1.0

# From <sys/inotify.h>.
_IN_MODIFY, _IN_DELETE_SELF, _IN_MOVE_SELF = 0x2, 0x400, 0x800


class Changes:
    """Lets threads of this process wait for changes of one file.

    Attributes:
        told: Grows with each `tell`.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        # Guards what follows, and writing to the watch; `_leading` may be held when it is taken, not the other way.
        self._changed = threading.Condition(threading.Lock())
        self.told = 0
        self._is_closed = False
        self._handed_on = 0
        # Held by the thread that leads. Closing the watch takes this and `_changed`.
        self._leading = threading.Lock()
        self._watch: _Watch | None = None
        # When a change was reported last. Race: several threads set it; each value is as good as the others.
        self._last_change = 0.0

    def tell(self) -> None:
        """Wake all that wait."""
        with self._changed:
            self.told += 1
            self._changed.notify_all()
            if self._watch is not None:
                self._watch.wake()

    def wait(self, version: Callable[[], Version], seen: Version, timeout: float) -> None:
        """Wait until `version()`, the first part of which is `told`, is no longer `seen`.

        Blocking: `timeout` seconds at most.
        """
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            if (now := version()) != seen:
                self._space_out(is_ours=now[0] != seen[0])
                return
            handed_on = self._handed_on
            if self._leading.acquire(blocking=False):
                try:
                    self._lead(version, seen, deadline)
                finally:
                    self._leading.release()
                    self._hand_on()
            else:
                with self._changed:
                    # Race: who leads may have left since the attempt; then somebody has to take its place.
                    if self.told == seen[0] and self._handed_on == handed_on:
                        self._changed.wait(left)

    def close(self) -> None:
        """Give back the watch. Who still waits goes on with looking now and then."""
        self.tell()
        # Why a limit: a Ctrl-C may have struck between taking this lock and the use of it, which then stays as it is.
        is_alone = self._leading.acquire(timeout=_CLOSING)
        with self._changed:
            self._is_closed = True
            if is_alone:
                self._drop_watch()
                self._leading.release()

    def forget_in_copy(self) -> None:
        """In a forked copy of the process: be as if new."""
        self._changed = threading.Condition(threading.Lock())
        self._leading = threading.Lock()
        # Why close: the copy shares the watch with its parent, and would read what is meant for that.
        self._drop_watch()

    def _hand_on(self) -> None:
        with self._changed:
            self._handed_on += 1
            self._changed.notify_all()

    def _lead(self, version: Callable[[], Version], seen: Version, deadline: float) -> None:
        watch = self._watched()
        written = float("-inf")
        # Invariant: the watch is set before the look, so that no commit falls between them.
        while version() == seen and (left := deadline - time.monotonic()) > 0:
            since = time.monotonic() - written
            pause = next((step for until, step in _EAGER if since < until), left)
            if watch is None:
                time.sleep(min(left, _POLL))
            elif watch.wait(min(left, pause)):
                written = time.monotonic()
                if not watch.set(self._log):
                    watch = None

    def _space_out(self, *, is_ours: bool) -> None:
        pause = self._last_change + _SPACING - time.monotonic()
        if pause > 0 and not is_ours:
            time.sleep(pause)
        self._last_change = time.monotonic()

    def _watched(self) -> _Watch | None:
        with self._changed:
            # Race: a thread may come here when the file has just been closed.
            if self._watch is None and not self._is_closed:
                self._watch = _Watch.made()
        return self._watch if self._watch is not None and self._watch.set(self._log) else None

    def _drop_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()


class _Watch:
    """A watch of the system on one file that can also be woken by a thread."""

    def __init__(self, watching: int, waking: int) -> None:
        self._watching, self._waking = watching, waking
        self._poll = select.poll()
        for descriptor in (watching, waking):
            self._poll.register(descriptor, select.POLLIN)

    @classmethod
    def made(cls) -> _Watch | None:
        """Return a watch, or None where the system has none left to give."""
        watching = _libc().inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if watching < 0:
            return None
        try:
            return cls(watching, os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        except OSError:
            os.close(watching)
            return None

    def set(self, path: Path) -> bool:
        """Watch this file; setting it again on the same file changes nothing."""
        mask = _IN_MODIFY | _IN_DELETE_SELF | _IN_MOVE_SELF
        return bool(_libc().inotify_add_watch(self._watching, os.fsencode(path), mask) >= 0)

    def wait(self, timeout: float) -> bool:
        """Wait for a write or for `wake`; False when there was none in time."""
        ready = self._poll.poll(timeout * 1000)
        for descriptor, _ in ready:
            try:
                os.read(descriptor, 65536)
            except BlockingIOError:
                pass
        return bool(ready)

    def wake(self) -> None:
        """Let `wait` return."""
        try:
            os.eventfd_write(self._waking, 1)
        except BlockingIOError:
            pass  # it has been told 2**64 times

    def close(self) -> None:
        os.close(self._watching)
        os.close(self._waking)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
