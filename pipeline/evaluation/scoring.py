"""Result rows in, scores out: one score row for each result row, and the run's metrics with intervals and slices.

    Scorer.learn(batches)   only where CIDEr is asked for: how telling each n-gram of the references is
    Scorer.score(batch)  -> score rows, in the same order
    Scorer.metrics()     -> the run's numbers, ready for JSON

A row that failed scores 0 wherever it has a reference: a model that can't be run on a row has not answered it.
Knows record batches and their columns; opens no file and knows no run folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError
from pipeline.evaluation.interval import Comparison, Estimate, Tally, compare
from pipeline.evaluation.metrics.choice import multiple_choice
from pipeline.evaluation.metrics.cider import DocumentFrequency, cider
from pipeline.evaluation.metrics.registry import METRICS, Metric
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW, Status

Floats = npt.NDArray[np.float64]

_SLICE_BUCKETS = 1_021
_MAX_SLICE_VALUES = 50
OTHER = "(other)"
"""The slice of all values beyond the first fifty."""
DERIVED_SLICES = ("media_kind", "num_media", "resolution_bucket")
"""Slices made from the receipt, where the user has no column of that name."""


@dataclass(frozen=True)
class ScoringSettings:
    """Which columns hold what, and which metrics are asked for."""

    references: str
    """Column with the right answer or answers: text, number, list of texts, or list of structs with `answer`."""
    metrics: tuple[str, ...] = ()
    """For rows whose task and metric column say nothing else; the first is the row's score."""
    tasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Metrics by value of the task column."""
    task_column: str | None = None
    metric_column: str | None = None
    """Column with the row's own metric names: a list, or text separated by commas. Wins over everything."""
    choices: str | None = None
    """Column with the list of options, for multiple choice."""
    slices: tuple[str, ...] = ()
    num_samples: int = 1_000
    seed: int = 0

    def __post_init__(self) -> None:
        named = [*self.metrics, *(name for names in self.tasks.values() for name in names)]
        unknown = sorted(set(named) - set(METRICS))
        if unknown:
            raise ConfigError(f"unknown metric {', '.join(unknown)}; known: {', '.join(METRICS)}")
        if not named and not self.metric_column:
            raise ConfigError("no metric is asked for: set evaluate.metrics, evaluate.tasks or evaluate.metric_column")

    @property
    def possible_metrics(self) -> tuple[str, ...]:
        """Those that may occur: each has a column in the score rows."""
        if self.metric_column:
            return tuple(METRICS)
        named = {*self.metrics, *(name for names in self.tasks.values() for name in names)}
        return tuple(name for name in METRICS if name in named)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the user's that must be among the result rows' kept columns."""
        own = [self.references, self.task_column, self.metric_column, self.choices]
        own += [name for name in self.slices if name not in DERIVED_SLICES]
        return tuple(dict.fromkeys(name for name in own if name))


def score_schema(settings: ScoringSettings) -> pa.Schema:
    """Score rows: the place, the task, the first metric and its score, and one column a metric."""
    return pa.schema(
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


class Scorer:
    """Scores batches of result rows and adds them up."""

    def __init__(self, settings: ScoringSettings) -> None:
        self.settings = settings
        self.schema = score_schema(settings)
        self._frequency = DocumentFrequency()
        self._overall: dict[str, Tally] = {}
        self._slices: dict[str, dict[str, dict[str, Tally]]] = {name: {} for name in self._slice_names()}
        self._slice_counts: dict[str, dict[str, int]] = {name: {} for name in self._slices}
        self._num_rows = self._num_errors = self._num_without_reference = 0

    @property
    def needs_learning(self) -> bool:
        """Whether `learn` must see all rows before the first is scored."""
        return "cider" in self.settings.possible_metrics

    def learn(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Counts the references' n-grams of the rows that CIDEr scores."""
        for batch in batches:
            names = self._metrics_of_rows(batch)
            references = _references(batch, self.settings.references)
            for row, row_names in enumerate(names):
                if "cider" in row_names and references[row]:
                    self._frequency.add(references[row])

    def score(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch's score rows, null where a row has no reference or the metric is not the row's."""
        names = self._metrics_of_rows(batch)
        references = _references(batch, self.settings.references)
        answered = np.asarray(pc.equal(batch.column("status"), Status.OK.value))
        texts = [text or "" for text in batch.column("text").to_pylist()]
        choices = _choices(batch, self.settings.choices)
        self._num_rows += len(batch)
        self._num_errors += int((~answered).sum())
        rows_of: dict[str, list[int]] = {}
        for row, row_names in enumerate(names):
            if not references[row]:
                self._num_without_reference += 1
                continue
            for name in row_names:
                rows_of.setdefault(name, []).append(row)
        slices = {name: _slice_values(batch, name, self.settings.task_column) for name in self._slices}
        self._count_slices(slices)
        columns: dict[str, Floats] = {}
        for name, rows in rows_of.items():
            column, statistics = self._score_rows(METRICS[name], rows, texts, references, choices, answered)
            columns[name] = column
            self._add(METRICS[name], np.asarray(rows), statistics, slices)
        return self._score_batch(batch, names, references, columns)

    def _score_rows(
        self,
        metric: Metric,
        rows: list[int],
        texts: list[str],
        references: list[list[str]],
        choices: list[list[str]],
        answered: npt.NDArray[np.bool_],
    ) -> tuple[Floats, Floats]:
        """Scores of these rows in a column of the batch's length, and what the tallies take of them."""
        column = np.full(len(texts), np.nan)
        if metric.counts is not None and metric.row_value is not None:
            count = metric.counts
            counts = np.asarray([count(texts[row] if answered[row] else "", references[row]) for row in rows])
            column[rows] = np.where(answered[rows], metric.row_value(counts.astype(np.float64)), 0.0)
            return column, counts.astype(np.float64)
        if metric.name == "multiple_choice":
            scores = [multiple_choice(texts[row], references[row], choices[row]) for row in rows]
        elif metric.name == "cider":
            scores = [cider(texts[row], references[row], self._frequency) for row in rows]
        else:
            assert metric.score is not None, metric.name
            score = metric.score
            scores = [score(texts[row], references[row]) for row in rows]
        column[rows] = np.where(answered[rows], scores, 0.0)
        return column, column[rows]

    def _add(self, metric: Metric, rows: npt.NDArray[np.int64], statistics: Floats, slices: _Slices) -> None:
        self._overall.setdefault(metric.name, _tally(metric)).add(statistics)
        for name, (codes, values) in slices.items():
            row_codes = codes[rows]
            for code in np.unique(row_codes):
                tallies = self._slices[name].setdefault(self._slice_value(name, values[code]), {})
                tally = tallies.setdefault(metric.name, _tally(metric, _SLICE_BUCKETS))
                tally.add(statistics[row_codes == code])

    def _count_slices(self, slices: _Slices) -> None:
        for name, (codes, values) in slices.items():
            counts = self._slice_counts[name]
            for code, count in zip(*np.unique(codes, return_counts=True), strict=True):
                value = values[code] if values[code] in counts or len(counts) < _MAX_SLICE_VALUES else OTHER
                counts[value] = counts.get(value, 0) + int(count)

    def _slice_value(self, name: str, value: str) -> str:
        return value if value in self._slice_counts[name] else OTHER

    def _score_batch(
        self,
        batch: pa.RecordBatch,
        names: list[tuple[str, ...]],
        references: list[list[str]],
        columns: dict[str, Floats],
    ) -> pa.RecordBatch:
        nothing = np.full(len(batch), np.nan)
        first = [row_names[0] if row_names and references[row] else None for row, row_names in enumerate(names)]
        score = nothing.copy()
        for name in set(first) - {None}:
            mine = np.array([metric == name for metric in first])
            score[mine] = columns[str(name)][mine]
        arrays = [
            batch.column(MANIFEST_FILE),
            batch.column(MANIFEST_ROW),
            batch.column("id"),
            _text_column(batch, self.settings.task_column),
            pa.array(first, pa.string()),
            *(pa.array(column, from_pandas=True) for column in (score,)),
            *(pa.array(columns.get(name, nothing), from_pandas=True) for name in self.settings.possible_metrics),
        ]
        return pa.record_batch(arrays, schema=self.schema)

    def _metrics_of_rows(self, batch: pa.RecordBatch) -> list[tuple[str, ...]]:
        settings = self.settings
        rows: list[tuple[str, ...]] = [settings.metrics] * len(batch)
        if settings.task_column and settings.tasks:
            tasks = _text_column(batch, settings.task_column).to_pylist()
            rows = [tuple(settings.tasks.get(task, settings.metrics)) for task in tasks]
        if settings.metric_column:
            for row, value in enumerate(_column(batch, settings.metric_column).to_pylist()):
                if value:
                    rows[row] = _metric_names(value)
        return rows

    def _slice_names(self) -> list[str]:
        names = [*self.settings.slices]
        if self.settings.task_column:
            names = ["task", *(name for name in names if name not in ("task", self.settings.task_column))]
        return list(dict.fromkeys(names))

    def metrics(self) -> dict[str, Any]:
        """The run's numbers: overall and by slice, each with its interval; plain values for JSON."""
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
            "overall": {name: self._number(tally) for name, tally in self._in_order(self._overall).items()},
            "slices": {
                name: [
                    {
                        "value": value,
                        "num_rows": self._slice_counts[name][value],
                        "metrics": {m: self._number(tally) for m, tally in self._in_order(tallies).items()},
                    }
                    for value, tallies in sorted(values.items(), key=lambda item: _slice_order(item[0]))
                ]
                for name, values in self._slices.items()
            },
        }

    def _in_order(self, tallies: dict[str, Tally]) -> dict[str, Tally]:
        """In the order in which the config names the metrics, so that the first is the headline."""
        named = [*self.settings.metrics, *(name for names in self.settings.tasks.values() for name in names), *METRICS]
        return {name: tallies[name] for name in dict.fromkeys(named) if name in tallies}

    def _number(self, tally: Tally) -> dict[str, Any]:
        estimate: Estimate = tally.estimate(self.settings.num_samples, self.settings.seed)
        return asdict(estimate)


_Slices = dict[str, tuple[npt.NDArray[np.int64], list[str]]]

# Buckets that have an order are listed in it, not by the alphabet.
_RESOLUTIONS = ("no media", "below 0.25 MP", "0.25 to 1 MP", "1 to 4 MP", "4 MP and more")
_KINDS = ("text only", "one image", "several images", "one video", "several videos", "images and videos")


def _slice_order(value: str) -> tuple[int, float, str]:
    for known in (_RESOLUTIONS, _KINDS):
        if value in known:
            return (0, known.index(value), value)
    try:
        return (0, float(value), value)
    except ValueError:
        return (2 if value == OTHER else 1, 0.0, value)


def _tally(metric: Metric, num_buckets: int | None = None) -> Tally:
    if num_buckets is None:
        return Tally(metric.num_counts, metric.combine)
    return Tally(metric.num_counts, metric.combine, num_buckets)


def _metric_names(value: Any) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (value.split(",") if isinstance(value, str) else value))
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"the metric column asks for {name!r}; known: {', '.join(METRICS)}")
    return names


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    if name not in batch.schema.names:
        kept = ", ".join(batch.schema.names)
        raise ConfigError(f"the result rows have no column {name!r}; add it to input.keep and run again. Found: {kept}")
    return batch.column(name)


def _text_column(batch: pa.RecordBatch, name: str | None) -> pa.Array:
    if name is None:
        return pa.nulls(len(batch), pa.string())
    column = _column(batch, name)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_nested(column.type):
        return pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())
    return column.cast(pa.string())


def _references(batch: pa.RecordBatch, name: str) -> list[list[str]]:
    """Each row's right answers as texts; empty where the row has none."""
    return [_texts(value) for value in _answers_only(_column(batch, name)).to_pylist()]


def _choices(batch: pa.RecordBatch, name: str | None) -> list[list[str]]:
    if name is None:
        return [[]] * len(batch)
    return [_texts(value) for value in _column(batch, name).to_pylist()]


def _answers_only(column: pa.Array) -> pa.Array:
    """A list of {answer, ...} structs, as VQAv2 publishes it, becomes a list of its answers."""
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return column
    values = column.type.value_type
    if not pa.types.is_struct(values) or values.get_field_index("answer") < 0:
        return column
    answers = pc.struct_field(column.values, "answer")
    kind = pa.ListArray if pa.types.is_list(column.type) else pa.LargeListArray
    # Rows without a list get an empty one from their equal offsets.
    return kind.from_arrays(column.offsets, answers)


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, Sequence):
        return [str(item) for item in value if item is not None]
    return [str(value)]


def _slice_values(batch: pa.RecordBatch, name: str, task_column: str | None) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Each row's slice as a code, and what the codes mean."""
    if name == "task" and task_column:
        name = task_column
    if name in DERIVED_SLICES and name not in batch.schema.names:
        return _derived_slice(batch, name)
    encoded = _text_column(batch, name).fill_null("(none)").dictionary_encode()
    return np.asarray(encoded.indices, np.int64), encoded.dictionary.to_pylist()


def _derived_slice(batch: pa.RecordBatch, name: str) -> tuple[npt.NDArray[np.int64], list[str]]:
    media = batch.column("media")
    counts = np.asarray(pc.fill_null(pc.list_value_length(media), 0), np.int64)
    if name == "num_media":
        numbers, codes = np.unique(counts, return_inverse=True)
        return codes.astype(np.int64), [str(number) for number in numbers]
    flat = media.flatten()
    rows = np.repeat(np.arange(len(batch)), counts)
    if name == "media_kind":
        is_video = np.asarray(pc.fill_null(pc.equal(pc.struct_field(flat, "kind"), "video"), False))
        videos = np.bincount(rows[is_video], minlength=len(batch))
        images = counts - videos
        codes = np.select(
            [counts == 0, (images > 0) & (videos > 0), videos > 1, videos == 1, images > 1], [0, 5, 4, 3, 2], 1
        )
        return codes, list(_KINDS)
    width, height = (
        np.asarray(pc.fill_null(pc.struct_field(flat, f"source_{side}"), 0), np.float64) for side in ("width", "height")
    )
    largest = np.zeros(len(batch))
    np.maximum.at(largest, rows, width * height / 1e6)
    codes = np.where(counts == 0, 0, 1 + np.searchsorted([0.25, 1.0, 4.0], largest, side="right"))
    return codes.astype(np.int64), list(_RESOLUTIONS)


@dataclass(frozen=True)
class RunComparison:
    """Two runs' score rows, joined."""

    metrics: dict[str, Comparison]
    tasks: dict[str, Comparison]
    """By task, over each row's own score."""
    only_candidate: int
    only_baseline: int
    won: tuple[tuple[int, int], ...]
    """Places (manifest file, row) of the rows that gained most."""
    lost: tuple[tuple[int, int], ...]


def compare_runs(
    candidate: Iterable[pa.RecordBatch],
    baseline: Iterable[pa.RecordBatch],
    *,
    by_id: bool = False,
    num_examples: int = 8,
    num_samples: int = 1_000,
    seed: int = 0,
) -> RunComparison:
    """Pairs the score rows of two runs by place, or by id where their manifests differ.

    Holds 16 bytes for each row and metric of either run; text is never loaded.
    """
    mine, theirs = _ScoreTable(candidate, by_id), _ScoreTable(baseline, by_id)
    _, left, right = np.intersect1d(mine.keys, theirs.keys, assume_unique=True, return_indices=True)
    metrics = {}
    for name in mine.columns:
        if name in theirs.columns and name != "score":
            both = _both(mine.columns[name][left], theirs.columns[name][right])
            if both.any():
                metrics[name] = compare(
                    mine.columns[name][left][both], theirs.columns[name][right][both], num_samples, seed
                )
    scores, others = mine.columns["score"][left], theirs.columns["score"][right]
    tasks = {}
    for code, task in enumerate(mine.task_names):
        chosen = (mine.tasks[left] == code) & _both(scores, others)
        if chosen.any():
            tasks[task] = compare(scores[chosen], others[chosen], num_samples, seed)
    difference = np.nan_to_num(scores - others)
    order = np.argsort(difference, kind="stable")
    places = mine.places[left]
    lost = [index for index in order[:num_examples] if difference[index] < 0]
    won = [index for index in order[::-1][:num_examples] if difference[index] > 0]
    return RunComparison(
        metrics=metrics,
        tasks=tasks,
        only_candidate=len(mine.keys) - len(left),
        only_baseline=len(theirs.keys) - len(right),
        won=tuple((int(file), int(row)) for file, row in places[won]),
        lost=tuple((int(file), int(row)) for file, row in places[lost]),
    )


def _both(left: Floats, right: Floats) -> npt.NDArray[np.bool_]:
    return ~(np.isnan(left) | np.isnan(right))


class _ScoreTable:
    """Score rows as arrays; a row that occurs twice counts once."""

    def __init__(self, batches: Iterable[pa.RecordBatch], by_id: bool) -> None:
        keys, tasks, places = [], [], []
        columns: dict[str, list[Floats]] = {}
        self.task_names: list[str] = []
        codes: dict[str | None, int] = {}
        for batch in batches:
            file = np.asarray(batch.column(MANIFEST_FILE), np.int64)
            row = np.asarray(batch.column(MANIFEST_ROW), np.int64)
            places.append(np.column_stack([file, row]))
            keys.append(_hashed(batch.column("id")) if by_id else file << 40 | row)
            encoded = batch.column("task").dictionary_encode()
            for name in encoded.dictionary.to_pylist():
                codes.setdefault(name, len(codes))
            meaning = np.array([codes[name] for name in encoded.dictionary.to_pylist()] + [-1])
            tasks.append(meaning[np.asarray(encoded.indices.fill_null(len(meaning) - 1), np.int64)])
            for name in batch.schema.names:
                if pa.types.is_floating(batch.schema.field(name).type):
                    column = batch.column(name).to_numpy(zero_copy_only=False)
                    columns.setdefault(name, []).append(column.astype(np.float64))
        self.task_names = [name for name in codes if name is not None]
        if not keys:
            self.keys = self.tasks = np.zeros(0, np.int64)
            self.places = np.zeros((0, 2), np.int64)
            self.columns: dict[str, Floats] = {"score": np.zeros(0)}
            return
        self.keys, first = np.unique(np.concatenate(keys), return_index=True)
        self.tasks = np.concatenate(tasks)[first]
        self.places = np.concatenate(places)[first]
        self.columns = {name: np.concatenate(parts)[first] for name, parts in columns.items()}


def _hashed(ids: pa.Array) -> npt.NDArray[np.int64]:
    import pandas as pd  # only for its vectorised hash of strings

    return pd.util.hash_array(ids.to_numpy(zero_copy_only=False)).astype(np.int64)
