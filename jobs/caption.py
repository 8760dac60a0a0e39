"""Caption, tag or question every row of a manifest; the same command resumes.

    manifest --> what is still to do --> preprocess --> generate --> fragments --> part files, every row once

This file is the whole run in order; each step lives in a module of its own.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from rich.console import Console

from jobs.command_line import EXIT_INTERRUPTED, run_job
from pipeline import storage
from pipeline.checkpoint.locate import check_model, read_processor_facts, resolve_model
from pipeline.config import CaptionConfig
from pipeline.errors import ConfigError, TooManyErrors
from pipeline.execution.cluster import local_path_notes, quiet_output, ray_cluster, stop_on_sigterm
from pipeline.execution.feeding import Sizes, choose_sizes, enough_actors, rate_of, start_with
from pipeline.execution.placement import Node, Placement, place, place_again, store_share
from pipeline.execution.progress import Progress, Tally, bottleneck, print_samples, print_summary, run_pace
from pipeline.execution.stages import (
    build_stages,
    engine_options,
    kept_schema,
    message_options,
    model_cache,
    number_rows,
    open_input,
)
from pipeline.execution.watch import Watch
from pipeline.execution.watchdog import Watchdog
from pipeline.manifest import Manifest, recorded_manifest
from pipeline.manifest.row_set import RowNumbering
from pipeline.manifest.work import Retries, Work, plan_work
from pipeline.preprocess.messages import check_columns
from pipeline.preprocess.prompt import spare_torch
from pipeline.results.finished import FinishedRows, read_finished
from pipeline.results.fragments import FragmentWriter, take_new
from pipeline.results.lease import Lease
from pipeline.results.parts import finalise, reopen
from pipeline.results.reader import count_errors, iter_results
from pipeline.results.run_folder import RunFolder
from pipeline.results.run_record import check_unchanged, identity, new_record, now
from pipeline.schema import result_schema

log = logging.getLogger(__name__)

_ERRORS_JUDGED_FROM = 100
_SAMPLE_ROWS = 8
_MEASURED_FROM_ROWS = 1000
"""Rows to do from which a few are measured first: a smaller job is over before sizes matter."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_job(CaptionConfig, run, argv, name="caption", about=__doc__ or "")


@dataclass
class Run:
    """A run that has been checked and may begin."""

    config: CaptionConfig
    model_path: str
    folder: RunFolder
    manifest: Manifest
    numbering: RowNumbering
    finished: FinishedRows
    retries: Retries | None
    kept: pa.Schema
    record: dict[str, Any]
    last: dict[str, Any]
    """run.json as the folder's last run left it; empty for a first run."""
    began: bool = False
    """Whether run.json says that this run is under way: until then the folder is not tied to its settings."""


def run(config: CaptionConfig) -> int:
    """Do what is left to do in the output folder. Raises JobError; returns the exit code."""
    stop_on_sigterm()
    folder = RunFolder(config.output.path, config.output.storage_options)
    folder.prepare()
    with Lease(folder.file(".lease"), folder.storage_options) as lease:
        folder.guard = lease.check
        folder.sweep()
        ready = _prepare(config, folder)
        if ready is None:
            return 0
        log_path = _log_path(folder)
        try:
            with quiet_output(log_path, verbose=config.run.verbose) as console:
                return _run(ready, console)
        finally:
            _publish_log(folder, log_path)


def _prepare(config: CaptionConfig, folder: RunFolder) -> Run | None:
    """Check everything that can be checked before Ray starts; None when the folder is finished already."""
    model_path = resolve_model(config.model.path)
    asked = identity(config, model_path)
    record = folder.read_run()
    done_before = folder.is_finished()
    if record is not None and done_before and _is_finished(config, folder, record, asked):
        return None
    manifest = open_input(config, folder)
    if record is not None:
        manifest = check_unchanged(record, config, asked, manifest, folder=folder.path)
    numbering = number_rows(manifest, config.input.limit)
    grown = record is not None and record["manifest"].get("num_rows") != numbering.num_rows
    if done_before and not grown and not config.run.retry_failed:
        _say_finished(folder, record or {}, numbering.num_rows)
        return None
    _check_settings(config, manifest, model_path)
    finished = read_finished(folder, numbering)
    retries = None
    if config.run.retry_failed:
        failed = finished.count_failed()
        retries = finished.take_failed(config.run.retried_types)
        if done_before and not grown and not len(retries.indices):
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in failed.most_common()) or "no errors"
            folder.delete_fragments()
            print(f"{folder.path} is finished and has no such errors to run again: it has {kinds}")
            return None
    if done_before:
        reopen(folder, numbering)
    if not asked["model.files"]:  # a hub's model that has been downloaded by now
        asked = identity(config, model_path)
    fresh = new_record(config, asked, manifest)
    fresh["manifest"]["num_rows"] = numbering.num_rows
    fresh["num_runs"] = (record or {}).get("num_runs", 0) + 1
    fresh["first_started"] = (record or fresh).get("first_started", fresh["started"])
    kept = kept_schema(config, manifest)
    return Run(config, model_path, folder, manifest, numbering, finished, retries, kept, fresh, record or {})


def _is_finished(config: CaptionConfig, folder: RunFolder, record: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether the manifest's listing alone tells that there is nothing to do; then it has been said."""
    if config.run.retry_failed:
        return False
    recorded, given = record["manifest"], config.input
    manifest = recorded_manifest(given.path, recorded, format=given.format, storage_options=given.storage_options)
    if manifest is None:
        return False
    manifest = check_unchanged(record, config, asked, manifest, folder=folder.path)
    num_rows = number_rows(manifest, given.limit).num_rows
    if num_rows != recorded.get("num_rows"):
        return False
    _say_finished(folder, record, num_rows)
    return True


def _say_finished(folder: RunFolder, record: dict[str, Any], num_rows: int) -> None:
    folder.delete_fragments()  # what a crash between success and tidying may have left
    if record.get("state") != "finished":  # it was ended between its parts and its record
        errors = count_errors(folder)
        counts = {"rows": num_rows, "done": num_rows, "failed": errors.total()}
        record.update(state="finished", errors=dict(errors), counts={**record.get("counts", {}), **counts})
        folder.write_run(record)
    failed = record["counts"]["failed"]
    hint = "; --retry-failed runs the error rows again" if failed else ""
    print(f"{folder.path} is finished: {num_rows:,} rows, {failed:,} errors{hint}")


def _check_settings(config: CaptionConfig, manifest: Manifest, model_path: str) -> None:
    """Refuse now what every actor would otherwise refuse later: columns, model, settings."""
    from pipeline.preprocess.prompt import ChatTokenizer

    missing = [name for name in config.input.keep if name not in manifest.schema.names]
    if missing and manifest.format != "media":  # a bare folder has no columns to keep, whatever the config says
        raise ConfigError(
            f"input.keep: the manifest has no column {', '.join(missing)}; found: {', '.join(manifest.schema.names)}"
        )
    by = config.output.partition_by
    if by is not None and by not in config.input.keep:
        raise ConfigError(f"output.partition_by: {by} is not a kept column; input.keep: {', '.join(config.input.keep)}")
    if manifest.num_rows:  # an empty JSONL file has no columns to look at, and no rows that would need any
        check_columns(manifest.schema.names, message_options(config))
    local = model_cache(config).local(model_path, weights=False)  # looks at a bucket's listing for the weights
    check_model(local, revision=config.model.revision, weights=local == model_path)
    read_processor_facts(local, revision=config.model.revision)
    ChatTokenizer(local, revision=config.model.revision)
    try:
        engine_options(config, model_path)
    except ValueError as error:
        raise ConfigError(f"model, engine: {error}") from error


def _run(ready: Run, console: Console) -> int:
    """Run to the end, or say in run.json and on the screen how far it came; at whatever moment it is stopped."""
    config = ready.config
    tally = Tally(ready.numbering.num_rows, len(ready.finished.done), len(ready.finished.failed))
    writer = FragmentWriter(
        ready.folder,
        ready.numbering,
        result_schema(ready.kept),
        config.output.rows_per_fragment,
        config.output.seconds_per_fragment,
    )
    reports: list[dict[str, Any]] = []
    try:
        _work(ready, tally, writer, reports, console)
    except KeyboardInterrupt:
        writer.flush()
        if ready.began:
            _close_record(ready, tally, "interrupted", reports)
        console.print(f"stopped: {tally.done:,} of {tally.total:,} rows are done; the same command goes on")
        return EXIT_INTERRUPTED
    except BaseException:
        writer.flush()
        if ready.began:
            _close_record(ready, tally, "failed", reports)
        raise
    _report(config, ready.folder, console)
    print_summary(console, tally, ready.folder.path, ready.record["errors"], ready.record["bottleneck"])
    _print_samples(console, ready.folder, ready.kept.names)
    return 0


def _work(ready: Run, tally: Tally, writer: FragmentWriter, reports: list[dict[str, Any]], console: Console) -> None:
    """Everything from Ray's start to the part files. `reports` gets what the actors said of themselves."""
    from pipeline.execution import dataset as flow
    from pipeline.execution.nodes import live_nodes

    config, folder = ready.config, ready.folder
    with ray_cluster(config.resources):
        nodes = live_nodes()
        placement = _place(ready, nodes)
        for note in (*placement.notes, *local_path_notes(config, len(nodes))):
            console.print(note, markup=False)
        ready.record["placement"] = vars(placement)
        sizes = _sizes(ready, placement, nodes, console)
        folder.write_run(ready.record)
        ready.began = True
        ledger = flow.start_ledger()
        try:
            _generate(ready, placement, sizes, tally, writer, ledger, console)
        except KeyboardInterrupt:
            writer.flush()  # before anything that may take a while
            _end_start_up(tally, ledger)
            reports += flow.reports(ledger)
            raise
        reports += flow.reports(ledger)
        _end_start_up(tally, ledger)
    _check_errors(tally, config.run.max_error_fraction, at_end=True)
    finalise(
        folder,
        ready.numbering,
        result_schema(ready.kept),
        rows_per_part=config.output.rows_per_part,
        partition_by=config.output.partition_by,
    )
    _close_record(ready, tally, "finished", reports)


def _place(ready: Run, nodes: Sequence[Node]) -> Placement:
    """Actors that fit these nodes, and no more preprocessing ones at first than the folder's last run needed."""
    placement = place(ready.config.resources, nodes)
    return start_with(ready.config.resources, placement, enough_actors(ready.last, placement))


def _sizes(ready: Run, placement: Placement, nodes: Sequence[Node], console: Console) -> Sizes:
    """What travels between the stages at once, from the folder's last run or, in a large job, from a few rows."""
    from pipeline.execution.measure import measure

    resources = ready.config.resources
    rate, source = rate_of(ready.last.get("stages") or []), "in the last run"
    stages = build_stages(ready.config, ready.model_path, ready.manifest)
    unmeasured = choose_sizes(resources, placement, None, max_running=stages.generate.engine.max_running)
    if rate is None and ready.numbering.num_rows - len(ready.finished.done) >= _MEASURED_FROM_ROWS:
        work = _plan(ready, placement, unmeasured)
        rate, source = measure(stages, placement, ready.manifest.spec, work), "on a few rows"
    sizes = choose_sizes(
        resources,
        placement,
        rate,
        max_running=stages.generate.engine.max_running,
        store_bytes=store_share(nodes, placement),
    )
    ready.record["sizes"] = {**vars(sizes), "rate": rate and {**vars(rate), "measured": source}}
    if rate is not None:
        console.print(
            f"{rate.rows_per_s:,.1f} rows/s and {rate.bytes_per_row / 1e6:.2f} MB a row from a preprocessing actor, "
            f"measured {source}: tables of {sizes.rows_per_block:,} rows, {sizes.blocks_in_flight} in an engine, "
            f"{placement.preprocess_actors:,} preprocessing actors",
            markup=False,
            soft_wrap=True,
        )
    return sizes


def _generate(
    ready: Run,
    placement: Placement,
    sizes: Sizes,
    tally: Tally,
    writer: FragmentWriter,
    ledger: Any,
    console: Console,
) -> None:
    """Run what is not done, and publish rows as they finish."""
    from pipeline.execution import dataset as flow
    from pipeline.execution.nodes import live_nodes
    from pipeline.execution.recovery import RecoveryLimits, ended_on_error, run_flows

    limits = RecoveryLimits(ready.config.run.max_flow_restarts, ready.config.run.node_loss_timeout_s)

    def start(number: int) -> flow.RunningFlow | None:
        placed = placement
        if number:
            placed = place_again(ready.config.resources, placement, live_nodes())
            ready.record["placement"] = vars(placed)
            ready.folder.write_run(ready.record)
        work = _plan(ready, placed, sizes)
        stages = build_stages(ready.config, ready.model_path, ready.manifest)
        config = ready.config
        options = flow.Flow(stages, placed, config.resources.block_mb, sizes, config.run.profile_steps)
        return flow.RunningFlow(options, ready.manifest.spec, work, ledger) if work else None

    files = [file.path for file in ready.manifest.files]
    watch = Watch(ready.folder, tally, files, ledger, ready.config.run.profile_steps)
    flows = run_flows(start, limits, lambda line: console.print(line, markup=False))
    with watch, Progress(console, tally) as progress, ended_on_error(flows) as tables:
        watchdog = Watchdog(ready.config.run.stall_timeout_s, functools.partial(flow.break_stall, ledger))
        for table in tables:
            for line in watchdog.look(finished_row=table is not None):
                console.print(line, markup=False)
            if table is not None:
                table = take_new(table, ready.numbering, ready.finished.done)
                tally.add(table)
                watch.add(table)
                writer.add(table)
                _check_errors(tally, ready.config.run.max_error_fraction)
            ready.folder.guard()  # also while nothing is written: a run that was taken over is to stop
            writer.flush_if_old()
            watch.tick()
            progress.tick()
    writer.flush()
    watch.close(console)


def _plan(ready: Run, placement: Placement, sizes: Sizes) -> list[Work]:
    """Units over the rows that are not done."""
    return list(
        plan_work(
            ready.manifest,
            ready.numbering,
            ready.finished.done,
            actors=placement.preprocess_actors,
            min_rows=sizes.min_rows_per_unit,
            max_rows=sizes.max_rows_per_unit,
            retries=ready.retries,
        )
    )


def _check_errors(tally: Tally, allowed: float, *, at_end: bool = False) -> None:
    rows, failed = tally.done, tally.failed
    if (at_end or tally.rows >= _ERRORS_JUDGED_FROM) and failed > allowed * max(rows, 1):
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in tally.errors.most_common(3))
        raise TooManyErrors(
            f"{failed:,} of {rows:,} rows failed ({failed / rows:.0%}), more than run.max_error_fraction {allowed:g}: "
            f"{kinds}; the folder keeps what is done"
        )


def _end_start_up(tally: Tally, ledger: Any) -> None:
    from pipeline.execution import dataset as flow

    working_s = flow.working_s(ledger)
    if working_s:
        tally.began = max(tally.started, time.monotonic() - working_s)


def _close_record(ready: Run, tally: Tally, state: str, reports: Sequence[dict[str, Any]]) -> None:
    """Write run.json with what is known at the end of the run, however it ended."""
    counts = count_errors(ready.folder) if state == "finished" else tally.errors
    rows_s, tokens_s = run_pace(tally)
    engines = [report for report in reports if report.get("kind") == "engine"]
    ready.record.update(
        state=state,
        finished=now(),
        counts={"rows": tally.total, "done": tally.done, "failed": tally.failed, "this_run": tally.rows},
        errors=dict(counts),
        throughput={
            "rows_per_s": rows_s,
            "output_tokens_per_s": tokens_s,
            "seconds": tally.elapsed,
            "prompt_tokens": tally.prompt_tokens,
            "visual_tokens": tally.visual_tokens,
            "output_tokens": tally.output_tokens,
        },
        engine=engines[0]["describe"] if engines else None,
        bottleneck=bottleneck(reports),
        stages=[{key: value for key, value in report.items() if key != "describe"} for report in reports],
    )
    ready.folder.write_run(ready.record)


def _report(config: CaptionConfig, folder: RunFolder, console: Console) -> None:
    """Write the run's page. The results are complete by now, so its failure is told and is not the job's."""
    if not config.output.report:
        return
    from jobs.report import write_report

    try:
        write_report(folder.path, storage_options=folder.storage_options)
    except Exception as error:
        log.exception("the report failed")
        console.print(
            f"the results are complete, but report.html is not: {type(error).__name__}: {error}", markup=False
        )


def _print_samples(console: Console, folder: RunFolder, keep: Sequence[str]) -> None:
    """Some answers beside their references, where the manifest has any: one of each task."""
    if "reference" not in keep:
        return
    columns = ["text", "status", "reference", *(["task"] if "task" in keep else [])]
    rows: dict[Any, dict[str, Any]] = {}
    for table in iter_results(folder, columns):
        for row in table.slice(0, 10_000).to_pylist():
            if row["status"] == "ok":
                rows.setdefault(row.get("task", len(rows)), row)
        break
    print_samples(console, list(rows.values())[:_SAMPLE_ROWS])


def _log_path(folder: RunFolder) -> str:
    """Where Ray's messages go: the run folder, or a temporary file that is copied there at the end."""
    if storage.is_remote(folder.path):
        return os.path.join(tempfile.mkdtemp(prefix="qwen2-vl-batch-"), "log.txt")
    return storage.local_path(folder.file("log.txt"))


def _publish_log(folder: RunFolder, log_path: str) -> None:
    """Put the log into a bucket's run folder, however the run ended. Its failure is told and is not the job's."""
    if storage.is_remote(folder.path) and os.path.exists(log_path):
        try:
            storage.publish_file(log_path, folder.file("log.txt"), folder.storage_options)
        except OSError as error:
            print(f"{folder.file('log.txt')} is not up to date: {error}", file=sys.stderr)


if __name__ == "__main__":
    spare_torch()  # models live in the engine's actors; not in main(), which others call in processes with a model
    sys.exit(main())
