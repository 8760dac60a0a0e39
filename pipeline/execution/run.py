"""A prepared job on the cluster: start the actors, publish rows as they finish, watch for actors and nodes that fail.

Ray restarts a lost node's actors elsewhere and recomputes its blocks, and mostly that is enough. Where it is not (the
actors no longer fit, blocks that cannot be recomputed, an executor that waits for ever) no row finishes any more: then
the process leaves the cluster and starts its own command again, which resumes on the nodes that are left.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Iterator

import pyarrow as pa
from rich.console import Console

from pipeline.errors import ClusterError, RestartNeeded, counted
from pipeline.execution.actors import row_keys
from pipeline.execution.cluster import live_nodes, local_path_notes, ray_cluster
from pipeline.execution.dataset import Flow, run_dataset, with_ticks
from pipeline.execution.placement import Placement, place, place_again
from pipeline.execution.prepare import CaptionJob
from pipeline.execution.profile import ProfileFolder
from pipeline.execution.progress import ProgressLine, ProgressLog, starting_text
from pipeline.execution.reservation import Reservation, reserve
from pipeline.execution.supervision import OpenUnits, Supervision
from pipeline.execution.telemetry import Meter
from pipeline.manifest.files import WorkUnit
from pipeline.preprocess.fetch.proxy import proxy_notes
from pipeline.results.error_log import ErrorLog
from pipeline.results.fragments import FragmentWriter, take_new
from pipeline.results.parts import finalise
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW, result_schema

RESTARTS_VARIABLE = "QWEN2_VL_BATCH_RESTARTS"
"""Environment variable with the number of restarts in a row, that finished no row."""
_LOOK_EVERY_S = 3.0
_NOTICE_S = 30.0
"""Seconds that Ray may need to declare a node dead after a job broke on it: its health checks take about 15."""


def run_on_ray(job: CaptionJob, console: Console) -> None:
    """Run every row that is not done, on the cluster that the config names. Whatever ends this, finished rows are
    published. Raises JobError; RestartNeeded where starting the command again would help."""
    output = job.config.output
    writer = FragmentWriter(
        job.folder, job.numbering, result_schema(job.kept), output.rows_per_fragment, output.seconds_per_fragment
    )
    try:
        say = functools.partial(console.print, markup=False)
        with ray_cluster(job.config.resources, say):
            placement = _place(job)
            paths = local_path_notes(job.config, len(live_nodes()))
            for note in (*job.notes, *placement.notes, *paths, *proxy_notes(job.stages.preprocess.fetch)):
                say(note)
            job.start(placement)
            supervision = Supervision(job.config.run.stall_timeout_s)
            try:
                if work := job.plan(placement):
                    with reserve(placement, say) as reservation:
                        _run_rows(job, work, reservation, writer, supervision, console)
            except KeyboardInterrupt:
                writer.flush()  # before the actors are asked for their stats, which may take a while
                _read_stats(job, supervision)
                raise
            except Exception:
                _read_stats(job, supervision)
                supervision.kill_actors()
                raise
            _read_stats(job, supervision)
    finally:
        writer.flush()


def _read_stats(job: CaptionJob, supervision: Supervision) -> None:
    job.stats = supervision.stats()
    _note_rows_started(job, supervision)


def _note_rows_started(job: CaptionJob, supervision: Supervision) -> None:
    if job.counts.rows_started is None and (seconds_up := supervision.seconds_up()):
        job.counts.rows_started = max(job.counts.started, time.monotonic() - seconds_up)


def finish(job: CaptionJob) -> None:
    """Merge the fragments into part files, every row once, write `_SUCCESS` and run.json, and then remove the
    fragments. Raises JobError."""
    job.check_errors(at_end=True)
    output = job.config.output
    finalise(
        job.folder,
        job.numbering,
        result_schema(job.kept),
        rows_per_part=output.rows_per_part,
        partition_by=output.partition_by,
        errors=ErrorLog(job.folder, _manifest_paths(job), is_final=True),
    )
    job.close("finished")
    job.folder.delete_fragments()


def _manifest_paths(job: CaptionJob) -> list[str]:
    return [file.path for file in job.manifest.files]


def restart_command() -> None:
    """Replace this process by a new one with the same command, after RestartNeeded. Does not return."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.execv(sys.executable, sys.orig_argv)


def _place(job: CaptionJob) -> Placement:
    """Actors for the cluster; after lost nodes, for what is left of it."""
    resources, before = job.config.resources, job.last_record.get("placement")
    if RESTARTS_VARIABLE not in os.environ or before is None:
        return place(resources, live_nodes())
    return place_again(resources, before, live_nodes())


def _run_rows(
    job: CaptionJob,
    work: list[WorkUnit],
    reservation: Reservation,
    writer: FragmentWriter,
    supervision: Supervision,
    console: Console,
) -> None:
    """Run the stages over what is left, and publish rows as they finish."""
    config, folder = job.config, job.folder
    flow = Flow(
        job.stages,
        reservation,
        block_bytes=int(config.resources.block_mb * 1024**2),
        rows_per_block=config.resources.max_rows_per_unit,
        profile_steps=config.run.profile_steps,
    )
    meter, progress_log, units = Meter(), ProgressLog(folder), OpenUnits(work)
    error_log = ErrorLog(folder, _manifest_paths(job))
    profile = ProfileFolder(folder, supervision, config.run.profile_steps)
    tables = with_ticks(run_dataset(flow, job.manifest.spec, work, supervision.actor), seconds=1.0)
    try:
        with ProgressLine(console, job.counts) as progress:
            for table in _until_nodes_are_lost(job, tables):
                for line in supervision.watch(row_finished=table is not None):
                    console.print(line, markup=False)
                if table is not None:
                    table = take_new(table, job.numbering, job.finished.done)
                    supervision.forget(units.arrived(row_keys(table, MANIFEST_FILE, MANIFEST_ROW)))
                    job.counts.add(table)
                    meter.rows(table)
                    error_log.add(table)
                    writer.add(table)
                    job.check_errors()
                folder.guard()  # also while nothing is written: a run that was taken over must stop
                writer.flush_if_old()
                meter.progress(job.counts.done, job.counts.total)
                progress_log.note(job.counts)
                job.note_pace()
                error_log.flush(if_old=True)
                profile.collect(if_old=True)
                _note_rows_started(job, supervision)
                if not job.knows_engine or (not job.counts.rows and table is None):
                    stats = supervision.stats()
                    job.counts.state = starting_text(stats)
                    if picked := job.note_engines(stats):
                        console.print(picked, markup=False)
                progress.tick()
        writer.flush()
        if missing := job.numbering.num_rows - len(job.finished.done):
            raise _restart(job, f"{counted(missing, 'row')} lost")
    finally:
        # Whatever ended the run, such as expired credentials, must not be hidden by the same failure here.
        with contextlib.suppress(*([OSError] if sys.exc_info()[0] else [])):
            progress_log.note(job.counts, last=True)
            error_log.flush()
    profile.close(console)


def _until_nodes_are_lost(job: CaptionJob, tables: Iterator[pa.Table | None]) -> Iterator[pa.Table | None]:
    """The tables. Raises RestartNeeded when a node was lost and then the dataset broke, or no row finished for
    `run.node_loss_timeout_s`."""
    timeout_s = job.config.run.node_loss_timeout_s
    first = {node.node_id for node in live_nodes()}
    looked = last_row = time.monotonic()
    lost_since: float | None = None
    try:
        for table in tables:
            yield table
            now = time.monotonic()
            if table is not None:
                last_row = now
                continue
            if now - looked >= _LOOK_EVERY_S:
                looked = now
                if lost_since is None and _lost(first):
                    lost_since = now
            if lost_since is not None and now - max(lost_since, last_row) > timeout_s:
                raise _restart(job, f"no row has finished for {timeout_s:g} s since {_describe(first)}")
    except RestartNeeded:
        raise
    except ClusterError as error:
        if _is_lost_soon(first):
            raise _restart(job, f"{_describe(first)}: {error}") from error
        raise


def _lost(first: set[str]) -> set[str]:
    """The nodes among those that Ray has declared dead; its health checks take some seconds to notice."""
    return first - {node.node_id for node in live_nodes()}


def _is_lost_soon(first: set[str]) -> bool:
    """Whether a node was lost; waits until Ray should have noticed, where there is more than one."""
    deadline = time.monotonic() + _NOTICE_S
    while not _lost(first):
        if len(first) < 2 or time.monotonic() > deadline:
            return False
        time.sleep(1.0)
    return True


def _describe(first: set[str]) -> str:
    return f"{len(_lost(first))} of the cluster's {len(first)} nodes were lost"


def _restart(job: CaptionJob, reason: str) -> ClusterError:
    """RestartNeeded, or ClusterError when restarts have finished no row too often."""
    fruitless = 0 if job.counts.rows else int(os.environ.get(RESTARTS_VARIABLE, "0")) + 1
    allowed = job.config.run.max_flow_restarts
    if fruitless > allowed:
        return ClusterError(
            f"the job was restarted {allowed} times in a row without a finished row (run.max_flow_restarts): {reason}; "
            "the same command resumes"
        )
    os.environ[RESTARTS_VARIABLE] = str(fruitless)
    return RestartNeeded(f"{reason}; the same command resumes")
