"""Helpers for tests of groups, chains and follow-up jobs, which are those of two pools."""

from __future__ import annotations

from typing import Any

from gates import Gate
from linked_jobs import (
    fed_pass,
)

from bulkhead import (
    Dispatcher,
    Job,
    PoolBroken,
)

HERE, THERE = 0, 1


def there(job: Job) -> Job:
    return job.options(priority=THERE)


def accepted(disp: Dispatcher) -> int:
    return sum(
        one.waiting + one.running + one.delayed + one.succeeded + one.failed + one.cancelled
        for one in disp.stats().pools.values()
    )


def states(handle: Any) -> list[str]:
    return [leaf.status().state for leaf in handle.leaves]


def fed_gate(gate: Gate, name: str) -> Job:
    return Job(fed_pass, str(gate._folder), name)


def break_down(disp: Dispatcher, priority: int) -> None:
    """Let a pool give up, as it does when its workers die at every start."""
    pool = disp._pools[priority]
    with pool.lock, pool._guard:
        pool._scheduler.break_down(PoolBroken("workers die at every start"))
        pool._carry_out(0.0)
