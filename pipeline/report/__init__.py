"""A run folder as one page to read in the morning and mail to others.

    run_folder    run.json, scores and result rows, in bounded memory
    collect       one pass over the rows: counts, distributions, which rows to show
    facts         what run.json says: speed, cost, settings, secrets hidden
    baseline      a second run beside the first
    thumbnails    small pictures, made in a process of their own
    gallery       rows as cards
    plots         inline SVG
    page          the report: gathered, then HTML by page.html.j2
    markdown      the same for a pull request

Works for finished and unfinished runs, with scores or without. Knows no engine and computes no score.
"""

from __future__ import annotations

from pipeline.report.markdown import render_markdown
from pipeline.report.page import Report, ReportOptions, gather, render_html
from pipeline.results.reader import RunReader

__all__ = ["Report", "ReportOptions", "RunReader", "build_report", "gather", "render_html", "render_markdown"]


def build_report(path: str, *, baseline: str | None = None, options: ReportOptions | None = None) -> str:
    """The HTML page of a run folder; `baseline` is another run over the same rows."""
    return render_html(gather(path, baseline=baseline, options=options))
