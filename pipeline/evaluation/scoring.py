"""Result rows in, scores out: one score row for each result row, and the run's metrics with intervals and slices.

    Scorer.learn(batches)   only for CIDEr: counts the n-grams of all references
    Scorer.score(batch)  -> score rows, in the same order
    Scorer.metrics()     -> the run's scores, ready for JSON

A row that failed scores 0 if it has a reference: a model that can't process a row has not answered it.
Knows record batches and their columns; opens no file and knows no run folder.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.evaluation.columns import answered_texts, option_lists, reference_lists, text_column
from pipeline.evaluation.interval import NUM_BUCKETS, Floats, Ints, Tally
from pipeline.evaluation.metrics.choice import extract_letter, is_right, open_answer
from pipeline.evaluation.metrics.cider import Cider
from pipeline.evaluation.metrics.overlap import CorpusScore
from pipeline.evaluation.metrics.registry import METRICS, Metric, corpus_score, counts_column, require
from pipeline.evaluation.settings import ScoringSettings, known_metric
from pipeline.evaluation.slices import OTHER, slice_order, slice_values
from pipeline.preprocess.messages.values import is_empty, readable, shown
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW

METRICS_VERSION = 2
"""Of metrics.json and scores.parquet; 2: with groups and with the counts behind corpus scores."""
_SLICE_BUCKETS = 1_021
_MAX_SLICE_VALUES = 50

Tallies = dict[str, Tally]
"""By metric."""


@dataclass
class _Slice:
    """The rows with one value of a slice."""

    num_rows: int = 0
    tallies: Tallies = field(default_factory=dict)


class _Row(NamedTuple):
    """What the metrics read of a result row."""

    metrics: tuple[str, ...]
    """Empty for a row without references."""
    references: list[str]
    choices: list[str]
    answer: str | None
    """None for a row that failed."""

    @property
    def answered(self) -> bool:
        return self.answer is not None

    @property
    def text(self) -> str:
        return self.answer or ""


class Scorer:
    """Scores batches of result rows and adds them up. Raises ConfigError if a metric's package is not installed."""

    def __init__(self, settings: ScoringSettings) -> None:
        for name in settings.named_metrics:
            _require_package(METRICS[name])
        self.settings = settings
        self._corpus_metrics = [name for name in settings.possible_metrics if corpus_score(name)]
        self.schema = pa.schema(
            [
                (MANIFEST_FILE, pa.int32()),
                (MANIFEST_ROW, pa.int64()),
                ("id", pa.string()),
                ("task", pa.string()),
                ("cluster", pa.string()),
                ("metric", pa.string()),
                ("score", pa.float64()),
                *((name, pa.float64()) for name in settings.possible_metrics),
                *((counts_column(name), pa.list_(pa.int32())) for name in self._corpus_metrics),
            ]
        )
        self._cider = Cider()
        self._overall: Tallies = {}
        # By slice and value. The task column is the slice `task`.
        names = [name for name in settings.slices if name != settings.task_column]
        names = ["task", *names] if settings.task_column else names
        self._slices: dict[str, dict[str, _Slice]] = {name: {} for name in names}
        self._num_rows = self._num_errors = self._num_errors_scored = self._num_without_reference = 0
        self._num_choices = self._num_parsed = 0

    def learn(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Counts the references' n-grams of the rows that CIDEr scores. Reads nothing if it scores none."""
        if "cider" not in self.settings.possible_metrics:
            return
        for batch in batches:
            for row in self._read(batch):
                if "cider" in row.metrics:
                    self._cider.add_references(row.references)

    def score(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch's score rows, null where a row has no reference or the metric is not the row's."""
        rows = self._read(batch)
        self._num_rows += len(rows)
        self._num_errors += sum(not row.answered for row in rows)
        self._num_errors_scored += sum(not row.answered and bool(row.references) for row in rows)
        self._num_without_reference += sum(not row.references for row in rows)
        clusters = text_column(batch, self.settings.cluster)
        groups = _group_numbers(clusters, self._num_rows) if self.settings.cluster else None
        slices = {name: self._slice_values(batch, name) for name in self._slices}
        indices: dict[str, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            for name in row.metrics:
                indices[name].append(index)
        columns = {name: np.full(len(rows), np.nan) for name in self.settings.possible_metrics}
        counts: dict[str, list[Ints | None]] = {name: [None] * len(rows) for name in self._corpus_metrics}
        for name, chosen in indices.items():
            columns[name][chosen], statistics = self._row_scores(METRICS[name], [rows[index] for index in chosen])
            for number, index in enumerate(chosen if name in counts else ()):
                counts[name][index] = statistics[number].astype(np.int64)
            self._add(name, chosen, statistics, None if groups is None else groups[chosen], slices)
        firsts = [row.metrics[0] if row.metrics else None for row in rows]
        scores = [columns[name][index] if name else None for index, name in enumerate(firsts)]
        arrays = [
            batch.column(MANIFEST_FILE),
            batch.column(MANIFEST_ROW),
            batch.column("id"),
            text_column(batch, self.settings.task_column),
            clusters,
            pa.array(firsts, pa.string()),
            pa.array(scores, pa.float64()),
            *(pa.array(column, from_pandas=True) for column in columns.values()),
            *(pa.array(column, pa.list_(pa.int32())) for column in counts.values()),
        ]
        return pa.record_batch(arrays, schema=self.schema)

    def _add(
        self,
        name: str,
        chosen: Sequence[int],
        statistics: Floats,
        groups: Ints | None,
        slices: Mapping[str, Sequence[str]],
    ) -> None:
        """Adds a metric's rows, those at `chosen` in the batch, to the tallies of all rows and of their slices."""
        _add(self._overall, METRICS[name], statistics, groups)
        for slice_name, values in slices.items():
            members: dict[str, list[int]] = defaultdict(list)
            for number, index in enumerate(chosen):
                members[values[index]].append(number)
            for value, numbers in members.items():
                tallies = self._slices[slice_name][value].tallies
                of_members = None if groups is None else groups[numbers]
                _add(tallies, METRICS[name], statistics[numbers], of_members, _SLICE_BUCKETS)

    def _read(self, batch: pa.RecordBatch) -> list[_Row]:
        settings = self.settings
        references = reference_lists(batch, settings.references)
        choices = option_lists(batch, settings.choices) if settings.choices else [[]] * len(batch)
        texts = answered_texts(batch)
        tasks = text_column(batch, settings.task_column).to_pylist()
        metrics = [tuple(settings.tasks.get(task, settings.metrics)) for task in tasks]
        if settings.metric_column:
            column = settings.metric_column
            own = [readable(value, f"the column {column}") for value in batch.column(column)]
            metrics = [names if is_empty(one) else _own_metrics(one) for one, names in zip(own, metrics, strict=True)]
        metrics = [names if known else () for names, known in zip(metrics, references, strict=True)]
        return list(map(_Row, metrics, references, choices, texts))

    def _slice_values(self, batch: pa.RecordBatch, name: str) -> list[str]:
        """Each row's value, `(other)` for those beyond the first fifty. Counts the rows of each."""
        known = self._slices[name]
        column = self.settings.task_column if name == "task" and self.settings.task_column else name
        values = []
        for value in slice_values(batch, column):
            values.append(value if value in known or len(known) < _MAX_SLICE_VALUES else OTHER)
            known.setdefault(values[-1], _Slice()).num_rows += 1
        return values

    def _row_scores(self, metric: Metric, rows: Sequence[_Row]) -> tuple[Floats, Floats]:
        """The rows' scores, and what tallies add up: the scores, or the counts behind a corpus score."""
        counts: list[list[int]] | None = None
        if isinstance(metric.score, CorpusScore):
            counts = [metric.score.statistics(row.text, row.references) for row in rows]
            scores = [metric.score.row_score(row_counts) for row_counts in counts]
        elif metric.name in ("multiple_choice", "mmmu"):
            scores = [self._choice_score(row, may_be_open=metric.name == "mmmu") for row in rows]
        else:
            score = metric.score or self._cider.score
            scores = [score(row.text, row.references) for row in rows]
        values: Floats = np.where([row.answered for row in rows], scores, 0.0)
        return values, values if counts is None else np.asarray(counts, np.float64)

    def _choice_score(self, row: _Row, *, may_be_open: bool) -> float:
        """1 if the answer chose the right option. Counts the answers in which one is found."""
        if may_be_open and not row.choices:
            return open_answer(row.text, row.references)
        letter = extract_letter(row.text, row.choices)
        self._num_choices += row.answered
        self._num_parsed += row.answered and letter is not None
        return is_right(letter, row.references, row.choices)

    def metrics(self) -> dict[str, Any]:
        """The run's scores: overall and by slice, each with its interval; plain values for JSON."""
        settings = self.settings
        return {
            "version": METRICS_VERSION,
            "num_rows": self._num_rows,
            "num_errors": self._num_errors,
            "num_errors_scored": self._num_errors_scored,
            "num_without_reference": self._num_without_reference,
            "multiple_choice": {"num_answers": self._num_choices, "num_parsed": self._num_parsed},
            "errors_score": 0,
            "interval": {"level": 0.95, "num_samples": settings.num_samples, "seed": settings.seed},
            "columns": {
                "references": settings.references,
                "task": settings.task_column,
                "choices": settings.choices,
                "cluster": settings.cluster,
            },
            "definitions": {
                name: {key: getattr(METRICS[name], key) for key in ("title", "what", "maximum")}
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
        settings = self.settings
        return {
            name: asdict(tallies[name].estimate(settings.num_samples, settings.seed))
            for name in settings.possible_metrics
            if name in tallies
        }


def _add(
    tallies: Tallies, metric: Metric, statistics: Floats, groups: Ints | None, num_buckets: int = NUM_BUCKETS
) -> None:
    if metric.name not in tallies:
        found = corpus_score(metric.name)
        tallies[metric.name] = Tally(found.combine if found else None, num_buckets, maximum=metric.maximum)
    tallies[metric.name].add(statistics, groups)


def _group_numbers(groups: pa.Array, first: int) -> Ints:
    """A number for each row, equal for rows of one group; a row without a group is one by itself."""
    texts = groups.to_pylist()
    numbers = (first + row if text is None else zlib.crc32(text.encode()) for row, text in enumerate(texts))
    return np.fromiter(numbers, np.int64, len(texts))


def _own_metrics(value: Any) -> tuple[str, ...]:
    """The metrics that a row's metric column names."""
    listed = value.split(",") if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ConfigError(
            f"evaluate.metric_column: a row holds {shown(value)}; expected names of metrics, as a list of texts or one "
            "text with commas between them"
        )
    names = [name.strip() for name in listed]
    try:
        for name in names:
            _require_package(METRICS[known_metric(name)])
    except ValueError as error:
        raise ConfigError(f"evaluate.metric_column: {error}") from error
    return tuple(names)


def _require_package(metric: Metric) -> None:
    if metric.package:
        require(metric.package, f"the metric {metric.name}")
