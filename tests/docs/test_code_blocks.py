"""Every Python block of the documentation is a script that runs.

Each ```python block of README.md, CONTRIBUTING.md and docs/ becomes a script, which has to end with exit code 0 and
to write nothing to stderr. There is no way to leave a block out. A fragment that goes on from the block before it
has the comment `<!-- continues -->` on the line above its fence (empty lines may come between); the two are one script.

A block that needs a Redis finds its URL in the environment: REDIS_URL.

Blocks in other languages (console, text, toml) are not run. A fence that this file cannot read is an error rather
than a block nobody ran.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from servers import NatsServer, RedisServer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONTINUES = "<!-- continues -->"
OPENING = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>[^`\s]*)(?P<rest>[^`]*)$")


@dataclass(frozen=True)
class Script:
    """One or several blocks of a page that run as one script; each line is where the page has it."""

    line: int
    source: str


@dataclass(frozen=True)
class Block:
    line: int
    source: list[str]
    continues: bool


class UnreadablePage(ValueError):
    """A page has a fence that cannot be told to be Python or not."""


def scripts_of(text: str) -> list[Script]:
    """The scripts of a Markdown page, from its top to its end.

    Raises:
        UnreadablePage: A fence is not closed, marked wrongly, or a continuation of nothing.
    """
    scripts: list[Script] = []
    for block in _python_blocks(text):
        if block.continues:
            if not scripts:
                raise UnreadablePage(f"line {block.line}: there is no block that this one could continue")
            before = scripts.pop()
            scripts.append(Script(before.line, _placed(before.source, block)))
        else:
            scripts.append(Script(block.line, _placed("", block)))
    return scripts


def _placed(before: str, block: Block) -> str:
    """Source with as many empty lines before the block that a traceback shows the page's line numbers."""
    missing = block.line - before.count("\n")
    return before + "\n" * missing + "".join(f"{line}\n" for line in block.source)


def _python_blocks(text: str) -> Iterator[Block]:
    lines = enumerate(text.splitlines(), start=1)
    last_text = ""
    for number, line in lines:
        if "```" not in line and "~~~" not in line:
            last_text = line.strip() or last_text
            continue
        opening = _read_opening(number, line)
        body = _read_body(opening, number, lines)
        if opening["language"] == "python":
            yield Block(number, body, continues=last_text == CONTINUES)
        elif last_text == CONTINUES:
            raise UnreadablePage(f"line {number}: only a python block can be a continuation")
        last_text = ""


def _read_opening(number: int, line: str) -> re.Match[str]:
    opening = OPENING.match(line)
    if opening is None:
        raise UnreadablePage(f"line {number}: a fence has to be on a line of its own: {line}")
    language = opening["language"]
    if re.match(r"\W*py", language, re.IGNORECASE) and language != "python":
        raise UnreadablePage(f"line {number}: a block of Python is marked python, not {language}")
    if opening["rest"].strip():
        raise UnreadablePage(f"line {number}: nothing may follow the language: {line}")
    return opening


def _read_body(opening: re.Match[str], start: int, lines: Iterator[tuple[int, str]]) -> list[str]:
    indent, fence = len(opening["indent"]), opening["fence"]
    body: list[str] = []
    for _, line in lines:
        mark = line.strip()
        if mark.startswith(fence) and not mark.strip(fence[0]):
            return body
        if line[:indent].strip():
            raise UnreadablePage(f"line {start}: the block is indented less than its fence: {line}")
        body.append(line[indent:])
    raise UnreadablePage(f"line {start}: the fence is not closed")


SCRIPTS = [
    pytest.param(page, script, id=f"{page.relative_to(ROOT).as_posix()}:{script.line}")
    for page in PAGES
    if page.exists()
    for script in scripts_of(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("page", "script"), SCRIPTS)
def test_a_block_of_the_documentation_runs(
    page: Path,
    script: Script,
    tmp_path: Path,
    run_script: Callable[[Path], subprocess.CompletedProcess[str]],
    redis_server: RedisServer,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A database that is empty: the blocks say what they print.
    redis_server.cli("flushall")
    monkeypatch.setenv("REDIS_URL", redis_server.url)
    monkeypatch.setenv("NATS_URL", nats_server.url)
    file = tmp_path / f"{page.stem.lower()}_line_{script.line}.py"
    file.write_text(script.source, encoding="utf-8")

    run_script(file)


@pytest.mark.parametrize(
    "source", ["raise SystemExit(3)", "import sys; print('x', file=sys.stderr)", "open(__file__)"]
)
def test_a_script_that_fails_or_complains_is_a_failure(
    source: str, tmp_path: Path, run_script: Callable[[Path], subprocess.CompletedProcess[str]]
) -> None:
    file = tmp_path / "script.py"
    file.write_text(source, encoding="utf-8")

    with pytest.raises(AssertionError):
        run_script(file)


def test_the_readme_has_a_block_of_python() -> None:
    assert scripts_of((ROOT / "README.md").read_text(encoding="utf-8"))


def test_blocks_of_other_languages_are_not_scripts() -> None:
    assert scripts_of("```console\n$ make\n```\n\n~~~\nx\n~~~\n````text\n```python\n1\n```\n````\n") == []


def test_each_block_is_a_script_with_the_line_numbers_of_its_page() -> None:
    scripts = scripts_of("Title\n\n```python\na = 1\n\nb = 2\n```\n\nText\n~~~python\nc = 3\n~~~\n")

    assert scripts == [Script(3, "\n\n\na = 1\n\nb = 2\n"), Script(10, "\n" * 10 + "c = 3\n")]


def test_a_block_in_a_list_loses_the_indentation_of_its_fence() -> None:
    assert scripts_of("1. First\n\n   ```python\n   if x:\n       y\n   ```\n") == [
        Script(3, "\n\n\nif x:\n    y\n")
    ]


def test_a_fragment_is_appended_to_the_block_before_it() -> None:
    page = f"```python\na = 1\n```\nThen\n\n{CONTINUES}\n\n```python\nb = a\n```\n```python\nc = 1\n```\n"

    scripts = scripts_of(page)

    assert [script.line for script in scripts] == [1, 11]
    assert scripts[0].source == "\na = 1\n" + "\n" * 6 + "b = a\n"


def test_text_between_the_mark_and_the_fence_ends_the_mark() -> None:
    assert len(scripts_of(f"```python\na\n```\n{CONTINUES}\nText\n```python\nb\n```\n")) == 2


@pytest.mark.parametrize(
    "page",
    [
        "```py\n1\n```\n",
        "```Python\n1\n```\n",
        "```pycon\n>>> 1\n```\n",
        "```{python}\n1\n```\n",
        "```python no-run\n1\n```\n",
        "> ```python\n> 1\n> ```\n",
        "- ```python\n  1\n  ```\n",
        "```python\n1\n",
        "  ```python\n1\n  ```\n",
        f"{CONTINUES}\n```python\n1\n```\n",
        f"```python\n1\n```\n{CONTINUES}\n```console\n$ make\n```\n",
    ],
)
def test_a_block_that_would_escape_is_an_error(page: str) -> None:
    with pytest.raises(UnreadablePage):
        scripts_of(page)
