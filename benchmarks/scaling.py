"""How many no-op jobs per second go through one pool of 1, 2, 8 and 64 workers, and what do they cost the caller?

As `throughput`, with more workers than there are CPUs: what is asked is what a worker more costs, not what it gains.
"""

from __future__ import annotations

from contestants import BULKHEAD, STDLIB_POOL, Contestant, Session
from report import Report
from rounds import Rounds, measure_in_rounds
from settings import Settings
from tables import ABSENT, per_second, print_table
from throughput import Sample, measure_speed

__all__ = ["measure_scaling"]

WORKERS = (1, 2, 8, 64)
MOST_ROUNDS = 3
"""More would take minutes: a round starts and ends 150 processes."""

Case = tuple[Contestant[Session], int]
CASES: dict[str, Case] = {f"{c.name}, {n}": (c, n) for n in WORKERS for c in (BULKHEAD, STDLIB_POOL)}


def measure_scaling(settings: Settings) -> Report:
    """Measure and print the table."""
    found = measure_in_rounds(
        [name for name, (contestant, _) in CASES.items() if contestant.is_installed()],
        min(settings.rounds, MOST_ROUNDS),
        lambda name: measure_speed(*CASES[name], settings),
    )
    print_table(
        f"{settings.jobs:,} no-op jobs by number of workers ({settings.start_method}); median of the rounds",
        ("", "workers", "jobs/s", "caller CPU us/job"),
        [_row(name, found) for name in CASES],
    )
    found.print_busy()
    lines = [
        found.line(
            f"dispatch, strict: jobs/s, workers: {n}",
            f"{STDLIB_POOL.name}, {n}",
            lambda sample: sample.seconds,
            per_second,
            called="multiprocessing.Pool.apply_async",
            of=f"{BULKHEAD.name}, {n}",
        )
        for n in WORKERS
    ]
    return Report(found.figures(), lines)


def _row(name: str, found: Rounds[Sample]) -> tuple[str, ...]:
    contestant, workers = CASES[name]
    seconds = found.median(name, lambda sample: sample.seconds)
    cpu = found.median(name, lambda sample: sample.caller_cpu_seconds)
    if seconds is None or cpu is None:
        return (contestant.name, str(workers), ABSENT, "")
    return (contestant.name, str(workers), per_second(seconds), f"{cpu * 1e6:.1f}")
