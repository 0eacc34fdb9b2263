"""What does a pool with nothing to do cost?

A caller in a process of its own (`probe.py rest`) runs some jobs and then blocks in a read. From
outside, the CPU time and the context switches of every thread of the caller and of all its descendants
are read before and after a pause; the switches are how often something woke up. All callers are watched
in the same pause, so one observer costs each the same.

Why /proc and not psutil alone: its context switches are those of the main thread only, and CPU times
come in ticks of 10 ms, which a poll every 100 ms does not fill. Elsewhere than on Linux psutil's numbers
are what there is.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from contestants import BULKHEAD, CONTESTANTS, Contestant, Session
from probing import probe_command
from report import Report, worded
from settings import WORKERS, Settings, StartMethod
from tables import ABSENT, print_table
from watchdog import watched

__all__ = ["measure_idleness"]

WARM_UP_JOBS = 200
SETTLE_SECONDS = 2.0
"""Lets buffers, collectors and one-off timers of all contestants come to rest."""
WATCH_SECONDS = 5.0
VARIANTS_OF = ("bulkhead,", "multiprocessing.Pool,")
"""Rows that differ in use, not in what rests."""


@dataclass(frozen=True)
class Activity:
    """What some threads have used since they began."""

    cpu_seconds: float
    switches: int


Snapshot = dict[int, Activity]
"""By process id."""


@dataclass(frozen=True)
class Rest:
    """What one contestant used while it had nothing to do, its caller apart from its other processes."""

    processes: int
    caller: Activity
    others: Activity


def measure_idleness(settings: Settings) -> Report:
    """Watch once and print the table."""
    measured = [c for c in CONTESTANTS if not c.name.startswith(VARIANTS_OF)]
    rests = _watch(
        [contestant for contestant in measured if contestant.is_installed()], settings.start_method
    )
    print_table(
        f"An idle pool of {WORKERS} workers ({settings.start_method}), watched for {WATCH_SECONDS:g} s",
        ("", "processes", "caller CPU ms", "switches", "others CPU ms", "switches"),
        [_row(contestant, rests.get(contestant.name)) for contestant in measured],
    )
    ours = rests.get(BULKHEAD.name)
    found = ABSENT if ours is None else worded(ours.caller.switches + ours.others.switches == 0)
    print(f"  target: bulkhead wakes up 0 times; reached: {found}")
    return Report(
        {"watch_seconds": WATCH_SECONDS, "rests": {name: asdict(rest) for name, rest in rests.items()}}
    )


def _watch(contestants: Sequence[Contestant[Session]], start_method: StartMethod) -> dict[str, Rest]:
    with watched(), ExitStack() as stack:
        probes = {c.name: _start_probe(stack, c.name, start_method) for c in contestants}
        time.sleep(SETTLE_SECONDS)
        before = {name: _snapshot(probe.pid) for name, probe in probes.items()}
        time.sleep(WATCH_SECONDS)
        after = {name: _snapshot(probe.pid) for name, probe in probes.items()}
        rests = {name: _rest(probe.pid, before[name], after[name]) for name, probe in probes.items()}
        for probe in probes.values():
            probe.communicate("end\n")
    return rests


def _start_probe(stack: ExitStack, name: str, start_method: StartMethod) -> subprocess.Popen[str]:
    command = probe_command("rest", name, WORKERS, start_method, WARM_UP_JOBS)
    probe = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    # After communicate() this finds nothing to do; on the way out by an error it ends the caller.
    stack.callback(probe.kill)
    assert probe.stdout is not None
    if not probe.stdout.readline():
        raise RuntimeError(f"{name} ended before it came to rest")
    return probe


def _snapshot(pid: int) -> Snapshot:
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return {process.pid: _activity(process) for process in family}


def _activity(process: psutil.Process) -> Activity:
    threads = Path(f"/proc/{process.pid}/task")
    if not (threads / str(process.pid) / "schedstat").exists():
        times, switches = process.cpu_times(), process.num_ctx_switches()
        return Activity(times.user + times.system, switches.voluntary + switches.involuntary)
    nanoseconds = switches_of_all = 0
    for thread in threads.iterdir():
        nanoseconds += int((thread / "schedstat").read_text().split()[0])
        lines = (thread / "status").read_text().splitlines()
        switches_of_all += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    return Activity(nanoseconds / 1e9, switches_of_all)


def _rest(caller: int, before: Snapshot, after: Snapshot) -> Rest:
    """A process that came meanwhile counts in full; one that went is an error: its use is not known."""
    gone = before.keys() - after.keys()
    if gone:
        raise RuntimeError(f"processes ended while they were watched: {sorted(gone)}")
    nothing = Activity(0.0, 0)
    used = {
        pid: Activity(
            now.cpu_seconds - before.get(pid, nothing).cpu_seconds,
            now.switches - before.get(pid, nothing).switches,
        )
        for pid, now in after.items()
    }
    others = [activity for pid, activity in used.items() if pid != caller]
    total = Activity(sum(a.cpu_seconds for a in others), sum(a.switches for a in others))
    return Rest(len(after), used[caller], total)


def _row(contestant: Contestant[Session], rest: Rest | None) -> tuple[str, ...]:
    if rest is None:
        return (contestant.name, ABSENT, "", "", "", "")
    cells = [str(rest.processes)]
    for activity in (rest.caller, rest.others):
        cells += [f"{activity.cpu_seconds * 1000:.2f}", str(activity.switches)]
    return (contestant.name, *cells)
