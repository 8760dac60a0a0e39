"""The page in a real browser, on a desktop and on a phone, light and dark."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from jobs.report import write_report
from tests.unit.report.runs import HOSTILE, rich_run

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")

# Debian's Chromium or any other: Playwright's own download is not needed.
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_CHROMIUM = next((path for name in _NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(
    _CHROMIUM is None, reason="no Chromium: apt-get install chromium (or put any Chrome on the PATH)"
)
_WAIT_MS = 120_000

# The contrast of every piece of text with what is behind it (WCAG 2.2, 1.4.3); returns those below 4.5.
_LOW_CONTRAST = """
(() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    for (let n = node; n; n = n.parentElement) {
      const colour = parts(getComputedStyle(n).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const low = new Set();
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
    if (!own || node.closest('svg, .unseen, .skip') || !node.getClientRects().length) continue;
    const [a, b] = [light(parts(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.add(`${node.tagName}.${node.className} ${ratio.toFixed(2)}`);
  }
  return [...low];
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"], timeout=_WAIT_MS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with pictures, errors, scores and hostile strings."""
    run = rich_run(tmp_path_factory.mktemp("runs") / "rich")
    return Path(write_report(str(run)))


def opened(browser: Any, file: Path, *, width: int = 1440, scheme: Literal["light", "dark"] = "light") -> Any:
    """A tab that shows the file. Its `urls` are what the page asked for, its `messages` what the console printed."""
    context = browser.new_context(viewport={"width": width, "height": 900}, is_mobile=width < 600, color_scheme=scheme)
    tab = context.new_page()
    tab.urls, tab.messages = [], []
    tab.on("request", lambda request: tab.urls.append(request.url))
    tab.on("console", lambda message: tab.messages.append(message.text))
    tab.on("pageerror", lambda error: tab.messages.append(str(error)))
    tab.goto(file.resolve().as_uri(), timeout=_WAIT_MS)
    return tab


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_the_page_is_whole_quiet_and_readable(
    browser: Any, file: Path, width: int, scheme: Literal["light", "dark"]
) -> None:
    tab = opened(browser, file, width=width, scheme=scheme)
    assert tab.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length") == 0
    assert tab.evaluate("document.images.length") > 20
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out to the side"
    assert tab.evaluate(_LOW_CONTRAST) == []
    assert [url for url in tab.urls if not url.startswith("data:")] == [file.resolve().as_uri()]
    assert tab.messages == []
    if folder := os.environ.get("REPORT_SCREENSHOTS"):
        tab.screenshot(path=Path(folder) / f"report-{width}-{scheme}.png", full_page=True)


def test_hostile_strings_do_nothing(browser: Any, file: Path) -> None:
    tab = opened(browser, file)
    assert tab.title() == "rich: run report"
    assert tab.locator("script").count() == 0
    assert tab.evaluate("getComputedStyle(document.body).display") == "block"
    handlers = "[...document.querySelectorAll('*')].filter(n => [...n.attributes].some(a => /^on/.test(a.name))).length"
    assert tab.evaluate(handlers) == 0
    assert HOSTILE[0] in tab.inner_text("body")


def test_everything_can_be_reached_by_keyboard(browser: Any, file: Path) -> None:
    tab = opened(browser, file)
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    assert tab.evaluate("document.activeElement.getBoundingClientRect().left") >= 0, "it shows once it has the focus"
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.closest('nav') !== null")
    tab.focus("#settings summary")
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.querySelector('#settings details').open")


def test_headings_tables_and_pictures_are_named(browser: Any, file: Path) -> None:
    tab = opened(browser, file)
    assert tab.evaluate("document.documentElement.lang") == "en"
    assert tab.locator("h1").count() == 1
    assert tab.locator("th:not([scope])").count() == 0
    assert tab.locator("[role=img]:not([aria-label])").count() == 0
