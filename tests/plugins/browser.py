"""Headless Chromium from the system, driven by Selenium."""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium.common.exceptions import TimeoutException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run",
    "--window-size=1280,900",
)  # fmt: skip


class Browser(Chrome):
    """Selenium's driver of Chromium with helpers that name elements by CSS selectors."""

    def script(self, text: str, *arguments: Any) -> Any:
        """Return the result of a JavaScript function with this body."""
        return self.execute_script(text, *arguments)

    def text(self, selector: str = "body") -> str:
        """Return the visible text of the first element; empty if there is none."""
        return next(iter(self.texts(selector)), "")

    def texts(self, selector: str) -> list[str]:
        """Return the visible text of each element."""
        found = "return [...document.querySelectorAll(arguments[0])].map((each) => each.innerText)"
        return list(self.script(found, selector))

    def click(self, selector: str) -> None:
        """Click an element; fails if another element covers the element."""
        self.find_element(By.CSS_SELECTOR, selector).click()

    def write(self, selector: str, text: str) -> None:
        """Type into a field, or name the file of a file field."""
        self.find_element(By.CSS_SELECTOR, selector).send_keys(text)

    def fill(self, selector: str, text: str) -> None:
        """Replace the content of a field."""
        self.find_element(By.CSS_SELECTOR, selector).clear()
        self.write(selector, text)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option by its value."""
        options = self.find_elements(By.CSS_SELECTOR, f"{selector} option")
        next(each for each in options if each.get_property("value") == value).click()

    def accept_dialog(self) -> str:
        """Accept a dialog and return its question."""
        dialog = self.switch_to.alert
        asked = str(dialog.text)
        dialog.accept()
        return asked

    def until(self, expression: str, seconds: float = 60.0, *arguments: Any) -> Any:
        """Wait until a JavaScript expression is true and return its value."""
        try:
            return WebDriverWait(self, seconds, 0.2).until(
                lambda page: page.script(f"return ({expression})", *arguments)
            )
        except TimeoutException:
            raise AssertionError(f"not within {seconds} s: {expression}\n{self.text()}") from None

    def until_text(self, text: str, selector: str = "body", seconds: float = 60.0) -> None:
        """Wait until an element shows a text."""
        shown = "[...document.querySelectorAll(arguments[1])].map((each) => each.innerText)"
        self.until(f"{shown}.some((each) => each.includes(arguments[0]))", seconds, text, selector)

    def open_console(self, url: str) -> None:
        """Open the console at ``url`` without the storage and log of earlier pages."""
        self.get(f"{url}/console/")
        self.script("sessionStorage.clear(); localStorage.clear()")
        self.get("about:blank")
        self.get(f"{url}/")
        self.resize(1280, 900)
        self.log()

    def sign_in(self, key: str) -> None:
        """Sign in to the console."""
        self.until_text("Sign in", "h1")
        self.fill("#key", key)
        self.click(".sign-in button")
        self.until_text("Sign out", "#account")

    def resize(self, width: int, height: int) -> None:
        """Set the size of the page in CSS pixels, which may be narrower than a window can be."""
        values = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", values)

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        values = {"captureBeyondViewport": True, "format": "png"}
        found = self.execute_cdp_cmd("Page.captureScreenshot", values)
        path.write_bytes(base64.b64decode(found["data"]))

    def log(self) -> list[str]:
        """Return new lines of the browser's console."""
        return [f"{each['level']} {each['message']}" for each in self.get_log("browser")]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Yield a browser with a profile in ``folder``; skips the test without Chromium."""
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs chromium and chromedriver: apt install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = binary
    for argument in (*ARGUMENTS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Chromium puts a socket into TMPDIR; socket paths have at most 107 characters.
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as short:
        environment = {**os.environ, "HOME": str(folder), "TMPDIR": short}
        page = Browser(options, ChromeService(driver, env=environment))
        page.set_script_timeout(120)
        page.implicitly_wait(20)  # an element may be drawn after the text that a test waits for
        try:
            yield page
        finally:
            page.quit()
