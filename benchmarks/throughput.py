"""How many no-op jobs per second go through one pool, and what CPU time does each cost the caller?

Every round measures every contestant once, one after the other and each in a pool of its own that is
warmed up first; the order moves on by one place per round. A ratio is formed within a round, where both
numbers saw the same machine, and the median of the ratios is printed. Within a measurement bulkhead has
strictly one job per worker in flight (backlog=0) and ends with the barrier; a peer gets all jobs into
its queue, which is its advantage, and ends with the last result.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import psutil
from contestants import BULKHEAD, CONTESTANTS, EXECUTOR, STDLIB_POOL, Contestant
from settings import Settings
from tables import ABSENT, median, print_table, verdict
from watchdog import watched
from workload import noop

__all__ = ["measure_throughput"]

WORKERS = 2
WARM_UP_JOBS = 500
BUSY_SAMPLE_SECONDS = 0.5
"""While nothing of ours runs. A busy round is shown, not left out: choosing rounds would be choosing results."""
TARGETS = {STDLIB_POOL.name: 2.0, EXECUTOR.name: 5.0}
"""How many times the peer's jobs per second bulkhead is to reach."""


@dataclass(frozen=True)
class Sample:
    """One measurement: jobs per second, and CPU time of the calling process per job."""

    jobs_per_second: float
    caller_cpu_microseconds: float


Samples = dict[str, list[Sample]]


def measure_throughput(settings: Settings) -> dict[str, object]:
    """Measure, print the table and the targets, return the figures for the JSON file."""
    installed = [contestant for contestant in CONTESTANTS if contestant.is_installed()]
    samples: Samples = {contestant.name: [] for contestant in installed}
    busy: list[float] = []
    for number in range(settings.rounds):
        busy.append(psutil.cpu_percent(BUSY_SAMPLE_SECONDS))
        for contestant in _rotate(installed, number):
            samples[contestant.name].append(_measure(contestant, settings))
    _print(samples, settings)
    print(f"  CPUs in use by others before each round: {', '.join(f'{percent:.0f} %' for percent in busy)}")
    return {
        "busy_percent_before_round": busy,
        "samples": {name: [asdict(sample) for sample in of] for name, of in samples.items()},
        "targets": {
            peer: {"target": at_least, "ratio": _ratio(samples, peer)} for peer, at_least in TARGETS.items()
        },
    }


def _measure(contestant: Contestant, settings: Settings) -> Sample:
    with watched(), contestant.open(WORKERS, settings.start_method) as session:
        session.run(noop, WARM_UP_JOBS)
        gc.collect()
        cpu, start = time.process_time(), time.perf_counter()
        session.run(noop, settings.jobs)
        elapsed, used = time.perf_counter() - start, time.process_time() - cpu
    return Sample(settings.jobs / elapsed, used / settings.jobs * 1e6)


def _rotate(contestants: Sequence[Contestant], places: int) -> list[Contestant]:
    at = places % len(contestants)
    return [*contestants[at:], *contestants[:at]]


def _ratio(samples: Samples, peer: str) -> float | None:
    """The median over the rounds of bulkhead's jobs per second divided by the peer's."""
    ours, theirs = samples.get(BULKHEAD.name), samples.get(peer)
    if not ours or not theirs:
        return None
    return median(a.jobs_per_second / b.jobs_per_second for a, b in zip(ours, theirs, strict=True))


def _print(samples: Samples, settings: Settings) -> None:
    print_table(
        f"{settings.jobs} no-op jobs, {WORKERS} workers ({settings.start_method}); median of the rounds",
        ("", "jobs/s", "lowest", "highest", "bulkhead / this", "caller CPU us/job"),
        [_row(contestant, samples) for contestant in CONTESTANTS],
    )
    for peer, at_least in TARGETS.items():
        ratio = _ratio(samples, peer)
        found = ABSENT if ratio is None else f"{ratio:.2f} times: {verdict(ratio >= at_least)}"
        print(f"  target: at least {at_least:g} times {peer}; {found}")


def _row(contestant: Contestant, samples: Samples) -> tuple[str, ...]:
    of = samples.get(contestant.name)
    if not of:
        return (contestant.name, ABSENT, "", "", "", "")
    speeds = [sample.jobs_per_second for sample in of]
    ratio = _ratio(samples, contestant.name)
    return (
        contestant.name,
        f"{median(speeds):,.0f}",
        f"{min(speeds):,.0f}",
        f"{max(speeds):,.0f}",
        "" if ratio is None else f"{ratio:.2f}",
        f"{median(sample.caller_cpu_microseconds for sample in of):.1f}",
    )
