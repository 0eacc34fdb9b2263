"""`bulkhead demo` runs, and finds what a plain loop in one process finds."""

import ast
import math
import re
import subprocess
import tokenize
from collections.abc import Callable
from pathlib import Path

import pytest

from bulkhead import Dispatcher, Pool
from bulkhead.cli import main
from bulkhead.demo import measures, survey

RunScript = Callable[..., subprocess.CompletedProcess[str]]


# Modules that the demo measures here, so that the plain loop is quick; three batches, the last one not full.
SAMPLE = 110


@pytest.fixture(scope="module")
def timeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo writes its page."""
    return tmp_path_factory.mktemp("demo") / "survey.html"


@pytest.fixture(scope="module")
def demo_output(run_script: RunScript, timeline: Path) -> str:
    """What the demo prints; it is run once for all tests."""
    return run_script("-m", "bulkhead", "demo", "--limit", str(SAMPLE), "--timeline", str(timeline)).stdout


def test_the_survey_counts_what_a_plain_loop_counts(demo_output: str) -> None:
    _assert_counted(demo_output, measures.source_files(SAMPLE))


@pytest.mark.slow
def test_without_a_limit_the_survey_counts_all_of_the_standard_library(run_script: RunScript) -> None:
    files = measures.source_files()
    assert len(files) > 300
    _assert_counted(run_script("-m", "bulkhead", "demo").stdout, files)


def _assert_counted(output: str, files: list[Path]) -> None:
    trees = []
    lines = 0
    for path in files:
        with tokenize.open(path) as file:
            source = file.read()
        lines += source.count("\n")
        trees.append(ast.parse(source))

    sums = _figures(output)

    assert sums["modules"] == len(files)
    assert sums["lines"] == lines
    assert sums["functions"] == _count(trees, ast.FunctionDef, ast.AsyncFunctionDef)
    assert sums["classes"] == _count(trees, ast.ClassDef)


def test_the_survey_follows_imports_as_a_plain_loop_does(demo_output: str) -> None:
    modules = [measures.measure(path) for path in measures.source_files(SAMPLE)]
    graph = measures.import_graph(modules)
    reachable = {name: set(targets) for name, targets in graph.items()}
    grew = True
    while grew:
        before = sum(map(len, reachable.values()))
        for targets in reachable.values():
            targets.update(*(reachable[target] for target in tuple(targets)))
        grew = sum(map(len, reachable.values())) > before

    output = demo_output
    sums = _figures(output)

    assert sums["deepest nesting"] == max(module.nesting for module in modules)
    assert sums["imports"] == sum(map(len, graph.values()))
    assert sums["reachable pairs"] == sum(len(found - {name}) for name, found in reachable.items())
    first, count = measures.most_imported(graph)[0]
    assert f"most imported: {first} ({count})" in output


def test_the_survey_shows_that_nothing_else_noticed_the_jobs_that_misbehave(demo_output: str) -> None:
    output = demo_output

    assert re.search(r"^ +crash +failed, .*WorkerCrashed: .*SIGSEGV", output, re.MULTILINE)
    assert re.search(r"^ +hang +failed, .*JobTimeout: ", output, re.MULTILINE)
    assert re.search(r"^ +flaky +succeeded at attempt 3$", output, re.MULTILINE)
    smooth = re.search(r"(\d+) of the (\d+) other jobs succeeded at their first attempt", output)
    assert smooth is not None
    assert smooth[1] == smooth[2]


def test_the_survey_ends_with_a_row_for_each_pool(demo_output: str) -> None:
    output = demo_output
    modules = _figures(output)["modules"]
    batches = math.ceil(modules / 50)

    wide = _pool_row(output, "wide")
    urgent = _pool_row(output, "urgent")

    # Of each file one measurement, two jobs that fail, and the batches of phase 2.
    assert wide[:6] == [0, modules + 2 + batches, modules + batches, 2, 2, 2]
    assert urgent[0] == 1
    assert urgent[1] == urgent[2] > 1
    assert urgent[3:6] == [0, 0, 0]


@pytest.mark.parametrize(("limit", "workers"), [(1, 1), (60, 2)])
def test_the_survey_sums_part_of_the_files(
    workers: int,
    limit: int,
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


def test_the_survey_writes_its_timeline(demo_output: str, timeline: Path) -> None:
    text = timeline.read_text()
    assert "Survey of the standard library" in text
    assert '"measure_at_third"' in text


@pytest.mark.parametrize(
    "arguments", [["demo", "--workers", "0"], ["demo", "--limit", "few"], ["dance"], []], ids=str
)
def test_arguments_that_cannot_be_understood_end_the_command_with_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert "usage: bulkhead" in capsys.readouterr().err


def _figures(output: str) -> dict[str, int]:
    """The lines that are a label and a number, possibly with a remark, as the demo ends with."""
    found = re.findall(r"^ *([a-z][a-z ]*?) {2,}([\d,]+)(?: {2}.*)?$", output, re.MULTILINE)
    return {label: int(number.replace(",", "")) for label, number in found}


def _count(trees: list[ast.Module], *kinds: type[ast.AST]) -> int:
    return sum(isinstance(node, kinds) for tree in trees for node in ast.walk(tree))


def _pool_row(output: str, name: str) -> list[float]:
    """The numbers of a pool's row: priority, jobs, succeeded, failed, retried, restarts, busy seconds."""
    table = output.partition("\nPools\n")[2].partition("\nWorkers\n")[0]
    row = next(line for line in table.splitlines() if line.split()[0] == name)
    return [float(figure) for figure in row.split()[1:8]]
