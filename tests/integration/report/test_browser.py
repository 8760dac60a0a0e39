"""The page in a real browser, on a desktop and on a phone, light and dark."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.report.browser import Browser, find_chromium
from tests.unit.report.runs import HOSTILE

_CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    _CHROMIUM is None, reason="no Chromium: apt-get install chromium (or put any Chrome on the PATH)"
)

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
def browser() -> Iterator[Browser]:
    """One browser for all tests of this file."""
    assert _CHROMIUM is not None
    with Browser(_CHROMIUM) as started:
        yield started


@pytest.fixture(scope="module")
def file(page: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rich page as a file."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page)
    return path


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")])
def test_the_page_is_whole_quiet_and_readable(browser: Browser, file: Path, width: int, scheme: str) -> None:
    browser.open(file, width=width, mobile=width < 600, scheme=scheme)
    assert browser.run("[...document.images].filter(i => !i.complete || !i.naturalWidth).length") == 0
    assert browser.run("document.images.length") > 20
    assert browser.run("document.documentElement.scrollWidth") <= width, "nothing sticks out to the side"
    assert browser.run(_LOW_CONTRAST) == []
    requests = [entry["request"]["url"] for entry in browser.parameters_of("Network.requestWillBeSent")]
    assert [url for url in requests if not url.startswith("data:")] == [file.resolve().as_uri()]
    said = browser.parameters_of("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert said == []
    if folder := os.environ.get("REPORT_SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"report-{width}-{scheme}.png")


def test_hostile_strings_do_nothing(browser: Browser, file: Path) -> None:
    browser.open(file, width=1440)
    assert browser.run("document.title") == "rich: run report"
    assert browser.run("document.scripts.length") == 0
    assert browser.run("getComputedStyle(document.body).display") == "block"
    assert (
        browser.run(
            "[...document.querySelectorAll('*')].filter(n => [...n.attributes].some(a => /^on/.test(a.name))).length"
        )
        == 0
    )
    assert HOSTILE[0] in browser.run("document.body.innerText")


def test_everything_can_be_reached_by_keyboard(browser: Browser, file: Path) -> None:
    browser.open(file, width=1440)

    def press(key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            browser.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode={"Tab": 9, "Enter": 13}[key],
                text="\r" if key == "Enter" and kind == "keyDown" else "",
            )

    press("Tab")
    assert browser.run("document.activeElement.className") == "skip"
    assert browser.run("document.activeElement.getBoundingClientRect().left") >= 0, "it shows once it has the focus"
    press("Tab")
    assert browser.run("document.activeElement.closest('nav') !== null")
    browser.run("document.querySelector('#settings summary').focus()")
    press("Enter")
    assert browser.run("document.querySelector('#settings details').open")


def test_headings_tables_and_pictures_are_named(browser: Browser, file: Path) -> None:
    browser.open(file, width=1440)
    assert browser.run("document.documentElement.lang") == "en"
    assert browser.run("[...document.querySelectorAll('h1')].length") == 1
    assert browser.run("[...document.querySelectorAll('th')].filter(n => !n.scope).length") == 0
    assert (
        browser.run("[...document.querySelectorAll('[role=img]')].filter(n => !n.getAttribute('aria-label')).length")
        == 0
    )
