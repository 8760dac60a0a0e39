"""Sizes follow what preprocessing was measured to do: seconds of work in a table, an engine's places full."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.benchmark.stand_in import StandInStage
from jobs.caption import main
from pipeline.config import PoolSize, ResourcesConfig
from pipeline.execution import dataset as flow
from pipeline.execution.feeding import PreprocessRate, choose_sizes, enough_actors, rate_of, start_with
from pipeline.execution.placement import Node, Placement, place

MB = 1024**2


def placed(gpus: float = 1, cpus: float = 32, **resources: Any) -> Placement:
    return place(ResourcesConfig(**resources), [Node("a", cpus, gpus)])


@given(st.floats(1e-3, 1e4), st.floats(100, 500 * MB), st.integers(1, 1024), st.floats(0, 1e12))
def test_tables_are_seconds_of_work_and_keep_an_engine_s_places_full(
    rows_per_s: float, bytes_per_row: float, max_running: int, store_bytes: float
) -> None:
    resources = ResourcesConfig()
    rate = PreprocessRate(rows_per_s, bytes_per_row)
    sizes = choose_sizes(resources, placed(), rate, max_running=max_running, store_bytes=store_bytes)
    table_bytes = sizes.rows_per_block * bytes_per_row
    assert 1 <= sizes.rows_per_block <= sizes.max_rows_per_unit
    assert sizes.min_rows_per_unit <= sizes.max_rows_per_unit
    # No table takes more than two seconds, no unit more than thirty, unless a single row does.
    assert sizes.rows_per_block == 1 or sizes.rows_per_block / rows_per_s <= 2.0
    assert sizes.max_rows_per_unit == 1 or sizes.max_rows_per_unit / rows_per_s <= 30.0
    assert sizes.rows_per_block == 1 or table_bytes <= resources.block_mb * MB
    # Ray hands a usual table on as it is: it neither waits for another nor is cut.
    assert sizes.block_bytes <= max(1, table_bytes) and (
        table_bytes < 1.5 * sizes.block_bytes or table_bytes > 128 * MB
    )
    full = sizes.blocks_in_flight * sizes.rows_per_block >= 2 * max_running
    in_store = sizes.blocks_in_flight * table_bytes
    assert full or sizes.blocks_in_flight == 128 or in_store + table_bytes > store_bytes / 4
    assert sizes.blocks_in_flight == 2 or not store_bytes or in_store <= store_bytes / 4


def test_a_long_video_is_handed_on_at_once_and_short_questions_by_the_hundred() -> None:
    video = choose_sizes(ResourcesConfig(), placed(), PreprocessRate(0.2, 20 * MB), max_running=256)
    assert (video.rows_per_block, video.max_rows_per_unit, video.min_rows_per_unit) == (1, 6, 6)
    question = choose_sizes(ResourcesConfig(), placed(), PreprocessRate(3000.0, 1000), max_running=256)
    assert (question.rows_per_block, question.max_rows_per_unit, question.blocks_in_flight) == (256, 1024, 4)


def test_what_the_config_states_is_left_as_it_is_and_nothing_is_guessed_without_a_rate() -> None:
    stated = ResourcesConfig(max_rows_per_unit=64, min_rows_per_unit=16, blocks_in_flight=5)
    sizes = choose_sizes(stated, placed(), PreprocessRate(0.1, 0), max_running=256)
    assert (sizes.max_rows_per_unit, sizes.min_rows_per_unit, sizes.blocks_in_flight) == (64, 16, 5)
    sizes = choose_sizes(ResourcesConfig(), placed(), None, max_running=256)
    assert (sizes.min_rows_per_unit, sizes.max_rows_per_unit, sizes.blocks_in_flight) == (8, 256, 32)
    assert sizes.block_bytes == 128 * MB


def stages(rows: int, busy_s: float, idle_s: float) -> list[dict[str, Any]]:
    half = {"kind": "preprocess", "rows": rows / 2, "busy_s": 10.0, "bytes": rows / 2 * MB}
    return [half, half, {"kind": "engine", "busy_s": busy_s, "idle_s": idle_s, "unfilled_s": 0.0}]


def record(placement: Placement, told: list[dict[str, Any]], rows_per_s: float) -> dict[str, Any]:
    return json.loads(
        json.dumps({"placement": vars(placement), "stages": told, "throughput": {"rows_per_s": rows_per_s}})
    )


def test_a_run_s_own_figures_give_its_rate_and_the_actors_that_are_enough() -> None:
    assert rate_of(stages(1000, 100.0, 0.0)) == PreprocessRate(50.0, MB)
    assert rate_of(stages(100, 100.0, 0.0)) is None  # too few rows to judge by
    one, eight = placed(), placed(gpus=8, cpus=128)
    assert enough_actors(record(one, stages(1000, 100.0, 1.0), 60.0), one) == 2
    assert enough_actors(record(one, stages(1000, 100.0, 1.0), 60.0), eight) == 15  # as much for each of its engines
    assert enough_actors(record(one, stages(1000, 80.0, 20.0), 60.0), one) is None  # the engine waited
    assert enough_actors(record(one, stages(1000, 100.0, 1.0), 60.0), placed(gpus=0)) is None  # another kind of engine
    assert enough_actors({}, one) is None


def test_fewer_actors_start_where_fewer_were_enough_and_the_pool_may_grow_to_what_fits() -> None:
    full = placed()
    start = start_with(ResourcesConfig(), full, 2)
    assert (start.preprocess_actors, start.preprocess_pool) == (2, (2, full.preprocess_actors))
    assert start_with(ResourcesConfig(), full, None) == start_with(ResourcesConfig(), full, 99) == full
    stated = {"preprocess_actors": PoolSize(4, 4)}
    assert start_with(ResourcesConfig(**stated), placed(**stated), 2) == placed(**stated)
    ranged = {"preprocess_actors": PoolSize(3, 9)}
    start = start_with(ResourcesConfig(**ranged), placed(**ranged), 2)
    assert (start.preprocess_actors, start.preprocess_pool) == (3, (3, 9))


class CountingStage(StandInStage):
    """Answers each row with the number of rows of its table."""

    def __call__(self, table: pa.Table) -> pa.Table:
        time.sleep(0.1)
        return self.rows(table, {"text": [str(table.num_rows)] * table.num_rows})

    def stats(self) -> dict[str, float]:
        return {"busy_s": 100.0, "idle_s": 0.0, "unfilled_s": 0.0}


class CountingActor(flow.EngineActor):
    """The real actor around the stage above."""

    def make_stage(self, options: Any) -> Any:
        return CountingStage(options.kept)


def caption(manifest: Path, output: Path, *more: str) -> tuple[dict[str, Any], list[int]]:
    words = {"input.path": str(manifest), "output.path": str(output), "model.path": "demo", "output.report": "false"}
    assert main([*[word for name, value in words.items() for word in (f"--{name}", value)], *more]) == 0
    told = json.loads((output / "run.json").read_text())
    rows = [row for part in sorted(output.glob("part-*")) for row in pq.read_table(part).to_pylist()]
    return told, [int(row["text"] or 0) for row in rows]


@pytest.mark.usefixtures("ray_with_two_cpus")
def test_a_large_job_hands_on_tables_of_measured_size_and_a_later_run_of_its_folder_goes_by_the_first(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flow, "ENGINE_ACTOR", CountingActor)
    monkeypatch.setattr("jobs.caption._MEASURED_FROM_ROWS", 200)
    # Tables of a fraction of the usual time, so that a few hundred small pictures make many of them.
    monkeypatch.setattr("pipeline.execution.feeding._BLOCK_S", 0.05)
    folder, output = tmp_path / "rows", tmp_path / "out"
    folder.mkdir()
    picture = (photos / "rocket.jpg").read_bytes()
    pq.write_table(pa.table({"image": [picture] * 600, "prompt": ["?"] * 600}), folder / "a.parquet")
    told, tables = caption(folder, output)
    sizes = told["sizes"]
    assert sizes["rate"]["measured"] == "on a few rows"
    assert sizes["rows_per_block"] == min(int(0.05 * sizes["rate"]["rows_per_s"]), sizes["max_rows_per_unit"])
    assert len(tables) == 600
    # Units are of 150 rows at first; the engine is given tables of the size that was chosen, or a unit's rest.
    assert sizes["rows_per_block"] < 100
    assert sizes["rows_per_block"] in tables
    assert max(tables) <= 1.5 * sizes["rows_per_block"] + 1
    assert "measured on a few rows" in capfd.readouterr().out
    preprocessed = [stage for stage in told["stages"] if stage["kind"] == "preprocess"]
    assert 200 <= sum(stage["rows"] for stage in preprocessed) <= 600  # actors tell once a second, not at their end
    # Now the folder's own run has told more than a few rows could.
    pq.write_table(pa.table({"image": [picture], "prompt": ["One more?"]}), folder / "b.parquet")
    monkeypatch.setattr("pipeline.execution.measure.measure", lambda *_: pytest.fail("measured again"))
    told, tables = caption(folder, output, "--run.on_change", "new-rows")
    assert (told["sizes"]["rate"]["measured"], len(tables)) == ("in the last run", 601)


@pytest.mark.usefixtures("ray_with_two_cpus")
def test_rows_that_kill_what_measures_them_leave_the_sizes_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> Any:
        os._exit(1)

    monkeypatch.setattr(flow, "ENGINE_ACTOR", CountingActor)
    monkeypatch.setattr("pipeline.execution.measure._measure", die)
    manifest = tmp_path / "m.parquet"
    pq.write_table(pa.table({"prompt": ["?"] * 1000}), manifest)
    told, tables = caption(manifest, tmp_path / "out")
    assert (told["sizes"]["rate"], told["sizes"]["rows_per_block"], len(tables)) == (None, 256, 1000)
