"""Sampled rows, and what they say of the whole manifest: counts, tokens and bytes, each with its 95 % range.

Rows are sampled in runs of neighbours, and neighbours resemble each other. So ranges come from the differences between
groups of neighbouring rows, not between rows. A sample of the whole manifest is exact. Plain arithmetic: knows no
files, codecs, engines or Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import RowError
from pipeline.evaluation.interval import wilson_interval
from pipeline.planning.roofline import RowWork

KINDS = ("text", "one image", "several images", "video", "several videos", "images and videos", "unreadable")
NUM_GROUPS = 32
"""Groups of neighbouring rows that a sample is divided into. A sample has at least as many runs."""
_T95 = 2.04
"""97.5 % quantile of Student's distribution with `NUM_GROUPS - 1` degrees of freedom; used for fewer groups too."""
_SINGLE_ERROR = 0.2
"""Relative error assumed where there is a single group, which has no spread."""


@dataclass(frozen=True)
class Range:
    """A figure of zero or more and its range. Arithmetic combines the extremes; dividing by zero gives zero."""

    value: float
    low: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> Range:
        return cls(value, value, value)

    def __add__(self, other: Range) -> Range:
        return Range(self.value + other.value, self.low + other.low, self.high + other.high)

    def __mul__(self, other: Range | float) -> Range:
        other = other if isinstance(other, Range) else Range.exactly(other)
        return Range(self.value * other.value, self.low * other.low, self.high * other.high)

    def __truediv__(self, other: Range | float) -> Range:
        other = other if isinstance(other, Range) else Range.exactly(other)
        return self * Range(*(1 / part if part else 0.0 for part in (other.value, other.high, other.low)))

    def at_least(self, other: Range) -> Range:
        """The larger of both, part by part."""
        return Range(max(self.value, other.value), max(self.low, other.low), max(self.high, other.high))


@dataclass
class SampledRow:
    """A row as far as its cost goes."""

    id: str
    row_key: tuple[int, int]
    """(number of the manifest's file, row in it)."""
    kind: str = "unreadable"
    """One of KINDS."""
    grids: tuple[tuple[int, int, int], ...] = ()
    """grid_thw of each medium."""
    num_prompt_tokens: int = 0
    num_visual_tokens: int = 0
    max_tokens: int = 0
    num_samples: int = 1
    ignore_eos: bool = False
    """Whether the answer always runs to max_tokens."""
    media_bytes: int = 0
    """Bytes of its media's files."""
    patch_bytes: int = 0
    """Bytes of its patches in the object store."""
    core_s: float = 0.0
    """Seconds of one core in preprocessing."""
    video_core_s: float = 0.0
    """Those among them that videos take."""
    bytes_read: int = 0
    """Bytes of its media that were read to learn all this."""
    num_inexact_videos: int = 0
    """Videos whose frames were computed from the stated duration and rate."""
    error: RowError | None = None

    @property
    def is_ok(self) -> bool:
        return self.error is None

    def work(self, share: float) -> RowWork:
        """The row's work in the engine with an answer that takes this share of max_tokens."""
        output_tokens = float(self.max_tokens) if self.ignore_eos else max(1.0, share * self.max_tokens)
        return RowWork(self.grids, self.num_prompt_tokens, output_tokens, self.num_samples)


def kind_of(media: Sequence[str]) -> str:
    """The row's kind (KINDS) from the kinds of its media."""
    images = media.count("image")
    videos = len(media) - images
    if images and videos:
        return "images and videos"
    if images:
        return "one image" if images == 1 else "several images"
    return ("text", "video")[videos] if videos < 2 else "several videos"


class Sample:
    """Rows sampled from a manifest of `num_rows`, in the manifest's order. Figures are lists with a number a row."""

    def __init__(self, rows: Sequence[SampledRow], num_rows: int, *, is_whole: bool) -> None:
        self.rows = sorted(rows, key=lambda row: row.row_key)
        self.num_rows, self.is_whole = num_rows, is_whole
        self.is_ok = np.array([row.is_ok for row in self.rows], np.float64)

    @property
    def answered(self) -> list[SampledRow]:
        return [row for row in self.rows if row.is_ok]

    def total(self, figures: Sequence[float]) -> Range:
        """The sum over all of the manifest's rows."""
        return self._ratio(np.array(figures, np.float64), np.ones(len(self.rows))) * self.num_rows

    def mean(self, figures: Sequence[float]) -> Range:
        """The mean over the rows without error."""
        return self._ratio(self.is_ok * figures, self.is_ok)

    def count(self, is_so: Sequence[bool]) -> Range:
        """How many of the manifest's rows are so."""
        parts, rows = _grouped(np.array(is_so, np.float64)), _grouped(np.ones(len(self.rows)))
        share, error = _ratio_and_error(parts, rows)
        if self.is_whole or not self.rows:
            return Range.exactly(share * self.num_rows)
        # Wilson's interval for as many independent rows as would have this error. It has a width even where all or
        # none of the sample are so.
        independent = max(1, min(len(self.rows), int(share * (1 - share) / error**2))) if error else len(self.rows)
        low, high = wilson_interval(share * independent, independent)
        return Range(share, low, high) * self.num_rows

    def _ratio(self, parts: npt.NDArray[np.float64], wholes: npt.NDArray[np.float64]) -> Range:
        if self.is_whole:
            return Range.exactly(float(parts.sum() / wholes.sum()) if wholes.any() else 0.0)
        return ratio_of_sums(_grouped(parts), _grouped(wholes))


def _grouped(figures: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sums [groups] of figures [rows] over groups of neighbouring rows."""
    return np.array([group.sum() for group in np.array_split(figures, max(1, min(len(figures), NUM_GROUPS)))])


def ratio_of_sums(parts: npt.NDArray[np.float64], wholes: npt.NDArray[np.float64]) -> Range:
    """The ratio of two sums over groups, with its range by the differences between the groups.

    The error of the ratio's logarithm is taken as normal, so that the range never includes negative numbers.
    """
    ratio, error = _ratio_and_error(parts, wholes)
    factor = math.exp(_T95 * error / ratio) if ratio else 1.0
    return Range(ratio, ratio / factor, ratio * factor)


def _ratio_and_error(parts: npt.NDArray[np.float64], wholes: npt.NDArray[np.float64]) -> tuple[float, float]:
    """(ratio of the sums, its standard error): the ratio estimator of cluster sampling (Cochran 1977, section 6)."""
    total, groups = float(wholes.sum()), len(parts)
    if not total:
        return 0.0, 0.0
    ratio = float(parts.sum()) / total
    if groups < 2:
        return ratio, _SINGLE_ERROR * ratio
    residuals = float(((parts - ratio * wholes) ** 2).sum())
    return ratio, math.sqrt(groups / (groups - 1) * residuals) / total


@dataclass(frozen=True)
class Spread:
    """How a count is spread over the rows without error."""

    mean: Range
    median: float
    p95: float
    largest: float
    total: Range
    """Over the whole manifest."""
    histogram: tuple[tuple[int, int, int], ...]
    """(from, to, sampled rows) by powers of two; both ends belong to the bin."""


@dataclass(frozen=True)
class BadRows:
    """Rows that will end as errors of one type."""

    error_type: str
    rows: Range
    example_id: str
    example_row_key: tuple[int, int]
    example_message: str


@dataclass(frozen=True)
class Rows:
    """What is in the manifest."""

    num_rows: int
    num_sampled: int
    is_exact: bool
    """Whether every row was looked at."""
    kinds: Mapping[str, Range]
    bad: tuple[BadRows, ...]
    """The most frequent error first."""
    num_bad: Range
    visual_tokens: Spread
    prompt_tokens: Spread
    """Visual ones among them."""
    patch_bytes: Spread
    media_bytes: Range
    """To be fetched for the whole manifest."""
    core_s: Range
    """Seconds of one core that preprocessing takes for the whole manifest, by the measured table."""


CORE_FACTOR = Range(1.0, 0.6, 2.0)
"""How much processors and codecs differ from those of the measured table."""


def describe(sample: Sample) -> Rows:
    """The manifest's rows, from the sample."""
    found = {row.kind for row in sample.rows}
    examples: dict[str, SampledRow] = {}
    for row in sample.rows:
        if row.error is not None:
            examples.setdefault(type(row.error).__name__, row)
    bad = []
    for error_type, example in examples.items():
        count = sample.count([type(row.error).__name__ == error_type for row in sample.rows])
        bad.append(BadRows(error_type, count, example.id, example.row_key, str(example.error)))
    return Rows(
        num_rows=sample.num_rows,
        num_sampled=len(sample.rows),
        is_exact=sample.is_whole,
        kinds={kind: sample.count([row.kind == kind for row in sample.rows]) for kind in KINDS if kind in found},
        bad=tuple(sorted(bad, key=lambda one: -one.rows.value)),
        num_bad=sample.count([not row.is_ok for row in sample.rows]),
        visual_tokens=_spread(sample, [row.num_visual_tokens for row in sample.rows]),
        prompt_tokens=_spread(sample, [row.num_prompt_tokens for row in sample.rows]),
        patch_bytes=_spread(sample, [row.patch_bytes for row in sample.rows]),
        media_bytes=sample.total([row.media_bytes for row in sample.rows]),
        core_s=sample.total([row.core_s for row in sample.rows]) * CORE_FACTOR,
    )


def _spread(sample: Sample, figures: Sequence[int]) -> Spread:
    counted = [figure for figure, row in zip(figures, sample.rows, strict=True) if row.is_ok]
    median, p95, largest = np.quantile(counted or [0], [0.5, 0.95, 1.0]).tolist()
    total = sample.total((sample.is_ok * figures).tolist())
    return Spread(sample.mean(figures), median, p95, largest, total, histogram(counted))


def histogram(counts: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """(from, to, how many) by powers of two, without the empty bins at either end."""
    bits = [count.bit_length() for count in counts]
    if not bits:
        return ()
    return tuple((1 << bit >> 1, (1 << bit) - 1, bits.count(bit)) for bit in range(min(bits), max(bits) + 1))
