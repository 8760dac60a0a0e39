"""Caption, tag or ask about every row of a manifest; the same command resumes.

    manifest --> what is left to do --> preprocess --> generate --> fragments --> part files, every row once

This file is the whole run in order: prepare, run, finish, report.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from jobs.command_line import EXIT_INTERRUPTED, EXIT_NO_ANSWER, run_job
from jobs.report import write_report
from pipeline.config import CaptionConfig
from pipeline.errors import JobError, counted
from pipeline.evaluation.columns import answer_texts
from pipeline.execution.cluster import job_output, stop_on_signals
from pipeline.execution.prepare import CaptionJob, hold, prepare
from pipeline.execution.run import finish, run_on_ray
from pipeline.execution.summary import print_samples, print_summary
from pipeline.preprocess.messages.values import readable_rows
from pipeline.results.reader import RunReader
from pipeline.results.run_folder import RunFolder
from pipeline.schema import Status

log = logging.getLogger(__name__)

_SAMPLE_ROWS = 8


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(CaptionConfig, run, argv, name="caption", about=__doc__ or "")


def run(config: CaptionConfig) -> int:
    """Do what is left to do in the output folder. Raises JobError; returns the exit code."""
    stop_on_signals()
    folder = RunFolder(config.output.path, config.output.storage_options)
    with hold(folder):
        job = prepare(config, folder)
        if job is None:
            counts = (folder.read_run() or {})["counts"]
            return _exit_code(counts["failed"], counts["rows"])
        with job_output(folder, verbose=config.run.verbose) as console:
            for note in job.manifest.notes:
                console.print(note, markup=False)
                if not config.run.verbose:  # this is log.txt; else it is the screen
                    print(note, file=sys.__stderr__)
            try:
                run_on_ray(job, console)
                finish(job)
            except KeyboardInterrupt:
                job.close("interrupted")
                done, total = job.counts.done, counted(job.counts.total, "row")
                console.print(f"stopped with {done:,} of {total} done; the same command resumes")
                return EXIT_INTERRUPTED
            except BaseException:
                with contextlib.suppress(JobError, OSError):  # what ended the run may keep run.json from being written
                    job.close("failed")
                raise
            report(job, console)
            return _exit_code(job.counts.failed, job.counts.total)


def _exit_code(failed: int, total: int) -> int:
    """Of a complete run."""
    return EXIT_NO_ANSWER if failed == total > 0 else 0


def report(job: CaptionJob, console: Console) -> None:
    """Write the page and print the summary."""
    if job.config.output.report:
        try:
            write_report(job.folder.path, storage_options=job.folder.storage_options)
        except Exception as error:  # the results are complete: a page that fails does not fail the job
            log.exception("the report failed")
            message = f"the results are complete, but the report is not: {type(error).__name__}: {error}"
            console.print(message, markup=False)
    print_summary(console, job.counts, job.folder, job.record["errors"], job.record["bottleneck"])
    if "reference" in job.kept.names:
        try:
            print_samples(console, _samples(job))
        except Exception as error:  # nor do samples that can't be shown
            log.exception("the samples failed")
            console.print(f"the sample of rows can't be shown: {type(error).__name__}: {error}", markup=False)


def _samples(job: CaptionJob) -> list[dict[str, Any]]:
    """Some answered rows: one of each task, if the manifest has tasks."""
    columns = ["text", "status", "reference", *(["task"] if "task" in job.kept.names else [])]
    rows: dict[str, dict[str, Any]] = {}
    reader = RunReader(job.folder.path, job.folder.storage_options)
    for batch in itertools.islice(reader.first_batches(columns), _SAMPLE_ROWS):
        for row in readable_rows(batch):
            if row["status"] == Status.OK:
                row["references"] = answer_texts(row["reference"])
                rows.setdefault(str(row.get("task", len(rows))), row)
    return list(rows.values())[:_SAMPLE_ROWS]


if __name__ == "__main__":
    sys.exit(main())
