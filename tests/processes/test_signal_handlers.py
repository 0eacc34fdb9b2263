"""Signal handlers of the user's that use the dispatcher, in the thread that waits in it or works for it."""

from __future__ import annotations

import time
from collections.abc import Callable

import faulty_jobs
import pytest
from scripts import running
from watching import PATIENCE

from bulkhead import Dispatcher, Job, NestedDispatch

LOOKING = """
import signal
import faulty_jobs
from bulkhead import Dispatcher, Job

if __name__ == "__main__":
    with Dispatcher([(0, 2)]) as disp:
        looks = []
        signal.signal(signal.SIGALRM, lambda *_: looks.append(disp.stats()[0].succeeded))
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        n_jobs = 0
        while len(looks) < 200:
            disp.dispatch(Job(faulty_jobs.double, 1))
            n_jobs += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(disp.barrier().succeeded == n_jobs, looks == sorted(looks))
"""

WAITING_LONGER = """
import signal
import faulty_jobs
from bulkhead import Dispatcher, Job

if __name__ == "__main__":
    with Dispatcher([(0, 2)]) as disp:
        inner = disp.dispatch(Job(faulty_jobs.nap, 0.6))
        outer = disp.dispatch(Job(faulty_jobs.nap, 0.3))
        signal.signal(signal.SIGALRM, lambda *_: print("handler", inner.exception(), flush=True))
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        print("main", outer.exception())
"""

WAITING = """
import signal
import faulty_jobs
from bulkhead import Dispatcher, Job

if __name__ == "__main__":
    with Dispatcher([(0, 2)]) as disp:
        inner = disp.dispatch(Job(faulty_jobs.nap, 0.4))
        outer = disp.dispatch(Job(faulty_jobs.nap, 0.6))
        signal.signal(signal.SIGALRM, lambda *_: print("handler", inner.exception(), flush=True))
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        print("main", outer.exception())
"""

FINALIZING = """
import signal
import time
import faulty_jobs
from bulkhead import Dispatcher, Job

if __name__ == "__main__":
    disp = Dispatcher([(0, 2), (1, 1)])
    tracker = disp.dispatch(Job(faulty_jobs.sleep_in_c))
    while tracker.status().pid is None:
        time.sleep(0.001)
    signal.signal(signal.SIGALRM, lambda *_: disp.finalize(cancel=True))
    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    {wait}
    print(tracker.status().state, time.monotonic() - began < 3)
"""


def output_of(code: str) -> list[str]:
    with running(code) as script:
        assert script.wait(PATIENCE) == 0, script.errors()
        assert script.errors() == ""
        assert script.processes() == []
        return script.output().splitlines()


def test_a_handler_that_looks_at_the_statistics_every_other_millisecond_hangs_nothing() -> None:
    assert output_of(LOOKING) == ["True True"]


def test_a_handler_may_wait_for_a_job_while_its_thread_waits_for_another() -> None:
    assert output_of(WAITING) == ["handler None", "main None"]


def test_a_handler_may_see_the_job_settle_that_its_thread_waits_for() -> None:
    assert output_of(WAITING_LONGER) == ["handler None", "main None"]


@pytest.mark.parametrize("use", ["dispatch", "submit", "result"])
def test_a_handler_is_refused_in_the_middle_of_a_change(use: str) -> None:
    with Dispatcher([(0, 1)]) as disp:
        executor, pool = disp.executor(), disp._pools[0]
        disp.dispatch(Job(faulty_jobs.double, 1)).result()
        first = disp.dispatch(Job(faulty_jobs.nap, 0.05))
        call: dict[str, Callable[[], object]] = {
            "dispatch": lambda: disp.dispatch(Job(faulty_jobs.double, 1), timeout=0),
            "submit": lambda: executor.submit(faulty_jobs.double, 1),
            "result": first.result,
        }
        # What a handler finds that interrupts its thread there.
        with pool.lock, pool._guard:
            time.sleep(0.2)  # the answer has come meanwhile, and may be read by nobody now
            with pytest.raises(NestedDispatch, match="at work inside bulkhead"):
                call[use]()
            assert pool._guard.is_active
            assert not first.done()
        assert first.result() == 0.05
        assert disp.barrier().succeeded == 2


def test_a_handler_that_finalizes_ends_the_wait_for_a_result() -> None:
    assert output_of(FINALIZING.format(wait="tracker.exception()")) == ["cancelled True"]


def test_a_handler_that_finalizes_while_its_thread_finalizes_ends_both() -> None:
    assert output_of(FINALIZING.format(wait="disp.finalize()")) == ["cancelled True"]
