"""What a terminal shows after what was written to it, by an emulator."""

from __future__ import annotations

import pyte

__all__ = ["Picture"]

COLUMNS, ROWS = 80, 24


class Picture:
    """The screen of a terminal of 80 columns and 24 rows, and what has scrolled out of it."""

    def __init__(self, text: str) -> None:
        self.screen = pyte.HistoryScreen(COLUMNS, ROWS, history=10_000)
        pyte.Stream(self.screen).feed(text.replace("\r\n", "\n").replace("\n", "\r\n"))

    @property
    def rows(self) -> list[str]:
        """The rows on the screen, the last one last."""
        return [row.rstrip() for row in self.screen.display]

    @property
    def lines(self) -> list[str]:
        """All lines that are not empty, those that have scrolled out as well."""
        past = ["".join(row[column].data for column in range(COLUMNS)) for row in self.screen.history.top]
        return [line.rstrip() for line in [*past, *self.screen.display] if line.strip()]

    @property
    def is_restored(self) -> bool:
        """Whether the terminal scrolls as a whole again and shows its cursor."""
        margins = self.screen.margins
        is_whole = margins is None or (margins.top, margins.bottom) == (0, ROWS - 1)
        return is_whole and not self.screen.cursor.hidden
