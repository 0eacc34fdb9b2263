"""When schedules are due, and what is made of runs that were missed: pure, with instants given."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkhead.errors import ConfigError, ConfigTypeError
from bulkhead.service.timing import MOST_RUNS, Decision, decide, timing, zone_name

SECOND, MINUTE, HOUR, DAY = 1000, 60_000, 3_600_000, 86_400_000
BERLIN, NEW_YORK = "Europe/Berlin", "America/New_York"


def at(text: str, zone: str = "UTC") -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp() * 1000)


def local(instant: int, zone: str) -> str:
    return datetime.fromtimestamp(instant / 1000, ZoneInfo(zone)).isoformat(" ", "minutes")


def runs(when: str, zone: str, start: str, n: int) -> list[str]:
    made, instant, found = timing(when, zone), at(start, zone), []
    for _ in range(n):
        instant = made.after(instant)
        found.append(local(instant, zone))
    return found


@pytest.mark.parametrize(
    ("nickname", "fields"),
    [
        ("@hourly", "0 * * * *"),
        ("@daily", "0 0 * * *"),
        ("@midnight", "0 0 * * *"),
        ("@weekly", "0 0 * * 0"),
        ("@monthly", "0 0 1 * *"),
        ("@yearly", "0 0 1 1 *"),
        ("@annually", "0 0 1 1 *"),
    ],
)
def test_a_nickname_means_its_fields(nickname, fields):
    start = at("2026-02-11 10:17")
    assert timing(nickname).after(start) == timing(fields).after(start)


@pytest.mark.parametrize(
    ("when", "first"),
    [
        ("30 2 * * *", "2026-02-12 02:30+00:00"),
        ("*/20 10 * * *", "2026-02-11 10:20+00:00"),
        ("0 12 * * mon-fri", "2026-02-11 12:00+00:00"),
        ("0 0 29 2 *", "2028-02-29 00:00+00:00"),
        ("0  0\t1 JAN *", "2027-01-01 00:00+00:00"),
    ],
)
def test_five_fields_mean_what_cron_says(when, first):
    assert local(timing(when).after(at("2026-02-11 10:17")), "UTC") == first


class TestEvery:
    @pytest.mark.parametrize(
        ("text", "period"),
        [
            ("@every 10s", 10 * SECOND),
            ("@every 5m", 5 * MINUTE),
            ("@every 1h30m", 90 * MINUTE),
            ("@every 2d", 2 * DAY),
            ("@every 1d 2h 3m 4s", DAY + 2 * HOUR + 3 * MINUTE + 4 * SECOND),
            ("@EVERY 90s", 90 * SECOND),
        ],
    )
    def test_counts_whole_periods_from_its_anchor(self, text, period):
        made = timing(text, anchor=123)
        assert [made.after(123), made.after(123 + period - 1), made.after(123 + period)] == [
            123 + period,
            123 + period,
            123 + 2 * period,
        ]

    @pytest.mark.parametrize("zone", [BERLIN, NEW_YORK])
    def test_goes_by_real_time_over_a_clock_change(self, zone):
        made = timing("@every 1h", zone, at("2026-03-29 00:00", zone))
        found = [made.after(at("2026-03-29 00:00", zone))]
        for _ in range(5):
            found.append(made.after(found[-1]))
        assert {later - earlier for earlier, later in pairwise(found)} == {HOUR}

    @given(
        period=st.integers(1, 10_000_000),
        anchor=st.integers(0, 2**41),
        since=st.integers(-(10**10), 10**12),
    )
    def test_the_next_is_the_first_multiple_that_is_later(self, period, anchor, since):
        made, instant = timing(f"@every {period}s", anchor=anchor), anchor + since
        due, step = made.after(instant), period * SECOND
        assert due > instant
        assert (due - anchor) % step == 0
        assert due > anchor
        assert due - step <= max(instant, anchor)


class TestClockChanges:
    """Europe/Berlin: 2026-03-29 02:00 -> 03:00, 2026-10-25 03:00 -> 02:00. New York: 03-08 02:00, 11-01 02:00."""

    def test_a_time_that_berlin_does_not_have_comes_when_the_gap_ends(self):
        assert runs("30 2 * * *", BERLIN, "2026-03-28 00:00", 3) == [
            "2026-03-28 02:30+01:00",
            "2026-03-29 03:00+02:00",
            "2026-03-30 02:30+02:00",
        ]

    def test_a_time_that_new_york_does_not_have_comes_when_the_gap_ends(self):
        assert runs("30 2 * * *", NEW_YORK, "2026-03-07 00:00", 3) == [
            "2026-03-07 02:30-05:00",
            "2026-03-08 03:00-04:00",
            "2026-03-09 02:30-04:00",
        ]

    def test_a_time_that_berlin_has_twice_comes_once_the_first_time(self):
        assert runs("30 2 * * *", BERLIN, "2026-10-24 12:00", 2) == [
            "2026-10-25 02:30+02:00",
            "2026-10-26 02:30+01:00",
        ]

    def test_a_time_that_new_york_has_twice_comes_once_the_first_time(self):
        assert runs("30 1 * * *", NEW_YORK, "2026-10-31 12:00", 2) == [
            "2026-11-01 01:30-04:00",
            "2026-11-02 01:30-05:00",
        ]

    @pytest.mark.parametrize(
        ("zone", "second", "then"),
        [
            (BERLIN, datetime(2026, 10, 25, 1, 10, tzinfo=UTC), "2026-10-26 02:30+01:00"),
            (NEW_YORK, datetime(2026, 11, 1, 6, 10, tzinfo=UTC), "2026-11-02 02:30-05:00"),
        ],
    )
    def test_asked_in_the_second_of_the_two_hours_nothing_comes_again(self, zone, second, then):
        fields = "30 2 * * *" if zone == BERLIN else "30 1,2 * * *"
        due = timing(fields, zone).after(round(second.timestamp() * 1000))
        if zone == NEW_YORK:  # 02:30 is there once, an hour and a half after the clock was put back
            assert local(due, zone) == "2026-11-01 02:30-05:00"
        else:
            assert local(due, zone) == then

    def test_an_hourly_one_comes_in_both_of_the_two_hours_and_not_in_the_gap(self):
        assert runs("15 * * * *", BERLIN, "2026-10-25 01:20", 3) == [
            "2026-10-25 02:15+02:00",
            "2026-10-25 02:15+01:00",
            "2026-10-25 03:15+01:00",
        ]
        assert runs("15 * * * *", NEW_YORK, "2026-03-08 01:00", 2) == [
            "2026-03-08 01:15-05:00",
            "2026-03-08 03:15-04:00",
        ]

    @settings(max_examples=150, deadline=None)
    @given(
        fields=st.sampled_from(
            ["30 2 * * *", "15,45 1-3 * * *", "*/20 * * * *", "5 */2 * * *", "0 2,3 * * *", "*/15 2 * * *"]
        ),
        change=st.sampled_from(
            [
                (BERLIN, "2026-03-29 00:00"),
                (BERLIN, "2026-10-25 00:00"),
                (NEW_YORK, "2026-03-08 00:00"),
                (NEW_YORK, "2026-11-01 00:00"),
            ]
        ),
        offset=st.integers(0, 6 * HOUR),
    )
    def test_asked_at_any_moment_the_answer_is_the_next_of_one_sequence(self, fields, change, offset):
        zone, day = change
        start = at(day, zone)
        made, sequence = timing(fields, zone), [start]
        while sequence[-1] <= start + 6 * HOUR:
            sequence.append(made.after(sequence[-1]))
        assert all(earlier < later for earlier, later in pairwise(sequence))
        asked = start + offset
        assert made.after(asked) == next(due for due in sequence[1:] if due > asked)


class TestDecision:
    NOW = at("2026-02-11 10:00:00")

    def test_nothing_is_enqueued_before_it_is_due(self):
        assert decide(timing("@hourly"), self.NOW + 1, "all", self.NOW) == Decision((), self.NOW + 1)

    @pytest.mark.parametrize("missed", ["skip", "once", "all"])
    def test_what_is_due_is_enqueued_and_the_next_one_follows(self, missed):
        assert decide(timing("@hourly"), self.NOW, missed, self.NOW + 150) == Decision(
            (self.NOW,), self.NOW + HOUR
        )

    def test_a_late_run_is_skipped_after_thirty_seconds_if_that_is_the_policy(self):
        hourly = timing("@hourly")
        assert decide(hourly, self.NOW, "skip", self.NOW + 30_000).runs == (self.NOW,)
        assert decide(hourly, self.NOW, "skip", self.NOW + 30_001) == Decision((), self.NOW + HOUR)

    def test_of_missed_runs_the_last_is_enqueued_once(self):
        decision = decide(timing("@hourly"), self.NOW, "once", self.NOW + 5 * HOUR + 1)
        assert decision == Decision((self.NOW + 5 * HOUR,), self.NOW + 6 * HOUR)

    def test_all_missed_runs_are_enqueued_in_order(self):
        decision = decide(timing("@hourly"), self.NOW, "all", self.NOW + 3 * HOUR)
        assert decision == Decision(tuple(self.NOW + n * HOUR for n in range(4)), self.NOW + 4 * HOUR)

    @pytest.mark.parametrize("when", ["* * * * *", "@every 1s"])
    def test_no_more_than_the_last_thousand_are_caught_up_with_after_years(self, when):
        now = self.NOW + 3 * 365 * DAY
        decision = decide(timing(when, anchor=self.NOW), self.NOW + MINUTE, "all", now)
        assert len(decision.runs) == MOST_RUNS
        assert decision.runs[-1] == now
        assert len({later - earlier for earlier, later in pairwise(decision.runs)}) == 1

    @settings(max_examples=200, deadline=None)
    @given(
        when=st.sampled_from(["*/7 * * * *", "0 3 * * sun", "@every 13s", "@every 1h1m", "30 2 1 * *"]),
        zone=st.sampled_from(["UTC", BERLIN, NEW_YORK]),
        missed=st.sampled_from(["skip", "once", "all"]),
        waits=st.lists(st.integers(1, 40 * DAY), min_size=1, max_size=8),
    )
    def test_however_it_is_asked_no_run_comes_twice_and_each_is_one_of_the_sequence(
        self, when, zone, missed, waits
    ):
        made, now = timing(when, zone, self.NOW), self.NOW
        next_due, found = made.after(now), []
        for wait in waits:
            now += wait
            before, decision = next_due, decide(made, next_due, missed, now)
            found += decision.runs
            next_due = decision.next_due
            assert next_due > now
            assert all(before <= run <= now for run in decision.runs)
            if missed == "once" and before <= now:
                assert decision.runs == (made.last(1, before, now)[0],)
        assert all(earlier < later for earlier, later in pairwise(found))
        assert all(made.after(run - 1) == run for run in found)

    @given(start=st.integers(0, 3 * DAY), span=st.integers(0, 3 * DAY), n=st.integers(1, 50))
    @settings(max_examples=100, deadline=None)
    def test_the_last_ones_are_the_end_of_the_sequence(self, start, span, n):
        made = timing("17,18,40 */5 * * *", BERLIN)
        first = made.after(at("2026-03-27 00:00") + start)
        now, sequence = first + span, [first]
        while (due := made.after(sequence[-1])) <= now:
            sequence.append(due)
        assert made.last(n, first, now) == sequence[-n:]


class TestBadInput:
    @pytest.mark.parametrize(
        "when",
        [
            "",
            "* * * *",
            "* * * * * *",
            "60 * * * *",
            "* 24 * * *",
            "x * * * *",
            "*/0 * * * *",
            "5-1 * * * *",
            "0 0 30 2 *",
            "* * */20 * 1L",
            "@reboot",
            "@every",
            "@every 0s",
            "@every -5s",
            "@every 1.5s",
            "@every 5",
            "@every 5m3h",
            "@every 400d",
            "@every ٣s",
            "² * * * *",
        ],
    )
    def test_a_text_that_means_nothing_is_refused(self, when):
        with pytest.raises(ConfigError, match="when"):
            timing(when)

    def test_a_when_of_another_type_is_refused(self):
        with pytest.raises(ConfigTypeError, match="when must be a str"):
            timing(5)  # type: ignore[arg-type]

    @settings(max_examples=300, deadline=None)
    @given(st.one_of(st.text(max_size=20), st.text(alphabet="0123456789*/-,LW#@SUNeverysmhd ", max_size=24)))
    def test_any_text_is_a_schedule_or_a_config_error(self, text):
        try:
            made = timing(text)
        except ConfigError:
            return
        assert made.after(0) > 0

    @pytest.mark.parametrize("tz", ["Mars/Olympus", "", "../etc/passwd", "Europe", "a\0b"])
    def test_an_unknown_time_zone_is_refused(self, tz):
        with pytest.raises(ConfigError, match="tz must be"):
            zone_name(tz)

    @pytest.mark.parametrize("tz", [None, 3, timezone(timedelta(hours=1))])
    def test_a_time_zone_without_a_name_is_refused(self, tz):
        with pytest.raises(ConfigError, match="tz must be"):
            zone_name(tz)

    def test_a_zone_is_given_by_name_or_as_a_zoneinfo(self):
        assert [zone_name(ZoneInfo(BERLIN)), zone_name(BERLIN), zone_name(UTC)] == [BERLIN, BERLIN, "UTC"]
