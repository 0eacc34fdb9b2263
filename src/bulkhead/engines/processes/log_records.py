"""Log records on their way from a worker to the caller's loggers.

In the worker one handler sends each record as one message; in the caller the logger of the same name handles it. What
stands in a record may be anything: what cannot be pickled, or not be rebuilt by the caller, arrives as text. So does a
traceback, always.

Who handles what: handlers that a worker has before its initializer runs are copies of the caller's (by fork, or by
importing its main module) and are set aside, because the caller's own will handle the records. A handler that is added
later, by an initializer or a job, is meant for the worker: what it gets is not sent, so that nobody reads a record
twice.
"""

from __future__ import annotations

import logging
import pickle
import socket
from typing import Any, NamedTuple

__all__ = ["MESSAGE", "Levels", "current_levels", "deliver", "install"]

# Longest message (bytes). A socket takes about 200 KiB at once where nobody has set it otherwise.
MESSAGE = 128 << 10

# What is left of the texts of a record that is longer (characters).
_SHORT = 8 << 10

_PLAIN = frozenset({type(None), bool, int, float, str, bytes})


class Levels(NamedTuple):
    """Which records a process's loggers let through."""

    disabled: int
    root: int
    named: dict[str, int]


def current_levels() -> Levels:
    """Return the levels that are set in this process."""
    loggers = dict(logging.root.manager.loggerDict)
    named = {
        name: logger.level
        for name, logger in loggers.items()
        if isinstance(logger, logging.Logger) and logger.level
    }
    return Levels(logging.root.manager.disable, logging.root.level, named)


def install(fd: int, levels: Levels) -> None:
    """Have the records of this worker sent, those that the levels let through."""
    sender = _Sender(socket.socket(fileno=fd))
    loggers = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    for logger in loggers:
        logger.handlers[:] = [] if logger.propagate else [sender]
    logging.root.handlers[:] = [sender]
    logging.root.setLevel(levels.root)
    for name, level in levels.named.items():
        logging.getLogger(name).setLevel(level)
    logging.disable(levels.disabled)


def deliver(data: bytes, facts: dict[str, Any]) -> None:
    """Have a record handled by the logger of its name, with additional attributes, if its level is let through."""
    fields, full = pickle.loads(data)
    if full is not None:
        try:
            fields = pickle.loads(full)
        except BaseException:  # whatever the user's classes do; the plain fields say it as text
            pass
    record = logging.makeLogRecord({**fields, **facts})
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


class _Sender(logging.Handler):
    """Sends records, each as one message: also threads and forked copies of the worker may."""

    def __init__(self, line: socket.socket) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._is_handled_here(record.name):
                return
            data = packed(record)
            if len(data) > MESSAGE:
                data = _shortened(record)
            self._line.send(data)
        except OSError:
            pass  # the caller is gone
        except Exception:
            self.handleError(record)

    def _is_handled_here(self, name: str) -> bool:
        """Tell whether a handler of the worker's own gets the records of this logger."""
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            if any(one is not self and not isinstance(one, logging.NullHandler) for one in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False


def packed(record: logging.LogRecord) -> bytes:
    """Return a record packed: its fields in types that every process has, and all of it where that says more."""
    fields = _fields(record)
    args = fields["args"]
    values = args.values() if type(args) is dict else args or ()
    plain = {name: value for name, value in fields.items() if type(value) in _PLAIN}
    is_plain = len(plain) == len(fields) - (args is not None) and all(type(one) in _PLAIN for one in values)
    if is_plain:
        return pickle.dumps((fields, None))
    try:
        full = pickle.dumps(fields)
    except BaseException:  # whatever the user's classes do
        full = None
    rest = {name: _repr(value) for name, value in fields.items() if name not in plain}
    return pickle.dumps(({**rest, **plain, "msg": _message(record), "args": None}, full))


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = dict(record.__dict__)
    # Why: a handler may have formatted it before; the caller's do that themselves.
    for name in ("message", "asctime"):
        fields.pop(name, None)
    if record.exc_info and not record.exc_text:
        fields["exc_text"] = logging.Formatter().formatException(record.exc_info)
    fields["exc_info"] = None
    fields["args"] = record.args or None
    return fields


def _shortened(record: logging.LogRecord) -> bytes:
    """Return a record that is too long for a message, packed: the beginning of its text, the end of its trace."""
    fields = _fields(record)
    text, trace = _message(record), fields["exc_text"]
    kept = {
        name: value for name, value in fields.items() if type(value) in _PLAIN and len(_repr(value)) < _SHORT
    }
    kept["msg"] = f"{text[:_SHORT]} … ({len(text)} characters)"
    kept["exc_text"] = trace and trace[-_SHORT:]
    return pickle.dumps(({**kept, "args": None}, None))


def _message(record: logging.LogRecord) -> str:
    try:
        return str(record.getMessage())
    except BaseException:  # arguments that do not fit, a __str__ that raises
        return f"{_repr(record.msg)} % {_repr(record.args)}"


def _repr(value: object) -> str:
    try:
        return repr(value)
    except BaseException:
        return f"<{type(value).__qualname__}>"
