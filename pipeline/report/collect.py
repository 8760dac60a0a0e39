"""One pass over the result rows: counts, distributions, and which few rows the gallery shows.

Memory is bounded: integer histograms, a counter a kind of error, and the best few rows of each section. Which rows
are "random", and which of equals are shown, follows from a seed. Knows result rows and scores; not pages.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.results.reader import Ints, Position, ResultBatch, RunReader, place_keys
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW, Status

Floats = npt.NDArray[np.float64]

_COLUMNS = (
    "text", "finish_reason", "num_output_tokens", "num_prompt_tokens", "num_visual_tokens", "generate_s",
    "preprocess_s", "status", "error_stage", "error_type", "attempts", MANIFEST_FILE, MANIFEST_ROW,
)  # fmt: skip
_MAX_COUNT = 1 << 20
_MAX_ERROR_TYPES = 100
_SECONDS_BINS = np.geomspace(1e-4, 1e5, 1_801)  # 200 bins a decade: quantiles to about 1 %
# Text that zlib squeezes to less than this repeats itself; ordinary prose stays above a third.
_REPEATING_RATIO = 0.12
_REPEATING_FROM = 300


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

    def bins(self, most: int = 40) -> list[tuple[int, int, int]]:
        """(first, last, rows) of up to `most` bins of equal, round width from the smallest value to the largest."""
        if not self.num_rows:
            return []
        low, high = int(np.flatnonzero(self._counts)[0]), self.largest
        width = _round_up((high - low + 1) / most)
        start = low // width * width
        edges = np.arange(start, high + 1, width)
        padded = np.append(self._counts, np.zeros(width, np.int64))
        return [(int(edge), int(edge) + width - 1, int(padded[edge : edge + width].sum())) for edge in edges]


def _round_up(width: float) -> int:
    for scale in (10**power for power in range(8)):
        for step in (1, 2, 5):
            if step * scale >= width:
                return int(step * scale)
    return _MAX_COUNT


class SecondsHistogram:
    """Durations, to about one per cent."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(_SECONDS_BINS) + 1, np.int64)
        self.total = 0.0

    def add(self, values: Floats) -> None:
        self.total += float(values.sum())
        self._counts += np.bincount(np.searchsorted(_SECONDS_BINS, values), minlength=len(self._counts))

    @property
    def num_rows(self) -> int:
        return int(self._counts.sum())

    def quantile(self, share: float) -> float:
        place = int(np.searchsorted(np.cumsum(self._counts), share * self.num_rows))
        return float(_SECONDS_BINS[min(place, len(_SECONDS_BINS) - 1)])


class Top:
    """The rows with the largest keys; of equal ones a random few."""

    def __init__(self, size: int, generator: np.random.Generator) -> None:
        self._size = size
        self._generator = generator
        self._entries: list[tuple[float, float, Position]] = []

    def add(self, keys: Floats, file: int, rows: Ints) -> None:
        """Offers rows; NaN keys never count."""
        offered = np.flatnonzero(~np.isnan(keys))
        if len(self._entries) == self._size:
            offered = offered[keys[offered] >= self._entries[-1][0]]
        if not len(offered):
            return
        ties = self._generator.random(len(offered))
        best = np.lexsort((ties, keys[offered]))[::-1][: self._size]
        self._entries += [
            (float(keys[offered[index]]), float(ties[index]), Position(file, int(rows[offered[index]])))
            for index in best
        ]
        self._entries = sorted(self._entries, reverse=True)[: self._size]

    @property
    def positions(self) -> list[Position]:
        """Largest key first."""
        return [position for _, _, position in self._entries]


@dataclass
class ErrorKind:
    """One type of error at one stage."""

    kind: str
    stage: str
    count: int
    example: Position


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
    sections: dict[str, list[Position]] = field(default_factory=dict)
    """Name of a gallery section to its rows."""
    scores: dict[Position, tuple[str, float]] = field(default_factory=dict)
    """Metric and score of the rows in the gallery."""
    by_place: dict[int, Position] = field(default_factory=dict)
    """Positions of the places that were asked for."""
    scores_fit: bool = True
    """Whether scores.parquet belongs to these rows."""

    @property
    def num_errors(self) -> int:
        return self.num_rows - self.num_ok


def collect(reader: RunReader, *, size: int = 6, places: Collection[int] = (), seed: int = 0) -> Collected:
    """Reads every row once. `size` rows in each section; `places` (place keys) are looked up on the way."""
    found = Collected()
    generator = np.random.default_rng(seed)
    tops = {
        name: Top(size, generator)
        for name in ("best", "worst", "random", "longest", "slowest", "truncated", "repeating")
    }
    scores = _Scores(reader)
    wanted = np.array(sorted(places), np.int64)
    for one in reader.batches(_COLUMNS):
        batch = one.batch
        answered = _equal(batch, "status", Status.OK.value)
        found.num_rows += len(batch)
        found.num_ok += int(answered.sum())
        attempts = _integers(batch, "attempts")
        found.num_retried += int((attempts > 1).sum())
        _count_errors(found, one, answered)
        score = scores.next(batch)
        _count_answers(found, one, answered, tops)
        tops["random"].add(np.where(answered, generator.random(len(batch)), np.nan), one.file, one.rows)
        if score is not None:
            tops["best"].add(np.where(answered, score, np.nan), one.file, one.rows)
            tops["worst"].add(np.where(answered, -score, np.nan), one.file, one.rows)
        if len(wanted):
            keys = place_keys(batch)
            for index in np.flatnonzero(np.isin(keys, wanted)):
                found.by_place[int(keys[index])] = Position(one.file, int(one.rows[index]))
    found.sections = {name: top.positions for name, top in tops.items()}
    found.scores_fit = scores.fit
    if scores.fit and reader.has_scores:
        chosen = {position for positions in found.sections.values() for position in positions}
        chosen |= set(found.by_place.values())
        found.scores = _scores_of(reader, chosen)
        _part_best_from_worst(found)
    return found


def _part_best_from_worst(found: Collected) -> None:
    """No row is among both: what scores as high as the best is no "worst", what scores nothing no "best"."""
    score = {position: value for position, (_, value) in found.scores.items()}
    best = [position for position in found.sections["best"] if score.get(position, 0.0) > 0.0]
    highest = max((score[position] for position in best), default=float("inf"))
    found.sections["best"] = best
    found.sections["worst"] = [one for one in found.sections["worst"] if score.get(one, 0.0) < highest]


def _count_errors(found: Collected, one: ResultBatch, answered: npt.NDArray[np.bool_]) -> None:
    failed = np.flatnonzero(~answered)
    if not len(failed):
        return
    types = one.batch.column("error_type").take(pa.array(failed)).to_pylist()
    stages = one.batch.column("error_stage").take(pa.array(failed)).to_pylist()
    for index, kind, stage in zip(failed, types, stages, strict=True):
        key = (kind or "unknown", stage or "unknown")
        if key not in found.errors and len(found.errors) >= _MAX_ERROR_TYPES:
            key = ("others", "several")
        entry = found.errors.get(key)
        if entry is None:
            entry = found.errors[key] = ErrorKind(*key, 0, Position(one.file, int(one.rows[index])))
        entry.count += 1


def _count_answers(found: Collected, one: ResultBatch, answered: npt.NDArray[np.bool_], tops: dict[str, Top]) -> None:
    batch, file, rows = one.batch, one.file, one.rows
    for name, histogram in (
        ("num_output_tokens", found.output_tokens),
        ("num_prompt_tokens", found.prompt_tokens),
        ("num_visual_tokens", found.visual_tokens),
    ):
        histogram.add(_integers(batch, name)[answered])
    for name, seconds in (("generate_s", found.generate_s), ("preprocess_s", found.preprocess_s)):
        values = _floats(batch, name)
        seconds.add(values[answered & ~np.isnan(values)])
    reasons = pc.value_counts(batch.column("finish_reason").filter(pa.array(answered))).to_pylist()
    found.finish_reasons.update({entry["values"] or "unknown": entry["counts"] for entry in reasons})
    lengths = np.asarray(pc.fill_null(pc.utf8_length(batch.column("text")), 0), np.int64)
    found.characters.add(lengths[answered])
    found.num_empty += int((answered & (lengths == 0)).sum())
    repeating = answered & (_equal(batch, "finish_reason", "repetition") | _repeats(batch, lengths))
    found.num_repeating += int(repeating.sum())
    truncated = answered & _equal(batch, "finish_reason", "length")
    tokens = _integers(batch, "num_output_tokens").astype(np.float64)
    tops["longest"].add(np.where(answered, tokens, np.nan), file, rows)
    tops["slowest"].add(np.where(answered, _floats(batch, "generate_s"), np.nan), file, rows)
    tops["truncated"].add(np.where(truncated, tokens, np.nan), file, rows)
    tops["repeating"].add(np.where(repeating, tokens, np.nan), file, rows)


def _repeats(batch: pa.RecordBatch, lengths: Ints) -> npt.NDArray[np.bool_]:
    """Which texts say the same again and again, by how well they compress."""
    repeating = np.zeros(len(batch), bool)
    texts = batch.column("text")
    for index in np.flatnonzero(lengths >= _REPEATING_FROM):
        data = texts[int(index)].as_py().encode("utf-8", "replace")
        repeating[index] = len(zlib.compress(data, 1)) < _REPEATING_RATIO * len(data)
    return repeating


def _equal(batch: pa.RecordBatch, name: str, value: str) -> npt.NDArray[np.bool_]:
    if name not in batch.schema.names:
        return np.zeros(len(batch), bool)
    return np.asarray(pc.fill_null(pc.equal(batch.column(name), value), False), bool)


def _integers(batch: pa.RecordBatch, name: str) -> Ints:
    if name not in batch.schema.names:
        return np.zeros(len(batch), np.int64)
    return np.asarray(pc.fill_null(batch.column(name), 0), np.int64)


def _floats(batch: pa.RecordBatch, name: str) -> Floats:
    if name not in batch.schema.names:
        return np.full(len(batch), np.nan)
    values: Floats = batch.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
    return values


class _Scores:
    """The score rows, cut to the batches of result rows they belong to."""

    def __init__(self, reader: RunReader) -> None:
        columns = (MANIFEST_FILE, MANIFEST_ROW, "score")
        self._source: Iterator[pa.RecordBatch] = reader.score_batches(columns) if reader.has_scores else iter(())
        self._active = reader.has_scores
        self._rest: pa.RecordBatch | None = None
        self.fit = True

    def next(self, batch: pa.RecordBatch) -> Floats | None:
        """Scores of the batch's rows; None where there are none, or they belong to other rows."""
        if not self._active:
            return None
        pieces, missing = [], len(batch)
        while missing:
            if self._rest is None or not len(self._rest):
                self._rest = next(self._source, None)
                if self._rest is None:
                    self._give_up()
                    return None
            piece = self._rest.slice(0, missing)
            self._rest = self._rest.slice(len(piece))
            missing -= len(piece)
            pieces.append(piece)
        scores = pa.Table.from_batches(pieces).combine_chunks().to_batches()[0]
        if not np.array_equal(place_keys(scores), place_keys(batch)):
            self._give_up()
            return None
        return _floats(scores, "score")

    def _give_up(self) -> None:
        self._active = self.fit = False


def _scores_of(reader: RunReader, chosen: Collection[Position]) -> dict[Position, tuple[str, float]]:
    """Metric and score of a few rows, from a second look at the score rows."""
    found: dict[Position, tuple[str, float]] = {}
    by_order: dict[int, Position] = {}
    start = 0
    for number, file in enumerate(reader.files):
        for position in (one for one in chosen if one.file == number):
            order = position.row if file.counted is None else int(file.counted[: position.row].sum())
            by_order[start + order] = position
        start += file.num_rows if file.counted is None else int(file.counted.sum())
    first = 0
    for batch in reader.score_batches(("metric", "score")):
        for order in [order for order in by_order if first <= order < first + len(batch)]:
            metric, score = (batch.column(name)[order - first].as_py() for name in ("metric", "score"))
            if score is not None:
                found[by_order.pop(order)] = (metric, score)
        first += len(batch)
    return found
