"""The servers on which middlewares are tested."""

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from bulkhead import App
from bulkhead.service.middleware import Middleware

PLACES = {
    "memory": None,
    "sqlite": None,
    "redis": "redis_server",
    "redis cluster": "redis_cluster",
    "nats": "nats_server",
}


# Why of the session: a server is started before the test's traces are counted.
@pytest.fixture(scope="session", params=list(PLACES))
def place(request: pytest.FixtureRequest) -> tuple[str, str | None]:
    fixture = PLACES[request.param]
    server = None if fixture is None else request.getfixturevalue(fixture)
    return request.param, None if server is None else server.url


@pytest.fixture
def url(place: tuple[str, str | None], tmp_path: Path) -> str:
    """Where a test keeps its jobs; each kind of server in turn."""
    name, address = place
    if address is not None:
        return address
    return f"memory://{uuid4().hex}" if name == "memory" else f"sqlite:///{tmp_path}/jobs.db"


@pytest.fixture
def namespace() -> str:
    return uuid4().hex[:12]


@pytest.fixture
def app_with(url: str, namespace: str) -> Iterator[Callable[..., App]]:
    """Make applications that share jobs: as many producers or consumers, each with middlewares of its own."""
    made: list[App] = []

    def make(*middlewares: Middleware, **options: object) -> App:
        app = App(url, namespace=namespace, middlewares=middlewares, **options)  # type: ignore[arg-type]
        app.task(work)
        made.append(app)
        return app

    yield make
    for app in made:
        app.close()


def work(*args: object, **kwargs: object) -> None:
    """A task that is never run: only its jobs are enqueued."""


# Each costs seconds, and what is different in Redis is tested in the process of the test, too.
@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.slow)])
def shared_url(request: pytest.FixtureRequest, tmp_path: Path, redis_server: object) -> str:
    """A place that several processes share."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    return str(redis_server.url)  # type: ignore[attr-defined]
