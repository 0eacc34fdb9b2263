"""What ends late leaves alone what others have told: workers that are frozen behind their last look."""

from __future__ import annotations

import pytest
from watching import wait_until

from bulkhead.backends.base import OutcomeState

SOON = 20.0

# Freezes the worker in the very call that ends the first claim, behind all that it looks at. Why the signal goes to the
# thread: one to the process lets this thread run on until another one has taken it.
FREEZE = """
import signal, threading
backend = app.backend
part, name = (backend.settler, "settle") if backend.settler else (backend.results, "save_many")
step = getattr(part, name)
def frozen(things):
    setattr(part, name, step)
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    return step(things)
setattr(part, name, frozen)
"""


def check_that_the_outcome_of_the_other_stays(service, path: str) -> None:
    results = service.app.backend.results
    with service.process(before=FREEZE) as first:
        id = service.nap.call(path, 0).options(on_success=service.echo.call().options(id="after")).enqueue()
        wait_until(first.is_stopped, "it is frozen")
        with service.process():
            assert service.app.result(id, timeout=SOON) == 2
            [outcome] = results.get_many([id])
            assert outcome is not None
            assert (outcome.state, outcome.attempt) == (OutcomeState.SUCCEEDED, 2)
            first.resume()
            wait_until(lambda: f"job {id} was no longer ours when it ended" in first.errors())
            assert results.get_many([id]) == [outcome]
            assert service.app.job(id).attempt == 2
            # Both go on.
            for id in [service.pid.enqueue() for _ in range(10)]:
                service.app.result(id, timeout=SOON)
            assert first.is_running()


def test_a_worker_that_is_frozen_on_the_brink_of_telling_leaves_the_outcome_of_another(
    make, shared_backend, tmp_path
):
    service = make(shared_backend, options={"lease": 1.0}, concurrency=1)
    check_that_the_outcome_of_the_other_stays(service, str(tmp_path / "notes"))


def test_so_it_does_where_results_are_kept_elsewhere(make, redis_server, tmp_path):
    options = {"lease": 1.0, "results": f"sqlite:///{tmp_path}/results.db"}
    service = make(redis_server.url, options=options, concurrency=1)
    assert service.app.backend.settler is None
    check_that_the_outcome_of_the_other_stays(service, str(tmp_path / "notes"))


@pytest.mark.parametrize("results", ["the same", "another"])
def test_results_in_the_same_place_are_settled_in_one_step(make, tmp_path, results):
    url = f"sqlite:///{tmp_path}/jobs.db"
    service = make(url, options={"results": url if results == "the same" else f"{url}-results"})
    assert (service.app.backend.settler is not None) == (results == "the same")
    with service.working():
        assert service.app.result(service.add.enqueue(1, 2), timeout=SOON) == 3
