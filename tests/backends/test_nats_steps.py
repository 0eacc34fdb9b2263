"""NATS: whoever dies between two steps of a call leaves nothing that is lost, and nothing that runs twice.

A call "dies" here where one of its later steps raises; another connection, as another process has it, goes on.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from servers import NatsServer

from bulkhead import backends
from bulkhead.backends.base import (
    Backend,
    Burial,
    CancelAnswer,
    Message,
    Outcome,
    OutcomeState,
    Place,
    Return,
)
from bulkhead.backends.nats import cells as nats_cells
from bulkhead.backends.nats import claiming
from bulkhead.backends.nats.names import token_of
from bulkhead.backends.nats.session import Answer, Question, Session
from bulkhead.errors import ConfigError
from bulkhead.testing.conformance.contract import LONG, claims, ids_of, keep, until


class Died(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def connect(nats_server: NatsServer, namespace: str) -> Iterator[Callable[[], Backend]]:
    opened: list[Backend] = []

    def connect() -> Backend:
        opened.append(backends.connect(nats_server.url, namespace))
        return opened[-1]

    yield connect
    for backend in opened:
        backend.close()


@pytest.fixture
def dying(connect: Callable[[], Backend]) -> Backend:
    return connect()


@pytest.fixture
def other(connect: Callable[[], Backend]) -> Backend:
    return connect()


def inside(backend: Backend, work: Callable[[Any], Any]) -> Any:
    """Return what `work` returns in the backend's loop; a coroutine is awaited."""

    async def run(at: Any) -> Any:
        found = work(at)
        return await found if asyncio.iscoroutine(found) else found

    return backend.broker._link.call(run)  # type: ignore[attr-defined]


def dies_at(backend: Backend, where: Callable[[Any], Any], name: str) -> None:
    """Let this step of the backend raise instead of doing anything."""

    async def die(*args: object, **kwargs: object) -> None:
        raise Died

    inside(backend, lambda at: setattr(where(at), name, die))


def tickets(backend: Backend) -> int:
    """Return how many tickets there are in the work queue."""

    async def count(at: Any) -> int:
        answer = await at.session.ask_one(f"$JS.API.STREAM.INFO.{at._layout.ready_stream}")
        return int(answer["state"]["messages"])

    return int(inside(backend, count))


def test_an_enqueuer_that_died_before_the_ticket_has_its_job_kept_by_the_same_call_again(
    dying: Backend, other: Backend
) -> None:
    dies_at(dying, lambda at: at.jobs._tickets, "put")
    with pytest.raises(Died):
        dying.broker.enqueue_many([Message("a", "q", b"body"), Message("b", "q", b"", delay=0.1)])
    assert other.broker.claim("q", 2, LONG) == []
    assert other.broker.enqueue_many([Message("a", "q", b"body"), Message("b", "q", b"", delay=0.1)]) == [
        False,
        False,
    ]
    assert sorted(ids_of(claims(other.broker, 2))) == ["a", "b"]


def test_a_claimer_that_died_before_its_claim_was_written_delays_the_job_by_a_second(
    dying: Backend, other: Backend
) -> None:
    keep(other.broker, "a")
    dies_at(dying, lambda at: at.jobs._claims, "_mark")
    start = time.monotonic()
    with pytest.raises(Died):
        dying.broker.claim("q", 1, LONG)
    [claim] = claims(other.broker)
    assert (claim.id, claim.attempt) == ("a", 1)
    assert time.monotonic() - start >= claiming._ACK_WAIT / 2


def test_a_claimer_that_died_before_it_hid_the_ticket_keeps_the_job_until_its_lease_is_over(
    dying: Backend, other: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(*args: object) -> None:
        raise Died

    keep(other.broker, "a")
    with monkeypatch.context() as patch:
        patch.setattr(claiming, "hide", die)
        with pytest.raises(Died):
            dying.broker.claim("q", 1, 1.6)
    start = time.monotonic()
    [claim] = claims(other.broker)
    assert time.monotonic() - start > 1.4
    assert claim.attempt == 2


def test_an_ack_that_died_before_the_ticket_was_acknowledged_has_settled_the_job(
    dying: Backend, other: Backend
) -> None:
    keep(other.broker, "a")
    [claim] = claims(dying.broker, lease=0.2)
    dies_at(dying, lambda at: at.jobs, "_let_go")
    with pytest.raises(Died):
        dying.broker.ack([claim.hold])
    assert other.broker.find(["a"]) == [None]
    assert other.broker.claim("q", 1, LONG, wait=0.5) == []
    assert tickets(other) == 0


@pytest.mark.parametrize("delay", [0.0, 0.2])
@pytest.mark.parametrize("step", ["_put", "_let_go"])
def test_a_nack_that_died_half_way_has_given_the_job_back(
    dying: Backend, other: Backend, step: str, delay: float
) -> None:
    keep(other.broker, "a")
    [claim] = claims(dying.broker, lease=0.2)
    dies_at(dying, lambda at: at.jobs, step)
    with pytest.raises(Died):
        dying.broker.nack([Return(claim.hold, delay, error=b"why")])
    [again] = claims(other.broker)
    assert (again.attempt, again.error) == (2, b"why")
    assert other.broker.claim("q", 1, LONG, wait=0.5) == []
    assert other.broker.ack([again.hold]) == [True]
    assert tickets(other) == 0


@pytest.mark.parametrize("step", ["_put", "_let_go"])
def test_a_burial_that_died_half_way_leaves_a_dead_letter(dying: Backend, other: Backend, step: str) -> None:
    keep(other.broker, "a")
    [claim] = claims(dying.broker, lease=0.2)
    dies_at(dying, lambda at: at.jobs, step)
    with pytest.raises(Died):
        dying.broker.bury([Burial(claim.hold, "enough")])
    assert other.broker.claim("q", 1, LONG, wait=0.5) == []
    [record] = other.broker.records(Place.DEAD)
    assert record.reason == "enough"
    assert tickets(other) == 0
    assert other.broker.revive(["a"]) == [True]
    assert ids_of(claims(other.broker)) == ["a"]


def test_a_revival_that_died_after_its_ticket_leaves_the_dead_letter_and_can_be_repeated(
    dying: Backend, other: Backend
) -> None:
    keep(other.broker, "a")
    [claim] = claims(other.broker)
    other.broker.bury([Burial(claim.hold, "enough")])
    dies_at(dying, lambda at: at.jobs, "_amend")
    with pytest.raises(Died):
        dying.broker.revive(["a"])
    assert other.broker.claim("q", 1, LONG, wait=0.2) == []
    assert ids_of(other.broker.records(Place.DEAD)) == ["a"]
    assert other.broker.revive(["a"]) == [True]
    assert ids_of(claims(other.broker)) == ["a"]
    assert other.broker.claim("q", 1, LONG, wait=0.2) == []


def test_a_ticket_whose_record_never_came_is_dropped_in_the_end(
    dying: Backend, other: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(other.broker, "a")
    [claim] = claims(other.broker)
    other.broker.bury([Burial(claim.hold, "enough")])
    dies_at(dying, lambda at: at.jobs, "_amend")
    with pytest.raises(Died):
        dying.broker.revive(["a"])
    monkeypatch.setattr(claiming, "_STILLBORN", 0.0)
    assert other.broker.claim("q", 1, LONG, wait=0.2) == []
    assert tickets(other) == 0
    assert ids_of(other.broker.records(Place.DEAD)) == ["a"]


def test_a_revival_that_died_before_the_list_was_cleared_has_revived_the_job_once(
    dying: Backend, other: Backend
) -> None:
    keep(other.broker, "a")
    [claim] = claims(other.broker)
    other.broker.bury([Burial(claim.hold, "enough")])
    dies_at(dying, lambda at: at.jobs._tickets, "take_away")
    with pytest.raises(Died):
        dying.broker.revive(["a"])
    assert other.broker.records(Place.DEAD) == []
    assert other.broker.revive(["a"]) == [False]
    assert ids_of(claims(other.broker)) == ["a"]


@pytest.mark.parametrize("delay", [0.0, 0.2])
def test_a_removal_that_died_before_the_ticket_was_taken_away_has_removed_the_job(
    dying: Backend, other: Backend, delay: float
) -> None:
    keep(other.broker, "a", delay=delay)
    dies_at(dying, lambda at: at.jobs._tickets, "take_away")
    with pytest.raises(Died):
        dying.broker.cancel(["a"])
    assert other.broker.find(["a"]) == [None]
    assert other.broker.cancel(["a"]) == [CancelAnswer.UNKNOWN]
    assert other.broker.claim("q", 1, LONG, wait=0.4) == []
    assert tickets(other) == 0
    keep(other.broker, "a")
    assert ids_of(claims(other.broker)) == ["a"]


def test_a_move_of_what_is_due_that_died_half_way_is_done_by_another(dying: Backend, other: Backend) -> None:
    keep(dying.broker, "a", delay=0.05)
    until(lambda: dying.broker.counts()["q"].ready == 1)
    dies_at(dying, lambda at: at.jobs._tickets, "_take_from_index")
    with pytest.raises(Died):
        dying.broker.claim("q", 1, LONG)
    [claim] = claims(other.broker)
    assert other.broker.ack([claim.hold]) == [True]
    assert other.broker.claim("q", 1, LONG, wait=0.3) == []
    assert tickets(other) == 0
    assert other.broker.counts() == {}


def test_what_was_scheduled_while_nobody_listened_is_found_when_it_is_due(
    dying: Backend, other: Backend, connect: Callable[[], Backend]
) -> None:
    keep(dying.broker, *"abc", delay=0.2)
    dying.close()
    assert sorted(ids_of(claims(connect().broker, 3))) == ["a", "b", "c"]


def test_a_bell_that_nobody_heard_delays_a_job_by_a_fraction_of_a_second(
    dying: Backend, other: Backend
) -> None:
    dies_at(dying, lambda at: at.jobs._bells, "ring")
    with pytest.raises(Died):
        dying.broker.enqueue_many([Message("a", "q", b"")])
    assert ids_of(other.broker.claim("q", 1, LONG, wait=5.0)) == ["a"]


def test_a_consumer_that_somebody_deleted_is_made_anew(dying: Backend, other: Backend) -> None:
    keep(other.broker, "a", "b")
    [first] = claims(other.broker)
    inside(
        dying,
        lambda at: at.session.ask_one(f"$JS.API.CONSUMER.DELETE.{at._layout.ready_stream}.q=p0"),
    )
    assert ids_of(other.broker.claim("q", 1, LONG, wait=1.0)) == ["b"]
    assert other.broker.ack([first.hold]) == [True]


def test_settled_jobs_and_old_outcomes_are_swept_away(dying: Backend) -> None:
    broker, results = dying.broker, dying.results
    keep(broker, *(f"{i}" for i in range(40)))
    keep(broker, "later", delay=60.0)
    assert broker.ack([claim.hold for claim in claims(broker, 30)]) == [True] * 30
    results.save_many([Outcome(f"{i}", "q", "t", OutcomeState.SUCCEEDED, keep=0.01) for i in range(20)])
    results.save_many([Outcome("kept", "q", "t", OutcomeState.SUCCEEDED)])
    assert inside(dying, lambda at: at.jobs.sweep(60.0)) == 0
    time.sleep(0.05)
    assert inside(dying, lambda at: at.jobs.sweep(0.0)) == 30
    assert inside(dying, lambda at: at.results.sweep(0.0)) == 20
    assert len(broker.records(Place.READY)) == 10
    assert ids_of(broker.records(Place.SCHEDULED)) == ["later"]
    assert results.counts() == {OutcomeState.SUCCEEDED: 1}


def test_sweeping_goes_on_by_itself_as_jobs_are_settled(
    dying: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cells(at: Any) -> int:
        answer = await at.session.ask_one(f"$JS.API.STREAM.INFO.{at._layout.jobs_stream}")
        return int(answer["state"]["messages"])

    monkeypatch.setattr(nats_cells, "_GRACE", 0.0)
    for turn in range(4):
        keep(dying.broker, *(f"{turn}-{i}" for i in range(200)))
        dying.broker.ack([claim.hold for claim in claims(dying.broker, 200)])
    until(lambda: inside(dying, cells) < 500)


@pytest.mark.parametrize(
    "name", ["", ".", "*", ">", "a b", "a.b", "ü", "\n", "=", "x" * 500, "\U0001f600" * 100, "\udc80"]
)
def test_a_name_of_any_characters_is_one_token(name: str) -> None:
    token = token_of(name)
    assert 0 < len(token) <= 100
    assert not set(token) & set(" .*>\t\r\n/\\")


def test_different_names_have_different_tokens() -> None:
    names = [
        "a",
        "A",
        "=61",
        "a=",
        "",
        "=",
        "==",
        "a.b",
        "a=2Eb",
        "ü",
        "u",
        *("x" * n for n in range(90, 200)),
    ]
    assert len({token_of(name) for name in names}) == len(names)


def test_streams_that_another_process_makes_at_the_same_moment_are_taken(
    connect: Callable[[], Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(connect().broker, "job")
    ask, asked = Session.ask, []

    async def meet_another(self: Session, questions: Sequence[Question]) -> list[Answer]:
        answers = await ask(self, questions)
        made = [subject for subject, _, _ in questions if ".STREAM.CREATE." in subject]
        asked.append(made)
        # What the server says if the other's stream comes between its looks for the name and for the subjects.
        overlap = {"code": 400, "err_code": 10065, "description": "subjects overlap with an existing stream"}
        return answers if len(asked) > 1 else [{"error": overlap} for _ in made[:2]] + answers[2:]

    monkeypatch.setattr(Session, "ask", meet_another)
    assert ids_of(claims(connect().broker, 1)) == ["job"]
    assert asked[1] == asked[0][:2]


def test_no_message_of_a_stream_is_asked_for_while_others_are_still_making_it(
    connect: Callable[[], Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server says of such a stream that it is there, and falls when it is asked for a message of it (2.9.10)."""
    ask, asked = Session.ask, []

    async def meet_another(self: Session, questions: Sequence[Question]) -> list[Answer]:
        is_first = not asked
        asked.extend(subject for subject, _, _ in questions)
        made = [one for one in questions if not (is_first and one[0].endswith("-index"))]
        answers = await ask(self, made)
        return answers if len(made) == len(questions) else [*answers[:2], {"did_create": False}, *answers[2:]]

    monkeypatch.setattr(Session, "ask", meet_another)
    keep(connect().broker, "job")
    creations = [at for at, subject in enumerate(asked) if ".STREAM.CREATE." in subject]
    assert len(creations) == 10
    assert asked[creations[2]].endswith("-index")
    assert next(at for at, subject in enumerate(asked) if ".MSG.GET." in subject) > creations[-1]


def test_a_stream_of_somebody_else_that_has_our_subjects_is_an_error_that_names_ours(
    connect: Callable[[], Backend], nats_server: NatsServer, namespace: str
) -> None:
    stream = f"{namespace}-strange"
    config = json.dumps({"name": stream, "subjects": [f"{namespace}-a.jobs.x"]}).encode()
    create = f"$JS.API.STREAM.CREATE.{stream}"
    assert "error" not in inside(connect(), lambda at: at.session.ask_one(create, config))
    with pytest.raises(ConfigError, match=f"{namespace}-a-jobs: subjects overlap"):
        backends.connect(nats_server.url, f"{namespace}-a")
