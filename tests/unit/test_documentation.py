"""The generated pages are current; links, paths and commands in the docs exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from jobs.documentation import PAGES, configuration, file_map

ROOT = Path(__file__).resolve().parents[2]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == PAGES[name](), "run `make docs`"


def test_every_config_key_has_a_meaning() -> None:
    rows = [line for line in configuration().splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert [row for row in rows if row.endswith("|  |")] == []


def test_every_file_and_folder_says_what_it_is() -> None:
    lines = file_map().split("```")[1].splitlines()
    assert len(lines) > 100
    assert [line for line in lines if line and not re.match(r" *[\w.]+/? +\S", line)] == []


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    paths = re.findall(r"(?<![\w/.])((?:pipeline|jobs|tests|configs|docs)/[\w/.-]*[\w/])", text)
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert missing == []


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^  make ([a-z-]+)", listed, re.M))
    commands = re.findall(r"(?:^|`)make ([a-z]+(?:-[a-z]+)*)", page.read_text(encoding="utf-8"), re.M)
    assert set(commands) <= targets


def test_the_readme_fits_a_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
