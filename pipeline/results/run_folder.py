"""Names, paths and small files of a run folder, on disk or in a bucket. Knows no rows.

A finished folder is a dataset: it holds part files, and beside them only names that begin with an underscore, which
pandas, pyarrow, Spark and Hugging Face's datasets leave out. (The last one skips folders with two underscores alone.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from pipeline import storage
from pipeline.errors import OutputError
from pipeline.schema import PART_FILE, RECORDS_FOLDER

REPORT_FILE = "_report.html"
_SUCCESS = "_SUCCESS"
_PART = re.compile(rf"([^/]+=[^/]*/)?{PART_FILE.pattern}")


class RunFolder:
    """Every change to the folder goes through `publish` and `delete`. They raise OutputError."""

    def __init__(self, path: str, storage_options: storage.StorageOptions = None) -> None:
        self.path = path.rstrip("/") or path
        self.storage_options = storage_options
        self.guard: Callable[[], None] = lambda: None
        """Called before every change; raises when another run has taken the folder over."""
        self._is_new = False

    def file(self, *names: str) -> str:
        """The path of one of the run's records, such as run.json."""
        return storage.join(self.path, RECORDS_FOLDER, *names)

    def part(self, *names: str) -> str:
        """The path of a part file, or of a file beside the parts."""
        return storage.join(self.path, *names)

    def relative(self, path: str) -> str:
        """The path below the folder."""
        return path.removeprefix(self.path.rstrip("/") + "/")

    def prepare(self) -> None:
        """Make the folder. Raises OutputError when it can't be written or holds something else."""
        try:
            self._is_new = not storage.exists(self.path, self.storage_options)
            record = None if self._is_new else self.read_run()
            if record is not None and not _says_what_was_run(record):
                raise OutputError(
                    f"{self.file('run.json')} does not say which manifest the folder's rows are of; put the run's own "
                    "file back, or choose another output.path"
                )
            if not self._is_new and record is None:
                found = storage.list_files(self.path, self.storage_options, recursive=False)
                foreign = [storage.name(path) for path in (*(info.path for info in found), *self.fragments())]
                if "run.json" in foreign:
                    raise OutputError(
                        f"{self.path} holds a run of an earlier version, with run.json beside the part files: "
                        "finish it with that version, or choose an empty or new folder as output.path"
                    )
                if foreign:
                    raise OutputError(
                        f"{self.path} holds files but no {RECORDS_FOLDER}/run.json ({', '.join(foreign[:3])}): "
                        "choose an empty or new folder as output.path"
                    )
            storage.make_dir(self.file("fragments"), self.storage_options)
        except OSError as error:
            raise OutputError(f"can't write to output.path {self.path}: {error}") from error

    def discard_unused(self) -> None:
        """Remove what a run that was refused before it began has written. A log stays: it may say why. Only for the
        holder of the folder."""
        if self.read_run() is None and not storage.exists(self.file("log.txt"), self.storage_options):
            self.delete(self.file("manifest.parquet"))
            storage.delete_empty(self.file("fragments"))

    def delete_if_empty(self) -> None:
        """Remove the folders that `prepare` made, if nothing is in them: another run may have begun there."""
        storage.delete_empty(self.file())
        if self._is_new:
            storage.delete_empty(self.path)

    def read_run(self) -> dict[str, Any] | None:
        """The content of run.json; None when there is none."""
        return self.read_json("run.json")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file; None when there is no such file. Raises OutputError."""
        path = self.file(name)
        try:
            values = json.loads(storage.read_bytes(path, self.storage_options))
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise OutputError(
                f"{self.path} is a file: choose a run folder, or as output.path a folder that may be new"
            ) from error
        except (OSError, ValueError) as error:
            raise OutputError(f"can't read {path}: {error}") from error
        if not isinstance(values, dict):
            raise OutputError(f"{path} holds a {type(values).__name__}; expected an object")
        return values

    def write_run(self, values: dict[str, Any]) -> None:
        """Publish run.json."""
        self.publish(self.file("run.json"), json.dumps(values, indent=2, default=str).encode())

    def is_finished(self) -> bool:
        """Whether the parts are complete."""
        return storage.exists(self.part(_SUCCESS), self.storage_options)

    def mark_finished(self) -> None:
        """The parts are complete."""
        self.publish(self.part(_SUCCESS), b"")

    def mark_unfinished(self) -> None:
        """The parts are about to change."""
        self.delete(self.part(_SUCCESS))

    def fragments(self) -> list[str]:
        """Paths of all fragments, oldest first."""
        found = storage.list_files(self.file("fragments"), self.storage_options)
        return [info.path for info in found if info.path.endswith(".parquet")]

    def parts(self) -> list[str]:
        """Paths of all part files, in manifest order."""
        found = [info.path for info in storage.list_files(self.path, self.storage_options)]
        # The whole relative path has to match: the folder may hold other runs' folders, such as the canaries'.
        parts = [path for path in found if _PART.fullmatch(self.relative(path))]
        return sorted(parts, key=lambda path: (storage.name(path), path))

    def result_files(self) -> list[str]:
        """The files that hold the run's rows: the parts of a finished run, the fragments of any other."""
        return self.parts() if self.is_finished() else self.fragments()

    def publish(self, path: str, data: bytes) -> None:
        """Put a file into the folder, whole or not at all."""
        self.guard()
        try:
            storage.publish(path, data, self.storage_options)
        except OSError as error:
            raise OutputError(
                f"can't write {path}: {error}; free or repair the storage and run the same command again"
            ) from error

    def delete(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, or a folder with everything in it."""
        self.guard()
        storage.delete(path, self.storage_options, recursive=recursive)

    def delete_fragments(self) -> None:
        """Remove the fragments once the parts hold their rows."""
        self.delete(self.file("fragments"), recursive=True)

    def sweep(self) -> None:
        """Remove temporary files of runs that were killed while writing."""
        self.guard()
        storage.sweep(self.path)


def _says_what_was_run(record: Mapping[str, Any]) -> bool:
    """Whether run.json has what tells a later run if it sees the same rows."""
    manifest = record.get("manifest")
    fingerprint = manifest.get("fingerprint") if isinstance(manifest, dict) else None
    return isinstance(fingerprint, dict) and {"format", "files"} <= fingerprint.keys()
