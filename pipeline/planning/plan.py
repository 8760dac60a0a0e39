"""What a job will need, from a sample of its rows: the rows, what of them fits, time and cost.

Knows the caption job's config and stages; not how a plan is shown (page.py)."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.checkpoint.locate import read_config, resolve_model
from pipeline.config import CaptionConfig, Fraction, NotNegative, Positive, Section
from pipeline.engine import check_length
from pipeline.errors import ConfigError, RowError
from pipeline.execution.placement import default_blocks_in_flight
from pipeline.execution.stages import Stages, open_stages
from pipeline.manifest import Manifest, unit_of
from pipeline.manifest.row_set import RowNumbering
from pipeline.manifest.work import Work, read_work, read_works
from pipeline.planning.forecast import (
    OUTPUT_RANGE,
    Advice,
    Engines,
    MediumFacts,
    RowFacts,
    Rows,
    Sample,
    Store,
    Times,
    advise,
    describe,
    from_data_sheet,
    from_probe,
    kind_of,
    object_store,
)
from pipeline.planning.roofline import GPUS, SHAPES, Gpu, ModelShape, cache_tokens, find_gpu, shape_of
from pipeline.planning.survey import SurveyedRow

_RUN_ROWS = 16
"""Neighbouring rows that are sampled together: files are read in runs."""


_LEAST_RUNS = 32


_PASSES = 4


_RUNS_AT_ONCE = 8


_COMPARED = ("H200", "H100", "A100", "L40S", "L4", "A10G")


_CONTEXT = 32_768


_MOST_GPUS = 16


_SMALL = 300_000_000
"""Weights below which a GPU's arithmetic is not what an engine waits for."""


_DEFAULT_MAX_RUNNING = 256


class PlanSection(Section):
    """What to plan for, and how closely to look."""

    gpu: str | None = None
    """GPU by name, such as `H200`, `A100-80GB` or `8xH200`. Default: this machine's, or a comparison of several."""
    price_per_gpu_hour: Annotated[float, Field(ge=0)] | None = None
    """States the cost."""
    currency: str = "$"
    """Put before prices."""
    cpus: Annotated[float, Field(gt=0)] | None = None
    """Cores for preprocessing, in all. Default: resources.preprocess_actors; without it, as many as it takes."""
    output_tokens: Annotated[float, Field(gt=0)] | None = None
    """Tokens of an answer, on average. Default: a range of sampling.max_tokens, or what --probe sees."""
    shape: Literal["2b", "7b", "72b"] | None = None
    """Sizes of the model, where neither its config.json nor its name tells."""
    sample: Positive = 1024
    """Rows to look at; a smaller manifest is looked at whole."""
    seed: NotNegative = 0
    """Seed of the sample."""
    seconds: Annotated[float, Field(gt=0)] = 300.0
    """Time for looking; rows not reached by then are left out of the sample."""
    threads: Positive = 16
    """Headers read at once."""
    probe: bool = False
    """Run both stages on this machine for a while, and forecast from their pace."""
    probe_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long the probe runs, after its warm-up."""
    max_error_fraction: Fraction = 1.0
    """Exit with code 3 where a larger share of the rows is forecast to fail."""
    format: Literal["page", "json"] = "page"
    """`json` prints one object and nothing else."""


class PlanConfig(CaptionConfig):
    """A caption job, and what to plan for."""

    plan: PlanSection = PlanSection()


@dataclass(frozen=True)
class Plan:
    """Everything that the page and the JSON say."""

    input: str
    model: str
    rows: Rows
    looked_s: float
    bytes_read: int
    inexact_videos: int
    """Sampled videos whose frames were taken from what the file says of itself."""
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
    with tempfile.TemporaryDirectory() as folder:
        # A folder of media is listed into the output folder; a plan must leave that alone.
        output = config.output.model_copy(update={"path": folder, "storage_options": {}})
        opened = open_stages(config.model_copy(update={"output": output}))
        stages, manifest, numbering = opened.stages, opened.manifest, opened.numbering
        shape, context = _shape(config)
        gpu, engines = _hardware(config)
        started = time.monotonic()
        works, is_whole = draw(manifest, numbering, asked.sample, asked.seed)
        surveyed = _survey(stages, manifest, works, asked)
        looked_s = time.monotonic() - started
        is_whole = is_whole and sum(map(len, surveyed)) == numbering.num_rows
        cache, gpus_needed = _cache(config, shape, gpu, engines)
        limit = Limit(context, cache)
        runs = [[facts_of(row, limit) for row in run] for run in surveyed]
        sample = Sample(runs, numbering.num_rows, is_whole=is_whole, seed=asked.seed)
        rows = describe(sample)
        output_tokens, measured = asked.output_tokens, None
        if asked.probe and sample.answered:
            measured, seen_tokens = _probe(config, stages, manifest, works, sample, engines)
            output_tokens = output_tokens or seen_tokens
        times, notes = _times(config, sample, shape, gpu, engines, output_tokens)
    read = [row for run in surveyed for row in run]
    for_advice = times[0] if gpu is not None and times else measured
    return Plan(
        input=config.input.path,
        model=config.model.path,
        rows=rows,
        looked_s=looked_s,
        bytes_read=sum(row.bytes_read for row in read),
        inexact_videos=sum(not header.is_exact for row in read for header in row.headers),
        too_long_limit=limit.tokens,
        too_long_why=limit.why,
        store=object_store(
            rows,
            block_bytes=config.resources.block_mb * 1024**2,
            blocks_in_flight=config.resources.blocks_in_flight or default_blocks_in_flight(engines.gpus_per_engine),
            num_engines=engines.num_engines,
        ),
        times=(*([measured] if measured else []), *times),
        advice=tuple(advise(sample, rows, for_advice, engines, longest=limit.tokens, gpus_needed=gpus_needed)),
        notes=tuple(notes),
    )


def draw(manifest: Manifest, numbering: RowNumbering, wanted: int, seed: int) -> tuple[list[Work], bool]:
    """Runs of rows spread over the manifest, in its order, and whether they are all of it.

    One run from each of as many equal stretches, at a random place in it, so that no part of the manifest is missed.
    """
    num_rows = numbering.num_rows
    if num_rows <= wanted:
        spans = [(start, min(start + _RUN_ROWS, num_rows)) for start in range(0, num_rows, _RUN_ROWS)]
    else:
        length = max(1, min(_RUN_ROWS, wanted // _LEAST_RUNS))
        count = max(1, wanted // length)
        dice = random.Random(seed)
        spans = []
        for number in range(count):
            first, last = num_rows * number // count, num_rows * (number + 1) // count - length
            start = dice.randint(first, max(first, last))
            spans.append((start, start + length))
    return [work for start, stop in spans for work in _works(manifest, numbering, start, stop)], num_rows <= wanted


def _works(manifest: Manifest, numbering: RowNumbering, start: int, stop: int) -> list[Work]:
    """Rows [start, stop) of the whole manifest, file by file."""
    works = []
    number = int(np.searchsorted(numbering.first, start, side="right")) - 1
    while start < stop:
        first, last = int(numbering.first[number]), int(numbering.first[number + 1])
        if start < last:
            works.append(Work(unit_of(manifest, number, start - first, min(stop, last) - first)))
            start = last
        number += 1
    return works


def _survey(stages: Stages, manifest: Manifest, works: Sequence[Work], asked: PlanSection) -> list[list[SurveyedRow]]:
    """The sampled rows, run by run.

    Each pass over the manifest takes every fourth run, so that time which ends after a pass leaves a fair sample; a
    later pass that is cut short is left out.
    """
    from pipeline.planning.survey import Survey

    survey = Survey(stages.preprocess, threads=asked.threads)
    until = time.monotonic() + asked.seconds
    found: list[list[SurveyedRow]] = []
    for turn in range(_PASSES):
        of_pass: list[list[SurveyedRow]] = []
        tables = read_works(manifest.spec, works[turn::_PASSES], stages.columns)
        # Several runs at once, so that the headers' latencies overlap.
        while time.monotonic() < until and (group := list(itertools.islice(tables, _RUNS_AT_ONCE))):
            rows = survey.rows(pa.concat_tables(group), until=until)
            of_run = [number for number, table in enumerate(group) for _ in range(table.num_rows)]
            of_pass += [[] for _ in group]
            for row in rows:
                of_pass[of_run[row.number] - len(group)].append(row)
        if time.monotonic() < until or not found:
            found += of_pass
    return found


@dataclass(frozen=True)
class Limit:
    """How long a prompt and its answer may be."""

    max_context: int
    cache_tokens: int | None

    @property
    def tokens(self) -> int:
        """The smaller of the two."""
        return min(self.max_context, self.cache_tokens or self.max_context)

    @property
    def why(self) -> str:
        """Which it is."""
        return "the model's context" if self.tokens == self.max_context else "the key-value cache"


def facts_of(row: SurveyedRow, limit: Limit) -> RowFacts:
    """The row as numbers; one that doesn't fit becomes an error row, as in the run."""
    error: RowError | None = row.error
    sampling = row.sampling
    if error is None and sampling is not None:
        try:
            check_length(
                row.num_prompt_tokens,
                row.num_visual_tokens,
                sampling.max_tokens,
                max_context=limit.max_context,
                cache_tokens=limit.cache_tokens,
            )
        except RowError as too_long:
            error = too_long
    kind = "unreadable" if row.conversation is None else kind_of([part.kind for part in row.conversation.media])
    media = tuple(
        MediumFacts(
            header.kind,
            header.size.grid_thw,
            header.width * header.height,
            header.num_decoded,
            header.size.num_frames,
            header.num_bytes,
        )
        for header in row.headers
    )
    return RowFacts(
        id=row.id,
        place=row.place,
        kind=kind,
        media=media,
        num_prompt_tokens=row.num_prompt_tokens,
        num_visual_tokens=row.num_visual_tokens,
        max_tokens=sampling.max_tokens if sampling else 0,
        num_samples=sampling.n if sampling else 1,
        always_full=sampling.ignore_eos if sampling else False,
        error_type=type(error).__name__ if error else None,
        error_message=str(error) if error else None,
    )


def _shape(config: PlanConfig) -> tuple[ModelShape | None, int]:
    """(sizes, context) of the model: by its config.json, by what is asked for, by its name."""
    path = resolve_model(config.model.path)
    found = read_config(path, revision=config.model.revision)
    if found is not None and config.plan.shape is None:
        try:
            text = found.get("text_config") or found
            return shape_of(found), int(text.get("max_position_embeddings", _CONTEXT))
        except KeyError as error:
            raise ConfigError(f"model.path: config.json of {path} has no {error}: not a Qwen2-VL checkpoint") from error
    named = re.search(r"(?<![0-9])(2|7|72)b(?![a-z0-9])", path, re.I)
    name = config.plan.shape or (named[0].lower() if named else None)
    return SHAPES[name] if name else None, _CONTEXT


def _hardware(config: PlanConfig) -> tuple[Gpu | None, Engines]:
    """The GPU to plan for, if any, and how many engines run on how many."""
    asked, resources = config.plan, config.resources
    name, count = asked.gpu, 0
    if name is not None and (match := re.fullmatch(r"(\d+)\s*x\s*(.+)", name.strip())):
        count, name = int(match[1]), match[2]
    if name is None and not (config.model.device == "cpu" or resources.gpus_per_engine == 0):
        name = _local_gpu()
        gpu = find_gpu(name) if name else None
    else:
        gpu = find_gpu(name) if name else None
        if name and gpu is None:
            known = ", ".join(one.name for one in GPUS)
            raise ConfigError(f"plan.gpu: {name!r} is not in the table of data sheets; known: {known}")
    per_engine = resources.gpus_per_engine or 1.0
    if gpu is None:
        per_engine = 0.0
    num_engines = max(1, int(count // per_engine)) if count and per_engine else 1
    if resources.engine_actors is not None:
        num_engines = resources.engine_actors.most
    cpus = asked.cpus or (float(resources.preprocess_actors.most) if resources.preprocess_actors else None)
    return gpu, Engines(num_engines, per_engine, cpus, asked.price_per_gpu_hour)


def _local_gpu() -> str | None:
    """Name of this machine's GPU."""
    from pipeline.engine.device import local_gpu_name  # loads torch, which a plan for a named GPU does without

    return local_gpu_name()


def _cache(
    config: PlanConfig, shape: ModelShape | None, gpu: Gpu | None, engines: Engines
) -> tuple[int | None, int | None]:
    """(tokens that the cache holds, GPUs that an engine needs where those asked for are too few)."""
    if shape is None or config.engine.kind != "native":
        return None, None
    if gpu is None:
        if config.model.device != "cpu" and not config.plan.probe:
            return None, None  # for whatever GPU it will be
        width = 4 if config.model.dtype in ("auto", "float32") else 2
        return int(config.engine.cache_gb * 1e9 / shape.kv_bytes(width)), None
    fraction = config.engine.cache_fraction
    for gpus in range(max(1, int(engines.gpus_per_engine)), _MOST_GPUS + 1):
        tokens = cache_tokens(shape, gpu, gpus=gpus, cache_fraction=fraction)
        if tokens >= _CONTEXT:
            return tokens, gpus if gpus > engines.gpus_per_engine else None
    return None, _MOST_GPUS


def _times(
    config: PlanConfig,
    sample: Sample,
    shape: ModelShape | None,
    gpu: Gpu | None,
    engines: Engines,
    output_tokens: float | None,
) -> tuple[list[Times], list[str]]:
    """Forecasts from data sheets: of the GPU named, else of several for comparison."""
    notes = []
    if shape is None:
        notes.append("no time by data sheet: the model's sizes are unknown; say --plan.shape 2b, 7b or 72b")
        return [], notes
    if not sample.answered:
        notes.append("no time: no sampled row can be answered")
        return [], notes
    if shape.num_parameters < _SMALL:
        notes.append(
            f"the model has {shape.num_parameters / 1e6:,.1f} million weights: so few that launching kernels, which "
            "the arithmetic leaves out, sets a GPU's pace; --probe measures"
        )
        if gpu is None:
            return [], notes
    chosen = [gpu] if gpu is not None else [one for one in map(find_gpu, _COMPARED) if one is not None]
    if gpu is None:
        notes.append("no GPU was named (--gpu) and this machine has none: one of each for comparison")
    times = []
    for one in chosen:
        per_engine = engines.gpus_per_engine or 1.0
        for_one = Engines(engines.num_engines, per_engine, engines.num_cpus, engines.price_per_gpu_hour)
        cache, needed = _cache(config, shape, one, for_one)
        if needed is not None:
            for_one = dataclasses.replace(for_one, gpus_per_engine=float(needed))
        times.append(
            from_data_sheet(
                sample,
                shape,
                one,
                for_one,
                max_running=config.engine.max_running or _DEFAULT_MAX_RUNNING,
                cache_tokens=cache or _CONTEXT,
                output_share=_output_share(sample, output_tokens),
            )
        )
    return times, notes


def _output_share(sample: Sample, output_tokens: float | None) -> tuple[float, float, float]:
    """(low, middle, high) share of max_tokens that answers are long."""
    if output_tokens is None:
        low, high = OUTPUT_RANGE
        return low, (low + high) / 2, high
    allowed = sum(row.max_tokens * row.num_samples for row in sample.answered) / len(sample.answered)
    share = min(1.0, output_tokens / allowed)
    return share, share, share


def _probe(
    config: PlanConfig, stages: Stages, manifest: Manifest, works: Sequence[Work], sample: Sample, engines: Engines
) -> tuple[Times, float | None]:
    """(forecast, mean tokens of an answered row) from running both stages here."""
    from pipeline.planning.probe import probe

    order = list(works)
    random.Random(config.plan.seed + 1).shuffle(order)
    tables = (read_work(manifest.spec, work, stages.columns) for work in order)
    preprocess, engine = probe(stages, tables, seconds=config.plan.probe_seconds)
    cores = os.cpu_count() or 1
    gpu_name = None if config.model.device == "cpu" else _local_gpu()
    price = config.plan.price_per_gpu_hour if gpu_name else None
    times = from_probe(
        sample,
        preprocess,
        engine,
        Engines(engines.num_engines, 1.0 if gpu_name else 0.0, None, price),
        hardware=f"this machine: {gpu_name}, {cores} cores" if gpu_name else f"this machine: {cores} cores",
        shares_cores=gpu_name is None,
        num_cpus=float(cores),
    )
    answered = sum(one.rows for one in engine)
    return times, sum(one.output_tokens for one in engine) / answered if answered else None
