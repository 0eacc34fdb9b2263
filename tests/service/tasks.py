"""An application as users write it. Each test that needs one gets a copy with a URL and options of its own.

See `service` in conftest.py: a copy is a module that can be imported by its name, as workers do.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gates import pass_gate
from jobs import lines, note

from bulkhead import App, Backoff, Snooze, Unrecoverable, current_job


def no_licence() -> None:
    """An initializer without which no worker comes up."""
    raise ValueError("no licence")


URL = "memory://"
OPTIONS: dict[str, Any] = {}
CONCURRENCY = 1
POOL: dict[str, Any] = {}

app = App(URL, **OPTIONS)
app.queue("default", concurrency=CONCURRENCY, **POOL)

AT_ONCE = Backoff(initial=0.0)

# What callbacks have told, in order. Owner: the consumer's process.
told: list[tuple[Any, ...]] = []


@app.task
def add(a: int, b: int) -> int:
    return a + b


@app.task
def echo(value: Any = None) -> Any:
    return value


@app.task
def jot(path: str, text: object = "") -> object:
    note(path, text)
    return text


@app.task(queue="side", concurrency=1)
def jot_aside(path: str, *texts: object) -> list[object]:
    note(path, " ".join(map(str, texts)))
    return list(texts)


@app.task
def instant(path: str) -> None:
    note(path, time.time())


@app.task
def pid() -> int:
    return os.getpid()


@app.task
def hold(folder: str, name: str) -> str:
    return pass_gate(folder, name)


@app.task(queue="side")
def hold_aside(folder: str, name: str) -> str:
    return pass_gate(folder, name)


@app.task(backoff=AT_ONCE)
def nap(path: str, seconds: float) -> int:
    note(path, f"begun {os.getpid()} {current_job().attempt}")
    time.sleep(seconds)
    note(path, f"ended {os.getpid()}")
    return current_job().attempt


@app.task(backoff=AT_ONCE)
def fail(path: str = os.devnull, message: str = "on purpose") -> None:
    note(path, current_job().attempt)
    raise ValueError(message)


@app.task(backoff=AT_ONCE)
def fail_at_first(path: str, failures: int) -> str:
    note(path, current_job().attempt)
    if len(lines(path)) <= failures:
        raise ValueError(f"failure {len(lines(path))}")
    return "at last"


@app.task
def give_up(path: str) -> None:
    note(path, current_job().attempt)
    raise Unrecoverable("useless")


@app.task
def snooze(path: str, times: int, delay: float = 0.0) -> int:
    note(path, current_job().attempt)
    if len(lines(path)) <= times:
        raise Snooze(delay)
    return current_job().attempt


@app.task(backoff=AT_ONCE)
def die(path: str, times: int = 1000, by: int = signal.SIGKILL) -> str:
    """Be killed the first so many times."""
    note(path, current_job().attempt)
    if len(lines(path)) <= times:
        os.kill(os.getpid(), by)
    return "alive"


@app.task(backoff=AT_ONCE, max_retries=0)
def leave(code: int = 0) -> None:
    sys.exit(code)


@app.task
def unencodable(path: str) -> object:
    note(path, "ran")
    return object()


@app.task
def describe(*_: Any) -> dict[str, Any]:
    job = current_job()
    return {
        "id": job.id,
        "queue": job.queue,
        "task": job.task,
        "attempt": job.attempt,
        "max_retries": job.max_retries,
        "seconds_left": job.seconds_left,
        "previous": job.previous if job.has_previous else "none",
        "headers": dict(job.headers),
        "enqueued_at": job.enqueued_at,
    }


@app.task
def save_and_wait(folder: str, value: Any, result: Any = None) -> Any:
    current_job().save(value)
    pass_gate(folder, "saved")
    return result


@app.task
def report_and_wait(folder: str) -> str:
    for done in range(100):
        current_job().progress(done, 100)
    threads = [threading.Thread(target=current_job().progress, args=(100, 100, "ready")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return pass_gate(folder, "reported")


@app.task
def ask_until_cancelled(path: str) -> None:
    note(path, "asks")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if current_job().is_cancelled:
            note(path, "tidied up")
            current_job().raise_if_cancelled()
        time.sleep(0.01)


@app.task
def enqueue_another(path: str) -> str:
    return jot.enqueue(path, "from a worker")


@app.task
def big(size: int) -> bytes:
    return b"x" * size


@app.task(
    backoff=AT_ONCE,
    max_retries=1,
    on_processing=lambda job: told.append(("processing", job.id, job.claim.attempt)),
    on_retry=lambda job, failure: told.append(("retry", job.id, failure.message)),
    on_success=lambda job: told.append(("success", job.id)),
    on_failure=lambda job, failure: told.append(("failure", job.id, failure.message)),
)
def telling(is_good: bool) -> str:
    if not is_good:
        raise ValueError(f"attempt {current_job().attempt}")
    return "good"


def _exit(*_: Any) -> None:
    sys.exit("a callback ends")


@app.task(on_processing=_exit, on_success=_exit)
def exiting_callbacks(value: Any) -> Any:
    return value


@app.task(timeout=0.3, backoff=AT_ONCE, max_retries=0)
def brief(path: str, seconds: float = 0.0) -> None:
    """A short one with a timeout, that may take long."""
    note(path, seconds)
    time.sleep(seconds)


if __name__ == "__main__":
    Path(sys.argv[1]).touch()
    app.run(grace=float(sys.argv[2]) if len(sys.argv) > 2 else 30.0)


@app.task(max_retries=0)
def snooze_oddly(delay: Any) -> None:
    odd = Snooze(1.0)
    odd.delay = delay
    raise odd


@app.task(max_retries=0)
def report(done: Any, total: Any, message: Any) -> str:
    current_job().progress(done, total, message)
    return "went on"


@app.task(max_retries=0)
def save(size: int) -> str:
    current_job().save(bytes(size))
    return "went on"


@app.task(max_retries=0)
def ask_in_a_copy() -> bool:
    """Ask in a forked copy of the worker and here, and tell whether both are answered."""
    job = current_job()
    job.save("before")
    copy = os.fork()
    if copy == 0:
        try:
            job.save("in the copy")
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(copy, 0)
    job.save("behind")
    return status == 0
