"""Live progress: bars on a terminal, lines elsewhere, or a call of the user's.

Nothing here is on the way of a job. One thread for each display looks at the counters of the pools a few times in a
second (`ProcessPool.counts`, some microseconds under the pool's lock) and draws what it has seen. So a display costs
the same however many jobs there are, and what goes wrong in it (a callback that raises, a terminal that is gone) ends
the display and nothing else.

    pools, maps ── counts ──▶ Sampler ── Progress ──▶ Show (thread) ──▶ view: screen.py, LineView, CallbackView

Guarantees: a display has drawn its last picture and its thread has ended when `end` returns, unless what it draws on
takes no more for `_PATIENCE` seconds.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from bulkhead.errors import ConfigTypeError
from bulkhead.stats import MapProgress, PoolProgress, Progress
from bulkhead.tally import MapTally

if TYPE_CHECKING:
    from bulkhead.engines.processes.snapshot import Counts

__all__ = ["Displays", "checked"]

_log = logging.getLogger("bulkhead")

# Seconds between two looks for bars and callbacks, and between two lines where there is no terminal.
_INTERVAL = 0.2
_LINE_INTERVAL = 5.0

# Rates are those of so many seconds.
_WINDOW = 10.0

# Longest wait for the end of a display (seconds).
_PATIENCE = 2.0

Option = bool | Callable[[Any], object]
Seen = Progress | MapProgress


class Countable(Protocol):
    """What is asked of a pool."""

    @property
    def config(self) -> Any: ...
    def counts(self) -> Counts: ...


class View(Protocol):
    """Where a display is seen. Owner: the display's thread."""

    interval: float

    def show(self, seen: Seen, *, is_final: bool) -> None: ...


def checked(option: object) -> Option:
    """Return the option `progress`.

    Raises:
        ConfigTypeError: It is neither a bool nor a function.
        ImportError: It is True, and rich is not installed.
    """
    if not isinstance(option, bool):
        if callable(option):
            return option
        raise ConfigTypeError(f"progress must be True, False or a function, not {option!r}")
    if option and importlib.util.find_spec("rich") is None:
        raise ImportError("progress=True needs rich: pip install 'bulkhead-pool[cli]'")
    return option


class Displays:
    """The displays of one dispatcher: one of its pools, and those of its maps that have one of their own.

    Concurrency: any thread.
    """

    def __init__(self, pools: Iterable[Countable]) -> None:
        self._sampler = _Sampler(pools)
        self._main: _Show | None = None
        self._is_main_drawn = (
            False  # whether that one is on a terminal or in lines, so that a map has a bar there
        )
        self._running: set[_Show] = set()
        self._is_over = False

    def begin(self, option: Option) -> None:
        """Begin to show the pools, if that is wanted."""
        if option is not False:
            self._is_main_drawn = option is True
            view: View = _drawn() if option is True else _CallbackView(option)
            self._main = _Show(self._sampler.progress, view)
            self._start(self._main)

    def map(self, option: Option) -> Callable[[MapTally], MapDisplay]:
        """Return what makes the display of a map."""

        def make(tally: MapTally) -> MapDisplay:
            show: _Show | None = None
            if option is not False and not (option is True and self._is_main_drawn):
                view = _drawn() if option is True else _CallbackView(option)
                show = _Show(_MapSampler(tally).map_progress, view)
            return MapDisplay(self, _MapSampler(tally), show)

        return make

    def end(self) -> None:
        """End all displays. Blocking: `_PATIENCE` seconds at most for each."""
        self._is_over = True
        for show in list(self._running):
            show.end()
            self._running.discard(show)

    def cut(self) -> None:
        """Let all displays end soon. Does not wait."""
        self._is_over = True
        for show in list(self._running):
            show.cut()

    def _start(self, show: _Show) -> None:
        self._running.add(show)
        show.begin()
        # Race: `end` looks at the set after it has set `_is_over`; so one of the two sees the other.
        if self._is_over:
            show.end()
            self._running.discard(show)


class MapDisplay:
    """What is seen of one map: its bar in the display of its dispatcher, and a display of its own if it has one."""

    def __init__(self, displays: Displays, sample: _MapSampler, show: _Show | None) -> None:
        self._displays = displays
        self._sample = sample
        self._show = show
        self._is_begun = self._is_ended = False

    def begin(self) -> None:
        """Show it from now on; does nothing the second time."""
        if self._is_begun:
            return
        self._is_begun = True
        self._displays._sampler.maps[self._sample] = None
        if self._show is not None:
            self._displays._start(self._show)

    def end(self, *, is_waiting: bool = True) -> None:
        """Show its end; does nothing the second time.

        Args:
            is_waiting: Wait until that is seen. False is safe inside the garbage collector.
        """
        if self._is_ended or not self._is_begun:
            return
        self._is_ended = True
        self._displays._sampler.maps.pop(self._sample, None)
        if self._show is not None:
            if is_waiting:
                self._show.end()
                self._displays._running.discard(self._show)
            else:
                self._show.cut()


class _Show:
    """Looks and shows, in a thread of its own."""

    def __init__(self, look: Callable[[bool], Seen], view: View) -> None:
        self._look = look
        self._view = view
        self._stop = threading.Event()
        self._is_cut = False
        self._thread = threading.Thread(target=self._run, name="bulkhead-progress", daemon=True)

    def begin(self) -> None:
        """Begin to look."""
        self._thread.start()

    def cut(self) -> None:
        """Let it end soon. Safe inside the garbage collector."""
        # Why not Event.set: it takes a lock that the interrupted thread may hold.
        self._is_cut = True

    def end(self) -> None:
        """Let it show the last picture and end. Safe from its own thread, which a callback has."""
        self._stop.set()
        # Race: one that another thread is about to begin finds the stop, and is ended by that thread as well.
        if threading.current_thread() is self._thread or not self._thread.ident:
            return
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            _log.warning("the progress display has not ended within %s s and is left behind", _PATIENCE)

    def _run(self) -> None:
        next_look = time.monotonic() + self._view.interval
        is_final = False
        try:
            while not is_final:
                is_final = self._stop.wait(_INTERVAL) or self._is_cut
                if is_final or time.monotonic() >= next_look:
                    next_look = time.monotonic() + self._view.interval * 0.9
                    self._view.show(self._look(is_final), is_final=is_final)
        except BaseException:
            _log.exception("the progress display has failed and is switched off; the jobs go on")


class _Rate:
    """Ends per second over the last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def of(self, now: float, done: int) -> float:
        """Return the rate, with `done` ends at `now`."""
        seen = self._seen
        seen.append((now, done))
        while len(seen) > 2 and seen[1][0] < now - _WINDOW:
            seen.popleft()
        then, done_then = seen[0]
        return (done - done_then) / (now - then) if now - then > 0.05 else 0.0


class _Sampler:
    """Looks at the pools and at the maps under way. Owner: the display's thread, but for `maps`, to which any adds."""

    def __init__(self, pools: Iterable[Countable]) -> None:
        self._pools = [(pool, _Rate()) for pool in pools]
        self._began = time.monotonic()
        self.maps: dict[_MapSampler, None] = {}
        for pool, rate in self._pools:
            rate.of(self._began, self._done(pool))

    def progress(self, is_final: bool) -> Progress:
        """Return how far everything is."""
        now = time.monotonic()
        return Progress(
            elapsed=now - self._began,
            pools=tuple(self._pool(pool, rate, now) for pool, rate in self._pools),
            maps=tuple(one.map_progress(is_final) for one in list(self.maps)),
            is_final=is_final,
        )

    def _pool(self, pool: Countable, rate: _Rate, now: float) -> PoolProgress:
        seen = pool.counts()
        config = pool.config
        per_second = rate.of(now, seen.succeeded + seen.failed + seen.cancelled)
        left = seen.running + seen.waiting
        return PoolProgress(
            config.priority, config.label, config.n_workers, *seen, per_second, _eta(left, per_second)
        )

    def _done(self, pool: Countable) -> int:
        seen = pool.counts()
        return seen.succeeded + seen.failed + seen.cancelled


class _MapSampler:
    """Looks at one map. Owner: the thread of one display."""

    def __init__(self, tally: MapTally) -> None:
        self._tally = tally
        self._rate = _Rate()
        self._rate.of(time.monotonic(), 0)

    def map_progress(self, _is_final: bool) -> MapProgress:
        """Return how far it is."""
        tally = self._tally
        failed = tally.failed + tally.n_unsent
        done = tally.succeeded + failed
        per_second = self._rate.of(time.monotonic(), done)
        return MapProgress(
            tally.name,
            tally.priority,
            tally.succeeded,
            failed,
            max(tally.n_read - done, 0),
            tally.total,
            per_second,
            None if tally.total is None else _eta(max(tally.total - done, 0), per_second),
        )


def _eta(left: int, per_second: float) -> float | None:
    if left == 0:
        return 0.0
    return left / per_second if per_second > 0 else None


# Views


class _CallbackView:
    """Calls a function of the user's."""

    interval = _INTERVAL

    def __init__(self, call: Callable[[Any], object]) -> None:
        self._call = call

    def show(self, seen: Seen, *, is_final: bool) -> None:
        self._call(seen)


class _LineView:
    """Prints a line now and then: for pipes and files."""

    interval = _LINE_INTERVAL

    def show(self, seen: Seen, *, is_final: bool) -> None:
        from bulkhead.instrumentation.screen import line_of

        stream = sys.stderr
        if stream is not None:
            stream.write(f"{line_of(seen, is_final=is_final)}\n")
            stream.flush()


def _drawn() -> View:
    """Return the view that fits where standard error goes."""
    from bulkhead.instrumentation.screen import ScreenView, can_draw

    return ScreenView() if can_draw(sys.stderr) else _LineView()
