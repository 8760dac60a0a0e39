"""What a job will need, from a sample of its rows: counts, tokens, bytes, seconds, and how sure each figure is.

    sampled rows (numbers) --resampling--> totals with ranges --data sheets or a probe--> time, bottleneck, advice

The sample is of runs of neighbouring rows, since files are read in runs; ranges are 95 % intervals of a bootstrap over
the runs. A sample that is the whole manifest is no sample: its figures are exact. Plain arithmetic: knows no files,
codecs, engines or Ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.interval import resampled_sums, wilson_interval
from pipeline.planning.roofline import Gpu, ModelShape, RowWork, decode_flops, prefill_flops, row_seconds, vision_flops

KINDS = ("text", "one image", "several images", "video", "several videos", "images and videos", "unreadable")

# Seconds of one core for preprocessing, fitted to the measured table in README (2 cores, AMD EPYC with AVX2): JPEG
# decoding goes by the file's pixels, resizing and patchifying by those shown. Videos: H.264, decoded frames and shown
# ones. Other processors and codecs differ: hence the range.
ROW_S, DECODE_S_PER_PIXEL, SHOW_S_PER_PIXEL = 1.6e-3, 4.25e-9, 3.2e-9
VIDEO_DECODE_S_PER_PIXEL, VIDEO_SHOW_S_PER_PIXEL = 1.5e-9, 4.0e-9
CORE_RANGE = (0.6, 2.0)

EFFICIENCY_RANGE = (0.2, 0.6)
"""Share of the data sheet's bound that engines reach; the middle of the range is what `value` states."""
OUTPUT_RANGE = (0.25, 1.0)
"""Share of max_tokens that answers are long, where nothing better is known."""
_SAMPLES = 1_000


@dataclass(frozen=True)
class Range:
    """A figure and the range in which it lies."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Range:
        """All three times a factor."""
        return Range(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class MediumFacts:
    """A medium as far as cost goes."""

    kind: str
    grid_thw: tuple[int, int, int]
    source_pixels: int
    """Pixels of the picture, or of a frame, in the file."""
    num_decoded: int
    """Frames to decode."""
    num_shown: int
    """Frames to show."""
    num_bytes: int
    """Bytes of the file."""

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid_thw)

    @property
    def patch_bytes(self) -> int:
        """Bytes in the object store: a picture's two temporal halves are equal, and one travels."""
        return self.num_patches * (588 if self.kind == "image" else 1176)

    @property
    def core_s(self) -> float:
        """Seconds of one core to decode, resize and patchify."""
        shown_pixels = self.patch_bytes / 3
        if self.kind == "image":
            return DECODE_S_PER_PIXEL * self.source_pixels + SHOW_S_PER_PIXEL * shown_pixels
        per_frame = VIDEO_DECODE_S_PER_PIXEL * self.num_decoded + VIDEO_SHOW_S_PER_PIXEL * self.num_shown
        return per_frame * self.source_pixels + SHOW_S_PER_PIXEL * shown_pixels


@dataclass(frozen=True)
class RowFacts:
    """A sampled row as far as cost goes."""

    id: str
    place: tuple[int, int]
    kind: str
    """One of KINDS."""
    media: tuple[MediumFacts, ...] = ()
    num_prompt_tokens: int = 0
    num_visual_tokens: int = 0
    max_tokens: int = 0
    num_samples: int = 1
    always_full: bool = False
    """Whether the answer runs to max_tokens whatever it says (`ignore_eos`)."""
    error_type: str | None = None
    error_message: str | None = None

    @property
    def is_ok(self) -> bool:
        return self.error_type is None

    @property
    def patch_bytes(self) -> int:
        return sum(medium.patch_bytes for medium in self.media)

    @property
    def num_bytes(self) -> int:
        return sum(medium.num_bytes for medium in self.media)

    @property
    def core_s(self) -> float:
        """Seconds of one core in preprocessing."""
        return ROW_S + sum(medium.core_s for medium in self.media)

    def output_tokens(self, share: float) -> float:
        """Tokens of an answer that takes this share of what is allowed."""
        return float(self.max_tokens) if self.always_full else max(1.0, share * self.max_tokens)


def kind_of(media: Sequence[str]) -> str:
    """The row's kind (KINDS) from the kinds of its media."""
    images = sum(kind == "image" for kind in media)
    videos = len(media) - images
    if images and videos:
        return "images and videos"
    if images:
        return "one image" if images == 1 else "several images"
    return ("text", "video")[videos] if videos < 2 else "several videos"


class Sample:
    """Rows drawn in runs from a manifest of `num_rows`."""

    def __init__(self, runs: Sequence[Sequence[RowFacts]], num_rows: int, *, is_whole: bool, seed: int = 0) -> None:
        self.runs = [run for run in runs if run]
        self.rows = [row for run in self.runs for row in run]
        self.num_rows, self.is_whole, self._seed = num_rows, is_whole, seed

    @property
    def answered(self) -> list[RowFacts]:
        """The sampled rows that have no error."""
        return [row for row in self.rows if row.is_ok]

    def total(self, of: Callable[[RowFacts], float]) -> Range:
        """The sum of a figure over all of the manifest's rows; error rows are handed to `of` too."""
        return self._ratio(of, lambda row: 1.0, self.num_rows)

    def mean(self, of: Callable[[RowFacts], float]) -> Range:
        """The mean of a figure over the rows without error."""
        return self._ratio(lambda row: of(row) if row.is_ok else 0.0, lambda row: float(row.is_ok), 1)

    def count(self, of: Callable[[RowFacts], bool]) -> Range:
        """How many of the manifest's rows are so."""
        found = self.total(lambda row: float(of(row)))
        if self.is_whole or not self.rows:
            return found
        # Where all or none of the sample are so, resampling claims a certainty that Wilson's interval does not.
        low, high = wilson_interval(sum(map(of, self.rows)), len(self.rows))
        return Range(found.value, min(found.low, low * self.num_rows), max(found.high, high * self.num_rows))

    def _ratio(self, of: Callable[[RowFacts], float], over: Callable[[RowFacts], float], times: float) -> Range:
        sums = np.array([[sum(map(of, run)), sum(map(over, run))] for run in self.runs], np.float64).reshape(-1, 2)
        value = _divided(sums.sum(axis=0)[None])[0] * times
        if self.is_whole or len(sums) < 2:
            return Range(float(value), float(value), float(value))
        drawn = np.concatenate([_divided(part) for part in resampled_sums(sums, _SAMPLES, self._seed)]) * times
        low, high = np.quantile(drawn, [0.025, 0.975])
        return Range(float(value), float(min(low, value)), float(max(high, value)))


def _divided(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.divide(sums[:, 0], sums[:, 1], out=np.zeros(len(sums)), where=sums[:, 1] > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Rows, tokens, bytes


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
    example_place: tuple[int, int]
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
    num_bad: Range
    visual_tokens: Spread
    prompt_tokens: Spread
    """Visual ones among them."""
    patch_bytes: Spread
    media_bytes: Range
    """To be fetched for the whole manifest."""
    core_s: Range
    """Seconds of one core that preprocessing takes for the whole manifest, by the measured table."""


def describe(sample: Sample) -> Rows:
    """The manifest's rows, from the sample."""
    kinds = {
        kind: sample.count(lambda row, kind=kind: row.kind == kind)  # type: ignore[misc]
        for kind in KINDS
        if any(row.kind == kind for row in sample.rows)
    }
    bad = []
    types = dict.fromkeys(row.error_type for row in sample.rows if row.error_type is not None)
    for error_type in types:
        example = next(row for row in sample.rows if row.error_type == error_type)
        count = sample.count(lambda row, wanted=error_type: row.error_type == wanted)  # type: ignore[misc]
        bad.append(BadRows(error_type, count, example.id, example.place, example.error_message or ""))
    return Rows(
        num_rows=sample.num_rows,
        num_sampled=len(sample.rows),
        is_exact=sample.is_whole,
        kinds=kinds,
        bad=tuple(sorted(bad, key=lambda one: -one.rows.value)),
        num_bad=sample.count(lambda row: not row.is_ok),
        visual_tokens=_spread(sample, lambda row: row.num_visual_tokens),
        prompt_tokens=_spread(sample, lambda row: row.num_prompt_tokens),
        patch_bytes=_spread(sample, lambda row: row.patch_bytes),
        media_bytes=sample.total(lambda row: row.num_bytes),
        core_s=core_seconds(sample),
    )


def _spread(sample: Sample, of: Callable[[RowFacts], int]) -> Spread:
    values = sorted(of(row) for row in sample.answered)
    total = sample.total(lambda row: float(of(row)) if row.is_ok else 0.0)
    return Spread(
        mean=sample.mean(lambda row: float(of(row))),
        median=_quantile(values, 0.5),
        p95=_quantile(values, 0.95),
        largest=float(values[-1]) if values else 0.0,
        total=total,
        histogram=histogram(values),
    )


def _quantile(values: Sequence[int], share: float) -> float:
    return float(np.quantile(np.array(values, np.float64), share)) if values else 0.0


def histogram(values: Iterable[int]) -> tuple[tuple[int, int, int], ...]:
    """(from, to, count) by powers of two, without the empty bins at either end."""
    places = [value.bit_length() for value in values]
    if not places:
        return ()
    return tuple(
        (1 << place - 1 if place else 0, (1 << place) - 1, places.count(place))
        for place in range(min(places), max(places) + 1)
    )


def core_seconds(sample: Sample) -> Range:
    """Seconds of one core that preprocessing takes, widened by how much processors and codecs differ."""
    found = sample.total(lambda row: row.core_s if row.is_ok else ROW_S)
    return Range(found.value, found.low * CORE_RANGE[0], found.high * CORE_RANGE[1])


# ---------------------------------------------------------------------------------------------------------------------
# Time


@dataclass(frozen=True)
class Engines:
    """The hardware that a forecast is for."""

    num_engines: int
    gpus_per_engine: float
    num_cpus: float | None = None
    """Cores for preprocessing; None: as many as it takes."""
    price_per_gpu_hour: float | None = None


@dataclass(frozen=True)
class Times:
    """How long the job runs on some hardware, what it costs, and what holds it up."""

    hardware: str
    basis: str
    """What the figures rest on, in words."""
    engine_rows_per_s: Range
    """Of all engines together."""
    preprocess_rows_per_s_per_core: Range
    cores_per_engine: Range
    """Cores of preprocessing that keep one engine busy."""
    seconds: Range
    bottleneck: str
    gpu_hours: Range | None = None
    cost: Range | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    """Share of the engine's arithmetic in vision, prefill and decode."""
    mean_running: float | None = None
    """Sequences that decode together."""


def work_of(row: RowFacts, output_share: float) -> RowWork:
    """The row as the roofline takes it."""
    grids = tuple(medium.grid_thw for medium in row.media)
    return RowWork(grids, row.num_prompt_tokens, row.output_tokens(output_share), row.num_samples)


def from_data_sheet(
    sample: Sample,
    shape: ModelShape,
    gpu: Gpu,
    engines: Engines,
    *,
    max_running: int,
    cache_tokens: int,
    output_share: tuple[float, float, float] = (OUTPUT_RANGE[0], sum(OUTPUT_RANGE) / 2, OUTPUT_RANGE[1]),
) -> Times:
    """Arithmetic, not a measurement: the data sheet's bound over the share of it that engines reach.

    `output_share` is (low, middle, high) of max_tokens. Where an engine has several GPUs the layers lie one after
    the other on them, so that they take turns: together they are as fast as one.
    """
    lengths = [row.num_prompt_tokens + row.output_tokens(output_share[1]) for row in sample.answered]
    mean_length = sum(lengths) / len(lengths) if lengths else 1.0
    running = max(1.0, min(float(max_running), cache_tokens / mean_length))

    def bound(share: float) -> Range:
        return sample.total(
            lambda row: row_seconds(shape, work_of(row, share), gpu, running=running) if row.is_ok else 0.0
        )

    low, middle, high = (bound(share) for share in output_share)
    slow, fast = EFFICIENCY_RANGE
    gpu_s = Range(middle.value / ((slow + fast) / 2), low.low / fast, high.high / slow)
    return _times(
        sample,
        gpu_s,
        core_seconds(sample),
        engines,
        hardware=f"{engines.num_engines * engines.gpus_per_engine:g} x {gpu.name}",
        basis=(
            f"arithmetic, not a measurement: {slow:.0%} to {fast:.0%} of the data sheet's {gpu.flops / 1e12:,.0f} "
            f"TFLOP/s dense bfloat16 and {gpu.bytes_per_s / 1e12:.2g} TB/s; answers {output_share[0]:.0%} to "
            f"{output_share[2]:.0%} of max_tokens long; preprocessing by a table measured on another machine; "
            "start-up left out"
        ),
        shares=arithmetic_shares(sample, shape, output_share[1]),
        running=running,
    )


def arithmetic_shares(sample: Sample, shape: ModelShape, output_share: float) -> dict[str, float]:
    """Share of vision, prefill and decode in the engine's FLOP."""
    works = [work_of(row, output_share) for row in sample.answered]
    flops = {
        "vision": sum(vision_flops(shape, grid) for work in works for grid in work.grids),
        "prefill": sum(prefill_flops(shape, work.prompt_tokens) for work in works),
        "decode": sum(work.samples * decode_flops(shape, work.prompt_tokens, work.output_tokens) for work in works),
    }
    total = sum(flops.values())
    return {name: value / total if total else 0.0 for name, value in flops.items()}


@dataclass(frozen=True)
class Measured:
    """One stage's run over a few rows of the sample."""

    rows: int
    seconds: float
    output_tokens: int = 0
    """Tokens of the answers, where the stage gives any."""


# What the whole job reaches of its stages in a plain loop, from many small rows to few large ones (measured, README).
_JOB_SHARE = (0.5, 1.0)


def from_probe(
    sample: Sample,
    preprocess: Sequence[Measured],
    engine: Sequence[Measured],
    engines: Engines,
    *,
    hardware: str,
    shares_cores: bool,
    num_cpus: float,
) -> Times:
    """A forecast from rates that were measured on this machine, a piece at a time.

    `shares_cores`: the engine computes on the CPU, so that the stages take turns on the same cores.
    """
    pre, gen = _seconds_per_row(preprocess), _seconds_per_row(engine)
    core_s, engine_s = pre.scaled(sample.num_rows), gen.scaled(sample.count(lambda row: row.is_ok).value)
    basis = (
        f"measured here: {sum(one.rows for one in preprocess):,} rows preprocessed, {sum(one.rows for one in engine):,}"
        f" answered; of that pace a whole job reaches {_JOB_SHARE[0]:.0%} to {_JOB_SHARE[1]:.0%}; start-up left out"
    )
    if not shares_cores:
        engines = Engines(engines.num_engines, engines.gpus_per_engine, num_cpus, engines.price_per_gpu_hour)
        times = _times(sample, engine_s, core_s, engines, hardware=hardware, basis=basis)
        return _slowed(times, engines)
    # Preprocessing takes one core, the engine all of them.
    seconds = Range(*(engine + core / num_cpus for engine, core in zip(_three(engine_s), _three(core_s), strict=True)))
    busier = "the engine" if engine_s.value > core_s.value / num_cpus else "preprocessing"
    times = Times(
        hardware=hardware,
        basis=basis,
        engine_rows_per_s=_inverse(gen),
        preprocess_rows_per_s_per_core=_inverse(pre),
        cores_per_engine=Range(core_s.value / seconds.value, core_s.low / seconds.high, core_s.high / seconds.low),
        seconds=seconds,
        bottleneck=f"the {num_cpus:g} cores, which both stages share; {busier} takes more of them",
    )
    return _slowed(times, engines)


def _slowed(times: Times, engines: Engines) -> Times:
    low, high = _JOB_SHARE
    middle = (low + high) / 2
    seconds = Range(times.seconds.value / middle, times.seconds.low / high, times.seconds.high / low)
    return _with_seconds(times, seconds, engines)


def _seconds_per_row(pieces: Sequence[Measured]) -> Range:
    sums = np.array([[piece.seconds, piece.rows] for piece in pieces], np.float64).reshape(-1, 2)
    value = float(_divided(sums.sum(axis=0)[None])[0])
    if len(sums) < 2:
        return Range(value, value / 1.5, value * 1.5)  # one piece says nothing of its spread
    drawn = np.concatenate([_divided(part) for part in resampled_sums(sums, _SAMPLES, 0)])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Range(value, float(low), float(high))


def _times(
    sample: Sample,
    engine_s: Range,
    core_s: Range,
    engines: Engines,
    *,
    hardware: str,
    basis: str,
    shares: Mapping[str, float] | None = None,
    running: float | None = None,
) -> Times:
    """Both stages side by side: the slower one sets the pace. `engine_s` is for one engine, `core_s` for one core."""
    num_rows = sample.num_rows
    alone = engine_s.scaled(1 / engines.num_engines)
    # Most cores are wanted where engines are fast and preprocessing slow.
    cores = Range(
        _over(core_s.value, engine_s.value), _over(core_s.low, engine_s.high), _over(core_s.high, engine_s.low)
    )
    seconds = alone
    wanted = cores.scaled(engines.num_engines)
    if engines.num_cpus is None:
        bottleneck = (
            f"the engine, given {_cores(wanted.value)} of preprocessing ({_rounded_up(wanted.low)} to "
            f"{_rounded_up(wanted.high)}); with fewer, preprocessing"
        )
    else:
        by_cores = core_s.scaled(1 / engines.num_cpus)
        seconds = Range(*(max(pair) for pair in zip(_three(alone), _three(by_cores), strict=True)))
        if wanted.low > engines.num_cpus:
            bottleneck = (
                f"preprocessing: {engines.num_cpus:g} cores, {_rounded_up(wanted.value)} would keep the GPUs busy"
            )
        elif wanted.high <= engines.num_cpus:
            bottleneck = f"the engine: {_cores(wanted.high)} would do for preprocessing, there are {engines.num_cpus:g}"
        else:
            bottleneck = (
                f"too near to tell: the engine takes {_rounded_up(wanted.low)} to {_rounded_up(wanted.high)} cores of "
                f"preprocessing, there are {engines.num_cpus:g}"
            )
    times = Times(
        hardware=hardware,
        basis=basis,
        engine_rows_per_s=_inverse(alone.scaled(1 / num_rows)) if num_rows else Range(0, 0, 0),
        preprocess_rows_per_s_per_core=_inverse(core_s.scaled(1 / num_rows)) if num_rows else Range(0, 0, 0),
        cores_per_engine=cores,
        seconds=seconds,
        bottleneck=bottleneck,
        shares=shares or {},
        mean_running=running,
    )
    return _with_seconds(times, seconds, engines)


def _with_seconds(times: Times, seconds: Range, engines: Engines) -> Times:
    """The times with these seconds, and the GPU hours and cost that follow."""
    num_gpus = engines.num_engines * engines.gpus_per_engine
    hours = seconds.scaled(num_gpus / 3600) if num_gpus else None
    price = engines.price_per_gpu_hour
    cost = hours.scaled(price) if hours is not None and price is not None else None
    facts = {**vars(times), "seconds": seconds, "gpu_hours": hours, "cost": cost}
    return Times(**facts)


def _three(of: Range) -> tuple[float, float, float]:
    return of.value, of.low, of.high


def _inverse(of: Range) -> Range:
    return Range(_over(1, of.value), _over(1, of.high), _over(1, of.low))


def _over(a: float, b: float) -> float:
    return a / b if b else 0.0


def _rounded_up(cores: float) -> str:
    return f"{max(1, math.ceil(cores)):,}"


def _cores(cores: float) -> str:
    return f"{_rounded_up(cores)} core{'' if cores <= 1 else 's'}"


# ---------------------------------------------------------------------------------------------------------------------
# Room and advice


@dataclass(frozen=True)
class Store:
    """Room in Ray's object store."""

    block_bytes: float
    """Of a full block between the stages, or of all patches where they are fewer."""
    blocks_per_engine: int
    """Blocks that an engine holds or that wait for it."""
    num_blocks: float
    """In the whole job."""
    bytes_per_engine: float


def object_store(rows: Rows, *, block_bytes: float, blocks_in_flight: int, num_engines: int) -> Store:
    """What the patches on their way take at most."""
    total = rows.patch_bytes.total.value
    # A block is closed once it is full, so it holds up to a row more.
    block = min(block_bytes + rows.patch_bytes.p95, max(total, 1.0))
    # Ray hands an actor a few more than it works on; as many wait in the preprocessing actors' outputs.
    per_engine = blocks_in_flight + 4
    return Store(block, per_engine, total / block, min(per_engine * block, total / num_engines))


@dataclass(frozen=True)
class Advice:
    """A setting worth changing, and why."""

    setting: str
    """As on the command line, `--section.key value`; empty where no setting helps."""
    why: str


_FEW = 0.001
_DECODER_CORES = 8
_MANY_VISUAL_TOKENS = 600


def advise(
    sample: Sample, rows: Rows, times: Times | None, engines: Engines, *, longest: int, gpus_needed: int | None
) -> list[Advice]:
    """Settings to change. `longest`: tokens of prompt and answer that fit; `gpus_needed`: where the weights don't."""
    advice = []
    if gpus_needed is not None:
        advice.append(
            Advice(
                f"--resources.gpus_per_engine {gpus_needed}",
                f"the weights and a cache don't fit into {engines.gpus_per_engine:g} GPU{_plural(engines)}",
            )
        )
    too_long = [row for row in sample.rows if row.error_type == "PromptTooLong"]
    room = min(
        (longest - row.max_tokens - (row.num_prompt_tokens - row.num_visual_tokens) for row in too_long), default=0
    )
    if room > 0:
        why = f"rows of up to {max(row.num_prompt_tokens for row in too_long):,} tokens don't fit; media shrink to fit"
        advice.append(Advice(f"--media.max_visual_tokens {room}", why))
    elif too_long:
        advice.append(Advice("", "some rows' text alone is too long for the context: shorten or split it"))
    by_type = {bad.error_type: bad for bad in rows.bad}
    if "AccessDenied" in by_type:
        message = by_type["AccessDenied"].example_message
        advice.append(Advice("--input.allow PLACE,...", f"rows name places that they may not read: {message}"))
    if rows.num_bad.value > _FEW * rows.num_rows and rows.num_rows:
        allowed = min(1.0, math.ceil(200 * rows.num_bad.high / rows.num_rows) / 100)
        why = "stops the job early where far more rows fail than this plan expects"
        advice.append(Advice(f"--run.max_error_fraction {allowed:g}", why))
    if times is not None and engines.gpus_per_engine:
        cores = times.cores_per_engine.scaled(engines.num_engines)
        if engines.num_cpus is None or cores.value > engines.num_cpus:
            setting = f"--resources.preprocess_actors {max(1, math.ceil(cores.value))}"
            advice.append(Advice(setting, "one core each, so that no GPU waits"))
        elif 2 * cores.high < engines.num_cpus:
            setting = f"--resources.preprocess_actors {max(1, math.ceil(cores.high))}"
            advice.append(Advice(setting, "one core each; more would wait for the engines"))
    video_s = sum(medium.core_s for row in sample.answered for medium in row.media if medium.kind == "video")
    all_s = sum(row.core_s for row in sample.answered)
    if times is not None and all_s and video_s > all_s / 2 and times.cores_per_engine.value > _DECODER_CORES:
        why = f"decoding videos takes {video_s / all_s:.0%} of preprocessing; keyframes need far less, and differ"
        advice.append(Advice("--media.video_frames keyframes", why))
    vision = times.shares.get("vision", 0.0) if times is not None else 0.0
    if vision > 0.4 and rows.visual_tokens.mean.value > _MANY_VISUAL_TOKENS:
        why = (
            f"{rows.visual_tokens.mean.value:,.0f} visual tokens a row; {vision:.0%} of the engine's work is the "
            "vision tower's: half the pixels save about half of it"
        )
        advice.append(Advice("--media.max_pixels N", why))
    return advice


def _plural(engines: Engines) -> str:
    return "" if engines.gpus_per_engine == 1 else "s"
