"""A real Chromium, driven by its own chromedriver over W3C WebDriver: no package stands between."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""Key of an element in WebDriver's answers."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
DRIVERS = ("chromedriver",)


class BrowserError(Exception):
    """What the driver refused."""


class Browser:
    """One session; elements are named by CSS selectors."""

    def __init__(self, driver: str) -> None:
        self._driver, self._session = driver, ""

    def begin(self, arguments: Sequence[str], binary: str) -> None:
        """Start the browser."""
        options = {"binary": binary, "args": [*arguments]}
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
            "timeouts": {"script": 120_000, "pageLoad": 120_000},
        }
        answer = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{answer['sessionId']}"

    def end(self) -> None:
        """End the browser."""
        if self._session:
            self._ask("DELETE", self._session)

    def open(self, url: str) -> None:
        """Go to an address."""
        self._ask("POST", f"{self._session}/url", {"url": url})

    def script(self, text: str, *arguments: Any) -> Any:
        """What a function with this body returns."""
        body = {"script": text, "args": [*arguments]}
        return self._ask("POST", f"{self._session}/execute/sync", body)

    def text(self, selector: str = "body") -> str:
        """What is to be read; empty where there is no such element."""
        return str(
            self.script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)
        )

    def texts(self, selector: str) -> list[str]:
        """What is to be read in each such element."""
        found = "return [...document.querySelectorAll(arguments[0])].map((each) => each.innerText)"
        return list(self.script(found, selector))

    def click(self, selector: str) -> None:
        """Click as a person does; fails where something is in front of it."""
        self._act(selector, "click", {})

    def write(self, selector: str, text: str) -> None:
        """Type into a field, or name a file for one."""
        self._act(selector, "value", {"text": text})

    def fill(self, selector: str, text: str) -> None:
        """Type into a field in place of what it holds."""
        self._act(selector, "clear", {})
        self.write(selector, text)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option by its value."""
        self.click(f'{selector} option[value="{value}"]')

    def accept_dialog(self) -> str:
        """Say yes to a question; what was asked."""
        said = self._ask("GET", f"{self._session}/alert/text")
        self._ask("POST", f"{self._session}/alert/accept", {})
        return str(said)

    def until(self, what: str, seconds: float = 60.0, *arguments: Any) -> Any:
        """What an expression gives, as soon as it is true."""
        ends = time.monotonic() + seconds
        while not (found := self.script(f"return ({what})", *arguments)):
            if time.monotonic() > ends:
                shown = self.script("return document.body.innerText")
                raise AssertionError(f"not within {seconds} s: {what}\nThe page shows:\n{shown}")
            time.sleep(0.2)
        return found

    def until_text(self, text: str, selector: str = "body", seconds: float = 60.0) -> None:
        """Wait until an element shows a text."""
        shown = "[...document.querySelectorAll(arguments[1])].map((each) => each.innerText)"
        self.until(f"{shown}.some((each) => each.includes(arguments[0]))", seconds, text, selector)

    def resize(self, width: int, height: int) -> None:
        """Give the page this many CSS pixels, narrower than windows can be, too."""
        values = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **values)

    def command(self, name: str, **values: Any) -> Any:
        """A command of the DevTools."""
        body = {"cmd": name, "params": values}
        return self._ask("POST", f"{self._session}/goog/cdp/execute", body)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        found = self.command("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(found["data"]))

    def log(self) -> list[str]:
        """What the console of the browser was told since it was asked last."""
        found = self._ask("POST", f"{self._session}/se/log", {"type": "browser"})
        return [f"{each['level']} {each['message']}" for each in found]

    def _act(self, selector: str, what: str, body: dict[str, Any]) -> None:
        place = {"using": "css selector", "value": selector}
        found = self._ask("POST", f"{self._session}/element", place)
        self._ask("POST", f"{self._session}/element/{found[ELEMENT]}/{what}", body)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._driver + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=180) as answer:
                return json.load(answer)["value"]
        except HTTPError as error:
            said = json.load(error)["value"]
            raise BrowserError(f"{said['error']}: {said['message'].splitlines()[0]}") from error


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser without a window that keeps its files in ``folder``; skips where there is none."""
    found = [next(filter(None, map(shutil.which, names)), None) for names in (BROWSERS, DRIVERS)]
    binary, driver = found
    if binary is None or driver is None:
        pytest.skip("needs chromium and chromedriver: apt install chromium chromium-driver")
    with (
        # A socket of Chromium's lies there, whose path may have 107 characters.
        tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as short,
        subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "HOME": str(folder), "TMPDIR": short},
        ) as process,
    ):  # fmt: skip
        try:
            assert process.stdout is not None
            port = next(
                line.split()[-1].rstrip(".")
                for line in process.stdout
                if "was started successfully on port" in line
            )
            made = Browser(f"http://127.0.0.1:{port}")
            made.begin(
                [
                    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                    "--no-first-run", "--window-size=1280,900", f"--user-data-dir={folder / 'profile'}",
                ],
                binary,
            )  # fmt: skip
            try:
                yield made
            finally:
                made.end()
        finally:
            process.terminate()
