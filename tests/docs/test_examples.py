"""Every example runs, and finds what a plain loop in one process finds."""

import math
import re
import subprocess
import sysconfig
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
GUARD = 'if __name__ == "__main__":'
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if GUARD in path.read_text())

OutputOf = Callable[..., str]


@pytest.fixture(scope="module")
def output_of(run_script: Callable[..., subprocess.CompletedProcess[str]]) -> OutputOf:
    """What an example prints; each is run once for all tests."""

    @cache
    def output(name: str, *arguments: str) -> str:
        return run_script(EXAMPLES / name, *arguments).stdout

    return output


def test_there_are_three_examples() -> None:
    assert SCRIPTS == ["class_jobs.py", "durable_archive.py", "function_jobs.py"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_ends_well_and_writes_no_error(name: str, output_of: OutputOf) -> None:
    assert output_of(name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_examples_readme_names_each_example(name: str) -> None:
    assert f"[`{name}`]({name})" in (EXAMPLES / "README.md").read_text()


def test_the_class_jobs_write_what_a_plain_loop_writes(output_of: OutputOf) -> None:
    contents = [path.read_bytes() for path in STDLIB.glob("*.py")]

    sums = _figures(output_of("class_jobs.py"))

    assert sums["files"] == sums["checksums"] == len(contents)
    assert sums["bytes"] == sum(map(len, contents))
    assert sums["compressed"] == sum(len(zlib.compress(content, level=9)) for content in contents)
    assert sums["archive"] > sums["compressed"]


def test_the_durable_archive_is_whole_though_two_workers_are_killed(output_of: OutputOf) -> None:
    lines = output_of("durable_archive.py").splitlines()
    n_files = len(list(STDLIB.glob("*.py")))

    assert lines[0] == f"enqueued {n_files} files"
    assert [line.split(" after")[0] for line in lines[1:3]] == ["worker 1 killed", "worker 2 killed"]
    assert lines[3].startswith(f"all {n_files} files compressed, to ")
    assert lines[3].endswith(f"; {n_files} succeeded")


def test_the_function_jobs_count_what_a_sieve_counts(output_of: OutputOf) -> None:
    limit = 400_000
    sieve = bytearray([1]) * limit
    sieve[:2] = b"\0\0"
    for number in range(2, math.isqrt(limit) + 1):
        if sieve[number]:
            sieve[number * number :: number] = bytes(len(range(number * number, limit, number)))

    lines = output_of("function_jobs.py").splitlines()

    assert lines[0] == f"primes below {limit:,}: {sum(sieve):,}"
    assert lines[1].startswith("exception: invalid literal for int()")
    assert lines[2] == "retry: got 42 at attempt 3"
    assert lines[3].startswith("timeout: ")
    assert lines[4:] == ["barrier: 17 succeeded, 2 failed"]


def _figures(output: str) -> dict[str, int]:
    """The lines that are a label and a number, possibly with a remark, as the examples end with."""
    found = re.findall(r"^ *([a-z][a-z ]*?) {2,}([\d,]+)(?: {2}.*)?$", output, re.MULTILINE)
    return {label: int(number.replace(",", "")) for label, number in found}
