"""The timeline's page in a real browser."""

from __future__ import annotations

import gc
import itertools
import os
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from browsers import Page, open_browser
from jobs import fail, nap, nothing
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from traces import Traces
from watching import wait_until, wait_until_whole

from bulkhead import Dispatcher, Job, Pool, RetryPolicy
from bulkhead.instrumentation.timeline import Timeline
from bulkhead.spans import BarrierMark, Span, TimelinePool, WorkerLife


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """As for other tests, but around all of these: a browser has other processes from one moment to the next."""
    before = Traces.now()
    yield
    gc.collect()
    wait_until(lambda: not Traces.now().beyond(before), "the end of all that the browser was")


@pytest.fixture(scope="module")
def browser(_nothing_is_left_behind: None) -> Iterator[webdriver.Chrome]:
    with open_browser() as chrome:
        yield chrome


@pytest.fixture(scope="module")
def run() -> Timeline:
    """A run of two pools and two phases, with all colours."""
    pools = [Pool(0, 2, name="wide", backlog=None), Pool(1, 1, name="urgent", backlog=None)]
    with Dispatcher(pools) as disp:
        wait_until_whole(disp)
        wait_until_whole(disp, 1)
        for _ in range(6):
            disp.dispatch(Job(nap, 0.08))
        disp.dispatch(Job(fail).options(retry=RetryPolicy(2, initial=0.01)))
        disp.dispatch(Job(_die).options(id="the <b>crash</b>"))
        disp.dispatch(Job(time.sleep, 60).options(timeout=0.3))
        hung = disp.dispatch(Job(time.sleep, 60).options(priority=1))
        wait_until(lambda: hung.status().started_at is not None, "the start")
        nap(0.1)
        hung.cancel()
        disp.barrier(check=False)
        assert len(list(disp.map(abs, range(300), chunksize=100))) == 300
        for _ in range(200):
            disp.dispatch(Job(nothing))
        disp.barrier(check=False)
    return disp.timeline()


@pytest.fixture
def page(browser: webdriver.Chrome, run: Timeline, tmp_path: Path) -> Page:
    run.save_html(tmp_path / "timeline.html", title="A run & its end")
    return Page(browser, tmp_path / "timeline.html")


def index_of(run: Timeline, function: str, outcome: str) -> int:
    return next(k for k, s in enumerate(run.spans) if (s.function, s.outcome) == (function, outcome))


def test_there_is_a_lane_for_each_worker_and_the_page_needs_nothing_else(page: Page, run: Timeline) -> None:
    assert page.run("return document.title") == "A run & its end"
    assert page.run("return bulkheadTimeline.lanes") == 3
    assert page.run("return performance.getEntriesByType('resource').length") == 0
    assert page.complaints() == []
    heights = [page.spot(k)[1] for k, span in enumerate(run.spans) if span.pool == 1]
    others = [page.spot(k)[1] for k, span in enumerate(run.spans) if span.pool == 0]
    assert max(heights) < min(others)
    assert len({*heights, *others}) == 3


def test_each_outcome_has_its_colour_and_its_number(page: Page, run: Timeline) -> None:
    legend = page.text("legend")
    total: dict[str, int] = {}
    for pool in run.summary():
        for outcome, number in pool.outcomes.items():
            total[outcome] = total.get(outcome, 0) + number
    assert total["retried"] == total["crashed"] == total["timed out"] == total["cancelled"] == 1
    for outcome, number in total.items():
        assert f"{outcome} {number:,}" in legend

    drawn = {
        outcome: page.colour(index_of(run, function, outcome))
        for function, outcome in [
            ("nap", "succeeded"),
            ("sleep", "timed out"),
            ("sleep", "cancelled"),
        ]
    }
    style = "return getComputedStyle(document.documentElement).getPropertyValue('--' + arguments[0]).trim()"
    assert drawn == {outcome: page.run(style, outcome.replace(" ", "-")) for outcome in drawn}


def test_pointing_at_an_attempt_tells_what_is_known_of_it(page: Page, run: Timeline) -> None:
    late = index_of(run, "sleep", "timed out")
    assert page.run("return document.getElementById('tip').hidden")
    page.point(*page.spot(late))
    tip = page.text("tip").splitlines()
    told = dict(zip(tip[::2], tip[1::2], strict=True))
    assert told["job"] == str(run.spans[late].job)
    assert told["function"] == "sleep"
    assert told["state"] == "timed out"
    assert told["attempt"] == "1"
    assert told["duration"].endswith(" ms")
    assert told["queue wait"].endswith(" ms")
    assert told["pool"].startswith("wide, slot ")
    assert told["error"].startswith(f"JobTimeout: job {told['job']} ran longer than 0.3 s")

    page.point(5, 5)
    assert page.run("return document.getElementById('tip').hidden")


def test_what_a_job_is_called_is_text_and_no_markup(page: Page, run: Timeline) -> None:
    crash = index_of(run, "_die", "crashed")
    page.push("fit")
    assert page.run("return document.querySelectorAll('#failures b').length") == 0
    assert "the <b>crash</b>" in page.text("failures")
    assert run.spans[crash].job == "the <b>crash</b>"


def test_a_barrier_is_marked_and_tells_its_phase(page: Page, run: Timeline) -> None:
    first = run.barriers[0]
    x, y = page.run(
        "const v = bulkheadTimeline.view, c = document.getElementById('lanes').getBoundingClientRect();"
        "return [132 + (arguments[0] * 1e6 - v.from) / (v.to - v.from) * (c.width - 140) + c.left, c.top + 45]",
        first.ended,
    )
    page.point(int(x), int(y))
    tip = page.text("tip")
    assert "1, all pools" in tip
    assert f"{first.succeeded} succeeded, {first.failed} failed, 1 cancelled" in tip


def test_the_wheel_zooms_where_the_pointer_is_and_the_buttons_zoom_back(page: Page, run: Timeline) -> None:
    span = index_of(run, "sleep", "timed out")
    before = page.view
    x, y = page.spot(span)
    for _ in range(4):
        page.wheel(x, y, -200)
    begin, end = page.view
    assert end - begin < (before[1] - before[0]) / 3
    assert begin < run.spans[span].ended
    assert end > run.spans[span].began
    assert page.text("range").startswith("showing ")

    page.push("zoom-out")
    assert page.view[1] - page.view[0] == pytest.approx((end - begin) / 0.6)
    page.push("fit")
    assert page.view == pytest.approx(before)
    page.push("zoom-in")
    page.push("right")
    assert page.view[0] > before[0]
    assert page.complaints() == []


def test_dragging_moves_and_with_shift_zooms_to_the_range(page: Page) -> None:
    page.push("zoom-in")
    page.push("zoom-in")
    before = page.view
    _, y = page.spot(0) if page.is_in_sight(0) else (0, 200)
    page.drag(700, y, 300)
    moved = page.view
    assert moved[0] < before[0]
    assert moved[1] - moved[0] == pytest.approx(before[1] - before[0])

    page.drag(600, y, 200, shift=True)
    chosen = page.view
    assert chosen[0] > moved[0]
    assert chosen[1] < moved[1]
    assert (chosen[1] - chosen[0]) / (moved[1] - moved[0]) == pytest.approx(200 / 1222, rel=0.1)


def test_the_keyboard_alone_is_enough(page: Page, run: Timeline) -> None:
    page.run("document.getElementById('lanes').focus()")
    before = page.view
    page.press("+", "+", Keys.ARROW_RIGHT)
    assert page.view[1] - page.view[0] == pytest.approx((before[1] - before[0]) * 0.36)
    page.press("0")
    assert page.view == pytest.approx(before)

    # Down into the first lane of the other pool, then from one attempt to the next.
    page.press(Keys.ARROW_DOWN, ".")
    first = page.text("detail")
    page.press(".")
    assert page.text("detail") != first
    assert "wide, slot 0" in first
    page.press(",")
    assert page.text("detail") == first
    assert page.complaints() == []


def test_the_failures_lead_to_their_place(page: Page, run: Timeline) -> None:
    failed = index_of(run, "fail", "failed")
    rows = page.run("return [...document.querySelectorAll('#failures tr')].map(row => row.innerText)")
    assert len(rows) - 1 == sum(span.outcome != "succeeded" for span in run.spans)
    page.run(
        "const rows = [...document.querySelectorAll('#failures tr')];"
        "rows.find(row => row.innerText.includes('failed')).querySelector('button').click()"
    )
    assert page.is_in_sight(failed)
    begin, end = page.view
    # One that is wide enough to be seen is not looked at more closely.
    span = run.spans[failed]
    assert end - begin < run.seconds / 3 or span.ended - span.began > run.seconds / 50
    assert "ValueError: no luck" in page.text("detail")


def test_the_tables_say_how_busy_the_pools_were_and_how_long_jobs_waited(page: Page, run: Timeline) -> None:
    cells = page.run(
        "const rows = [...document.querySelectorAll('#pools tr')];"
        "return rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    )
    assert cells[0] == ["pool", "workers", "jobs", "busy", "utilisation", "queue wait p50", "p95", "max"]
    _, wide = run.summary()
    assert cells[1][0] == "urgent"
    assert cells[2][:3] == ["wide", "2", f"{wide.attempts} (300 items)"]
    assert cells[2][4] == f"{round(wide.utilisation * 100)} %"
    assert cells[2][7].endswith((" ms", " s"))
    slowest = page.run("return document.querySelectorAll('#slowest tr')[1].innerText").split("\t")
    longest = max((span for span in run.spans if span.jobs == 1), key=lambda span: span.seconds)
    assert " ".join(slowest[0].split()) == f"{longest.job} {longest.function}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_a_light_and_on_a_dark_page(page: Page, scheme: str) -> None:
    page.prefer(scheme)
    colours = page.run(
        "const of = (s, p) => getComputedStyle(document.querySelector(s))[p];"
        "return [of('body', 'backgroundColor'), of('body', 'color'), of('.card', 'backgroundColor'), of('th', 'color')]"
    )
    ground, text, card, soft = map(_luminance, colours)
    assert (ground < 0.2) == (scheme == "dark")
    assert _contrast(text, ground) > 7
    assert _contrast(text, card) > 7
    assert _contrast(soft, card) > 4.5
    page.prefer("light")


def test_a_small_window_shows_all_of_it(page: Page) -> None:
    page.prefer("light", width=390)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    assert page.run("return document.getElementById('lanes').getBoundingClientRect().width") < 390
    page.prefer("light")


def test_a_hundred_thousand_attempts_can_be_moved_about_in(browser: webdriver.Chrome, tmp_path: Path) -> None:
    timeline = _large(100_000)
    began = time.monotonic()
    timeline.save_html(tmp_path / "large.html")
    written = time.monotonic() - began
    page = Page(browser, tmp_path / "large.html")
    opened = time.monotonic() - began - written
    assert page.run("return document.getElementsByTagName('*').length") < 3000
    frames = [
        page.run("const t = performance.now(); paint(); return performance.now() - t") for _ in range(5)
    ]
    for _ in range(12):
        page.wheel(900, 300, -300)
    begin, end = page.view
    assert end - begin < timeline.seconds / 100
    assert page.complaints() == []
    size = (tmp_path / "large.html").stat().st_size / 1e6
    print(
        f"100,000 spans: {size:.1f} MB, written in {written:.1f} s, open in {opened:.1f} s, "
        f"a frame in {min(frames):.0f} ms"
    )
    assert min(frames) < 500
    assert "succeeded 99,897" in page.text("legend")


def test_a_page_that_does_not_show_the_beginning_says_so(browser: webdriver.Chrome, tmp_path: Path) -> None:
    with Dispatcher([Pool(0, 1, name="wide")], max_timeline=3) as disp:
        for _ in range(8):
            disp.dispatch(Job(fail))
        disp.barrier(check=False)
    disp.timeline().save_html(tmp_path / "cut.html")
    page = Page(browser, tmp_path / "cut.html")
    since = disp.timeline().pools[0].since
    assert page.text("notes").startswith(f"wide: attempts are shown from {since * 1000:.3g} ms on")
    assert page.complaints() == []


def test_an_empty_run_has_a_page(browser: webdriver.Chrome, tmp_path: Path) -> None:
    with Dispatcher([Pool(0, 2)]) as disp:
        wait_until_whole(disp)
    disp.timeline().save_html(tmp_path / "empty.html")
    page = Page(browser, tmp_path / "empty.html")
    assert "No attempt was recorded" in page.text("about")
    assert page.complaints() == []


def _large(n: int) -> Timeline:
    """A day of work of 3 pools of 8 workers."""
    draw = random.Random(7)
    spans: list[Span] = []
    now = {(pool, slot): 1.0 for pool in range(3) for slot in range(8)}
    for number in range(n):
        place = min(now, key=now.__getitem__) if number % 50 == 0 else draw.choice(list(now))
        began = now[place] + draw.random() * 0.01
        ended = now[place] = began + draw.lognormvariate(-2, 1.5)
        outcome = "failed" if draw.random() < 0.001 else "succeeded"
        error = "ValueError: no luck" if outcome == "failed" else None
        spans.append(
            Span(
                *place,
                1,
                1000,
                number,
                f"step_{number % 9}",
                1,
                began,
                ended,
                draw.random(),
                outcome,
                error,
                busy_seconds=ended - began,
            )
        )
    end = max(now.values())
    lives = [WorkerLife(pool, slot, 1, 1000 + slot, 0.0, 0.5) for pool, slot in now]
    pools = [TimelinePool(pool, f"pool {pool}", 8, 0.0) for pool in range(3)]
    marks = [BarrierMark(None, at - 1, at, 10, 0, 0) for at in itertools.accumulate([end / 5] * 4)]
    return Timeline(datetime.now(UTC), end, tuple(pools), tuple(spans), tuple(lives), tuple(marks))


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour[4:-1].split(",")]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def _die() -> None:
    os._exit(3)
