"""The flow on a real Ray: a row that kills or hangs its actor is found and left out, and no other row notices."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.benchmark.fake_engine import FakeGenerateStage
from jobs.caption import main
from pipeline.engine import Completion, Request, SamplingParams
from pipeline.execution import dataset
from pipeline.execution.actors import EngineActor
from pipeline.generate import EngineThread
from pipeline.manifest import parquet
from pipeline.schema import RESULT_COLUMNS

pytestmark = pytest.mark.usefixtures("ray_with_two_cpus")


class EchoStage(FakeGenerateStage):
    """Answers each row with its id; the ids `kill` and `hang` do just that, every time."""

    def __call__(self, table: pa.Table) -> pa.Table:
        ids = table.column("id").to_pylist()
        if "kill" in ids:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        if "hang" in ids:
            time.sleep(600)
        return self.rows(table, {"text": ids})


class CountingStage(EchoStage):
    """Tells how many rows it answered."""

    answered = 0

    def __call__(self, table: pa.Table) -> pa.Table:
        self.answered += table.num_rows
        return super().__call__(table)

    def stats(self) -> dict[str, float]:
        return {"answered": float(self.answered)}


class EchoActor(EngineActor):
    """The real actor around the stage above."""

    def make_stage(self, options: Any) -> Any:
        return EchoStage(options.kept)


def run(
    tmp_path: Path, ids: list[str], monkeypatch: pytest.MonkeyPatch, *words: str, actor: type = EchoActor
) -> dict[str, dict[str, Any]]:
    monkeypatch.setattr(dataset, "ENGINE_ACTOR", actor)
    pq.write_table(pa.table({"id": ids, "prompt": ["?"] * len(ids)}), tmp_path / "m.parquet")
    output = tmp_path / "out"
    command = ["--input.path", str(tmp_path / "m.parquet"), "--output.path", str(output), "--model.path", "demo"]
    assert main([*command, "--output.report", "false", *words]) == 0
    rows = pq.read_table(output / "part-00000.parquet").to_pylist()
    assert [row["id"] for row in rows] == ids
    assert set(RESULT_COLUMNS) == set(rows[0])
    return {row["id"]: row for row in rows}


def test_a_row_that_kills_its_actor_becomes_an_error_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"row {number}" for number in range(20)] + ["kill"] + [f"row {number}" for number in range(20, 40)]
    rows = run(tmp_path, ids, monkeypatch)
    killer = rows.pop("kill")
    assert (killer["status"], killer["error_type"]) == ("error", "EngineCrash")
    assert "died 2 times with only this row in progress" in killer["error_message"]
    assert all(row["status"] == "ok" and row["text"] == name for name, row in rows.items())


class DeadDeviceEngine:
    """An engine whose CUDA context dies of the tenth row, once: the file `marker` tells the next process."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker
        self.answered = 0
        self.requests: list[Request] = []

    def add(self, request: Request) -> None:
        self.requests.append(request)

    def step(self) -> list[Completion]:
        self.answered += 1
        if self.answered == 10 and not self.marker.exists():
            self.marker.touch()
            self.answered = -1_000_000
        if not self.is_usable():
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        time.sleep(0.01)
        return [Completion(self.requests.pop(0).request_id, 0, (1,), "stop")]

    def is_usable(self) -> bool:
        return self.answered >= 0

    def describe(self) -> dict[str, Any]:
        return {}


class DeadDeviceStage(EchoStage):
    """Answers through the real engine thread."""

    def __init__(self, kept: pa.Schema, marker: Path) -> None:
        super().__init__(kept)
        self.thread = EngineThread(DeadDeviceEngine(marker))  # type: ignore[arg-type]

    def __call__(self, table: pa.Table) -> pa.Table:
        ids = np.zeros(1, dtype=np.int32)
        for future in [self.thread.submit(ids, (), SamplingParams()) for _ in range(table.num_rows)]:
            future.result()
        return super().__call__(table)


def test_a_dead_cuda_context_ends_the_actor_and_its_rows_run_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [f"row {number}" for number in range(40)]
    marker = tmp_path / "died"

    class DeadDeviceActor(EngineActor):
        def make_stage(self, options: Any) -> Any:
            return DeadDeviceStage(options.kept, marker)

    rows = run(tmp_path, ids, monkeypatch, actor=DeadDeviceActor)
    assert marker.exists()
    assert all(row["status"] == "ok" and row["text"] == name for name, row in rows.items())


@pytest.mark.slow
def test_a_row_that_hangs_is_killed_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ids = [f"row {number}" for number in range(10)] + ["hang"]
    rows = run(tmp_path, ids, monkeypatch, "--run.stall_timeout_s", "4")
    assert (rows.pop("hang")["error_type"], {row["status"] for row in rows.values()}) == ("EngineCrash", {"ok"})
    told = capfd.readouterr().out
    assert "for 4 s:" in told
    assert "engine actor" in told
    assert "killed" in told


def test_pools_that_may_grow_answer_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"row {number}" for number in range(40)]
    pools = ("--resources.preprocess_actors", "1,2", "--resources.engine_actors", "1,2")
    rows = run(tmp_path, ids, monkeypatch, *pools)
    assert all(row["status"] == "ok" and row["text"] == name for name, row in rows.items())
    placement = json.loads((tmp_path / "out" / "__run" / "run.json").read_text())["placement"]
    assert (placement["preprocess_pool"], placement["engine_pool"]) == ([1, 2], [1, 2])


def test_actors_that_reserve_every_cpu_leave_reads_none_and_need_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [f"row {number}" for number in range(40)]
    rows = run(tmp_path, ids, monkeypatch, "--resources.preprocess_cpus", "1", "--resources.engine_cpus", "1")
    assert all(row["status"] == "ok" for row in rows.values())


class CountingActor(EngineActor):
    """The real actor around the counting stage."""

    def make_stage(self, options: Any) -> Any:
        return CountingStage(options.kept)


def test_actor_stats_in_the_record_include_the_last_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"row {number}" for number in range(5)]
    run(tmp_path, ids, monkeypatch, actor=CountingActor)
    stages = json.loads((tmp_path / "out" / "__run" / "run.json").read_text())["stages"]
    assert sum(stage["rows"] for stage in stages if stage["kind"] == "preprocess") == len(ids)
    assert sum(stage["answered"] for stage in stages if stage["kind"] == "engine") == len(ids)


def test_the_units_of_a_large_row_group_come_from_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_LARGE_GROUP_BYTES", 1)
    sources: list[dataset.ManifestSource] = []
    made = dataset.ManifestSource

    def remembered(*words: Any) -> dataset.ManifestSource:
        sources.append(made(*words))
        return sources[-1]

    monkeypatch.setattr(dataset, "ManifestSource", remembered)
    ids = [f"row {number}" for number in range(60)]
    run(tmp_path, ids, monkeypatch, "--resources.max_rows_per_unit", "8")
    assert [len(bundle) for bundle in sources[0].bundles] == [8]
