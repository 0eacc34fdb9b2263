"""How many no-op jobs per second go through one pool, and what CPU time does each cost the caller?

Each measurement has a pool of its own that is warmed up first. bulkhead has strictly one job per worker in
flight (backlog=0) and ends with the barrier; a peer gets all jobs into its queue, which is its advantage, and
ends with the last result.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

from contestants import BY_NAME, CONTESTANTS, EXECUTOR, STDLIB_POOL, Contestant, Session, installed
from report import Line, Report
from rounds import Rounds, measure_in_rounds
from settings import WORKERS, Settings
from tables import ABSENT, duration, median, per_second, print_table
from workload import noop

__all__ = ["Sample", "measure_speed", "measure_throughput"]

WARM_UP_JOBS = 500
POOL_CALL = "multiprocessing.Pool.apply_async"
EXECUTOR_CALL = "ProcessPoolExecutor.submit"
POOL_TARGET = 2.5
EXECUTOR_TARGET = 7.0
"""How many times the peer's jobs per second bulkhead is to reach."""


@dataclass(frozen=True)
class Sample:
    """One measurement, per job: time, and CPU time of the calling process."""

    seconds: float
    caller_cpu_seconds: float


def measure_throughput(settings: Settings) -> Report:
    """Measure and print the table."""
    found = measure_in_rounds(
        installed(CONTESTANTS),
        settings.rounds,
        lambda name: measure_speed(BY_NAME[name], WORKERS, settings),
    )
    print_table(
        f"{settings.jobs:,} no-op jobs, {WORKERS} workers ({settings.start_method}); median of the rounds",
        ("", "jobs/s", "lowest", "highest", "bulkhead / this", "caller CPU us/job"),
        [_row(contestant, found) for contestant in CONTESTANTS],
    )
    found.print_busy()
    return Report(found.figures(), _lines(found))


def measure_speed(contestant: Contestant[Session], workers: int, settings: Settings) -> Sample:
    """Time no-op jobs through a warm pool."""
    with contestant.open(workers, settings.start_method) as session:
        session.run(noop, WARM_UP_JOBS)
        gc.collect()
        cpu, start = time.process_time(), time.perf_counter()
        session.run(noop, settings.jobs)
        elapsed, used = time.perf_counter() - start, time.process_time() - cpu
    return Sample(elapsed / settings.jobs, used / settings.jobs)


def _row(contestant: Contestant[Session], found: Rounds[Sample]) -> tuple[str, ...]:
    of = found.samples.get(contestant.name)
    if not of:
        return (contestant.name, ABSENT, "", "", "", "")
    speeds = [1 / sample.seconds for sample in of]
    ratio = found.ratio(contestant.name, _seconds)
    return (
        contestant.name,
        f"{median(speeds):,.0f}",
        f"{min(speeds):,.0f}",
        f"{max(speeds):,.0f}",
        "" if ratio is None else f"{ratio:.2f}",
        f"{median(map(_cpu, of)) * 1e6:.1f}",
    )


def _lines(found: Rounds[Sample]) -> list[Line]:
    pool, executor = STDLIB_POOL.name, EXECUTOR.name
    speed, cpu = "dispatch, strict: jobs/s", "dispatch, strict: caller's CPU per job"
    return [
        found.line(speed, pool, _seconds, per_second, target=POOL_TARGET, called=POOL_CALL),
        found.line(speed, executor, _seconds, per_second, target=EXECUTOR_TARGET, called=EXECUTOR_CALL),
        found.line(cpu, pool, _cpu, duration, called=POOL_CALL),
    ]


def _seconds(sample: Sample) -> float:
    return sample.seconds


def _cpu(sample: Sample) -> float:
    return sample.caller_cpu_seconds
