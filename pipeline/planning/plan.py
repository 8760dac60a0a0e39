"""What a job will need, from a sample of its rows: the rows, how many do not fit, time and cost.

Knows the caption job's config and stages; not how a plan is shown (page.py).
"""

from __future__ import annotations

import itertools
import os
import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from pipeline.checkpoint.generation import greedy_note
from pipeline.checkpoint.locate import read_config, resolve_model
from pipeline.config import CaptionConfig, Section
from pipeline.config_values import Fraction, NotNegative, Positive
from pipeline.engine.dtype import Arithmetic, PickedDtype, arithmetic, own_dtype, pick_dtype
from pipeline.engine.scheduling.scheduler import pick_max_running
from pipeline.errors import ConfigError
from pipeline.execution.placement import default_blocks_in_flight
from pipeline.execution.stages import OpenedStages, open_stages
from pipeline.manifest.files import Manifest, WorkUnit
from pipeline.manifest.row_set import RowNumbering
from pipeline.manifest.work import read_work, read_works
from pipeline.planning.advice import Advice, advise
from pipeline.planning.forecast import (
    OUTPUT_SHARE,
    Engines,
    Store,
    Times,
    from_data_sheet,
    from_probe,
    object_store,
)
from pipeline.planning.probe import probe
from pipeline.planning.roofline import (
    GPUS,
    SHAPES,
    Gpu,
    ModelShape,
    cache_tokens,
    find_gpu,
    min_gpus,
    named_shape,
    shape_of,
)
from pipeline.planning.sample import NUM_GROUPS, Range, Rows, Sample, SampledRow, describe
from pipeline.planning.survey import Survey

_MAX_RUN_ROWS = 16
"""Neighbouring rows that are sampled together: files are read in runs."""
_PASSES = 4
_RUNS_AT_ONCE = 8
"""Runs whose headers are read side by side, so that their latencies overlap."""
_COMPARED = ("H200", "H100", "A100", "L40S", "L4", "A10G")
_DEFAULT_CONTEXT = 32_768
_SMALL_MODEL = 300_000_000
"""Weights below which a GPU's arithmetic does not set an engine's pace."""


class PlanSection(Section):
    """What to plan for, and how closely to look."""

    gpu: str | None = None
    """GPU by name, such as `H200`, `A100-80GB` or `8xH200`. Default: this machine's; without one, several are compared,
    unless the model is so small that data sheets say nothing of its pace."""
    price_per_gpu_hour: Annotated[float, Field(ge=0)] | None = None
    """Price of one GPU hour; adds the cost to the forecast."""
    currency: str = "$"
    """Currency symbol."""
    cpus: Annotated[float, Field(gt=0)] | None = None
    """Cores for preprocessing, in all. Default: resources.preprocess_actors; without it, as many as it takes."""
    output_tokens: Annotated[float, Field(gt=0)] | None = None
    """Tokens of an answer, on average. Default: a range of sampling.max_tokens, or the mean of --probe."""
    shape: str | None = None
    """Sizes of the model, where neither its config.json nor its name contains them: `2b`, `7b` or `72b` of Qwen2-VL,
    or a name such as `qwen2.5-vl-7b` or `qwen3-vl-8b`."""
    sample: Positive = 1024
    """Rows to look at; a smaller manifest is looked at whole."""
    seed: NotNegative = 0
    """Seed of the sample."""
    seconds: Annotated[float, Field(gt=0)] = 300.0
    """Time limit in seconds for reading the sample; rows not reached by then are left out of the sample."""
    threads: Positive = 16
    """Rows whose headers are read at once."""
    probe: bool = False
    """Run both stages on this machine for a while, and forecast from their pace."""
    probe_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long the probe runs, after its warm-up."""
    max_error_fraction: Fraction = 1.0
    """Exit with code 3 where a larger share of the rows is forecast to fail."""
    format: Literal["page", "json"] = "page"
    """`json` prints one object and nothing else."""

    @field_validator("shape")
    @classmethod
    def _shape_is_known(cls, shape: str | None) -> str | None:
        if shape is not None and shape not in SHAPES:
            raise ValueError(f"found {shape!r}; allowed: {', '.join(SHAPES)}")
        return shape


class PlanConfig(CaptionConfig):
    """A caption job, and what to plan for."""

    plan: PlanSection = PlanSection()


@dataclass(frozen=True)
class Plan:
    """Everything that the page and the JSON show."""

    input: str
    model: str
    rows: Rows
    looked_s: float
    bytes_read: int
    inexact_videos: int
    """Sampled videos whose frames were computed from the stated duration and rate."""
    too_long_limit: int
    """Tokens of prompt and answer that fit."""
    too_long_why: str
    """What sets that limit."""
    store: Store
    times: tuple[Times, ...]
    advice: tuple[Advice, ...]
    notes: tuple[str, ...]


def make_plan(config: PlanConfig) -> Plan:
    """The plan of a job. Reads a sample of rows and their media's headers; with `plan.probe` runs the stages too."""
    asked = config.plan
    shape, context = _shape(config)
    context = min(context, config.engine.max_context or context)
    gpu, engines = _hardware(config)
    cache, fitted = _fit(config, shape, gpu, engines)
    max_length = min(context, cache or context)
    with tempfile.TemporaryDirectory() as folder:
        # A folder of media is listed into the output folder; a plan must leave that alone.
        output = config.output.model_copy(update={"path": folder, "storage_options": {}})
        opened = open_stages(config.model_copy(update={"output": output}))
        num_rows = opened.numbering.num_rows
        works = draw(opened.manifest, opened.numbering, asked.sample, asked.seed)
        started = time.monotonic()
        sampled = _survey(opened, works, asked, context, cache)
        looked_s = time.monotonic() - started
        sample = Sample(sampled, num_rows, is_whole=len(sampled) == num_rows)
        rows = describe(sample)
        output_share, measured = _output_share(sample, asked.output_tokens), None
        if asked.probe and sample.answered:
            measured, output_tokens = _probe(config, opened, works, sample, engines)
            output_share = _output_share(sample, asked.output_tokens or output_tokens)
    times, notes = _times_by_data_sheet(config, sample, rows, shape, gpu, engines, output_share)
    by_default = greedy_note(opened.model_facts["published_sampling"], asdict(config.sampling))
    for_advice = times[0] if gpu is not None and times else measured
    advice = list(
        advise(
            sample,
            rows,
            for_advice,
            engines,
            fitted,
            max_length=max_length,
            rows_per_unit=config.resources.min_rows_per_unit,
        )
    )
    no_setting_helps = [one.why for one in advice if not one.setting]
    return Plan(
        input=config.input.path,
        model=config.model.path + (f" with {config.model.adapter}" if config.model.adapter else ""),
        rows=rows,
        looked_s=looked_s,
        bytes_read=sum(row.bytes_read for row in sampled),
        inexact_videos=sum(row.num_inexact_videos for row in sampled),
        too_long_limit=max_length,
        too_long_why="the model's context" if max_length == context else "the key-value cache",
        store=object_store(
            rows,
            block_bytes=config.resources.block_mb * 1024**2,
            blocks_in_flight=config.resources.blocks_in_flight or default_blocks_in_flight(engines.gpus_per_engine),
            num_engines=engines.num_engines,
        ),
        times=(*([measured] if measured else []), *times),
        advice=tuple(one for one in advice if one.setting),
        notes=(*opened.manifest.notes, *([by_default] if by_default else []), *notes, *no_setting_helps),
    )


def draw(manifest: Manifest, numbering: RowNumbering, wanted: int, seed: int) -> list[WorkUnit]:
    """Runs of rows spread over the manifest, in its order; all of them where it has no more than `wanted`.

    One run from each of as many equal stretches, at a random place in it, so that no part of the manifest is missed.
    """
    num_rows = numbering.num_rows
    if num_rows <= wanted:
        spans = [(start, min(start + _MAX_RUN_ROWS, num_rows)) for start in range(0, num_rows, _MAX_RUN_ROWS)]
    else:
        length = max(1, min(_MAX_RUN_ROWS, wanted // NUM_GROUPS))
        count = max(1, wanted // length)
        rng = random.Random(seed)
        spans = []
        for number in range(count):
            first, last = num_rows * number // count, num_rows * (number + 1) // count - length
            start = rng.randint(first, max(first, last))
            spans.append((start, start + length))
    return [work for start, stop in spans for work in _works(manifest, numbering, start, stop)]


def _works(manifest: Manifest, numbering: RowNumbering, start: int, stop: int) -> Iterator[WorkUnit]:
    """Rows [start, stop) of the whole manifest, file by file."""
    firsts = numbering.first
    for number in range(int(np.searchsorted(firsts, start, "right")) - 1, int(np.searchsorted(firsts, stop))):
        first, last = int(firsts[number]), int(firsts[number + 1])
        if max(start, first) < min(stop, last):
            yield manifest.unit(number, max(start, first) - first, min(stop, last) - first)


def _survey(
    opened: OpenedStages, works: Sequence[WorkUnit], asked: PlanSection, context: int, cache: int | None
) -> list[SampledRow]:
    """The sampled rows.

    Each pass over the manifest takes every fourth run, so that a pass is a fair sample; where time ends during a later
    pass, its rows are left out.
    """
    stages, spec = opened.stages, opened.manifest.spec
    survey = Survey(stages.preprocess, max_context=context, cache_tokens=cache, threads=asked.threads)
    until = time.monotonic() + asked.seconds
    found: list[SampledRow] = []
    for number in range(_PASSES):
        tables = read_works(spec, works[number::_PASSES], stages.columns)
        of_pass: list[SampledRow] = []
        while time.monotonic() < until and (group := list(itertools.islice(tables, _RUNS_AT_ONCE))):
            of_pass += survey.rows(pa.concat_tables(group), until=until)
        if time.monotonic() < until or not found:
            found += of_pass
    return found


def _shape(config: PlanConfig) -> tuple[ModelShape | None, int]:
    """(sizes, context) of the model: by its config.json, by `plan.shape`, by its name."""
    path = resolve_model(config.model.path)
    found = read_config(path, revision=config.model.revision)
    if found is not None and config.plan.shape is None:
        try:
            text = found.get("text_config") or found
            return shape_of(found), int(text.get("max_position_embeddings", _DEFAULT_CONTEXT))
        except KeyError as error:
            raise ConfigError(f"model.path: config.json of {path} has no {error}: not a Qwen-VL checkpoint") from error
    return SHAPES[config.plan.shape] if config.plan.shape else named_shape(path), _DEFAULT_CONTEXT


def _hardware(config: PlanConfig) -> tuple[Gpu | None, Engines]:
    """The GPU to plan for, if any, and how many engines run on how many."""
    asked, resources = config.plan, config.resources
    name, count = asked.gpu, 0
    if name is None and config.model.device != "cpu" and resources.gpus_per_engine != 0:
        name = _local_gpu()
    elif name is not None and (match := re.fullmatch(r"(\d+)\s*x\s*(.+)", name.strip())):
        count, name = int(match[1]), match[2]
    gpu = find_gpu(name) if name else None
    if gpu is None and asked.gpu is not None:
        known = ", ".join(one.name for one in GPUS)
        raise ConfigError(f"plan.gpu: {name!r} is not in the table of data sheets; known: {known}")
    per_engine = (resources.gpus_per_engine or 1.0) if gpu is not None else 0.0
    num_engines = max(1, int(count // per_engine)) if per_engine else 1
    if resources.engine_actors is not None:
        num_engines = resources.engine_actors.max_size
    cpus = asked.cpus or (float(resources.preprocess_actors.max_size) if resources.preprocess_actors else None)
    return gpu, Engines(num_engines, per_engine, cpus, asked.price_per_gpu_hour)


def _local_gpu() -> str | None:
    from pipeline.engine.device import gpu_name  # loads torch, which a plan for a named GPU does without

    return gpu_name()


def _fit(config: PlanConfig, shape: ModelShape | None, gpu: Gpu | None, engines: Engines) -> tuple[int | None, Engines]:
    """(tokens that the cache holds where that is known, the engines with as many GPUs as the weights need)."""
    if shape is None or config.engine.kind != "native":
        return None, engines
    if gpu is None:
        if config.model.device != "cpu" and not config.plan.probe:
            return None, engines  # the GPU is not known
        return int(config.engine.cache_gb * 1e9 / _in_dtype(config, shape, gpu).kv_bytes()), engines
    shape = _in_dtype(config, shape, gpu)
    fraction = config.engine.gpu_memory_fraction
    needed = min_gpus(shape, gpu, cache_tokens=_DEFAULT_CONTEXT, memory_fraction=fraction)
    if needed > max(1, engines.gpus_per_engine):
        engines = replace(engines, gpus_per_engine=float(needed))
    return cache_tokens(shape, gpu, gpus=engines.gpus_per_engine or 1.0, memory_fraction=fraction), engines


def _dtype(config: PlanConfig, gpu: Gpu | None) -> PickedDtype:
    """What an engine on this GPU, or on this machine's CPU, computes in."""
    device = arithmetic("cpu") if gpu is None else Arithmetic(gpu.name, True, gpu.has_bfloat16)
    stated = read_config(resolve_model(config.model.path), revision=config.model.revision) or {}
    # Sizes given by name are those of a published checkpoint, whatever model.path is.
    own = None if config.plan.shape else own_dtype(stated)
    return pick_dtype(config.model.dtype, own or "bfloat16", device)


def _in_dtype(config: PlanConfig, shape: ModelShape, gpu: Gpu | None) -> ModelShape:
    return replace(shape, bytes_per_value=4 if _dtype(config, gpu).name == "float32" else 2)


def _times_by_data_sheet(
    config: PlanConfig,
    sample: Sample,
    rows: Rows,
    shape: ModelShape | None,
    gpu: Gpu | None,
    engines: Engines,
    output_share: Range,
) -> tuple[list[Times], list[str]]:
    """(forecasts, notes): of the GPU named, or of several for comparison."""
    if shape is None:
        known = ", ".join(SHAPES)
        return [], [f"no forecast from data sheets: the model's sizes are unknown; set --plan.shape to one of {known}"]
    if not sample.answered:
        return [], ["no time: no sampled row can be answered"]
    notes = []
    if shape.num_parameters < _SMALL_MODEL:
        why = (
            f"the model has {shape.num_parameters / 1e6:,.1f} million weights: so few that launching kernels, which "
            "the arithmetic leaves out, sets a GPU's pace"
        )
        if gpu is None:
            none = "no forecast from data sheets: no GPU was named (--gpu) or found here, and"
            return [], [f"{none} {why}; --probe measures on this machine"]
        notes.append(f"{why}; --probe measures")
    chosen = [gpu]
    if gpu is None:
        notes.append("no GPU was named (--gpu) and this machine has none: one of each for comparison")
        chosen, engines = [find_gpu(name) for name in _COMPARED], replace(engines, gpus_per_engine=1.0)
    times = []
    for one in filter(None, chosen):
        picked = _dtype(config, one)
        if picked.name == "float32":
            notes.append(
                f"model.dtype on {one.name} is float32 ({picked.reason}): several times slower than these times of "
                "16-bit arithmetic; --model.dtype bfloat16 avoids that"
            )
        elif gpu is not None:
            notes.append(f"model.dtype on {one.name} is {picked.name} ({picked.reason})")
        cache, fitted = _fit(config, shape, one, engines)
        times.append(
            from_data_sheet(
                sample,
                rows,
                _in_dtype(config, shape, one),
                one,
                fitted,
                max_running=config.engine.max_running or pick_max_running(cache or _DEFAULT_CONTEXT),
                cache_tokens=cache or _DEFAULT_CONTEXT,
                output_share=output_share,
            )
        )
    return times, notes


def _output_share(sample: Sample, output_tokens: float | None) -> Range:
    """Share of max_tokens that answers take."""
    allowed = [row.max_tokens * row.num_samples for row in sample.answered]
    if output_tokens is None or not allowed:
        return OUTPUT_SHARE
    return Range.exactly(min(1.0, output_tokens * len(allowed) / sum(allowed)))


def _probe(
    config: PlanConfig, opened: OpenedStages, works: Sequence[WorkUnit], sample: Sample, engines: Engines
) -> tuple[Times, float | None]:
    """(forecast, mean tokens of an answered row) from running both stages here."""
    order = random.Random(config.plan.seed + 1).sample(works, len(works))
    tables = (read_work(opened.manifest.spec, work, opened.stages.columns) for work in order)
    preprocess, engine = probe(opened.stages, tables, seconds=config.plan.probe_seconds)
    cores = os.cpu_count() or 1
    gpu_name = None if config.model.device == "cpu" else _local_gpu()
    here = replace(engines, gpus_per_engine=1.0, num_cpus=float(cores)) if gpu_name else Engines(engines.num_engines, 0)
    times = from_probe(
        sample,
        preprocess,
        engine,
        here,
        hardware=f"this machine: {gpu_name}, {cores} cores" if gpu_name else f"this machine: {cores} cores",
        num_shared_cores=None if gpu_name else cores,
    )
    answered = sum(one.rows for one in engine)
    return times, sum(one.output_tokens for one in engine) / answered if answered else None
