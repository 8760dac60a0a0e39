"""Everything that can be checked and decided before Ray starts: is the folder finished, may it be continued, do the
settings work, and which rows are left.

Knows config, manifest, checkpoint and run folder; nothing of Ray.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.checkpoint.adapter import other_base, read_adapter_config, resolve_adapter
from pipeline.checkpoint.generation import greedy_note
from pipeline.checkpoint.locate import resolve_model
from pipeline.checkpoint.prompts import untrained_prompt
from pipeline.config import CaptionConfig
from pipeline.errors import JobError, TooManyErrors, counted
from pipeline.execution.placement import Placement
from pipeline.execution.progress import RunCounts, bottleneck
from pipeline.execution.stages import (
    Stages,
    build_stages,
    check_settings,
    kept_schema,
    message_options,
    model_cache,
    number_rows,
    open_input,
)
from pipeline.execution.summary import error_line
from pipeline.manifest.changes import recorded_files
from pipeline.manifest.files import MEDIA, Manifest, WorkUnit
from pipeline.manifest.find import recorded_manifest
from pipeline.manifest.listing import listings
from pipeline.manifest.row_set import RowNumbering
from pipeline.manifest.work import Retries, plan_work
from pipeline.preprocess.messages.columns import template_columns, unread_settings
from pipeline.results.finished import FinishedRows, read_finished
from pipeline.results.lease import Lease
from pipeline.results.parts import reopen, restore_success
from pipeline.results.reader import count_errors
from pipeline.results.result_files import check_kept
from pipeline.results.run_folder import RunFolder
from pipeline.results.run_record import check_unchanged, identity, new_record, now

_ERRORS_JUDGED_FROM = 100
"""Rows of a run from which its error rows may stop it."""
_HOPELESS_FRACTION, _HOPELESS_FROM = 0.95, 200
"""The same where the config says nothing: something concerns all rows then, and the rest would only cost money."""
_SHOWN_ERROR_TYPES = 3
_NOTE_EVERY_S = 60.0


@dataclass
class CaptionJob:
    """A run of the caption job that has been checked and may begin, and what is known of it so far."""

    config: CaptionConfig
    model_path: str
    folder: RunFolder
    manifest: Manifest
    numbering: RowNumbering
    finished: FinishedRows
    retries: Retries | None
    kept: pa.Schema
    record: dict[str, Any]
    """run.json of this run."""
    last_record: Mapping[str, Any]
    """run.json as the folder's last run left it; empty for a first run."""
    counts: RunCounts
    notes: tuple[str, ...] = ()
    """Sentences to print once, before the first row."""
    stats: Sequence[Mapping[str, Any]] = ()
    """What the actors last reported."""
    started: bool = False
    """Whether run.json says that this run is in progress: until then the folder is not tied to its settings."""
    knows_engine: bool = False
    """Whether an engine is ready and described."""
    _noted: float = field(default_factory=time.monotonic)

    @property
    def stages(self) -> Stages:
        """The options of both stages. A dtype that an earlier run's engine picked is kept."""
        config, picked = self.config, self.record["model"].get("dtype")
        if picked is not None:
            config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": picked})})
        return build_stages(config, self.model_path, self.manifest)

    def note_engines(self, stats: Sequence[Mapping[str, Any]]) -> str | None:
        """Write into run.json which dtype the first engine has picked; the line to print, once."""
        described = next((one["describe"] for one in stats if "describe" in one), None)
        self.knows_engine = described is not None
        if described is None or "dtype" not in described or self.record["model"].get("dtype") is not None:
            return None
        self.record["model"]["dtype"] = described["dtype"]
        self.folder.write_run(self.record)
        return f"model in {described['dtype']}: {described.get('dtype_reason')}"

    def start(self, placement: Placement) -> None:
        """Write run.json with the state `running`."""
        self.record["placement"] = vars(placement)
        self._measure()
        self.folder.write_run(self.record)
        self.started = True

    def note_pace(self) -> None:
        """Write into run.json, now and then, how far the run is: a run that is killed counts as far as this."""
        if time.monotonic() - self._noted >= _NOTE_EVERY_S:
            self._noted = time.monotonic()
            self._measure()
            with contextlib.suppress(JobError):  # a full disk is reported where it costs rows
                self.folder.write_run(self.record)

    def _measure(self) -> None:
        """Put counts and times into the record: of this run, and of all runs in the folder together."""
        counts, placement = self.counts, self.record["placement"]
        rows_per_s, tokens_per_s = counts.pace()
        of_both = {
            "seconds": counts.elapsed,
            "prompt_tokens": counts.prompt_tokens,
            "visual_tokens": counts.visual_tokens,
            "output_tokens": counts.output_tokens,
        }
        mine = {
            "runs": 1,
            "rows": counts.rows,
            **of_both,
            "row_seconds": counts.row_seconds,
            "gpu_seconds": counts.elapsed * placement["engine_actors"] * placement["gpus_per_engine"],
        }
        before = self.last_record.get("totals", {})
        self.record.update(
            counts={"rows": counts.total, "done": counts.done, "failed": counts.failed, "this_run": counts.rows},
            throughput={"rows_per_s": rows_per_s, "output_tokens_per_s": tokens_per_s, **of_both},
            totals={name: before.get(name, 0) + value for name, value in mine.items()},
        )

    def plan(self, placement: Placement) -> list[WorkUnit]:
        resources = self.config.resources
        return list(
            plan_work(
                self.manifest,
                self.numbering,
                self.finished.done,
                actors=placement.preprocess_actors,
                min_rows=resources.min_rows_per_unit,
                max_rows=resources.max_rows_per_unit,
                retries=self.retries,
            )
        )

    def check_errors(self, *, at_end: bool = False) -> None:
        """Raise TooManyErrors when more rows failed than `run.max_error_fraction` allows."""
        counts, allowed, judged_from = self.counts, self.config.run.max_error_fraction, _ERRORS_JUDGED_FROM
        limit = f"run.max_error_fraction {allowed}"
        if allowed is None:
            if at_end:  # the rows are done: their results are of more use than an error
                return
            allowed, judged_from = _HOPELESS_FRACTION, _HOPELESS_FROM
            limit = f"run.max_error_fraction (not set: {allowed})"
        if (at_end or counts.rows >= judged_from) and counts.failed > allowed * max(counts.done, 1):
            kinds = [
                error_line(kind, count, counts.examples.get(kind)).plain
                for kind, count in counts.errors.most_common(_SHOWN_ERROR_TYPES)
            ]
            if (left_out := len(counts.errors) - len(kinds)) > 0:
                kinds.append(counted(left_out, "more error type"))
            lines = "".join(f"  {line}\n" for line in kinds)
            raise TooManyErrors(
                f"{counts.failed:,} of {counted(counts.done, 'row')} failed ({counts.failed / counts.done:.0%}), more "
                f"than {limit} allows:\n{lines}"
                f"{self.folder.file('errors.jsonl')} lists the failed rows; finished rows are kept. Once the cause is "
                "fixed, the same command resumes, and --retry-failed runs the failed rows again; "
                "--run.max_error_fraction 1 resumes however many fail"
            )

    def close(self, state: str) -> None:
        """Write run.json with what is known at the end of the run, however it ended."""
        if not self.started:
            return
        self._measure()
        engines = [one for one in self.stats if one.get("kind") == "engine"]
        self.record.update(
            state=state,
            finished=now(),
            errors=dict(count_errors(self.folder) if state == "finished" else self.counts.errors),
            engine=next((one["describe"] for one in engines if "describe" in one), None),
            bottleneck=bottleneck(self.stats),
            stages=[
                {key: value for key, value in one.items() if key not in ("describe", "loading")} for one in self.stats
            ],
        )
        self.folder.write_run(self.record)


@contextlib.contextmanager
def hold(folder: RunFolder) -> Iterator[None]:
    """Make the folder ready, and keep other runs out of it. A run that is refused leaves nothing behind. Raises
    OutputError where another run holds it."""
    folder.prepare()
    try:
        with Lease(folder.file(".lease"), folder.storage_options) as lease:
            folder.guard = lease.check
            folder.sweep()
            try:
                yield
            except JobError:
                with contextlib.suppress(JobError, OSError):  # what ended the run may also be in the way of this
                    _discard_supplements(folder, folder.read_run())
                    folder.discard_unused()
                raise
    except JobError:
        folder.delete_if_empty()
        raise


def prepare(config: CaptionConfig, folder: RunFolder) -> CaptionJob | None:
    """Check everything that can be checked before Ray starts. None when the folder is finished already, which has been
    printed then. Raises JobError."""
    model_path = resolve_model(config.model.path)
    asked = identity(config, model_path)
    record = folder.read_run()
    if record is not None and restore_success(folder, record):
        print(f"{folder.path} had no _SUCCESS, but its part files hold every row: _SUCCESS has been written again")
    finished_before = folder.is_finished()
    if record is not None and finished_before and _listing_is_finished(config, folder, record, asked):
        return None
    _discard_supplements(folder, record)
    manifest = open_input(config, folder)
    if record is not None:
        manifest = check_unchanged(record, config, asked, manifest, folder=folder.path)
    numbering = number_rows(manifest, config.input.limit)
    grown = record is not None and record["manifest"].get("num_rows") != numbering.num_rows
    if finished_before and not grown and not config.run.retry_failed:
        _print_finished(config, folder, record or {}, numbering.num_rows)
        return None
    model_facts = check_settings(config, manifest, model_path)
    if config.run.on_change == "new-rows":
        check_kept(folder, kept_schema(config, manifest))
    finished = read_finished(folder, numbering)
    retries = None
    if config.run.retry_failed:
        failed = finished.count_failed()
        retries = finished.take_failed(config.run.retried_types)
        if finished_before and not grown and not len(retries.indices):
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in failed.most_common()) or "no errors"
            _close_finished(folder, record or {}, numbering.num_rows)
            print(f"{folder.path} is finished and has no such errors to run again: it has {kinds}")
            return None
    if finished_before:
        reopen(folder, numbering)
    if not (asked["model.files"] and (asked["model.adapter_files"] or not asked["model.adapter"])):
        # The hub's files have been downloaded by now.
        asked = identity(config, model_path)
    local = model_cache(config).local(model_path, weights=False)
    picked = None if config.model.dtype != "auto" else _picked_dtype(record or {})
    fresh = new_record(config, asked, manifest)
    fresh["model"] |= {**model_facts, "dtype": picked}
    fresh["manifest"]["num_rows"] = numbering.num_rows
    _carry_on(fresh, record, config, manifest)
    return CaptionJob(
        config,
        model_path,
        folder,
        manifest,
        numbering,
        finished,
        retries,
        kept_schema(config, manifest),
        fresh,
        record or {},
        RunCounts(numbering.num_rows, len(finished.done), len(finished.failed)),
        (
            *([f"the run goes on in {picked}, in which it began"] if picked else []),
            *_notes(config, manifest, local, model_facts),
        ),
    )


def _carry_on(
    fresh: dict[str, Any], record: Mapping[str, Any] | None, config: CaptionConfig, manifest: Manifest
) -> None:
    """Add to a run's record what it continues of the folder's record: how many runs there were, and since when."""
    before: Mapping[str, Any] = record or {}
    if manifest.format == MEDIA:
        lists_anew = record is None or config.run.on_change == "new-rows"
        fresh["manifest"]["listed"] = fresh["started"] if lists_anew else _listed(before)
    fresh["num_runs"] = before.get("num_runs", 0) + 1
    fresh["first_started"] = before.get("first_started", fresh["started"])


def _discard_supplements(folder: RunFolder, record: Mapping[str, Any] | None) -> None:
    """Remove listings of media that came later which run.json does not name: their run was refused or killed before
    its first row."""
    recorded = recorded_files(record["manifest"]["fingerprint"]) if record else {}
    _, *supplements = listings(folder.file("manifest.parquet"), folder.storage_options)
    for path in reversed(supplements):
        if storage.name(path) not in recorded:
            folder.delete(path)


def _picked_dtype(record: Mapping[str, Any]) -> str | None:
    """What the engines of an earlier run picked: rows of one run are answered in one dtype, wherever it goes on."""
    return record.get("model", {}).get("dtype") or (record.get("engine") or {}).get("dtype")


def _notes(
    config: CaptionConfig, manifest: Manifest, local_model: str, model_facts: Mapping[str, Any]
) -> Iterator[str]:
    """What may surprise, in a sentence each."""
    if adapter := resolve_adapter(config.model.adapter):
        stated = read_adapter_config(model_cache(config).local_adapter(adapter), revision=config.model.adapter_revision)
        if base := other_base(stated, config.model.path):
            yield f"the adapter {adapter} says that it was trained on {base}; model.path is {config.model.path}"
    template = config.prompt.template
    asks_alike = template is not None and not template_columns(template)  # else the rows' columns make the prompts
    if asks_alike and (note := untrained_prompt(local_model, template, revision=config.model.revision)):
        yield note
    if note := greedy_note(model_facts["published_sampling"], asdict(config.sampling)):
        yield note
    if names := unread_settings(manifest.schema.names, message_options(config)):
        listed = ", ".join(names)
        yield (
            f"columns of the manifest that are named like settings are not read as such: {listed}; "
            f"input.settings [{listed}] lets rows set them"
        )


def _listing_is_finished(
    config: CaptionConfig, folder: RunFolder, record: dict[str, Any], asked: dict[str, Any]
) -> bool:
    """Whether the manifest's listing alone shows that there is nothing to do; then this has been printed."""
    if config.run.retry_failed:
        return False
    recorded, source = record["manifest"], config.input
    manifest = recorded_manifest(source.path, recorded, format=source.format, storage_options=source.storage_options)
    if manifest is None:
        return False
    manifest = check_unchanged(record, config, asked, manifest, folder=folder.path)
    num_rows = number_rows(manifest, source.limit).num_rows
    if num_rows != recorded.get("num_rows"):
        return False
    _print_finished(config, folder, record, num_rows)
    return True


def _print_finished(config: CaptionConfig, folder: RunFolder, record: dict[str, Any], num_rows: int) -> None:
    _close_finished(folder, record, num_rows)
    failed = record["counts"]["failed"]
    hint = "; --retry-failed runs the error rows again" if failed else ""
    print(f"{folder.path} is finished: {counted(num_rows, 'row')}, {counted(failed, 'error')}{hint}")
    if listed := _listed(record):
        looks = "" if config.run.on_change == "new-rows" else "; --on-change=new-rows looks for new ones"
        print(f"its rows are the images and videos listed at {listed}{looks}")


def _close_finished(folder: RunFolder, record: dict[str, Any], num_rows: int) -> None:
    """Do what a run that was killed after it had written `_SUCCESS` left undone."""
    if record.get("state") != "finished":
        errors = count_errors(folder)
        counts = {"rows": num_rows, "done": num_rows, "failed": errors.total()}
        record.update(state="finished", errors=dict(errors), counts={**record.get("counts", {}), **counts})
        folder.write_run(record)
    folder.delete_fragments()


def _listed(record: Mapping[str, Any]) -> str | None:
    """When the rows of a folder of media were listed."""
    if not record or record["manifest"]["fingerprint"]["format"] != MEDIA:
        return None
    return record["manifest"].get("listed") or record.get("first_started") or record.get("started")
