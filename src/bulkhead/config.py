"""What a pool is: a frozen value, checked when it is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import Any, Literal

from bulkhead import validate
from bulkhead.errors import ConfigError, ConfigTypeError
from bulkhead.retry import RetryPolicy

__all__ = ["MOST_WORKERS", "CaptureMode", "Pool", "StartMethod", "niceness_step", "pools_from"]

StartMethod = Literal["fork", "forkserver", "spawn"]

_START_METHODS = ("fork", "forkserver", "spawn")

CaptureMode = Literal["tagged", "plain", "silent"]

_CAPTURE_MODES = ("tagged", "plain", "silent")

# Workers of one pool at most. Each is a process with some seven descriptors in the caller; beyond this it is a mistake,
# and better told than tried.
MOST_WORKERS = 10_000

# Niceness between two neighbouring ranks. Why 5: the scheduler weighs each step by about 1.25, so 5 steps give the
# more urgent pool three times the CPU share, and four ranks fit into the scale.
_NICE_PER_RANK = 5
_NICEST = 19


@dataclass(frozen=True, slots=True)
class Pool:
    """The workers of one priority, with their queue and limits.

    Args:
        priority: Picks the pool for a job; a larger one is more urgent. Any int.
        n_workers: Number of processes, and so of jobs that run at once; 1 to 10,000.
        backlog: How many accepted jobs may wait beyond the workers before `dispatch` blocks. None is unbounded: then
            the caller's memory is the bound.
        name: For messages and statistics; "pool <priority>" by default.
        timeout: Longest run of one attempt in seconds; None is unlimited. A job's own timeout beats it.
        retry: Retry policy of jobs that bring none.
        max_jobs_per_worker: A worker is replaced after so many jobs, at least 1: attempts of jobs, items of a map.
        max_memory_per_worker: A worker that takes more bytes than this when a job is over is replaced. Counted is
            resident memory of its own, without mapped files and shared memory. Between items of a map, too.
        hard_memory_limit: A worker that takes more bytes than this while a job runs, together with the processes that
            the job has started, is ended and the job fails with MemoryLimitExceeded.
        nice: Niceness of the workers, -20 to 19; by default 0 for the most urgent pool and 5 more for each rank below.
        cpus: Numbers of the CPUs that the workers, and what they start, may run on; by default all of the caller's.
        initializer: Called once in each worker before its first job; `worker_state()` gives jobs what it returns.
        initargs: Arguments of `initializer`.
        start_method: "forkserver" (the default), "spawn", or "fork", which copies the caller as it is when the
            dispatcher is made and is safe only while the caller has no other threads.
        preload: Names of modules that are imported once, as the caller's main module is, before workers are started as
            copies of who has imported them; for "forkserver", the others take no notice. One that cannot be imported so
            (it raises, starts threads, opens connections) leaves all of them to the workers, and a warning says so.
        capture_output: Have what jobs print (Python, C code, processes they start) written to the caller's
            `sys.stdout` and `sys.stderr` line by line, and its last 64 KiB kept as `Tracker.output`. "tagged", the same
            as True, puts `[pool 0 · job 17 · pid 4242] ` before each line, "plain" nothing; "silent" keeps it only.
            False leaves the workers the caller's own descriptors.
        forward_logging: Have log records of jobs handled by the caller's loggers of the same names.

    Raises:
        ConfigError: A value cannot work; the message names the field.
    """

    priority: int
    n_workers: int
    _: KW_ONLY
    backlog: int | None = 0
    name: str | None = None
    timeout: float | None = None
    retry: RetryPolicy | None = None
    max_jobs_per_worker: int | None = None
    max_memory_per_worker: int | None = None
    hard_memory_limit: int | None = None
    nice: int | None = None
    cpus: Iterable[int] | None = None
    initializer: Callable[..., object] | None = None
    initargs: tuple[Any, ...] = ()
    start_method: StartMethod | None = None
    preload: Iterable[str] = ()
    capture_output: bool | CaptureMode = False
    forward_logging: bool = False

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "priority", validate.whole_number("priority", self.priority))
        n_workers = validate.whole_number("n_workers", self.n_workers, at_least=1, at_most=MOST_WORKERS)
        put(self, "n_workers", n_workers)
        if self.backlog is not None:
            put(self, "backlog", validate.whole_number("backlog", self.backlog, at_least=0))
        if self.name is not None and not isinstance(self.name, str):
            raise ConfigTypeError(f"name must be a str, not {self.name!r}")
        if self.timeout is not None:
            put(self, "timeout", validate.seconds("timeout", self.timeout))
        if self.retry is not None and not isinstance(self.retry, RetryPolicy):
            raise ConfigTypeError(f"retry must be a RetryPolicy, not {self.retry!r}")
        self._check_limits()
        if self.nice is not None:
            put(self, "nice", validate.whole_number("nice", self.nice, at_least=-20, at_most=19))
        if self.initializer is not None:
            validate.function("initializer", self.initializer)
        if not isinstance(self.initargs, (tuple, list)):
            raise ConfigTypeError(f"initargs must be a tuple, not {self.initargs!r}")
        put(self, "initargs", tuple(self.initargs))
        if self.start_method is not None and self.start_method not in _START_METHODS:
            raise ConfigError(f"start_method must be one of {_START_METHODS}, not {self.start_method!r}")
        put(self, "preload", tuple(map(_module_name, validate.several("preload", self.preload))))
        _check_output(self.capture_output, self.forward_logging)

    @property
    def capture_mode(self) -> CaptureMode | None:
        """How output is captured; None when it is not."""
        if isinstance(self.capture_output, bool):
            return "tagged" if self.capture_output else None
        return self.capture_output

    def _check_limits(self) -> None:
        put = object.__setattr__
        for option in ("max_jobs_per_worker", "max_memory_per_worker", "hard_memory_limit"):
            limit = getattr(self, option)
            if limit is not None:
                put(self, option, validate.whole_number(option, limit, at_least=1))
        soft, hard = self.max_memory_per_worker, self.hard_memory_limit
        if soft is not None and hard is not None and soft > hard:
            raise ConfigError(
                f"max_memory_per_worker={soft} must not exceed hard_memory_limit={hard}, or no worker comes so far"
            )
        if self.cpus is not None:
            put(self, "cpus", _usable_cpus(self.cpus))

    @property
    def label(self) -> str:
        """What messages call the pool."""
        return self.name or f"pool {self.priority}"


def pools_from(pools: Iterable[Pool | tuple[int, int]]) -> list[Pool]:
    """Check a dispatcher's pools and return them, the most urgent first.

    Raises:
        ConfigError: No pool, two of one priority, or an entry that is neither a Pool nor a pair of ints.
    """
    if isinstance(pools, (str, bytes, Pool)) or not isinstance(pools, Iterable):
        raise ConfigTypeError(f"pools must be a sequence of Pool or (priority, n_workers), not {pools!r}")
    made = sorted((_pool_from(entry) for entry in pools), key=lambda pool: -pool.priority)
    if not made:
        raise ConfigError("pools must hold at least one Pool, not none")
    for one, other in pairwise(made):
        if one.priority == other.priority:
            raise ConfigError(f"priority {one.priority} is given to two pools; each pool needs its own")
    return made


def _check_output(capture_output: object, forward_logging: object) -> None:
    if not isinstance(capture_output, (bool, str)):
        raise ConfigTypeError(f"capture_output must be a bool or a str, not {capture_output!r}")
    if isinstance(capture_output, str) and capture_output not in _CAPTURE_MODES:
        raise ConfigError(f"capture_output must be a bool or one of {_CAPTURE_MODES}, not {capture_output!r}")
    if not isinstance(forward_logging, bool):
        raise ConfigTypeError(f"forward_logging must be a bool, not {forward_logging!r}")


def _module_name(name: object) -> str:
    text = validate.text("preload", name)
    if not all(text.split(".")):
        raise ConfigError(f"preload must be names of modules, such as 'package.module', not {text!r}")
    return text


def _pool_from(entry: object) -> Pool:
    if isinstance(entry, Pool):
        return entry
    if isinstance(entry, tuple) and len(entry) == 2:
        return Pool(entry[0], entry[1])
    raise ConfigTypeError(f"pools must hold Pool or (priority, n_workers), not {entry!r}")


def _usable_cpus(cpus: object) -> tuple[int, ...]:
    if isinstance(cpus, (str, bytes)) or not isinstance(cpus, Iterable):
        raise ConfigTypeError(f"cpus must be numbers of CPUs, such as [0, 1], not {cpus!r}")
    numbers = sorted(validate.whole_number("cpus", number) for number in cpus)
    if not numbers:
        raise ConfigError("cpus must name at least one CPU, not none")
    if len(set(numbers)) != len(numbers):
        raise ConfigError(f"cpus must name each CPU once, not {numbers}")
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError(
            "cpus is not supported on this system, which does not let a process choose its CPUs"
        )
    usable = os.sched_getaffinity(0)
    if not usable.issuperset(numbers):
        raise ConfigError(
            f"cpus must be among those of this process, which are {sorted(usable)}, not {numbers}"
        )
    return tuple(numbers)


def niceness_step(rank: int) -> int:
    """Return how much nicer than the caller the workers of a pool are, by its rank from 0, the most urgent."""
    return min(_NICE_PER_RANK * rank, _NICEST)
