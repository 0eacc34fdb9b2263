"""Applications of tests: placed on a server of the test, and with a consumer that runs in a thread of the test."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

from watching import PATIENCE

from bulkhead import App
from bulkhead.backends.base import Claim, Hold
from bulkhead.service.batch import HeldJob
from bulkhead.service.envelope import Envelope

__all__ = ["consuming", "held", "placed"]

_numbers = itertools.count()


@contextlib.contextmanager
def placed(app: App, url: str, namespace: str) -> Iterator[App]:
    """Let an application of a test module, which its workers import, keep its jobs here for one test."""
    app.url, app.namespace = url, namespace
    try:
        yield app
    finally:
        app.close()


@contextlib.contextmanager
def consuming(app: App, *, grace: float = 5.0) -> Iterator[threading.Thread]:
    """Run a consumer of the application in a thread meanwhile."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            app.run(grace=grace)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="consumer of a test")
    thread.start()
    try:
        yield thread
    finally:
        deadline = time.monotonic() + PATIENCE + grace
        while thread.is_alive() and time.monotonic() < deadline:
            app.stop()
            thread.join(grace or 0.1)
    assert not thread.is_alive(), "the consumer does not stop"
    if errors:
        raise errors[0]


def held(queue: str = "default", task: str = "work", *, job_id: str = "", age: float = 0.0) -> HeldJob:
    """Return a job as a consumer holds it, for middlewares that are called by the test."""
    job_id = job_id or f"job-{next(_numbers)}"
    now = time.time()
    claim = Claim(Hold(job_id, queue, f"token-{next(_numbers)}"), b"", 0, 1, now - age, now - age)
    envelope = Envelope(task, b"")
    return HeldJob(claim, envelope, None, b"")  # type: ignore[arg-type]
