"""What becomes of lines and records between the pool and the caller's streams and loggers."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import socket
import sys
import threading

import pytest
from watching import wait_until

from bulkhead.engines.processes import log_records, outlet
from bulkhead.engines.processes.log_records import Levels, current_levels, deliver, packed
from bulkhead.engines.processes.outlet import Lines, Outlet, Record


@pytest.fixture
def made() -> outlet.Outlet:
    """An outlet that is not begun."""
    return Outlet("test-output", "pool 0", lambda: None)


def run(made: Outlet, *entries: Lines) -> None:
    made.begin()
    for entry in entries:
        made.put(entry)
    made.end(20.0)


def test_lines_come_out_in_order_each_with_its_tag(made: Outlet) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        run(
            made,
            Lines("stdout", "a ", b"1\n2\n"),
            Lines("stderr", "b ", b"3\n"),
            Lines("stdout", "c ", b"4\n"),
        )
    assert (out.getvalue(), err.getvalue()) == ("a 1\na 2\nc 4\n", "b 3\n")
    assert made.n_put == made.n_written == 3
    assert made.backlog == 0


def test_lines_that_came_together_are_one_write(made: Outlet) -> None:
    class Counting(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            return super().write(text)

    stream = Counting()
    for number in range(100):
        made.put(Lines("stdout", "", b"%d\n" % number))
    with contextlib.redirect_stdout(stream):
        made.begin()
        made.end(20.0)
    assert stream.getvalue().split() == [str(number) for number in range(100)]
    assert stream.writes == 1


def test_a_handler_that_raises_costs_no_other_record(made: Outlet) -> None:
    class Choosy(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg == 1:
                raise RuntimeError("not this one")
            found.append(record.msg)

    found: list[object] = []
    handler = Choosy()
    logger = logging.getLogger("lab.outlet")
    logger.addHandler(handler)
    try:
        for number in range(4):
            one = logging.LogRecord(logger.name, logging.WARNING, "file", 1, number, None, None)
            made.put(Record(packed(one), {}))
        made.begin()
        made.end(20.0)
    finally:
        logger.removeHandler(handler)
    assert found == [0, 2, 3]
    assert made.n_written == 4


def test_whoever_waits_is_told_of_progress() -> None:
    told = threading.Event()
    made = Outlet("test-output", "pool 0", told.set)
    made.is_awaited = True
    with contextlib.redirect_stdout(io.StringIO()):
        run(made, Lines("stdout", "", b"text\n"))
    assert told.is_set()


def test_what_nobody_takes_is_dropped_beyond_a_bound(made: Outlet, caplog: pytest.LogCaptureFixture) -> None:
    entry = Lines("stdout", "", b"x" * (1 << 20))
    for _ in range(100):
        made.put(entry)
    assert made.n_put == 17
    with contextlib.redirect_stdout(io.StringIO()):
        made.begin()
        made.end(20.0)
    assert caplog.text.count("dropped") == 1


def test_an_outlet_whose_pipe_takes_nothing_ends_in_time_and_leaves_no_thread(
    made: Outlet, caplog: pytest.LogCaptureFixture
) -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb"), os.fdopen(write, "w") as stream, contextlib.redirect_stdout(stream):
        made.begin()
        made.put(Lines("stdout", "", b"x" * 99 + b"\n"))
        wait_until(lambda: made.n_written == 1)
        for _ in range(100):
            made.put(Lines("stdout", "", (b"x" * 99 + b"\n") * 100))
        made.end(0.1)
    assert "blocked" in caplog.text
    assert "test-output" not in [thread.name for thread in threading.enumerate()]


def test_a_stream_that_is_missing_takes_everything(made: Outlet, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        run(made, Lines("stdout", "", b"text\n"))
    assert made.n_written == 1


# Records


def record(msg: object, *args: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("lab", logging.WARNING, "file.py", 7, msg, args, None, "work")
    made.__dict__.update(extra)
    return made


def arrived(data: bytes, caplog: pytest.LogCaptureFixture) -> logging.LogRecord:
    caplog.clear()
    deliver(data, {"job_id": 4})
    (found,) = caplog.records
    return found


def test_a_plain_record_arrives_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    found = arrived(packed(record("%s of %d", "one", 2, room="b")), caplog)
    assert (found.getMessage(), found.args, found.room, found.job_id) == ("one of 2", ("one", 2), "b", 4)  # type: ignore[attr-defined]
    assert (found.lineno, found.funcName, found.levelno) == (7, "work", logging.WARNING)


def test_arguments_by_name_arrive_too(caplog: pytest.LogCaptureFixture) -> None:
    assert arrived(packed(record("%(a)s", {"a": 1})), caplog).getMessage() == "1"
    assert arrived(packed(record("%(a)s", {"a": object()})), caplog).getMessage().startswith("<object")


def test_what_raises_when_it_is_made_text_arrives_as_the_name_of_its_type(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Mute:
        def __repr__(self) -> str:
            raise ZeroDivisionError

    assert "Mute>" in arrived(packed(record(Mute())), caplog).getMessage()


def test_a_record_that_a_handler_has_formatted_before_is_formatted_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = record("text")
    logging.Formatter("%(asctime)s").format(made)
    fields, _ = pickle.loads(packed(made))
    assert "asctime" not in fields
    assert "message" not in fields


def test_levels_are_those_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lab.levels"), "level", logging.INFO)
    levels = current_levels()
    assert levels.root == logging.root.level
    assert levels.named["lab.levels"] == logging.INFO
    assert "lab.not.there" not in levels.named
    assert pickle.loads(pickle.dumps(levels)) == levels
    assert isinstance(levels, Levels)


def test_a_record_with_a_huge_int_is_sent_and_shortened(caplog: pytest.LogCaptureFixture) -> None:
    made = record("text")
    made.big = 10**400_000
    assert len(packed(made)) > log_records.MESSAGE
    found = arrived(log_records._shortened(made), caplog)
    assert found.getMessage().startswith("text")


def test_a_record_of_a_logger_without_a_proper_name_costs_its_job_nothing() -> None:
    left, right = socket.socketpair()
    with left, right:
        made = record("text")
        made.name = 5  # type: ignore[assignment]
        log_records._Sender(left).emit(made)


def test_a_message_fits_into_a_socket_with_room_for_a_second_one() -> None:
    assert len(log_records._shortened(record("ä" * 10**6))) < log_records.MESSAGE // 2
