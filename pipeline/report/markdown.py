"""The report as Markdown that fits a pull request: scores, verdict, errors, speed; no pictures.

Model and data text never enters it but for names of slices, errors and settings, which are escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.facts import headline
from pipeline.report.page import (
    Report,
    metric_facts,
    shown_difference,
    shown_duration,
    shown_interval,
    shown_number,
    shown_p,
    shown_score,
    verdict,
)

_MAX_SLICE_ROWS = 24
_MARKS = re.compile(r"([\\`*_{}\[\]()<>#+!|~@-])")


def escaped(text: object, most: int = 120) -> str:
    """The text on one line, without meaning to Markdown or HTML."""
    flat = " ".join(str(text).split())
    return _MARKS.sub(r"\\\1", flat if len(flat) <= most else flat[: most - 1] + "…")


def render_markdown(report: Report) -> str:
    """The summary."""
    found = report.collected
    lines = [f"### {escaped(report.reader.name)} ({escaped(report.state)})", ""]
    sentence = verdict(report)
    if sentence:
        lines += [f"**{escaped(sentence[1], 400)}**", ""]
    expected = f" of {report.num_expected:,}" if report.num_expected not in (None, found.num_rows) else ""
    errors = f"{found.num_errors:,} errors" if found.num_errors else "no errors"
    lines.append(f"{found.num_rows:,}{expected} rows, {errors}.{_speed(report)}")
    lines += ["", *_scores(report), *_tasks(report), *_errors(report)]
    facts = [
        f"{name}: {escaped(value)}"
        for name, value in headline(report.run)
        if name in ("Model", "Sampling", "Code", "Hardware")
    ]
    if facts:
        lines += ["<sub>" + "; ".join(facts) + "</sub>", ""]
    return "\n".join(lines)


def _speed(report: Report) -> str:
    speed = report.speed
    if not speed.rows_per_s:
        return ""
    text = f" {shown_number(speed.rows_per_s)} rows/s, {shown_number(speed.output_tokens_per_s)} output tokens/s"
    text += f" in {shown_duration(speed.seconds)}" if speed.seconds else ""
    text += f", {shown_number(speed.gpu_hours, 2)} GPU-hours" if speed.gpu_hours else ""
    text += f" ({report.options.currency}{speed.cost:,.2f})" if speed.cost else ""
    return text + "."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def _scores(report: Report) -> list[str]:
    overall: Mapping[str, Any] = (report.metrics or {}).get("overall") or {}
    if not overall:
        return []
    compared = (report.comparison or {}).get("metrics") or {}
    rows = []
    for name, estimate in overall.items():
        title, _, maximum = metric_facts(report, name)
        row = [
            escaped(title),
            shown_score(estimate.get("value"), maximum),
            shown_interval(estimate.get("low"), estimate.get("high"), maximum),
            f"{estimate.get('num_rows', 0):,}",
        ]
        if compared:
            one = compared.get(name)
            row += [shown_difference(one, maximum), shown_p(one["p_permutation"])] if one else ["", ""]
        rows.append(row)
    head = ["metric", "score", "95 %", "rows"] + (["against the baseline", "test"] if compared else [])
    return _table(head, rows)


def _tasks(report: Report) -> list[str]:
    values = ((report.metrics or {}).get("slices") or {}).get("task") or []
    rows = []
    for entry in values:
        for name, estimate in (entry.get("metrics") or {}).items():
            title, _, maximum = metric_facts(report, name)
            interval = shown_interval(estimate.get("low"), estimate.get("high"), maximum)
            rows.append(
                [
                    escaped(entry.get("value")),
                    escaped(title),
                    shown_score(estimate.get("value"), maximum),
                    interval,
                    f"{estimate.get('num_rows', 0):,}",
                ]
            )
    return _table(["task", "metric", "score", "95 %", "rows"], rows[:_MAX_SLICE_ROWS]) if rows else []


def _errors(report: Report) -> list[str]:
    rows = [[escaped(kind), escaped(stage), f"{count:,}"] for kind, stage, count, _ in report.errors[:12]]
    return _table(["error", "stage", "rows"], rows) if rows else []
