"""Every backend does what its contracts say; the tests themselves are in bulkhead.testing.conformance.

A backend adds a line to BACKENDS: its name, and what gives the URL of a place for one test, or the name of a fixture of
session scope: a server with a `url`. A place that is used by several tests is fine: each has namespaces of its own.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from uuid import uuid4

import pytest

pytest.register_assert_rewrite("bulkhead.testing.conformance")

from bulkhead import backends  # noqa: E402
from bulkhead.backends.base import Backend  # noqa: E402
from bulkhead.testing.conformance import (  # noqa: E402
    Again,
    BrokerContract,
    RegistryContract,
    ResultStoreContract,
)
from bulkhead.testing.conformance.settling import Settling  # noqa: E402


@contextmanager
def _memory(folder: Path) -> Iterator[str]:
    yield f"memory://{uuid4().hex}"


@contextmanager
def _sqlite(folder: Path) -> Iterator[str]:
    yield f"sqlite:///{folder}/jobs.db"


Place = Callable[[Path], AbstractContextManager[str]]

BACKENDS: dict[str, Place | str] = {
    "memory": _memory,
    "sqlite": _sqlite,
    "redis": "redis_server",
    "redis cluster": "redis_cluster",
    "nats": "nats_server",
}

# Those that are in one process only.
LOCAL = {"memory"}

# Those where a job that is given back for a while does not keep its place in line.
WITHOUT_PLACES = {"nats"}


# Why of the session: a server is started before the test's traces are counted.
@pytest.fixture(scope="session", params=list(BACKENDS))
def site(request: pytest.FixtureRequest) -> tuple[str, Place]:
    place = BACKENDS[request.param]
    if isinstance(place, str):
        server = request.getfixturevalue(place)
        return request.param, lambda folder: nullcontext(server.url)
    return request.param, place


class OnEachBackend:
    @pytest.fixture
    def again(self, site: tuple[str, Place], tmp_path: Path) -> Iterator[Again]:
        opened: list[Backend] = []
        run = uuid4().hex[:12]

        def connect(namespace: str = "one") -> Backend:
            opened.append(self.made(backends.connect(url, f"{run}-{namespace}")))
            return opened[-1]

        name, opens = site
        self.is_shared_by_processes = name not in LOCAL
        self.keeps_places = name not in WITHOUT_PLACES
        with opens(tmp_path) as url:
            yield connect
            for backend in opened:
                backend.close()

    def made(self, backend: Backend) -> Backend:
        return backend


class TestBroker(OnEachBackend, BrokerContract):
    pass


@pytest.mark.parametrize("site", ["sqlite", "redis"], indirect=True)
class TestInTwoSteps(OnEachBackend, Settling):
    """As where jobs are in one place and results in another (NATS has no single step anyway)."""

    def made(self, backend: Backend) -> Backend:
        return dataclasses.replace(backend, settler=None)


class TestResultStore(OnEachBackend, ResultStoreContract):
    pass


class TestRegistry(OnEachBackend, RegistryContract):
    pass
