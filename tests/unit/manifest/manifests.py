"""Manifests for these tests: small real files of every format, and their rows read back."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.manifest.files import Manifest, ManifestSpec, WorkUnit
from pipeline.manifest.formats import read_units


def cut(found: Manifest, rows_per_unit: int) -> list[WorkUnit]:
    """The whole manifest in units of so many rows."""
    return [
        found.unit(number, start, min(start + rows_per_unit, file.num_rows))
        for number, file in enumerate(found.files)
        for start in range(0, file.num_rows, rows_per_unit)
    ]


def write_parquet(path: Path, columns: Mapping[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_rows(path: Path, ids: list[str]) -> Path:
    """A manifest of rows with these ids, in the format of its name; of one size for ids of one length."""
    if path.suffix == ".parquet":
        return write_parquet(path, {"id": ids}, compression="none", use_dictionary=False)
    lines = ["id", *ids] if ".csv" in path.name else [json.dumps({"id": name}) for name in ids]
    content = "".join(f"{line}\n" for line in lines).encode()
    return write(path, gzip.compress(content, 0, mtime=0) if path.suffix == ".gz" else content)


def make_media(folder: Path) -> Path:
    for name in ("b.JPG", "a/clip.mp4", "a/photo.png", ".thumbs/x.jpg", "a/.hidden.jpg", "notes.txt", "c.webm"):
        write(folder / name, "x")
    return folder


def rows_of(
    found: Manifest, *, rows_per_unit: int = 1000, columns: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    spec = pickle.loads(pickle.dumps(found.spec))  # as a reader elsewhere gets it
    units = cut(found, rows_per_unit)
    return [row for unit in units for row in read_unit(spec, unit, columns=columns).to_pylist()]


def names_of(found: Manifest) -> list[str]:
    return [Path(file.path).name for file in found.files]


def read_unit(spec: ManifestSpec, unit: WorkUnit, *, columns: Sequence[str] | None = None) -> pa.Table:
    (table,) = read_units(spec, [unit], columns=columns)
    return table
