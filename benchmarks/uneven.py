"""How long does a map take whose jobs differ much in length: one in a hundred takes a hundred times as long?

With chunks that are too large a worker ends up with several long jobs while the other has nothing left; with chunks
that are too small the way there and back counts. bulkhead finds the size by itself. For every peer first all chunk
sizes are tried; then its best one takes part in the rounds. The jobs are a fixed amount of hashing, so that
the CPU time that a library needs in the caller is lost to the workers, as it is for a script that computes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from contestants import Contestant, installed
from mappers import (
    BULKHEAD_MAP,
    BULKHEAD_MAP_UNORDERED,
    EXECUTOR_MAP,
    JOBLIB,
    MAPPERS_BY_NAME,
    MPIRE_MAP,
    PEBBLE_MAP,
    POOL_IMAP_UNORDERED,
    POOL_MAP,
    Map,
    timed,
)
from report import Line, Report
from rounds import Rounds, measure_in_rounds
from settings import WORKERS, Settings, StartMethod
from tables import ABSENT, duration, median, print_table
from watchdog import watched
from workload import digest

__all__ = ["measure_uneven"]

JOBS = 4_000
LONG_ONE_IN = 100
LONG_TIMES = 100
SHORT_SECONDS = 0.0002
SEED = 11
"""The long jobs lie at the same random places for every contestant (the number is arbitrary)."""
WARM_UP_JOBS = 200
CALIBRATION_TURNS = 400
CALIBRATIONS = 40
"""The fastest counts: others only ever make it slower."""
TRIES = 2
"""Measurements of each chunk size before the rounds; the faster one counts."""
WITHIN = 1.1
"""How many times the best peer's time bulkhead may take."""

Sizes = tuple[int | None, ...]
"""Chunk sizes to try; None is the library's default."""

PEERS: dict[Contestant[Map], Sizes] = {
    POOL_MAP: (None, 1, 4, 16, 64),
    POOL_IMAP_UNORDERED: (1, 4, 16, 64),
    EXECUTOR_MAP: (1, 4, 16, 64),
    MPIRE_MAP: (None, 4, 16, 64),
    JOBLIB: (None, 4, 16, 64),
    PEBBLE_MAP: (1, 4, 16, 64),
}
CONTESTANTS = (BULKHEAD_MAP, BULKHEAD_MAP_UNORDERED, *PEERS)

Trials = dict[str, dict[int | None, float]]
"""Seconds by contestant and chunk size."""


def measure_uneven(settings: Settings) -> Report:
    """Try the chunk sizes, measure, print the table."""
    jobs = _jobs(settings.scaled(JOBS))
    trials = {
        contestant.name: _try_sizes(contestant, sizes, jobs, settings.start_method)
        for contestant, sizes in PEERS.items()
        if contestant.is_installed()
    }
    best = {name: min(seconds, key=seconds.__getitem__) for name, seconds in trials.items()}
    found = measure_in_rounds(
        installed(CONTESTANTS),
        settings.rounds,
        lambda name: _measure(MAPPERS_BY_NAME[name], best.get(name), jobs, settings.start_method),
    )
    print_table(
        f"map of {len(jobs):,} jobs of {duration(SHORT_SECONDS)}, one in {LONG_ONE_IN} of "
        f"{duration(SHORT_SECONDS * LONG_TIMES)}, {WORKERS} workers ({settings.start_method}); median of the rounds",
        (
            "",
            "chunks",
            "seconds",
            "lowest",
            "highest",
            "bulkhead / this",
            "when tried: seconds by chunk size",
        ),
        [_row(contestant, best, trials, found) for contestant in CONTESTANTS],
        flush_left=(0, 1, 6),
    )
    found.print_busy()
    tried = {name: {_worded(size): s for size, s in of.items()} for name, of in trials.items()}
    return Report(found.figures() | {"tried": tried}, [_line(best, found)])


def _jobs(count: int) -> list[int]:
    """Return the number of turns of each job."""
    short = round(SHORT_SECONDS / _seconds_per_turn())
    is_long = [i % LONG_ONE_IN == 0 for i in range(count)]
    random.Random(SEED).shuffle(is_long)
    return [short * LONG_TIMES if is_it else short for is_it in is_long]


def _seconds_per_turn() -> float:
    def once() -> float:
        start = time.perf_counter()
        digest(CALIBRATION_TURNS)
        return time.perf_counter() - start

    return min(once() for _ in range(CALIBRATIONS)) / CALIBRATION_TURNS


def _try_sizes(
    contestant: Contestant[Map], sizes: Sizes, jobs: Sequence[int], method: StartMethod
) -> dict[int | None, float]:
    with watched(), contestant.open(WORKERS, method) as mapped:
        timed(mapped, digest, jobs[:WARM_UP_JOBS], None)
        return {size: min(timed(mapped, digest, jobs, size) for _ in range(TRIES)) for size in sizes}


def _measure(
    contestant: Contestant[Map], size: int | None, jobs: Sequence[int], method: StartMethod
) -> float:
    with contestant.open(WORKERS, method) as mapped:
        timed(mapped, digest, jobs[:WARM_UP_JOBS], size)
        return timed(mapped, digest, jobs, size)


def _row(
    contestant: Contestant[Map], best: dict[str, int | None], trials: Trials, found: Rounds[float]
) -> tuple[str, ...]:
    name = contestant.name
    of = found.samples.get(name)
    if not of:
        return (name, ABSENT, "", "", "", "", "")
    ratio = found.ratio(name, float, of=BULKHEAD_MAP.name)
    return (
        name,
        _worded(best.get(name)),
        f"{median(of):.3f}",
        f"{min(of):.3f}",
        f"{max(of):.3f}",
        "" if ratio is None else f"{ratio:.2f}",
        ", ".join(f"{_worded(size)} {seconds:.2f}" for size, seconds in trials.get(name, {}).items()),
    )


def _line(best: dict[str, int | None], found: Rounds[float]) -> Line:
    """Return the comparison with the peer that bulkhead does worst against."""
    lines = [
        found.line(
            "map of uneven jobs",
            peer,
            float,
            duration,
            target=1 / WITHIN,
            called=f"the best: {peer}, chunks: {_worded(size)}",
            of=BULKHEAD_MAP.name,
        )
        for peer, size in best.items()
    ]
    return min(lines, key=lambda line: line.ratio or 0)


def _worded(size: int | None) -> str:
    return "default" if size is None else str(size)
