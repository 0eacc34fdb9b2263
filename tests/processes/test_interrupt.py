"""Ctrl-C on a terminal: one KeyboardInterrupt in the caller, silence from the workers, all ended soon (C8)."""

from __future__ import annotations

import signal
import time

import pytest
from terminals import CTRL_C, Terminal, on_terminal
from watching import alive, wait_until

# The promise: everything has ended so long after the key was pressed (seconds).
PROMISE = 2.0

SCRIPT = """
import sys, threading, time
from pathlib import Path
import faulty_jobs
from bulkhead import Dispatcher, Job, Pool
from watching import wait_until, wait_until_whole

def announce_when(condition):
    def announce():
        wait_until(condition)
        print("ready", flush=True)
    threading.Thread(target=announce, daemon=True).start()

def waits_in(name):
    frames, main = sys._current_frames(), threading.main_thread().ident
    frame, names = frames[main], []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return name in names and "wait" in names

def run(disp):
{body}

if __name__ == "__main__":
{main}
"""

WITH = """\
    with Dispatcher([Pool(0, 2, start_method={method!r}), Pool(1, 1, start_method={method!r})]) as disp:
        run(disp)
"""

BARE = """\
    disp = Dispatcher([Pool(0, 2, start_method={method!r}), Pool(1, 1, start_method={method!r})])
    run(disp)
"""

BUSY = """\
    wait_until_whole(disp, 0)
    wait_until_whole(disp, 1)
    trackers = []
    for number, hang in enumerate(({jobs})):
        began = Path(f"began {{number}}")
        trackers.append(disp.dispatch(Job(faulty_jobs.note_and_call, began, hang).options(priority=0)))
        wait_until(began.exists)
"""

WHILE = {
    "dispatch": """\
    announce_when(lambda: waits_in("dispatch"))
    disp.dispatch(Job(faulty_jobs.double, 4).options(priority=0))
""",
    "dispatch_all": """\
    announce_when(lambda: waits_in("run"))
    for _ in disp.dispatch_all(Job(faulty_jobs.double, n).options(priority=0) for n in range(9)):
        pass
""",
    "barrier": """\
    announce_when(lambda: waits_in("barrier"))
    disp.barrier()
""",
    "result": """\
    announce_when(lambda: waits_in("result"))
    trackers[0].result()
""",
    "wait": """\
    announce_when(lambda: waits_in("run"))
    trackers[0].wait(1000)
""",
    "finalize": """\
    announce_when(lambda: waits_in("finalize"))
    disp.finalize()
""",
    "own code": """\
    print("ready", flush=True)
    time.sleep(10**6)
""",
}

SLEEPERS = "faulty_jobs.sleep_in_c, faulty_jobs.sleep_with_gil"


def script(place: str, *, method: str = "forkserver", jobs: str = SLEEPERS, main: str = WITH) -> str:
    body = BUSY.format(jobs=jobs) + WHILE[place]
    return SCRIPT.format(body=body, main=main.format(method=method))


def assert_clean_interrupt(terminal: Terminal) -> None:
    """Press Ctrl-C; nothing but one traceback may appear, and nothing may be left."""
    terminal.read_until("ready\n")
    family = terminal.family()
    assert len(family) >= 6
    terminal.press(CTRL_C)
    pressed = time.monotonic()
    text = terminal.read_all()
    wait_until(lambda: not alive(family), within=PROMISE)
    took = time.monotonic() - pressed
    assert took < PROMISE, f"took {took:.2f} s\n{text}"
    after = text.split("ready\n", 1)[1]
    assert after.startswith(
        ("^CTraceback (most recent call last):\n", "^C\nTraceback (most recent call last):\n")
    ), text
    assert after.count("Traceback") == 1, text
    assert after.count("During handling") == 0, text
    assert after.endswith("\nKeyboardInterrupt\n"), text
    assert terminal.code == -signal.SIGINT


@pytest.mark.parametrize("place", list(WHILE))
def test_ctrl_c_gives_one_traceback_of_the_caller_and_ends_everything(place: str) -> None:
    with on_terminal(script(place)) as terminal:
        assert_clean_interrupt(terminal)


@pytest.mark.parametrize("place", ["dispatch", "barrier"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_ctrl_c_is_clean_under_every_start_method(method: str, place: str) -> None:
    with on_terminal(script(place, method=method)) as terminal:
        assert_clean_interrupt(terminal)


@pytest.mark.parametrize("place", ["barrier", "own code"])
def test_ctrl_c_is_clean_in_a_script_that_never_finalizes(place: str) -> None:
    with on_terminal(script(place, main=BARE)) as terminal:
        assert_clean_interrupt(terminal)


def test_ctrl_c_ends_jobs_that_ignore_sigterm_too() -> None:
    jobs = "faulty_jobs.ignore_sigterm, faulty_jobs.block_sigterm"
    with on_terminal(script("barrier", jobs=jobs)) as terminal:
        assert_clean_interrupt(terminal)


AT_ONCE = """\
    print("ready", flush=True)
    disp.dispatch(Job(faulty_jobs.sleep_in_c).options(priority=0)).result()
"""


def test_ctrl_c_right_after_the_start_is_clean() -> None:
    code = SCRIPT.format(body=AT_ONCE, main=WITH.format(method="forkserver"))
    with on_terminal(code) as terminal:
        terminal.read_until("ready\n")
        terminal.press(CTRL_C)
        text = terminal.read_all(PROMISE)
        assert text.count("Traceback") == 1
        assert text.endswith("\nKeyboardInterrupt\n")


AGAIN_AND_AGAIN = """
import time
import faulty_jobs
from bulkhead import Dispatcher, Job

if __name__ == "__main__":
    with Dispatcher([(0, 2), (1, 1)]) as disp:
        slow = disp.dispatch(Job(faulty_jobs.nap, 1.5).options(priority=1))
        for turn, place in enumerate(["barrier", "result", "dispatch"]):
            trackers = [disp.dispatch(Job(faulty_jobs.nap, 0.5).options(priority=0)) for _ in range(2)]
            try:
                print("ready", turn, flush=True)
                if place == "barrier":
                    disp.barrier()
                elif place == "result":
                    slow.result()
                else:
                    disp.dispatch(Job(faulty_jobs.nap, 0.1).options(priority=0))
                print("missed", flush=True)
            except KeyboardInterrupt:
                print("caught", turn, flush=True)
            assert [tracker.result() for tracker in trackers] == [0.5, 0.5]
        assert slow.result() == 1.5
        assert disp.dispatch(Job(faulty_jobs.double, 4).options(priority=0)).result() == 8
        report = disp.barrier()
        assert (report.failed_count, report.cancelled) == (0, 0), report
        assert disp.stats()[0].restarts == disp.stats()[1].restarts == 0
        print("went on with", report.succeeded, flush=True)
"""


def test_a_script_that_catches_keyboard_interrupt_goes_on_with_all_its_jobs_and_workers() -> None:
    with on_terminal(AGAIN_AND_AGAIN) as terminal:
        for turn in range(3):
            terminal.read_until(f"ready {turn}\n")
            terminal.press(CTRL_C)
            terminal.read_until(f"caught {turn}\n")
        text = terminal.read_all()
        assert "went on with 8\n" in text
        assert "Traceback" not in text
        assert "missed" not in text
        assert terminal.code == 0


def test_a_second_ctrl_c_while_the_first_unwinds_still_ends_everything() -> None:
    jobs = "faulty_jobs.ignore_sigterm, faulty_jobs.ignore_sigterm"
    with on_terminal(script("barrier", jobs=jobs)) as terminal:
        terminal.read_until("ready\n")
        family = terminal.family()
        terminal.press(CTRL_C)
        # Why a pause: the second key is to fall into the second that the kill ladder takes.
        time.sleep(0.3)
        terminal.press(CTRL_C)
        text = terminal.read_all(2 * PROMISE)
        wait_until(lambda: not alive(family), within=PROMISE)
        assert text.endswith("\nKeyboardInterrupt\n")


STARTING = """
from bulkhead import Dispatcher, Pool

if __name__ == "__main__":
    print("ready", flush=True)
    while True:
        with Dispatcher([Pool(0, 2, start_method={method!r}), Pool(1, 1, start_method={method!r})]):
            pass
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_ctrl_c_while_workers_come_up_or_leave_is_clean(method: str) -> None:
    for moment in range(4):
        with on_terminal(STARTING.format(method=method)) as terminal:
            terminal.read_until("ready\n")
            # Why a pause: the test wants many different moments of one second of starting and leaving.
            time.sleep(0.1 * moment + 0.02)
            terminal.press(CTRL_C)
            text = terminal.read_all(2 * PROMISE)
            assert text.count("Traceback") == 1, text
            assert text.endswith("\nKeyboardInterrupt\n"), text
            assert terminal.code == -signal.SIGINT
