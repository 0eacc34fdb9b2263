"""Two pools share no lock, thread, poller, pipe or process; one that can do nothing at all holds no other up (A2)."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import faulty_jobs
import psutil
import pytest
from calling import Call
from watching import PATIENCE, assert_whole, launcher_pid, wait_until, wait_until_whole, worker_pids

from bulkhead import Dispatcher, Job, Pool

SYNCHRONISERS = (
    type(threading.Lock()),
    type(threading.RLock()),
    threading.Condition,
    threading.Event,
    threading.Semaphore,
    threading.Thread,
)
DEVICES = (select.epoll, socket.socket, subprocess.Popen)


@pytest.fixture
def disp() -> Iterator[Dispatcher]:
    disp = Dispatcher([Pool(0, 2), Pool(1, 2)])
    wait_until_whole(disp, 0)
    wait_until_whole(disp, 1)
    yield disp
    disp.finalize(cancel=True)


def engine_of(disp: Dispatcher, priority: int) -> Any:
    return disp._pools[priority]


def ledger_of(disp: Dispatcher, priority: int) -> Any:
    return engine_of(disp, priority)._acting._ledger


def parts_of(root: object, apart: Sequence[object] = ()) -> dict[int, object]:
    """Return every object that is reached from one through attributes, containers and bound methods, by identity.

    Args:
        root: Where to begin.
        apart: What not to enter.
    """
    found: dict[int, object] = {id(one): None for one in apart}
    pending = [root]
    while pending:
        one = pending.pop()
        if id(one) not in found:
            found[id(one)] = one
            pending += _next_to(one)
    return found


def _next_to(one: object) -> list[object]:
    if isinstance(one, (str, bytes, bytearray, int, float, type, type(os), threading.Thread)):
        return []
    if isinstance(one, dict):
        return [*one.keys(), *one.values()]
    if isinstance(one, (list, tuple, set, frozenset)) or type(one).__name__ == "deque":
        return list(one)
    if hasattr(one, "__self__") and hasattr(one, "__func__"):
        return [one.__self__]
    closure = getattr(one, "__closure__", None) or ()
    slots = [name for kind in type(one).__mro__ for name in _slots(kind)]
    attributes = [getattr(one, name, None) for name in slots]
    return [*(cell.cell_contents for cell in closure), *attributes, *getattr(one, "__dict__", {}).values()]


def _slots(kind: type) -> list[str]:
    names = kind.__dict__.get("__slots__", ())
    return [names] if isinstance(names, str) else list(names)


def descriptors_of(parts: dict[int, object]) -> set[int]:
    """Return the descriptors that these objects use: all that have a number for `fd` or give one by `fileno()`."""
    found = set()
    for one in parts.values():
        fd = getattr(one, "fd", None)
        if isinstance(fd, int) and fd >= 0:
            found.add(fd)
        if isinstance(one, DEVICES) and not isinstance(one, subprocess.Popen) and one.fileno() >= 0:
            found.add(one.fileno())
    return found


def test_two_pools_share_no_lock_thread_poller_socket_or_descriptor(disp: Dispatcher) -> None:
    for priority in (0, 1):
        disp.dispatch(Job(faulty_jobs.double, 4).options(priority=priority)).add_done_callback(lambda _: None)
    ledger = ledger_of(disp, 0)
    parts = [parts_of(engine_of(disp, priority), apart=[ledger]) for priority in (0, 1)]
    for kinds, least in ((SYNCHRONISERS, 4), (DEVICES, 3)):
        ours, others = ({key for key, one in mine.items() if isinstance(one, kinds)} for mine in parts)
        assert len(ours) >= least, "the search finds too little to prove anything"
        assert len(others) >= least
        shared = [parts[0][key] for key in ours & others]
        assert shared == []
    ours, others = map(descriptors_of, parts)
    assert len(ours) >= 6
    assert not ours & others


def test_the_record_of_jobs_that_both_pools_write_has_no_lock(disp: Dispatcher) -> None:
    ledger = ledger_of(disp, 0)
    assert ledger_of(disp, 1) is ledger
    pools = [engine_of(disp, 0), engine_of(disp, 1)]
    parts = parts_of(ledger, apart=pools)
    assert len(parts) > 5
    assert [one for one in parts.values() if isinstance(one, (*SYNCHRONISERS, *DEVICES))] == []


def test_each_pool_has_threads_of_its_own() -> None:
    before = {*threading.enumerate()}  # the end of what another test has dropped may take a moment
    with Dispatcher([Pool(0, 2), Pool(1, 2)]) as disp:
        wait_until_whole(disp, 0)
        wait_until_whole(disp, 1)
        names = [thread.name for thread in threading.enumerate() if thread not in before]
    assert sorted(names) == ["bulkhead-pool 0", "bulkhead-pool 1"]


def test_each_pool_has_a_launcher_workers_and_process_groups_of_its_own(disp: Dispatcher) -> None:
    families = [{launcher_pid(disp, priority), *worker_pids(disp, priority)} for priority in (0, 1)]
    assert [len(family) for family in families] == [3, 3]
    assert not families[0] & families[1]
    groups = [{os.getpgid(pid) for pid in family} for family in families]
    assert not groups[0] & groups[1]
    assert os.getpgid(0) not in groups[0] | groups[1]
    for priority in (0, 1):
        assert psutil.Process(launcher_pid(disp, priority)).ppid() == os.getpid()


def test_no_worker_holds_a_pipe_of_another_worker_or_pool(disp: Dispatcher) -> None:
    """A pipe's end that somebody else holds too would not close when its owner dies."""
    pids = [*worker_pids(disp, 0), *worker_pids(disp, 1), launcher_pid(disp, 0), launcher_pid(disp, 1)]
    held = [pipes_of(pid) for pid in pids]
    assert all(len(pipes) >= 3 for pipes in held[:4])
    for number, mine in enumerate(held):
        for other in held[number + 1 :]:
            assert not mine & other


def pipes_of(pid: int) -> set[str]:
    """Return the pipes and sockets that a process holds, but its standard streams."""
    links = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir() if int(entry.name) > 2]
    return {link for link in links if link.startswith(("pipe:", "socket:"))}


def test_a_pool_whose_lock_is_held_for_ever_holds_no_other_up(disp: Dispatcher) -> None:
    with engine_of(disp, 0).lock:
        stuck = Call(disp.dispatch, Job(faulty_jobs.double, 4).options(priority=0))
        for _ in range(3):
            assert_whole_without_stats(disp, 1)
        crash = disp.dispatch(Job(faulty_jobs.kill_self).options(priority=1))
        assert crash.exception(PATIENCE) is not None
        late = disp.dispatch(Job(faulty_jobs.loop).options(priority=1, timeout=0.1))
        assert late.exception(PATIENCE) is not None
        assert_whole_without_stats(disp, 1)
        assert not stuck.has_returned
    assert stuck.value().result(PATIENCE) == 8


def assert_whole_without_stats(disp: Dispatcher, priority: int) -> None:
    jobs = [Job(faulty_jobs.double, n).options(priority=priority) for n in range(4)]
    assert [disp.dispatch(job, timeout=PATIENCE).result(PATIENCE) for job in jobs] == [0, 2, 4, 6]
    disp.barrier(priority, timeout=PATIENCE, check=False)


def test_a_pool_all_of_whose_processes_are_stopped_holds_no_other_up(disp: Dispatcher) -> None:
    stopped = [*worker_pids(disp, 0), launcher_pid(disp, 0)]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    held = [disp.dispatch(Job(faulty_jobs.double, 4).options(priority=0)) for _ in range(2)]
    assert disp.try_dispatch(Job(faulty_jobs.double, 4).options(priority=0)) is None
    crash = disp.dispatch(Job(faulty_jobs.kill_self).options(priority=1))
    assert crash.exception(PATIENCE) is not None
    assert_whole(disp, 1)
    assert not any(tracker.done() for tracker in held)
    for pid in reversed(stopped):
        os.kill(pid, signal.SIGCONT)
    assert [tracker.result(PATIENCE) for tracker in held] == [8, 8]


def test_a_pool_whose_processes_are_all_killed_costs_no_other_a_job(disp: Dispatcher) -> None:
    before = worker_pids(disp, 1)
    for _ in range(3):
        for pid in [launcher_pid(disp, 0), *worker_pids(disp, 0)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        assert_whole(disp, 1)
        wait_until_whole(disp, 0)
    assert worker_pids(disp, 1) == before
    assert disp.stats()[1].failed == 0


def test_barrier_for_one_pool_does_not_wait_for_another(disp: Dispatcher) -> None:
    running = disp.dispatch(Job(faulty_jobs.sleep_in_c).options(priority=0))
    disp.dispatch(Job(faulty_jobs.double, 4).options(priority=1))
    report = disp.barrier(1, timeout=PATIENCE)
    assert report.succeeded == 1
    assert not running.done()


def test_finalize_of_one_dispatcher_leaves_another_alone() -> None:
    with Dispatcher([(0, 1)]) as one, Dispatcher([(0, 1)]) as other:
        running = one.dispatch(Job(faulty_jobs.nap, 0.5))
        other.dispatch(Job(faulty_jobs.double, 4)).wait(PATIENCE)
        other.finalize()
        assert running.result(PATIENCE) == 0.5
        wait_until(lambda: one.stats()[0].idle == 1)
