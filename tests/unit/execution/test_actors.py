"""The preprocessing actor without Ray: units beside each other, rows in progress, and units that run again."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from pipeline.errors import CheckpointError
from pipeline.execution.actors import EngineActor, PreprocessActor, pack, unpack
from pipeline.execution.supervision import ReadWriteLock, RowKey, Supervisor
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW, UnitColumn


class FakeReporter:
    """Notes which rows are in progress; row 9 is a suspect."""

    def __init__(self, supervisor: Supervisor | None = None) -> None:
        self.in_progress: set[RowKey] = set()
        self.supervisor = supervisor or Supervisor()
        self.hand_over, self.handed_over = self.supervisor.hand_over, self.supervisor.handed_over

    def begin(self, rows: Sequence[RowKey]) -> dict[RowKey, int]:
        suspects = {row: 0 for row in rows if row[1] == 9}
        self.in_progress.update(set(rows) - set(suspects))
        return suspects

    def begin_alone(self, row: RowKey) -> None:
        self.in_progress.add(row)

    def end(self, rows: Sequence[RowKey]) -> None:
        self.in_progress.difference_update(rows)


class FakeStage:
    """Hands over tables of two rows, in the order that it is told. Notes how many rows are in progress meanwhile."""

    def __init__(self, reporter: FakeReporter, order: Callable[[list[int]], list[int]] = list) -> None:
        self.reporter, self.order = reporter, order
        self.num_in_progress: list[int] = []

    def __call__(self, table: pa.Table) -> pa.Table:
        self.num_in_progress.append(len(self.reporter.in_progress))
        columns = {UnitColumn.FILE.value: MANIFEST_FILE, UnitColumn.ROW.value: MANIFEST_ROW}
        return table.rename_columns([columns.get(name, name) for name in table.column_names])

    def tables(
        self, table: pa.Table, max_bytes: int, max_rows: int, *, when_begun: Callable[[], object]
    ) -> Iterator[pa.Table]:
        when_begun()
        places = self.order(list(range(table.num_rows)))
        for start in range(0, len(places), 2):
            yield self(table.take(places[start : start + 2]))


def actor(reporter: FakeReporter, stage: FakeStage) -> PreprocessActor:
    made = PreprocessActor.__new__(PreprocessActor)
    made.__dict__.update(_reporter=reporter, _stage=stage, _max_bytes=1, _max_rows=2, _stats=Counter())
    made.__dict__.update(_turn=threading.Lock(), _lock=ReadWriteLock())
    return made


def unit(rows: Sequence[int]) -> pa.Table:
    columns = {UnitColumn.FILE.value: [0] * len(rows), UnitColumn.ROW.value: list(rows), "patches": [b"12"] * len(rows)}
    return pack(pa.table(columns))


def rows_of(block: pa.Table) -> list[int]:
    return list(unpack(block).column(MANIFEST_ROW).to_pylist())


def test_no_row_is_in_progress_while_a_table_waits_to_be_taken() -> None:
    reporter = FakeReporter()
    stage = FakeStage(reporter)
    taken = []
    for block in actor(reporter, stage)(unit([0, 1, 2, 3, 4, 9])):
        assert reporter.in_progress == set()
        taken += rows_of(block)
    assert taken == [0, 1, 2, 3, 4, 9]
    assert stage.num_in_progress == [5, 3, 1, 1]


@pytest.mark.parametrize("num_taken", [0, 1, 2, 3, 4])
def test_a_unit_that_runs_again_hands_over_the_same_tables_first_whatever_the_time_does(num_taken: int) -> None:
    supervisor = Supervisor()
    reporter = FakeReporter(supervisor)
    first = actor(reporter, FakeStage(reporter, order=lambda places: places[::-1]))(unit(range(20, 28)))
    before = [rows_of(next(first)) for _ in range(num_taken)]
    first.close()  # its actor died; Ray has these tables, and will skip as many of the next actor's

    reporter = FakeReporter(supervisor)
    again = [rows_of(block) for block in actor(reporter, FakeStage(reporter))(unit(range(20, 28)))]
    assert [sorted(rows) for rows in again[:num_taken]] == [sorted(rows) for rows in before]
    assert sorted(row for rows in again for row in rows) == list(range(20, 28))


def test_the_next_unit_does_not_wait_for_the_slow_rows_of_the_one_before() -> None:
    reporter, released, begun = FakeReporter(), threading.Event(), []

    class SlowStage(FakeStage):
        def tables(
            self, table: pa.Table, max_bytes: int, max_rows: int, *, when_begun: Callable[[], object]
        ) -> Iterator[pa.Table]:
            begun.append(len(begun))
            if len(begun) == 1:
                when_begun()
                assert released.wait(30)
            yield from super().tables(table, max_bytes, max_rows, when_begun=when_begun)

    made = actor(reporter, SlowStage(reporter))
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(lambda: [rows_of(block) for block in made(unit([0, 1]))])
        while not begun:
            pass
        assert [rows_of(block) for block in made(unit([4, 5]))] == [[4, 5]]
        assert not slow.done()
        released.set()
        assert slow.result() == [[0, 1]]


def test_units_begin_one_after_the_other() -> None:
    reporter, at_once, most = FakeReporter(), [0], [0]

    class CountingStage(FakeStage):
        def tables(
            self, table: pa.Table, max_bytes: int, max_rows: int, *, when_begun: Callable[[], object]
        ) -> Iterator[pa.Table]:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
            yield self(table)
            at_once[0] -= 1
            when_begun()

    made = actor(reporter, CountingStage(reporter))
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda row: [rows_of(block) for block in made(unit([row]))], [0, 10, 20, 30]))
    assert taken == [[[0]], [[10]], [[20]], [[30]]] and most == [1]


def test_a_table_of_any_columns_travels_as_one_row() -> None:
    table = pa.table(
        {
            "text": pa.chunked_array([["a", None], [], ["c"]], pa.string()),
            "list": pa.array([[1], None, [2, 3]], pa.large_list(pa.int32())),
            "struct": pa.array([{"x": 1}, None, {"x": None}]),
            "word": pa.array(["x", "y", "x"]).dictionary_encode(),
            "null": pa.nulls(3),
        }
    )
    for part in (table, table.slice(1, 2), table.slice(3)):
        block = pack(part)
        assert block.num_rows == 1
        assert unpack(block).equals(part.combine_chunks()) and unpack(block).schema.equals(table.schema)
    patches = pa.table({"patches": pa.array([b"x" * 100] * 3, pa.large_binary())})
    there = unpack(pack(patches)).column("patches").chunk(0).buffers()[2]
    assert there.address == patches.column("patches").chunk(0).buffers()[2].address, "patches are not copied"


def test_the_supervisor_keeps_a_unit_s_tables_in_order() -> None:
    supervisor = Supervisor()

    def rows(*numbers: int) -> npt.NDArray[np.int64]:
        return np.array(numbers, np.int64)

    assert supervisor.handed_over((1, 5_000_000_000)) == []
    supervisor.hand_over((1, 5_000_000_000), rows(5_000_000_003, 5_000_000_001))
    supervisor.hand_over((1, 5_000_000_000), rows(5_000_000_000))
    found = [list(numbers) for numbers in supervisor.handed_over((1, 5_000_000_000))]
    assert found == [[5_000_000_003, 5_000_000_001], [5_000_000_000]]


def test_an_engine_that_picks_another_dtype_than_the_first_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = Supervisor()
    reporter = SimpleNamespace(first_dtype=supervisor.first_dtype, send=lambda: None)
    monkeypatch.setattr("pipeline.execution.actors.ActorReporter", lambda *args: reporter)

    def start(**description: Any) -> None:
        stage: Any = SimpleNamespace(describe=lambda: description)
        EngineActor.__init__(SimpleNamespace(make_stage=lambda options: stage), Any, None)  # type: ignore[arg-type]

    start(kind="fake")
    start(dtype="bfloat16", gpu="A100")
    start(dtype="bfloat16", gpu=None)
    with pytest.raises(CheckpointError, match=r"^an engine on T4 would compute in float16 \(older\).*in bfloat16: set"):
        start(dtype="float16", gpu="T4", dtype_reason="older")
