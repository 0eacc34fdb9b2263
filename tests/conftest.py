"""For every test: nothing may be left behind; the start methods of worker processes as a parameter; the servers."""

import gc
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

# Why: where bytecode is not written (containers often say so), each launcher and each spawned worker compiles the
# package anew, which takes half the time of all tests. Before the package is imported, so that this process writes it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

from gates import Gate  # noqa: E402
from servers import NatsServer, RedisCluster, RedisServer  # noqa: E402
from staffing import wait_until_staffed  # noqa: E402
from traces import Traces  # noqa: E402

# Why here: whichever test imports it first, its assertions tell what they compared.
pytest.register_assert_rewrite("bulkhead.testing.conformance")

# Seconds that processes which were told to end, and descriptors of garbage, may take to go.
PATIENCE = 5.0


# Files whose tests need the machine for themselves, all of them; single ones are marked.
ALONE = (
    "test_delay.py",
    "test_kills_in_transfer.py",
    "test_due_times.py",
    "test_delays.py",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import the other files when these alone are wanted."""
    if config.option.markexpr != "not slow and alone" or collection_path.suffix != ".py":
        return None
    has_some = is_alone(collection_path) or "mark.alone" in collection_path.read_text(encoding="utf-8")
    return None if has_some else True


def is_alone(path: Path) -> bool:
    return path.name in ALONE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_alone(item.path):
            item.add_marker(pytest.mark.alone)


def pytest_collection_finish() -> None:
    """Take the half a million objects of what was collected out of the garbage collector's sight: they stay anyway."""
    # Why: tests and traces.py collect garbage and go through all objects, which takes a tenth of a second otherwise.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """Fail a test after which more processes, threads, descriptors or shared memory exist than before it.

    Counts are compared, so a module's dispatcher may replace its workers; it has to be staffed before its first test.
    """
    wait_until_staffed()  # or a worker that replaces one of the last test's would be left behind by this one
    before = Traces.now()
    yield
    deadline = time.monotonic() + PATIENCE
    while (left := Traces.now().beyond(before)) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not left, f"the test leaves behind: {left}"


@pytest.fixture(scope="module", params=["fork", "forkserver", "spawn"])
def start_method(request: pytest.FixtureRequest) -> str:
    """Each way to start workers. Of module scope, so that a module's dispatcher can depend on it."""
    return request.param


@pytest.fixture(
    scope="module",
    params=["forkserver", *(pytest.param(method, marks=pytest.mark.slow) for method in ("fork", "spawn"))],
)
def usual_start_method(request: pytest.FixtureRequest) -> str:
    """As `start_method`, for what is the same code under each; only the default is not slow."""
    return request.param


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Jobs that run until the test lets them end."""
    folder = tmp_path / "gate"
    folder.mkdir()
    made = Gate(folder)
    yield made
    made.open()


# Why of the session: they are started once, and before the test's traces are counted.
@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that tests share, each with its `namespace`."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def starting_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """The same as `redis_cluster`, perhaps not whole yet: for a module that uses it later."""
    cluster = RedisCluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.begin()
        yield cluster
    finally:
        cluster.kill()


@pytest.fixture(scope="session")
def redis_cluster(starting_cluster: RedisCluster) -> RedisCluster:
    """A Redis Cluster of three nodes that tests share, each with its `namespace`."""
    starting_cluster.wait()
    return starting_cluster


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A NATS server with JetStream that tests share, each with its `namespace`."""
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
def namespace() -> str:
    """The name of a place on a shared server that no other test uses."""
    return f"test-{uuid.uuid4().hex[:12]}"
