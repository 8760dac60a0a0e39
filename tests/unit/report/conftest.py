"""One rich run folder and its page, made once for all tests of the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.report import Report, ReportOptions, gather, render_html
from tests.unit.report.runs import rich_run


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
