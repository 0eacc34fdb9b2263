"""What jobs print and log reaches the caller, tagged and in time (C10); a blocked stream stops those jobs alone."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jobs
import output_jobs
import psutil
import pytest
from calling import Call
from gates import Gate
from scripts import environment
from watching import PATIENCE, assert_whole, is_alive, launcher_pid, wait_until, wait_until_whole, worker_pids

from bulkhead import Dispatcher, Job, JobCancelled, JobTimeout, Pool, PoolBroken, RetryPolicy, WorkerCrashed


@pytest.fixture
def disp() -> Iterator[Dispatcher]:
    disp = Dispatcher([Pool(0, 1, backlog=None, capture_output=True)])
    yield disp
    disp.finalize(cancel=True)


@pytest.fixture
def silent() -> Iterator[Dispatcher]:
    disp = Dispatcher([Pool(0, 1, backlog=None, capture_output="silent")])
    yield disp
    disp.finalize(cancel=True)


class Blocked(io.StringIO):
    """A stream that takes nothing until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.is_open = threading.Event()
        self.began = threading.Event()

    def write(self, text: str) -> int:
        self.began.set()
        self.is_open.wait(60)
        return super().write(text)


@pytest.fixture
def blocked() -> Iterator[Blocked]:
    """A stream that takes nothing until the end of the test at the latest."""
    stream = Blocked()
    yield stream
    stream.is_open.set()


def tag(job: object, pid: object) -> str:
    return f"[pool 0 · job {job} · pid {pid}] "


def untagged(text: str) -> list[str]:
    return [re.sub(r"^\[.*?\] ", "", line) for line in text.splitlines()]


# Streams


def test_what_python_c_code_and_children_of_a_job_print_comes_out_tagged_on_the_same_stream(
    start_method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Dispatcher([Pool(0, 1, start_method=start_method, capture_output=True)]) as disp:
        tracker = disp.dispatch(Job(output_jobs.say_in_every_way))
        tracker.result(PATIENCE)
        out, err = capsys.readouterr()
        begin = tag(tracker.id, tracker.status().pid)
    expected = {
        "from Python",
        "from a buffer",
        "from a descriptor",
        "from C",
        "from a child",
        "from C without an end",
    }
    assert set(out.splitlines()) == {begin + line for line in expected}
    errors = {"error from Python", "error from a descriptor", "error of a child"}
    assert set(err.splitlines()) == {begin + line for line in errors}
    assert out.endswith("\n")
    assert set(tracker.output.splitlines()) == expected | errors


def test_what_a_job_printed_is_there_before_anybody_learns_that_it_has_settled(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[str] = []
    with Dispatcher([Pool(0, 2, capture_output="plain")]) as disp:
        for number in range(100):
            disp.dispatch(Job(output_jobs.say, f"job {number}")).result(PATIENCE)
            assert capsys.readouterr().out == f"job {number}\n"
        tracker = disp.dispatch(Job(output_jobs.say, "for a callback"))
        tracker.add_done_callback(lambda _: seen.append(capsys.readouterr().out))
        wait_until(lambda: seen)
        assert seen == ["for a callback\n"]
        for number in range(20):
            disp.dispatch(Job(output_jobs.say, f"job {number}", "error"))
        disp.barrier(timeout=PATIENCE)
        out, err = capsys.readouterr()
        assert sorted(out.splitlines()) == sorted(f"job {number}" for number in range(20))
        assert err == "error\n" * 20
        with pytest.raises(ValueError, match="before"):
            disp.dispatch(Job(output_jobs.say_and_fail, "before the error")).result(PATIENCE)
        assert capsys.readouterr().out == "before the error\n"


def test_the_stream_is_the_one_that_is_current(disp: Dispatcher, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as redirected:
        disp.dispatch(Job(output_jobs.say, "redirected")).result(PATIENCE)
    disp.dispatch(Job(output_jobs.say, "not redirected")).result(PATIENCE)
    assert untagged(redirected.getvalue()) == ["redirected"]
    assert untagged(capsys.readouterr().out) == ["not redirected"]


def test_silent_output_is_kept_with_the_tracker_alone(
    silent: Dispatcher, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = silent.dispatch(Job(output_jobs.say, "quiet", "very quiet"))
    tracker.result(PATIENCE)
    assert sorted(tracker.output.splitlines()) == ["quiet", "very quiet"]
    assert capfd.readouterr() == ("", "")


def test_the_tag_has_the_name_of_the_pool_and_the_id_of_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    with Dispatcher([Pool(0, 1, name="thumbnails", capture_output=True)]) as disp:
        tracker = disp.dispatch(Job(output_jobs.say, "text").options(id="a.png"))
        tracker.result(PATIENCE)
        assert capsys.readouterr().out == f"[thumbnails · job a.png · pid {tracker.status().pid}] text\n"


def test_an_id_that_makes_no_line_of_text_harms_nobody(
    disp: Dispatcher, capsys: pytest.CaptureFixture[str]
) -> None:
    disp.dispatch(Job(output_jobs.say, "one").options(id="a\nb")).result(PATIENCE)
    disp.dispatch(Job(output_jobs.say, "two").options(id=output_jobs.Nameless())).result(PATIENCE)
    (pid,) = worker_pids(disp)
    one, two = capsys.readouterr().out.splitlines()
    assert one == f"[pool 0 · job 'a\\nb' · pid {pid}] one"
    assert two == f"[pool 0 · job <Nameless> · pid {pid}] two"


def test_lines_of_two_workers_are_never_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    with Dispatcher([Pool(0, 2, capture_output="plain"), Pool(1, 1, capture_output="plain")]) as disp:
        for priority, piece in ((0, "ab"), (0, "cd"), (1, "ef")):
            disp.dispatch(Job(output_jobs.print_pieces, 100, piece).options(priority=priority))
        disp.barrier(timeout=PATIENCE)
    assert (
        sorted(capsys.readouterr().out.splitlines()) == ["ab" * 5] * 100 + ["cd" * 5] * 100 + ["ef" * 5] * 100
    )


def test_a_line_without_an_end_gets_one_and_belongs_to_its_own_job(
    disp: Dispatcher, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (disp.dispatch(Job(output_jobs.say_without_end, text)) for text in ("one", "two"))
    second.result(PATIENCE)
    pid = second.status().pid
    assert capsys.readouterr().out == f"{tag(0, pid)}one\n{tag(1, pid)}two\n"
    assert (first.output, second.output) == ("one", "two")


def test_a_progress_bar_shows_its_last_state_and_broken_text_is_replaced(
    disp: Dispatcher, capsys: pytest.CaptureFixture[str]
) -> None:
    disp.dispatch(Job(output_jobs.write_raw, b"10%\r20%\r100%\nwindows\r\n\xff\xfe!\n\n")).result(PATIENCE)
    assert untagged(capsys.readouterr().out) == ["100%", "windows", "\ufffd\ufffd!", ""]


def test_a_very_long_line_comes_out_in_pieces_between_characters(
    disp: Dispatcher, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "x" + "€" * 100_000
    tracker = disp.dispatch(Job(output_jobs.write_raw, text.encode()))
    tracker.result(PATIENCE)
    lines = untagged(capsys.readouterr().out)
    assert len(lines) == 5
    assert "".join(lines) == text
    assert "\n" not in tracker.output


def test_a_stream_that_lacks_a_character_gets_its_escape(
    disp: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    disp.dispatch(Job(output_jobs.say, "Käse")).result(PATIENCE)
    assert stream.buffer.getvalue().endswith(b"] K\\xe4se\n")  # type: ignore[attr-defined]


def test_output_on_the_tracker_is_the_last_64_kib(
    silent: Dispatcher, capsys: pytest.CaptureFixture[str]
) -> None:
    small = silent.dispatch(Job(output_jobs.write_raw, b"a" * 65536))
    large = silent.dispatch(Job(output_jobs.write_raw, b"b" * 100_000 + b"\xe4" + b"c" * 65535))
    large.result(PATIENCE)
    assert small.output == "a" * 65536
    assert large.output == "\ufffd" + "c" * 65535


def test_output_on_the_tracker_grows_while_the_job_runs(silent: Dispatcher, tmp_path: Path) -> None:
    tracker = silent.dispatch(Job(output_jobs.say_and_wait, "half way", tmp_path / "go"))
    wait_until(lambda: tracker.output == "half way\n")
    assert not tracker.done()
    (tmp_path / "go").touch()
    tracker.result(PATIENCE)


def test_output_on_the_tracker_is_that_of_all_attempts(tmp_path: Path) -> None:
    policy = RetryPolicy(2, initial=0.01)
    with Dispatcher([Pool(0, 1, retry=policy, capture_output="silent")]) as disp:
        tracker = disp.dispatch(Job(output_jobs.say_and_fail_at_first, tmp_path / "mark"))
        assert tracker.result(PATIENCE) == "done"
    assert tracker.output == "attempt 1\nattempt 2\n"


def test_output_counts_as_a_part_of_what_the_history_keeps(silent: Dispatcher) -> None:
    printing = [silent.dispatch(Job(output_jobs.write_raw, b"x" * 65536)) for _ in range(3)]
    crashing = silent.dispatch(Job(output_jobs.say_and_kill_self, "y" * 9000, ""))
    assert isinstance(crashing.exception(PATIENCE), WorkerCrashed)
    assert all(tracker.size >= 65536 for tracker in printing)
    assert crashing.size == 9001


def test_output_is_empty_where_it_is_not_captured(capfd: pytest.CaptureFixture[str]) -> None:
    with Dispatcher([(0, 1)]) as disp:
        tracker = disp.dispatch(Job(output_jobs.say, "inherited"))
        tracker.result(PATIENCE)
        assert tracker.output == ""
        assert capfd.readouterr().out == "inherited\n"


def test_a_process_that_a_job_forks_prints_as_the_job(
    disp: Dispatcher, capsys: pytest.CaptureFixture[str]
) -> None:
    disp.dispatch(Job(output_jobs.say_in_process, "from a fork")).result(PATIENCE)
    assert "from a fork" in untagged(capsys.readouterr().out)


def test_items_of_a_map_are_tagged_with_their_numbers(
    disp: Dispatcher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(disp.map(output_jobs.square_aloud, range(4), chunksize=1)) == [0, 1, 4, 9]
    (pid,) = worker_pids(disp)
    assert capsys.readouterr().out.splitlines() == [
        f"[pool 0 · item {number} · pid {pid}] squaring {number}" for number in range(4)
    ]
    assert list(disp.map(output_jobs.square_aloud, range(10), chunksize=5)) == [n * n for n in range(10)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"[pool 0 · items 0 to 4 · pid {pid}] squaring 0"
    assert lines[9] == f"[pool 0 · items 5 to 9 · pid {pid}] squaring 9"


def test_an_initializer_is_tagged_without_a_job(
    start_method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = Pool(
        0,
        1,
        start_method=start_method,
        capture_output=True,
        initializer=output_jobs.say_at_start,
        initargs=("getting ready",),
    )
    with Dispatcher([pool]) as disp:
        tracker = disp.dispatch(Job(output_jobs.say, "at work"))
        tracker.result(PATIENCE)
        pid = tracker.status().pid
        assert capsys.readouterr().out == f"[pool 0 · pid {pid}] getting ready\n{tag(0, pid)}at work\n"


def test_what_an_initializer_printed_that_breaks_the_pool_is_not_lost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pool = Pool(
        0, 1, capture_output=True, initializer=output_jobs.say_and_exit, initargs=("licence refused",)
    )
    with Dispatcher([pool]) as disp:
        assert isinstance(disp.dispatch(Job(jobs.nothing)).exception(PATIENCE), PoolBroken)
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(re.fullmatch(r"\[pool 0 · pid \d+\] licence refused", line) for line in lines)


# Deaths


def test_what_a_job_printed_before_it_died_is_not_lost_up_to_the_middle_of_a_line(
    start_method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Dispatcher([Pool(0, 1, start_method=start_method, capture_output=True)]) as disp:
        for number in (signal.SIGKILL, signal.SIGSEGV):
            tracker = disp.dispatch(Job(output_jobs.say_and_kill_self, "a line", "half a li", number))
            error = tracker.exception(PATIENCE)
            assert isinstance(error, WorkerCrashed)
            assert untagged(capsys.readouterr().out) == ["a line", "half a li"]
            assert tracker.output == "a line\nhalf a li"
            assert error.output == "a line"
        assert_whole(disp)


def test_a_worker_that_is_killed_from_outside_while_it_prints_loses_no_whole_line(silent: Dispatcher) -> None:
    tracker = silent.dispatch(Job(output_jobs.say_and_hang, "before the kill"))
    wait_until(lambda: tracker.output)
    os.kill(worker_pids(silent)[0], signal.SIGKILL)
    assert isinstance(tracker.exception(PATIENCE), WorkerCrashed)
    assert tracker.output == "before the kill\n"
    assert_whole(silent)


def test_jobs_that_are_timed_out_or_cancelled_show_what_they_printed(
    disp: Dispatcher, capsys: pytest.CaptureFixture[str]
) -> None:
    late = disp.dispatch(Job(output_jobs.say_and_hang, "late").options(timeout=0.3))
    assert isinstance(late.exception(PATIENCE), JobTimeout)
    assert untagged(capsys.readouterr().out) == ["late"]
    unwanted = disp.dispatch(Job(output_jobs.say_and_hang, "unwanted"))
    wait_until(lambda: unwanted.output)
    unwanted.cancel()
    assert isinstance(unwanted.exception(PATIENCE), JobCancelled)
    assert untagged(capsys.readouterr().out) == ["unwanted"]
    assert_whole(disp)


def test_a_launcher_that_is_killed_takes_no_output_with_it(
    disp: Dispatcher, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = disp.dispatch(Job(output_jobs.say_and_hang, "last words"))
    wait_until(lambda: tracker.output)
    os.kill(launcher_pid(disp), signal.SIGKILL)
    assert isinstance(tracker.exception(PATIENCE), WorkerCrashed)
    assert untagged(capsys.readouterr().out) == ["last words"]
    assert_whole(disp)


# Flow


def test_a_job_that_prints_10_mb_is_shown_whole_and_holds_up_no_other(
    gate: Gate, capfd: pytest.CaptureFixture[str]
) -> None:
    number, text = 100_000, "x" * 95
    with Dispatcher([Pool(0, 2, backlog=None, capture_output="plain"), Pool(1, 1)]) as disp:
        flood = disp.dispatch(Job(output_jobs.print_lines, number, text))
        others = [disp.dispatch(Job(jobs.echo, n).options(priority=n % 2)) for n in range(50)]
        assert [other.result(PATIENCE) for other in others] == list(range(50))
        flood.result(PATIENCE)
        out = capfd.readouterr().out
    assert out == "".join(f"{text} {n}\n" for n in range(number))
    assert flood.output == out[-65536:]


def test_a_job_that_prints_for_ever_fills_no_memory_and_can_be_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        Path(os.devnull).open("w") as nothing,
        monkeypatch.context() as patch,
        Dispatcher([Pool(0, 2, backlog=None, capture_output=True)]) as disp,
    ):
        patch.setattr(sys, "stdout", nothing)
        endless = disp.dispatch(Job(output_jobs.print_for_ever))
        wait_until(lambda: len(endless.output) == 65536)
        before = psutil.Process().memory_info().rss
        for number in range(200):
            assert disp.dispatch(Job(jobs.echo, number)).result(PATIENCE) == number
        assert psutil.Process().memory_info().rss - before < 20_000_000
        endless.cancel()
        assert isinstance(endless.exception(PATIENCE), JobCancelled)


def test_a_stream_that_takes_nothing_stops_the_jobs_that_print_and_no_others(
    blocked: Blocked, gate: Gate
) -> None:
    pools = [Pool(0, 3, backlog=None, capture_output=True), Pool(1, 1, capture_output=True)]
    with Dispatcher(pools) as disp, contextlib.redirect_stdout(blocked):
        wait_until_whole(disp)
        # Its time is up while its answer waits for the stream.
        printing = disp.dispatch(Job(output_jobs.say, "hello").options(timeout=0.5))
        endless = disp.dispatch(Job(output_jobs.print_for_ever))
        for number in range(100):
            assert (
                disp.dispatch(Job(jobs.echo, number).options(priority=number % 2)).result(PATIENCE) == number
            )
        hanging = disp.dispatch(Job(output_jobs.say_and_hang, "late").options(timeout=1.0))
        assert isinstance(hanging.exception(PATIENCE), JobTimeout)
        assert not printing.done()
        output = disp._pools[0]._acting.output
        assert output is not None
        assert output._outlet.backlog < 1_000_000
        endless.cancel()
        assert isinstance(endless.exception(PATIENCE), JobCancelled)
        blocked.is_open.set()
        assert printing.result(PATIENCE) == "hello"
        assert f"{tag(printing.id, printing.status().pid)}hello\n" in blocked.getvalue()


def test_items_that_print_and_return_much_stop_at_a_blocked_stream_and_lose_nothing(blocked: Blocked) -> None:
    with Dispatcher([Pool(0, 1, capture_output="plain")]) as disp, contextlib.redirect_stdout(blocked):
        call = Call(list, disp.map(output_jobs.say_much_and_return_much, range(40), chunksize=40))
        output = disp._pools[0]._acting.output
        assert output is not None
        wait_until(lambda: output._is_paused)
        (pid,) = worker_pids(disp)
        wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_SLEEPING)
        assert output._outlet.backlog < 600_000
        blocked.is_open.set()
        assert [len(value) for value in call.value()] == [200_000 + number for number in range(40)]
    assert blocked.getvalue() == ("x" * 60_000 + "\n") * 40


def test_finalize_with_cancel_does_not_wait_for_a_stream_that_takes_nothing(
    blocked: Blocked, caplog: pytest.LogCaptureFixture
) -> None:
    disp = Dispatcher([Pool(0, 2, backlog=None, capture_output=True)])
    with contextlib.redirect_stdout(blocked):
        answered = disp.dispatch(Job(output_jobs.say, "hello"))
        endless = disp.dispatch(Job(output_jobs.print_for_ever))
        is_blocked = blocked.began.wait(PATIENCE)
        began = time.monotonic()
        disp.finalize(cancel=True)
    assert is_blocked
    assert time.monotonic() - began < 10
    assert answered.done()
    assert endless.done()
    assert "not written" in caplog.text


def test_an_interrupted_script_whose_output_nobody_reads_ends_without_a_complaint(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "import output_jobs\n"
        "from bulkhead import Dispatcher, Job, Pool\n"
        "if __name__ == '__main__':\n"
        "    with Dispatcher([Pool(0, 1, capture_output=True)]) as disp:\n"
        "        tracker = disp.dispatch(Job(output_jobs.print_for_ever))\n"
        "        print('started', file=sys.stderr, flush=True)\n"
        "        tracker.result()\n"
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        process_group=0,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.readline() == "started\n"
        assert process.stdout.readline().endswith("] " + "x" * 99 + "\n")
        wait_until(lambda: _is_full(process.stdout))
        process.send_signal(signal.SIGINT)
        code = process.wait(PATIENCE)
        errors = process.stderr.read()
        process.stdout.close()
    assert code in (1, -signal.SIGINT)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "Fatal" not in errors


def _is_full(stream: object) -> bool:
    """Tell whether a pipe has stopped filling."""
    import fcntl
    import termios

    def there() -> int:
        return int.from_bytes(fcntl.ioctl(stream, termios.FIONREAD, bytes(4)), sys.byteorder)  # type: ignore[arg-type]

    before = there()
    time.sleep(0.3)
    return there() == before > 4096


def test_a_stream_that_raises_is_complained_of_once_and_stops_nothing(
    disp: Dispatcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    for number in range(3):
        assert disp.dispatch(Job(output_jobs.say, f"{number}")).result(PATIENCE) == f"{number}"
    assert [record.name for record in caplog.records] == ["bulkhead"]
    assert "closed file" in caplog.text
    monkeypatch.setattr(sys, "stdout", None)
    disp.dispatch(Job(output_jobs.say, "nowhere")).result(PATIENCE)


# What jobs do to their descriptors


def test_a_child_that_keeps_the_stream_open_holds_up_neither_the_result_nor_the_end(
    disp: Dispatcher, capsys: pytest.CaptureFixture[str]
) -> None:
    sleeping = disp.dispatch(Job(output_jobs.leave_child_with_stdout, "import time; time.sleep(10**6)"))
    printing = disp.dispatch(
        Job(output_jobs.leave_child_with_stdout, "while True: print('child' * 20, flush=True)")
    )
    assert is_alive(sleeping.result(PATIENCE))
    assert is_alive(printing.result(PATIENCE))
    for number in range(20):
        assert disp.dispatch(Job(jobs.echo, number)).result(PATIENCE) == number
    disp.finalize()
    wait_until(lambda: not is_alive(sleeping.result()) and not is_alive(printing.result()))


def test_what_a_job_has_left_running_belongs_to_no_job_or_a_later_one(
    disp: Dispatcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = disp.dispatch(Job(output_jobs.leave_thread_printing, tmp_path / "go"))
    first.result(PATIENCE)
    (tmp_path / "go").touch()
    wait_until(lambda: not (tmp_path / "go").exists())
    second = disp.dispatch(Job(output_jobs.say, "second"))
    second.result(PATIENCE)
    assert first.output == ""
    assert untagged(capsys.readouterr().out) == ["from a thread that was left", "second"]


@pytest.mark.parametrize("damage", ["close_stdout", "point_stdout_elsewhere", "replace_stdout"])
def test_a_job_that_closes_or_replaces_its_streams_loses_its_own_output_alone(
    damage: str, disp: Dispatcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [tmp_path / "file"] if damage == "point_stdout_elsewhere" else []
    assert disp.dispatch(Job(getattr(output_jobs, damage), *args)).result(PATIENCE)
    assert disp.dispatch(Job(jobs.echo, 1)).result(PATIENCE) == 1
    os.kill(worker_pids(disp)[0], signal.SIGKILL)
    wait_until_whole(disp)
    disp.dispatch(Job(output_jobs.say, "from a fresh worker")).result(PATIENCE)
    assert untagged(capsys.readouterr().out) == ["from a fresh worker"]


def test_finalize_with_cancel_ends_jobs_that_print(capsys: pytest.CaptureFixture[str]) -> None:
    disp = Dispatcher([Pool(0, 2, capture_output=True)])
    trackers = [disp.dispatch(Job(output_jobs.print_for_ever)) for _ in range(2)]
    wait_until(lambda: all(tracker.output for tracker in trackers))
    disp.finalize(cancel=True)
    assert all(isinstance(tracker.exception(), JobCancelled) for tracker in trackers)


def test_what_is_off_costs_no_descriptor_no_thread_and_no_call(capfd: pytest.CaptureFixture[str]) -> None:
    before = len(output_jobs.descriptors())
    threads = threading.active_count()
    with Dispatcher([(0, 1)]) as disp:
        assert disp._pools[0]._acting.output is None
        wait_until_whole(disp)
        # Poller, alarm, the launcher's socket; for the worker jobs, results, life line, line, its box (twice:
        # once to lock it).
        assert len(output_jobs.descriptors()) - before == 9
        assert threading.active_count() - threads == 1
        own = output_jobs.descriptors()
        theirs = disp.dispatch(Job(output_jobs.descriptors)).result(PATIENCE)
        assert (theirs[1], theirs[2]) == (own[1], own[2])
        began = disp.dispatch(Job(output_jobs.calls_so_far)).result(PATIENCE)
        for _ in range(50):
            disp.dispatch(Job(jobs.nothing)).result(PATIENCE)
        done = disp.dispatch(Job(output_jobs.calls_so_far)).result(PATIENCE)
    # One read and one write for each job, and what it takes to look at the counters.
    assert done - began <= 2 * 51 + 4


# Logging


@pytest.fixture
def handler() -> Iterator[logging.Handler]:
    """Keeps what the loggers below "lab" handle in the caller."""

    class Keeping(logging.Handler):
        def __init__(self) -> None:
            super().__init__()
            self.records: list[logging.LogRecord] = []

        def emit(self, record: logging.LogRecord) -> None:
            self.records.append(record)

    lab = logging.getLogger("lab")
    made = Keeping()
    lab.addHandler(made)
    yield made
    lab.removeHandler(made)
    lab.setLevel(logging.NOTSET)
    logging.getLogger("lab.quiet").setLevel(logging.NOTSET)


def messages(handler: logging.Handler) -> list[str]:
    return [record.getMessage() for record in handler.records]  # type: ignore[attr-defined]


def test_a_record_is_handled_by_the_callers_logger_with_job_pool_and_process_before_the_result(
    start_method: str, handler: logging.Handler
) -> None:
    pool = Pool(3, 1, name="labour", start_method=start_method, forward_logging=True)
    with Dispatcher([pool]) as disp:
        job = Job(output_jobs.log, "lab.rats", logging.ERROR, "rat %d of %s", 7, "nine", cage="b")
        pid = disp.dispatch(job.options(id="j")).result(PATIENCE)
        (record,) = handler.records  # type: ignore[attr-defined]
    assert record.getMessage() == "rat 7 of nine"
    assert (record.name, record.levelno, record.args, record.cage) == (
        "lab.rats",
        logging.ERROR,
        (7, "nine"),
        "b",
    )
    assert (record.job_id, record.pool, record.priority, record.pid) == ("j", "labour", 3, pid)
    assert record.process == pid
    assert record.funcName == "log"


def test_the_callers_levels_at_the_start_say_which_records_are_sent(handler: logging.Handler) -> None:
    logging.getLogger("lab").setLevel(logging.DEBUG)
    logging.getLogger("lab.quiet").setLevel(logging.ERROR)
    with Dispatcher([Pool(0, 1, forward_logging=True)]) as disp:
        disp.dispatch(Job(output_jobs.log_at_all_levels, "lab.loud")).result(PATIENCE)
        assert messages(handler) == ["level 10", "level 20", "level 30", "level 40"]
        disp.dispatch(Job(output_jobs.log_at_all_levels, "lab.quiet")).result(PATIENCE)
        assert messages(handler)[4:] == ["level 40"]
        logging.getLogger("lab").setLevel(logging.CRITICAL)  # the caller's own level counts as well
        disp.dispatch(Job(output_jobs.log_at_all_levels, "lab.loud")).result(PATIENCE)
        assert len(messages(handler)) == 5


def test_what_cannot_be_pickled_or_rebuilt_arrives_as_text(handler: logging.Handler) -> None:
    with Dispatcher([Pool(0, 1, forward_logging=True)]) as disp:
        disp.dispatch(Job(output_jobs.log_odd, "lab")).result(PATIENCE)
    first, second, third, fourth = handler.records  # type: ignore[attr-defined]
    assert re.fullmatch(r"odd ones: <unlocked _thread.lock .*> and odd 3", first.getMessage())
    assert "lock" in first.lock
    assert (second.getMessage(), second.odd) == ("an odd one: odd 4", "odd 5")
    assert (third.getMessage(), third.point.x, third.args[0].x) == ("a good one: point 6", 7, 6)
    assert fourth.getMessage() == "'does not fit: %s %s' % (odd 8,)"


def test_an_exception_arrives_as_its_traceback(handler: logging.Handler) -> None:
    with Dispatcher([Pool(0, 1, forward_logging=True)]) as disp:
        disp.dispatch(Job(output_jobs.log_error, "lab")).result(PATIENCE)
    (record,) = handler.records  # type: ignore[attr-defined]
    text = logging.Formatter().format(record)
    assert text.startswith("it failed\nTraceback")
    assert "KeyError: 'no such thing'" in text
    assert "in log_error" in record.stack_info


def test_a_huge_record_is_shortened_and_many_arrive_in_order(handler: logging.Handler) -> None:
    with Dispatcher([Pool(0, 1, forward_logging=True)]) as disp:
        disp.dispatch(Job(output_jobs.log_much, "lab", 1_000_000)).result(PATIENCE)
        huge, after = messages(handler)
        assert huge.startswith("yyyy")
        assert huge.endswith("… (1000000 characters)")
        assert after == "after it"
        disp.dispatch(Job(output_jobs.log_many, "lab", 5000)).result(PATIENCE)
        assert messages(handler)[2:] == [f"record {n}" for n in range(5000)]


def test_processes_and_threads_of_a_job_log_and_so_does_one_that_dies(handler: logging.Handler) -> None:
    with Dispatcher([Pool(0, 1, forward_logging=True)]) as disp:
        disp.dispatch(Job(output_jobs.log_in_process_and_thread, "lab")).result(PATIENCE)
        assert messages(handler) == ["from a process", "from a thread"]
        crashing = disp.dispatch(Job(output_jobs.log_and_kill_self, "lab"))
        assert isinstance(crashing.exception(PATIENCE), WorkerCrashed)
        assert messages(handler)[2:] == ["last words"]


def test_records_of_initializers_and_items_say_where_they_come_from(handler: logging.Handler) -> None:
    pool = Pool(0, 1, forward_logging=True, initializer=output_jobs.log_at_start, initargs=("lab",))
    with Dispatcher([pool]) as disp:
        wait_until(lambda: messages(handler))
        list(disp.map(output_jobs.log_error, ["lab"] * 2, chunksize=2))
    assert [record.job_id for record in handler.records] == [None, "items 0 to 1", "items 0 to 1"]  # type: ignore[attr-defined]


def test_a_handler_that_an_initializer_adds_gets_its_records_and_the_caller_not_again(
    start_method: str, handler: logging.Handler, tmp_path: Path
) -> None:
    pool = Pool(
        0,
        1,
        start_method=start_method,
        forward_logging=True,
        initializer=output_jobs.log_to_file,
        initargs=(tmp_path / "log", "lab.own"),
    )
    with Dispatcher([pool]) as disp:
        disp.dispatch(Job(output_jobs.log, "lab.own", logging.ERROR, "kept there")).result(PATIENCE)
        disp.dispatch(Job(output_jobs.log, "lab.other", logging.ERROR, "sent")).result(PATIENCE)
    assert (tmp_path / "log").read_text() == "kept there\n"
    assert messages(handler) == ["sent"]


def test_logging_that_an_initializer_configures_by_force_stays_in_the_worker(
    handler: logging.Handler, tmp_path: Path
) -> None:
    pool = Pool(
        0,
        1,
        forward_logging=True,
        initializer=output_jobs.log_to_file_by_force,
        initargs=(tmp_path / "log",),
    )
    with Dispatcher([pool]) as disp:
        disp.dispatch(Job(output_jobs.log, "lab", logging.ERROR, "kept there")).result(PATIENCE)
    assert (tmp_path / "log").read_text() == "ERROR:lab:kept there\n"
    assert messages(handler) == []


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_script_that_configures_logging_at_its_top_sees_each_record_once(
    method: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import logging\n"
        "from bulkhead import Dispatcher, Job, Pool\n"
        "logging.basicConfig(format='%(message)s', level=logging.INFO)\n"
        "logging.getLogger('apart').propagate = False\n"
        "logging.getLogger('apart').addHandler(logging.StreamHandler())\n"
        "def work():\n"
        "    logging.info('root')\n"
        "    logging.getLogger('apart').info('apart')\n"
        "if __name__ == '__main__':\n"
        f"    pool = Pool(0, 1, start_method={method!r}, forward_logging=True, capture_output=True)\n"
        "    with Dispatcher([pool]) as disp:\n"
        "        disp.dispatch(Job(work)).result()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "root\napart\n")


def test_the_callers_logging_is_left_alone_and_a_handler_that_raises_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Raising(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise ZeroDivisionError

    lab = logging.getLogger("lab")
    raising = Raising()
    lab.addHandler(raising)
    before = (list(logging.root.handlers), logging.root.level, list(lab.handlers), lab.level)
    try:
        with Dispatcher([Pool(0, 1, forward_logging=True)]) as disp:
            disp.dispatch(Job(output_jobs.log, "lab", logging.ERROR, "bad luck")).result(PATIENCE)
            assert_whole(disp)
    finally:
        lab.removeHandler(raising)
    assert before == (list(logging.root.handlers), logging.root.level, [*lab.handlers, raising], lab.level)


def test_workers_that_forward_nothing_keep_the_logging_they_have(
    handler: logging.Handler, tmp_path: Path
) -> None:
    pool = Pool(0, 1, initializer=output_jobs.log_to_file, initargs=(tmp_path / "log",))
    with Dispatcher([pool]) as disp:
        disp.dispatch(Job(output_jobs.log, "lab", logging.ERROR, "kept there")).result(PATIENCE)
        assert disp.dispatch(Job(output_jobs.handlers_of, None)).result(PATIENCE) == ["FileHandler"]
    assert (tmp_path / "log").read_text() == "kept there\n"
    assert messages(handler) == []


# Many things at once


def test_a_caller_that_forks_while_jobs_print_has_no_use_of_their_pipes(
    disp: Dispatcher, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = disp.dispatch(Job(output_jobs.say_and_hang, "first"))
    wait_until(lambda: tracker.output)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    tracker.cancel()
    disp.dispatch(Job(output_jobs.say, "second")).result(PATIENCE)
    assert untagged(capsys.readouterr().out) == ["first", "second"]


def test_jobs_that_print_and_die_at_random_lose_no_line_and_leave_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Dispatcher([Pool(0, 2, backlog=None, capture_output="plain")]) as disp:
        trackers = [
            disp.dispatch(
                Job(output_jobs.say_and_kill_self, f"line {n}", "")
                if n % 5 == 0
                else Job(output_jobs.say, f"line {n}")
            )
            for n in range(50)
        ]
        report = disp.barrier(timeout=PATIENCE, check=False)
    assert (report.succeeded, report.failed_count) == (40, 10)
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(f"line {n}" for n in range(50))
    assert all(tracker.output == f"line {n}\n" for n, tracker in enumerate(trackers))


def test_a_thread_that_waits_with_a_timeout_is_not_held_by_a_blocked_stream(blocked: Blocked) -> None:
    with Dispatcher([Pool(0, 1, capture_output=True)]) as disp, contextlib.redirect_stdout(blocked):
        tracker = disp.dispatch(Job(output_jobs.say, "hello"))
        assert blocked.began.wait(PATIENCE)
        assert not tracker.wait(0.2)
        waiting = Call(tracker.result).until_waiting()
        blocked.is_open.set()
        assert waiting.value() == "hello"
