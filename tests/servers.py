"""Real servers for tests: Redis, a Redis Cluster of three nodes, NATS with JetStream.

Each has a folder of its own for its data and listens on a free port of the loopback. It can be stopped, killed and
started again in the middle of a test: port and data stay. It ends with the session, however that ends.

The session's servers are fixtures of `conftest.py`; tests that share one take a `namespace` of their own. A test that
stops or kills a server has one for itself:

    with RedisServer(tmp_path, fsync="always") as server:
        ...
        server.kill()
        server.start()

A server that is not installed is an error (`make test` installs them: tools/servers.sh).
"""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

__all__ = ["NatsServer", "RedisCluster", "RedisServer", "Server", "wait_until"]

# Seconds for a start or an end: both take some 50 ms, and the machine may be busy.
PATIENCE = 20.0

# Why these: below the ports that the system gives to outgoing connections, so that nobody takes the port of a server
# that is about to start again. A node of a Redis Cluster also takes the port that is 10,000 above.
_PORTS = range(10_500, 22_000)
_BUS = 10_000


class Server(ABC):
    """One server process. Its data and its port outlive `stop` and `kill`."""

    program: str

    def __init__(self, folder: Path, options: Sequence[str] = ()) -> None:
        self.folder = folder
        self.options = tuple(options)
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server does not run"
        return self._process.pid

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def start(self) -> Self:
        """Start it, and return when it answers."""
        assert self._process is None, "the server runs already"
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.port:
            self._launch()
        else:
            self._launch_at_free_port()
        return self

    def stop(self) -> None:
        """Let it end in order."""
        if self._process is not None:
            self._process.terminate()
            self._await_end()

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._await_end()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    @abstractmethod
    def _arguments(self) -> list[str]: ...

    @abstractmethod
    def _is_ready(self) -> bool: ...

    def _launch_at_free_port(self) -> None:
        for attempt in range(5):
            self.port = _free_port()
            try:
                return self._launch()
            except ChildProcessError:  # another test run has taken the port meanwhile
                if attempt == 4:
                    raise
        return None

    def _launch(self) -> None:
        command = [*_bound_to_us(), _path_of(self.program), *self._arguments(), *self.options]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            wait_until(self._answers, f"{self.program} at {self.address} answers")
        except BaseException:
            self.kill()
            raise

    def _answers(self) -> bool:
        assert self._process is not None
        if (code := self._process.poll()) is not None:
            self._process = None
            raise ChildProcessError(f"{self.program} ended with {code}:\n{self.log[-2000:]}")
        try:
            return self._is_ready()
        except OSError:
            return False

    def _await_end(self) -> None:
        assert self._process is not None
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(PATIENCE)
        self._process = None


class RedisServer(Server):
    """A Redis that appends each change to a file.

    Args:
        folder: Where its data and its log go.
        fsync: "always" or "no". A killed process loses nothing of what it answered. Why not "everysec": while the disk
            is slow to do that, the server puts off writing by up to two seconds, and answers all the same.
        password: What clients have to give, or None.
        options: More arguments of redis-server.
    """

    program = "redis-server"

    def __init__(
        self,
        folder: Path,
        *,
        fsync: str = "no",
        password: str | None = None,
        options: Sequence[str] = (),
    ) -> None:
        super().__init__(folder, options)
        self.fsync = fsync
        self.password = password

    @property
    def url(self) -> str:
        secret = f":{self.password}@" if self.password else ""
        return f"redis://{secret}{self.address}/0"

    def cli(self, *arguments: str) -> str:
        """Return what redis-cli prints."""
        secret = ["-a", self.password, "--no-auth-warning"] if self.password else []
        return _output("redis-cli", "-h", "127.0.0.1", "-p", str(self.port), *secret, *arguments)

    def _arguments(self) -> list[str]:
        secret = ["--requirepass", self.password] if self.password else []
        # Why no rewrite: it forks, and a process would come and go in the middle of a test.
        persistence = [
            "--appendonly",
            "yes",
            "--appendfsync",
            self.fsync,
            "--auto-aof-rewrite-percentage",
            "0",
        ]
        place = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)]
        return [*place, "--daemonize", "no", "--save", "", *persistence, *secret]

    def _is_ready(self) -> bool:
        answer = _ask(self.port, b"PING\r\n")
        return answer.startswith((b"+PONG", b"-NOAUTH"))


class RedisCluster:
    """Three Redis masters that share the slots. Each node is a `RedisServer`."""

    def __init__(self, folder: Path) -> None:
        options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000"]
        self.nodes = [RedisServer(folder / f"node-{n}", options=options) for n in range(3)]

    @property
    def url(self) -> str:
        return f"redis+cluster://{self.nodes[0].address}"

    def cli(self, *arguments: str) -> str:
        """Return what redis-cli prints that goes to the node which has the key."""
        return self.nodes[0].cli("-c", *arguments)

    def start(self) -> Self:
        """Start the nodes; the first time they are made a cluster. Return when every node knows every slot's node."""
        self.begin()
        self.wait()
        return self

    def begin(self) -> None:
        """Start the nodes as `start` does, and do not wait: for two seconds they take no keys."""
        is_new = not self.nodes[0].port
        for node in self.nodes:
            node.start()
        if is_new:
            self._join()

    def wait(self) -> None:
        """Return when every node knows every slot's node."""
        wait_until(self._is_whole, "each node of the cluster knows all")

    def stop(self) -> None:
        """Let the nodes end in order."""
        for node in self.nodes:
            node.stop()

    def kill(self) -> None:
        """End the nodes with SIGKILL."""
        for node in self.nodes:
            node.kill()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.kill()
            raise

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    def _join(self) -> None:
        first, *others = self.nodes
        for node, slots in zip(self.nodes, _thirds(), strict=True):
            node.cli("cluster", "addslots", *map(str, slots))
            node.cli("cluster", "set-config-epoch", str(self.nodes.index(node) + 1))
        for node in others:
            node.cli("cluster", "meet", "127.0.0.1", str(first.port))

    def _is_whole(self) -> bool:
        # Why not by redis-cli: for the two seconds that this takes it would be started a hundred times.
        infos = [_ask(node.port, b"CLUSTER INFO\r\n") for node in self.nodes]
        return all(b"cluster_state:ok" in info and b"cluster_known_nodes:3" in info for info in infos)


class NatsServer(Server):
    """A NATS server with JetStream, which keeps its streams in the folder.

    Args:
        folder: Where its data and its log go.
        config: Lines of a configuration file, for instance `max_payload: 65536`.
        options: More arguments of nats-server.
    """

    program = "nats-server"

    def __init__(self, folder: Path, *, config: str = "", options: Sequence[str] = ()) -> None:
        super().__init__(folder, options)
        self.config = config

    @property
    def url(self) -> str:
        return f"nats://{self.address}"

    def _arguments(self) -> list[str]:
        place = self.folder / "nats.conf"
        place.write_text(
            f'host: "127.0.0.1"\nport: {self.port}\n'
            f'jetstream {{ store_dir: "{self.folder / "jetstream"}" }}\n{self.config}\n'
        )
        return ["-c", str(place)]

    def _is_ready(self) -> bool:
        # It opens its port when its streams are recovered.
        return b'"jetstream":true' in _ask(self.port, b"")


def wait_until(condition: Callable[[], bool], what: str, timeout: float = PATIENCE) -> None:
    """Return when the condition holds; fail with what was waited for when it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s in vain until {what}")
        time.sleep(0.01)


def _path_of(program: str) -> str:
    # Why /usr/sbin: Debian puts nats-server there, which is not on everybody's path.
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise FileNotFoundError(
            f"{program} is not installed; as root: apt-get install redis-server nats-server"
        )
    return found


def _bound_to_us() -> list[str]:
    """Return what lets a process end with this one, also when this one is killed."""
    tool = shutil.which("setpriv")
    return [tool, "--pdeathsig", "KILL"] if tool else []


def _free_port() -> int:
    for port in random.sample(_PORTS, 200):
        if _is_free(port) and _is_free(port + _BUS):
            return port
    raise OSError("200 ports that were tried are all taken")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _ask(port: int, question: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=2) as line:
        line.sendall(question)
        return line.recv(4096)


def _thirds() -> list[range]:
    return [range(5461), range(5461, 10923), range(10923, 16384)]


def _output(program: str, *arguments: str) -> str:
    command = [_path_of(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, f"{program} ended with {done.returncode}: {done.stderr}"
    return done.stdout
