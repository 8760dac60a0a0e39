"""Result rows and run folders for these tests."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset

from pipeline.manifest.row_set import RowNumbering
from pipeline.results.fragments import FragmentWriter
from pipeline.results.run_folder import RunFolder
from pipeline.schema import result_schema

SCHEMA = result_schema(pa.schema([("tag", pa.string())]))


def rows(row_keys: list[tuple[int, int]], *, status: str = "ok", attempts: int = 1, text: str = "t") -> pa.Table:
    values = [
        {
            **dict.fromkeys(SCHEMA.names),
            "id": f"{file}/{row}",
            "text": text if status == "ok" else None,
            "status": status,
            "error_type": None if status == "ok" else text,
            "attempts": attempts,
            "tag": f"tag {file}/{row}",
            "manifest_file": file,
            "manifest_row": row,
        }
        for file, row in row_keys
    ]
    return pa.Table.from_pylist(values, schema=SCHEMA)


def outcomes(*error_types: str | None) -> pa.Table:
    """Finished rows of manifest file 1, one for each: answered where None, else an error of this type."""
    schema = result_schema(pa.schema([]))
    values = [
        {
            **dict.fromkeys(schema.names),
            "id": f"row {number}",
            "status": "error" if kind else "ok",
            "error_stage": "fetch" if kind else None,
            "error_type": kind,
            "error_message": f"no file für {number}" if kind else None,
            "attempts": 1,
            "manifest_file": 1,
            "manifest_row": number,
        }
        for number, kind in enumerate(error_types)
    ]
    return pa.Table.from_pylist(values, schema=schema)


def new_folder(path: Path) -> RunFolder:
    folder = RunFolder(str(path / "run"))
    folder.prepare()
    return folder


def writer(folder: RunFolder, numbering: RowNumbering, rows_per_fragment: int = 3) -> FragmentWriter:
    return FragmentWriter(folder, numbering, SCHEMA, rows_per_fragment, 60.0)
