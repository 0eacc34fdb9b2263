"""The command `bulkhead`. Each subcommand has a module that adds its parser and says what to run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bulkhead.cli import demo, worker

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments; by default with those of the process.

    Raises:
        SystemExit: With code 2 when the arguments cannot be understood.
    """
    parser = argparse.ArgumentParser(
        prog="bulkhead", description="Isolated pools of processes, and a durable queue for their jobs."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo.add_to(commands)
    worker.add_to(commands)
    options = parser.parse_args(arguments)
    options.run(options)
