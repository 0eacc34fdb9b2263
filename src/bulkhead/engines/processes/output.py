"""The output of a pool's jobs on its way to the caller: pipes from the workers, whose job it was, and when it is out.

    worker: descriptors 1 and 2, root logger        who drives                     the outlet's thread
      two pipes, one socket ───────────────▶ read, cut into lines, tag ──▶ queue ──▶ sys.stdout, sys.stderr, loggers
      result pipe ─────▶ answer: waits here until what its job has printed is written ◀── how far it is

Order: a worker flushes before it answers. So what a job has printed is in the pipes when its answer is read; they are
emptied then, and the answer is told to the kernel when the outlet has written it. What comes afterwards, from something
that the job has left running, belongs to the next job.

Flow: a full pipe stops who prints. Nothing is read while the outlet has `_ENOUGH` to write, so that a stream that takes
nothing stops the jobs that print, and no others; what an answer or a death brings is read all the same.

Deaths: the news that a worker is gone wait as answers do, but not for long, so that timeouts and cancellations reach
their job also when a stream takes nothing.

Everything here is on the way of a pool that captures or forwards; others have no such object.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from bulkhead.chunk import Chunk
from bulkhead.config import Pool
from bulkhead.engines.processes.answers import Answer
from bulkhead.engines.processes.driving import Driving
from bulkhead.engines.processes.launcher import Says
from bulkhead.engines.processes.log_records import MESSAGE
from bulkhead.engines.processes.outlet import Lines, Outlet, Record
from bulkhead.engines.processes.output_sources import Logs, Source, Stream
from bulkhead.engines.processes.parcels import socket_pair
from bulkhead.engines.processes.poller import READABLE
from bulkhead.engines.processes.reading import News, Said
from bulkhead.engines.processes.worker import Worker
from bulkhead.engines.processes.worker_main import Kind

__all__ = ["PoolOutput", "WorkerOutput"]

# Bytes that may wait for the caller's streams before nothing more is read (arbitrary: some pipes full).
_ENOUGH = 256 << 10

# How long the end of a worker waits for its last output to be written, and the end of the pool (seconds).
_LAST_WORDS = 1.0
_LAST_OF_ALL = 5.0


class PoolOutput:
    """What the workers of one pool print and log. Made only if it is wanted.

    Owner: who drives, for `read` and `collect`; the pool's lock for the rest, but `begin` and `end`.

    Args:
        config: The pool.
        driving: Whose poller watches the pipes.
    """

    def __init__(self, config: Pool, driving: Driving) -> None:
        self._label = config.label
        self._priority = config.priority
        self._mode = config.capture_mode
        self._is_forwarding = config.forward_logging
        self._driving = driving
        self._outlet = Outlet(f"bulkhead-{config.label}-output", config.label, self._wake)
        self._by_fd: dict[int, Source] = {}  # that are polled, or would be if it were not paused
        self._waiting: dict[Worker, None] = {}  # of whom something waits, in the order in which that began
        self._is_paused = False
        self._is_hasty = False  # nothing waits for the outlet any more

    @classmethod
    def wanted_by(cls, config: Pool, driving: Driving) -> PoolOutput | None:
        """Return the output of a pool, None if it leaves the streams and loggers of its workers alone."""
        if config.capture_mode is None and not config.forward_logging:
            return None
        return cls(config, driving)

    def begin(self) -> None:
        """Start the outlet, if anything is to come out of it."""
        if self._mode != "silent" or self._is_forwarding:
            self._outlet.begin()

    def hasten(self) -> None:
        """Let nothing wait for the outlet from now on: everything is being cancelled."""
        self._is_hasty = True
        self._driving.wake()

    def end(self) -> None:
        """Write what is left. Blocking: some seconds at most."""
        self._outlet.end(_LAST_WORDS if self._is_hasty else _LAST_OF_ALL)

    # Workers come and go

    def attach(self, worker: Worker) -> None:
        """Give a new worker its pipes; raises OSError, with the worker closed, when there are no descriptors."""
        try:
            worker.output = WorkerOutput(worker, self)
        except OSError:
            worker.close()
            raise

    def listen(self, worker: Worker) -> None:
        """The worker has been started: read what it prints from now on."""
        assert worker.output is not None
        worker.output.pid = worker.pid
        for source in worker.output.sources:
            self._by_fd[source.fd] = source
            if not self._is_paused:
                self._driving.poller.register(source.fd, READABLE)

    def forget(self, worker: Worker) -> None:
        """The worker is about to be closed."""
        if worker.output is not None:
            for source in worker.output.sources:
                self._leave(source)

    def _leave(self, source: Source) -> None:
        if self._by_fd.pop(source.fd, None) is not None and not self._is_paused:
            self._driving.poller.unregister(source.fd)

    # Reading

    def read(self, fd: int) -> bool:
        """Read some of what has come; False when the descriptor is no business of this object."""
        source = self._by_fd.get(fd)
        if source is None:
            return False
        source.read()
        return True

    def collect(self, answers: list[Answer], news: list[News], workers: Mapping[int, Worker]) -> None:
        """Read all that the workers had printed when they gave these answers, those that end a job.

        Args:
            answers: That have just come.
            news: That have come with them.
            workers: By number.
        """
        for one in news:
            # Race: the news that it has started may be read together with its last words, and are told to it later.
            started = workers.get(one.number) if isinstance(one, Said) and one.kind == Says.STARTED else None
            if isinstance(one, Said) and started is not None and started.output is not None:
                started.output.pid = one.body
        for worker, kind, number, *_ in answers:
            output = worker.output
            if output is None or kind == Kind.PART:
                continue  # Why: a part must not make room for who prints while nothing is read
            if kind == Kind.READY or kind == Kind.NOT_READY:
                output.pid = number
            output.drain()
            output.finish_lines()

    # What may be told to the kernel

    def due(
        self,
        answers: list[Answer],
        news: list[News],
        workers: Mapping[int, Worker],
        overdue: dict[Worker, Any],
    ) -> tuple[list[Answer], list[News]]:
        """Keep back what has to wait for the outlet; return what need not, or no longer.

        Args:
            answers: That have just been collected.
            news: That have come with them.
            workers: By number.
            overdue: Gets rid of those who are gone.
        """
        now = time.monotonic()
        self._outlet.is_awaited = True
        due_answers: list[Answer] = []
        for answer in answers:
            worker, kind = answer[:2]
            if worker.output is None or (kind == Kind.PART and not worker.output.held):
                due_answers.append(answer)
            else:
                self._queue(worker, _counted(answer))
        passing = []
        for one in news:
            lost = workers.get(one.number) if isinstance(one, Said) and one.kind == Says.GONE else None
            if not isinstance(one, Said) or lost is None or lost.output is None:
                passing.append(one)
                continue
            overdue.pop(lost, None)
            lost.output.drain()
            lost.output.finish_lines()
            lost.output.until = now + _LAST_WORDS
            _count_lost(lost)
            self._queue(lost, one)
        for worker in list(self._waiting):
            self._release(worker, now, due_answers, passing)
        self._regulate()
        self._outlet.is_awaited = bool(self._waiting) or self._is_paused
        return due_answers, passing

    def next_deadline(self) -> float | None:
        """Return when `due` should be called at the latest, in monotonic seconds."""
        ends = [worker.output.until for worker in self._waiting if worker.output is not None]
        return min((end for end in ends if end is not None), default=None)

    def last_answers(self, worker: Worker, patience: float) -> list[Answer]:
        """Return the answers of a lost worker that have waited, when its output is written or `patience` is over."""
        output = worker.output
        assert output is not None
        output.drain()
        output.finish_lines()
        end = time.monotonic() + patience
        while self._outlet.n_written < output.ticket and time.monotonic() < end:
            time.sleep(0.001)
        self._waiting.pop(worker, None)
        held, output.held = output.held, deque()
        return [one for _, one in held if not isinstance(one, Said)]

    def _queue(self, worker: Worker, one: Answer | Said) -> None:
        output = worker.output
        assert output is not None
        output.held.append((output.ticket, one))
        self._waiting[worker] = None

    def _release(self, worker: Worker, now: float, answers: list[Answer], news: list[News]) -> None:
        output = worker.output
        assert output is not None
        is_late = self._is_hasty or (output.until is not None and output.until <= now)
        while output.held:
            ticket, one = output.held[0]
            if ticket > self._outlet.n_written and not is_late:
                return
            output.held.popleft()
            if isinstance(one, Said):
                news.append(one)
            else:
                answers.append(one)
        del self._waiting[worker]

    def _regulate(self) -> None:
        """Stop or resume reading; leave what is at its end."""
        for source in [source for source in self._by_fd.values() if source.is_at_end]:
            self._leave(source)
        backlog = self._outlet.backlog
        poller = self._driving.poller
        if not self._is_paused and backlog > _ENOUGH:
            self._is_paused = True
            for fd in self._by_fd:
                poller.unregister(fd)
        elif self._is_paused and backlog <= _ENOUGH // 2:
            self._is_paused = False
            for fd in self._by_fd:
                poller.register(fd, READABLE)

    def _wake(self) -> None:
        with self._driving.lock:
            self._driving.wake()

    # For the sources

    def put_lines(self, worker: Worker, stream: str, data: bytes) -> None:
        """Have lines kept with their job's tracker and written, the last one with or without its newline."""
        job = _job_of(worker)
        assert worker.output is not None
        if job is not None and not isinstance(job, Chunk):
            # Of a line that was taken in pieces, the other stream may have its lines between.
            is_new = worker.output.unended not in (None, stream)
            job.add_output(b"\n" + data if is_new else data)
        is_ended = data.endswith(b"\n")
        worker.output.unended = None if is_ended else stream
        if self._mode != "silent":
            tag = self._tag(job, worker.output.pid) if self._mode == "tagged" else ""
            self._outlet.put(Lines(stream, tag, data if is_ended else data + b"\n"))
            worker.output.ticket = self._outlet.n_put

    def put_record(self, worker: Worker, data: bytes) -> None:
        """Have a packed record handled."""
        assert worker.output is not None
        facts = {
            "job_id": _name_of(_job_of(worker)),
            "pool": self._label,
            "priority": self._priority,
            "pid": worker.output.pid,
        }
        self._outlet.put(Record(data, facts))
        worker.output.ticket = self._outlet.n_put

    def _tag(self, job: Any, pid: int | None) -> str:
        if job is None:
            return f"[{self._label} · pid {pid}] "
        name = _text(_name_of(job))
        what = name if isinstance(job, Chunk) else f"job {name}"
        return f"[{self._label} · {what} · pid {pid}] "


class WorkerOutput:
    """The caller's ends of one worker's output, and what waits for it.

    Attributes:
        names: Of the worker's ends, as in `worker_main.Ends`.
        theirs: The worker's ends; whoever gives them away closes them.
        ticket: The outlet's number of what it printed last.
        held: What it has said that waits: for which ticket, and what.
        until: When nothing of it waits any longer, in monotonic seconds; None while it lives.
        unended: The stream whose line, the last one that its job's tracker has, has no end yet.
    """

    __slots__ = ("held", "names", "pid", "sources", "theirs", "ticket", "unended", "until")

    def __init__(self, worker: Worker, pool: PoolOutput) -> None:
        self.pid: int | None = None
        self.ticket = 0
        self.unended: str | None = None
        self.held: deque[tuple[int, Answer | Said]] = deque()
        self.until: float | None = None
        self.sources: list[Source] = []
        self.names: tuple[str, ...] = ()
        self.theirs: tuple[int, ...] = ()
        worker.output = self  # so that what is open is closed when the next cannot be opened
        if pool._mode is not None:
            self._open(Stream(worker, pool, "stdout"), "out", os.pipe())
            self._open(Stream(worker, pool, "stderr"), "err", os.pipe())
        if pool._is_forwarding:
            ours, theirs = socket_pair()
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MESSAGE)
            self._open(Logs(worker, pool), "logs", (ours.detach(), theirs.detach()))

    def _open(self, source: Source, name: str, pair: tuple[int, int]) -> None:
        source.fd, theirs = pair
        os.set_blocking(source.fd, False)
        self.sources.append(source)
        self.names += (name,)
        self.theirs += (theirs,)

    def drain(self) -> None:
        """Read what is there now, and no more: somebody may go on writing."""
        for source in self.sources:
            source.drain()

    def finish_lines(self) -> None:
        """Let nothing wait for the end of its line."""
        for source in self.sources:
            source.finish_line()
        self.unended = None

    def close_theirs(self) -> None:
        """Close the worker's ends here, once it has them."""
        theirs, self.theirs = self.theirs, ()
        for fd in theirs:
            os.close(fd)

    def close(self) -> None:
        """Close all descriptors."""
        self.close_theirs()
        for source in self.sources:
            source.close()


def _job_of(worker: Worker) -> Any:
    return worker.slot.job if worker.slot.worker is worker else None


def _name_of(job: Any) -> Any:
    """Return what a job is called in records: its id, or which items of a map it is."""
    if isinstance(job, Chunk):
        return job.describe(None).removesuffix(" of a map")
    return None if job is None else job.id


def _text(job_id: object) -> str:
    """Return an id of the user's as a part of a line."""
    try:
        text = str(job_id)
        return text if text.isprintable() else repr(text)
    except Exception:  # a __str__ of the user's that raises
        return f"<{type(job_id).__qualname__}>"


def _counted(answer: Answer) -> Answer:
    """Let what a job has printed count as a part of its result, of which the history keeps so much."""
    worker, kind, number, size, value, error = answer
    job = _job_of(worker)
    if job is None or isinstance(job, Chunk):
        return answer
    return worker, kind, number, size + job.output_size, value, error


def _count_lost(worker: Worker) -> None:
    job = _job_of(worker)
    if job is not None and not isinstance(job, Chunk):
        job.size = job.output_size
