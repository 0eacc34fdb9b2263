"""What the survey measures: plain functions on Python source files, with no pool in sight.

They run in worker processes there, and in a plain loop in the test that checks the survey's sums.
"""

import ast
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Graph",
    "Module",
    "Totals",
    "import_graph",
    "measure",
    "most_imported",
    "reach",
    "source_files",
    "summarise",
]

STDLIB = Path(sysconfig.get_paths()["stdlib"])
# Why: what was installed later is not the standard library, and some test data is not meant to parse.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

Graph = dict[str, frozenset[str]]


@dataclass(frozen=True)
class Module:
    """What one source file holds."""

    name: str
    lines: int
    functions: int
    classes: int
    nesting: int
    imports: frozenset[str]


@dataclass(frozen=True)
class Totals:
    """What several source files hold; the totals of the parts add up to the totals of the whole."""

    modules: int = 0
    lines: int = 0
    functions: int = 0
    classes: int = 0
    nesting: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            self.modules + other.modules,
            self.lines + other.lines,
            self.functions + other.functions,
            self.classes + other.classes,
            max(self.nesting, other.nesting),
        )


def source_files(limit: int | None = None) -> list[Path]:
    """The standard library's own modules in the order of their paths, or the first `limit` of them."""
    paths = sorted(STDLIB.rglob("*.py"))
    return [path for path in paths if LEFT_OUT.isdisjoint(path.relative_to(STDLIB).parts)][:limit]


def measure(path: Path) -> Module:
    """Parse one source file and count what is in it."""
    with tokenize.open(path) as file:
        source = file.read()
    tree = ast.parse(source, filename=str(path))
    nodes = list(ast.walk(tree))
    name = _module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return Module(
        name=name,
        lines=source.count("\n"),
        functions=sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in nodes),
        classes=sum(isinstance(node, ast.ClassDef) for node in nodes),
        nesting=_deepest_nesting(tree),
        imports=frozenset(target for node in nodes for target in _imported(node, package)),
    )


def summarise(modules: Iterable[Module]) -> Totals:
    """Add up what several modules hold."""
    parts = (Totals(1, m.lines, m.functions, m.classes, m.nesting) for m in modules)
    return sum(parts, start=Totals())


def import_graph(modules: Iterable[Module]) -> Graph:
    """Which of these modules each of them imports; what is not one of them is left out."""
    imports = {module.name: module.imports for module in modules}
    return {
        name: frozenset(_known_module(target, imports) for target in targets) - {"", name}
        for name, targets in imports.items()
    }


def reach(graph: Graph, names: Iterable[str]) -> dict[str, int]:
    """For each name, how many other modules its imports lead to, over any number of steps."""
    return {name: len(_reachable(graph, name)) for name in names}


def most_imported(graph: Graph, count: int = 5) -> list[tuple[str, int]]:
    """The modules that most others import, each with the number of those; ties by name."""
    ranks = Counter(target for targets in graph.values() for target in targets)
    return sorted(ranks.items(), key=lambda item: (-item[1], item[0]))[:count]


def _module_name(path: Path) -> str:
    parts = path.relative_to(STDLIB).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _deepest_nesting(tree: ast.Module) -> int:
    """How many indented blocks lie around the most deeply nested statement."""
    deepest = 0
    waiting: list[tuple[ast.AST, int, int]] = [(node, -1, -1) for node in tree.body]
    while waiting:
        node, depth, column = waiting.pop()
        # Why: the tree nests an `elif` in the `if` before it; only its column says that it is no deeper.
        if isinstance(node, ast.stmt) and node.col_offset > column:
            depth, column = depth + 1, node.col_offset
            deepest = max(deepest, depth)
        waiting += [(child, depth, column) for child in ast.iter_child_nodes(node)]
    return deepest


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    """The full dotted names that an import statement asks for: modules, or names inside modules."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        base = parts[: len(parts) + 1 - node.level] if node.level else []
        origin = ".".join([*base, node.module] if node.module else base)
        yield from (f"{origin}.{alias.name}" for alias in node.names)


def _known_module(name: str, known: Collection[str]) -> str:
    """The longest leading part that is a known module, os for os.path.join; empty if none is."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def _reachable(graph: Graph, start: str) -> set[str]:
    seen = {start}
    waiting = [start]
    while waiting:
        found = graph[waiting.pop()] - seen
        seen |= found
        waiting += found
    return seen - {start}
