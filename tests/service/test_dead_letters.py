"""Dead letters are kept for a time and up to a number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from watching import wait_until

from bulkhead import App, ConfigError
from bulkhead.backends.base import Burial, Message, Place
from bulkhead.service import dead_letters
from bulkhead.service.dead_letters import DeadLetters


@pytest.fixture
def url(backend: str, tmp_path: Any) -> str:
    kinds = {"memory": f"memory://{uuid4().hex}", "sqlite": f"sqlite:///{tmp_path}/jobs.db"}
    return kinds.get(backend, backend)


@pytest.fixture
def app(url: str) -> Iterator[App]:
    made = App(url, namespace=uuid4().hex[:12])
    yield made
    made.close()


def bury(app: App, n: int, queue: str = "q") -> None:
    broker = app.backend.broker
    broker.enqueue_many([Message(f"{queue}{at:03}", queue, b"") for at in range(n)])
    buried = 0
    while buried < n:
        claims = broker.claim(queue, n, 60.0)
        for claim in claims:  # Why one by one: those of one call may be in any order
            broker.bury([Burial(claim.hold, "why")])
        buried += len(claims)


def dead(app: App) -> set[str]:
    return {one.id for one in app.backend.broker.records(Place.DEAD, limit=1000)}


def test_the_oldest_beyond_the_number_are_deleted(app: App) -> None:
    bury(app, 130)
    bury(app, 5, "other")
    app.max_dead = 10
    assert DeadLetters(app).sweep() == 125
    assert dead(app) == {f"other{at:03}" for at in range(5)} | {f"q{at:03}" for at in range(125, 130)}
    assert DeadLetters(app).sweep() == 0


def test_those_that_are_too_old_are_deleted(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    bury(app, 130)
    assert DeadLetters(app).sweep() == 0
    app.keep_dead = 1e-6
    wait_until(lambda: DeadLetters(app).sweep() and not dead(app), "all are too old")


def test_a_look_that_takes_long_leaves_the_rest_for_the_next_one(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "_LOOK", 0.0)
    monkeypatch.setattr(dead_letters, "_SOON", 0.0)
    bury(app, 130)
    app.max_dead, app.keep_dead = 10, None
    letters = DeadLetters(app)
    for n_left in (30, 10, 10):
        letters.look_now_and_then()
        assert len(dead(app)) == n_left


def test_without_bounds_all_are_kept(app: App) -> None:
    bury(app, 3)
    app.max_dead = app.keep_dead = None
    assert DeadLetters(app).sweep() == 0
    assert len(dead(app)) == 3


def test_a_worker_looks_when_it_starts(service: Any) -> None:
    bury(service.app, 20)
    service.app.max_dead = 5
    with service.working():
        wait_until(lambda: len(dead(service.app)) == 5, "those beyond are deleted")


@pytest.mark.parametrize(
    "options", [{"max_dead": -1}, {"max_dead": "5"}, {"keep_dead": 0}, {"keep_dead": "1d"}]
)
def test_a_bad_bound_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        App("memory://", **options)
