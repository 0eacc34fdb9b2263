"""Watching processes from outside: which there are, and waiting for what should become true of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import psutil
from waiting import PATIENCE, wait_until

from bulkhead import Dispatcher, Job

SERVERS = ("redis-server", "nats-server")


def is_alive(pid: int) -> bool:
    """Tell whether there is such a process and it runs: what waits to be reaped does not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def children() -> list[psutil.Process]:
    """Return the processes below this one, without the servers that tests share (conftest.py)."""
    found = psutil.Process().children(recursive=True)
    return [child for child in found if child.is_running() and child.name() not in SERVERS]


def alive(pids: Iterable[int]) -> list[int]:
    return [pid for pid in pids if is_alive(pid)]


def worker_pids(disp: Dispatcher, priority: int = 0) -> list[int]:
    """Return the pids of the pool's workers that are idle or busy."""
    return [one.pid for one in disp.stats()[priority].processes if one.pid and one.state in ("idle", "busy")]


def launcher_pid(disp: Dispatcher, priority: int = 0) -> int:
    """Return the process that starts the pool's workers: their parent."""
    (pid,) = {psutil.Process(pid).ppid() for pid in worker_pids(disp, priority)}
    return pid


def wait_until_whole(disp: Dispatcher, priority: int = 0, *, within: float = PATIENCE) -> None:
    """Wait until every worker of the pool is alive and idle."""

    def is_whole() -> bool:
        stats = disp.stats()[priority]
        pids = {one.pid for one in stats.processes if one.state == "idle"}
        return stats.idle == stats.workers == len(pids) and len(alive(pids)) == stats.workers

    wait_until(is_whole, "all workers alive and idle", within=within)


def assert_whole(disp: Dispatcher, priority: int = 0) -> None:
    """Prove that the pool has all its workers, that they take jobs and that a barrier returns."""
    wait_until_whole(disp, priority)
    jobs = [Job(pow, number, 2).options(priority=priority) for number in range(6)]
    trackers = [disp.dispatch(job, timeout=PATIENCE) for job in jobs]
    assert [tracker.result(PATIENCE) for tracker in trackers] == [number**2 for number in range(6)]
    disp.barrier(priority, timeout=PATIENCE, check=False)


def read_pids(path: Path, count: int = 1) -> list[int]:
    """Return the pids that jobs have noted in the file, when there are so many."""
    wait_until(lambda: path.exists() and len(path.read_text().splitlines()) >= count, f"pids in {path.name}")
    return [int(line) for line in path.read_text().splitlines()]


def bytes_moved() -> int:
    """Return how many bytes this process has read and written so far (Linux)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))


def shared_memory() -> set[str]:
    try:
        return set(os.listdir("/dev/shm"))
    except OSError:
        return set()
