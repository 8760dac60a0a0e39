"""What Ray raises, as the job's error: the cause, by its own type where it is ours, without Ray's advice; what Ray is
asked for, and what an engine is given of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from ray.data import ActorPoolStrategy
from ray.exceptions import ActorDiedError, RayTaskError

from pipeline.config import ResourcesConfig
from pipeline.config_values import PoolSize
from pipeline.engine import EngineOptions
from pipeline.errors import CheckpointError, ClusterError, CredentialError
from pipeline.execution.actors import UNITS_AT_ONCE, unpack
from pipeline.execution.dataset import Flow, ManifestSource, _for_placement, _job_error, run_dataset
from pipeline.execution.placement import Node, place
from pipeline.execution.reservation import Reservation
from pipeline.generate import GenerateOptions
from pipeline.manifest.find import open_manifest
from tests.unit.manifest.manifests import cut, write_jsonl

ADVICE = (
    "Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\n"
    "To change retry attempts, backoff, or which errors are retried, configure `ray.data.DataContext.get_current()` "
    "(`retried_io_errors` for I/O) if you believe this to be transient."
)
TRACEBACK = 'Traceback (most recent call last):\n  File "stage.py", line 3, in call\n    raise it\n           ^^\n'


def as_ray_raises_it(cause: Exception, name: str) -> BaseException:
    """The exception of a task, after Ray has added its advice to it."""
    text = f"{TRACEBACK}{name}: {cause}\n{ADVICE}"
    first, *others = cause.args
    annotated = (f"{first}\n{ADVICE}", *others) if isinstance(first, str) else (first, *others, ADVICE)
    error: BaseException = RayTaskError("submit", text, type(cause)(*annotated)).as_instanceof_cause()
    return error


def test_the_cause_is_named_and_not_the_advice_about_retries() -> None:
    try:
        b"caf\xe9".decode()
    except UnicodeDecodeError as cause:
        error = _job_error(as_ray_raises_it(cause, "UnicodeDecodeError"))
    assert type(error) is ClusterError
    assert str(error).startswith("the run failed: UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9")
    full = _job_error(as_ray_raises_it(OSError(28, "No space left on device"), "OSError"))
    assert str(full).startswith("the run failed: OSError: [Errno 28] No space left on device; ")


def test_an_error_of_ours_keeps_its_type_and_message() -> None:
    error = _job_error(as_ray_raises_it(CredentialError("bucket x: the token has expired"), "CredentialError"))
    assert (type(error), str(error)) == (CredentialError, "bucket x: the token has expired")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("pipeline.errors.CheckpointError", CheckpointError, "no weights here"),
        ("ValueError", ClusterError, "the run failed: ValueError: no weights here; __run/log.txt in the run folder"),
    ],
)
def test_what_ends_an_actor_while_it_starts_is_found_in_ray_s_text(
    name: str, kind: type[Exception], message: str
) -> None:
    died = ActorDiedError(
        RayTaskError("__init__", f"{TRACEBACK}{name}: no weights here", ValueError("lost on the way"))
    )
    error = _job_error(died)
    assert type(error) is kind
    assert str(error).startswith(message)


def test_an_exception_without_words_is_named_by_its_type() -> None:
    assert "AssertionError" in str(_job_error(AssertionError()))


@pytest.mark.parametrize(("gpus", "devices", "share"), [(0.5, 1, 0.5), (1.0, 1, 1.0), (2.0, 2, 1.0)])
def test_an_engine_takes_the_share_of_a_gpu_that_the_job_reserves_for_it(
    gpus: float, devices: int, share: float
) -> None:
    stages: Any = SimpleNamespace(generate=GenerateOptions(EngineOptions("a model"), pa.schema([])))
    placement: Any = SimpleNamespace(gpus_per_engine=gpus)
    engine = _for_placement(stages, placement).engine
    assert (engine.num_devices, engine.gpu_share) == (devices, share)


def test_a_read_task_gives_the_wanted_columns_of_each_of_its_units(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {number}.", "other": "x"} for number in range(5)]
    manifest = open_manifest(str(write_jsonl(tmp_path / "m.jsonl", rows)), listing_path=str(tmp_path / "listing"))
    tasks = ManifestSource(manifest.spec, cut(manifest, 2), ["prompt"]).get_read_tasks(1)
    tables = [unpack(block) for task in tasks for block in task()]
    assert [table.column("prompt").to_pylist() for table in tables] == [
        ["Say 0.", "Say 1."], ["Say 2.", "Say 3."], ["Say 4."],
    ]  # fmt: skip
    assert all("other" not in table.column_names for table in tables)


class FakeDataset:
    """Takes note of what the stages ask Ray for, and has no rows."""

    def __init__(self) -> None:
        self.read: dict[str, Any] = {}
        self.stages: list[dict[str, Any]] = []

    def read_datasource(self, source: ManifestSource, **options: Any) -> FakeDataset:
        self.read = options
        return self

    def map_batches(self, actor: type, **options: Any) -> FakeDataset:
        self.stages.append(options)
        return self

    map_batches_internal = map_batches

    def iter_batches(self, **options: Any) -> Iterator[pa.Table]:
        return iter(())


def test_ray_is_asked_for_the_actors_that_were_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDataset()
    monkeypatch.setattr("ray.data.read_datasource", fake.read_datasource)
    nodes = [Node("a", cpus=16, gpus=2), Node("b", cpus=16, gpus=0)]
    resources = ResourcesConfig(
        preprocess_actors=PoolSize(6, 20), preprocess_cpus=1.5, engine_actors=PoolSize(2, 2), blocks_in_flight=30
    )
    placement = place(resources, nodes)
    stages: Any = SimpleNamespace(
        columns=["prompt"], preprocess=None, generate=GenerateOptions(EngineOptions("a model"), pa.schema([]))
    )
    flow = Flow(stages, Reservation(placement), block_bytes=5, rows_per_block=7)
    assert list(run_dataset(flow, SimpleNamespace(), [], None)) == []  # type: ignore[arg-type]
    preprocess, engines = fake.stages
    assert (fake.read["num_cpus"], fake.read["concurrency"]) == (0, 10)
    assert (preprocess["num_cpus"], engines["num_cpus"], engines["num_gpus"]) == (1.5, 0, 1)
    # Ray grows a pool once it has twice as many calls as its actors run; one of a fixed size only needs the next ones.
    assert preprocess["compute"] == ActorPoolStrategy(
        min_size=6,
        max_size=20,
        initial_size=placement.preprocess_actors,
        max_concurrent_calls_per_actor=UNITS_AT_ONCE,
        max_tasks_in_flight_per_actor=2 * UNITS_AT_ONCE,
        enable_true_multi_threading=True,
    )
    assert engines["compute"] == ActorPoolStrategy(
        min_size=2,
        max_size=2,
        initial_size=2,
        max_concurrent_calls_per_actor=30,
        max_tasks_in_flight_per_actor=32,
        enable_true_multi_threading=True,
    )
