"""Durable jobs: a folder's files are compressed by workers that may be killed at any moment.

    cd examples
    python durable_archive.py                   # all of it: enqueue, two kills, resume, check
    python durable_archive.py enqueue FOLDER    # or step by step, with jobs (archive.db) and copies in this folder
    bulkhead worker durable_archive:app         # as many as you like, each in a terminal of its own
    python durable_archive.py status

The queue is a SQLite file, so there is nothing to install or to start. Each file becomes a job with an id of its own:
enqueueing the same folder again adds nothing.
"""

import lzma
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from bulkhead import App

PLACE = Path(os.environ.get("ARCHIVE_PLACE", ".")).absolute()

# A worker that gives no sign of life for so many seconds is taken for dead, and its jobs run elsewhere.
app = App(f"sqlite:///{PLACE}/archive.db", lease=1.0)


@app.task(queue="compress", concurrency=2, timeout=60)
def compress(source: str) -> int:
    """Write the compressed copy of a file and return its size."""
    target = PLACE / f"{Path(source).name}.xz"
    # Under another name first: who is killed in the middle leaves no half a copy.
    draft = target.with_suffix(f".{os.getpid()}.part")
    draft.write_bytes(lzma.compress(Path(source).read_bytes()))
    draft.replace(target)
    return target.stat().st_size


def enqueue(folder: Path) -> int:
    """Enqueue a job for each file; return how many files there are."""
    calls = [compress.call(str(path)).options(id=path.name) for path in sorted(folder.resolve().glob("*.py"))]
    app.enqueue_many(calls, existing="keep")
    return len(calls)


def status() -> str:
    """Return where the jobs are, in a line."""
    return ", ".join(f"{count} {state}" for state, count in app.counts().items() if count) or "no jobs"


def start_worker() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bulkhead", "worker", "durable_archive:app", "--log-level", "error"]
    return subprocess.Popen(
        command, cwd=Path(__file__).parent, env={**os.environ, "ARCHIVE_PLACE": str(PLACE)}
    )


def n_done() -> int:
    return app.counts()["succeeded"]


def whole_story() -> None:
    folder = Path(sysconfig.get_paths()["stdlib"])
    n_files = enqueue(folder)
    print(f"enqueued {n_files} files", flush=True)
    for number in (1, 2):
        worker = start_worker()
        wait_for(number * n_files // 4)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        print(f"worker {number} killed after {n_done()} files", flush=True)
    worker = start_worker()
    wait_for(n_files)
    worker.terminate()
    worker.wait()
    copies = {path.name for path in PLACE.glob("*.xz")}
    assert copies == {f"{path.name}.xz" for path in folder.glob("*.py")}
    size = sum(app.result(path.name) for path in folder.glob("*.py"))
    print(f"all {len(copies)} files compressed, to {size:,} bytes; {status()}")


def wait_for(number: int) -> None:
    deadline = time.monotonic() + 60
    while n_done() < number:
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {n_done()} of {number} files are compressed: {status()}")
        time.sleep(0.02)


def main(arguments: list[str]) -> None:
    if not arguments:
        whole_story()
    elif arguments[0] == "enqueue" and len(arguments) == 2:
        print(f"{enqueue(Path(arguments[1]))} files; {status()}")
    elif arguments == ["status"]:
        print(status())
    else:
        raise SystemExit(__doc__)
    app.close()


if __name__ == "__main__":
    if len(sys.argv) == 1 and "ARCHIVE_PLACE" not in os.environ:
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["ARCHIVE_PLACE"] = scratch
            raise SystemExit(subprocess.call([sys.executable, __file__]))
    main(sys.argv[1:])
