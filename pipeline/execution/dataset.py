"""The rows on Ray Data: read, preprocess in CPU actors, generate in engine actors, back to the driver.

    ManifestSource --> PreprocessActor x n --> EngineActor x m --> tables of finished rows, in no order

Tables of requests travel between the stages once they hold `resources.block_mb` of patches or so many rows; an engine
actor has many of them inside at once. Ray Data schedules, retries lost tasks, restarts dead actors, applies
backpressure and scales the pools that the config gives a range (`resources.preprocess_actors: 2,16`).
Knows Ray Data; not what a stage does, nor what becomes of finished rows.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import queue
import re
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline import errors
from pipeline.errors import ClusterError, JobError
from pipeline.execution.actors import UNITS_AT_ONCE, EngineActor, PreprocessActor, pack, unpack
from pipeline.execution.placement import Placement
from pipeline.execution.reservation import Reservation
from pipeline.execution.stages import Stages
from pipeline.generate import GenerateOptions
from pipeline.manifest.files import ManifestSpec, WorkUnit
from pipeline.manifest.work import bundles, read_works

PREPROCESS_ACTOR: type = PreprocessActor
ENGINE_ACTOR: type = EngineActor
"""The actors' classes; tests and benchmarks replace them by ones without a model."""
# More preprocessing actors, not more threads in each, use more cores.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


_RETRY_ADVICE = re.compile(
    r"(: ')?(\n|\\n)?Failed to [^\n]*? attempts \(total backoff.*?believe this to be transient\.(?(1)')", re.DOTALL
)
"""What Ray adds to an exception's first text, or as a further argument, which an OSError shows as its file."""
_RAISED = re.compile(r"(?:[\w.]+\.)?(\w+): (.*)")
"""The line of a traceback that names the exception."""


@dataclass(frozen=True)
class Flow:
    """A job's stages, where they run, and what they exchange."""

    stages: Stages
    reservation: Reservation
    block_bytes: int
    """Bytes of patches from which a table of requests is handed on."""
    rows_per_block: int
    """Most rows in such a table."""
    profile_steps: int | None = None
    """Engine steps to trace in each engine actor."""


class ManifestSource(Datasource):  # type: ignore[misc]
    """Ray's view of the work to do: one read task for each unit, or for the units of a large row group."""

    def __init__(self, spec: ManifestSpec, work: Sequence[WorkUnit], columns: Sequence[str]) -> None:
        super().__init__()
        self._spec, self._columns = spec, columns
        self.bundles = bundles(work)

    def get_name(self) -> str:
        return "Manifest"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        return [
            ReadTask(
                functools.partial(_read, self._spec, units, self._columns),
                BlockMetadata(num_rows=len(units), size_bytes=None, input_files=None, exec_stats=None),
            )
            for units in self.bundles
        ]


def _read(spec: ManifestSpec, units: Sequence[WorkUnit], columns: Sequence[str]) -> Iterable[pa.Table]:
    return map(pack, read_works(spec, units, columns))


def run_dataset(flow: Flow, spec: ManifestSpec, work: Sequence[WorkUnit], supervisor: Any) -> Iterator[pa.Table]:
    """Start the actors and yield the finished rows (schema.result_schema), in no order. Raises JobError."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # else what an actor raises arrives as Ray's own exception, as text
    # Ray merges what a task hands over until it exceeds this size, and cuts blocks of more rows than one that exceed it
    # by half. Tables travel as one row each (`actors.pack`): they are never cut, and none waits for the next.
    context.target_max_block_size = 1
    stages, placement = flow.stages, flow.reservation.placement
    source = ManifestSource(spec, work, stages.columns)
    dataset = ray.data.read_datasource(
        source,
        override_num_blocks=max(1, len(source.bundles)),
        num_cpus=0,  # reads mostly wait, and no other job's actors can keep them waiting
        # A unit keeps an actor busy for long, and each reader is a process of its own to start.
        concurrency=max(1, placement.preprocess_pool[1] // 2),
    )
    dataset = dataset.map_batches(
        PREPROCESS_ACTOR,
        fn_constructor_args=(stages.preprocess, flow.block_bytes, flow.rows_per_block, supervisor),
        batch_size=None,
        batch_format="pyarrow",
        compute=_pool(placement.preprocess_pool, placement.preprocess_actors, UNITS_AT_ONCE, spare=0),
        num_cpus=placement.preprocess_cpus,
        ray_remote_args_fn=flow.reservation.preprocessing().options,
        runtime_env={"env_vars": _ONE_THREAD},
    )
    # map_batches itself refuses whole tables (batch_size None) with GPUs; this is the same without that check.
    dataset = dataset.map_batches_internal(
        ENGINE_ACTOR,
        fn_constructor_args=(_for_placement(stages, placement), supervisor, flow.profile_steps),
        batch_size=None,
        batch_format="pyarrow",
        compute=_pool(placement.engine_pool, placement.engine_actors, placement.blocks_in_flight, spare=2),
        num_cpus=placement.engine_reserved_cpus,
        num_gpus=placement.gpus_per_engine or None,
        ray_remote_args_fn=flow.reservation.engines().options,
    )
    try:
        yield from map(unpack, dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=4))
    except Exception as error:
        raise _job_error(error) from error


def _pool(size: tuple[int, int], start: int, calls: int, *, spare: int) -> ActorPoolStrategy:
    """Actors that each run so many calls at once, with `spare` more waiting at each actor of a pool of one size. Ray
    grows a pool once twice as many wait as run."""
    return ActorPoolStrategy(
        min_size=size[0],
        max_size=size[1],
        initial_size=start,
        max_concurrent_calls_per_actor=calls,
        max_tasks_in_flight_per_actor=calls + (spare if size[0] == size[1] else calls),
        enable_true_multi_threading=True,
    )


def _for_placement(stages: Stages, placement: Placement) -> GenerateOptions:
    """The engine stage's options for the devices or threads that each engine gets."""
    engine = stages.generate.engine
    if placement.gpus_per_engine:
        gpus = placement.gpus_per_engine
        engine = replace(engine, num_devices=max(1, int(gpus)), gpu_share=min(1.0, gpus))
    else:
        engine = replace(engine, num_threads=placement.engine_threads)
    return replace(stages.generate, engine=engine)


def _job_error(error: BaseException) -> JobError:
    """What Ray raised, as one line: our own error where an actor raised one, else the innermost cause."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = getattr(cause, "cause", None) or cause.__cause__
    raised = [link for link in chain if str(link).strip()] or [error]
    innermost = next((link for link in reversed(raised) if isinstance(link, JobError)), raised[-1])
    lines = _RETRY_ADVICE.sub("", str(innermost)).splitlines()
    name, message = type(innermost).__name__, (next(filter(str.strip, lines), "") or "no message").strip()
    # What ended an actor while it started, and some exceptions of tasks, are there as the text of a traceback only.
    for before, line in itertools.pairwise(lines):
        if before.startswith(" ") and (found := _RAISED.match(line)):
            name, message = found.groups()
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, JobError):
        return kind(message)
    return ClusterError(f"the run failed: {name}: {message}; __run/log.txt in the run folder has more")


def with_ticks(tables: Iterator[pa.Table], *, seconds: float) -> Generator[pa.Table | None, None, None]:
    """The tables, and None whenever this many seconds passed without one, so that the caller can look at the clock.

    When the caller stops early, the source stops after the table that is on its way.
    """
    inbox: queue.Queue[Any] = queue.Queue(maxsize=8)
    stopped = threading.Event()
    end = object()

    def offer(item: Any) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                inbox.put(item, timeout=1.0)
                return

    def pull() -> None:
        try:
            for table in tables:
                offer(table)
                if stopped.is_set():
                    return
            offer(end)
        except BaseException as error:
            offer(error)

    threading.Thread(target=pull, name="results", daemon=True).start()
    try:
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
    finally:
        stopped.set()
