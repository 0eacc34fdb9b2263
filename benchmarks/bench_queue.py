"""Measure bulkhead's durable queue beside others: no-op jobs end to end, enqueueing alone, latency at low load.

    python benchmarks/bench_queue.py [--only NAME ...] [--jobs 20000] [--rounds 3] [--json FILE] [--png FILE]

Every queue gets the same Redis (started here, append-only file, fsync every second), two processes that run jobs, and
its own quickest way to enqueue from one process. "End to end" counts from the first enqueue until each job's result can
be read, with the workers up and idle before. The queues take turns, round by round; what is printed is the median. A
library that is not installed gets a line that says so. Compare figures of one run only.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chart import can_draw
from keeper import die_with_parent
from queue_chart import draw
from tables import percentile, print_table

HERE = Path(__file__).parent

# Name, module (with where its jobs are kept, if that is not Redis), package that it needs, how many jobs are enough
# for a figure (a share of --jobs).
ON_REDIS = (
    ("bulkhead", "q_bulkhead", "bulkhead", 1.0),
    ("bulkhead, one by one", "q_bulkhead_single", "bulkhead", 1.0),
    ("RQ, SimpleWorker", "q_rq_simple", "rq", 0.2),
    ("RQ", "q_rq", "rq", 0.02),
    ("Huey", "q_huey", "huey", 0.2),
    ("Dramatiq", "q_dramatiq", "dramatiq", 0.2),
    ("Celery", "q_celery", "celery", 0.2),
    ("taskiq", "q_taskiq", "taskiq_redis", 0.2),
    ("arq", "q_arq", "arq", 0.2),
    ("saq", "q_saq", "saq", 0.2),
)
ON_NATS = (("bulkhead, NATS", "q_bulkhead@nats", "nats", 0.2),)
ON_SQLITE = (
    ("bulkhead, SQLite", "q_bulkhead@sqlite", "bulkhead", 1.0),
    ("Huey, SQLite", "q_huey_sqlite", "huey", 0.1),
)

# Under the picture.
PLACE = "Each with two processes that run jobs, results kept, on the same server (but for SQLite and NATS)"

REDIS = (
    *("redis-server", "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"),
    *("--appendfsync", "everysec", "--port"),
)
NATS = ("nats-server", "--addr", "127.0.0.1", "--jetstream", "--store_dir", "jetstream", "--port")

LATENCIES = 40
PATIENCE = 120.0


def main() -> None:
    options = _parse()
    samples: dict[str, list[dict[str, Any]]] = {}
    for number in range(options.rounds):
        chosen = [
            one for one in (*ON_REDIS, *ON_SQLITE, *ON_NATS) if not options.only or one[0] in options.only
        ]
        for name, module, package, share in chosen:
            if importlib.util.find_spec(package) is None:
                print(f"  {name}: {package} is not installed", flush=True)
                continue
            try:
                sample = _measure(module, max(100, int(options.jobs * share)))
            except Exception as error:
                print(f"  round {number + 1}  {name:22} failed: {error}", flush=True)
                continue
            samples.setdefault(name, []).append(sample)
            print(
                f"  round {number + 1}  {name:22} {sample['end_to_end']:10,.0f} jobs/s end to end,"
                f" {sample['enqueue']:10,.0f}/s enqueued",
                flush=True,
            )
    figures = {name: _figures(found) for name, found in samples.items()}
    _print(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.png:
        draw(figures, f"{PLACE}, {os.cpu_count()} cores, {options.rounds} round(s)", options.png)


def _figures(samples: list[dict[str, Any]]) -> dict[str, float]:
    latencies = [value for sample in samples for value in sample["latencies"]]
    return {
        "end_to_end": statistics.median(sample["end_to_end"] for sample in samples),
        "enqueue": statistics.median(sample["enqueue"] for sample in samples),
        "latency_p50": percentile(latencies, 50),
        "latency_p99": percentile(latencies, 99),
    }


def _print(figures: dict[str, dict[str, float]]) -> None:
    rows = []
    for name, one in figures.items():
        ours = figures.get("bulkhead, SQLite" if "SQLite" in name else "bulkhead")
        ratio = "" if ours is None or ours is one else f"{ours['end_to_end'] / one['end_to_end']:.1f}"
        rows.append(
            [
                name,
                f"{one['end_to_end']:,.0f}",
                ratio,
                f"{one['enqueue']:,.0f}",
                f"{one['latency_p50'] * 1000:.1f}",
                f"{one['latency_p99'] * 1000:.1f}",
            ]
        )
    headings = ["queue", "jobs/s end to end", "bulkhead is x", "enqueued/s", "start p50 ms", "p99 ms"]
    print_table("No-op jobs, two processes that run them", headings, rows)


def _measure(module: str, n: int) -> dict[str, Any]:
    """Measure one queue in a process of its own, with a fresh server. Nothing of it outlives us: see keeper.py."""
    measuring = [sys.executable, str(HERE / "bench_queue.py"), "--measure", module, "--jobs", str(n)]
    theirs, ours = os.pipe()
    with subprocess.Popen(
        [sys.executable, str(HERE / "keeper.py"), *measuring],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])},
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as keeper:
        os.close(theirs)
        try:
            told, complaint = keeper.communicate(timeout=3 * PATIENCE)
        finally:
            os.close(ours)
    if keeper.returncode:
        raise RuntimeError(complaint.strip().splitlines()[-1] if complaint.strip() else "no reason told")
    sample: dict[str, Any] = json.loads(told.strip().splitlines()[-1])
    return sample


def _measure_here(contestant: str, n: int) -> None:
    module_name, _, place = contestant.partition("@")
    with contextlib.ExitStack() as servers:
        port = servers.enter_context(_server(*REDIS))
        os.environ["BENCH_REDIS_PORT"] = str(port)
        os.environ["BENCH_PLACE"] = place or "redis"
        if place == "nats":
            os.environ["BENCH_NATS_PORT"] = str(servers.enter_context(_server(*NATS)))
        os.environ["BENCH_SQLITE"] = str(Path("jobs.db").absolute())
        module = importlib.import_module(f"queues.{module_name}")
        with _workers(module.WORKERS):
            latencies = _latencies(module, port)
            left = module.n_left(0)
            began = time.perf_counter()
            module.enqueue(n)
            enqueued = time.perf_counter()
            deadline = time.monotonic() + PATIENCE
            while module.n_left(n + max(0, -left)) > 0:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{module.n_left(n)} of {n} jobs have no result after {PATIENCE:g} s")
                time.sleep(0.01)
            ended = time.perf_counter()
    sample = {"end_to_end": n / (ended - began), "enqueue": n / (enqueued - began), "latencies": latencies}
    print(json.dumps(sample))


def _latencies(module: Any, port: int) -> list[float]:
    """Have single jobs run on idle workers; the first ones only show that the workers are up."""
    import redis

    found = []
    with redis.Redis(port=port) as server:
        for number in range(LATENCIES + 3):
            module.enqueue_late()
            answer = server.blpop(["latencies"], timeout=30)
            if answer is None:
                raise TimeoutError("a single job has not run within 30 s")
            if number >= 3:
                found.append(float(answer[1]))
            time.sleep(0.03)
    return found


@contextlib.contextmanager
def _workers(commands: list[list[str]]) -> Iterator[None]:
    started = [
        subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - as below
        )
        for command in commands
    ]
    try:
        yield
    finally:
        for one in started:
            one.terminate()
        for one in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)
            one.wait()


@contextlib.contextmanager
def _server(program: str, *options: str) -> Iterator[int]:
    """Run a server of our own; its port is the last of the arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise FileNotFoundError(f"{program} is not installed")
    server = subprocess.Popen(
        [found, *options, str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent,  # noqa: PLW1509 - this process has one thread
    )
    try:
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.1):
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{program} does not answer")
            time.sleep(0.01)
        yield port
    finally:
        server.terminate()
        server.wait()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these queues alone")
    parser.add_argument("--jobs", type=int, default=20_000, help="no-ops of a round (default: 20000)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--png", type=Path, help="draw them there")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.png and not can_draw():
        parser.error("--png: matplotlib is not installed")
    return options


if __name__ == "__main__":
    asked = _parse()
    if asked.measure:
        _measure_here(asked.measure, asked.jobs)
    else:
        main()
