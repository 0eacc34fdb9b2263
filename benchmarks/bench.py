"""Measure bulkhead beside other process pools: dispatch, map, large arrays, memory, isolation, start and end.

    python benchmarks/bench.py [--only NAME ...] [--quick] [--json figures.json] [--png chart.png]

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
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from arrays import COPY, measure_arrays
from bulk import measure_bulk
from chart import can_draw, draw
from contestants import CONTESTANTS
from idleness import measure_idleness
from isolation import measure_isolation
from mappers import JOBLIB
from memory import measure_memory
from report import Line, Report, as_json, print_summary
from scaling import measure_scaling
from settings import WORKERS, Settings, StartMethod
from sharing import measure_sharing
from startup import measure_startup
from throughput import measure_throughput
from uneven import measure_uneven

__all__ = ["main"]

ROUNDS, QUICK_ROUNDS = 5, 1
JOBS, QUICK_JOBS = 10_000, 1_000

BENCHMARKS: dict[str, Callable[[Settings], Report]] = {
    "throughput": measure_throughput,
    "scaling": measure_scaling,
    "bulk": measure_bulk,
    "memory": measure_memory,
    "uneven": measure_uneven,
    "arrays": measure_arrays,
    "sharing": measure_sharing,
    "idle": measure_idleness,
    "isolation": measure_isolation,
    "startup": measure_startup,
}
"""Each measures, prints its table and returns what goes into the summary and the JSON file."""
ON_REQUEST = ("isolation", "startup")
"""They compare no ratio with a target, and take minutes."""


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    settings = _settings(options)
    machine = _machine()
    print(_heading(machine, settings), flush=True)
    figures: dict[str, object] = {"machine": machine, "settings": asdict(settings)}
    lines: list[Line] = []
    for name in (name for name in BENCHMARKS if name in options.only):
        start = time.perf_counter()
        report = BENCHMARKS[name](settings)
        print(f"  ({name} took {time.perf_counter() - start:.0f} s)", flush=True)
        figures[name] = report.figures
        lines += report.lines
        # Written each time, so that a run that is broken off has left what it found.
        if options.json:
            figures["summary"] = as_json(lines)
            options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if lines:
        print_summary(lines)
    if options.png:
        draw(lines, _caption(machine, settings), options.png)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    by_default = [name for name in BENCHMARKS if name not in ON_REQUEST]
    methods = multiprocessing.get_all_start_methods()
    add(
        "--only",
        nargs="+",
        choices=BENCHMARKS,
        default=by_default,
        metavar="NAME",
        help=f"of {', '.join(BENCHMARKS)}; by default all but {' and '.join(ON_REQUEST)}",
    )
    add("--quick", action="store_true", help="a tenth of everything, once: shows that it works, no figures")
    add("--rounds", type=_at_least_1, help=f"measurements of each contestant (default {ROUNDS})")
    add("--jobs", type=_at_least_1, help=f"no-op jobs in one measurement of dispatch (default {JOBS})")
    add("--start-method", choices=methods, default=_default_method(), help="default %(default)s")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--png", type=_drawable, metavar="FILE", help="draw the ratios there (takes matplotlib)")
    return parser.parse_args(arguments)


def _settings(options: argparse.Namespace) -> Settings:
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    jobs = options.jobs or (QUICK_JOBS if options.quick else JOBS)
    return Settings(rounds, jobs, options.start_method, options.quick)


def _at_least_1(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _drawable(text: str) -> Path:
    # Why here: after all measurements would be too late to say it.
    if not can_draw():
        raise argparse.ArgumentTypeError("matplotlib is not installed; pip install '.[bench]'")
    return Path(text)


def _default_method() -> StartMethod:
    """bulkhead's own default."""
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def _machine() -> dict[str, Any]:
    libraries = {c.distribution: c.version() for c in (*CONTESTANTS, JOBLIB, COPY) if c.distribution}
    return {
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpus": os.cpu_count(),
        "busy_percent_before": psutil.cpu_percent(interval=1.0),
        "default_start_method": multiprocessing.get_context().get_start_method(),
        "versions": libraries,
    }


def _heading(machine: dict[str, Any], settings: Settings) -> str:
    lines = [
        f"Python {machine['python']}, {machine['system']}, {machine['cpus']} CPUs, {machine['taken_at']}",
        f"CPUs in use by others just before: {machine['busy_percent_before']:.0f} %; from 10 % on, trust no figure",
        f"multiprocessing's default start method here: {machine['default_start_method']}",
        ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
    ]
    if settings.is_quick:
        lines.append("QUICK: it works or it does not; the figures mean nothing")
    return "\n".join(lines)


def _caption(machine: dict[str, Any], settings: Settings) -> str:
    return (
        f"{WORKERS} workers ({settings.start_method}), {machine['cpus']} CPUs, {machine['system']}, "
        f"Python {machine['python']}, {machine['taken_at'][:10]}; medians of up to {settings.rounds} rounds"
    )


if __name__ == "__main__":
    main()
