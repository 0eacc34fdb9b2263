"""`bulkhead demo`: see it run on real input."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["add_to"]


def add_to(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "demo",
        help="survey the sources of Python's standard library on two pools",
        description="Survey the sources of Python's standard library on two pools, while a job crashes, one hangs "
        "and one has to be retried.",
    )
    parser.add_argument(
        "--workers",
        type=_positive,
        default=max(2, os.cpu_count() or 2),
        help="processes of the wide pool (default: one for each core, at least 2)",
    )
    parser.add_argument("--limit", type=_positive, help="measure only the first LIMIT modules")
    parser.add_argument("--progress", action="store_true", help="show progress (needs the extra cli)")
    parser.add_argument(
        "--timeline", type=Path, metavar="PAGE", help="write which worker did what when to PAGE, as HTML"
    )
    parser.set_defaults(run=_run)


def _run(options: Any) -> None:
    from bulkhead.demo.survey import survey  # Why here: a command imports what it needs alone

    survey(workers=options.workers, limit=options.limit, progress=options.progress, timeline=options.timeline)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number
