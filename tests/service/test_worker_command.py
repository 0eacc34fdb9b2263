"""`bulkhead worker module:app`, as a process of its own: what it runs, how it ends, and what it says to mistakes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
from gates import Gate
from jobs import lines
from scripts import Script
from watching import wait_until

SOON = 20.0

ENDS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]

Command = Callable[..., AbstractContextManager[Script]]


@pytest.fixture
def temporary(monkeypatch) -> Iterator[Path]:
    """The folder for temporary files, in which nothing may be left."""
    made = Path(tempfile.mkdtemp(prefix="t"))
    monkeypatch.setenv("TMPDIR", str(made))
    yield made
    left = list(made.iterdir())
    shutil.rmtree(made)
    assert not left


@pytest.fixture
def command(durable, temporary) -> Command:
    """Runs the command with these arguments, in the folder of the application."""

    @contextlib.contextmanager
    def run(*arguments: str) -> Iterator[Script]:
        code = f"import sys\nsys.argv[1:] = {['worker', *arguments]!r}\n"
        code += "from bulkhead.cli import main\nif __name__ == '__main__':\n    main()\n"
        script = Script(durable.folder, code)
        try:
            yield script
        finally:
            script.end()

    return run


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "notes")


def send(script: Script, number: int) -> None:
    """Send a signal to all processes of the command, as a terminal does."""
    os.killpg(script.pid, number)


class TestTheCommand:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_runs_jobs_until_it_is_told_to_stop_and_lets_those_that_run_end(
        self, durable, command, gate: Gate, tmp_path, number
    ):
        with command(f"{durable.name}:app", "--queues", "default", "--grace", "20") as script:
            assert durable.app.result(durable.add.enqueue(1, 2), timeout=SOON) == 3
            id = durable.hold.enqueue(str(tmp_path / "gate"), "a")
            gate.wait_begun(1)
            send(script, number)
            wait_until(lambda: "stopping" in script.errors(), "it stops")
            gate.open()
            assert script.wait() == 0
        assert "Traceback" not in script.errors()
        job = durable.app.job(id)
        assert (job.state, job.attempt) == ("succeeded", 1)

    def test_goes_on_when_the_terminal_is_closed_where_that_is_to_be_ignored(
        self, durable, command, gate, tmp_path
    ):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; what is started inherits it
        try:
            with command(f"{durable.name}:app", "--queues", "default") as script:
                id = durable.hold.enqueue(str(tmp_path / "gate"), "a")
                gate.wait_begun(1)
                send(script, signal.SIGHUP)
                assert durable.app.result(durable.add.enqueue(1, 2), timeout=SOON) == 3
                gate.open()
                assert durable.app.result(id, timeout=SOON) == "a"
                assert "stopping" not in script.errors()
                send(script, signal.SIGTERM)
                assert script.wait() == 0
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_hears_a_signal_that_another_of_its_threads_was_given(self, durable, command):
        with command(f"{durable.name}:app") as script:
            assert durable.app.result(durable.add.enqueue(1, 2), timeout=SOON) == 3
            threads = [thread.id for thread in psutil.Process(script.pid).threads()]
            other = max(set(threads) - {script.pid})
            assert ctypes.CDLL(None).tgkill(script.pid, other, signal.SIGTERM) == 0
            assert script.wait() == 0

    def test_gives_back_what_runs_at_a_second_signal(self, durable, command, path):
        with command(f"{durable.name}:app", "--grace", "60") as script:
            id = durable.nap.enqueue(path, 60.0)
            wait_until(lambda: lines(path), "it runs")
            send(script, signal.SIGINT)
            wait_until(lambda: "stopping" in script.errors(), "it stops")
            send(script, signal.SIGINT)
            assert script.wait() == 0
        assert "Traceback" not in script.errors()
        job = durable.app.job(id)
        assert (job.state, job.attempt) == ("queued", 0)

    @pytest.mark.parametrize(("number", "code"), ENDS)
    def test_that_runs_one_job_gives_it_back_at_a_signal(self, durable, command, path, number, code):
        id = durable.nap.enqueue(path, 60.0)
        with command(f"{durable.name}:app", "--once") as script:
            wait_until(lambda: lines(path), "it runs")
            send(script, number)
            assert script.wait() == code
        assert "Traceback" not in script.errors()
        job = durable.app.job(id)
        assert (job.state, job.attempt) == ("queued", 0)

    def test_runs_one_job_and_says_which(self, durable, command):
        first, second = (durable.echo.call(n).options(keep_result=0).enqueue() for n in range(2))
        with command(f"{durable.name}:app", "--once") as script:
            assert script.wait() == 0
        assert script.output() == f"{first} succeeded\n"
        assert durable.app.job(second).state == "queued"

    @pytest.mark.parametrize(("number", "code"), ENDS)
    def test_ends_without_a_fuss_while_it_starts(self, durable, command, number, code):
        (durable.folder / "slow.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
        with command("slow:app") as script:
            script.wait_for_line("begun")
            send(script, number)
            assert script.wait() == code
        assert script.errors() == ""


class TestAMistake:
    @pytest.mark.parametrize(
        ("arguments", "code", "said"),
        [
            (["nothing"], 2, "is not MODULE:APP"),
            ([".x:app"], 2, "is not MODULE:APP"),
            (["there_is_none:app"], 2, "there is no module"),
            (["NAME:nobody"], 2, "is no App"),
            (["NAME:app", "--queues", "a,b"], 1, "there is no queue 'a'"),
            (["NAME:app", "--queues", ""], 1, "there is no queue ''"),
            (["NAME:app", "--grace", "nan"], 1, "grace must be"),
            (["NAME:app", "--grace", "-1"], 1, "grace must be"),
            (["NAME:app", "--grace", "soon"], 2, "invalid float"),
            (["away:app"], 69, "Connection refused"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_is_told_in_a_line_and_by_the_exit_code(self, durable, command, arguments, code, said):
        away = "from bulkhead import App\napp = App('redis://127.0.0.1:9/0')\napp.queue('default')\n"
        (durable.folder / "away.py").write_text(away)
        with command(*[one.replace("NAME", durable.name) for one in arguments]) as script:
            assert script.wait() == code
        assert said in script.errors()
        assert "Traceback" not in script.errors()
