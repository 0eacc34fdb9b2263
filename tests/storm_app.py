"""The application of tests/chaos/test_queue_storm.py: what producers and consumers run, in processes of their own."""

from __future__ import annotations

import os
import sys
import time

from jobs import note

from bulkhead import App, Backoff, BrokerUnavailable

LEASE = float(os.environ.get("STORM_LEASE", "2"))
FOLDER = os.environ.get("STORM_FOLDER", ".")

app = App(os.environ.get("STORM_URL", "memory://"), lease=LEASE)


# Why so many retries: an attempt whose consumer is killed counts.
@app.task(concurrency=2, max_retries=1000, backoff=Backoff(initial=0.01, maximum=0.1))
def leave_a_mark(number: int) -> int:
    note(f"{FOLDER}/effects-{os.getpid()}", number)
    # Most are short enough to travel together.
    time.sleep(0.05 if number % 50 == 0 else 0.0005)
    return number


def produce(first: int, count: int) -> None:
    """Enqueue so many jobs, again and again where the broker is out of reach: own ids keep them from being doubled."""
    for at in range(first, first + count, 100):
        calls = [leave_a_mark.call(n).options(id=f"job-{n}") for n in range(at, min(at + 100, first + count))]
        while True:
            try:
                app.enqueue_many(calls, existing="keep")
                break
            except BrokerUnavailable:
                time.sleep(0.1)
    app.close()


if __name__ == "__main__":
    produce(int(sys.argv[1]), int(sys.argv[2]))
