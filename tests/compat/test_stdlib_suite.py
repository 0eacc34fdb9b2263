"""The standard library's own tests of process pools pass with bulkhead's executors in their place (D5)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_stdlib_suite import NO_SUITE

SCRIPT = Path(__file__).with_name("run_stdlib_suite.py")

PYTHONS = [sys.executable, *(f"python3.{minor}" for minor in range(11, 20))]
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"


def interpreter_with_a_suite() -> str:
    """Return an interpreter of this machine that has the suite; many are installed without it."""
    for python in [*PYTHONS, *map(str, sorted(PYENV.glob("3.1[1-9]*/bin/python"), reverse=True))]:
        if shutil.which(python) and has_suite(python):
            return python
    if os.environ.get("CI") == "true":
        pytest.fail("no interpreter here has the package test.test_concurrent_futures")
    pytest.skip("no interpreter here has the package test.test_concurrent_futures")


def has_suite(python: str) -> bool:
    find = (
        "import sys; assert sys.version_info >= (3, 11); "
        "import importlib.util as u; assert u.find_spec('test.test_concurrent_futures')"
    )
    return subprocess.run([python, "-c", find], capture_output=True, check=False).returncode == 0


def run(*arguments: str) -> list[tuple[int, int, int]]:
    """Run the suite; return for each executor how many tests passed, failed, and were not applicable."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--python", interpreter_with_a_suite(), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r": (\d+) passed, (\d+) failed, (\d+) not applicable$", done.stdout, re.MULTILINE)
    return [(int(passed), int(failed), int(others)) for passed, failed, others in found]


def test_a_selection_of_the_suite_passes() -> None:
    arguments = ["--executor", "dispatcher", "--method", "forkserver", "-k", QUICK]
    [(passed, failed, _)] = run(*arguments)
    assert failed == 0
    assert passed >= 10


# What does not sleep for long.
QUICK = "Deadlock.*_exit_|PoolExecutorTest.test_(submit|map_(exc|chunk)|traceback)|test_cancel_futures"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_suite_passes_under_every_start_method() -> None:
    standalone, dispatcher = run()
    for passed, failed, others in (standalone, dispatcher):
        assert failed == 0
        assert passed >= 150
        assert others <= 40


def test_an_interpreter_without_the_suite_is_named_and_skipped(tmp_path: Path) -> None:
    hidden = tmp_path / "test"  # stands before the library's package, and has no such tests
    hidden.mkdir()
    (hidden / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--suite", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == NO_SUITE, done.stderr
    assert "not run, it has no package test.test_concurrent_futures" in done.stdout
