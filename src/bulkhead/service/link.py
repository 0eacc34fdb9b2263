"""The way from a running job to the consumer that gave it out: results saved early, progress, "am I cancelled?".

    worker process ── Line ──▶ Unix socket ──▶ Link (one thread of the consumer) ──▶ broker's registry, result store

Why not from the worker to the server: a worker would need a connection of its own, and `memory://` has no server. A
question and its answer are one message each, in MessagePack behind four bytes of length; a report of progress is not
answered, so that it holds up no job. A job that never asks anything costs no connection.

Race: a worker is killed in the middle of a message: its connection ends, the rest of the message is dropped.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import selectors
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec

from bulkhead.errors import BrokerUnavailable, BulkheadError, MessageTooLarge

__all__ = ["Line", "Link", "Listener", "line_to"]

_log = logging.getLogger("bulkhead")

# Seconds that a job waits for an answer: the consumer may be waiting for its server.
_ANSWER_SECONDS = 30.0

# A result that a job saves early may be so large (bytes). Arbitrary; a bound for what the consumer holds.
_LARGEST = 256 << 20

# Of that, what is left for all else in the message.
_REST = 1 << 20

# A Unix socket's name has at most 107 bytes on Linux (103 elsewhere); ours adds 25 to the folder for temporary files.
_LONGEST_FOLDER = 75

# Pause in seconds after a job that could not be let in.
_NO_ENTRY = 0.05

# Folders of consumers, and the file in each that its consumer has locked.
_PREFIX = "bulkhead-"
_OWNER = "owner"

# What is told and not asked.
_UNANSWERED = frozenset({"report"})

# What is raised in the job when its question is refused; anything else is a BulkheadError.
_REFUSALS: dict[str, type[BulkheadError]] = {
    "BrokerUnavailable": BrokerUnavailable,
    "MessageTooLarge": MessageTooLarge,
}

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder().decode


class Listener(Protocol):
    """What the consumer does with what jobs tell it. Concurrency: called in the link's thread."""

    def job_saves(self, job_id: str, value: bytes) -> None:
        """Keep a result before the job's end."""

    def job_reports(self, job_id: str, progress: bytes) -> None:
        """Keep how far a job is."""

    def is_job_cancelled(self, job_id: str) -> bool:
        """Tell a job whether it was cancelled."""


class Line:
    """A worker's end. Concurrency: any thread of the job."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._socket: socket.socket | None = None
        self._pid = 0  # whose it is
        self._lock = threading.Lock()  # guards the socket: one question at a time

    def save(self, job_id: str, value: bytes) -> None:
        """Have a result kept; returns when it is."""
        if len(value) > _LARGEST - _REST:
            raise MessageTooLarge(
                f"a result of {len(value)} bytes is larger than the {_LARGEST - _REST} that can be saved before the "
                "end: keep it in a file of its own, and its name here",
                size_bytes=len(value),
                limit_bytes=_LARGEST - _REST,
            )
        self._ask("save", job_id, value)

    def report(self, job_id: str, progress: bytes) -> None:
        """Tell how far the job is. Nobody knows whether that arrives."""
        with self._lock, self._answered():
            _send(self._connected(), ("report", job_id, progress))

    def is_cancelled(self, job_id: str) -> bool:
        """Tell whether somebody has asked for the job to be cancelled."""
        return bool(self._ask("is_cancelled", job_id, b""))

    def _ask(self, what: str, job_id: str, data: bytes) -> Any:
        with self._lock, self._answered():
            connection = self._connected()
            _send(connection, (what, job_id, data))
            answer = _receive(connection)
            if answer is None:
                raise ConnectionError("it has ended")
        refusal, value = answer
        if refusal is not None:
            kind, text = refusal
            raise _REFUSALS.get(kind, BulkheadError)(text)
        return value

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        # Race: a job that is interrupted between question and answer must not take it for the next one's.
        try:
            yield
        except OSError as error:
            self._drop()
            raise BrokerUnavailable(f"the consumer does not answer its job: {error}") from error
        except BaseException:
            self._drop()
            raise

    def _connected(self) -> socket.socket:
        if self._pid != os.getpid():  # a copy of the job's process would read the answers meant for it
            self._drop()
        if self._socket is None:
            self._socket, self._pid = _connected(self._address), os.getpid()
        return self._socket

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


_lines: dict[tuple[int, str], Line] = {}


def line_to(address: str) -> Line:
    """Return this process's line to a consumer."""
    key = os.getpid(), address
    if key not in _lines:
        _lines.clear()
        _lines[key] = Line(address)
    return _lines[key]


class Link:
    """The consumer's end: a socket in a folder of its own, and the thread that answers. `close` removes both.

    Args:
        listener: Answers.
        thread: Makes the thread.
    """

    def __init__(
        self, listener: Listener, thread: Callable[[str, Callable[[], None]], threading.Thread]
    ) -> None:
        self._answers: dict[str, Callable[[str, bytes], Any]] = {
            "save": listener.job_saves,
            "report": listener.job_reports,
            "is_cancelled": lambda job_id, _: listener.is_job_cancelled(job_id),
        }
        with contextlib.ExitStack() as undo:
            self._open(undo)
            self._thread = thread("link", self._run)
            self._thread.start()
            self._undo = undo.pop_all()

    def close(self) -> None:
        """End it. Blocking: until an answer that is being made is done."""
        self._wake.close()
        self._thread.join()
        self._undo.close()

    def _open(self, undo: contextlib.ExitStack) -> None:
        place = _place() or tempfile.gettempdir()
        _remove_orphans(place)
        folder = tempfile.mkdtemp(prefix=_PREFIX, dir=place)
        undo.callback(_remove, folder)
        undo.callback(os.close, _marked(folder))
        # Why: who tidies up old temporary files (systemd-tmpfiles) leaves alone what is in a locked folder.
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        undo.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_SH)
        self.address = f"{folder}/link"
        self._selector = selectors.DefaultSelector()
        undo.callback(self._close_selector)
        self._ear = undo.enter_context(socket.socket(socket.AF_UNIX))
        self._ear.bind(self.address)
        self._ear.listen(128)
        self._ear.setblocking(False)
        self._wake, self._woken = map(undo.enter_context, socket.socketpair())
        self._selector.register(self._ear, selectors.EVENT_READ, None)
        self._selector.register(self._woken, selectors.EVENT_READ, None)

    def _close_selector(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    return
                if key.fileobj is self._ear:
                    self._accept()
                else:
                    self._read(key.fileobj, key.data)  # type: ignore[arg-type]

    def _accept(self) -> None:
        try:
            accepted, _ = self._ear.accept()
        except OSError:  # it has gone; or there are no descriptors left, and it goes on knocking
            time.sleep(_NO_ENTRY)
            return
        accepted.setblocking(False)
        self._selector.register(accepted, selectors.EVENT_READ, bytearray())

    def _read(self, connection: socket.socket, held: bytearray) -> None:
        try:
            data = connection.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        held += data
        if not data or len(held) > _LARGEST:
            self._selector.unregister(connection)
            connection.close()
            return
        try:
            while (message := _taken(held)) is not None:
                self._answer(connection, message)
        except Exception:
            # Two processes of a job have written at once: what they say has no meaning, and others are waiting.
            _log.exception("what a job has sent to its consumer cannot be read; its line is cut")
            self._selector.unregister(connection)
            connection.close()

    def _answer(self, connection: socket.socket, message: Any) -> None:
        what, job_id, data = message
        try:
            answer: tuple[tuple[str, str] | None, Any] = None, self._answers[what](job_id, data)
        except BulkheadError as error:
            answer = (type(error).__name__, str(error)), None
        except Exception as error:
            _log.exception("a message of job %s to its consumer could not be answered", job_id)
            answer = (type(error).__name__, f"{type(error).__name__}: {error}"), None
        if what in _UNANSWERED:
            return
        # Why no waiting: an answer is a few bytes, and a worker asks one thing at a time.
        with contextlib.suppress(OSError):
            connection.sendall(_framed(answer))


def _marked(folder: str) -> int:
    """Put a file with a lock into our folder, and return its descriptor: while we live, the lock is taken."""
    made = os.open(f"{folder}/new", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(made, fcntl.LOCK_EX)
    # Race: somebody who looks for orphans sees the file only when it is locked.
    Path(folder, "new").rename(Path(folder, _OWNER))
    return made


def _remove(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    # Why: the former needs a descriptor, and there may be none left.
    with contextlib.suppress(OSError):
        Path(folder).rmdir()


def _remove_orphans(place: str) -> None:
    """Remove the folders of consumers that were killed. Those of other users, or of who lives, are left alone."""
    for owner in Path(place).glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError):  # somebody else's, still locked, or just removed
            mark = os.open(owner, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(owner.parent, ignore_errors=True)
            finally:
                os.close(mark)


def _place() -> str | None:
    """Return where to make the folder: None for the usual place, unless its name is too long for a socket's."""
    return None if len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_FOLDER else "/tmp"


def _connected(address: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    try:
        made.settimeout(_ANSWER_SECONDS)
        made.connect(address)
    except BaseException:
        made.close()
        raise
    return made


def _framed(message: Any) -> bytes:
    data = _pack(message)
    return len(data).to_bytes(4, "big") + data


def _send(connection: socket.socket, message: Any) -> None:
    connection.sendall(_framed(message))


def _receive(connection: socket.socket) -> Any:
    held = bytearray()
    while (message := _taken(held)) is None:
        data = connection.recv(1 << 16)
        if not data:
            return None
        held += data
    return message


def _taken(held: bytearray) -> Any:
    """Take a whole message off the front of what has come; None if there is none yet."""
    size = int.from_bytes(held[:4], "big")
    if len(held) < 4 or len(held) < 4 + size:
        return None
    message = _unpack(bytes(held[4 : 4 + size]))
    del held[: 4 + size]
    return message
