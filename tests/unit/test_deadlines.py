"""The heap of alarms against a sorted list, with alarms that become moot at any moment."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bulkhead._kernel.deadlines import Alarm, Deadlines

steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 9)),
        st.tuples(st.just("end"), st.integers(0, 30)),
        st.tuples(st.just("pop"), st.integers(0, 9)),
    ),
    max_size=60,
)


@given(steps)
def test_live_alarms_fire_in_the_order_of_their_instants_and_then_of_their_setting(
    todo: list[tuple[str, int]],
) -> None:
    live: dict[int, float] = {}
    deadlines = Deadlines(lambda alarm, subject, stamp: subject in live)
    for number, (step, argument) in enumerate(todo):
        if step == "add":
            live[number] = float(argument)
            deadlines.add(float(argument), Alarm.JOB_DUE, number)
        elif step == "end":
            live.pop(argument, None)
        else:
            due = sorted((instant, subject) for subject, instant in live.items() if instant <= argument)
            expected = (Alarm.JOB_DUE, due[0][1]) if due else None
            assert deadlines.pop(float(argument)) == expected
            if due:
                del live[due[0][1]]
        assert deadlines.next() == min(live.values(), default=None)


def test_nothing_fires_before_its_instant() -> None:
    deadlines = Deadlines(lambda alarm, subject, stamp: True)
    deadlines.add(2.0, Alarm.TIMEOUT, "job")
    assert deadlines.pop(1.999) is None
    assert deadlines.pop(2.0) == (Alarm.TIMEOUT, "job")
    assert deadlines.pop(3.0) is None


def test_moot_alarms_are_swept_out_though_they_never_come_to_the_top() -> None:
    live: set[int] = {-1}
    deadlines = Deadlines(lambda alarm, subject, stamp: subject in live)
    deadlines.add(0.0, Alarm.JOB_DUE, -1)
    for number in range(10_000):
        live.add(number)
        deadlines.add(1.0 + number, Alarm.TIMEOUT, number, number)
        live.discard(number)
        assert len(deadlines) <= 257


def test_sweeping_keeps_every_live_alarm() -> None:
    deadlines = Deadlines(lambda alarm, subject, stamp: subject % 3 == 0)
    for number in range(3000):
        deadlines.add(float(-number), Alarm.JOB_DUE, number)
    fired = []
    while (entry := deadlines.pop(0.0)) is not None:
        fired.append(entry[1])
    assert fired == list(range(2997, -1, -3))
    assert len(deadlines) == 0
