"""Scores as a page shows them, typed: what metrics.json holds of a run, and of its comparison with another run.

Knows the keys of metrics.json; not how a score is computed or written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.interval import Estimate
from pipeline.evaluation.paired import Comparison


@dataclass(frozen=True)
class Score:
    title: str
    what: str
    """One sentence on what the metric measures."""
    maximum: float
    """1 for a metric that is a share and is shown as a percentage."""
    estimate: Estimate


@dataclass(frozen=True)
class ScoreDifference:
    """A metric over the rows that two runs share, or over those of one task."""

    title: str
    maximum: float
    numbers: Comparison


@dataclass(frozen=True)
class Note:
    """What one has to know to read the scores: rows that they leave out or count as wrong."""

    title: str
    what: str
    """Which rows, or of what the share is."""
    num_rows: int | None
    share: float | None = None


_NOT_COMPARED = (
    ("only_candidate", "Only in this run, not compared", "rows that the baseline lacks"),
    ("only_baseline", "Only in the baseline, not compared", "rows that this run lacks"),
    ("ambiguous_candidate", "No id of their own, not compared", "rows of this run: null or not unique"),
    ("ambiguous_baseline", "No id of their own in the baseline, not compared", "of its rows: null or not unique"),
)


@dataclass(frozen=True)
class Scores:
    """What metrics.json holds of one run; empty if the run was not scored."""

    overall: Mapping[str, Score]
    """By the metric's name; the first is the headline."""
    slices: Mapping[str, tuple[tuple[str, Score], ...]]
    """The scores of each value, by the slice's name."""
    canaries: Mapping[str, Any] | None
    """How rows that were run once more, each alone, compare with themselves."""
    notes: tuple[Note, ...]
    """What the scores leave out or count as wrong: rows without a reference, failed rows, answers not understood."""


def read_scores(metrics: Mapping[str, Any], comparison: Mapping[str, Any] | None = None) -> Scores:
    """The scores of a run's metrics.json; `comparison` takes the place of the one in it."""

    def scores(estimates: Mapping[str, Any]) -> Iterator[tuple[str, Score]]:
        for name, estimate in estimates.items():
            yield name, Score(**_definition(metrics, name), estimate=Estimate(**estimate))

    slices = {
        name: tuple((entry["value"], score) for entry in values for _, score in scores(entry["metrics"]))
        for name, values in metrics.get("slices", {}).items()
    }
    return Scores(
        overall=dict(scores(metrics.get("overall", {}))),
        slices={name: values for name, values in slices.items() if values},
        canaries=metrics.get("canaries"),
        notes=tuple(_notes(metrics, (metrics.get("baseline") or {}) if comparison is None else comparison)),
    )


def _notes(metrics: Mapping[str, Any], comparison: Mapping[str, Any]) -> Iterator[Note]:
    if count := metrics.get("num_without_reference"):
        yield Note("No reference, not scored", f"of {metrics['num_rows']:,} rows", count)
    if count := metrics.get("num_errors_scored"):
        yield Note("Failed, counted as 0", "rows that have a reference", count)
    choices = metrics.get("multiple_choice", {})
    if count := choices.get("num_answers"):
        what = f"of {count:,} multiple-choice answers name an option; others count as wrong"
        yield Note("Parse rate", what, choices["num_parsed"], share=choices["num_parsed"] / count)
    if column := metrics.get("columns", {}).get("cluster"):
        yield Note(f"Grouped by {column}", "in intervals and tests, in place of single rows", None)
    for key, title, what in _NOT_COMPARED:
        if count := comparison.get(key):
            yield Note(title, what, count)


def read_differences(metrics: Mapping[str, Any], comparison: Mapping[str, Any]) -> dict[str, ScoreDifference]:
    """The differences by metric, and after them by task as `task NAME: METRIC`."""
    found = {}
    for name, numbers in comparison.get("metrics", {}).items():
        known = _definition(metrics, name)
        found[name] = ScoreDifference(known["title"], known["maximum"], _comparison(numbers))
    for task, numbers in comparison.get("tasks", {}).items():
        known = _definition(metrics, numbers["metric"])
        title = f"task {task.removesuffix(': ' + numbers['metric'])}: {known['title']}"
        found[title] = ScoreDifference(title, known["maximum"], _comparison(numbers))
    return found


def _definition(metrics: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {"title": name, "what": "", "maximum": 1.0, **metrics.get("definitions", {}).get(name, {})}


def _comparison(numbers: Mapping[str, Any]) -> Comparison:
    return Comparison(**{key: value for key, value in numbers.items() if key not in ("metric", "verdict")})
