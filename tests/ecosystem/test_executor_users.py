"""Libraries that take an executor, or a `map`, run on bulkhead's as they are (D5).

The libraries are imported in the tests: it takes a second, in each process that looks for tests, and in workers here.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Iterator

import pytest
from faulty_jobs import kill_self
from jobs import echo, fail, pid
from staffing import staffed
from watching import PATIENCE, worker_pids

from bulkhead import Dispatcher, Pool, WorkerCrashed
from bulkhead.executor import PoolExecutor


@pytest.fixture(scope="module")
def disp() -> Iterator[Dispatcher]:
    with staffed(Dispatcher([Pool(0, 2), Pool(1, 1)])) as made:
        # So that the pool has its callback thread.
        made.executor(0).submit(os.getpid).add_done_callback(id)
        yield made


@pytest.fixture
def executor(disp: Dispatcher) -> Iterator[PoolExecutor]:
    with disp.executor(0) as made:
        yield made


def double(number: int) -> int:
    return 2 * number


def test_dask_computes_on_an_executor(disp: Dispatcher, executor: PoolExecutor) -> None:
    import dask
    import dask.bag

    numbers = dask.bag.from_sequence(range(100), npartitions=10)
    assert numbers.map(double).sum().compute(scheduler=executor) == 9900
    workers = dask.compute(*[dask.delayed(pid)() for _ in range(10)], scheduler=executor)
    assert set(workers) <= set(worker_pids(disp, 0))
    with pytest.raises(ValueError, match="no luck"):
        dask.delayed(fail)().compute(scheduler=executor)
    with pytest.raises(WorkerCrashed):
        dask.delayed(kill_self)().compute(scheduler=executor)
    assert dask.delayed(echo)(5).compute(scheduler=executor) == 5


def test_scipy_optimizes_with_the_map_of_an_executor(executor: PoolExecutor) -> None:
    from scipy.optimize import differential_evolution, rosen

    bounds = [(0.0, 2.0)] * 3
    options = {"seed": 1, "maxiter": 20, "updating": "deferred", "polish": False}
    alone = differential_evolution(rosen, bounds, **options)
    spread = differential_evolution(rosen, bounds, workers=executor.map, **options)
    assert spread.nfev == alone.nfev
    assert list(spread.x) == list(alone.x)


def test_tqdm_counts_the_results_of_map(disp: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    from tqdm import tqdm

    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # or it keeps a thread
    shown = io.StringIO()
    bar = tqdm(disp.map(double, range(500), priority=0), total=500, file=shown)
    assert list(bar) == [double(number) for number in range(500)]
    assert bar.n == 500
    assert "500/500" in shown.getvalue()


def test_asyncio_takes_the_executor_as_its_default() -> None:
    async def main(executor: PoolExecutor) -> list[int]:
        loop = asyncio.get_running_loop()
        return await asyncio.wait_for(
            asyncio.gather(*(loop.run_in_executor(executor, double, number) for number in range(50))),
            PATIENCE,
        )

    with Dispatcher([(0, 2)]) as disp:
        assert asyncio.run(main(disp.executor())) == [double(number) for number in range(50)]
