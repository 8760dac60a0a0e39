"""Result rows in, scores out: one score row for each result row, and the run's metrics with intervals and slices.

    Scorer.learn(batches)   only for CIDEr: counts the n-grams of all references
    Scorer.score(batch)  -> score rows, in the same order
    Scorer.metrics()     -> the run's scores, ready for JSON

A row that failed scores 0 if it has a reference: a model that can't process a row has not answered it.
Knows record batches and their columns; opens no file and knows no run folder.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError
from pipeline.evaluation.columns import text_column, text_lists
from pipeline.evaluation.interval import Floats, Tally
from pipeline.evaluation.metrics.choice import multiple_choice
from pipeline.evaluation.metrics.cider import Cider
from pipeline.evaluation.metrics.overlap import CorpusScore
from pipeline.evaluation.metrics.registry import METRICS, Metric, require
from pipeline.evaluation.settings import ScoringSettings, known_metric
from pipeline.evaluation.slices import OTHER, slice_order, slice_values
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW, Status

_SLICE_BUCKETS = 1_021
_MAX_SLICE_VALUES = 50

Ints = npt.NDArray[np.int64]
Tallies = dict[str, Tally]
"""By metric."""


@dataclass
class _Slice:
    """The rows with one value of a slice."""

    num_rows: int = 0
    tallies: Tallies = field(default_factory=dict)


@dataclass(frozen=True)
class _Rows:
    """What the metrics read of a batch, row by row."""

    metrics: list[tuple[str, ...]]
    """Empty for a row without references."""
    references: list[list[str]]
    choices: list[list[str]]
    texts: list[str]
    """Empty for a row that failed."""
    answered: npt.NDArray[np.bool_]


class Scorer:
    """Scores batches of result rows and adds them up. Raises ConfigError if a metric's package is not installed."""

    def __init__(self, settings: ScoringSettings) -> None:
        for name in settings.named_metrics:
            _require_package(METRICS[name])
        self.settings = settings
        self.schema = pa.schema(
            [
                (MANIFEST_FILE, pa.int32()),
                (MANIFEST_ROW, pa.int64()),
                ("id", pa.string()),
                ("task", pa.string()),
                ("metric", pa.string()),
                ("score", pa.float64()),
                *((name, pa.float64()) for name in settings.possible_metrics),
            ]
        )
        self._cider = Cider()
        self._overall: Tallies = {}
        # By slice and value. The task column is the slice `task`.
        names = [name for name in settings.slices if name != settings.task_column]
        names = ["task", *names] if settings.task_column else names
        self._slices: dict[str, dict[str, _Slice]] = {name: {} for name in names}
        self._num_rows = self._num_errors = self._num_without_reference = 0

    @property
    def needs_learning(self) -> bool:
        """Whether `learn` must see all rows before the first is scored."""
        return "cider" in self.settings.possible_metrics

    def learn(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Counts the references' n-grams of the rows that CIDEr scores."""
        for batch in batches:
            rows = self._read(batch)
            for names, references in zip(rows.metrics, rows.references, strict=True):
                if "cider" in names:
                    self._cider.add_references(references)

    def score(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch's score rows, null where a row has no reference or the metric is not the row's."""
        rows = self._read(batch)
        self._num_rows += len(batch)
        self._num_errors += int((~rows.answered).sum())
        self._num_without_reference += sum(not references for references in rows.references)
        groups = [self._group(batch, name) for name in self._slices]
        rows_of: dict[str, list[int]] = defaultdict(list)
        for row, names in enumerate(rows.metrics):
            for name in names:
                rows_of[name].append(row)
        columns: dict[str, Floats] = {}
        for name, of_metric in rows_of.items():
            metric, indices = METRICS[name], np.asarray(of_metric)
            columns[name] = np.full(len(batch), np.nan)
            columns[name][indices], statistics = self._row_scores(metric, rows, indices)
            _tally(self._overall, metric).add(statistics)
            for slices, slice_of_row in groups:
                codes = slice_of_row[indices]
                for code in np.unique(codes):
                    _tally(slices[code].tallies, metric, _SLICE_BUCKETS).add(statistics[codes == code])
        nothing = np.full(len(batch), np.nan)
        scores = [columns[names[0]][row] if names else np.nan for row, names in enumerate(rows.metrics)]
        arrays = [
            batch.column(MANIFEST_FILE),
            batch.column(MANIFEST_ROW),
            batch.column("id"),
            text_column(batch, self.settings.task_column),
            pa.array([names[0] if names else None for names in rows.metrics], pa.string()),
            pa.array(scores, pa.float64(), from_pandas=True),
            *(pa.array(columns.get(name, nothing), from_pandas=True) for name in self.settings.possible_metrics),
        ]
        return pa.record_batch(arrays, schema=self.schema)

    def _read(self, batch: pa.RecordBatch) -> _Rows:
        settings = self.settings
        references = text_lists(batch, settings.references)
        tasks = text_column(batch, settings.task_column).to_pylist()
        metrics = [tuple(settings.tasks.get(task, settings.metrics)) for task in tasks]
        if settings.metric_column:
            own = batch.column(settings.metric_column).to_pylist()
            metrics = [_own_metrics(value) if value else names for value, names in zip(own, metrics, strict=True)]
        answered = np.asarray(pc.equal(batch.column("status"), Status.OK.value))
        texts = batch.column("text").to_pylist()
        return _Rows(
            metrics=[names if known else () for names, known in zip(metrics, references, strict=True)],
            references=references,
            choices=text_lists(batch, settings.choices) if settings.choices else [[]] * len(batch),
            texts=[(text or "") if is_ok else "" for text, is_ok in zip(texts, answered, strict=True)],
            answered=answered,
        )

    def _group(self, batch: pa.RecordBatch, name: str) -> tuple[list[_Slice], Ints]:
        """The slices that the batch's rows belong to, and each row's index among them."""
        column = self.settings.task_column if name == "task" and self.settings.task_column else name
        encoded = slice_values(batch, column)
        known = self._slices[name]
        indices: dict[str, int] = {}
        codes = []
        for value in encoded.dictionary.to_pylist():
            shown = value if value in known or len(known) < _MAX_SLICE_VALUES else OTHER
            known.setdefault(shown, _Slice())
            codes.append(indices.setdefault(shown, len(indices)))
        slices = [known[value] for value in indices]
        slice_of_row = np.asarray(codes, np.int64)[np.asarray(encoded.indices, np.int64)]
        for one, count in zip(slices, np.bincount(slice_of_row, minlength=len(slices)), strict=True):
            one.num_rows += int(count)
        return slices, slice_of_row

    def _row_scores(self, metric: Metric, rows: _Rows, indices: Ints) -> tuple[Floats, Floats]:
        """Scores of these rows, and what tallies add up: the scores, or the counts behind a corpus score."""
        pairs = [(rows.texts[row], rows.references[row]) for row in indices]
        counts: list[list[int]] | None = None
        if isinstance(metric.score, CorpusScore):
            counts = [metric.score.statistics(*pair) for pair in pairs]
            scores = [metric.score.row_score(row_counts) for row_counts in counts]
        elif metric.name == "multiple_choice":
            choices = [rows.choices[row] for row in indices]
            scores = [multiple_choice(*pair, options) for pair, options in zip(pairs, choices, strict=True)]
        else:
            score = metric.score or self._cider.score
            scores = [score(*pair) for pair in pairs]
        values: Floats = np.where(rows.answered[indices], scores, 0.0)
        return values, values if counts is None else np.asarray(counts, np.float64)

    def metrics(self) -> dict[str, Any]:
        """The run's scores: overall and by slice, each with its interval; plain values for JSON."""
        settings = self.settings
        return {
            "version": 1,
            "num_rows": self._num_rows,
            "num_errors": self._num_errors,
            "num_without_reference": self._num_without_reference,
            "errors_score": 0,
            "interval": {"level": 0.95, "num_samples": settings.num_samples, "seed": settings.seed},
            "columns": {"references": settings.references, "task": settings.task_column, "choices": settings.choices},
            "definitions": {
                name: {"title": METRICS[name].title, "what": METRICS[name].what, "maximum": METRICS[name].maximum}
                for name in self._overall
            },
            "overall": self._estimates(self._overall),
            "slices": {
                name: [
                    {"value": value, "num_rows": one.num_rows, "metrics": self._estimates(one.tallies)}
                    for value, one in sorted(values.items(), key=lambda item: slice_order(item[0]))
                ]
                for name, values in self._slices.items()
            },
        }

    def _estimates(self, tallies: Mapping[str, Tally]) -> dict[str, Any]:
        """In the order in which the config names the metrics, so that the first is the headline."""
        settings = self.settings
        return {
            name: asdict(tallies[name].estimate(settings.num_samples, settings.seed))
            for name in dict.fromkeys([*settings.named_metrics, *METRICS])
            if name in tallies
        }


def _tally(tallies: Tallies, metric: Metric, *num_buckets: int) -> Tally:
    combine = metric.score.combine if isinstance(metric.score, CorpusScore) else None
    return tallies.setdefault(metric.name, Tally(combine, *num_buckets))


def _own_metrics(value: str | Sequence[str]) -> tuple[str, ...]:
    """The metrics that a row's metric column names."""
    names = [name.strip() for name in (value.split(",") if isinstance(value, str) else value)]
    try:
        for name in names:
            _require_package(METRICS[known_metric(name)])
    except ValueError as error:
        raise ConfigError(f"evaluate.metric_column: {error}") from error
    return tuple(names)


def _require_package(metric: Metric) -> None:
    if metric.package:
        require(metric.package, f"the metric {metric.name}")
