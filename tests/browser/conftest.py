"""A real headless Chromium of the system. Without one the tests are skipped with a sentence; CI must have it."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, Page, sync_playwright


@dataclass
class Tab:
    """A page, and what its console complained about."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        """The text of an element, in one line."""
        return " ".join(self.page.inner_text(selector).split())

    def wait_for_text(self, selector: str, text: str) -> None:
        """Wait until an element says something."""
        self.page.wait_for_function(
            "([selector, text]) => document.querySelector(selector).innerText.includes(text)",
            arg=[selector, text],
            timeout=60_000,
        )


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        assert not os.environ.get("CI"), "CI has to test the dashboard in a browser: apt-get install chromium"
        pytest.skip("there is no Chromium on PATH, so the dashboard is not tested: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    opened = Tab(page)
    page.on("console", lambda message: opened.complaints.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    yield opened
    page.close()
