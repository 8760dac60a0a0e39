"""Time, cost and bottleneck of a job, from its sampled rows and either data sheets or a probe; and the object store.

    sample --seconds of engine, seconds of cores--> both stages side by side --> time, GPU hours, cost, bottleneck

Plain arithmetic: knows no files, codecs, engines or Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.errors import counted
from pipeline.planning.roofline import Gpu, ModelShape, row_flops, row_seconds
from pipeline.planning.sample import Range, Rows, Sample, ratio_of_sums

EFFICIENCY = Range(0.4, 0.2, 0.6)
"""Share of the data sheet's bound that engines reach."""
OUTPUT_SHARE = Range(0.625, 0.25, 1.0)
"""Share of max_tokens that an answer takes, where nothing better is known."""
JOB_SHARE = Range(0.75, 0.5, 1.0)
"""Share of the stages' pace in a plain loop that a whole job reaches, from many small rows to few large ones
(measured)."""


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
    """How long the job runs on some hardware, what it costs, and which stage limits it."""

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
    data_sheet: str = ""
    """The GPU's peaks that the figures rest on."""
    gpu_hours: Range | None = None
    cost: Range | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    """Share of the engine's arithmetic in vision, prefill and decode."""
    mean_running: float | None = None
    """Sequences that decode together."""


def from_data_sheet(
    sample: Sample,
    rows: Rows,
    shape: ModelShape,
    gpu: Gpu,
    engines: Engines,
    *,
    max_running: int,
    cache_tokens: int,
    output_share: Range = OUTPUT_SHARE,
) -> Times:
    """Arithmetic, not a measurement: the data sheet's bound over the share of it that engines reach.

    `output_share` is a share of max_tokens. Where an engine has several GPUs, the layers lie one after the other on
    them and they take turns: together they are as fast as one.
    """
    works = [row.work(output_share.value) for row in sample.answered]
    mean_length = np.mean([work.prompt_tokens + work.output_tokens for work in works]) if works else 1.0
    running = max(1.0, min(max_running, cache_tokens / float(mean_length)))

    def bound(share: float) -> Range:
        return sample.total(
            [row_seconds(shape, gpu, row.work(share), running=running) if row.is_ok else 0.0 for row in sample.rows]
        )

    flops = np.array([row_flops(shape, work) for work in works]).reshape(-1, 3).sum(axis=0)
    bounds = Range(bound(output_share.value).value, bound(output_share.low).low, bound(output_share.high).high)
    basis = (
        f"arithmetic, not a measurement: {EFFICIENCY.low:.0%} to {EFFICIENCY.high:.0%} of the data sheet's pace; "
        f"answers {output_share.low:.0%} to {output_share.high:.0%} of max_tokens long; preprocessing by a table "
        "measured on another machine; start-up left out"
    )
    hardware = f"{engines.num_engines * engines.gpus_per_engine:g} x {gpu.name}"
    return replace(
        _times(sample.num_rows, bounds / EFFICIENCY, rows.core_s, engines, hardware, basis),
        data_sheet=f"{gpu.flops / 1e12:,.0f} TFLOP/s dense bfloat16, {gpu.bytes_per_s / 1e12:.2g} TB/s",
        shares=dict(zip(("vision", "prefill", "decode"), (flops / (flops.sum() or 1.0)).tolist(), strict=True)),
        mean_running=running,
    )


@dataclass(frozen=True)
class Measured:
    """One stage's run over a few rows of the sample."""

    rows: int
    seconds: float
    output_tokens: int = 0
    """Tokens of the answers, where the stage gives any."""


def from_probe(
    sample: Sample,
    preprocess: Sequence[Measured],
    engine: Sequence[Measured],
    engines: Engines,
    *,
    hardware: str,
    num_shared_cores: int | None = None,
) -> Times:
    """A forecast from rates that were measured on this machine, a piece at a time.

    `num_shared_cores`: where the engine computes on the CPU too, the cores that both stages take turns on.
    """
    basis = (
        f"measured here: {sum(one.rows for one in preprocess):,} rows preprocessed, {sum(one.rows for one in engine):,}"
        f" answered; of that pace a whole job reaches {JOB_SHARE.low:.0%} to {JOB_SHARE.high:.0%}; start-up left out"
    )
    engine_s, core_s = (
        ratio_of_sums(np.array([one.seconds for one in pieces]), np.array([float(one.rows) for one in pieces]))
        for pieces in (engine, preprocess)
    )
    # Rows that fail never reach the engine.
    engine_s *= sample.total(sample.is_ok.tolist()).value
    core_s *= sample.num_rows
    return _times(sample.num_rows, engine_s, core_s, engines, hardware, basis, num_shared_cores, JOB_SHARE)


def _times(
    num_rows: int,
    engine_s: Range,
    core_s: Range,
    engines: Engines,
    hardware: str,
    basis: str,
    num_shared_cores: int | None = None,
    pace: Range | None = None,
) -> Times:
    """The whole job. `engine_s` is for one engine, `core_s` for one core; `pace`: the share of it that is reached."""
    alone, cores = engine_s / engines.num_engines, core_s / engine_s
    if num_shared_cores:  # preprocessing takes one core, the engine all of them
        by_cores = core_s / num_shared_cores
        busier = "the engine" if engine_s.value > by_cores.value else "preprocessing"
        bottleneck = f"the {num_shared_cores} cores, which both stages share; {busier} takes more of them"
        seconds = engine_s + by_cores
    else:
        bottleneck = _bottleneck(cores * engines.num_engines, engines.num_cpus)
        seconds = alone.at_least(core_s / engines.num_cpus) if engines.num_cpus else alone
    seconds = seconds / pace if pace is not None else seconds
    num_gpus, price = engines.num_engines * engines.gpus_per_engine, engines.price_per_gpu_hour
    hours = seconds * (num_gpus / 3600) if num_gpus else None
    return Times(
        hardware=hardware,
        basis=basis,
        engine_rows_per_s=Range.exactly(num_rows) / alone,
        preprocess_rows_per_s_per_core=Range.exactly(num_rows) / core_s,
        cores_per_engine=cores,
        seconds=seconds,
        bottleneck=bottleneck,
        gpu_hours=hours,
        cost=hours * price if hours is not None and price is not None else None,
    )


def _bottleneck(wanted: Range, num_cpus: float | None) -> str:
    """Which of two stages, side by side, is slower. `wanted`: cores of preprocessing that keep all engines busy."""
    value, low, high = (f"{max(1, math.ceil(cores)):,}" for cores in (wanted.value, wanted.low, wanted.high))
    if num_cpus is None:
        cores = counted(max(1, math.ceil(wanted.value)), "core") + (f" ({low} to {high})" if low != high else "")
        return f"the engine, as long as preprocessing has at least {cores}"
    if wanted.low > num_cpus:
        return f"preprocessing: {counted(num_cpus, 'core', form='g')}, {value} would keep the GPUs busy"
    if wanted.high <= num_cpus:
        return f"the engine: {high} of {num_cpus:g} cores are enough for preprocessing"
    return f"too near to tell: the engine needs {low} to {high} cores of preprocessing, there are {num_cpus:g}"


@dataclass(frozen=True)
class Store:
    """Bytes in Ray's object store."""

    block_bytes: float
    """Of a full block between the stages, or of all patches where they are fewer."""
    blocks_per_engine: int
    """Blocks that an engine holds or that wait for it."""
    num_blocks: float
    """In the whole job."""
    bytes_per_engine: float


def object_store(rows: Rows, *, block_bytes: float, blocks_in_flight: int, num_engines: int) -> Store:
    """The most that the patches in flight take."""
    total = rows.patch_bytes.total.value
    # A block is closed once it is full, so it holds up to a row more.
    block = min(block_bytes + rows.patch_bytes.p95, max(total, 1.0))
    # Ray hands an actor a few more than it works on; as many wait in the preprocessing actors' outputs.
    per_engine = blocks_in_flight + 4
    return Store(block, per_engine, total / block, min(per_engine * block, total / num_engines))
