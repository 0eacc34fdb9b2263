"""Measure dispatch beside other process pools: speed, isolation, start and end, idleness.

    python benchmarks/bench_dispatch.py [--only throughput isolation startup idle] [--json figures.json]

What each figure answers and how it is taken is told in README.md beside this file and in the module that
takes it. A peer that is not installed gets a line that says so. Compare figures of one run only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from contestants import CONTESTANTS
from idleness import measure_idleness
from isolation import measure_isolation
from settings import Settings, StartMethod
from startup import measure_startup
from throughput import measure_throughput

__all__ = ["main"]

Benchmark = Callable[[Settings], dict[str, object]]
"""Prints its table and returns what goes into the JSON file."""

BENCHMARKS: dict[str, Benchmark] = {
    "throughput": measure_throughput,
    "isolation": measure_isolation,
    "startup": measure_startup,
    "idle": measure_idleness,
}


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    settings = Settings(options.rounds, options.jobs, options.start_method)
    figures: dict[str, object] = {"machine": _machine()}
    print(_heading(figures["machine"]), flush=True)
    for name, measure in BENCHMARKS.items():
        if name in options.only:
            start = time.perf_counter()
            figures[name] = measure(settings)
            print(f"  ({name} took {time.perf_counter() - start:.0f} s)", flush=True)
            # Written each time, so that a run that is broken off has left what it found.
            if options.json:
                options.json.write_text(json.dumps(figures, indent=1) + "\n")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = ", ".join(BENCHMARKS)
    methods = multiprocessing.get_all_start_methods()
    add("--rounds", type=_at_least_1, default=5, help="measurements of each contestant (default %(default)s)")
    add("--jobs", type=_at_least_1, default=10_000, help="no-op jobs in a round (default %(default)s)")
    add("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME", help=f"of {names}")
    add("--start-method", choices=methods, default=_default_method(), help="default %(default)s")
    add("--json", type=Path, metavar="PATH", help="write all figures there")
    return parser.parse_args(arguments)


def _at_least_1(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _default_method() -> StartMethod:
    """bulkhead's own default."""
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def _machine() -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpus": os.cpu_count(),
        "busy_percent_before": psutil.cpu_percent(interval=1.0),
        "default_start_method": multiprocessing.get_context().get_start_method(),
        "versions": {c.distribution: c.version() for c in CONTESTANTS if c.distribution},
    }


def _heading(machine: object) -> str:
    assert isinstance(machine, dict)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return "\n".join(
        [
            f"Python {machine['python']}, {machine['system']}, {machine['cpus']} CPUs",
            f"CPUs in use by others just before: {machine['busy_percent_before']:.0f} %; from 10 % on, trust no figure",
            f"multiprocessing's default start method here: {machine['default_start_method']}",
            versions,
        ]
    )


if __name__ == "__main__":
    main()
