"""Every example runs, and finds what a plain loop in one process finds."""

import ast
import importlib
import math
import re
import subprocess
import sysconfig
import tokenize
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from bulkhead import Dispatcher, Pool

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


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("source_measures")


@pytest.fixture
def survey(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("stdlib_survey")


def test_there_are_three_examples() -> None:
    assert SCRIPTS == ["class_jobs.py", "function_jobs.py", "stdlib_survey.py"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_ends_well_and_writes_no_error(name: str, output_of: OutputOf) -> None:
    assert output_of(name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_examples_readme_names_each_example(name: str) -> None:
    assert f"[`{name}`]({name})" in (EXAMPLES / "README.md").read_text()


def test_the_survey_counts_what_a_plain_loop_counts(output_of: OutputOf, measures: ModuleType) -> None:
    files = measures.source_files()
    trees = []
    lines = 0
    for path in files:
        with tokenize.open(path) as file:
            source = file.read()
        lines += source.count("\n")
        trees.append(ast.parse(source))

    sums = _figures(output_of("stdlib_survey.py"))

    assert len(files) > 300
    assert sums["modules"] == len(files)
    assert sums["lines"] == lines
    assert sums["functions"] == _count(trees, ast.FunctionDef, ast.AsyncFunctionDef)
    assert sums["classes"] == _count(trees, ast.ClassDef)


def test_the_survey_follows_imports_as_a_plain_loop_does(output_of: OutputOf, measures: ModuleType) -> None:
    modules = [measures.measure(path) for path in measures.source_files()]
    graph = measures.import_graph(modules)
    reachable = {name: set(targets) for name, targets in graph.items()}
    grew = True
    while grew:
        before = sum(map(len, reachable.values()))
        for targets in reachable.values():
            targets.update(*(reachable[target] for target in tuple(targets)))
        grew = sum(map(len, reachable.values())) > before

    output = output_of("stdlib_survey.py")
    sums = _figures(output)

    assert sums["deepest nesting"] == max(module.nesting for module in modules)
    assert sums["imports"] == sum(map(len, graph.values()))
    assert sums["reachable pairs"] == sum(len(found - {name}) for name, found in reachable.items())
    first, count = measures.most_imported(graph)[0]
    assert f"most imported: {first} ({count})" in output


def test_the_survey_shows_that_nothing_else_noticed_the_jobs_that_misbehave(output_of: OutputOf) -> None:
    output = output_of("stdlib_survey.py")

    assert re.search(r"^ +crash +failed, .*WorkerCrashed: .*SIGSEGV", output, re.MULTILINE)
    assert re.search(r"^ +hang +failed, .*JobTimeout: ", output, re.MULTILINE)
    assert re.search(r"^ +flaky +succeeded at attempt 3$", output, re.MULTILINE)
    smooth = re.search(r"(\d+) of the (\d+) other jobs succeeded at their first attempt", output)
    assert smooth is not None
    assert smooth[1] == smooth[2]


def test_the_survey_ends_with_a_row_for_each_pool(output_of: OutputOf) -> None:
    output = output_of("stdlib_survey.py")
    modules = _figures(output)["modules"]
    batches = math.ceil(modules / 50)

    wide = _pool_row(output, "wide")
    urgent = _pool_row(output, "urgent")

    # Of each file one measurement, two jobs that fail, and the batches of phase 2.
    assert wide[:6] == [0, modules + 2 + batches, modules + batches, 2, 2, 2]
    assert urgent[0] == 1
    assert urgent[1] == urgent[2] > 1
    assert urgent[3:6] == [0, 0, 0]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("limit", [1, 120])
def test_the_survey_sums_part_of_the_files(
    workers: int,
    limit: int,
    survey: ModuleType,
    measures: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(survey, "HANG_TIMEOUT", 0.2)
    files = measures.source_files(limit)

    with Dispatcher([Pool(survey.WIDE, workers), Pool(survey.URGENT, 1)]) as disp:
        first = survey.run_phase1(disp, files)
        second = survey.run_phase2(disp, first.modules)

    modules = [measures.measure(path) for path in files]
    graph = measures.import_graph(modules)
    assert first.modules == modules
    assert first.totals == measures.summarise(modules)
    assert second.links == sum(map(len, graph.values()))
    assert second.reach == measures.reach(graph, graph)


def test_the_class_jobs_write_what_a_plain_loop_writes(output_of: OutputOf) -> None:
    contents = [path.read_bytes() for path in STDLIB.glob("*.py")]

    sums = _figures(output_of("class_jobs.py"))

    assert sums["files"] == sums["checksums"] == len(contents)
    assert sums["bytes"] == sum(map(len, contents))
    assert sums["compressed"] == sum(len(zlib.compress(content, level=9)) for content in contents)
    assert sums["archive"] > sums["compressed"]


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


def test_the_survey_writes_its_timeline(
    run_script: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    page = tmp_path / "survey.html"

    run_script(EXAMPLES / "stdlib_survey.py", "--limit", "60", "--timeline", str(page))

    text = page.read_text()
    assert "Survey of the standard library" in text
    assert '"measure_at_third"' in text


def _figures(output: str) -> dict[str, int]:
    """The lines that are a label and a number, possibly with a remark, as the examples end with."""
    found = re.findall(r"^ *([a-z][a-z ]*?) {2,}([\d,]+)(?: {2}.*)?$", output, re.MULTILINE)
    return {label: int(number.replace(",", "")) for label, number in found}


def _count(trees: list[ast.Module], *kinds: type[ast.AST]) -> int:
    return sum(isinstance(node, kinds) for tree in trees for node in ast.walk(tree))


def _pool_row(output: str, name: str) -> list[float]:
    """The numbers of a pool's row: priority, jobs, succeeded, failed, retried, restarts, busy seconds."""
    table = output.partition("\nPools\n")[2].partition("\nWorkers\n")[0]
    row = next(line for line in table.splitlines() if line.split()[0] == name)
    return [float(figure) for figure in row.split()[1:8]]
