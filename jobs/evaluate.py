"""Answer a manifest that has references, score the answers, and write one page about it; the same command resumes.

    published dataset --layout--> manifest --caption job--> result rows --> scores.parquet, metrics.json --> report

With `--run.path FOLDER` a finished (or unfinished) run is scored instead, and nothing is generated.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import model_validator
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from jobs.command_line import EXIT_NO_ANSWER, run_job
from jobs.report import write_report
from pipeline.config import CaptionConfig, RunConfig
from pipeline.errors import OutputError
from pipeline.evaluation.canaries import compare_canaries
from pipeline.evaluation.published_set import prepare_manifest
from pipeline.evaluation.run_folder import score_folder
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.settings import EvaluateSection
from pipeline.report.render import shown_difference, shown_interval, shown_note, shown_p, shown_score
from pipeline.report.scores import read_differences, read_scores
from pipeline.results.reader import RunReader
from pipeline.results.run_folder import RunFolder
from pipeline.schema import RESULT_COLUMNS

_COMPLETE = (0, EXIT_NO_ANSWER)
"""Exit codes of a caption run that has a result for every row."""


class EvaluateRunConfig(RunConfig):
    """The conduct of the run."""

    path: str | None = None
    """Score this run folder and generate nothing."""


class EvaluateConfig(CaptionConfig):
    """A caption job whose manifest has references, and how to score it."""

    run: EvaluateRunConfig = EvaluateRunConfig()
    evaluate: EvaluateSection = EvaluateSection()

    @model_validator(mode="before")
    @classmethod
    def _a_run_that_is_there_needs_no_paths(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Scoring reads the run folder alone, which stands for the required paths then."""
        run = values.get("run")
        path = run.get("path") if isinstance(run, Mapping) else None
        needed = [name for name in ("input", "model", "output") if path and isinstance(values.get(name), Mapping)]
        return {**values, **{name: {"path": path, **values[name]} for name in needed}}

    @model_validator(mode="after")
    def _canaries_can_be_compared(self) -> Self:
        settings, sampling = self.input.settings, self.sampling
        draws = sampling.temperature > 0 or "temperature" in settings
        if (
            self.run.path is None
            and self.evaluate.canaries
            and draws
            and sampling.seed is None
            and "seed" not in settings
        ):
            raise ValueError(
                "evaluate.canaries compares answers, but answers drawn with a temperature differ from run to run; "
                "set sampling.seed, or evaluate.canaries to 0"
            )
        return self

    def keeper(self, name: str) -> str:
        """The setting that asks for this column of the results."""
        is_renamed = self.input.keep.get(name, name) != name
        return super().keeper(name) if is_renamed else self.evaluate.scoring.columns.get(name, super().keeper(name))


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(EvaluateConfig, run, argv, name="evaluate", about=__doc__ or "")


def run(config: EvaluateConfig) -> int:
    """Generate, score, report. Raises JobError; returns the exit code."""
    evaluate, storage_options = config.evaluate, config.output.storage_options
    Scorer(evaluate.scoring)  # fails on a missing package before anything is generated
    folder, canaries, code = config.run.path or config.output.path, None, 0
    if config.run.path is None:
        job = caption_config(config)
        code = run_caption(job)
        if code not in _COMPLETE:
            return code
        canaries = run_canaries(job) if evaluate.canaries else None
    metrics = score_folder(
        folder, evaluate.scoring, baseline=evaluate.baseline, canaries=canaries, storage_options=storage_options
    )
    print_scores(metrics)
    if config.output.report:
        path = write_report(
            folder,
            storage_options=storage_options,
            thumbnails=evaluate.thumbnails,
            price_per_gpu_hour=evaluate.price_per_gpu_hour,
            currency=evaluate.currency,
            seed=evaluate.seed,
        )
        print(f"report: {path}")
    return code


def caption_config(config: EvaluateConfig) -> EvaluateConfig:
    """The config of the caption job: its results keep every column that scores and report need.

    With a layout it reads the manifest made by it, in place of what the config says of prompts and columns.
    """
    evaluate, source, output = config.evaluate, config.input, config.output
    keep = [name for name in evaluate.scoring.columns if name not in RESULT_COLUMNS]
    if evaluate.layout:
        path = evaluate.manifest_path or f"{output.path.rstrip('/')}-manifest"
        source = prepare_manifest(evaluate.layout, source, path, output.storage_options)
        keep += ["prompt", *evaluate.layout.keep]
    source = source.model_copy(
        update={"keep": {**source.keep, **{name: name for name in keep if name not in source.keep}}}
    )
    output = output.model_copy(update={"report": False})  # it is written once the rows are scored
    return config.model_copy(update={"input": source, "output": output})


def run_caption(config: CaptionConfig) -> int:
    """Generates what is missing; returns the exit code."""
    from jobs import caption  # loads Ray, which scoring a finished run does not need

    return caption.run(config)


def run_canaries(config: EvaluateConfig) -> dict[str, Any]:
    """Runs the first rows again, each alone, and compares: does an answer depend on the rows in its batch?"""
    limit = min(config.evaluate.canaries, config.input.limit or config.evaluate.canaries)
    rows = "the first row again" if limit == 1 else f"the first {limit:,} rows again, each"
    print(f"canaries: {rows} alone, to compare with the answers above")
    # A run of its own for each number: one that has ended takes no other limit.
    folder = RunFolder(config.output.path).file(f"canaries/{limit}")
    alone = config.model_copy(
        update={
            "input": config.input.model_copy(update={"limit": limit}),
            "output": config.output.model_copy(update={"path": folder}),
            "engine": dataclasses.replace(config.engine, max_running=1, batch_size=1),
            "evaluate": config.evaluate.model_copy(update={"canaries": 0}),
        }
    )
    if (code := run_caption(alone)) not in _COMPLETE:
        raise OutputError(f"the canary rows in {folder} could not be run alone (exit code {code})")
    readers = [RunReader(path, config.output.storage_options) for path in (config.output.path, folder)]
    return compare_canaries(*readers)


def print_scores(metrics: Mapping[str, Any]) -> None:
    """Prints the scores of all rows and of each task, the comparison with the baseline and the canaries."""
    table = Table("slice", "metric", Column("score", justify="right"), "95 %", Column("rows", justify="right"))
    table.box, table.pad_edge = None, False
    scores = read_scores(metrics)
    for label, score in [*(("all rows", score) for score in scores.overall.values()), *scores.slices.get("task", ())]:
        estimate, maximum = score.estimate, score.maximum
        numbers = shown_score(estimate.value, maximum), shown_interval(estimate, maximum), f"{estimate.num_rows:,}"
        table.add_row(Text(label), score.title, *numbers)
    for note in scores.notes:
        share = shown_note(note) if note.share is not None else ""
        table.add_row("all rows", Text(note.title), share, "", "" if note.num_rows is None else f"{note.num_rows:,}")
    console = Console()
    console.print(table)
    for one in read_differences(metrics, metrics.get("baseline") or {}).values():
        found = one.numbers
        console.print(
            f"{one.title} against the baseline, on the {found.num_rows:,} rows of both: "
            f"{shown_difference(found, one.maximum)}, {shown_p(found.p_permutation)}, "
            f"{found.won:,} won, {found.lost:,} lost: {found.verdict}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if "canaries" in metrics:
        print(f"canaries: {metrics['canaries']['sentence']}")


if __name__ == "__main__":
    sys.exit(main())
