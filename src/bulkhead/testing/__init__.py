"""Faults on purpose, so that users can test what their scripts make of them.

| file | what it holds |
|---|---|
| faults.py | what goes wrong in a worker: each a function that can be a job |
| injecting.py | having a function of the user's suffer a fault at chosen calls |
| killing.py | killing a worker from outside |

Nothing else of bulkhead imports this.
"""

from bulkhead.testing.faults import (
    Unrebuildable,
    crash,
    exit_process,
    fail,
    fail_unrebuildably,
    hang,
    leak,
    return_unpicklable,
    segfault,
    slow,
)
from bulkhead.testing.injecting import Injection, inject
from bulkhead.testing.killing import kill_worker

__all__ = [
    "Injection",
    "Unrebuildable",
    "crash",
    "exit_process",
    "fail",
    "fail_unrebuildably",
    "hang",
    "inject",
    "kill_worker",
    "leak",
    "return_unpicklable",
    "segfault",
    "slow",
]
