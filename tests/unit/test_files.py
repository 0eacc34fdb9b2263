"""A file is replaced as a whole or not at all."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bulkhead.instrumentation.files import write_whole
from bulkhead.instrumentation.timeline import Timeline


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """As on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_cannot_be_written_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("the old one")
    with no_file_larger_than(4096), pytest.raises(OSError, match="large"):
        write_whole(page, "x" * 10_000)
    assert page.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [page]


def test_a_page_and_a_trace_that_cannot_be_written_leave_the_old_ones(tmp_path: Path) -> None:
    page, trace = tmp_path / "page.html", tmp_path / "trace.json"
    timeline = Timeline(datetime.now(UTC), 0.0, (), (), (), ())
    for path, save in ((page, timeline.save_html), (trace, timeline.save_chrome_trace)):
        path.write_text("the old one")
        with no_file_larger_than(16), pytest.raises(OSError, match="large"):
            save(path)
        assert path.read_text() == "the old one"


def test_a_new_file_has_the_mode_of_any_other_and_a_replaced_one_keeps_its_own(tmp_path: Path) -> None:
    other, page = tmp_path / "other", tmp_path / "page"
    other.touch()
    write_whole(page, "first")
    assert page.stat().st_mode == other.stat().st_mode
    page.chmod(0o640)
    write_whole(str(page), "second")
    assert (page.read_text(), page.stat().st_mode & 0o777) == ("second", 0o640)


def test_a_link_stays_one(tmp_path: Path) -> None:
    page, link = tmp_path / "page", tmp_path / "link"
    link.symlink_to(page)
    for text in ("first", "second"):
        write_whole(link, text)
        assert link.is_symlink()
        assert page.read_text() == text


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write_whole(pipe, "text")
    reader.join()
    assert found == ["text"]
    assert pipe.is_fifo()
