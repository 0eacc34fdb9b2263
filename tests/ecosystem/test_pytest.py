"""pytest is not affected by the import of bulkhead, and runs tests that use it however it captures output."""

import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import logging, signal, threading, warnings

BEFORE = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGCHLD), threading.active_count()
FILTERS = list(warnings.filters)

import bulkhead

AFTER = list(warnings.filters)


def test_the_import_changes_nothing():
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGCHLD)
    assert (*handlers, threading.active_count()) == BEFORE
    assert all("pytest" in type(handler).__module__ for handler in logging.getLogger().handlers)
    assert AFTER == FILTERS


def test_a_job_runs(capfd):
    with bulkhead.Dispatcher([bulkhead.Pool(0, 1, capture_output=True)]) as disp:
        assert disp.dispatch(bulkhead.Job(print, "from the job")).result() is None
    assert "from the job" in capfd.readouterr().out


def test_a_failure_of_a_job_is_shown():
    with bulkhead.Dispatcher([(0, 1)]) as disp:
        disp.dispatch(bulkhead.Job(int, "seven")).result()
"""


@pytest.mark.parametrize("capture", ["fd", "sys"])
def test_a_suite_that_uses_bulkhead_runs_as_any_other(tmp_path: Path, capture: str) -> None:
    (tmp_path / "test_of_a_user.py").write_text(SUITE)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-W",
        "error",
        "-p",
        "no:cacheprovider",
        "-q",
        f"--capture={capture}",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 2 passed" in done.stdout
    assert "ValueError: invalid literal for int() with base 10: 'seven'" in done.stdout
    assert done.stderr == ""
