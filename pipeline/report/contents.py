"""The report as one typed value, gathered from run folders once and rendered as HTML or Markdown by `render.py`.

Knows what a reader wants to see first; not how anything was computed, nor how it is written on a page.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline import storage
from pipeline.evaluation.comparison import compare_folders
from pipeline.evaluation.scoring import METRICS_VERSION
from pipeline.report.baseline import Baseline, read_baseline
from pipeline.report.collect import Collected, ErrorKind, collect, separate_best_from_worst
from pipeline.report.facts import Speed, headline, number_at, rates_over_time, settings_lines, speed, text_at
from pipeline.report.gallery import Card, CardMaker
from pipeline.report.scores import ScoreDifference, Scores, read_differences, read_scores
from pipeline.report.thumbnails import ThumbnailMaker
from pipeline.results.reader import RunReader, row_key

_MIN_ERROR_EXAMPLES = 12

_SECTIONS = {
    "lost": ("Lost against the baseline", "Rows whose score fell most."),
    "won": ("Won against the baseline", "Rows whose score rose most."),
    "worst": ("Worst", "Lowest scores; of equal ones a random few."),
    "best": ("Best", "Highest scores; of equal ones a random few."),
    "random": ("Random", "Answered rows drawn at random."),
    "errors": ("Errors", "One row of each kind of error."),
    "truncated": ("Truncated", "Answers that ended at max_tokens."),
    "repeating": ("Repeating", "Answers that say the same again and again."),
    "longest": ("Longest", "Most output tokens."),
    "slowest": ("Slowest", "Longest in the engine, waiting for a place included."),
}
_COMPARING = ("lost", "won")


@dataclass(frozen=True)
class ReportOptions:
    """What goes onto the page."""

    thumbnails: bool = True
    cards: int = 6
    """Rows in each section of the gallery."""
    price_per_gpu_hour: float | None = None
    currency: str = "$"
    seed: int = 0


@dataclass(frozen=True)
class CardSection:
    """One section of the gallery."""

    key: str
    title: str
    what: str
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class ErrorSummary:
    """The rows that failed in one way."""

    kind: str
    stage: str
    num_rows: int
    example: Card | None


@dataclass(frozen=True)
class Report:
    """Everything a page shows: numbers as numbers, for the templates to format."""

    name: str
    path: str
    state: str
    """`finished`, `running`, `interrupted` or `failed`, as the folder records it; else `unfinished`."""
    num_expected: float | None
    """Rows that the finished run will have."""
    headline: list[tuple[str, str]]
    """What ran: (name, text)."""
    settings: list[tuple[str, str]]
    """All of run.json: (name, value)."""
    rows: Collected
    speed: Speed
    rates: dict[str, list[tuple[float, float]]]
    """Title to (seconds, count per second) over the run."""
    scores: Scores
    differences: dict[str, ScoreDifference]
    """Scores against the baseline's."""
    baseline: Baseline | None
    sections: tuple[CardSection, ...]
    errors: tuple[ErrorSummary, ...]
    options: ReportOptions

    @property
    def difference_scale(self) -> float:
        """The largest difference, or end of its interval, as a share of its metric's scale."""
        ends = [
            abs(value) / one.maximum
            for one in self.differences.values()
            for value in (one.numbers.low, one.numbers.high, one.numbers.difference)
            if value
        ]
        return max(ends, default=1.0)


def gather(
    path: str,
    *,
    baseline: str | None = None,
    options: ReportOptions | None = None,
    storage_options: storage.StorageOptions = None,
) -> Report:
    """Reads a run folder. `baseline` is another run over the same rows; by default the one that the run was scored
    against, if any. Raises OutputError if either folder is no run.
    """
    options = options or ReportOptions()
    reader = RunReader(path, storage_options)
    metrics = reader.metrics or {}
    comparison = (metrics.get("baseline") or {}) if metrics.get("version") == METRICS_VERSION else {}
    if baseline:
        comparison = compare_folders(path, baseline, storage_options=storage_options) or {}

    def places(name: str) -> list[int]:
        return [row_key(*place) for place in comparison.get(name, ())]

    compared = {name: dict(zip(places(name), places(f"{name}_baseline"), strict=True)) for name in _COMPARING}
    other_keys = {mine: theirs for keys in compared.values() for mine, theirs in keys.items()}
    numbers = reader.find(set(other_keys))
    found = collect(reader, size=options.cards, seed=options.seed)
    errors = sorted(found.errors.values(), key=lambda kind: -kind.num_rows)
    for name, keys in compared.items():
        found.sections[name] = [numbers[key] for key in keys if key in numbers][: options.cards]
    other: Baseline | None = None
    other_path = baseline or comparison.get("run")
    if other_path and (baseline or storage.exists(other_path, storage_options)):
        other_reader = RunReader(other_path, storage_options)
        other = read_baseline(reader, other_reader, other_keys, price_per_gpu_hour=options.price_per_gpu_hour)
    sections, summaries = _cards(reader, found, errors, other.texts if other else {}, options)
    return Report(
        name=reader.name,
        path=reader.path,
        state=_state(reader),
        num_expected=number_at(reader.run, "counts.rows") or number_at(reader.run, "manifest.num_rows"),
        headline=headline(reader.run),
        settings=list(settings_lines(reader.run)),
        rows=found,
        speed=speed(reader.run, price_per_gpu_hour=options.price_per_gpu_hour),
        rates=rates_over_time(reader.progress()),
        scores=read_scores(metrics, comparison),
        differences=read_differences(metrics, comparison),
        baseline=other,
        sections=sections,
        errors=summaries,
        options=options,
    )


def _state(reader: RunReader) -> str:
    if reader.is_finished:
        return "finished"
    state = text_at(reader.run, "state")
    return state if state and state != "finished" else "unfinished"


def _cards(
    reader: RunReader, found: Collected, errors: list[ErrorKind], baseline: Mapping[int, str], options: ReportOptions
) -> tuple[tuple[CardSection, ...], tuple[ErrorSummary, ...]]:
    """The gallery, and the errors with an example each."""
    examples = [kind.example for kind in errors[: max(_MIN_ERROR_EXAMPLES, options.cards)]]
    shown = {number for numbers in found.sections.values() for number in numbers}
    scores = reader.fetch_scores(shown) if found.scores_fit else {}
    separate_best_from_worst(found, scores)
    found.sections["errors"] = examples[: options.cards]
    rows = reader.fetch(shown.union(examples))
    with ThumbnailMaker(reader.run) if options.thumbnails else contextlib.nullcontext() as thumbnails:
        maker = CardMaker(
            reader.run,
            reader.columns,
            references=text_at(reader.metrics, "columns.references"),
            thumbnails=thumbnails,
        )

        def card(number: int, *, compared: bool = False) -> Card:
            row = rows[number]
            before = baseline.get(row_key(row["manifest_file"], row["manifest_row"])) if compared else None
            return maker.card(row, scores.get(number, {}), before)

        sections = [
            CardSection(name, *about, cards=tuple(card(number, compared=name in _COMPARING) for number in numbers))
            for name, about in _SECTIONS.items()
            if (numbers := found.sections[name])
        ]
        return tuple(sections), tuple(
            ErrorSummary(kind.kind, kind.stage, kind.num_rows, card(kind.example) if kind.example in rows else None)
            for kind in errors
        )
