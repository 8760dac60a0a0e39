"""What a run tells while it goes: counts over time, failed rows, metrics, traces; the job tells this one place."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from rich.console import Console

from pipeline.execution.profile import ProfileFolder
from pipeline.execution.progress import ProgressLog, Tally
from pipeline.execution.telemetry import Meter
from pipeline.results.error_log import ErrorLog
from pipeline.results.run_folder import RunFolder


class Watch:
    """Told of finished rows and of passing time; as a context manager it publishes what is left, however it ends."""

    def __init__(
        self, folder: RunFolder, tally: Tally, manifest_files: Sequence[str], ledger: Any, profile_steps: int | None
    ) -> None:
        self._tally = tally
        self._progress = ProgressLog(folder)
        self._errors = ErrorLog(folder, manifest_files)
        self._profile = ProfileFolder(folder, ledger, profile_steps)
        self._meter = Meter()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What ended the run, such as credentials that expired, must not be hidden by the same thing happening here.
        with contextlib.suppress(*([OSError] if kind else [])):
            self._progress.note(self._tally, last=True)
            self._errors.flush()

    def add(self, table: pa.Table) -> None:
        """Finished rows (schema.result_schema)."""
        self._meter.rows(table)
        self._errors.add(table)

    def tick(self) -> None:
        """Some time has passed."""
        self._meter.progress(self._tally.done, self._tally.total)
        self._progress.note(self._tally)
        self._errors.flush(if_old=True)
        self._profile.collect(if_old=True)

    def close(self, console: Console) -> None:
        """All rows are done, and the cluster still stands."""
        self._profile.close(console)
