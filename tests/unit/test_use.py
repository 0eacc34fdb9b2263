"""What a worker counts and measures of itself, and how the memory of a process is found out."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from leaking_jobs import resident
from watching import wait_until

from bulkhead import ConfigError
from bulkhead.engines.processes import blackbox, memory, use
from bulkhead.engines.processes.use import UseLimits, WorkerUse

MIB = memory.MIB


class Scales:
    """Stands in for what measures this process: says what it is told to, and counts how often it is asked."""

    def __init__(self, *readings: int) -> None:
        self.readings = list(readings)
        self.asked = 0

    def __call__(self, pid: int) -> int:
        assert pid == os.getpid()
        self.asked += 1
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]


class Clock:
    """Stands in for the `time` module."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def box() -> Iterator[tuple[blackbox.BlackBox, blackbox.ReadMark]]:
    fd = blackbox.create()
    written, read = blackbox.BlackBox(fd), blackbox.ReadMark(fd)
    os.close(fd)
    yield written, read
    read.close()
    written._map.close()


def weigh(monkeypatch: pytest.MonkeyPatch, *readings: int) -> Scales:
    scales = Scales(*readings)
    monkeypatch.setattr(use, "rss_of", scales)
    return scales


def test_jobs_and_bytes_are_read_where_the_worker_has_noted_them(
    box: tuple[blackbox.BlackBox, blackbox.ReadMark], monkeypatch: pytest.MonkeyPatch
) -> None:
    weigh(monkeypatch, 5 * MIB)
    mine = WorkerUse(UseLimits(10, 9 * MIB, None), box[0])
    assert box[1].use() == (0, 0)
    mine.count(1)
    mine.count(3)
    mine.report()
    assert box[1].use() == (4, 5 * MIB)
    box[0].record("what the job prints " * 1000)
    box[0].note_read(7)
    assert box[1].use() == (4, 5 * MIB), "nothing else is written there"


def test_nobody_measures_where_jobs_alone_are_limited(
    box: tuple[blackbox.BlackBox, blackbox.ReadMark], monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = weigh(monkeypatch, 5 * MIB)
    mine = WorkerUse(UseLimits(10, None, None), box[0])
    mine.count(1)
    mine.report()
    assert not mine.is_heavy()
    assert box[1].use() == (1, 0)
    assert scales.asked == 0


def test_as_many_items_are_left_as_the_limit_leaves_and_one_at_least(
    box: tuple[blackbox.BlackBox, blackbox.ReadMark],
) -> None:
    mine = WorkerUse(UseLimits(10, None, None), box[0])
    assert mine.jobs_left == 10
    mine.count(7)
    assert mine.jobs_left == 3
    mine.count(7)
    assert mine.jobs_left == 1
    assert WorkerUse(UseLimits(None, None, 1 << 50), box[0]).jobs_left is None


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        (UseLimits(None, 4 * MIB, None), "max_memory_per_worker=4194304"),
        (UseLimits(1, 4 * MIB, 9 * MIB), "max_memory_per_worker=4194304"),
        (UseLimits(None, None, 4 * MIB), "hard_memory_limit=4194304"),
    ],
)
def test_a_worker_that_takes_too_much_before_its_first_job_says_so_with_the_figures(
    box: tuple[blackbox.BlackBox, blackbox.ReadMark],
    monkeypatch: pytest.MonkeyPatch,
    limits: UseLimits,
    name: str,
) -> None:
    weigh(monkeypatch, 5 * MIB)
    with pytest.raises(ConfigError, match=rf"{name} \(4\.0 MiB\) is less .* 5\.0 MiB"):
        WorkerUse(limits, box[0])


def test_garbage_is_collected_before_a_worker_is_called_heavy(
    box: tuple[blackbox.BlackBox, blackbox.ReadMark], monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = []
    monkeypatch.setattr("gc.collect", lambda: collected.append(True))
    weigh(monkeypatch, MIB, 9 * MIB, 3 * MIB, 4 * MIB)
    mine = WorkerUse(UseLimits(None, 5 * MIB, None), box[0])
    mine.report()
    assert (box[1].use(), collected) == ((0, 3 * MIB), [True])
    mine.report()
    assert (box[1].use(), collected) == ((0, 4 * MIB), [True])


def test_between_items_memory_is_looked_at_once_a_millisecond_and_less_often_after_garbage_had_to_be_collected(
    box: tuple[blackbox.BlackBox, blackbox.ReadMark], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(use, "time", clock)
    scales = weigh(monkeypatch, MIB)
    mine = WorkerUse(UseLimits(None, 5 * MIB, None), box[0])
    scales.asked = 0
    for _ in range(100):
        assert not mine.is_heavy()
        clock.now += 0.0001
    assert 9 <= scales.asked <= 11

    def collect() -> None:
        clock.now += 0.1

    monkeypatch.setattr("gc.collect", collect)
    scales.readings = [9 * MIB, MIB]
    scales.asked = 0
    clock.now += 1.0
    for _ in range(1000):
        assert not mine.is_heavy()
        clock.now += 0.0019
    assert scales.asked == 2, "no second look within two seconds"
    scales.readings = [9 * MIB]
    clock.now += 1.0
    assert mine.is_heavy()


# How memory is found out


@pytest.fixture(params=["by /proc", "by psutil"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to find out; psutil alone where there is no /proc."""
    if request.param == "by psutil":
        monkeypatch.setattr(memory, "_HAS_STATM", False)
        monkeypatch.setattr(memory, "_HAS_CHILDREN", False)
        monkeypatch.setattr(memory, "_HAS_ROLLUP", False)
    elif not memory._HAS_STATM:
        pytest.skip("there is no /proc")
    return request.param


GROW = "import sys; data = bytearray(b'x') * (64 << 20); print('ready', flush=True); sys.stdin.read()"
FAMILY = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.read()"


def test_memory_of_its_own_is_what_a_process_has_filled(way: str) -> None:
    with _running(GROW) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        for measure in (memory.rss_of, memory.private_bytes_of):
            assert 64 * MIB < measure(child.pid) < 100 * MIB
    for measure in (memory.rss_of, memory.private_bytes_of):
        assert measure(child.pid) == 0, "there is no such process"


def test_pages_of_files_are_not_memory_of_its_own() -> None:
    if not memory._HAS_STATM:
        pytest.skip("only the whole resident set is known here")
    before = memory.rss_of(os.getpid())
    with resident(32 * MIB):
        assert memory.rss_of(os.getpid()) - before > 30 * MIB
    fd = blackbox.create_file("pages")
    try:
        import mmap

        os.ftruncate(fd, 64 * MIB)
        with mmap.mmap(fd, 64 * MIB) as mapped:
            before = memory.rss_of(os.getpid())
            for start in range(0, 64 * MIB, 4096):
                mapped[start] = 1
            assert memory.rss_of(os.getpid()) - before < 16 * MIB
    finally:
        os.close(fd)


def test_descendants_are_the_children_and_theirs(way: str) -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {FAMILY!r}], stdin=0)"
    with _running(code) as child:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        found = memory.descendants_of(child.pid)
        assert len(found) == 2
        assert grandchild in found
        for pid in found:
            os.kill(pid, 9)
        wait_until(lambda: child.poll() is not None)
    assert memory.descendants_of(child.pid) == []


def _running(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_measuring_takes_microseconds() -> None:
    if not memory._HAS_STATM:
        pytest.skip("there is no /proc")
    pid, took = os.getpid(), []
    for _ in range(200):
        began = time.perf_counter()
        memory.rss_of(pid)
        took.append(time.perf_counter() - began)
    print(f"a look takes {sorted(took)[100] * 1e6:.1f} us")
    assert min(took) < 200e-6
