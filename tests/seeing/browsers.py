"""A real browser without a window: Chromium, driven through its driver."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.keys import Keys

__all__ = ["Page", "open_browser"]

# What a browser in a container, beside other tests, should do without.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--force-device-scale-factor=1",
    "--hide-scrollbars",
    "--window-size=1400,1000",
)


@contextlib.contextmanager
def open_browser() -> Iterator[webdriver.Chrome]:
    """Start Chromium; without one the test is skipped, and fails under CI=true."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        reason = (
            "needs chromium and chromedriver (Debian: chromium, chromium-driver); `make test` installs them"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


class Page:
    """A timeline's page in a browser.

    Args:
        browser: The browser.
        path: The page.
    """

    def __init__(self, browser: webdriver.Chrome, path: Path) -> None:
        self._browser = browser
        browser.get(path.as_uri())
        self.run("return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, script: str, *args: Any) -> Any:
        """Run JavaScript and return what it returns."""
        return self._browser.execute_script(script, *args)

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        self.run("return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def text(self, name: str) -> str:
        return self._browser.find_element("id", name).text

    def complaints(self) -> list[str]:
        """What the page has written to the console."""
        return [entry["message"] for entry in self._browser.get_log("browser")]

    @property
    def view(self) -> tuple[float, float]:
        """From when to when the page shows, in seconds."""
        self.settle()
        view = self.run("return bulkheadTimeline.view")
        return view["from"] / 1e6, view["to"] / 1e6

    def spot(self, span: int) -> tuple[int, int]:
        """Return where the middle of a span is in the window."""
        self.settle()
        x, y = self.run(
            "const p = bulkheadTimeline.place(arguments[0]);"
            "const c = document.getElementById('lanes').getBoundingClientRect();"
            "return [p.x + c.left, p.y + c.top]",
            span,
        )
        return int(x), int(y)

    def is_in_sight(self, span: int) -> bool:
        self.settle()
        return self.run("return bulkheadTimeline.place(arguments[0]) !== null", span)

    def colour(self, span: int) -> str:
        """Return the colour that is drawn near the lower edge of a span, as #rrggbb."""
        self.settle()
        red, green, blue = self.run(
            "const p = bulkheadTimeline.place(arguments[0]), copy = document.createElement('canvas').getContext('2d');"
            "copy.drawImage(document.getElementById('lanes'), p.x, p.y + 8, 1, 1, 0, 0, 1, 1);"
            "return [...copy.getImageData(0, 0, 1, 1).data].slice(0, 3)",
            span,
        )
        return f"#{red:02x}{green:02x}{blue:02x}"

    def point(self, x: int, y: int) -> None:
        """Move the mouse there."""
        actions = ActionBuilder(self._browser, duration=20)
        actions.pointer_action.move_to_location(x, y)
        actions.perform()

    def drag(self, x: int, y: int, by: int, *, shift: bool = False) -> None:
        """Press the mouse button there, move so many pixels to the right, let go."""
        if shift:
            ActionChains(self._browser).key_down(Keys.SHIFT).perform()
        actions = ActionBuilder(self._browser, duration=20)
        pointer = actions.pointer_action
        pointer.move_to_location(x, y).pointer_down().move_to_location(x + by // 2, y)
        pointer.move_to_location(x + by, y).pointer_up()
        actions.perform()
        if shift:
            ActionChains(self._browser).key_up(Keys.SHIFT).perform()

    def click(self, x: int, y: int) -> None:
        actions = ActionBuilder(self._browser, duration=20)
        actions.pointer_action.move_to_location(x, y).pointer_down().pointer_up()
        actions.perform()

    def wheel(self, x: int, y: int, by: int) -> None:
        """Turn the wheel there; up is negative."""
        ActionChains(self._browser).scroll_from_origin(ScrollOrigin.from_viewport(x, y), 0, by).perform()

    def press(self, *keys: str) -> None:
        """Type into the chart."""
        self._browser.find_element("id", "lanes").send_keys(*keys)

    def push(self, name: str) -> None:
        """Click a button."""
        self._browser.find_element("id", name).click()

    def prefer(self, scheme: str, width: int = 1400) -> None:
        """Have the browser prefer "dark" or "light", in a window of so many columns."""
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self._browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        self._browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.settle()
