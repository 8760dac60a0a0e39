"""The finished folder, read by what people read Parquet with, given its path alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import duckdb
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from pipeline.manifest.row_set import RowNumbering
from pipeline.results.fragments import FragmentWriter
from pipeline.results.parts import finalise
from pipeline.results.run_folder import REPORT_FILE, RunFolder
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
    """A finished folder with everything that a run leaves beside its parts."""
    folder = RunFolder(str(path / "run"))
    folder.prepare()
    numbering = RowNumbering([NUM_ROWS])
    writer = FragmentWriter(folder, numbering, SCHEMA, 4, 60.0)
    for row in reversed(result_rows()):
        writer.add(pa.Table.from_pylist([row], schema=SCHEMA))
    writer.flush()
    finalise(folder, numbering, SCHEMA, rows_per_part=3, partition_by=partition_by)
    folder.write_run({"state": "finished"})
    for name in ("manifest.parquet", "scores.parquet", "canaries/part-00000.parquet"):
        Path(folder.file(name)).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"uri": ["a.jpg"]}), folder.file(name))
    for path in (folder.file("errors.jsonl"), folder.file("log.txt"), folder.part(REPORT_FILE)):
        Path(path).write_text("{}\n")
    return folder


def by_pandas(path: str) -> list[dict[str, Any]]:
    table = pa.Table.from_pandas(pd.read_parquet(path, dtype_backend="pyarrow"), preserve_index=False)
    return [{str(name): value for name, value in row.items()} for row in table.to_pylist()]


def by_pyarrow(path: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.dataset.dataset(path).to_table().to_pylist()
    return rows


def by_duckdb(path: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = duckdb.read_parquet(f"{path}/*.parquet").to_arrow_table().to_pylist()
    return rows


def by_polars(path: str) -> list[dict[str, Any]]:
    return polars.scan_parquet(f"{path}/*.parquet").collect().to_dicts()


def by_datasets(path: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as cache:
        found = datasets.load_dataset(path, cache_dir=cache)
        rows: list[dict[str, Any]] = found["train"].data.table.to_pylist()
        return rows


def by_ray(path: str) -> list[dict[str, Any]]:
    import ray.data

    # A table at a time, as Ray's own rows show a null text as NaN where a whole block has none.
    tables = ray.data.read_parquet(path).iter_batches(batch_size=None, batch_format="pyarrow")
    return [row for table in tables for row in table.to_pylist()]


@pytest.mark.usefixtures("ray_with_two_cpus")
@pytest.mark.parametrize("read", [by_pandas, by_pyarrow, by_duckdb, by_polars, by_datasets, by_ray])
def test_every_reader_finds_the_same_rows(tmp_path: Path, read: Callable[[str], list[dict[str, Any]]]) -> None:
    found = sorted(read(finished(tmp_path, None).path), key=lambda row: row["manifest_row"])
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
    frame = polars.scan_parquet(glob, hive_partitioning=True).collect().sort("tag", "id")
    assert list(zip(frame["tag"], frame["id"], strict=True)) == expected
    table = ray.data.read_parquet(folder.path).to_pandas()
    assert sorted(zip(table["tag"], table["id"], strict=True)) == expected
