"""One rich run folder and its page, made once for all tests of the report."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The tests import tests.report.runs, however pytest was started.
sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.report import Report, ReportOptions, gather, render_html
from tests.report.runs import rich_run


@pytest.fixture(scope="session")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with scores, pictures, errors and hostile strings."""
    return rich_run(tmp_path_factory.mktemp("runs") / "rich")


@pytest.fixture(scope="session")
def report(rich: Path) -> Report:
    """What was gathered of it."""
    return gather(str(rich), options=ReportOptions(price_per_gpu_hour=2.5, currency="€"))


@pytest.fixture(scope="session")
def page(report: Report) -> str:
    """Its HTML."""
    return render_html(report)
