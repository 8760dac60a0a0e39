"""Two nodes on one machine: the loss of one costs no row, and each stage runs where it belongs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.caption import main
from pipeline.demo.manifest import write_demo_world
from pipeline.execution.cluster import live_nodes
from tests.ray_start import started

ROOT = Path(__file__).resolve().parents[2]
QUICK_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 10000,
    "health_check_failure_threshold": 6,
}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A cluster whose head, where the job runs, has two CPUs; a test adds nodes."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # the Ray that other tests share: a process joins one cluster only
    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": QUICK_HEALTH_CHECKS}
    cluster = started(lambda: Cluster(initialize_head=True, head_node_args=head))
    # Joined before there are other nodes: on one machine the driver could end up on any of them.
    ray.init(address=cluster.address, configure_logging=False, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def lose_once_rows_are_done(cluster: Any, node: Any, output: Path) -> threading.Thread:
    def lose() -> None:
        deadline = time.monotonic() + 250
        while not list((output / "__run" / "fragments").glob("*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("fits", [True, False], ids=["there-is-room-for-all", "the-rest-is-too-small"])
def test_a_lost_node_costs_no_row(tmp_path: Path, cluster: Any, fits: bool) -> None:
    """Where everything fits on what is left, Ray recovers by itself; where it does not, the command starts again."""
    # In one case all four actors fit the head alone; in the other one stage fills it, and the other, which was lost,
    # has no place to come back to.
    cpus = (
        {"preprocess_cpus": "0.4", "engine_cpus": "0.4"} if fits else {"preprocess_cpus": "0.9", "engine_cpus": "1.9"}
    )
    node = cluster.add_node(num_cpus=2)
    ids = [f"row {number}" for number in range(300)]
    pq.write_table(pa.table({"id": ids, "prompt": ["?"] * len(ids)}), tmp_path / "m.parquet")
    output = tmp_path / "out"
    loss = lose_once_rows_are_done(cluster, node, output)
    words = {
        "input.path": str(tmp_path / "m.parquet"),
        "output.path": str(output),
        "output.seconds_per_fragment": "0.5",
        "output.report": "false",
        "model.path": "demo",
        "resources.address": cluster.address,
        "resources.engine_actors": "2" if fits else "1",
        "resources.preprocess_actors": "2" if fits else "1",
        "resources.blocks_in_flight": "2",
        "resources.min_rows_per_unit": "4",
        "resources.max_rows_per_unit": "8",
        "run.node_loss_timeout_s": "250" if fits else "10",  # on a busy machine also rows that will come take long
        **{f"resources.{name}": value for name, value in cpus.items()},
    }
    command = [sys.executable, "-m", "tests.faults.slow_job"]
    command += [word for key, value in words.items() for word in (f"--{key}", value)]
    job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=560)
    assert job.returncode == 0, job.stdout + job.stderr + (output / "__run" / "log.txt").read_text()
    loss.join(30)
    rows = pq.read_table(output / "part-00000.parquet").to_pylist()
    assert [row["id"] for row in rows] == ids
    assert all(row["status"] == "ok" and row["text"] == row["id"] for row in rows)
    record = json.loads((output / "__run" / "run.json").read_text())
    assert (record["counts"]["rows"], record["counts"]["done"], record["counts"]["failed"]) == (300, 300, 0)
    assert record["num_runs"] == (1 if fits else 2)
    if not fits:
        assert "1 of the cluster's 2 nodes were lost" in job.stderr
        assert "it starts again now" in job.stderr
        assert record["placement"]["engine_cpus"] < 1.9, "the record has the placement of the second run"


@pytest.mark.slow
def test_a_cpu_node_s_preprocessing_feeds_the_engine_on_another_node(tmp_path: Path, cluster: Any) -> None:
    """The second node says that it has a GPU and has one CPU, which is left to the engine; so all else runs here."""
    import ray

    cluster.add_node(num_cpus=1, num_gpus=1)
    here = ray.get_runtime_context().get_node_id()
    (there,) = [node.node_id for node in live_nodes() if node.gpus]
    write_demo_world(tmp_path / "world", rows_per_task=3)
    output = tmp_path / "out"
    words = {
        "config": "configs/demo.yaml",
        "input.path": str(tmp_path / "world"),
        "output.path": str(output),
        "model.device": "cpu",  # the GPU is a number in Ray's book only
    }
    assert main([word for key, value in words.items() for word in (f"--{key}", value)]) == 0
    rows = pq.read_table(output / "part-00000.parquet").to_pylist()
    assert len(rows) == 21
    assert {row["status"] for row in rows} == {"ok"}
    record = json.loads((output / "__run" / "run.json").read_text())
    assert record["placement"]["first_nodes"] == [there]
    where = {(stage["kind"], stage["node"]) for stage in record["stages"]}
    assert where == {("preprocess", here), ("engine", there)}
