"""Giving workers the caller's `__main__`, so that functions of a script can be unpickled there.

As in multiprocessing, a worker imports the caller's script under the name `__mp_main__`. A script that makes its
Dispatcher at module level would make one in each worker, which would import the script, and so on: that import is
recognised here and stopped with an error that shows the guard.

A main module that is a console script without the ending .py (pytest, jupyter) is imported only if something in it is
asked for: hardly anything ever is, and such tools are slow to import.

Why not `multiprocessing.spawn.get_preparation_data`: it fixes the caller's default start method as a side effect.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import process, spawn
from typing import Any, NamedTuple

from bulkhead.errors import MissingMainGuard

__all__ = [
    "MainModule",
    "describe",
    "import_ahead",
    "import_main",
    "is_importable",
    "prepare",
    "refuse_while_importing",
]

_GUARD = """\
The main module of this script makes a Dispatcher when it is imported, and every worker has to import it. Put the part
that runs under a guard:

    if __name__ == "__main__":
        with Dispatcher(...) as disp:
            ...

(or, where the caller has no other threads, use Pool(..., start_method="fork"), which imports nothing)"""

_is_importing = False


class MainModule(NamedTuple):
    """What another process needs in order to import what this one can."""

    name: str | None
    path: str | None
    sys_path: list[str]
    argv: list[str]
    cwd: str
    authkey: bytes

    @property
    def is_lazy(self) -> bool:
        """Tell whether the module is imported only when something in it is asked for."""
        return self.path is not None and not self.path.endswith(".py")


def describe() -> MainModule:
    """Describe the main module and the import path of this process."""
    main = sys.modules.get("__main__")
    name = getattr(getattr(main, "__spec__", None), "name", None)
    path = None if name is not None else getattr(main, "__file__", None)
    if path is not None:
        began_in = process.ORIGINAL_DIR or ""  # type: ignore[attr-defined]
        path = os.path.normpath(os.path.join(began_in, path))
        if not os.path.exists(path):  # "<stdin>" and the like
            path = None
    try:
        cwd = os.getcwd()
    except FileNotFoundError:  # removed under our feet: then workers stay where the launcher is
        cwd = ""
    sys_path = [cwd if entry == "" else entry for entry in sys.path]
    return MainModule(name, path, sys_path, list(sys.argv), cwd, bytes(process.current_process().authkey))


def is_importable() -> bool:
    """Tell whether workers can import the main module of this process.

    Not that of `python -c`, standard input, a notebook, or a package's `__main__`, which multiprocessing never imports.
    """
    main = describe()
    if main.name is not None:
        return not (main.name == "__main__" or main.name.endswith(".__main__"))
    return main.path is not None


def prepare(main: MainModule, process_name: str) -> None:
    """Take over import path, arguments and directory of the caller."""
    described: dict[str, Any] = {
        "name": process_name,
        "authkey": main.authkey,
        "sys_path": main.sys_path,
        "sys_argv": main.argv,
    }
    if main.cwd:
        described |= {"dir": main.cwd, "orig_dir": main.cwd}
    spawn.prepare(described)


def import_main(main: MainModule) -> None:
    """Import the caller's main module, now or (see the top) when it is asked for.

    Raises:
        MissingMainGuard: It makes a Dispatcher when it is imported.
        Exception: Whatever the import raises.
    """
    if main.is_lazy:
        lazy = _LazyMain("__main__")
        lazy.__dict__["_described"] = main
        sys.modules["__main__"] = sys.modules["__mp_main__"] = lazy
    else:
        _import_now(main)


def import_ahead(name: str) -> None:
    """Import another module for workers that are to be copies of this process."""
    with _importing():
        importlib.import_module(name)


def refuse_while_importing() -> None:
    """Raise MissingMainGuard when a module is being imported for workers."""
    if _is_importing:
        raise MissingMainGuard(_GUARD)


class _LazyMain(types.ModuleType):
    """Stands for the main module until a name of it is looked up."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        _import_now(self.__dict__["_described"])
        return getattr(sys.modules["__main__"], name)


def _import_now(main: MainModule) -> None:
    key, value = ("init_main_from_name", main.name) if main.name else ("init_main_from_path", main.path)
    if value is None:
        return
    with _importing():
        spawn.prepare({key: value})


@contextmanager
def _importing() -> Iterator[None]:
    global _is_importing
    # Why also the flag of multiprocessing: a script without guard may start processes of its own.
    me = process.current_process()
    inheriting = getattr(me, "_inheriting", False)
    me._inheriting = True  # type: ignore[attr-defined]
    _is_importing = True
    try:
        yield
    finally:
        _is_importing = False
        me._inheriting = inheriting  # type: ignore[attr-defined]
