"""What a SQLite file can be besides a good one, and what the URL can say."""

import contextlib
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from scripts import running
from sqlite_files import OPENING, connected, rows

from bulkhead import App, backends
from bulkhead.backends.base import Ending, Message, Outcome, OutcomeState
from bulkhead.backends.sqlite import file as sqlite_file
from bulkhead.backends.sqlite import schema, sizes
from bulkhead.errors import BrokerUnavailable, ConfigError, MessageTooLarge


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("sqlite://", "must name a file"),
        ("sqlite:///", "must name a file"),
        ("sqlite://jobs.db", "sqlite:////absolute.db"),
        ("sqlite:///:memory:", "memory://"),
        ("sqlite:////no/such/folder/jobs.db", "/no/such/folder does not exist"),
        ("sqlite:////tmp", "is a folder"),
        ("sqlite:///jobs.db?synchronous=off", "synchronous"),
        ("sqlite:///jobs.db?synchronous=full&synchronous=full", "twice"),
        ("sqlite:///jobs.db?busy_timeout=soon", "busy_timeout"),
        ("sqlite:///jobs.db?busy_timeout=0", "busy_timeout"),
        ("sqlite:///jobs.db?busy_timeout=nan", "busy_timeout"),
        ("sqlite:///jobs.db?busy_timeout=", "busy_timeout"),
        ("sqlite:///jobs.db?timeout=5", "known: synchronous, busy_timeout"),
        ("sqlite:///jobs.db#part", "sqlite:///relative.db"),
        ("memory://one/two", "memory://name"),
        ("memory://?synchronous=full", "memory://name"),
    ],
)
def test_a_url_that_cannot_work_is_refused_and_nothing_is_made(
    url: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=named):
        backends.connect(url)
    assert list(tmp_path.iterdir()) == []


def test_a_relative_path_stays_where_it_was_when_the_process_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    backend = backends.connect("sqlite:///my%20jobs%3F.db")
    monkeypatch.chdir(tmp_path / "elsewhere")
    backend.broker.enqueue_many([Message("a", "q", b"")])
    backend.close()
    with connected(tmp_path / "my jobs?.db", quoted="my%20jobs%3F.db") as again:
        assert again.broker.counts()["q"].ready == 1


@pytest.mark.parametrize(("option", "number"), [("", 1), ("synchronous=normal", 1), ("synchronous=FULL", 2)])
def test_the_url_says_whether_a_commit_waits_for_the_disk(tmp_path: Path, option: str, number: int) -> None:
    with connected(tmp_path / "jobs.db", option) as backend:
        seen = backend.broker._file.change(lambda db: db.execute("PRAGMA synchronous").fetchone())
    assert seen == (number,)


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no database " * 1000)
    with pytest.raises(ConfigError, match=r"notes\.txt is no SQLite database: name another file"):
        backends.connect(f"sqlite:///{path}")
    assert path.read_text() == "no database " * 1000
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(
    "setup", ["CREATE TABLE mine (a)", "PRAGMA application_id = 7", "PRAGMA user_version = 3"]
)
def test_the_database_of_another_application_is_refused_and_left_alone(tmp_path: Path, setup: str) -> None:
    path = tmp_path / "mine.db"
    with sqlite3.connect(path) as mine:
        mine.execute(setup)
    mine.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="another application"):
        backends.connect(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_a_file_of_a_later_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    with connected(path):
        pass
    with sqlite3.connect(path) as mine:
        mine.execute("PRAGMA user_version = 99")
    mine.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="later version of bulkhead"):
        backends.connect(f"sqlite:///{path}")
    assert path.read_bytes() == before


def _in_copy_without_rights(work: Callable[[], str]) -> str:
    """What `work` returns in a forked copy that is not root."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            answer = work()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(into, answer.encode()[:4000])
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as reader:
        answer = reader.read().decode()
    os.waitpid(child, 0)
    return answer


@pytest.fixture
def common_folder() -> Iterator[Path]:
    """A folder that every user can look into, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        folder.chmod(0o755)


def test_a_file_that_can_only_be_read_is_said_to_be_so(common_folder: Path) -> None:
    path = common_folder / "jobs.db"
    with connected(path) as backend:
        backend.broker.enqueue_many([Message("a", "q", b"")])
    path.chmod(0o444)
    common_folder.chmod(0o555)
    answer = _in_copy_without_rights(lambda: str(backends.connect(f"sqlite:///{path}")))
    assert answer.startswith("BrokerUnavailable")
    assert "write the file and its folder" in answer


def test_a_folder_that_cannot_be_written_is_said_to_be_so(common_folder: Path) -> None:
    common_folder.chmod(0o555)
    answer = _in_copy_without_rights(lambda: str(backends.connect(f"sqlite:///{common_folder}/jobs.db")))
    assert answer.startswith("BrokerUnavailable")
    assert "write the file and its folder" in answer


def test_on_a_full_disk_a_call_keeps_nothing_and_the_next_one_works_when_there_is_room(
    tmp_path: Path,
) -> None:
    def limit(pages: int) -> None:
        # Why not a disk: this is the same error from the same place, and needs no right to mount.
        backend.broker._file.change(lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchone())

    with connected(tmp_path / "jobs.db") as backend:
        backend.broker.enqueue_many([Message("a", "q", b"x")])
        [pages] = backend.broker._file.change(lambda db: db.execute("PRAGMA page_count").fetchone())
        limit(pages + 5)
        messages = [Message("b", "q", b"x"), Message("c", "q", b"x" * 100_000)]
        with pytest.raises(BrokerUnavailable, match=r"disk is full.*make room"):
            backend.broker.enqueue_many(messages)
        assert backend.broker.find(["b", "c"]) == [None, None]
        limit(10**6)
        assert backend.broker.enqueue_many(messages) == [True, True]
        assert [claim.id for claim in backend.broker.claim("q", 5, 60.0)] == ["a", "b", "c"]


def test_a_folder_that_goes_is_unavailable_and_when_it_is_back_the_file_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with connected(folder / "jobs.db") as backend:
        backend.broker.enqueue_many([Message("a", "q", b"")])
        folder.rename(tmp_path / "away")
        with pytest.raises(BrokerUnavailable, match="cannot be opened"):
            backend.broker.enqueue_many([Message("b", "q", b"")])
        folder.mkdir()
        assert backend.broker.enqueue_many([Message("a", "q", b"")]) == [True]
        (folder / "jobs.db").unlink()
        assert backend.broker.counts() == {}
        assert backend.broker.enqueue_many([Message("a", "q", b"")]) == [True]
        with connected(folder / "jobs.db") as other:
            assert other.broker.counts()["q"].ready == 1


def test_what_is_too_large_for_a_row_is_refused_and_nothing_of_its_call_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "LIMIT", 100)
    with connected(tmp_path / "jobs.db") as backend:
        with pytest.raises(MessageTooLarge, match="101 bytes") as caught:
            backend.broker.enqueue_many([Message("a", "q", b""), Message("b", "q", b"x" * 101)])
        assert (caught.value.size_bytes, caught.value.limit_bytes) == (101, 100)
        assert backend.broker.counts() == {}
        with pytest.raises(MessageTooLarge):
            backend.results.save_many([Outcome("a", "q", "t", OutcomeState.FAILED, b"x" * 60, b"x" * 60)])
        with pytest.raises(MessageTooLarge):
            backend.registry.put("k", b"x" * 101)


def test_1000_jobs_are_settled_in_one_transaction(tmp_path: Path) -> None:
    names = [f"{i}" for i in range(1000)]
    with connected(tmp_path / "jobs.db") as backend:
        backend.broker.enqueue_many([Message(name, "q", b"") for name in names])
        claims = backend.broker.claim("q", 1000, 60.0)
        ends = [Ending(one.hold, Outcome(one.id, "q", "t", OutcomeState.SUCCEEDED)) for one in claims]
        seen: list[str] = []
        backend.settler._file.change(lambda writer: writer.set_trace_callback(seen.append))
        seen.clear()
        assert backend.settle(ends) == [True] * 1000
        assert [line for line in seen if line.startswith(("BEGIN", "COMMIT"))] == [
            "BEGIN IMMEDIATE",
            "COMMIT",
        ]
        assert backend.results.counts() == {OutcomeState.SUCCEEDED: 1000}
        assert backend.broker.counts() == {}


def test_who_finds_the_file_locked_waits_and_then_is_told(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    with connected(path, "busy_timeout=0.3") as backend:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        start = time.monotonic()
        with pytest.raises(BrokerUnavailable, match="raise busy_timeout"):
            backend.broker.enqueue_many([Message("a", "q", b"")])
        assert 0.3 <= time.monotonic() - start < 2.0
        assert backend.broker.counts() == {}  # to read is possible all the time
        other.execute("COMMIT")
        assert backend.broker.enqueue_many([Message("a", "q", b"")]) == [True]
        other.close()


def test_who_finds_the_file_locked_for_less_than_busy_timeout_notices_nothing(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    with connected(path) as backend:
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        release = threading.Timer(0.2, other.execute, ["COMMIT"])
        release.start()
        start = time.monotonic()
        assert backend.broker.enqueue_many([Message("a", "q", b"")]) == [True]
        assert time.monotonic() - start > 0.15
        release.join()
        other.close()


def test_after_close_nothing_can_be_asked_and_a_waiting_claim_ends(tmp_path: Path) -> None:
    with connected(tmp_path / "jobs.db") as backend:
        told: list[BaseException] = []

        def wait() -> None:
            try:
                backend.broker.claim("q", 1, 60.0, wait=30.0)
            except BrokerUnavailable as error:
                told.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        backend.close()
        waiter.join(5.0)
        assert len(told) == 1
        with pytest.raises(BrokerUnavailable, match="closed"):
            backend.broker.counts()


def test_expired_ids_outcomes_and_values_are_removed_in_bounded_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "_TIDY_EVERY", 0.0)
    monkeypatch.setattr(sqlite_file, "_TIDY_ROWS", 10)
    path = tmp_path / "jobs.db"
    names = [f"{i}" for i in range(45)]
    with connected(path) as backend:
        backend.broker.enqueue_many([Message(name, "q", b"", remember=0.2) for name in names])
        backend.broker.delete(names)
        backend.results.save_many([Outcome(name, "q", "t", OutcomeState.FAILED, keep=0.2) for name in names])
        for name in names:
            backend.registry.put(name, b"", keep=0.2)
        time.sleep(0.25)
        left = {rows(path, table) for table in ("taken", "outcomes", "entries")}
        for _ in range(3):
            backend.broker.pause("q")
            now = {rows(path, table) for table in ("taken", "outcomes", "entries")}
            assert max(left) - 10 <= min(now) < max(left)
            left = now
        for _ in range(3):
            backend.broker.pause("q")
        assert [rows(path, table) for table in ("taken", "outcomes", "entries")] == [0, 0, 0]


def test_the_log_does_not_grow_without_bound_and_shrinks_when_who_held_it_up_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    log = tmp_path / "jobs.db-wal"
    body = b"x" * 1_000_000

    def write(n: int) -> None:
        for i in range(n):
            backend.broker.enqueue_many([Message(f"{i}", "q", body)])
            backend.broker.delete([f"{i}"])

    with connected(path) as backend:
        write(60)
        assert log.stat().st_size < 12e6
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT COUNT(*) FROM jobs").fetchone()
        write(45)
        assert log.stat().st_size > 40e6  # what the reader sees has to stay
        reader.execute("COMMIT")
        reader.close()
        backend.broker._file._next_tidy = 0.0
        write(2)
        assert log.stat().st_size < 20e6


class _Interrupted(sqlite3.Connection):
    """A connection beside which another one makes the file between two looks at whose it is."""

    def execute(self, *given: object) -> sqlite3.Cursor:
        if "sqlite_master" in given[0]:
            with contextlib.suppress(BrokerUnavailable):  # it may have to wait for its turn
                self.make()
        return super().execute(*given)


def test_a_file_that_another_process_makes_in_the_middle_of_a_look_at_it_is_ours(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"

    def make() -> None:
        with connected(path, "busy_timeout=0.05") as backend:
            backend.broker.enqueue_many([Message("a", "q", b"")])

    connection = sqlite3.connect(path, isolation_level=None, factory=_Interrupted)
    connection.make = make
    schema.prepare(connection, path)
    connection.close()
    make()
    with connected(path) as backend:
        assert backend.broker.counts()["q"].ready == 1


def test_processes_that_make_the_file_at_the_same_time_make_it_once(tmp_path: Path) -> None:
    code = """
while time.time() < float(sys.argv[1]):
    pass
for number in range(8):
    backend = backends.connect(f"sqlite:///{folder}/{number}.db")
    say(backend.broker.enqueue_many([Message(str(os.getpid()), "q", b"")]))
    backend.close()
"""
    script = OPENING.split("backend =")[0] + code.replace("{folder}", str(tmp_path))
    start = f"{time.time() + 0.7}"
    with ExitStack() as stack:
        scripts = [stack.enter_context(running(script.replace("sys.argv[1]", start))) for _ in range(5)]
        for process in scripts:
            assert process.wait() == 0, process.errors()
            assert process.output().split() == ["[True]"] * 8
    for number in range(8):
        with connected(tmp_path / f"{number}.db") as backend:
            assert backend.broker.counts()["q"].ready == 5


@pytest.mark.parametrize("value", ["text", b"\xff\x00", 9e999, -9e999, 2**62, ""])
def test_an_outcome_of_wrong_types_spoils_no_list(
    tmp_path: Path, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    columns = [
        "queue",
        "task",
        "state",
        "value",
        "error",
        "attempt",
        "enqueued",
        "started",
        "finished",
        "keep",
    ]
    path, url = tmp_path / "jobs.db", f"sqlite:///{tmp_path}/jobs.db"
    app = App(url)
    app.backend.results.save_many(
        [Outcome(one, "q", "t", OutcomeState.FAILED, finished_at=1.0) for one in [*columns, "good"]]
    )
    with contextlib.closing(sqlite3.connect(path)) as hand, hand:
        for column in columns:
            hand.execute(f"UPDATE outcomes SET {column} = ? WHERE id = ?", (value, column))

    assert {job.id for job in app.jobs("failed")} == {*columns, "good"} - {"state"}
    assert app.job("good").state == "failed"
    assert app.counts()["failed"] == len(columns)
    found = app.find_jobs([*columns, "good"])
    assert [one.id for one in found if one is not None] == [*columns[:2], *columns[3:], "good"]
    assert "the outcome of job 'state'" in caplog.text
    app.close()
