"""Progress: on a terminal, on a pipe, and by a function; it never disturbs the batch, and nothing of it is left."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import logging
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from gates import Gate
from jobs import echo, fail, nap, nothing
from pictures import Picture
from scripts import running
from terminals import CTRL_C, on_terminal
from watching import wait_until

from bulkhead import ConfigTypeError, Dispatcher, Job, MapProgress, Pool, Progress
from bulkhead.instrumentation import progress as progress_module

SPEAKING = """
import os, time
from bulkhead import Dispatcher, Job, Pool

def speak(number):
    os.write(1, f"job {number} says hello\\n".encode())
    time.sleep(0.02)

def fail():
    raise ValueError("no luck")

def main():
    pools = [Pool(0, 1, name="wide", backlog=None), Pool(1, 1, name="urgent")]
    with Dispatcher(pools, progress=True) as disp:
        for number in range(30):
            disp.dispatch(Job(speak, number))
            print("the caller says", number, flush=True)
        disp.dispatch(Job(fail))
        disp.barrier(check=False)
        input("waiting")
    print("the end")

if __name__ == "__main__":
    main()
"""

HANGING = """
import time
from bulkhead import Dispatcher, Job, Pool

def main():
    with Dispatcher([Pool(0, 1, name="wide")], progress=True) as disp:
        disp.dispatch(Job(time.sleep, 60))
        disp.barrier()

if __name__ == "__main__":
    main()
"""

ON_A_PIPE = """
import time
from bulkhead import Dispatcher, Job, Pool
from bulkhead.instrumentation import progress

progress._LineView.interval = 0.3  # instead of five seconds

def fail():
    raise ValueError("no luck")

def main():
    with Dispatcher([Pool(0, 1, name="wide", backlog=None)], progress=True) as disp:
        for _ in range(8):
            disp.dispatch(Job(time.sleep, 0.1))
        disp.dispatch(Job(fail))
        disp.barrier(check=False)
        print(sum(disp.map(abs, range(100))))

if __name__ == "__main__":
    main()
"""

MAPPING = """
import time
from bulkhead import Dispatcher, Pool

def main():
    with Dispatcher([Pool(0, 1, name="wide")]) as disp:
        results = disp.map(time.sleep, [0.01] * 100, progress=True)
        print(len(list(results)), "results")
        input("waiting")

if __name__ == "__main__":
    main()
"""


@pytest.fixture(autouse=True)
def _a_terminal_that_can_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


class Seen(list[Any]):
    """Notes what a progress function was called with."""

    def __call__(self, seen: Progress | MapProgress) -> None:
        self.append(seen)


# On a terminal


def test_bars_stay_below_what_jobs_and_caller_print_and_garble_none_of_it() -> None:
    with on_terminal(SPEAKING) as terminal:
        terminal.read_until("31 of 31 so far")
        rows = Picture(terminal.text).rows
        assert rows[-2].startswith("urgent  ")
        assert rows[-1].startswith("wide  ")
        assert "31 of 31 so far  1 failed  0 running  0 waiting" in rows[-1]
        assert not any("so far" in row for row in rows[:-2])

        terminal.press(b"\n")
        picture = Picture(terminal.read_all())

    assert terminal.code == 0
    spoken = [line for line in picture.lines if line.startswith("job ")]
    assert spoken == [f"job {number} says hello" for number in range(30)]
    assert [line for line in picture.lines if line.startswith("the caller")] == [
        f"the caller says {number}" for number in range(30)
    ]
    assert [line.split() for line in picture.lines[-3:]] == [
        ["urgent", "━" * 10, "0", "done", "0", "failed"],
        ["wide", "━" * 10, "31", "done", "1", "failed"],
        ["the", "end"],
    ]
    assert picture.is_restored


def test_ctrl_c_leaves_the_terminal_as_it_was_and_one_traceback() -> None:
    with on_terminal(HANGING) as terminal:
        terminal.read_until("1 running")
        terminal.press(CTRL_C)
        picture = Picture(terminal.read_all())

    assert picture.is_restored
    assert picture.lines[-1] == "KeyboardInterrupt"
    assert next(line for line in picture.lines if "1 cancelled" in line).startswith("wide ")
    assert "\n".join(picture.lines).count("Traceback") == 1


def test_a_map_has_a_bar_of_its_own_with_its_total_and_gives_the_screen_back_at_its_end() -> None:
    with on_terminal(MAPPING) as terminal:
        terminal.read_until("waiting")
        shown = Picture(terminal.text)
        terminal.press(b"\n")
        text = terminal.read_all()

    assert terminal.code == 0
    assert re.search(r"map sleep.*\d+ of 100  .*0 failed.*ETA \d+ s", text)
    assert re.search(r"\n?map sleep +━{10}  100 of 100  0 failed", "\n".join(shown.lines))
    assert shown.is_restored


def test_a_terminal_that_shrinks_to_a_few_rows_shows_what_there_is_room_for() -> None:
    import fcntl
    import struct
    import termios

    with on_terminal(HANGING) as terminal:
        terminal.read_until("1 running")
        before = len(terminal.text)
        fcntl.ioctl(terminal._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 6, 40, 0, 0))
        wait_until(lambda: terminal.read_until("\x1b[1;5r") is None)
        terminal.press(CTRL_C)
        text = terminal.read_all()[before:]

    assert "\x1b[6;1H" in text
    assert "\x1b[r" in text


# On a pipe


def test_where_no_terminal_is_plain_lines_come_to_stderr_and_stdout_stays_the_users() -> None:
    with running(ON_A_PIPE, env={"TERM": "xterm-256color"}) as script:
        assert script.wait() == 0, script.errors()
        lines = script.errors().splitlines()
        assert script.output() == "4950\n"

    assert len(lines) >= 3
    assert all(re.fullmatch(r"bulkhead \d+ s: [\x20-\x7e]+", line) for line in lines)
    assert any(" of 9 so far, 0 failed, 1 running, " in line for line in lines)
    # Nine jobs, and each of the map's items.
    assert lines[-1].endswith("wide, 109 done, 1 failed")


# A function


def test_a_function_gets_frozen_snapshots_and_the_last_one_is_exact() -> None:
    seen = Seen()
    with Dispatcher([Pool(0, 2, name="wide", backlog=None), Pool(1, 1)], progress=seen) as disp:
        for number in range(8):
            disp.dispatch(Job(nap, 0.1))
            disp.dispatch(Job(echo, number).options(priority=1))
        disp.dispatch(Job(fail))
        disp.barrier(check=False)

    assert len(seen) >= 2
    assert [one.is_final for one in seen] == [False] * (len(seen) - 1) + [True]
    urgent, wide = seen[-1].pools
    assert (wide.priority, wide.name, wide.workers) == (0, "wide", 2)
    assert (wide.succeeded, wide.failed, wide.running, wide.waiting) == (8, 1, 0, 0)
    assert (urgent.succeeded, urgent.done, urgent.total) == (8, 8, 8)
    assert any(one.pools[1].running and one.pools[1].waiting and one.pools[1].total == 9 for one in seen)
    with pytest.raises(dataclasses.FrozenInstanceError):
        wide.failed = 0  # type: ignore[misc]


def test_rate_and_time_left_are_those_of_the_jobs_accepted_so_far() -> None:
    seen = Seen()
    with Dispatcher([Pool(0, 1, backlog=None)], progress=seen) as disp:
        for _ in range(12):
            disp.dispatch(Job(nap, 0.1))
        disp.barrier()

    told = [one.pools[0] for one in seen if one.pools[0].eta and one.pools[0].waiting]
    assert told
    for one in told:
        assert 0 < one.rate < 11
        assert one.eta == pytest.approx((one.running + one.waiting) / one.rate)


def test_a_function_that_raises_is_logged_once_and_the_batch_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = []

    def break_down(seen: Progress) -> None:
        calls.append(seen)
        raise RuntimeError("the display is broken")

    with Dispatcher([Pool(0, 1)], progress=break_down) as disp:
        wait_until(lambda: calls and not _display_threads(), "the end of the display")
        assert disp.dispatch(Job(echo, 7)).result() == 7

    assert len(calls) == 1
    [record] = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert "switched off" in record.getMessage()
    assert "the display is broken" in caplog.text


def test_a_function_that_hangs_holds_finalize_up_for_a_moment_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress_module, "_PATIENCE", 0.2)
    release, entered = threading.Event(), threading.Event()

    def hang(_seen: Progress) -> None:
        entered.set()
        release.wait()

    with Dispatcher([Pool(0, 1)], progress=hang) as disp:
        assert entered.wait(20)
        assert disp.dispatch(Job(echo, 7)).result() == 7
    assert "left behind" in caplog.text
    release.set()


def test_a_function_may_look_at_the_dispatcher_and_finalize_it() -> None:
    ended = threading.Event()

    def end_it(_seen: Progress) -> None:
        if not ended.is_set() and disp.stats()[0].idle:
            ended.set()
            disp.finalize()

    disp = Dispatcher([Pool(0, 1)], progress=end_it)
    assert ended.wait(20)
    disp.finalize()
    wait_until(lambda: not _display_threads(), "the end of the display")


# Maps


def test_a_maps_function_is_told_of_items_not_of_chunks() -> None:
    seen = Seen()
    with Dispatcher([Pool(0, 2)]) as disp:
        results = disp.map(_slow_at_the_end, range(3000), progress=seen)
        assert sum(1 for _ in _all_of(results)) == 3000

    assert seen[-1].name == "_slow_at_the_end"
    assert (seen[-1].succeeded, seen[-1].failed, seen[-1].total) == (2999, 1, 3000)
    assert (seen[-1].under_way, seen[-1].eta) == (0, 0.0)
    assert all(one.done + one.under_way <= 3000 for one in seen)
    assert [one.done for one in seen] == sorted(one.done for one in seen)
    assert not _display_threads()


def test_a_map_without_a_length_has_no_total_and_no_time_left() -> None:
    seen = Seen()
    with Dispatcher([Pool(0, 1)]) as disp:
        results = disp.map(_nap_a_little, itertools.count(), progress=seen)
        assert list(itertools.islice(results, 20)) == list(range(20))
        wait_until(lambda: len(seen) >= 2, "two looks")
        results.close()

    assert all(one.total is None and one.eta is None for one in seen)
    assert seen[-1].done >= 20


def test_a_map_that_nobody_reads_on_in_is_shown_no_longer() -> None:
    seen = Seen()
    with Dispatcher([Pool(0, 1)]) as disp:
        for value in disp.map(_nap_a_little, itertools.count(), progress=seen):
            if value == 10:
                break
        gc.collect()  # the iterator is part of a cycle
        wait_until(lambda: not _display_threads(), "the end of the display")
        assert disp.dispatch(Job(echo, 7)).result() == 7


def test_a_map_that_was_never_read_shows_nothing() -> None:
    seen = Seen()
    with Dispatcher([Pool(0, 1)]) as disp:
        disp.map(abs, range(10), progress=seen)
    assert seen == []


def test_a_dispatchers_progress_counts_the_items_of_maps_and_names_the_maps_under_way() -> None:
    seen = Seen()
    with Dispatcher([Pool(0, 2, name="wide")], progress=seen) as disp:
        assert len(list(disp.map(_nap_a_little, range(60)))) == 60
        assert disp.dispatch(Job(echo, 7)).result() == 7

    under_way = [one for shown in seen for one in shown.maps]
    assert {(one.name, one.total) for one in under_way} == {("_nap_a_little", 60)}
    assert seen[-1].maps == ()
    assert (seen[-1].pools[0].succeeded, seen[-1].pools[0].failed) == (61, 0)


def test_items_of_a_worker_that_dies_are_counted_once() -> None:
    seen = Seen()
    with Dispatcher([Pool(0, 2)], progress=seen) as disp:
        results = disp.map(_die_at_70, range(200), chunksize=20, progress=seen)
        assert sum(1 for _ in _all_of(results)) == 200

    pool = seen[-1].pools[0]
    assert (pool.succeeded, pool.failed, pool.cancelled) == (199, 1, 0)
    last = [one for one in seen if isinstance(one, MapProgress)][-1]
    assert (last.succeeded, last.failed) == (199, 1)


# What cannot be


@pytest.mark.parametrize("option", ["yes", 1, None, object()])
def test_another_value_is_refused_before_anything_starts(option: Any) -> None:
    with pytest.raises(ConfigTypeError, match="progress must be True, False or a function"):
        Dispatcher([Pool(0, 1)], progress=option)
    with Dispatcher([Pool(0, 1)]) as disp, pytest.raises(ConfigTypeError, match="progress must be"):
        disp.map(abs, [1], progress=option)


def test_without_rich_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    command = re.escape("pip install 'bulkhead-pool[cli]'")
    with pytest.raises(ImportError, match=command):
        Dispatcher([Pool(0, 1)], progress=True)
    with Dispatcher([Pool(0, 1)]) as disp:
        with pytest.raises(ImportError, match=command):
            disp.map(abs, [1], progress=True)
        assert list(disp.map(abs, [-1], progress=Seen())) == [1]


def test_importing_bulkhead_imports_neither_rich_nor_what_draws() -> None:
    code = "import sys, bulkhead; print([n for n in sys.modules if 'rich' in n or 'instrumentation' in n])"
    with running(code) as script:
        assert script.wait() == 0
        assert script.output() == "[]\n"


def test_a_dispatcher_that_was_dropped_takes_its_display_along() -> None:
    seen = Seen()
    disp = Dispatcher([Pool(0, 1)], progress=seen)
    disp.dispatch(Job(nothing))
    with pytest.warns(ResourceWarning, match="without finalize"):
        del disp
    wait_until(lambda: seen and seen[-1].is_final, "the last picture")
    wait_until(lambda: not _display_threads(), "the end of the display")


def test_progress_ends_when_the_block_is_left_by_an_exception(gate: Gate) -> None:
    seen = Seen()

    def leave_by_an_error() -> None:
        with Dispatcher([Pool(0, 1)], progress=seen) as disp:
            disp.dispatch(gate.job())
            gate.wait_begun(1)
            raise RuntimeError("out")

    with pytest.raises(RuntimeError, match="out"):
        leave_by_an_error()
    assert seen[-1].is_final
    assert seen[-1].pools[0].cancelled == 1
    assert not _display_threads()


def _display_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "bulkhead-progress"]


def _all_of(results: Iterator[Any]) -> Iterator[Any]:
    """Go on after each error, which stands for its item."""
    while True:
        try:
            yield next(results)
        except StopIteration:
            return
        except Exception as error:
            yield error


def _slow_at_the_end(number: int) -> int:
    if number == 1234:
        raise ValueError(number)
    if number > 2990:
        nap(0.05)
    return number


def _nap_a_little(number: int) -> int:
    nap(0.02)
    return number


def _die_at_70(number: int) -> int:
    if number == 70:
        import os

        os._exit(3)
    return number
