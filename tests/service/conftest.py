"""For tests of the service: applications of their own, on each backend, and workers as threads and as processes."""

from __future__ import annotations

import contextlib
import importlib
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self
from uuid import uuid4

import pytest
from scripts import Script
from traces import Traces
from watching import PATIENCE, wait_until

from bulkhead import App
from bulkhead.service.app import QueuedJob

# The queues of the template.
MAIN, ALL = ("default",), ("default", "side")

TEMPLATE = Path(__file__).with_name("tasks.py").read_text()


class Service:
    """An application in a module of its own, which workers can import.

    Its tasks are attributes: `service.add.enqueue(1, 2)`.
    """

    def __init__(self, folder: Path, url: str, **settings: Any) -> None:
        self.folder = folder
        self.url = url
        self.name = f"tasks_{uuid4().hex}"
        options = {"namespace": f"test-{uuid4().hex[:12]}", **settings.pop("options", {})}
        code = TEMPLATE.replace('URL = "memory://"', f"URL = {url!r}")
        code = code.replace("OPTIONS: dict[str, Any] = {}", f"OPTIONS: dict[str, Any] = {options!r}")
        for name, value in settings.items():
            known = {"concurrency": "CONCURRENCY = 1", "pool": "POOL: dict[str, Any] = {}"}[name]
            code = code.replace(known, f"{known.partition(' =')[0]} = {value}")
        (folder / f"{self.name}.py").write_text(code)
        self.module: ModuleType = importlib.import_module(self.name)
        self.app: App = self.module.app

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    @contextlib.contextmanager
    def working(self, queues: Sequence[str] = MAIN, *, grace: float = 30.0) -> Iterator[Working]:
        """Have a worker in a thread meanwhile; of the main queue only, as each queue has a pool to be started."""
        with Working(self.app, queues, grace) as made:
            yield made

    @contextlib.contextmanager
    def process(self, grace: float = 30.0, before: str = "") -> Iterator[Script]:
        """Have a worker as a process of its own meanwhile; what is left of it is killed in the end.

        Args:
            grace: As of `app.run`.
            before: What its main process does before it runs: lines with `app`.
        """
        folder = self.folder / uuid4().hex
        folder.mkdir()
        ready = folder / "ready"
        code = f"import sys; sys.argv[1:] = [{str(ready)!r}, '{grace}']\n"
        code += f"sys.path.insert(0, {str(self.folder)!r})\n"
        code += f"from {self.name} import app\n"
        code += "if __name__ == '__main__':\n    import logging; logging.basicConfig(level='INFO')\n"
        code += textwrap.indent(before, "    ")
        code += f"    print('ready', flush=True)\n    app.run({list(MAIN)!r}, grace={grace})\n"
        code += "    print('ended', flush=True)\n"
        script = Script(folder, code)
        try:
            script.wait_for_line("ready")
            yield script
        finally:
            script.end()

    def settled(self, id: str, *, within: float = PATIENCE) -> QueuedJob:
        """Return what has become of a job when something has."""
        return self.app.wait(id, timeout=within)

    def wait_for_job(self, id: str) -> QueuedJob:
        """Wait until a job is known, as one that follows another, and return what has become of it."""
        wait_until(lambda: self.app.find_jobs([id])[0] is not None, f"{id} is known")
        return self.settled(id)

    def wait_for_state(self, id: str, state: str) -> QueuedJob:
        wait_until(lambda: self.app.job(id).state == state, f"{id} is {state}")
        return self.app.job(id)

    def close(self) -> None:
        self.app.close()
        del sys.modules[self.name]


class Working:
    """`app.run` in a thread."""

    def __init__(self, app: App, queues: Sequence[str], grace: float) -> None:
        self.app = app
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(queues, grace))

    def __enter__(self) -> Self:
        before = len(self.app._consumers)
        self._thread.start()
        wait_until(lambda: len(self.app._consumers) > before or not self._thread.is_alive(), "it runs")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Have all workers of the application end, and wait for this one."""
        if self._thread.is_alive():
            self.app.stop()
        self.wait()

    def wait(self) -> None:
        """Wait until it has ended."""
        self._thread.join(2 * PATIENCE)
        assert not self._thread.is_alive(), "app.run() has not ended"

    def take_error(self) -> BaseException | None:
        """Return what it has ended with; it is no failure of the test then."""
        error, self.error = self.error, None
        return error

    def _run(self, queues: Sequence[str], grace: float) -> None:
        try:
            self.app.run(queues, grace=grace)
        except BaseException as error:
            self.error = error


Make = Callable[..., Service]


# Those with a server: the fixture that has it.
SERVERS = {"redis": "redis_server", "redis cluster": "redis_cluster", "nats": "nats_server"}

# Why fewer in most tests: what depends on the backend is tried on each, the rest is the same code.
LOCAL = ["memory", "sqlite"]


def _url(kind: str, folder: Path) -> str:
    if kind == "memory":
        return f"memory://{uuid4().hex}"
    return f"sqlite:///{folder}/jobs.db" if kind == "sqlite" else kind


# Why of the session: a server is started before the test's traces are counted.
@pytest.fixture(scope="session", params=[*LOCAL, *SERVERS])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend: what `make` takes."""
    return _backend(request)


@pytest.fixture(scope="session", params=["sqlite", *SERVERS])
def shared_backend(request: pytest.FixtureRequest) -> str:
    """Each backend that several processes can use."""
    return _backend(request)


@pytest.fixture(
    scope="session", params=["sqlite", *(pytest.param(name, marks=pytest.mark.slow) for name in SERVERS)]
)
def file_or_server(request: pytest.FixtureRequest) -> str:
    """As `shared_backend`, for what is the same code on each; the servers are slow."""
    return _backend(request)


def _backend(request: pytest.FixtureRequest) -> str:
    server = SERVERS.get(request.param)
    return request.param if server is None else request.getfixturevalue(server).url


@contextlib.contextmanager
def _making(folder: Path) -> Iterator[Make]:
    made: list[Service] = []

    def new(url: str = "memory", **settings: Any) -> Service:
        made.append(Service(folder, url if ":" in url else _url(url, folder), **settings))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield new
        for one in made:
            one.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes services: `make(url, options={...}, concurrency=2)`; by default in memory.

    With one worker process unless said otherwise: each takes as long to start as most tests.
    """
    with _making(tmp_path) as new:
        yield new


@pytest.fixture(scope="module")
def module_make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """As `make`, for a whole module."""
    with _making(tmp_path_factory.mktemp("module")) as new:
        yield new


@pytest.fixture
def service(make: Make) -> Service:
    """An application in memory, with one worker process."""
    return make()


@pytest.fixture
def durable(make: Make) -> Service:
    """An application in a file, for what takes several processes; two in each worker."""
    return make("sqlite", concurrency=2)


@pytest.fixture(params=LOCAL)
def anywhere(request: pytest.FixtureRequest, make: Make) -> Service:
    """An application in memory and in a file."""
    return make(request.param, concurrency=2)


@pytest.fixture(scope="module")
def served_anywhere(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """An application on each backend, with a worker for a whole module: starting one takes longer than most tests."""
    before = Traces.now()
    with _making(tmp_path_factory.mktemp("served")) as new:
        made = new(backend, options={"lease": 3.0}, concurrency=2)
        with made.working(ALL):
            made.app.result(made.pid.enqueue(), timeout=PATIENCE)
            yield made
    wait_until(lambda: not Traces.now().beyond(before), "nothing is left behind")
