"""An application for tests of groups, chains and schedules. Its workers import this module; a test places it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from gates import pass_gate
from jobs import note as note_line
from waiting import wait_until

from bulkhead import App
from bulkhead.service.context import current_job

if TYPE_CHECKING:
    from bulkhead.service.consumer import Consumer

__all__ = ["BEATS", "app", "consuming", "placed"]

BEATS = ("beat", "other beat")

app = App(
    os.environ.get("BULKHEAD_URL", "memory://durable-jobs"),
    namespace=os.environ.get("BULKHEAD_NAMESPACE", "durable-jobs"),
    lease=2.0,
)


@app.task(concurrency=2, max_retries=0)
def add(*numbers: int) -> int:
    return sum(numbers)


@app.task(max_retries=0)
def give(value: Any = None) -> Any:
    return value


@app.task(max_retries=0)
def nothing(*args: Any) -> None:
    return None


@app.task(max_retries=0)
def told(*args: Any) -> Any:
    """Return the arguments, and what the context says of the job before."""
    job = current_job()
    return [list(args), job.has_previous, job.previous if job.has_previous else None]


@app.task(max_retries=0)
def note(path: str, text: str = "") -> str:
    note_line(path, text or current_job().id)
    return text


@app.task(max_retries=0)
def note_previous(previous: Any, path: str) -> Any:
    note_line(path, current_job().id)
    return previous


@app.task(max_retries=0)
def fail(*args: Any) -> None:
    raise ValueError("as it was to be")


@app.task(max_retries=0)
def need(previous: Any, path: str) -> Any:
    """Fail unless there is such a file."""
    if not Path(path).exists():
        raise ValueError("it is not there")
    return previous


@app.task(max_retries=0)
def wait_at(folder: str, name: str = "job") -> str:
    return pass_gate(folder, name)


@app.task(max_retries=0)
def wait_after(previous: Any, folder: str) -> Any:
    pass_gate(folder, "after")
    return previous


@app.task(max_retries=0)
def grow(n: int) -> str:
    return "x" * n


@app.task(max_retries=0)
def nap(seconds: float) -> None:
    time.sleep(seconds)


@app.task(queue="side", concurrency=1, max_retries=0)
def aside(value: Any = None) -> Any:
    return value


@contextlib.contextmanager
def placed(url: str) -> Iterator[App]:
    """Let the application keep its jobs in a place of its own meanwhile."""
    app.url, app.namespace = url, f"t{uuid4().hex[:12]}"
    try:
        yield app
    finally:
        app.close()


@contextlib.contextmanager
def consuming(n: int = 1, queues: Sequence[str] = ("default", "side")) -> Iterator[list[Consumer]]:
    """Have consumers in threads of this process meanwhile."""
    from bulkhead.service.consumer import Consumer  # Why here: workers import this module

    consumers = [Consumer(app, list(queues)) for _ in range(n)]
    threads = [threading.Thread(target=one.run, kwargs={"grace": 0.5}) for one in consumers]
    for thread in threads:
        thread.start()
    try:
        yield consumers
    finally:
        for one in consumers:
            one.stop()
        for thread in threads:
            thread.join(30.0)
        wait_until(lambda: not any(thread.is_alive() for thread in threads), "the consumers to end")
