"""Interrupts at any instant: a script that catches them goes on with all its jobs and workers (C8)."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from scripts import running
from watching import wait_until

from bulkhead import Dispatcher, Job, JobState, PoolBroken, Tracker
from bulkhead.history import History

CATCHES = """
import signal
import faulty_jobs
from bulkhead import Dispatcher, Job, Pool, PoolBroken

trackers = []
interrupts, told = 0, -1

def dispatch_for_ever(disp):
    global told
    while True:
        trackers.append(disp.dispatch(Job(faulty_jobs.double, 1), timeout=20))
        if len(trackers) % 50 == 0:
            disp.barrier(timeout=20)
        if len(trackers) % 7 == 0:
            trackers[-1].result(20)
        if len(trackers) >= 20_000:
            del trackers[:10_000]
        if told < interrupts:
            # Why here: the next interrupt comes when this is read, and has to find us in the try block below.
            told = interrupts
            print("caught", told, flush=True)

def run(disp):
    global interrupts
    while interrupts < {n_interrupts}:
        try:
            dispatch_for_ever(disp)
        except KeyboardInterrupt:
            interrupts += 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)

if __name__ == "__main__":
    {handler}
    disp = Dispatcher([Pool(0, 2, start_method={method!r})], max_history=100_000)
    disp.dispatch(Job(faulty_jobs.double, 1)).result(20)
    try:
        run(disp)
        disp.barrier(timeout=20)
        values = {{tracker.result(0) for tracker in trackers}}
        print("over", interrupts, sum(not job.done() for job in disp.jobs()), values, flush=True)
    except PoolBroken as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("broken", interrupts, sum(not job.done() for job in disp.jobs()), error, flush=True)
    disp.finalize(cancel=True)
    print("end", flush=True)
"""


def interrupt_at_random(
    n_interrupts: int, seed: int, method: str = "forkserver", handler: str = "pass"
) -> str:
    """Interrupt a script that dispatches as fast as it can; return what it says in the end."""
    draw = random.Random(seed)
    with running(CATCHES.format(method=method, n_interrupts=n_interrupts, handler=handler)) as script:
        script.wait_for_line("caught 0")
        for number in range(1, n_interrupts + 1):
            # Why a pause: the instants are to be random.
            time.sleep(draw.random() * 0.01)
            os.kill(script.pid, signal.SIGINT)
            expected = f"caught {number}\n", "over", "broken"
            wait_until(lambda expected=expected: any(word in script.output() for word in expected))
            if "broken" in script.output():
                break
        script.wait_for_line("end")
        assert script.wait() == 0
        assert script.errors() == ""
        assert script.processes() == []
        return script.output().splitlines()[-2]


@pytest.mark.parametrize("seed", range(3))
def test_a_script_that_catches_interrupts_at_random_instants_goes_on_and_loses_no_job(seed: int) -> None:
    told = interrupt_at_random(30, seed)
    print(f"\n  {told}")
    assert told == "over 30 0 {2}"


OWN_HANDLER = """
    def handler(*_):
        raise KeyboardInterrupt("of the script's own making")
    signal.signal(signal.SIGINT, handler)
"""


@pytest.mark.parametrize("seed", range(3))
def test_a_handler_of_the_scripts_own_that_raises_costs_the_pool_at_most(seed: int) -> None:
    """Bulkhead cannot hold off what it does not know; then the pool may be lost, but loudly and with all its jobs."""
    told = interrupt_at_random(30, seed, handler=OWN_HANDLER)
    print(f"\n  {told}")
    if not told.startswith("broken"):
        assert told == "over 30 0 {2}"
    else:
        assert told.split()[2] == "0"


def test_an_exception_in_the_middle_of_an_acceptance_leaves_no_job_that_never_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    enter, strikes = History.enter, [False, True]

    def enter_and_be_struck(self: History, job: Tracker) -> None:
        enter(self, job)
        if strikes.pop(0):
            raise ZeroDivisionError

    monkeypatch.setattr(History, "enter", enter_and_be_struck)
    with Dispatcher([(0, 1)]) as disp:
        disp.dispatch(Job(pow, 2, 2)).result(20)
        with pytest.raises(ZeroDivisionError):
            disp.dispatch(Job(pow, 2, 3))
        with pytest.raises(PoolBroken):
            disp.dispatch(Job(pow, 2, 4))
        assert [job.status().state for job in disp.jobs()] == [JobState.SUCCEEDED, JobState.FAILED]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_script_that_catches_500_interrupts_goes_on_and_loses_no_job(method: str) -> None:
    told = interrupt_at_random(500, 99, method)
    print(f"\n  {told}")
    assert told == "over 500 0 {2}"
