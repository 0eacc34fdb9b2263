"""Running a script of the documentation as its reader would: a process of its own, nothing prepared."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import bulkhead

RunScript = Callable[..., subprocess.CompletedProcess[str]]

LONGEST = 90.0  # seconds; below the limit of a test, so that the script's output is in the report


@pytest.fixture(scope="session")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> RunScript:
    """Run a script, or "-m" and a module, with the current interpreter in an empty folder.

    Requires exit code 0, and nothing but progress on stderr.
    """

    def run(script: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            # Why: -W default prints the warnings that Python hides by default, and stderr has to be empty.
            [sys.executable, "-W", "default", str(script), *arguments],
            cwd=tmp_path_factory.mktemp("run"),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LONGEST,
            check=False,
        )
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        # Why without them: to write there is what `progress=True` is for.
        complaints = re.sub(r"^bulkhead \d+ s: [\x20-\x7e]*\n", "", done.stderr, flags=re.MULTILINE)
        assert complaints == "", f"stderr is not empty:\n{complaints}"
        return done

    return run


def _environment() -> dict[str, str]:
    """The environment of the tests, with the bulkhead that they import first on the path."""
    location = str(Path(bulkhead.__file__).parents[1])
    path = os.pathsep.join(filter(None, [location, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}
