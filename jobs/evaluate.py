"""Answer a manifest that carries references, score the answers, and write one page about it; the same command resumes.

    published set --layout--> manifest --caption job--> result rows --> scores.parquet, metrics.json --> report.html

With `--run.path FOLDER` a finished (or unfinished) run is scored instead, and nothing is generated.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.command_line import run_job
from jobs.report import compare_folders, read_report, write_text
from pipeline import storage
from pipeline.config import CaptionConfig, NotNegative, Positive, RunConfig, Section
from pipeline.errors import ConfigError, OutputError
from pipeline.evaluation.layout import Layout, prepare_manifest
from pipeline.evaluation.scoring import DERIVED_SLICES, Scorer, ScoringSettings
from pipeline.preprocess.prompt import spare_torch
from pipeline.report import ReportOptions, RunReader, render_html
from pipeline.report.page import shown_interval, shown_score
from pipeline.schema import RESULT_COLUMNS


class EvaluateRunConfig(RunConfig):
    """The conduct of the run."""

    path: str | None = None
    """Score this run folder and generate nothing."""


class EvaluateSection(Section):
    """What is right, and how it is scored."""

    references: str = "reference"
    """Column with the right answer or answers."""
    metrics: list[str] = Field(default_factory=lambda: ["exact_match"])
    """Metrics of rows whose task or metric column says nothing else; the first is the row's score."""
    task_column: str | None = None
    """Column that names the row's task; scores are shown for each."""
    tasks: dict[str, list[str]] = Field(default_factory=dict)
    """Metrics by task."""
    metric_column: str | None = None
    """Column with the row's own metrics; wins over everything."""
    choices: str | None = None
    """Column with the list of options, for multiple choice."""
    slices: list[str] = Field(default_factory=lambda: ["media_kind", "resolution_bucket"])
    """Columns by whose values scores are shown too; also media_kind, num_media and resolution_bucket."""
    baseline: str | None = None
    """Run folder to compare with, row by row."""
    canaries: NotNegative = 0
    """Run this many rows from the manifest's start once more, each alone, and report whether their answers agree."""
    layout: Layout | None = None
    """How a published set's columns become questions; without it the manifest is taken as it is."""
    manifest_path: str | None = None
    """Where the manifest made by the layout goes. Default: beside the output folder."""
    num_samples: Positive = 1_000
    """Bootstrap samples behind each interval."""
    seed: NotNegative = 0
    """Seed of bootstrap, permutation test and the gallery's choice."""
    price_per_gpu_hour: Annotated[float, Field(ge=0)] | None = None
    """States the run's cost in the report."""
    currency: str = "$"
    """Put before prices."""
    thumbnails: bool = True
    """Whether the report shows pictures."""


class EvaluateConfig(CaptionConfig):
    """A caption job whose manifest carries references, and how to score it."""

    run: EvaluateRunConfig = EvaluateRunConfig()
    evaluate: EvaluateSection = EvaluateSection()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_job(EvaluateConfig, run, argv, name="evaluate", about=__doc__ or "")


def run(config: EvaluateConfig) -> int:
    """Generate what is missing, score, report. Raises JobError; returns the exit code."""
    settings = scoring_settings(config.evaluate)
    if config.run.path is not None:
        folder, options = config.run.path, config.output.storage_options
        canaries = None
    else:
        folder, options = config.output.path, config.output.storage_options
        config = with_manifest(config)
        code = _generate(config, settings)
        if code:
            return code
        canaries = run_canaries(config, settings) if config.evaluate.canaries else None
    metrics = evaluate_folder(folder, settings, config.evaluate, canaries=canaries, storage_options=options)
    _print_scores(metrics)
    if not config.output.report:
        return 0
    report_path = storage.join(folder, "report.html")
    page = ReportOptions(
        thumbnails=config.evaluate.thumbnails,
        price_per_gpu_hour=config.evaluate.price_per_gpu_hour,
        currency=config.evaluate.currency,
        seed=config.evaluate.seed,
    )
    report = read_report(folder, config.evaluate.baseline, options=page, storage_options=options)
    write_text(report_path, render_html(report), options)
    print(f"report: {report_path}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Generating


def with_manifest(config: EvaluateConfig) -> EvaluateConfig:
    """The config with its manifest made from a published set, where it has a layout; with the columns that scores need.

    The layout's own columns take the place of what the config says of prompts and columns.
    """
    evaluate, source = config.evaluate, config.input
    if evaluate.layout is None:
        return config
    path = evaluate.manifest_path or f"{config.output.path.rstrip('/')}-manifest"
    prepare_manifest(
        evaluate.layout,
        source.path,
        path,
        limit=source.limit,
        source_options=source.storage_options,
        storage_options=config.output.storage_options,
    )
    allow = [*source.allow, storage.parent(source.path) if source.path.endswith(".parquet") else source.path]
    made = source.model_copy(
        update={"path": path, "format": "parquet", "columns": {}, "limit": None, "allow": allow, "keep": []}
    )
    return config.model_copy(update={"input": made})


def _generate(config: EvaluateConfig, settings: ScoringSettings) -> int:
    from jobs import caption

    return caption.run(_keeping(config, settings))


def _keeping(config: EvaluateConfig, settings: ScoringSettings) -> EvaluateConfig:
    """The config of the caption job: its results keep every column that scores and report need."""
    wanted = [name for name in settings.columns if name not in RESULT_COLUMNS]
    if config.evaluate.layout is not None:
        wanted += ["prompt", *config.evaluate.layout.keep]
    keep = list(dict.fromkeys([*config.input.keep, *wanted]))
    update = {
        "input": config.input.model_copy(update={"keep": keep}),
        # The page is written once the rows are scored.
        "output": config.output.model_copy(update={"report": False}),
    }
    return config.model_copy(update=update)


def run_canaries(config: EvaluateConfig, settings: ScoringSettings) -> dict[str, Any]:
    """Runs the first rows again, one at a time, and compares: does an answer depend on who shared its batch?"""
    from jobs import caption

    folder = storage.join(config.output.path, "canaries")
    alone = _keeping(config, settings).model_copy(
        update={
            "output": config.output.model_copy(update={"path": folder, "report": False}),
            "engine": dataclasses.replace(config.engine, max_running=1, batch_size=1),
            "evaluate": config.evaluate.model_copy(update={"canaries": 0}),
        }
    )
    limit = min(config.evaluate.canaries, config.input.limit or config.evaluate.canaries)
    alone = alone.model_copy(update={"input": alone.input.model_copy(update={"limit": limit})})
    code = caption.run(alone)
    if code:
        raise OutputError(f"the canary rows in {folder} could not be run alone (exit code {code})")
    return compare_canaries(
        RunReader(config.output.path, config.output.storage_options), RunReader(folder, config.output.storage_options)
    )


_COMPARED = ("text", "finish_reason", "num_output_tokens", "status", "error_type")


def compare_canaries(batched: RunReader, alone: RunReader) -> dict[str, Any]:
    """Whether rows run alone got the answers that they got in the mixed batch; plain values for metrics.json."""
    columns = (*_COMPARED, "id", "manifest_file", "manifest_row")
    expected: dict[tuple[int, int], dict[str, Any]] = {}
    for one in alone.batches(columns):
        for row in one.batch.to_pylist():
            expected[row["manifest_file"], row["manifest_row"]] = row
    differing, num_compared = [], 0
    for one in batched.batches(columns):
        for row in one.batch.to_pylist():
            other = expected.pop((row["manifest_file"], row["manifest_row"]), None)
            if other is None:
                continue
            num_compared += 1
            if any(row[name] != other[name] for name in _COMPARED):
                differing.append({"id": row["id"], "alone": _answer(other), "batched": _answer(row)})
        if not expected:
            break
    same = num_compared - len(differing)
    sentence = f"{same:,} of {num_compared:,} rows gave the same answer alone as in the mixed batch."
    if num_compared and not differing:
        sentence += " This run's batching does not change answers."
    elif differing:
        sentence += (
            " Answers depend on what shared the batch: expect differences between runs in rows as close as these."
        )
    return {"num_rows": num_compared, "num_same": same, "differing": differing[:10], "sentence": sentence}


def _answer(row: Mapping[str, Any]) -> str:
    text = row["text"] if row["status"] == "ok" else row["error_type"]
    return f"{(text or '')[:300]} ({row['num_output_tokens'] or 0} tokens, {row['finish_reason'] or row['status']})"


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def scoring_settings(section: EvaluateSection) -> ScoringSettings:
    """The section as the scorer wants it; a layout brings its own columns. Raises ConfigError."""
    layout = section.layout
    return ScoringSettings(
        references="reference" if layout else section.references,
        metrics=tuple(section.metrics),
        tasks={task: tuple(names) for task, names in section.tasks.items()},
        task_column="task" if layout and layout.task else section.task_column,
        metric_column=section.metric_column,
        choices="choices" if layout and layout.choices else section.choices,
        slices=tuple(section.slices),
        num_samples=section.num_samples,
        seed=section.seed,
    )


def evaluate_folder(
    folder: str,
    settings: ScoringSettings,
    section: EvaluateSection | None = None,
    *,
    canaries: Mapping[str, Any] | None = None,
    storage_options: storage.StorageOptions = None,
) -> dict[str, Any]:
    """Scores a run folder: writes scores.parquet and metrics.json into it and returns the metrics."""
    section = section or EvaluateSection()
    reader = RunReader(folder, storage_options)
    scorer = Scorer(settings)
    needed = {*settings.columns, "id", "text", "status", "manifest_file", "manifest_row"}
    if any(name in DERIVED_SLICES for name in settings.slices):
        needed.add("media")
    missing = [name for name in settings.columns if reader.columns and name not in reader.columns]
    if missing:
        raise ConfigError(
            f"{folder} kept no column {', '.join(missing)}: its run needs it in input.keep. "
            f"Its columns: {', '.join(reader.columns)}"
        )
    if scorer.needs_learning:
        scorer.learn(one.batch for one in reader.batches(needed))
    _write_scores(storage.join(folder, "scores.parquet"), scorer, reader, needed, storage_options)
    metrics = scorer.metrics()
    if canaries is not None:
        metrics["canaries"] = dict(canaries)
    if section.baseline is not None:
        comparison = compare_folders(
            folder,
            section.baseline,
            storage_options=storage_options,
            num_samples=section.num_samples,
            seed=section.seed,
        )
        if comparison is None:
            raise OutputError(
                f"{section.baseline} has no scores.parquet: score it first, "
                f"as in `python -m jobs.evaluate --config CONFIG --run.path {section.baseline}`"
            )
        metrics["baseline"] = comparison
    metrics = {key: _finite(value) for key, value in metrics.items()}
    write_text(storage.join(folder, "metrics.json"), json.dumps(metrics, indent=2, default=str), storage_options)
    return metrics


def _write_scores(
    path: str, scorer: Scorer, reader: RunReader, columns: set[str], storage_options: storage.StorageOptions
) -> None:
    """Streams the score rows through a file on this machine's disk, published whole."""
    descriptor, temporary = tempfile.mkstemp(suffix=".parquet")
    os.close(descriptor)
    try:
        with pq.ParquetWriter(temporary, scorer.schema, compression="zstd") as writer:
            for one in reader.batches(columns):
                writer.write_table(pa.Table.from_batches([scorer.score(one.batch)]), row_group_size=1 << 20)
        storage.publish_file(temporary, path, storage_options)
    except OSError as error:
        raise OutputError(f"can't write {path}: {error}") from error
    finally:
        os.unlink(temporary)


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_scores(metrics: Mapping[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("slice", "metric", "score", "95 %", "rows"):
        table.add_column(name, justify="right" if name in ("score", "rows") else "left")

    def add(label: str, found: Mapping[str, Any]) -> None:
        for name, one in found.items():
            known = metrics["definitions"].get(name, {})
            maximum = known.get("maximum", 1.0)
            table.add_row(
                Text(label),
                known.get("title", name),
                shown_score(one["value"], maximum),
                shown_interval(one["low"], one["high"], maximum),
                f"{one['num_rows']:,}",
            )

    add("all rows", metrics["overall"])
    for entry in metrics["slices"].get("task", []):
        add(entry["value"], entry["metrics"])
    Console().print(table)
    for name, one in (metrics.get("baseline") or {}).get("metrics", {}).items():
        print(
            f"{name} against the baseline: {one['difference']:+.4f} "
            f"(p = {one['p_permutation']:.4g}), {one['won']:,} won, {one['lost']:,} lost: {one['verdict']}"
        )
    if metrics.get("canaries"):
        print(f"canaries: {metrics['canaries']['sentence']}")


if __name__ == "__main__":
    spare_torch()  # models live in the engine's actors; not in main(), which others call in processes with a model
    sys.exit(main())
