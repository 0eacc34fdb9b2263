"""Waiting for descriptors: epoll where there is one, else what `selectors` offers, behind the same four calls."""

from __future__ import annotations

import os
import select
import selectors

__all__ = ["READABLE", "WRITABLE", "Alarm", "Poller", "make_poller"]

READABLE = 1  # select.EPOLLIN
WRITABLE = 4  # select.EPOLLOUT


class _Selector:
    """The calls of `select.epoll` that are used here, over `selectors`.

    Concurrency: other threads may register while one polls; kqueue takes that as epoll does, for the rest the pool
    wakes the polling thread after each registration.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def register(self, fd: int, mask: int) -> None:
        events = selectors.EVENT_READ if mask & READABLE else selectors.EVENT_WRITE
        self._selector.register(fd, events)

    def unregister(self, fd: int) -> None:
        self._selector.unregister(fd)

    def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
        found = self._selector.select(timeout)
        return [(key.fd, READABLE if mask & selectors.EVENT_READ else WRITABLE) for key, mask in found]

    def close(self) -> None:
        self._selector.close()


if hasattr(select, "epoll"):
    Poller = select.epoll
else:
    Poller = _Selector  # type: ignore[misc, assignment]


def make_poller() -> select.epoll:
    """Return a new, empty poller."""
    return Poller()


class Alarm:
    """A descriptor that another thread can make readable, to end a poll early."""

    def __init__(self) -> None:
        if hasattr(os, "eventfd"):
            self.fd = self._write_end = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        else:
            self.fd, self._write_end = os.pipe()
            os.set_blocking(self.fd, False)
            os.set_blocking(self._write_end, False)

    def ring(self) -> None:
        """Make the descriptor readable."""
        if self.fd < 0:
            return
        try:
            os.write(self._write_end, b"\1\0\0\0\0\0\0\0")
        except BlockingIOError:
            pass  # it rings already

    def silence(self) -> None:
        """Make the descriptor unreadable again."""
        try:
            os.read(self.fd, 4096)
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            if self._write_end != self.fd:
                os.close(self._write_end)
            os.close(self.fd)
            self.fd = -1
