"""How many threads native libraries (OpenMP, BLAS) use in a worker.

By default as many each as all workers together have CPUs for. A module of its own, because a worker has to be told
before it imports such a library: they read the environment when they are loaded. Libraries that are loaded already, as
those of a main module which the workers were forked with, are told by threadpoolctl, if it is there.
"""

from __future__ import annotations

import os
import sys

__all__ = ["limit"]


def limit(variables: dict[str, str]) -> None:
    """Have native libraries of this process use as many threads as these environment variables say."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ.update(variables)
    number = variables["OMP_NUM_THREADS"]
    if number == before or not number.isdecimal() or "numpy" not in sys.modules:
        return
    try:
        import threadpoolctl
    except ImportError:
        return
    threadpoolctl.threadpool_limits(int(number))
