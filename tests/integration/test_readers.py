"""The finished folder, read by what people read Parquet with: pandas, pyarrow, DuckDB and Ray Data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pytest

from pipeline.manifest.row_set import RowNumbering
from pipeline.results.fragments import FragmentWriter
from pipeline.results.parts import finalise
from pipeline.results.run_folder import RunFolder
from pipeline.schema import MediumReceipt, result_schema

SCHEMA = result_schema(pa.schema([("tag", pa.string()), ("tags", pa.list_(pa.string()))]))
NUM_ROWS = 9
MEDIUM = MediumReceipt("image", "a.jpg", 640, 480, 644, 476, (1, 34, 46)).as_dict()


def result_rows() -> list[dict[str, Any]]:
    """Answered rows and error rows; the first part holds errors alone, so that its columns are all null."""
    rows = []
    for number in range(NUM_ROWS):
        answered = number >= 3
        row: dict[str, Any] = {
            **dict.fromkeys(SCHEMA.names),
            "id": f"row {number}",
            "status": "ok" if answered else "error",
            "attempts": 1,
            "tag": f"t{number % 2}",
            "tags": ["x", None] if answered else None,
            "manifest_file": 0,
            "manifest_row": number,
        }
        if answered:
            row |= {
                "text": f"a cat, {number} × “red”",
                "texts": ["a", "b"],
                "logprobs": [-0.5, -1.0],
                "media": [MEDIUM],
            }
        rows.append(row)
    return rows


def finished(path: Path, partition_by: str | None) -> RunFolder:
    folder = RunFolder(str(path / "run"))
    folder.prepare()
    numbering = RowNumbering([NUM_ROWS])
    writer = FragmentWriter(folder, numbering, SCHEMA, 4, 60.0)
    for row in reversed(result_rows()):
        writer.add(pa.Table.from_pylist([row], schema=SCHEMA))
    writer.flush()
    finalise(folder, numbering, SCHEMA, rows_per_part=3, partition_by=partition_by)
    return folder


def by_pandas(folder: RunFolder) -> list[dict[str, Any]]:
    frames = [pd.read_parquet(part, dtype_backend="pyarrow") for part in folder.parts()]
    rows = pa.Table.from_pandas(pd.concat(frames), preserve_index=False).to_pylist()
    return [{str(name): value for name, value in row.items()} for row in rows]


def by_pyarrow(folder: RunFolder) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.dataset.dataset(folder.parts()).to_table().to_pylist()
    return rows


def by_duckdb(folder: RunFolder) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = duckdb.read_parquet(folder.parts()).to_arrow_table().to_pylist()
    return rows


def by_ray(folder: RunFolder) -> list[dict[str, Any]]:
    import ray.data

    # A table at a time, as Ray's own rows show a null text as NaN where a whole block has none.
    tables = ray.data.read_parquet(folder.parts()).iter_batches(batch_size=None, batch_format="pyarrow")
    return [row for table in tables for row in table.to_pylist()]


@pytest.mark.usefixtures("ray_with_two_cpus")
@pytest.mark.parametrize("read", [by_pandas, by_pyarrow, by_duckdb, by_ray])
def test_every_reader_finds_the_same_rows(tmp_path: Path, read: Callable[[RunFolder], list[dict[str, Any]]]) -> None:
    found = sorted(read(finished(tmp_path, None)), key=lambda row: row["manifest_row"])
    assert found == result_rows()


@pytest.mark.usefixtures("ray_with_two_cpus")
def test_readers_find_a_partitioned_folder_s_column_again(tmp_path: Path) -> None:
    import ray.data

    folder = finished(tmp_path, "tag")
    expected = sorted((row["tag"], row["id"]) for row in result_rows())
    glob = f"{folder.path}/tag=*/part-*.parquet"
    assert duckdb.sql(
        f"select tag, id from read_parquet('{glob}', hive_partitioning = true) order by all"
    ).fetchall() == (expected)
    ids = duckdb.sql(f"select id from '{glob}' where tag = 't1' order by id").fetchall()
    assert ids == [(name,) for tag, name in expected if tag == "t1"]
    frame = pd.read_parquet(folder.path, filters=[("tag", "==", "t1")])
    assert sorted(frame["id"]) == [name for tag, name in expected if tag == "t1"]
    table = ray.data.read_parquet(folder.path, file_extensions=["parquet"]).to_pandas()
    assert sorted(zip(table["tag"], table["id"], strict=True)) == expected
