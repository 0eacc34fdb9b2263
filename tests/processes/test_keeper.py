"""benchmarks/keeper.py leaves nothing of a measurement behind, whatever ends the benchmark."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from watching import alive, wait_until

KEEPER = Path(__file__).parents[2] / "benchmarks" / "keeper.py"

# Two processes out of reach of a kill of the group: one in a session of its own, one that is an orphan besides.
MEASUREMENT = """
import os, subprocess, sys, time
sleep = "import time; time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True)
options = "start_new_session=True, stdout=subprocess.DEVNULL"
made = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', '{sleep}'], {options}).pid)"
orphan = subprocess.run([sys.executable, "-c", made], stdout=subprocess.PIPE).stdout.decode().strip()
with open(sys.argv[1] + ".part", "w") as file:
    file.write(f"{os.getpid()} {child.pid} {orphan}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
code = sys.argv[2]
if code:
    sys.exit(int(code))
time.sleep(600)
"""

# Who asks for it: holds the pipe, and waits.
CALLER = """
import os, subprocess, sys
theirs, ours = os.pipe()
keeper = subprocess.Popen([sys.executable, *sys.argv[1:]], stdin=theirs, start_new_session=True)
os.close(theirs)
sys.exit(keeper.wait())
"""


@contextlib.contextmanager
def measuring(place: Path, code: str = "") -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", MEASUREMENT, str(place), code]
    with subprocess.Popen([sys.executable, "-c", CALLER, str(KEEPER), *command]) as caller:
        try:
            yield caller
        finally:
            caller.kill()


def pids_in(place: Path) -> list[int]:
    wait_until(place.exists, "the measurement has begun")
    return [int(pid) for pid in place.read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_benchmark_that_is_ended_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    with measuring(tmp_path / "pids") as caller:
        pids = pids_in(tmp_path / "pids")
        assert alive(pids) == pids
        os.kill(caller.pid, number)
        wait_until(lambda: not alive(pids), "all have ended")


def test_a_measurement_that_fails_leaves_no_process_behind_and_its_code_is_told(tmp_path: Path) -> None:
    with measuring(tmp_path / "pids", "3") as caller:
        assert caller.wait(30) == 3
        assert alive(pids_in(tmp_path / "pids")) == []
