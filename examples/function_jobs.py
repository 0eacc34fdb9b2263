"""Jobs as functions: results, an exception, a retry and a timeout, on one pool.

python examples/function_jobs.py
"""

import math
import tempfile
import time
from pathlib import Path

from bulkhead import Dispatcher, Job, JobTimeout, Pool, RetryPolicy

LIMIT = 400_000  # primes are counted below this number
STEP = 25_000  # numbers to a job


def count_primes(start: int, stop: int) -> int:
    return sum(is_prime(number) for number in range(start, stop))


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def fetch(attempts: Path) -> str:
    """Fail twice, as a service that is starting up would."""
    with attempts.open("a") as file:
        file.write("x")
    if attempts.stat().st_size < 3:
        raise ConnectionError("the service is starting up")
    return "42"


def sleep_too_long() -> None:
    time.sleep(60)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, Dispatcher([Pool(priority=0, n_workers=2)]) as disp:
        # Results: dispatch gives a tracker, and result() waits for what the function returned.
        parts = [disp.dispatch(Job(count_primes, n, n + STEP)) for n in range(0, LIMIT, STEP)]
        print(f"primes below {LIMIT:,}: {sum(part.result() for part in parts):,}")

        # An exception: it is raised again where the result is asked for.
        wrong = disp.dispatch(Job(int, "forty-two"))
        try:
            wrong.result()
        except ValueError as error:
            print(f"exception: {error}")

        # A retry: at most three attempts, 0.1 s after the first failure, and only for this kind of error.
        policy = RetryPolicy(3, initial=0.1, retry_on=(ConnectionError,))
        fetched = disp.dispatch(Job(fetch, Path(scratch) / "attempts").options(retry=policy))
        print(f"retry: got {fetched.result()} at attempt {fetched.status().attempt}")

        # A timeout: the worker is ended and replaced, the others go on.
        late = disp.dispatch(Job(sleep_too_long).options(timeout=0.5))
        try:
            late.result()
        except JobTimeout as error:
            print(f"timeout: {str(error).splitlines()[0]}")  # the other lines say where the job was

        # A barrier reports what happened since the last one; by default it would raise for the two failures.
        report = disp.barrier(check=False)
        print(f"barrier: {report.succeeded} succeeded, {report.failed_count} failed")


if __name__ == "__main__":
    main()
