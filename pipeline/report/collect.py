"""One pass over the result rows: counts, distributions, and which few rows the gallery shows.

Memory is bounded: integer histograms, a counter for each kind of error, and the best few rows of each section. Which
rows are "random", and which of equal rows are shown, follows from a seed. Rows go by their number in the reader's
order. Knows result rows and scores; not pages.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.results.reader import Ints, RunReader, row_keys
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW, Status

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_COLUMNS = (
    "text", "finish_reason", "num_output_tokens", "num_prompt_tokens", "num_visual_tokens", "generate_s",
    "preprocess_s", "status", "error_stage", "error_type", "attempts", MANIFEST_FILE, MANIFEST_ROW,
)  # fmt: skip
_MAX_COUNT = 1 << 20
_MAX_ERROR_TYPES = 100
_SECONDS_BINS = np.geomspace(1e-4, 1e5, 1_801)  # 200 bins a decade: quantiles to about 1 %
# Text that zlib squeezes to less than this repeats itself; ordinary prose stays above a third.
_REPEATING_RATIO = 0.12
_MIN_REPEATING_CHARACTERS = 300


class CountHistogram:
    """Exact counts of small whole numbers, such as tokens."""

    def __init__(self) -> None:
        self._counts = np.zeros(1, np.int64)
        self.total = 0

    def add(self, values: Ints) -> None:
        self.total += int(values.sum())
        counts = np.bincount(np.clip(values, 0, _MAX_COUNT), minlength=len(self._counts))
        counts[: len(self._counts)] += self._counts
        self._counts = counts

    @property
    def num_rows(self) -> int:
        return int(self._counts.sum())

    @property
    def mean(self) -> float:
        return self.total / max(self.num_rows, 1)

    @property
    def largest(self) -> int:
        return int(np.flatnonzero(self._counts)[-1]) if self.num_rows else 0

    def quantile(self, share: float) -> int:
        return int(np.searchsorted(np.cumsum(self._counts), share * self.num_rows)) if self.num_rows else 0

    def bins(self, max_bins: int = 40) -> list[tuple[int, int, int]]:
        """(first, last, rows) of about `max_bins` bins of equal, round width from the smallest value to the largest."""
        if not self.num_rows:
            return []
        low, high = int(np.flatnonzero(self._counts)[0]), self.largest
        widths = (step * 10**power for power in range(8) for step in (1, 2, 5))
        width = next(width for width in widths if width >= (high - low + 1) / max_bins)
        edges = np.arange(low // width * width, high + 1, width)
        padded = np.append(self._counts, np.zeros(width, np.int64))
        return [(int(edge), int(edge) + width - 1, int(padded[edge : edge + width].sum())) for edge in edges]


class SecondsHistogram:
    """Durations, to about one per cent."""

    def __init__(self) -> None:
        self._bins = CountHistogram()

    def add(self, values: Floats) -> None:
        self._bins.add(np.searchsorted(_SECONDS_BINS, values))

    @property
    def num_rows(self) -> int:
        return self._bins.num_rows

    def quantile(self, share: float) -> float:
        return float(_SECONDS_BINS[min(self._bins.quantile(share), len(_SECONDS_BINS) - 1)])


class Top:
    """The rows with the largest keys; of equal ones a random few."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self._size = size
        self._rng = rng
        self._entries: list[tuple[float, float, int]] = []

    def add(self, keys: Floats, first: int) -> None:
        """Offers rows that are numbered from `first`; NaN keys never count."""
        offered = np.flatnonzero(~np.isnan(keys))
        if len(self._entries) == self._size:
            offered = offered[keys[offered] >= self._entries[-1][0]]
        ties = self._rng.random(len(offered))
        best = np.lexsort((ties, keys[offered]))[::-1][: self._size]
        self._entries += [
            (float(keys[row]), float(tie), first + int(row)) for row, tie in zip(offered[best], ties[best], strict=True)
        ]
        self._entries = sorted(self._entries, reverse=True)[: self._size]

    @property
    def rows(self) -> list[int]:
        return [row for _, _, row in self._entries]


@dataclass
class ErrorKind:
    """One type of error at one stage."""

    kind: str
    stage: str
    example: int
    num_rows: int = 0


@dataclass
class Collected:
    """What one pass over the rows found."""

    num_rows: int = 0
    num_ok: int = 0
    num_retried: int = 0
    num_empty: int = 0
    num_repeating: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    errors: dict[tuple[str, str], ErrorKind] = field(default_factory=dict)
    output_tokens: CountHistogram = field(default_factory=CountHistogram)
    prompt_tokens: CountHistogram = field(default_factory=CountHistogram)
    visual_tokens: CountHistogram = field(default_factory=CountHistogram)
    characters: CountHistogram = field(default_factory=CountHistogram)
    generate_s: SecondsHistogram = field(default_factory=SecondsHistogram)
    preprocess_s: SecondsHistogram = field(default_factory=SecondsHistogram)
    sections: dict[str, list[int]] = field(default_factory=dict)
    """Name of a gallery section to its rows."""
    scores_fit: bool = True
    """Whether scores.parquet, if there is one, belongs to these rows."""

    @property
    def num_errors(self) -> int:
        return self.num_rows - self.num_ok


def collect(reader: RunReader, *, size: int, seed: int = 0) -> Collected:
    """Reads every row once; `size` rows for each section."""
    found = Collected()
    rng = np.random.default_rng(seed)
    names = ("best", "worst", "random", "longest", "slowest", "truncated", "repeating")
    tops = {name: Top(size, rng) for name in names}
    scores = _ScoreStream(reader)
    for batch in reader.batches(_COLUMNS):
        first = found.num_rows
        answered = _equal(batch, "status", Status.OK.value)
        found.num_rows += len(batch)
        found.num_ok += int(answered.sum())
        found.num_retried += int((_integers(batch, "attempts") > 1).sum())
        _count_errors(found, batch, answered, first)
        _count_answers(found, batch, answered, first, tops)
        tops["random"].add(np.where(answered, rng.random(len(batch)), np.nan), first)
        score = scores.take(batch)
        if score is not None:
            tops["best"].add(np.where(answered, score, np.nan), first)
            tops["worst"].add(np.where(answered, -score, np.nan), first)
    found.scores_fit = scores.fit
    if not scores.fit:
        tops |= {name: Top(size, rng) for name in ("best", "worst")}
    found.sections = {name: top.rows for name, top in tops.items()}
    return found


def separate_best_from_worst(found: Collected, scores: Mapping[int, Mapping[str, Any]]) -> None:
    """No row is among both: what scores as high as the best is no "worst", what scores nothing no "best"."""
    best = [row for row in found.sections["best"] if scores[row]["score"] > 0.0]
    highest = max((scores[row]["score"] for row in best), default=float("inf"))
    found.sections["best"] = best
    found.sections["worst"] = [row for row in found.sections["worst"] if scores[row]["score"] < highest]


def _count_errors(found: Collected, batch: pa.RecordBatch, answered: Mask, first: int) -> None:
    failed = np.flatnonzero(~answered)
    types, stages = (batch.column(name).take(pa.array(failed)).to_pylist() for name in ("error_type", "error_stage"))
    for row, kind, stage in zip(failed, types, stages, strict=True):
        key = (kind or "unknown", stage or "unknown")
        if key not in found.errors and len(found.errors) >= _MAX_ERROR_TYPES:
            key = ("others", "several")
        found.errors.setdefault(key, ErrorKind(*key, example=first + int(row))).num_rows += 1


def _count_answers(found: Collected, batch: pa.RecordBatch, answered: Mask, first: int, tops: dict[str, Top]) -> None:
    tokens, seconds = _integers(batch, "num_output_tokens"), _floats(batch, "generate_s")
    found.output_tokens.add(tokens[answered])
    found.prompt_tokens.add(_integers(batch, "num_prompt_tokens")[answered])
    found.visual_tokens.add(_integers(batch, "num_visual_tokens")[answered])
    found.generate_s.add(_known(seconds[answered]))
    found.preprocess_s.add(_known(_floats(batch, "preprocess_s")[answered]))
    reasons = pc.value_counts(batch.column("finish_reason").filter(pa.array(answered))).to_pylist()
    found.finish_reasons.update({entry["values"] or "unknown": entry["counts"] for entry in reasons})
    lengths = np.asarray(pc.fill_null(pc.utf8_length(batch.column("text")), 0), np.int64)
    found.characters.add(lengths[answered])
    found.num_empty += int((answered & (lengths == 0)).sum())
    repeating = answered & (_equal(batch, "finish_reason", "repetition") | _repeats(batch, lengths))
    found.num_repeating += int(repeating.sum())
    truncated = answered & _equal(batch, "finish_reason", "length")
    tops["longest"].add(np.where(answered, tokens, np.nan), first)
    tops["slowest"].add(np.where(answered, seconds, np.nan), first)
    tops["truncated"].add(np.where(truncated, tokens, np.nan), first)
    tops["repeating"].add(np.where(repeating, tokens, np.nan), first)


def _repeats(batch: pa.RecordBatch, lengths: Ints) -> Mask:
    """Which texts say the same again and again, by how well they compress."""
    repeating = np.zeros(len(batch), bool)
    texts = batch.column("text")
    for row in np.flatnonzero(lengths >= _MIN_REPEATING_CHARACTERS):
        data = texts[int(row)].as_py().encode("utf-8", "replace")
        repeating[row] = len(zlib.compress(data, 1)) < _REPEATING_RATIO * len(data)
    return repeating


def _equal(batch: pa.RecordBatch, name: str, value: str) -> Mask:
    return np.asarray(pc.fill_null(pc.equal(batch.column(name), value), False), bool)


def _integers(batch: pa.RecordBatch, name: str) -> Ints:
    return np.asarray(pc.fill_null(batch.column(name), 0), np.int64)


def _floats(batch: pa.RecordBatch | pa.Table, name: str) -> Floats:
    return np.asarray(batch.column(name).to_numpy(zero_copy_only=False), np.float64)


def _known(values: Floats) -> Floats:
    return values[~np.isnan(values)]


class _ScoreStream:
    """The score rows, cut to the batches of result rows that they belong to."""

    def __init__(self, reader: RunReader) -> None:
        self._source = reader.score_batches((MANIFEST_FILE, MANIFEST_ROW, "score")) if reader.has_scores else None
        self._waiting: list[pa.RecordBatch] = []
        self.fit = True
        """Whether the scores belong to the rows so far."""

    def take(self, batch: pa.RecordBatch) -> Floats | None:
        """Scores of the next batch of rows; None where there are none, or they belong to other rows."""
        if self._source is None or not self.fit:
            return None
        while sum(map(len, self._waiting)) < len(batch) and (more := next(self._source, None)) is not None:
            self._waiting.append(more)
        table = pa.Table.from_batches(self._waiting) if self._waiting else None
        if table is None or not np.array_equal(row_keys(table.slice(0, len(batch))), row_keys(batch)):
            self.fit = False
            return None
        self._waiting = table.slice(len(batch)).to_batches()
        return _floats(table.slice(0, len(batch)), "score")
