"""The launcher: the process that starts, ends and reaps the workers of one pool.

Why a process of its own: it has one thread and runs no job, so it may fork at any time; the caller's own handling of
child processes and signals is left alone; pids cannot be taken by strangers, because it alone reaps and does so last;
and it is there to end the workers when the caller is gone. With start method forkserver it has imported the caller's
main module, and what else the pool names, so that a worker costs milliseconds; with spawn it starts fresh
interpreters; with fork it is itself a copy of the caller, made before the caller's threads.

Protocol (frames on a stream socket): start(number, names; with the worker's descriptors), end(number, grace) from the
caller; ready, unsuitable(why), started(number, pid), gone(number, Report) to it. The end of the socket, or of the
caller's process, ends everything here at once.

The kill ladder: a signal that makes the worker write down its Python stacks, time for that (see `_WRITE_DOWN_SHARE`),
SIGTERM to the worker's group and to
descendants that left it, grace, SIGKILL. A worker is reported gone when its group is empty, so that nothing of an
attempt runs on when its job is settled. What has lost its parent and left the group (a daemon) is adopted here; it ends
with the worker if that is the only one of the pool, else, since nobody knows whose it is, with the pool.
"""

from __future__ import annotations

import fcntl
import gc
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from bulkhead.engines.processes import blackbox, main_module, worker_main
from bulkhead.engines.processes.channel import HEADER, frame
from bulkhead.engines.processes.memory import descendants_of
from bulkhead.errors import MissingMainGuard

__all__ = ["Report", "Says", "Told", "Unsuitable", "main", "run"]

# How long the rest of a group may take to vanish after SIGKILL (seconds). Longer only in uninterruptible sleep.
_VANISH = 1.0

# How long a worker has at most to write down its stacks before SIGTERM (share of the grace after that, and at least so
# many seconds). It takes microseconds; more only while the worker gets no CPU or is stopped.
_WRITE_DOWN_SHARE = 0.5
_WRITE_DOWN = 0.02

# Pause between two looks at a group that should be empty soon (milliseconds).
_LOOK_AGAIN = 5


_PR_SET_CHILD_SUBREAPER = 36


class Told:
    """Kinds of frames to the launcher."""

    CONFIGURE = 1
    START = 2
    END = 3


class Says:
    """Kinds of frames from the launcher."""

    READY = 1
    UNSUITABLE = 2
    STARTED = 3
    GONE = 4


class Config(NamedTuple):
    """What a launcher that is not a copy of its caller has to know."""

    method: str
    caller: int
    main: main_module.MainModule
    is_preloading: bool
    preload: tuple[str, ...]


class Unsuitable(NamedTuple):
    """Why this launcher cannot fork workers: what it should have imported for them failed, started threads, …

    Attributes:
        lacks_guard: The main module makes a Dispatcher.
        text: For people.
        is_of_main: It is the main module; else one that the pool names.
    """

    lacks_guard: bool
    text: str
    is_of_main: bool = True


class Report(NamedTuple):
    """How a worker ended. `exit_code` and `signal` are None when that is not known."""

    exit_code: int | None
    signal: int | None
    last_read: int
    stack: str
    output: str
    peak_rss_bytes: int | None
    out_of_memory: bool


class _Child:
    """One worker process. It is not reaped before it is reported, so that its pid stays its own."""

    def __init__(self, number: int, pid: int, box: int) -> None:
        self.number = number
        self.pid = pid
        self.box = box
        self.oom_kills = _oom_kills()
        self.has_exited = False
        self.was_told = False
        self.grace = 0.0
        self.deaf: frozenset[str] | None = (
            None  # its threads that held off the signal for the stacks before it came
        )
        self.rung: signal.Signals | None = None  # the last signal sent
        self.deadline: float | None = None
        self.strays: list[Any] = []  # psutil.Process: descendants in other groups


def main(fd: int) -> None:
    """Run a launcher in a fresh interpreter; `fd` is its end of the socket."""
    os.setpgid(0, 0)
    os.set_inheritable(fd, False)  # or a spawned worker would hold the caller's line open after our end
    sock = socket.socket(fileno=fd)
    kind, body = _receive_one(sock)
    assert kind == Told.CONFIGURE
    config: Config = pickle.loads(body)
    if config.method == "forkserver":
        _import_ahead(sock, config)
    run(sock, config.method, config.caller)


def run(
    sock: socket.socket, method: str, caller: int, inherited: worker_main.Initializer | None = None
) -> None:
    """Serve until the caller is gone. Does not return."""
    code = 1
    try:
        launcher = _Launcher(sock, method, caller, inherited)
        # Why not of a fork: it would copy all pages of the caller, and end the caller's garbage a second time.
        if method != "fork":
            gc.collect()
        gc.freeze()  # Why: workers share these pages until someone writes to them, and the collector would.
        launcher.say(Says.READY)
        launcher.serve()
        code = 0
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        os._exit(code)


class _Launcher:
    def __init__(
        self, sock: socket.socket, method: str, caller: int, inherited: worker_main.Initializer | None
    ) -> None:
        self._sock = sock
        self._method = method
        self._caller = caller
        self._inherited = inherited
        self._children: dict[int, _Child] = {}
        self._data = b""
        self._fds: deque[int] = deque()
        self._is_over = False
        self._is_adopting = False
        self._not_ours: set[int] = set()  # processes that the main module started when it was imported
        signal.set_wakeup_fd(-1)
        self._signals, self._alarm = os.pipe()
        os.set_blocking(self._signals, False)
        os.set_blocking(self._alarm, False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.set_wakeup_fd(self._alarm, warn_on_full_buffer=False)
        self._poll = select.poll()
        self._poll.register(self._sock, select.POLLIN)
        self._poll.register(self._signals, select.POLLIN)
        self._caller_fd = _watch_process(caller)
        if self._caller_fd is not None:
            self._poll.register(self._caller_fd, select.POLLIN)

    def serve(self) -> None:
        try:
            while not self._is_over:
                for fd, _ in self._poll.poll(self._patience()):
                    if fd == self._signals:
                        _drain(fd)
                    elif fd == self._caller_fd:
                        self._is_over = True
                    else:
                        self._listen()
                if self._children and not self._is_adopting:
                    self._adopt()
                self._see_to_children()
        finally:
            self._end_all()

    def say(self, kind: int, number: int = 0, body: Any = None) -> None:
        self._sock.sendall(frame(kind, number, pickle.dumps(body)))

    def _adopt(self) -> None:
        """Become the parent of what jobs leave behind, once the first worker is under way and need not wait for it."""
        self._is_adopting = True
        self._not_ours = _children_of(os.getpid()) - _pids(self._children)
        _adopt_orphans()

    # The conversation

    def _listen(self) -> None:
        data, fds, _, _ = socket.recv_fds(self._sock, 65536, 64)
        if not data:
            self._is_over = True
            return
        # Invariant: the descriptors of a message come with its first byte or before, and in order.
        self._fds.extend(fds)
        self._data += data
        while len(self._data) >= HEADER.size:
            _, kind, number, length = HEADER.unpack_from(self._data)
            end = HEADER.size + length
            if len(self._data) < end:
                return
            body = pickle.loads(self._data[HEADER.size : end])
            self._data = self._data[end:]
            if kind == Told.START:
                self._start(number, body)
            elif kind == Told.END:
                self._end(number, body)

    def _start(self, number: int, names: tuple[str, ...]) -> None:
        fields = (*worker_main.ALWAYS, *names)
        ends = worker_main.Ends(**{name: self._fds.popleft() for name in fields})
        try:
            pid = self._spawn(ends) if self._method == "spawn" else self._fork(ends)
        except OSError as error:  # too many processes, no memory: the next try may succeed
            for fd in ends.opened():
                os.close(fd)
            why = f"the launcher could not start it: {error}"
            self.say(Says.GONE, number, Report(None, None, 0, "", why, None, False))
            return
        for fd in ends.opened():
            if fd != ends.box:
                os.close(fd)
        try:
            os.setpgid(
                pid, pid
            )  # Race: the worker does it too; whoever comes first, it is done before any END.
        except OSError:
            pass
        self._children[number] = _Child(number, pid, ends.box)
        self.say(Says.STARTED, number, pid)

    def _fork(self, ends: worker_main.Ends) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setpgid(0, 0)
            self._sock.close()
            for child in self._children.values():
                os.close(child.box)
            for fd in (self._signals, self._alarm, self._caller_fd):
                if fd is not None:
                    os.close(fd)
            signal.set_wakeup_fd(-1)
            worker_main.run(ends, self._inherited)
        finally:
            os._exit(1)

    def _spawn(self, ends: worker_main.Ends) -> int:
        for fd in ends.opened():
            os.set_inheritable(fd, True)
        try:
            call = f"from bulkhead.engines.processes.worker_main import Ends, main; main(Ends{tuple(ends)})"
            command = interpreter_command(call)
            return os.posix_spawn(command[0], command, os.environ, setpgroup=0)
        finally:
            for fd in ends.opened():
                os.set_inheritable(fd, False)

    # The kill ladder

    def _end(self, number: int, grace: float) -> None:
        child = self._children.get(number)
        if child is None or child.was_told or child.has_exited:
            return
        child.was_told = True
        child.grace = grace
        if blackbox.recover(
            child.box
        ).last_read:  # else it has run no job, and finalize need not wait for psutil
            child.strays = _strays(child.pid)
            if len(self._children) == 1:
                child.strays += self._orphans()
        child.deadline = time.monotonic()
        if blackbox.DUMP is not None and grace > 0:
            child.deaf = _threads_that_block(child.pid, blackbox.DUMP)
            os.kill(child.pid, blackbox.DUMP)
            child.deadline += max(_WRITE_DOWN_SHARE * grace, _WRITE_DOWN)

    def _climb(self, child: _Child, rung: signal.Signals, patience: float) -> None:
        child.deadline = time.monotonic() + patience
        child.rung = rung
        _signal_group(child.pid, rung)
        if not child.has_exited and _group_of(child.pid) != child.pid:
            os.kill(child.pid, rung)  # its job has moved it to another group
        for stray in child.strays:
            _signal_stray(stray, rung)

    def _patience(self) -> int | None:
        """Return how long to poll, in milliseconds."""
        if any(child.deadline is not None for child in self._children.values()):
            return _LOOK_AGAIN
        return None

    def _see_to_children(self) -> None:
        self._reap_orphans()
        for child in list(self._children.values()):
            if not child.has_exited and _has_exited(child.pid):
                child.has_exited = True
                if not child.was_told:
                    if len(self._children) == 1:
                        child.strays = self._orphans()
                    self._climb(child, signal.SIGKILL, _VANISH)  # what it started goes with it
            if child.deadline is not None:
                self._look_after(child)

    def _look_after(self, child: _Child) -> None:
        assert child.deadline is not None
        is_late = time.monotonic() >= child.deadline
        if child.has_exited and (_is_deserted(child) or (is_late and child.rung is signal.SIGKILL)):
            self._bury(child)
        elif child.rung is None and (is_late or _has_written_down(child)):
            self._climb(child, signal.SIGTERM, child.grace)
        elif is_late and child.rung is signal.SIGTERM:
            self._climb(child, signal.SIGKILL, _VANISH)

    def _bury(self, child: _Child) -> None:
        report = _reap(child)
        os.close(child.box)
        del self._children[child.number]
        self.say(Says.GONE, child.number, report)

    def _reap_orphans(self) -> None:
        """Reap what workers have left to this process and has ended."""
        known = _pids(self._children) | self._not_ours
        try:
            while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if found.si_pid in known:
                    return  # it comes first until it is buried; then we look again
                os.waitpid(found.si_pid, os.WNOHANG)
        except (ChildProcessError, AttributeError):
            pass

    def _orphans(self) -> list[Any]:
        """Return what jobs of workers that are gone have left behind, adopted by this process."""
        return _processes(_children_of(os.getpid()) - _pids(self._children) - self._not_ours)

    def _end_all(self) -> None:
        if _children_of(os.getpid()) <= self._not_ours:
            return
        import psutil

        # Race: workers may have been killed by their life lines already; then what they started is ours by now.
        everything = psutil.Process().children(recursive=True)
        for child in self._children.values():
            self._climb(child, signal.SIGKILL, 0)
        for one in [*everything, *psutil.Process().children(recursive=True)]:
            if one.pid not in self._not_ours:
                _signal_stray(one, signal.SIGKILL)


def interpreter_command(code: str) -> list[str]:
    """Return the command that runs `code` in a fresh interpreter like this one, which can import bulkhead."""
    from multiprocessing import spawn, util

    import bulkhead

    home = os.path.dirname(os.path.dirname(os.path.abspath(bulkhead.__file__)))
    executable = spawn.get_executable() or sys.executable
    flags = util._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [os.fsdecode(executable), *flags, "-c", f"import sys; sys.path.insert(0, {home!r}); {code}"]


def _import_ahead(sock: socket.socket, config: Config) -> None:
    """Import what workers will need; say `unsuitable` and leave when the process must not be forked afterwards."""
    main_module.prepare(config.main, "bulkhead-launcher")
    unsuitable = _import_main(config.main) if config.is_preloading else None
    unsuitable = unsuitable or _preload(config.preload)
    if unsuitable is not None:
        try:
            sock.sendall(frame(Says.UNSUITABLE, 0, pickle.dumps(unsuitable)))
        finally:
            os._exit(0)  # also when the caller is gone


def _import_main(main: main_module.MainModule) -> Unsuitable | None:
    try:
        main_module.import_main(main)
    except MissingMainGuard as error:
        return Unsuitable(True, str(error))
    except BaseException as error:  # the worker that imports it will say so better
        return Unsuitable(False, f"importing the main module: {error!r}")
    if _n_threads() > 1:
        return Unsuitable(False, "the main module starts threads when it is imported")
    return None


def _preload(names: tuple[str, ...]) -> Unsuitable | None:
    before = _connections() if names else set()
    for name in names:
        try:
            main_module.import_ahead(name)
        except BaseException as error:
            return Unsuitable(False, f"importing {name}: {error!r}", is_of_main=False)
        if _n_threads() > 1:
            return Unsuitable(False, f"{name} starts threads when it is imported", is_of_main=False)
        if _connections() - before:
            return Unsuitable(False, f"{name} opens connections when it is imported", is_of_main=False)
    return None


def _connections() -> set[tuple[int, int, int]]:
    """Return what this process has open for reading and writing: copies must not share a socket or a database."""
    found = set()
    for fd in map(int, os.listdir("/dev/fd")):
        try:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
                about = os.fstat(fd)
                found.add((fd, about.st_dev, about.st_ino))
        except OSError:  # the one that has listed them
            pass
    return found


def _receive_one(sock: socket.socket) -> tuple[int, bytes]:
    head = _receive(sock, HEADER.size)
    _, kind, _, length = HEADER.unpack(head)
    return kind, _receive(sock, length)


def _receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            os._exit(0)
        data += more
    return data


def _children_of(pid: int) -> set[int]:
    """Return the pids of the children that a process's first thread has. Why not psutil's: see `_processes`."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return set(map(int, file.read().split()))
    except OSError:
        import psutil

        return {one.pid for one in psutil.Process(pid).children()}


def _pids(children: dict[int, _Child]) -> set[int]:
    return {child.pid for child in children.values()}


def _adopt_orphans() -> None:
    """Become the parent of what jobs leave behind, where there is such a thing (Linux): so that it can be found.

    Source: prctl(2), PR_SET_CHILD_SUBREAPER.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _n_threads() -> int:
    """Count the threads of this process, those of C libraries included where the system tells."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()


def _watch_process(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process ends, where there is such a thing.

    Why besides the socket: a process that the caller forked may hold a copy of the socket.
    """
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _drain(fd: int) -> None:
    try:
        while os.read(fd, 4096):
            pass
    except BlockingIOError:
        pass


def _has_exited(pid: int) -> bool:
    """Tell whether the child is a zombie, and leave it one."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
    except AttributeError:  # macOS before Python 3.13
        import psutil

        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def _has_written_down(child: _Child) -> bool:
    """Tell whether the worker has written down its stacks, where the system tells (Linux).

    Why not the file alone: it may be half written. The thread that writes holds the signal off as long as it does.
    """
    if child.deaf is None or not blackbox.has_stack(child.box):
        return False
    assert blackbox.DUMP is not None
    deaf = _threads_that_block(child.pid, blackbox.DUMP)
    return deaf is not None and deaf <= child.deaf


def _threads_that_block(pid: int, number: int) -> frozenset[str] | None:
    """Return those threads of a process that hold a signal off, None where the system does not tell."""
    found = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/status", encoding="utf-8", errors="replace") as file:
                blocked = next(int(line.split()[1], 16) for line in file if line.startswith("SigBlk:"))
            if blocked >> (number - 1) & 1:
                found.append(thread)
    except (OSError, StopIteration):  # it has ended, or the system has no such files
        return None
    return frozenset(found)


def _signal_group(pgid: int, rung: signal.Signals) -> None:
    try:
        os.killpg(pgid, rung)
    except (ProcessLookupError, PermissionError):  # empty, or (macOS) zombies only
        pass


def _strays(pid: int) -> list[Any]:
    """Return the descendants of a worker that have left its group."""
    return _processes(one for one in descendants_of(pid) if _group_of(one) != pid)


def _processes(pids: Iterable[int]) -> list[Any]:
    """Return those that there are, by what psutil knows them again."""
    found = []
    for pid in pids:
        import psutil  # Why here: its import takes longer than most finalizes, which find nobody

        try:
            found.append(psutil.Process(pid))
        except psutil.Error:
            pass
    return found


def _signal_stray(stray: Any, rung: signal.Signals) -> None:
    import psutil

    try:
        stray.send_signal(rung)  # psutil makes sure that the pid is still the same process
    except psutil.Error:
        pass


def _is_deserted(child: _Child) -> bool:
    """Tell whether nothing of a worker that has exited is left but itself."""
    members = (pid for pid in _all_pids() if pid != child.pid and _group_of(pid) == child.pid)
    return not any(map(_is_alive, members)) and not any(_is_alive(stray.pid) for stray in child.strays)


def _all_pids() -> list[int]:
    """Return the pids of the system; see `_children_of`."""
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except FileNotFoundError:
        import psutil

        return psutil.pids()


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:
        return -1


def _is_alive(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _reap(child: _Child) -> Report:
    left = blackbox.recover(child.box)
    try:
        _, status, usage = os.wait4(child.pid, 0)
    except ChildProcessError:
        return Report(None, None, left.last_read, left.stack, left.output, None, False)
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    is_oom = number == signal.SIGKILL and not child.was_told and _oom_kills() > child.oom_kills
    return Report(code, number, left.last_read, left.stack, left.output, peak, is_oom)


def _oom_kills() -> int:
    """Return how many processes the kernel's out-of-memory killer has ended since boot, or 0 where it does not tell."""
    try:
        with open("/proc/vmstat", "rb") as file:
            return next((int(line.split()[1]) for line in file if line.startswith(b"oom_kill ")), 0)
    except OSError:
        return 0
