"""Having a function suffer a fault at chosen calls, wherever in a script it is dispatched.

The name of the function in its module is bound to a stand-in for the time of the `with` block, as `unittest.mock.patch`
does. The stand-in is pickled as that name; a worker finds the real function by it, and the calls of all workers are
counted in one small file, under a file lock, which the kernel gives back however a worker ends.
"""

from __future__ import annotations

import fcntl
import functools
import importlib
import os
import pickle
import struct
import tempfile
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

from bulkhead import validate
from bulkhead.errors import ConfigError, ConfigTypeError

__all__ = ["Injection", "inject"]

_COUNTS = struct.Struct("<QQ")  # calls, faults


def inject(
    target: str, fault: Callable[..., Any], *args: Any, calls: Container[int] | None = None
) -> Injection:
    """Have a function suffer a fault when it is dispatched, while the returned context is entered.

    At a chosen call `fault(*args)` is called first, in the worker. When it returns None the function runs as always;
    anything else is returned in its place. A function that jobs call, and that is not dispatched itself, is out of
    reach: a worker that was started afresh has its own modules.

    Args:
        target: The function by the name under which the script finds it, such as "images.convert": in the module whose
            code dispatches it. "__main__.convert" for one of the script itself.
        fault: One of this package, or any function that can be pickled.
        *args: Its arguments.
        calls: Numbers of the calls that suffer, from 1, over all workers and attempts: `{1}`, `range(5, 8)`. None means
            every call.

    Raises:
        ConfigError: There is no such function, or it is a part of a class, or a fault is injected into it already.

    Concurrency: one thread enters and leaves; calls may come from any number of workers. A call in the caller's own
        process suffers nothing and is not counted.

    Example:
        >>> with inject("images.convert", crash, calls={3}) as injection:  # doctest: +SKIP
        ...     main()
        >>> injection.faults  # doctest: +SKIP
        1
    """
    return Injection(target, fault, args, calls)


class Injection:
    """A fault in a function, from entering to leaving the context. `inject` makes it."""

    def __init__(
        self, target: str, fault: Callable[..., Any], args: tuple[Any, ...], calls: Container[int] | None
    ) -> None:
        if not isinstance(target, str):
            raise ConfigTypeError(f"target must be a str such as 'module.function', not {target!r}")
        validate.function("fault", fault)
        _check_calls(calls)
        try:
            pickle.dumps((fault, args, calls))
        except Exception as error:
            raise ConfigError(f"fault, its arguments and calls must be picklable: {error}") from error
        self._target = target
        self._module, self._name, self._function = _found(target)
        self._plan = fault, args, calls
        self._path: Path | None = None
        self._counts = 0, 0

    @property
    def calls(self) -> int:
        """How often workers have called the function so far."""
        return self._now()[0]

    @property
    def faults(self) -> int:
        """How many of these calls were made to suffer."""
        return self._now()[1]

    def __enter__(self) -> Self:
        if isinstance(getattr(self._module, self._name), _StandIn):
            raise ConfigError(f"target {self._target!r} has a fault injected already")
        fd, path = tempfile.mkstemp(prefix="bulkhead-calls-")
        os.write(fd, _COUNTS.pack(0, 0))
        os.close(fd)
        self._path = Path(path)
        setattr(
            self._module,
            self._name,
            _StandIn(self._function, self._module.__name__, self._name, path, self._plan),
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        setattr(self._module, self._name, self._function)
        self._counts = self._now()
        if self._path is not None:
            self._path.unlink()
            self._path = None

    def _now(self) -> tuple[int, int]:
        if self._path is None:
            return self._counts
        calls, faults = _COUNTS.unpack(self._path.read_bytes())
        return calls, faults


class _StandIn:
    """What is found in the function's place."""

    def __init__(self, function: Callable[..., Any], module: str, name: str, path: str, plan: Any) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self._found_as = module, name, path, plan
        self._home: int | None = os.getpid()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._home != os.getpid():
            *_, path, (fault, fault_args, calls) = self._found_as
            if _is_to_suffer(path, calls):
                value = fault(*fault_args)
                if value is not None:
                    return value
        return self.function(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _in_worker, self._found_as


def _in_worker(module: str, name: str, path: str, plan: Any) -> _StandIn:
    function = getattr(importlib.import_module(module), name)
    if isinstance(function, _StandIn):  # a worker that is a fork of the caller
        function = function.function
    made = _StandIn(function, module, name, path, plan)
    made._home = None
    return made


def _check_calls(calls: object) -> None:
    """Refuse numbers that no call has: the fault would never come, and a test of it would pass."""
    if calls is None:
        return
    if isinstance(calls, (str, bytes, bytearray)) or not isinstance(calls, Container):
        raise ConfigTypeError(f"calls must hold numbers of calls, such as {{1}}, not {calls!r}")
    numbers: Iterable[Any] = calls if isinstance(calls, (set, frozenset, list, tuple)) else ()
    if isinstance(calls, range) and calls:
        numbers = calls[0], calls[-1]
    for number in numbers:
        validate.whole_number("each number in calls", number, at_least=1)


def _is_to_suffer(path: str, calls: Container[int] | None) -> bool:
    """Count a call and tell whether it is to suffer."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # the context was left meanwhile
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        n_calls, n_faults = _COUNTS.unpack(os.pread(fd, _COUNTS.size, 0))
        suffers = calls is None or n_calls + 1 in calls
        os.pwrite(fd, _COUNTS.pack(n_calls + 1, n_faults + suffers), 0)
        return suffers
    finally:
        os.close(fd)


def _found(target: str) -> tuple[ModuleType, str, Callable[..., Any]]:
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"target {target!r} is no function of a module that can be imported: {error}"
        ) from error
    if isinstance(function, type) or not callable(function):
        raise ConfigError(f"target {target!r} must be a function, not {function!r}")
    return module, name, function
