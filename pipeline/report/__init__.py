"""A run folder as one page to read in the morning and mail to others.

    collect       one pass over the rows: counts, distributions, which rows to show
    facts         what run.json records: speed, cost, settings, secrets hidden
    scores        what metrics.json records
    baseline      a second run beside the first
    thumbnails    small pictures, made in the decoder's process
    gallery       rows as cards
    contents      all of it as one typed value
    render        that value as HTML (page.html.j2) or Markdown (summary.md.j2)

Works for finished and unfinished runs, with scores or without. Knows no engine and computes no score.
"""

from __future__ import annotations

from pipeline.report.contents import Report, ReportOptions, gather
from pipeline.report.render import render_html, render_markdown

__all__ = ["Report", "ReportOptions", "gather", "render_html", "render_markdown"]
