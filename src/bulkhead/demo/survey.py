"""Survey the source files of Python's own standard library, in two phases on two pools.

Phase 1 measures every module on the wide pool (priority 0). Whenever a batch of modules is measured, its summary
goes through the urgent pool (priority 1), which has a process of its own and never waits for the wide one. Three
jobs of the wide pool misbehave on purpose: one kills its process, one hangs, one fails twice before it works.

A barrier ends the phase. Phase 2 needs all of its results: it follows the imports from module to module.

    bulkhead demo
    bulkhead demo --workers 4 --limit 100
    bulkhead demo --progress --timeline survey.html
"""

import os
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bulkhead import Dispatcher, DispatcherStats, Job, JobState, JobStatus, Pool, RetryPolicy, Tracker
from bulkhead.demo.measures import (
    Module,
    Totals,
    import_graph,
    measure,
    most_imported,
    reach,
    source_files,
    summarise,
)

__all__ = ["survey"]

WIDE, URGENT = 0, 1  # the priorities of the two pools
BATCH = 50  # modules to a summary, and to a job of phase 2; arbitrary
HANG_TIMEOUT = 2.0  # seconds until the job that hangs is given up
CRASH, HANG, FLAKY = "crash", "hang", "flaky"  # the ids of the jobs that misbehave


@dataclass(frozen=True)
class Phase1:
    """What was measured, and how the jobs fared."""

    modules: list[Module]
    totals: Totals
    measurements: list[JobStatus]
    summaries: list[JobStatus]
    misbehaved: dict[str, JobStatus]


@dataclass(frozen=True)
class Phase2:
    """Where the imports lead."""

    links: int
    most_imported: list[tuple[str, int]]
    reach: dict[str, int]


def survey(*, workers: int, limit: int | None, progress: bool, timeline: Path | None) -> None:
    """Run both phases and print what was found.

    Args:
        workers: Processes of the wide pool.
        limit: How many modules to measure; None means all.
        progress: Show live progress.
        timeline: Where to write the page of who did what when.
    """
    files = source_files(limit)
    print(f"Python {platform.python_version()}, {len(files)} modules of its standard library")
    pools = [
        Pool(priority=WIDE, n_workers=workers, name="wide"),
        Pool(priority=URGENT, n_workers=1, name="urgent"),
    ]
    with Dispatcher(pools, progress=progress) as disp:
        started = time.monotonic()
        first = run_phase1(disp, files)
        print_phase1(first, elapsed=time.monotonic() - started)

        started = time.monotonic()
        second = run_phase2(disp, first.modules)
        print_phase2(second, elapsed=time.monotonic() - started)

        print_pools(disp.stats())
    print_sum(first, second)
    if timeline is not None:
        disp.timeline().save_html(timeline, title="Survey of the standard library")
        print(f"\nTimeline: {timeline}")


def run_phase1(disp: Dispatcher, files: Sequence[Path]) -> Phase1:
    """Measure every file on the wide pool; sum up each batch of measured modules on the urgent one."""
    measured: list[Tracker] = []
    waiting: list[Tracker] = []  # those of them that are in no summary yet
    summaries: list[Tracker] = []
    with tempfile.TemporaryDirectory() as folder:
        for job in wide_jobs(files, attempts=Path(folder) / "attempts"):
            tracker = disp.dispatch(job)  # waits until a worker of the wide pool is free
            if tracker.id in (CRASH, HANG):
                continue
            measured.append(tracker)
            waiting.append(tracker)
            if batch := take_batch(waiting):
                summaries.append(disp.dispatch(summary(batch)))
        disp.barrier(WIDE, check=False)  # everything is measured; check=False as two jobs are meant to fail
    if waiting:
        summaries.append(disp.dispatch(summary(waiting)))
    disp.barrier(check=False)
    return Phase1(
        modules=[tracker.result() for tracker in measured],
        totals=sum((tracker.result() for tracker in summaries), start=Totals()),
        measurements=[tracker.status() for tracker in measured],
        summaries=[tracker.status() for tracker in summaries],
        misbehaved={name: disp.job(name).status() for name in (CRASH, HANG, FLAKY)},
    )


def run_phase2(disp: Dispatcher, modules: Sequence[Module]) -> Phase2:
    """Follow the imports of every module on the wide pool; rank the modules on the urgent one."""
    graph = import_graph(modules)
    names = sorted(graph)
    ranking = disp.dispatch(Job(most_imported, graph).options(priority=URGENT))
    parts = [
        disp.dispatch(Job(reach, graph, names[start : start + BATCH]).options(priority=WIDE))
        for start in range(0, len(names), BATCH)
    ]
    disp.barrier()  # raises JobsFailed if any job of this phase failed
    return Phase2(
        links=sum(len(targets) for targets in graph.values()),
        most_imported=ranking.result(),
        reach={name: count for part in parts for name, count in part.result().items()},
    )


def wide_jobs(files: Sequence[Path], attempts: Path) -> Iterator[Job]:
    """One job for each file; half-way, two that are lost and a file that is hard to read."""
    half = len(files) // 2
    for path in files[:half]:
        yield Job(measure, path).options(priority=WIDE)
    yield Job(crash).options(priority=WIDE, id=CRASH)
    yield Job(hang).options(priority=WIDE, id=HANG, timeout=HANG_TIMEOUT)
    thrice = RetryPolicy(3, initial=0.1)
    yield Job(measure_at_third, files[half], attempts).options(priority=WIDE, id=FLAKY, retry=thrice)
    for path in files[half + 1 :]:
        yield Job(measure, path).options(priority=WIDE)


def summary(measured: Sequence[Tracker]) -> Job:
    return Job(summarise, [tracker.result() for tracker in measured]).options(priority=URGENT)


def take_batch(waiting: list[Tracker]) -> list[Tracker]:
    """Remove the trackers that are done and return them; do nothing while they are too few for a batch."""
    done = [tracker for tracker in waiting if tracker.done()]
    if len(done) < BATCH:
        return []
    waiting[:] = [tracker for tracker in waiting if tracker not in done]
    return done


def crash() -> None:
    """End this process on the spot, as a bug in a C extension would."""
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    """Never come back."""
    while True:
        time.sleep(1)


def measure_at_third(path: Path, attempts: Path) -> Module:
    """Fail twice, as a busy file server would, then measure."""
    with attempts.open("a") as file:
        file.write("x")
    if attempts.stat().st_size < 3:
        raise OSError(f"the file server is busy: {path.name}")
    return measure(path)


def print_phase1(found: Phase1, elapsed: float) -> None:
    others = [status for status in found.measurements if status.id != FLAKY] + found.summaries
    smooth = [status for status in others if status.state is JobState.SUCCEEDED and status.attempt == 1]
    meanwhile = [status for status in others if ended_during(found.misbehaved[HANG], status)]
    summary_ms = statistics.median(seconds_taken(status) for status in found.summaries) * 1000

    print(f"\nPhase 1, {elapsed:.1f} s: each module measured (wide pool), batches summed up (urgent pool)")
    print(f"  {len(found.modules)} modules measured, {len(found.summaries)} summaries made")
    print("  three jobs of the wide pool misbehaved on purpose:")
    for name, status in found.misbehaved.items():
        print(f"    {name:<6} {outcome(status)}")
    print("  nothing else noticed:")
    print(f"    {len(smooth)} of the {len(others)} other jobs succeeded at their first attempt")
    print(f"    {len(meanwhile)} of them while the one that hung held its worker")
    print(f"    a summary was back {summary_ms:.1f} ms after it was asked for (median)")


def print_phase2(found: Phase2, elapsed: float) -> None:
    furthest = max(found.reach, key=lambda name: (found.reach[name], name))
    print(f"\nPhase 2, {elapsed:.1f} s: imports followed (wide pool), modules ranked (urgent pool)")
    ranking = ", ".join(f"{name} ({count})" for name, count in found.most_imported)
    print(f"  most imported: {ranking}")
    print(f"  importing most, directly or not: {furthest} ({found.reach[furthest]} modules)")


def print_pools(stats: DispatcherStats) -> None:
    print("\nPools")
    print("  name    priority  jobs  succeeded  failed  retried  restarts    busy")
    for pool in stats.pools.values():
        jobs = pool.succeeded + pool.failed + pool.cancelled
        print(
            f"  {pool.name:<6}  {pool.priority:>8}  {jobs:>4}  {pool.succeeded:>9}  {pool.failed:>6}"
            f"  {pool.retried:>7}  {pool.restarts:>8}  {pool.busy_seconds:>4.1f} s"
        )
    print("\nWorkers")
    print("  pool         pid  jobs    busy")
    for pool in stats.pools.values():
        for worker in pool.processes:
            print(
                f"  {pool.name:<6}  {worker.pid or 'starting':>8}  {worker.jobs:>4}  {worker.busy_seconds:>4.1f} s"
            )
        gone = pool.busy_seconds - sum(worker.busy_seconds for worker in pool.processes)
        if pool.restarts:
            print(f"  {pool.name:<6}  replaced        {gone:>4.1f} s")


def print_sum(first: Phase1, second: Phase2) -> None:
    print("\nSum")
    print(f"  modules            {first.totals.modules:>9,}")
    print(f"  lines              {first.totals.lines:>9,}")
    print(f"  functions          {first.totals.functions:>9,}")
    print(f"  classes            {first.totals.classes:>9,}")
    print(f"  deepest nesting    {first.totals.nesting:>9,}")
    print(f"  imports            {second.links:>9,}  from one of these modules to another")
    print(f"  reachable pairs    {sum(second.reach.values()):>9,}  the same, over any number of steps")


def outcome(status: JobStatus) -> str:
    if status.state is JobState.SUCCEEDED:
        return f"succeeded at attempt {status.attempt}"
    message = (status.error_message or "").partition("\n")[0]
    return f"{status.state.value}, {status.error_type}: {message}"


def ended_during(other: JobStatus, status: JobStatus) -> bool:
    if other.started_at is None or other.finished_at is None or status.finished_at is None:
        return False
    return other.started_at < status.finished_at < other.finished_at


def seconds_taken(status: JobStatus) -> float:
    if status.queued_at is None or status.finished_at is None:
        return 0.0
    return (status.finished_at - status.queued_at).total_seconds()
