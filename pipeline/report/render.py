"""The report as an HTML page or as a few lines of Markdown, by the templates beside this file.

The page is one file without scripts: it loads nothing, and a content security policy forbids it to. Everything from
data or model passes Jinja's escaping. Knows how a number is written; not where it comes from.
"""

from __future__ import annotations

import base64
import datetime
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.errors import counted
from pipeline.evaluation.interval import Estimate
from pipeline.evaluation.paired import Comparison
from pipeline.report.baseline import Baseline
from pipeline.report.contents import Report
from pipeline.report.facts import shown_source
from pipeline.report.scores import Note

_MAX_HTML_BYTES = 5_000_000
_MARKDOWN_MARKS = re.compile(r"([\\`*_{}\[\]()<>#+!|~@-])")
# Control characters become their pictures, and marks that reverse text a replacement sign: a file name must not be
# able to look like another one.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | dict.fromkeys(
    (0x7F, *range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD
)


def render_html(report: Report) -> str:
    """The page. Thumbnails are left out if it is larger than 5 MB with them."""
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    template = _environment(autoescape=True).get_template("page.html.j2")
    for pictures in (True, False):
        # Lone surrogates from a model's broken output can't be written as UTF-8.
        page = template.render(report=report, made=made, verdict=verdict(report), pictures=pictures).encode(
            "utf-8", "replace"
        )
        if len(page) <= _MAX_HTML_BYTES:
            break
    return page.decode("utf-8").translate(_VISIBLE)


def render_markdown(report: Report) -> str:
    """A summary that fits a pull request: scores, verdict, errors, speed; no pictures.

    Text of data and model is not in it, but for names of slices, errors and settings, which are escaped.
    """
    template = _environment(autoescape=False).get_template("summary.md.j2")
    return template.render(report=report, verdict=verdict(report)).strip() + "\n"


def _environment(*, autoescape: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "agreement": shown_agreement,
        "base64": lambda data: base64.b64encode(data).decode(),
        "counted": counted,
        "difference": shown_difference,
        "duration": shown_duration,
        "escaped": escaped,
        "interval": shown_interval,
        "note": shown_note,
        "number": shown_number,
        "p": shown_p,
        "percent": lambda share, digits=1: "–" if share is None else f"{100 * share:.{digits}f} %",
        "score": shown_score,
        "source": shown_source,
        "width": lambda share: f"{100 * min(max(share, 0.0), 1.0):.2f}%",
    }
    return environment


def shown_number(value: float | None, digits: int = 1) -> str:
    """A quantity with thousands separators, a dash where there is none."""
    if value is None or value != value:
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.{digits}f}" if abs(value) >= 1 else f"{value:.3g}"


def shown_duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them."""
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def shown_score(value: float | None, maximum: float = 1.0) -> str:
    """A share as a percentage; a metric with another scale (CIDEr) as it is."""
    if value is None or value != value:
        return "–"
    return f"{100 * value:.1f} %" if maximum == 1.0 else f"{value:.2f}"


def shown_interval(estimate: Estimate, maximum: float = 1.0) -> str:
    if estimate.low is None or estimate.high is None:
        return "no interval"
    if maximum == 1.0:
        return f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f} %"
    return f"{estimate.low:.2f} to {estimate.high:.2f}"


def shown_note(note: Note) -> str:
    """A note's number: rows, or a share of them."""
    if note.share is not None:
        return shown_score(note.share)
    return "" if note.num_rows is None else f"{note.num_rows:,}"


def shown_difference(numbers: Comparison, maximum: float = 1.0) -> str:
    """A difference with its interval, in points for percentages."""
    if numbers.difference is None:  # NaN, in JSON
        return "–"
    scale, digits, unit = (100, 1, " points") if maximum == 1.0 else (1, 2, "")
    text = f"{scale * numbers.difference:+.{digits}f}{unit}"
    if numbers.low is None or numbers.high is None:
        return text
    return f"{text} ({scale * numbers.low:+.{digits}f} to {scale * numbers.high:+.{digits}f})"


def shown_agreement(baseline: Baseline) -> str:
    """How many rows both runs have, and on how many of them they agree."""
    paired = "The manifests differ, and rows are paired by id. " if baseline.other_manifest else ""
    if not baseline.num_shared:
        return f"{paired}No row is in both runs."
    shared = counted(baseline.num_shared, "shared row")
    return f"{paired}The same answer, letter for letter: {baseline.num_same:,} of {shared}."


def shown_p(value: float) -> str:
    """A p value; tiny ones by their bound."""
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def escaped(text: object, max_length: int = 120) -> str:
    """The text on one line, without meaning to Markdown or HTML."""
    flat = " ".join(str(text).split())
    return _MARKDOWN_MARKS.sub(r"\\\1", flat if len(flat) <= max_length else flat[: max_length - 1] + "…")


def verdict(report: Report) -> tuple[str, str] | None:
    """How the run compares with its baseline: `good`, `bad` or `same`, and a sentence."""
    first = next(iter(report.differences.values()), None)
    if first is not None:
        numbers = first.numbers
        if numbers.verdict == "identical":
            return "same", f"Identical scores on all {numbers.num_rows:,} rows that both runs have ({first.title})."
        kind = {"better": "good", "worse": "bad"}.get(numbers.verdict, "same")
        return kind, (
            f"{'No difference found from' if kind == 'same' else numbers.verdict.capitalize() + ' than'} the baseline: "
            f"{first.title} {shown_difference(numbers, first.maximum)}, {shown_p(numbers.p_permutation)}; "
            f"{numbers.won:,} rows won, {numbers.lost:,} lost, {numbers.tied:,} tied."
        )
    if report.baseline is not None and report.baseline.num_shared:
        shared, same = report.baseline.num_shared, report.baseline.num_same
        return "same", f"{same:,} of {shared:,} answers ({same / shared:.1%}) are the same text as the baseline's."
    return None
