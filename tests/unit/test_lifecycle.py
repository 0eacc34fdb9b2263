"""The table of states, and its picture in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bulkhead import JobState
from bulkhead._kernel import lifecycle

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "lifecycle.md"

# Event by event: from which states, None being a job that is not accepted yet, to which.
PROMISED = {
    "be accepted": ({None}, "queued"),
    "be scheduled": ({None}, "scheduled"),
    "become due": ({"scheduled", "retrying"}, "queued"),
    "start": ({"queued"}, "running"),
    "return unread": ({"running"}, "queued"),
    "succeed": ({"running"}, "succeeded"),
    "be retried": ({"running"}, "retrying"),
    "fail": ({"scheduled", "queued", "running", "retrying"}, "failed"),
    "be cancelled": ({"scheduled", "queued", "running", "retrying"}, "cancelled"),
}


def test_the_states_are_the_promised_words() -> None:
    assert [str(state) for state in JobState] == [
        "scheduled",
        "queued",
        "running",
        "retrying",
        "succeeded",
        "failed",
        "cancelled",
    ]
    assert {"succeeded", "failed", "cancelled"} == lifecycle.SETTLED


@pytest.mark.parametrize("event", lifecycle.EVENTS, ids=lambda event: event.name)
@pytest.mark.parametrize("before", [None, *JobState], ids=lambda state: state or "new")
def test_each_event_moves_a_job_as_promised_or_is_refused(
    event: lifecycle.Event, before: JobState | None
) -> None:
    allowed, after = PROMISED[event.name]
    if before in allowed:
        assert event[before] == after
    else:
        with pytest.raises(AssertionError, match=f"a {before} job cannot {event.name}"):
            event[before]


def test_no_event_leads_out_of_a_settled_state() -> None:
    assert {event.name for event in lifecycle.EVENTS} == set(PROMISED)
    assert not [event.name for event in lifecycle.EVENTS for before in event if before in lifecycle.SETTLED]


@pytest.mark.parametrize("state", [state for state in JobState if state not in lifecycle.SETTLED])
@pytest.mark.parametrize("end", sorted(lifecycle.SETTLED))
def test_every_unsettled_state_has_a_way_to_every_settled_one(state: JobState, end: JobState) -> None:
    reached = {state}
    for _ in JobState:
        reached |= {event[before] for event in lifecycle.EVENTS for before in event if before in reached}
    assert end in reached


def test_the_diagram_of_the_documentation_is_the_table() -> None:
    found = re.search(r"```mermaid\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    assert found[1] == lifecycle.diagram()


def test_the_documentation_explains_each_state() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not [state for state in JobState if f"**{state}**" not in text]
