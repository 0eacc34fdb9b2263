"""Modules that a pool names are imported once, before its workers are forked; else each worker imports them."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from faulty_jobs import kill_self
from jobs import pid
from watching import PATIENCE, wait_until

from bulkhead import ConfigError, Dispatcher, Job, Pool, WorkerCrashed

# Says each time who imports it, and has a job.
BEGINNING = """
import os
with open(__file__ + ".log", "a") as log:
    log.write(f"{os.getpid()}\\n")
def pid():
    return os.getpid()
"""


class Module:
    """A module of the test's own, for which this process stands that never imports it."""

    def __init__(self, folder: Path, name: str, code: str) -> None:
        self.name = name
        self._file = folder / f"{name}.py"
        self._file.write_text(BEGINNING + code)

    def job(self) -> Job:
        return Job(eval, f"__import__({self.name!r}).pid()")

    def importers(self) -> list[int]:
        log = Path(f"{self._file}.log")
        return [int(line) for line in log.read_text().split()] if log.exists() else []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def launcher_of(worker: int) -> int:
    return psutil.Process(worker).ppid()


def test_it_is_imported_once_for_all_workers_and_those_that_replace_them(folder: Path) -> None:
    module = Module(folder, "imported_once", "")
    with Dispatcher([Pool(0, 2, preload=[module.name])]) as disp:
        workers = {disp.dispatch(module.job()).result(PATIENCE)}
        launcher = launcher_of(min(workers))
        for _ in range(3):
            disp.dispatch(Job(kill_self)).wait(PATIENCE)
            workers |= {disp.dispatch(module.job()).result(PATIENCE) for _ in range(10)}
        assert len(workers) >= 3
        assert module.importers() == [launcher]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise ValueError('not today')", "ValueError('not today')"),
        ("raise SystemExit(3)", "SystemExit(3)"),
        ("import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()", "threads"),
        ("import socket\nends = socket.socketpair()", "opens connections"),
        ("import sqlite3\nopened = sqlite3.connect(__file__ + '.db')", "opens connections"),
        ("import bulkhead\nbulkhead.Dispatcher([(0, 1)])", "MissingMainGuard"),
    ],
    ids=["an error", "an exit", "threads", "sockets", "a database", "a dispatcher"],
)
def test_what_cannot_be_imported_ahead_is_left_to_the_workers_and_said(
    folder: Path, caplog: pytest.LogCaptureFixture, code: str, why: str
) -> None:
    unfit, fit = Module(folder, "unfit", code), Module(folder, "fit", "")
    with Dispatcher([Pool(0, 2, preload=[fit.name, unfit.name])]) as disp:
        workers = {disp.dispatch(fit.job()).result(PATIENCE) for _ in range(20)}
        launcher = launcher_of(min(workers))
    assert set(fit.importers()[1:]) == workers  # after the first launcher, which found out
    assert launcher not in fit.importers()
    (record,) = caplog.records
    assert "pool 0: its workers have to import the modules of preload themselves: " in record.getMessage()
    assert unfit.name in record.getMessage()
    assert why in record.getMessage()


def test_an_import_that_kills_the_launcher_is_left_to_the_workers(folder: Path) -> None:
    deadly = Module(folder, "deadly", "os._exit(1)")
    with Dispatcher([Pool(0, 1, preload=[deadly.name])]) as disp:
        assert disp.dispatch(Job(abs, -1)).result(PATIENCE) == 1
        assert isinstance(disp.dispatch(deadly.job()).exception(PATIENCE), WorkerCrashed)


def test_a_launcher_that_is_killed_later_is_replaced_by_one_that_has_imported_it(folder: Path) -> None:
    module = Module(folder, "imported_again", "")
    with Dispatcher([Pool(0, 1, preload=[module.name])]) as disp:
        first = launcher_of(disp.dispatch(module.job()).result(PATIENCE))
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(first), "the launcher is gone")
        second = launcher_of(disp.dispatch(module.job()).result(PATIENCE))
        assert module.importers() == [first, second]


def test_other_start_methods_take_no_notice(folder: Path) -> None:
    module = Module(folder, "not_imported", "")
    for method in ("fork", "spawn"):
        with Dispatcher([Pool(0, 1, preload=[module.name], start_method=method)]) as disp:
            disp.dispatch(Job(pid)).result(PATIENCE)
    assert module.importers() == []


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("json", "preload must be an iterable such as a list, not 'json'"),
        ([3], "preload must be a str, not 3"),
        ([".json"], "preload must be names of modules, such as 'package.module', not '.json'"),
        ([""], "preload must be names of modules, such as 'package.module', not ''"),
        (None, "preload must be an iterable"),
    ],
)
def test_what_names_no_modules_is_refused(value, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Pool(0, 1, preload=value)
