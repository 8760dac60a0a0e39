"""The flow of rows on Ray Data: read, preprocess on CPU actors, generate on engine actors, back to the driver.

    ManifestSource --> PreprocessActor x n --> EngineActor x m --> tables of finished rows, as they come

Everything else in the project knows nothing of Ray. Blocks are small and many: a table of requests is handed on
once it holds `block_mb` of patches, and an engine actor has many of them under way at once.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline.generate import GenerateOptions, GenerateStage
from pipeline.manifest import ManifestSpec
from pipeline.placement import READ_CPUS, Placement
from pipeline.preprocess import PreprocessOptions, PreprocessStage
from pipeline.work import Work, read_work

# One thread for each preprocessing actor: more actors, not more threads, use more cores.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Flow:
    """A job's two stages, where they run, and what they exchange."""

    preprocess: PreprocessOptions
    generate: GenerateOptions
    placement: Placement
    columns: Sequence[str]
    """Manifest columns to read."""
    block_mb: float
    """Patches in a table between the stages, in MB."""
    blocks_in_flight: int
    """Tables inside each engine actor at once."""


class ManifestSource(Datasource):  # type: ignore[misc]
    """Ray's view of the work to do: one read task a unit, with exact row counts."""

    def __init__(self, spec: ManifestSpec, work: Sequence[Work], columns: Sequence[str]) -> None:
        super().__init__()
        self._spec, self._work, self._columns = spec, work, columns

    def get_name(self) -> str:
        return "Manifest"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        return [
            ReadTask(
                functools.partial(_read, self._spec, work, self._columns),
                BlockMetadata(num_rows=work.num_rows, size_bytes=None, input_files=None, exec_stats=None),
            )
            for work in self._work
        ]


def _read(spec: ManifestSpec, work: Work, columns: Sequence[str]) -> Iterable[pa.Table]:
    return [read_work(spec, work, columns)]


class Monitor:
    """A small actor that remembers what the stages last said of themselves."""

    def __init__(self) -> None:
        self._reports: dict[str, dict[str, Any]] = {}

    def report(self, who: str, facts: dict[str, Any]) -> None:
        """Remember an actor's latest figures."""
        self._reports[who] = facts

    def reports(self) -> dict[str, dict[str, Any]]:
        """The latest figures of every actor."""
        return self._reports


class _Reporter:
    """Tells the monitor an actor's figures every second, from a thread of its own."""

    def __init__(self, monitor: Any, kind: str) -> None:
        self._monitor = monitor
        self._who = f"{kind}-{os.getpid()}@{ray.util.get_node_ip_address()}"

    def start(self, figures: Any) -> None:
        def tell() -> None:
            while True:
                self._monitor.report.remote(self._who, figures())
                time.sleep(1.0)

        threading.Thread(target=tell, name="reporter", daemon=True).start()


class PreprocessActor:
    """`PreprocessStage` inside Ray: a block of manifest rows in, tables of requests out as they fill."""

    def __init__(self, options: PreprocessOptions, block_bytes: int, monitor: Any) -> None:
        import torch

        torch.set_num_threads(1)
        self._stage = PreprocessStage(options)
        self._block_bytes = block_bytes
        self._busy_s = 0.0
        _Reporter(monitor, "preprocess").start(lambda: {"kind": "preprocess", "busy_s": self._busy_s})

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        tables = self._stage.tables(table, self._block_bytes)
        while True:
            started = time.perf_counter()
            one = next(tables, None)
            self._busy_s += time.perf_counter() - started
            if one is None:
                return
            yield one


class EngineActor:
    """`GenerateStage` inside Ray: many threads each bring a table of requests and wait for its answers."""

    def __init__(self, options: GenerateOptions, monitor: Any) -> None:
        logging.basicConfig(level=logging.INFO)
        self._stage = GenerateStage(options)
        description = self._stage.describe()
        _Reporter(monitor, "engine").start(lambda: {"kind": "engine", "describe": description, **self._stage.stats()})

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._stage(table)


def run_flow(flow: Flow, spec: ManifestSpec, work: Sequence[Work], monitor: Any) -> Iterator[pa.Table]:
    """Start the actors and give the finished rows (schema.result_schema), table by table, in no order."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = int(flow.block_mb * 1024**2)
    place = flow.placement
    dataset = ray.data.read_datasource(
        ManifestSource(spec, work, flow.columns),
        override_num_blocks=max(1, len(work)),
        ray_remote_args={"num_cpus": READ_CPUS},
    )
    dataset = dataset.map_batches(
        PreprocessActor,
        fn_constructor_args=(flow.preprocess, context.target_max_block_size, monitor),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=place.preprocess_actors, max_tasks_in_flight_per_actor=2),
        num_cpus=place.preprocess_cpus,
        runtime_env={"env_vars": _ONE_THREAD},
    )
    generate = flow.generate
    if not place.gpus_per_engine:
        generate = replace(generate, engine=replace(generate.engine, num_threads=place.engine_threads))
    dataset = dataset.map_batches(
        EngineActor,
        fn_constructor_args=(generate, monitor),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=place.engine_actors,
            max_concurrent_calls_per_actor=flow.blocks_in_flight,
            max_tasks_in_flight_per_actor=flow.blocks_in_flight + 2,
            enable_true_multi_threading=True,
        ),
        num_cpus=place.engine_cpus,
        num_gpus=place.gpus_per_engine or None,
    )
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=4)


def start_monitor() -> Any:
    """The monitor actor of this run; it ends with the run."""
    return ray.remote(Monitor).options(num_cpus=0).remote()


def reports(monitor: Any) -> list[dict[str, Any]]:
    """What every actor last said of itself; empty when the monitor does not answer."""
    try:
        found: dict[str, dict[str, Any]] = ray.get(monitor.reports.remote(), timeout=10)
    except (ray.exceptions.RayError, TimeoutError):
        return []
    return list(found.values())


def with_ticks(tables: Iterator[pa.Table], *, seconds: float) -> Iterator[pa.Table | None]:
    """The tables, and None whenever so long has passed without one, so that the caller can look after the clock."""
    inbox: queue.Queue[Any] = queue.Queue(maxsize=8)
    end = object()

    def pull() -> None:
        try:
            for table in tables:
                inbox.put(table)
            inbox.put(end)
        except BaseException as error:
            inbox.put(error)

    threading.Thread(target=pull, name="results", daemon=True).start()
    while True:
        try:
            item = inbox.get(timeout=seconds)
        except queue.Empty:
            yield None
            continue
        if item is end:
            return
        if isinstance(item, BaseException):
            raise item
        yield item
