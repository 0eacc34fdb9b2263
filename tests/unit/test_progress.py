"""Records in shared memory: what has ended survives its worker, and no half of a record is ever read."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator

import pytest

from bulkhead.engines.processes import blackbox
from bulkhead.engines.processes.progress import (
    BEGAN,
    ERROR,
    NOBODY,
    RUNNING,
    VALUE,
    VALUES,
    Progress,
    record,
    records_in,
)

ROOM = blackbox.PROGRESS_SIZE


@pytest.fixture
def box() -> Iterator[int]:
    fd = blackbox.create()
    yield fd
    os.close(fd)


@pytest.fixture
def worker(box: int) -> Iterator[Progress]:
    progress = Progress.in_box(box)
    yield progress
    progress.close()


@pytest.fixture
def caller(box: int) -> Iterator[Progress]:
    mark = blackbox.ReadMark(box)
    progress = Progress(mark.halves[0])
    yield progress
    progress.close()
    mark.close()


def read(progress: Progress, message: int) -> list[tuple[int, int, int, bytes]]:
    return [(first, n, kind, bytes(body)) for first, n, kind, body in progress.records(message)]


def test_the_caller_reads_what_the_worker_has_recorded(worker: Progress, caller: Progress) -> None:
    worker.begin(7)
    assert worker.add(record(0, 3, VALUES, b"abc"))
    assert worker.add(record(3, 1, ERROR, b""))
    assert worker.add(record(4, 1, VALUE, b"\0" * 1000))
    assert read(caller, 7) == [(0, 3, VALUES, b"abc"), (3, 1, ERROR, b""), (4, 1, VALUE, b"\0" * 1000)]


def test_records_of_another_message_are_not_read(worker: Progress, caller: Progress) -> None:
    worker.begin(7)
    worker.add(record(0, 1, VALUE, b"of 7"))
    assert read(caller, 6) == read(caller, 8) == []
    assert caller.running(8) is None
    worker.begin(8)
    assert read(caller, 7) == read(caller, 8) == []


def test_nothing_has_begun_in_a_new_box(caller: Progress) -> None:
    assert caller.running(1) is None
    assert read(caller, 1) == []
    assert not caller.is_stopped(1)


def test_the_running_item_and_its_start_are_seen(worker: Progress, caller: Progress) -> None:
    marks = worker.begin(7)
    running = caller.running(7)
    assert running is not None
    assert running[0] == NOBODY
    marks[BEGAN] = 12_500_000_000
    marks[RUNNING] = 3
    assert caller.running(7) == (3, 12.5)
    worker.begin(8)
    assert caller.running(7) is None


def test_a_wish_to_stop_is_for_one_message_and_may_come_before_it(worker: Progress, caller: Progress) -> None:
    caller.stop(7)
    worker.begin(7)
    assert worker.is_stopped(7)
    worker.begin(8)
    assert not worker.is_stopped(8)


def test_what_has_no_room_is_refused_and_what_was_there_stays(worker: Progress, caller: Progress) -> None:
    worker.begin(7)
    assert not worker.add(record(0, 1, VALUE, bytes(ROOM)))
    n = 0
    while worker.add(record(n, 1, VALUE, bytes(100_000))):
        n += 1
    assert n == ROOM // 100_100
    assert worker.add(record(n, 1, VALUE, b"small"))
    found = read(caller, 7)
    assert [first for first, *_ in found] == list(range(n + 1))
    assert found[-1][3] == b"small"
    worker.begin(8)
    assert worker.add(record(0, 1, VALUE, bytes(ROOM // 2)))


def test_a_record_may_fill_the_room_to_the_last_byte(worker: Progress, caller: Progress) -> None:
    worker.begin(7)
    size = 0
    for size in range(ROOM, 0, -1):
        if worker.add(record(0, 1, VALUE, bytes(size))):
            break
    assert ROOM - size < 200
    assert not worker.add(record(1, 1, VALUE, b""))
    assert [len(body) for *_, body in read(caller, 7)] == [size]


def test_a_writer_killed_at_any_moment_leaves_whole_records(box: int, caller: Progress) -> None:
    for turn in range(1, 30):
        pid = os.fork()
        if pid == 0:
            progress = Progress.in_box(box)
            progress.begin(turn)
            for number in range(10**9):
                if not progress.add(record(number, 1, VALUE, pickle.dumps("x" * number))):
                    progress.begin(turn)
        while len(caller.records(turn)) < turn:
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = read(caller, turn)
        for first, n, kind, body in found:
            assert (n, kind) == (1, VALUE)
            assert pickle.loads(body) == "x" * first
        numbers = [first for first, *_ in found]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True


def test_records_are_found_one_behind_the_other() -> None:
    data = record(0, 2, VALUES, b"ab") + record(2, 1, ERROR, b"") + record(2**40, 1, VALUE, b"c")
    found = [(first, n, kind, bytes(body)) for first, n, kind, body in records_in(memoryview(data))]
    assert found == [(0, 2, VALUES, b"ab"), (2, 1, ERROR, b""), (2**40, 1, VALUE, b"c")]
    assert list(records_in(memoryview(b""))) == []
