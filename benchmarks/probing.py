"""Runs `probe.py`: measurements that need an interpreter of their own.

Why apart from the probe: that imports nothing which a library under measurement may import.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["ask", "probe_command"]

TIMEOUT_SECONDS = 120


def probe_command(command: str, *arguments: object) -> list[str]:
    """Return the command line of a probe."""
    return [sys.executable, str(Path(__file__).with_name("probe.py")), command, *map(str, arguments)]


def ask(command: str, *arguments: object) -> Any:
    """Run a probe to its end and return what it found."""
    done = subprocess.run(
        probe_command(command, *arguments), stdout=subprocess.PIPE, timeout=TIMEOUT_SECONDS, check=True
    )
    return json.loads(done.stdout)
