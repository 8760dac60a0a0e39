"""`errors.jsonl` in the run folder: a line of JSON for every failed row, with its row key.

The results have the same errors; this file shows them while the job runs, to a person with `tail` or `jq`. A later run
adds to the lines of an earlier one; when the parts are written, so is the file, with the rows that failed in the end.
It is published whole, since buckets can't append, and has at most MAX_LINES.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.results.run_folder import RunFolder
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW, Status

MAX_LINES = 10_000
_PUBLISH_EVERY_S = 10.0
_COLUMNS = ["id", "attempts", "error_stage", "error_type", "error_message", MANIFEST_FILE, MANIFEST_ROW, "status"]


class ErrorLog:
    """Collects failed rows and publishes them now and then."""

    def __init__(self, folder: RunFolder, manifest_files: Sequence[str], *, is_final: bool = False) -> None:
        """`manifest_files` are the manifest's paths, by the numbers that rows carry. With `is_final` the rows are those
        of the parts, and their lines replace the file's."""
        self._folder, self._files, self._is_final = folder, manifest_files, is_final
        self._path = folder.file("errors.jsonl")
        self._has_new = is_final
        self._published = time.monotonic()
        self._lines: list[str] = []
        if is_final:
            return
        with contextlib.suppress(OSError):
            self._lines = storage.read_bytes(self._path, folder.storage_options).decode().splitlines()

    def add(self, table: pa.Table) -> None:
        """Add the failed rows among finished ones (schema.result_schema)."""
        room = MAX_LINES - len(self._lines)
        failed = table.select(_COLUMNS).filter(pc.not_equal(table.column("status"), Status.OK.value)).slice(0, room)
        for row in failed.to_pylist():
            line = {
                **({} if self._is_final else {"time": round(time.time(), 1)}),
                "manifest_file": self._files[row[MANIFEST_FILE]],
                "manifest_row": row[MANIFEST_ROW],
                "id": row["id"],
                "stage": row["error_stage"],
                "type": row["error_type"],
                "message": row["error_message"],
                "attempts": row["attempts"],
            }
            self._lines.append(json.dumps(line, ensure_ascii=False))
            self._has_new = True
        if len(self._lines) == MAX_LINES:
            self._lines[-1] = json.dumps({"message": f"{MAX_LINES - 1:,} errors are shown; the results have them all"})

    def flush(self, *, if_old: bool = False) -> None:
        """Publish what is new; with `if_old`, only some seconds after the last time."""
        if self._has_new and not (if_old and time.monotonic() - self._published < _PUBLISH_EVERY_S):
            self._has_new, self._published = False, time.monotonic()
            with contextlib.suppress(OSError):  # a full disk is reported where it costs rows
                if not self._lines:
                    storage.delete(self._path, self._folder.storage_options)
                    return
                storage.publish(self._path, ("\n".join(self._lines) + "\n").encode(), self._folder.storage_options)
