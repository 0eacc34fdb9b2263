"""joblib and scikit-learn, as they are, on `backend="bulkhead"` (D5)."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from calling import at_once
from faulty_jobs import kill_self
from gates import Gate, pass_gate
from joblib import Parallel, delayed, parallel_config
from joblib_jobs import (
    fail_third,
    fail_when_noted,
    nested_pids,
    note_pid_and_hang,
    threads_allowed,
    use_one_thread,
)
from jobs import echo, fail, nap, nothing, pid
from scripts import running
from staffing import staffed
from watching import PATIENCE, alive, read_pids, wait_until, wait_until_whole, worker_pids

from bulkhead import (
    ConfigTypeError,
    Dispatcher,
    DispatcherFinalized,
    JobNotPicklable,
    Pool,
    WorkerCrashed,
    joblib_backend,
)
from bulkhead.joblib_backend import BulkheadBackend, register

register()


# autouse: all workers are up before the first test counts processes
@pytest.fixture(scope="module", autouse=True)
def disp() -> Iterator[Dispatcher]:
    # Why preloaded: many tests end workers, and each new one would import joblib and numpy anew.
    pools = [
        Pool(0, 2, preload=["joblib_jobs"]),
        Pool(1, 2, preload=["joblib_jobs"], initializer=use_one_thread),
    ]
    with staffed(Dispatcher(pools)) as made:
        for priority in (0, 1):  # so that each pool has its callback thread
            made.executor(priority).submit(os.getpid).add_done_callback(id)
        yield made


@pytest.fixture(scope="module", autouse=True)
def own() -> BulkheadBackend:
    """A backend with two workers of its own."""
    made = BulkheadBackend()
    with parallel_config(backend=made, n_jobs=2):
        Parallel()(delayed(nothing)() for _ in range(4))
    wait_until_whole(made._kept._dispatcher)
    return made


@pytest.fixture(params=["own", "pool"])
def backend(
    request: pytest.FixtureRequest, disp: Dispatcher, own: BulkheadBackend
) -> Iterator[BulkheadBackend]:
    """Within a `parallel_config` of two workers, which are its own or a dispatcher's."""
    made = own if request.param == "own" else BulkheadBackend(executor=disp.executor(1))
    with parallel_config(backend=made, n_jobs=2):
        yield made
    wait_until_whole(own._kept._dispatcher)
    wait_until_whole(disp, 1)


# For what does not depend on whose workers they are: each worker of its own that is replaced imports joblib anew.
in_pool = pytest.mark.parametrize("backend", ["pool"], indirect=True)


# scikit-learn. Imported in the tests: it takes a second, in each process that looks for tests.


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import make_classification

    return make_classification(n_samples=300, n_features=12, random_state=0)


def test_scikit_learn_gives_the_results_of_a_sequential_run(
    backend: BulkheadBackend, data: tuple[np.ndarray, np.ndarray]
) -> None:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, cross_val_score
    from sklearn.svm import SVC

    grid = {"C": [0.1, 1.0, 10.0], "kernel": ["linear", "rbf"]}
    search = GridSearchCV(SVC(random_state=0), grid, cv=3).fit(*data)
    alone = GridSearchCV(SVC(random_state=0), grid, cv=3, n_jobs=1).fit(*data)
    assert search.best_params_ == alone.best_params_
    assert list(search.cv_results_["mean_test_score"]) == list(alone.cv_results_["mean_test_score"])

    model = LogisticRegression(max_iter=200)
    assert list(cross_val_score(model, *data, cv=5)) == list(cross_val_score(model, *data, cv=5, n_jobs=1))

    forest = RandomForestClassifier(20, random_state=0).fit(*data)
    lone = RandomForestClassifier(20, random_state=0, n_jobs=1).fit(*data)
    assert (forest.predict_proba(data[0]) == lone.predict_proba(data[0])).all()
    assert (forest.feature_importances_ == lone.feature_importances_).all()


# Where calls run


def test_calls_run_in_the_workers_of_the_pool_that_is_named(disp: Dispatcher) -> None:
    with parallel_config(backend="bulkhead", executor=disp.executor(1)):
        assert joblib.effective_n_jobs(-1) == joblib.effective_n_jobs(50) == 2
        assert joblib.effective_n_jobs(-2) == 1
        pids = Parallel(batch_size=1)(delayed(pid)() for _ in range(20))
    assert set(pids) <= set(worker_pids(disp, 1))
    assert "pid" in {span.function for span in disp.timeline().spans}
    assert set(
        Parallel(backend="bulkhead", executor=disp.executor(0))(delayed(pid)() for _ in range(8))
    ) <= set(worker_pids(disp, 0))


def test_register_can_name_the_pool(disp: Dispatcher) -> None:
    register(executor=disp.executor(0))
    try:
        pids = Parallel(n_jobs=2, backend="bulkhead")(delayed(pid)() for _ in range(8))
    finally:
        register()
    assert set(pids) <= set(worker_pids(disp, 0))


def test_workers_stay_for_a_block_and_end_after_it() -> None:
    with joblib.parallel_backend("bulkhead", n_jobs=2):
        first, second = (set(Parallel()(delayed(pid)() for _ in range(20))) for _ in range(2))
        assert os.getpid() not in first | second
        assert len(first | second) <= 2
        assert alive(first | second)
    wait_until(lambda: not alive(first | second), "the end of the workers")


def test_a_parallel_outside_of_a_block_ends_its_workers_also_when_it_is_kept() -> None:
    parallel = Parallel(n_jobs=2, backend="bulkhead")
    first = set(parallel(delayed(pid)() for _ in range(8)))
    wait_until(lambda: not alive(first), "the end of the first workers")
    with parallel:
        second, third = (set(parallel(delayed(pid)() for _ in range(8))) for _ in range(2))
        assert len(second | third) <= 2
        assert not first & second
    wait_until(lambda: not alive(second | third), "the end of the second workers")


def test_another_number_of_jobs_gets_so_many_workers() -> None:
    with parallel_config(backend="bulkhead"):
        assert joblib.effective_n_jobs(-1) == joblib.cpu_count()
        for number in (2, 3):
            calls = (delayed(nap)(0.01) for _ in range(8))
            spans = Parallel(n_jobs=number, batch_size=1)(calls)
            most = max(sum(a <= began < b for a, b in spans) for began, _ in spans)
            assert 1 <= most <= number


def test_a_single_job_runs_in_the_caller() -> None:
    with parallel_config(backend="bulkhead", n_jobs=1):
        assert set(Parallel()(delayed(pid)() for _ in range(3))) == {os.getpid()}
    with Dispatcher([(0, 1)]) as disp, parallel_config(backend="bulkhead", executor=disp.executor()):
        assert set(Parallel(n_jobs=4)(delayed(pid)() for _ in range(3))) == {os.getpid()}


def test_native_threads_are_shared_out_among_the_workers() -> None:
    # Why no more than there are CPUs: OpenBLAS takes no larger number from its environment.
    n_cpus = joblib.cpu_count()
    for options, number in (({}, max(n_cpus // 2, 1)), ({"inner_max_num_threads": n_cpus}, n_cpus)):
        with parallel_config(backend="bulkhead", n_jobs=2, **options):
            counts = Parallel()(delayed(threads_allowed)() for _ in range(2))
        assert [set(count) for count in counts] == [{number}, {number}]


LOADED = """
import numpy
from joblib import Parallel, delayed, parallel_config
from joblib_jobs import threads_allowed
from bulkhead.joblib_backend import register

if __name__ == "__main__":
    register()
    with parallel_config(backend="bulkhead", n_jobs=2, inner_max_num_threads=3):
        counts = Parallel()(delayed(threads_allowed)() for _ in range(2))
    print([set(count) for count in counts])
"""


def test_native_libraries_of_the_main_module_are_limited_too() -> None:
    with running(LOADED) as script:
        assert script.wait() == 0, script.errors()
        assert script.output() == "[{3}, {3}]\n"


def test_large_arrays_and_closures_travel(backend: BulkheadBackend) -> None:
    array = np.arange(300_000.0)
    assert Parallel()(delayed(lambda a, k: float(a.sum() * k))(array, k) for k in range(4)) == [
        array.sum() * k for k in range(4)
    ]


def test_many_short_calls_keep_their_order(backend: BulkheadBackend) -> None:
    assert Parallel()(delayed(echo)(n) for n in range(5000)) == list(range(5000))


# What goes wrong


def test_an_error_comes_with_its_type_and_the_next_call_works(backend: BulkheadBackend) -> None:
    for _ in range(2):
        with pytest.raises(LookupError, match="number three"):
            Parallel()(delayed(fail_third)(n) for n in range(8))
        assert Parallel()(delayed(echo)(n) for n in range(4)) == [0, 1, 2, 3]
    with Parallel() as parallel:
        with pytest.raises(ValueError, match="no luck"):
            parallel(delayed(fail)() for _ in range(5))
        assert parallel(delayed(echo)(n) for n in range(4)) == [0, 1, 2, 3]


@in_pool
def test_a_call_does_not_run_what_a_failed_one_has_left(
    backend: BulkheadBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch = Parallel.dispatch_one_batch

    def dispatch_and_fail(self: Any, iterator: Any) -> Any:
        is_dispatched = dispatch(self, iterator)
        # joblib has cut two batches, and learns of the first one's failure before it submits the second.
        wait_until(lambda: self._aborting, "the failure is known")
        return is_dispatched

    with Parallel(n_jobs=2, batch_size=1) as parallel:
        with monkeypatch.context() as patch:
            patch.setattr(Parallel, "dispatch_one_batch", dispatch_and_fail)
            with pytest.raises(ValueError, match="no luck"):
                parallel(delayed(fail)() for _ in range(5))
        assert parallel(delayed(echo)(n) for n in range(4)) == [0, 1, 2, 3]


def test_a_worker_that_dies_fails_its_call_and_the_next_one_works(backend: BulkheadBackend) -> None:
    for _ in range(2):
        with pytest.raises(WorkerCrashed):
            Parallel()([delayed(echo)(1), delayed(kill_self)(), delayed(echo)(2)])
        assert Parallel()(delayed(echo)(n) for n in range(4)) == [0, 1, 2, 3]


@in_pool
def test_a_failure_ends_the_calls_that_run(backend: BulkheadBackend, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    with pytest.raises(ValueError, match="no luck"):
        Parallel(batch_size=1)([delayed(note_pid_and_hang)(path), delayed(fail_when_noted)(path)])
    wait_until(lambda: not alive(read_pids(path)), "the end of the call that hangs")
    assert Parallel()(delayed(echo)(n) for n in range(4)) == [0, 1, 2, 3]


@in_pool
def test_a_timeout_is_raised_and_ends_the_calls(backend: BulkheadBackend, tmp_path: Path) -> None:
    for return_as in ("list", "generator_unordered"):
        path = tmp_path / return_as
        with pytest.raises(multiprocessing.TimeoutError):
            list(Parallel(timeout=0.1, batch_size=1, return_as=return_as)(
                delayed(note_pid_and_hang)(path) for _ in range(6)
            ))  # fmt: skip
        if path.exists():
            wait_until(lambda path=path: not alive(read_pids(path)), "the end of the calls that hang")
    assert Parallel(timeout=PATIENCE)(delayed(echo)(n) for n in range(4)) == [0, 1, 2, 3]


@in_pool
def test_what_cannot_be_pickled_or_read_is_an_error(backend: BulkheadBackend) -> None:
    with pytest.raises(JobNotPicklable):
        Parallel()(delayed(echo)(threading.Lock()) for _ in range(4))
    # Also when it turns up after the first batches, in the callback thread.
    with pytest.raises(JobNotPicklable):
        Parallel(batch_size=1)(delayed(echo)(n if n < 8 else threading.Lock()) for n in range(10))
    with pytest.raises(ZeroDivisionError):
        Parallel(batch_size=1)(delayed(echo)(1 // (8 - n)) for n in range(10))


def test_a_pool_that_ends_meanwhile_is_an_error() -> None:
    def calls(disp: Dispatcher, finalizing: threading.Thread) -> Iterator[Any]:
        yield from (delayed(echo)(n) for n in range(6))
        finalizing.start()
        wait_until(lambda: is_closed(disp), "the end of the pool")
        yield from (delayed(echo)(n) for n in range(6))

    with Dispatcher([(0, 2)]) as disp, parallel_config(backend="bulkhead", executor=disp.executor()):
        finalizing = threading.Thread(target=disp.finalize)
        with pytest.raises(DispatcherFinalized):
            Parallel(batch_size=1)(calls(disp, finalizing))
        finalizing.join()
        with pytest.raises(DispatcherFinalized):
            Parallel()(delayed(echo)(n) for n in range(4))


def is_closed(disp: Dispatcher) -> bool:
    try:
        disp.executor().submit(nothing)
    except DispatcherFinalized:
        return True
    return False


def test_bad_input_is_an_error_before_anything_starts(disp: Dispatcher) -> None:
    for bad in (2, disp, "loky"):
        with pytest.raises(ConfigTypeError, match="executor"):
            register(executor=bad)  # type: ignore[arg-type]
        with pytest.raises(ConfigTypeError, match="executor"):
            parallel_config(backend="bulkhead", executor=bad)
    with parallel_config(backend="bulkhead"), pytest.raises(ValueError, match="n_jobs == 0"):
        Parallel(n_jobs=0)(delayed(echo)(n) for n in range(2))
    executor = disp.executor(0)
    executor.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        Parallel(backend="bulkhead", executor=executor)(delayed(echo)(n) for n in range(2))


def test_calls_of_others_in_the_pool_go_on_when_one_fails(
    disp: Dispatcher, gate: Gate, tmp_path: Path
) -> None:
    executor = disp.executor(1)
    other = executor.submit(pass_gate, str(tmp_path / "gate"), "other")
    waiting = [executor.submit(echo, n) for n in range(3)]
    with parallel_config(backend="bulkhead", executor=executor), pytest.raises(ValueError, match="no luck"):
        Parallel()(delayed(fail)() for _ in range(8))
    gate.open()
    other.result(PATIENCE)
    assert [future.result(PATIENCE) for future in waiting] == [0, 1, 2]
    wait_until_whole(disp, 1)


@in_pool
def test_threads_that_call_at_once_get_their_own_results_and_errors(backend: BulkheadBackend) -> None:
    def call(index: int) -> list[int]:
        with parallel_config(backend=backend, n_jobs=2):
            numbers = [3] if index == 0 else range(100 * index, 100 * index + 50)
            return Parallel()(delayed(fail_third)(n) for n in [*numbers, -1])

    failing, *others = at_once(4, call)
    for index, other in enumerate(others, 1):
        assert other.value() == [*range(100 * index, 100 * index + 50), -1]
    with pytest.raises(LookupError, match="number three"):
        failing.value()


# Nested calls


def test_a_call_inside_of_a_call_runs_in_threads_of_its_worker(backend: BulkheadBackend) -> None:
    for me, inner, name in Parallel()(delayed(nested_pids)(n_jobs=2) for _ in range(3)):
        assert me != os.getpid()
        assert set(inner) == {me}
        assert name == "ThreadingBackend"


def test_a_call_inside_of_a_call_that_names_the_backend_is_sequential(backend: BulkheadBackend) -> None:
    options = {"n_jobs": 2, "backend": "bulkhead"}
    for me, inner, name in Parallel()(delayed(nested_pids)(**options) for _ in range(3)):
        assert set(inner) == {me}
        assert name == "SequentialBackend"


# Generators


@pytest.mark.parametrize("return_as", ["generator", "generator_unordered"])
def test_results_come_as_they_are_there(
    backend: BulkheadBackend, return_as: str, gate: Gate, tmp_path: Path
) -> None:
    calls = [delayed(echo)(0), *(delayed(pass_gate)(str(tmp_path / "gate"), name) for name in "ab")]
    results = Parallel(return_as=return_as, batch_size=1)(calls)
    assert next(results) == 0
    gate.open()
    assert sorted(results) == ["a", "b"]
    numbers = list(Parallel(return_as=return_as)(delayed(echo)(n) for n in range(500)))
    assert sorted(numbers) == list(range(500))
    if return_as == "generator":
        assert numbers == sorted(numbers)


@in_pool
def test_a_generator_that_is_dropped_ends_its_calls_and_spares_others(
    backend: BulkheadBackend, tmp_path: Path
) -> None:
    path = tmp_path / "pids"
    other = Parallel(return_as="generator", batch_size=1)(delayed(nap)(0.01) for _ in range(30))
    results = Parallel(return_as="generator", batch_size=1)(
        [delayed(echo)(1), *(delayed(note_pid_and_hang)(path) for _ in range(4))]
    )
    assert next(results) == 1
    read_pids(path)
    with pytest.warns(UserWarning, match="cancelled"):
        del results
    assert len(list(other)) == 30
    wait_until(lambda: not alive(read_pids(path)), "the end of the calls that hang")


@in_pool
def test_a_generator_that_the_garbage_collector_finds_ends_its_calls(
    backend: BulkheadBackend, tmp_path: Path
) -> None:
    path = tmp_path / "pids"
    cycle: dict[str, Any] = {}
    cycle["itself"] = cycle
    cycle["results"] = Parallel(return_as="generator")(delayed(note_pid_and_hang)(path) for _ in range(4))
    read_pids(path, 2)
    del cycle
    with pytest.warns(UserWarning, match="cancelled"):
        gc.collect()
    wait_until(lambda: not alive(read_pids(path, 2)), "the end of the calls that hang")


def test_an_abort_under_a_lock_of_the_pool_does_not_hang(
    disp: Dispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joblib_backend, "_ABORT_SECONDS", 0.1)
    path = tmp_path / "pids"
    with parallel_config(backend="bulkhead", executor=disp.executor(1)):
        results = Parallel(return_as="generator")(delayed(note_pid_and_hang)(path) for _ in range(4))
    read_pids(path, 2)
    with disp._pools[1].lock, pytest.warns(UserWarning, match="cancelled"):
        del results
    wait_until(lambda: not alive(read_pids(path, 2)), "the end of the calls that hang")
    wait_until_whole(disp, 1)


# The end


CYCLES = """
from joblib import Parallel, delayed, parallel_config
from traces import Traces
from watching import wait_until
from bulkhead.joblib_backend import register

def cycle(number):
    with parallel_config(backend="bulkhead", n_jobs=2):
        assert Parallel()(delayed(abs)(-n) for n in range(number)) == list(range(number))
        if number % 3 == 0:
            try:
                Parallel()(delayed(int)("no number") for n in range(4))
            except ValueError:
                print("failed", end=" ")

if __name__ == "__main__":
    register()
    before = Traces.now()
    for number in range(6):
        cycle(number)
    wait_until(lambda: not Traces.now().beyond(before))
    print("nothing is left")
"""


def test_six_cycles_leave_nothing() -> None:
    with running(CYCLES) as script:
        assert script.wait(2 * PATIENCE) == 0, script.errors()
        assert script.output() == "failed failed nothing is left\n"
        assert script.errors() == ""


def test_the_pool_goes_with_its_block_without_the_garbage_collector() -> None:
    gc.disable()
    try:
        block = parallel_config(backend="bulkhead", n_jobs=2)
        model = weakref.ref(block.parallel_config["backend"])
        with block:
            parallel = Parallel()
            parallel(delayed(echo)(n) for n in range(4))
            kept = weakref.ref(model()._kept)
            with pytest.raises(ValueError, match="no luck") as caught:
                parallel(delayed(fail)() for _ in range(4))
        assert kept() is not None
        del block
        assert model() is kept() is None
        assert parallel is not caught
    finally:
        gc.enable()


INTERRUPTED = """
from pathlib import Path
from joblib import Parallel, delayed
from joblib_jobs import note_pid_and_hang
from bulkhead.joblib_backend import register

if __name__ == "__main__":
    register()
    path = Path(PATH)
    try:
        Parallel(n_jobs=2, backend="bulkhead", batch_size=1)(delayed(note_pid_and_hang)(path) for _ in range(6))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(Parallel(n_jobs=2, backend="bulkhead")(delayed(abs)(n) for n in range(4)), flush=True)
"""


def test_ctrl_c_ends_a_call_and_the_next_one_works(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    with running(INTERRUPTED.replace("PATH", repr(str(path)))) as script:
        read_pids(path, 2)
        os.kill(script.pid, signal.SIGINT)
        assert script.wait() == 0, script.errors()
        assert script.output() == "interrupted\n[0, 1, 2, 3]\n"
        assert script.errors() == ""
        assert len(read_pids(path)) == 2
        wait_until(lambda: not script.processes(), "the end of all processes")


LEFT_OPEN = """
import time
from joblib import Parallel, delayed
from bulkhead.joblib_backend import register

if __name__ == "__main__":
    register()
    results = Parallel(n_jobs=2, backend="bulkhead", return_as="generator", batch_size=1)(
        delayed(time.sleep)(s) for s in [0, 600, 600]
    )
    next(results)
    print("at the end", flush=True)
"""


def test_the_interpreter_exits_while_calls_run() -> None:
    with running(LEFT_OPEN) as script:
        assert script.wait() == 0, script.errors()
        assert script.output() == "at the end\n"
        assert "Traceback" not in script.errors()
        wait_until(lambda: not script.processes(), "the end of all processes")


FROM_MAIN = """
from joblib import Parallel, delayed
from bulkhead.joblib_backend import register

class Point:
    x = 4

def double(number):
    return 2 * number

def x_of(point):
    return point.x

register()
print(Parallel(n_jobs=2, backend="bulkhead")(delayed(double)(n) for n in range(4)))
print(Parallel(n_jobs=2, backend="bulkhead")(delayed(getattr)(Point(), "x") for n in range(2)))
"""


def test_functions_of_a_main_module_that_cannot_be_imported_run() -> None:
    with running(
        f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {FROM_MAIN!r}]))"
    ) as script:
        assert script.wait() == 0, script.errors()
        assert script.output() == "[0, 2, 4, 6]\n[4, 4]\n"


def test_without_joblib_the_error_names_what_to_install() -> None:
    code = "import sys; sys.modules['joblib'] = None\nimport bulkhead\nimport bulkhead.joblib_backend"
    with running(code) as script:
        assert script.wait() == 1
        assert "ImportError: bulkhead.joblib_backend needs joblib: pip install joblib" in script.errors()
