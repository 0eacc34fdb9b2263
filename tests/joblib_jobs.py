"""What calls of joblib do. Apart from their tests, so that a worker does not import scikit-learn for them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from jobs import fail, pid
from watching import read_pids

__all__ = [
    "fail_third",
    "fail_when_noted",
    "nested_pids",
    "note_pid_and_hang",
    "threads_allowed",
    "use_one_thread",
]


def fail_third(number: int) -> int:
    if number == 3:
        raise LookupError("number three")
    return number


def nested_pids(**options: Any) -> tuple[int, list[int], str]:
    """Return this process, those of calls inside of it, and the name of the backend that was at work."""
    inner = Parallel(**options)
    return os.getpid(), inner(delayed(pid)() for _ in range(4)), type(inner._backend).__name__


def threads_allowed() -> list[int]:
    import threadpoolctl

    np.ones((2, 2)) @ np.ones((2, 2))
    return [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]


def note_pid_and_hang(path: Path) -> None:
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(10**6)


def fail_when_noted(path: Path) -> None:
    read_pids(path)
    fail()


def use_one_thread() -> None:
    """For an initializer: the workers of a pool share few CPUs."""
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
