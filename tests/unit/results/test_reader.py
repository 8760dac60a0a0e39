"""Reading a run folder back: parts, partitioned parts and overlapping fragments give the same rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import OutputError
from pipeline.manifest.row_set import RowNumbering
from pipeline.results.fragments import FragmentWriter
from pipeline.results.parts import finalise
from pipeline.results.reader import RunReader, count_errors, row_key
from pipeline.results.run_folder import RunFolder
from pipeline.schema import result_schema
from tests.unit.report.runs import error_row, result_row, write_run

LEVEL = pa.field("level", pa.int16())
KEPT = pa.schema([("task", pa.string()), LEVEL])


def rows(num_rows: int = 12) -> list[dict[str, Any]]:
    levels = [3, None, -1]
    made = [result_row(number, level=levels[number % 3]) for number in range(num_rows)]
    made[4] = error_row(4, "FetchTimeout", "fetch", "late") | {"level": None}
    return made


def run_folder(path: Path, partition_by: str | None, *, finished: bool = True) -> RunReader:
    """A run written as a job writes it: fragments out of order, and parts of five rows."""
    schema = result_schema(KEPT)
    folder, numbering = RunFolder(str(path)), RowNumbering([12])
    folder.prepare()
    writer = FragmentWriter(folder, numbering, schema, 4, 60.0)
    for row in reversed(rows()):
        writer.add(pa.Table.from_pylist([row], schema=schema))
    writer.flush()
    if finished:
        finalise(folder, numbering, schema, rows_per_part=5, partition_by=partition_by)
    folder.write_run({"state": "finished"})
    return RunReader(str(path))


@pytest.mark.parametrize("partition_by", [None, "task", "level"])
def test_a_partitioned_run_has_all_its_columns_in_the_types_they_were_kept_with(
    tmp_path: Path, partition_by: str | None
) -> None:
    reader = run_folder(tmp_path / "run", partition_by)
    assert set(reader.columns) == set(result_schema(KEPT).names)
    table = pa.Table.from_batches(reader.batches(["id", "task", "level", "manifest_row"]))
    assert table.schema.field("level").equals(LEVEL) and table.schema.field("task").type == pa.string()
    expected = {row["manifest_row"]: (row["task"], row["level"]) for row in rows()}
    found = {row["manifest_row"]: (row["task"], row["level"]) for row in table.to_pylist()}
    assert found == expected
    numbers = reader.find([row_key(0, 7), row_key(0, 1), row_key(3, 0)])
    fetched = reader.fetch(numbers.values())
    assert {key: fetched[number]["level"] for key, number in numbers.items()} == {
        row_key(0, 7): None,
        row_key(0, 1): None,
    }
    assert fetched[numbers[row_key(0, 7)]]["task"] == rows()[7]["task"]
    assert count_errors(RunFolder(reader.path)) == Counter(FetchTimeout=1)


@pytest.mark.parametrize("partition_by", [None, "level"])
def test_columns_may_be_read_without_the_one_that_the_folders_are_named_by(
    tmp_path: Path, partition_by: str | None
) -> None:
    reader = run_folder(tmp_path / "run", partition_by)
    assert {tuple(batch.schema.names) for batch in reader.batches(["text", "unknown"])} == {("text",)}
    assert all("level" in batch.schema.names for batch in reader.batches(["text", "level"]))


def test_the_first_batches_are_of_each_partition_and_of_a_run_without_any_its_beginning(tmp_path: Path) -> None:
    tasks = {name: run_folder(tmp_path / str(name), name) for name in (None, "task")}
    first = {name: [batch.column("task").to_pylist() for batch in one.first_batches()] for name, one in tasks.items()}
    assert len(first[None]) == 1 and len(first["task"]) > 1
    assert sorted({task for batch in first["task"] for task in batch}) == sorted({row["task"] for row in rows()})
    assert all(len(set(batch)) == 1 for batch in first["task"])


def test_rows_keep_their_number_whether_read_or_fetched(tmp_path: Path) -> None:
    for name, finished in (("parts", True), ("fragments", False)):
        reader = run_folder(tmp_path / name, "task", finished=finished)
        ids = [name for batch in reader.batches(["id"]) for name in batch.column("id").to_pylist()]
        assert reader.num_rows == len(ids) == 12
        assert {number: row["id"] for number, row in reader.fetch(range(12)).items()} == dict(enumerate(ids))


def test_a_row_in_several_fragments_is_read_and_fetched_once(tmp_path: Path) -> None:
    again = [result_row(2, text="second", attempts=2), error_row(3, "FetchTimeout", "fetch", "late")]
    first = [result_row(0), result_row(1), error_row(2, "MediaTimeout", "decode", "early"), result_row(3)]
    failed = [
        error_row(4, "FetchTimeout", "fetch", "old"),
        error_row(4, "MediaTimeout", "decode", "new") | {"attempts": 3},
    ]
    reader = RunReader(str(write_run(tmp_path / "run", [*first, *again, *failed], finished=False)))
    found = [row for batch in reader.batches() for row in batch.to_pylist()]
    assert {row["manifest_row"]: row["text"] for row in found} == {
        0: "answer 0", 1: "answer 1", 2: "second", 3: "answer 3", 4: None,
    }  # fmt: skip
    assert reader.num_rows == 5
    assert [reader.fetch({number})[number]["id"] for number in range(5)] == [row["id"] for row in found]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"not a run folder.*part-\*"):
        RunReader(str(tmp_path))
    (tmp_path / "__run").mkdir()
    (tmp_path / "__run" / "run.json").write_text("[]")
    with pytest.raises(OutputError, match="holds a list; expected an object"):
        RunReader(str(tmp_path))


def test_fetched_rows_leave_out_whole_files_wherever_they_are_inside_a_value(tmp_path: Path) -> None:
    file = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
    kept = pa.schema([("image", pa.binary()), ("images", pa.list_(file)), ("tags", pa.list_(pa.string()))])
    folder, schema = RunFolder(str(tmp_path / "run")), result_schema(kept)
    folder.prepare()
    row = result_row(0) | {"image": b"x", "images": [{"bytes": b"x", "path": "a"}], "tags": ["new"]}
    writer = FragmentWriter(folder, RowNumbering([1]), schema, 4, 60.0)
    writer.add(pa.Table.from_pylist([row], schema=schema))
    writer.flush()
    folder.write_run({"state": "interrupted"})
    (fetched,) = RunReader(folder.path).fetch([0]).values()
    assert fetched["tags"] == ["new"] and not {"image", "images", "logprobs"} & set(fetched)
