"""Bars at the bottom of a terminal, which leave everything else on it alone.

The last rows are taken out of the terminal's scroll region, as apt does. Whatever is printed meanwhile, by the script,
by its worker processes or by C code in them, scrolls above the bars and never meets them; nothing has to be redirected,
and `sys.stdout` stays what it is. A picture is one write, which moves the cursor and puts it back, so no other writer
can come between.

Why not rich's Live: it replaces `sys.stdout` and `sys.stderr` of this process while it draws, and what other processes
print goes through neither. rich makes the bars here.

All displays of this process share the one screen. Its lock is held by their threads alone, never by a pool.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bulkhead.stats import MapProgress, PoolProgress, Progress

__all__ = ["ScreenView", "can_draw", "line_of"]

# At least so many rows stay for everything else.
_ROWS_LEFT = 4

# Columns of names at most; of bars, on a terminal that is so wide and on others.
_NAME_WIDTH = 28
_BAR_WIDTH, _WIDE, _SHORT_BAR = 24, 100, 10

# Seconds that a terminal may take no more before a picture is given up.
_PATIENCE = 1.0

_SAVE, _RESTORE = "\x1b7", "\x1b8"
_WHOLE_REGION = "\x1b[r"
_DOWN = "\x1bD"  # one row down, in the same column; scrolls at the bottom
_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"


def can_draw(stream: Any) -> bool:
    """Tell whether bars can be drawn on the terminal that a stream writes to."""
    try:
        is_terminal = stream is not None and stream.isatty()
        return is_terminal and os.environ.get("TERM", "dumb") != "dumb" and stream.fileno() >= 0
    except (OSError, ValueError):  # closed, or no descriptor behind it
        return False


class ScreenView:
    """One display's part of the screen."""

    interval = 0.0

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False)
        self._fd = sys.stderr.fileno()
        self._screen = _screen_of(self._fd)

    def show(self, seen: Progress | MapProgress, *, is_final: bool) -> None:
        """Draw it; the final picture becomes a part of what was printed."""
        columns = self._screen.size()[0]
        with self._console.capture() as captured:
            self._console.print(_table(seen, columns - 1, is_final=is_final), width=columns - 1)
        encoded = captured.get().rstrip("\n").split("\n")
        if is_final:
            self._screen.drop(self, encoded)
        else:
            self._screen.put(self, encoded)


class _Screen:
    """The last rows of a terminal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()  # guards the rest
        self._blocks: dict[ScreenView, list[str]] = {}
        self._reserved = 0
        self._size = 0, 0

    def size(self) -> tuple[int, int]:
        """Return columns and rows."""
        columns, rows = os.get_terminal_size(self._fd)
        return columns or 80, rows or 24

    def put(self, view: ScreenView, lines: list[str]) -> None:
        """Draw these lines for a view, in the place of those that it had."""
        with self._lock:
            self._blocks[view] = lines
            self._draw("")

    def drop(self, view: ScreenView, last: list[str]) -> None:
        """Take a view off the screen; its last lines are printed where the cursor is."""
        with self._lock:
            self._blocks.pop(view, None)
            columns = self.size()[0]
            # Why the blanks: they run over into the next row unless the cursor is at the beginning of one.
            begin = " " * (columns - 1) + "\r\x1b[K"
            self._draw(begin + "".join(f"{line}\r\n" for line in last))

    def _draw(self, text: str) -> None:
        """Print a text above the bars, and draw them."""
        if not self._is_ours():
            return
        lines = [line for block in self._blocks.values() for line in block]
        size = self.size()
        lines = lines[: max(size[1] - _ROWS_LEFT, 0)]
        parts = []
        if not lines and text:
            parts += [*self._released(), text]
        else:
            if size != self._size or len(lines) != self._reserved:
                parts += [*self._released(), *self._taken(len(lines), size)]
            parts += [text, *_placed(lines, size[1])]
        self._write("".join(parts))

    def _released(self) -> Iterator[str]:
        """Give the rows back, empty."""
        if self._reserved:
            top = self._size[1] - self._reserved + 1
            yield f"{_SAVE}{_WHOLE_REGION}\x1b[{top};1H\x1b[J{_RESTORE}"
        self._reserved = 0

    def _taken(self, number: int, size: tuple[int, int]) -> Iterator[str]:
        """Take so many rows out of the scroll region, with the cursor above them."""
        self._reserved, self._size = number, size
        if number:
            yield f"{_DOWN * number}\x1b[{number}A{_SAVE}\x1b[1;{size[1] - number}r{_RESTORE}"

    def _is_ours(self) -> bool:
        """Tell whether this process is in the terminal's foreground: elsewhere it would draw over what is there."""
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:  # not the controlling terminal
            return True

    def _write(self, text: str) -> None:
        data = text.encode(getattr(sys.stderr, "encoding", None) or "utf-8", "replace")
        give_up = time.monotonic() + _PATIENCE
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                if time.monotonic() > give_up:
                    return
                time.sleep(0.01)


_screens: dict[int, _Screen] = {}


def _screen_of(fd: int) -> _Screen:
    return _screens.setdefault(fd, _Screen(fd))


def _placed(lines: list[str], rows: int) -> Iterator[str]:
    if lines:
        top = rows - len(lines) + 1
        drawn = (f"\x1b[{top + number};1H\x1b[2K{line}" for number, line in enumerate(lines))
        yield f"{_SAVE}{_NO_WRAP}{''.join(drawn)}{_WRAP}{_RESTORE}"


# Words


def line_of(seen: Progress | MapProgress, *, is_final: bool) -> str:
    """Return it as one line of plain text."""
    if isinstance(seen, MapProgress):
        return f"bulkhead: {', '.join([_map_name(seen), *_map_words(seen, is_final)])}"
    parts = [", ".join([one.name, *_pool_words(one, is_final)]) for one in seen.pools]
    parts += [", ".join([_map_name(one), *_map_words(one, is_final)]) for one in seen.maps]
    return f"bulkhead {_duration(seen.elapsed)}: {' | '.join(parts)}"


def _table(seen: Progress | MapProgress, columns: int, *, is_final: bool) -> Table:
    pools = [] if isinstance(seen, MapProgress) else seen.pools
    maps = [seen] if isinstance(seen, MapProgress) else seen.maps
    rows = [(pool.name, pool.done, pool.total, _pool_words(pool, is_final), pool.failed) for pool in pools]
    rows += [
        (_map_name(one), one.done, _map_total(one), _map_words(one, is_final), one.failed) for one in maps
    ]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(
        width=min(max(len(row[0]) for row in rows), _NAME_WIDTH), no_wrap=True, overflow="ellipsis"
    )
    bar_width = _BAR_WIDTH if columns >= _WIDE else _SHORT_BAR
    table.add_column(width=bar_width)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for name, done, total, words, n_failed in rows:
        bar = ProgressBar(total=max(total, 1), completed=done, width=bar_width)
        table.add_row(Text(name, "bold"), bar, _coloured(words, n_failed))
    return table


def _map_total(seen: MapProgress) -> int:
    return seen.done + seen.under_way if seen.total is None else seen.total


def _coloured(words: list[str], n_failed: int) -> Text:
    return Text("  ").join(
        Text(word, "red" if n_failed and word.endswith(" failed") else "") for word in words
    )


def _pool_words(seen: PoolProgress, is_final: bool) -> list[str]:
    words = [f"{seen.done:,} done" if is_final else f"{seen.done:,} of {seen.total:,} so far"]
    words.append(f"{seen.failed:,} failed")
    if seen.cancelled:
        words.append(f"{seen.cancelled:,} cancelled")
    if is_final:
        return words
    words += [f"{seen.running:,} running", f"{seen.waiting:,} waiting", f"{_rate(seen.rate)}/s"]
    if seen.waiting and seen.eta is not None:
        words.append(f"ETA {_duration(seen.eta)}")
    return words


def _map_name(seen: MapProgress) -> str:
    return f"map {seen.name}"


def _map_words(seen: MapProgress, is_final: bool) -> list[str]:
    words = [f"{seen.done:,} of {seen.total:,}" if seen.total is not None else f"{seen.done:,} so far"]
    words.append(f"{seen.failed:,} failed")
    if is_final:
        return words
    words += [f"{seen.under_way:,} under way", f"{_rate(seen.rate)}/s"]
    if seen.eta is not None and seen.done:
        words.append(f"ETA {_duration(seen.eta)}")
    return words


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
