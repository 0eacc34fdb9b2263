"""What runs in a worker: read a job, run it, write the outcome, again.

The process leads its own group, so that what jobs start ends with it; it ignores SIGINT, so that Ctrl-C is the caller's
alone to answer. It never exits by itself but at the end of its job pipe or when that or the result pipe is unusable.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from bulkhead import forks, prepared
from bulkhead.engines.processes import lifeline, main_module
from bulkhead.engines.processes.blackbox import BlackBox
from bulkhead.engines.processes.channel import CHUNK, HEADER, Frame, read_frame, write_all
from bulkhead.engines.processes.chunk_runner import ChunkOrder, leave_copy, run_chunk
from bulkhead.engines.processes.heritage import inheriting
from bulkhead.engines.processes.parcels import Exchange, Opened, Parcel, handed_down
from bulkhead.engines.processes.payload import cannot, cannot_pack_result, pack_error, pack_value, unpack_call
from bulkhead.engines.processes.progress import Progress
from bulkhead.engines.processes.segments import Borrowed, SegmentPool
from bulkhead.engines.processes.use import UseLimits, WorkerUse

if TYPE_CHECKING:
    from bulkhead.engines.processes.log_records import Levels

__all__ = ["ALWAYS", "Ends", "Kind", "Setup", "main", "run"]

# How long a worker looks for its next job before it sleeps (seconds). Why: a producer that is at work sends the next
# job within some ten microseconds, and waking a sleeper costs more than that. It gives the CPU away at each look.
_LOOK_FOR = 50e-6
_give_way = getattr(os, "sched_yield", lambda: None)

# A job that took no longer (seconds) lets expect the next one so soon. After others looking would take the CPU from
# who computes, or leave it to them for longer than a sleeper needs to wake up.
_SOON = 100e-6

# Free segments for results that a worker keeps for the next ones, together (bytes).
_KEEP_BYTES = 512 << 20

# How long an idle worker keeps shared objects mapped that its last job was given (seconds).
_KEEP_SHARED_FOR = 0.5

_SECONDS = struct.Struct("<d")


class Kind:
    """Kinds of frames between a worker and its caller."""

    SETUP = 1
    JOB = 2
    READY = 3
    NOT_READY = 4
    VALUE = 5
    ERROR = 6
    NOTED = 7  # a frame of another kind with notes (see parcels.py), whose `extra` begins with that kind
    CHUNK = 8  # many jobs in one (see chunk_runner.py)
    PART = 9  # results of a chunk that do not fit elsewhere
    CHUNK_DONE = 10
    NOTHING = 11  # only notes: there is no job and no answer


_JOB = Kind.JOB


class Ends(NamedTuple):
    """The worker's descriptors: jobs in, results out, life line, line for descriptors, black box.

    And those that are -1 unless its pool captures output (`out`, `err`) or forwards log records (`logs`).
    """

    jobs: int
    results: int
    life: int
    line: int
    box: int
    out: int = -1
    err: int = -1
    logs: int = -1

    def opened(self) -> list[int]:
        """Return those that there are."""
        return [fd for fd in self if fd >= 0]


# Those that every worker has.
ALWAYS = tuple(name for name in Ends._fields if name not in Ends._field_defaults)


class Setup(NamedTuple):
    """How a worker gets ready. `initializer` is a packed call; under fork it is inherited instead.

    `n_descriptors` come through the line before, for that call's arguments.
    """

    process_name: str
    main: main_module.MainModule | None
    initializer: bytes | None
    nice: int | None
    nicer_by: int
    cpus: tuple[int, ...] | None
    limits: UseLimits | None
    n_descriptors: int = 0
    log_levels: Levels | None = None  # of the caller's loggers, when records are forwarded


class _Ready(NamedTuple):
    use: WorkerUse | None


Initializer = tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]]


def main(ends: Ends) -> None:
    """Run a worker in a fresh interpreter (start method spawn)."""
    os.setpgid(0, 0)
    run(ends)


def run(ends: Ends, inherited: Initializer | None = None) -> None:
    """Run a worker in this process until its caller is done with it. Does not return."""
    code = 1
    try:
        box = _settle_in(ends)
        ready = _get_ready(ends, box, inherited)
        if ready is not None:
            _serve(ends, box, ready.use)
            code = 0
    except OSError:
        pass  # the caller is gone, or the job closed our descriptors; nobody is left to be told
    except SystemExit:
        pass  # out of a handler that a job has installed for SIGTERM
    except BaseException as error:
        print(f"bulkhead: worker {os.getpid()} ends: {error!r}", file=sys.stderr)
    finally:
        _leave(code)


def _settle_in(ends: Ends) -> BlackBox:
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(
        signal.SIG_SETMASK, ()
    )  # or a caller that blocks SIGTERM would have workers that do
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # or printing could stop a background group of a terminal
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    lifeline.hold(ends.life)
    _detach_stdin()
    box = BlackBox(ends.box) if ends.out < 0 else _captured(ends)
    box.watch()
    return box


def _captured(ends: Ends) -> BlackBox:
    from bulkhead.engines.processes.stdio import CapturedBox, redirect

    redirect(ends.out, ends.err)
    return CapturedBox(ends.box)


def _detach_stdin() -> None:
    # Why: several processes reading one terminal take each other's input.
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    if nothing != 0:
        os.close(nothing)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - lives as long as the process


def _get_ready(ends: Ends, box: BlackBox, inherited: Initializer | None) -> _Ready | None:
    message = read_frame(ends.jobs, b"")
    if message is None:
        return None
    try:
        setup: Setup = pickle.loads(message[2])
        if setup.cpus is not None:
            os.sched_setaffinity(0, setup.cpus)
        if setup.nice is not None:
            os.setpriority(os.PRIO_PROCESS, 0, setup.nice)
        elif setup.nicer_by:
            os.nice(setup.nicer_by)
        if setup.main is not None:
            main_module.prepare(setup.main, setup.process_name)
            main_module.import_main(setup.main)
        if setup.log_levels is not None:
            from bulkhead.engines.processes.log_records import install

            install(ends.logs, setup.log_levels)
        call = inherited if setup.initializer is None else _unpack_initializer(setup, ends)
        if call is not None:
            fn, args, kwargs = call
            prepared.keep(fn(*args, **kwargs))
        use = None if setup.limits is None else WorkerUse(setup.limits, box)
    except BaseException as error:
        box.flush_output()
        write_all(ends.results, Kind.NOT_READY, os.getpid(), pack_error(error))
        return None
    if box.has_output:
        box.flush_output()
    write_all(ends.results, Kind.READY, os.getpid(), b"")
    return _Ready(use)


def _unpack_initializer(setup: Setup, ends: Ends) -> Initializer:
    assert setup.initializer is not None
    if setup.n_descriptors:
        line = socket.socket(fileno=ends.line)
        try:
            fds = handed_down(line, setup.n_descriptors)
        finally:
            line.detach()
        with inheriting(fds):
            fn, args, kwargs = unpack_call(setup.initializer)
    else:
        fn, args, kwargs = unpack_call(setup.initializer)
    return fn, tuple(args), kwargs


def _serve(ends: Ends, box: BlackBox, use: WorkerUse | None) -> None:
    sleeper = select.poll()
    sleeper.register(ends.jobs, select.POLLIN)
    desk = _Desk(ends, box, use)
    try:
        _serve_at(desk, ends, box, sleeper)
    finally:
        desk.exchange.close()


def _serve_at(desk: _Desk, ends: Ends, box: BlackBox, sleeper: select.poll) -> None:
    rest = b""
    use = desk.use
    while True:
        first = rest or _next_bytes(ends.jobs, sleeper, desk)
        if not first:
            return
        message, rest = _begin_read(ends.jobs, first, box)
        if message is None:
            return
        kind, number, body = message
        del message, first
        outcome, packed = _attempt(body, desk.segments) if kind == _JOB else desk.attempt_noted(number, body)
        if outcome == Kind.NOTHING:
            continue
        if box.has_output:
            box.flush_output()
        del body
        if use is not None:
            use.count(outcome != Kind.CHUNK_DONE)  # a chunk has counted its items
            use.report()
        if type(packed) is bytes and not desk.exchange.let_go:
            write_all(ends.results, outcome, number, packed)
        else:
            desk.send(number, packed, outcome)
        del packed
        if kind != _JOB and outcome == Kind.CHUNK_DONE:
            # The next chunk may be there already. As long as all CPUs compute, the caller would get none to see to the
            # one after that.
            _give_way()


class _Desk:
    """What a worker needs for everything but small jobs. Its parts cost nothing until they are used."""

    def __init__(self, ends: Ends, box: BlackBox, use: WorkerUse | None) -> None:
        self._box = box
        self.use = use
        self.segments = SegmentPool(_KEEP_BYTES)
        self.exchange = Exchange(socket.socket(fileno=ends.line), Borrowed())
        self.has_job_since = 0.0  # seconds of the performance counter
        self._ends = ends
        self._halves: dict[int, Progress] = {}

    def attempt_noted(self, number: int, body: memoryview | bytes | bytearray) -> tuple[int, bytes | Parcel]:
        """Run what a frame with notes brings."""
        notes = self.exchange.unwrap(body)
        if notes.extra == Kind.NOTHING:
            return Kind.NOTHING, b""
        try:
            opened = self.exchange.open(notes, number)
        except BaseException as error:
            return Kind.ERROR, pack_error(cannot("the job's data could not be mapped in the worker", error))
        order = notes.extra
        del body, notes
        if order is None:
            return _attempt(opened.body, self.segments, opened.buffers)
        return self._attempt_chunk(number, opened, ChunkOrder(*order))

    def send(self, number: int, packed: bytes | Parcel, kind: int) -> None:
        """Send an answer with notes. Blocking: until the caller has taken it."""
        try:
            body = self.exchange.wrap(packed, number, (kind,))
        except OSError as error:
            text = cannot("the job's result could not be sent in shared memory", error)
            body = self.exchange.wrap(pack_error(text), number, (Kind.ERROR,))
        write_all(self._ends.results, Kind.NOTED, number, body)

    def _attempt_chunk(self, number: int, opened: Opened, order: ChunkOrder) -> tuple[int, bytes]:
        if order.is_ahead and not self._box.claim(number):
            return Kind.NOTHING, b""
        try:
            fn, given, _ = unpack_call(opened.body, opened.buffers)
            items = given if type(given) is list else list(given)
        except BaseException as error:
            return Kind.ERROR, pack_error(cannot("the items could not be unpickled in the worker", error))
        progress = self._halves.get(order.half)
        if progress is None:
            progress = self._halves[order.half] = Progress.in_box(self._ends.box, order.half)
        send = partial(self._send_part, number)
        took = run_chunk(fn, items, order, number, progress, send, self.segments, self.use)
        return Kind.CHUNK_DONE, _SECONDS.pack(took)

    def _send_part(self, number: int, position: int, packed: bytes | Parcel) -> bool:
        """Send a part of a chunk's results; False when its descriptors cannot be sent."""
        try:
            body = self.exchange.wrap(packed, number, (Kind.PART, position))
        except OSError:
            return False
        write_all(self._ends.results, Kind.NOTED, number, body)
        return True


def _next_bytes(fd: int, sleeper: select.poll, desk: _Desk) -> bytes:
    look, clock = sleeper.poll, time.perf_counter
    now = clock()
    give_up = now + _LOOK_FOR
    if now > desk.has_job_since + _SOON:
        give_up = now
    else:
        # Why first of all: the next job cannot be there before the caller has read the last answer.
        _give_way()
    while not look(0):
        if clock() > give_up:
            _sleep(sleeper, desk)
            break
        _give_way()
    desk.has_job_since = clock()
    return os.read(fd, CHUNK)


def _sleep(sleeper: select.poll, desk: _Desk) -> None:
    """Wait for the next message; give memory back that the last ones had a use for."""
    segments = desk.segments
    if desk.exchange.keeps_shared:
        if sleeper.poll(_KEEP_SHARED_FOR * 1000):
            return
        desk.exchange.drop_shared()
    while True:
        trim = segments.next_trim() if segments.is_used else None
        if sleeper.poll(None if trim is None else max(trim - time.monotonic(), 0) * 1000 + 1):
            return
        segments.trim(time.monotonic())


def _begin_read(fd: int, first: bytes, box: BlackBox) -> tuple[Frame | None, bytes]:
    """Return the message that `first` begins with, and what follows it."""
    while len(first) < HEADER.size:
        more = os.read(fd, HEADER.size - len(first))
        if not more:
            return None, b""
        first += more
    _, kind, number, length = HEADER.unpack_from(first)
    box.note_read(number)
    end = HEADER.size + length
    if len(first) >= end:
        # Another one may be behind it. Why not a memoryview: for the few bytes of most jobs making one takes longer
        # than a copy.
        return (kind, number, first[HEADER.size : end]), first[end:]
    return read_frame(fd, first), b""


def _attempt(
    body: memoryview | bytes | bytearray, segments: SegmentPool, buffers: Sequence[memoryview] = ()
) -> tuple[int, bytes | Parcel]:
    try:
        fn, args, kwargs = unpack_call(body, buffers)
    except BaseException as error:
        # Why no variable: a cycle through this frame would keep what the job was given mapped.
        return Kind.ERROR, pack_error(
            cannot("the job could not be unpickled in the worker", error, is_unreadable=True)
        )
    depth = forks.depth
    try:
        value = fn(*args, **kwargs)
    except BaseException as error:
        leave_copy(depth)
        return Kind.ERROR, pack_error(error)
    leave_copy(depth)
    try:
        return Kind.VALUE, pack_value(value, segments)
    except BaseException as error:
        return Kind.ERROR, pack_error(cannot_pack_result(value, error))


def _leave(code: int) -> None:
    """End without the exit handlers that a forked process inherits, but with those of multiprocessing, flushed."""
    try:
        util = sys.modules.get("multiprocessing.util")
        if util is not None:
            util._exit_function()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except BaseException:
        code = code or 1
    finally:
        os._exit(code)
