"""The flow of rows on Ray Data: read, preprocess on CPU actors, generate on engine actors, back to the driver.

    ManifestSource --> PreprocessActor x n --> EngineActor x m --> tables of finished rows, as they come

Everything else in the project knows nothing of Ray. Blocks are small and many: a table of requests is handed on
once it holds `block_mb` of patches, and an engine actor has many of them under way at once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline.errors import ClusterError, EngineCrash, JobError
from pipeline.execution.feeding import Sizes
from pipeline.execution.nodes import beside_the_driver
from pipeline.execution.placement import READ_CPUS, Placement
from pipeline.execution.profile import StepProfiler
from pipeline.execution.stages import Stages
from pipeline.execution.supervision import MAX_LONE_DEATHS, Company, Ledger, Place
from pipeline.execution.telemetry import Meter
from pipeline.generate import GenerateOptions, GenerateStage
from pipeline.manifest import ManifestSpec
from pipeline.manifest.work import Work, read_work
from pipeline.preprocess.prompt import spare_torch
from pipeline.preprocess.stage import PreprocessOptions, PreprocessStage
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW, UnitColumn

# One thread for each preprocessing actor: more actors, not more threads, use more cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_UNIT = "unit"
_STOP_S = 30.0
"""Seconds that a flow which is torn down may take for each step before the next one is tried."""


@dataclass(frozen=True)
class Flow:
    """A job's two stages, where they run, and what they exchange."""

    stages: Stages
    placement: Placement
    block_mb: float
    """Patches in a table between the stages, in MB."""
    sizes: Sizes
    profile_steps: int | None = None
    """Engine steps to trace in each engine actor."""


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
    return [packed(read_work(spec, work, columns))]


def packed(unit: pa.Table) -> pa.Table:
    """A unit's rows as one cell. Ray cuts what tasks give to one size for all of a flow's stages; that is chosen for
    the tables of requests, while a unit of embedded pictures may be far larger and must stay whole."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, unit.schema) as stream:
        stream.write_table(unit)
    rows = sink.getvalue()
    ends = pa.array([0, rows.size], pa.int64()).buffers()[1]
    return pa.table({_UNIT: pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, rows])})


def unpacked(table: pa.Table) -> pa.Table:
    """The unit's rows again, where they lie."""
    (cell,) = table.column(_UNIT)
    return pa.ipc.open_stream(cell.as_buffer()).read_all()


class _Desk:
    """An actor's side of the ledger: who it is, what it has under way, and its figures.

    Figures are told every second, and once more whenever nothing is left under way: the actor may end at any moment
    after that, and takes along what it has not told.
    """

    def __init__(self, ledger: Any, kind: str, figures: Callable[[], dict[str, Any]]) -> None:
        context = ray.get_runtime_context()
        self._ledger, self._who, self._node = ledger, context.get_actor_id(), context.get_node_id()
        self._kind, self._figures, self._meter = kind, figures, Meter()
        self._under_way = 0
        self._counting, self._telling = threading.Lock(), threading.Lock()
        ray.get(ledger.born.remote(self._who, kind, context.current_actor))
        threading.Thread(target=self._tell_for_ever, name="figures", daemon=True).start()

    def _tell_for_ever(self) -> None:
        while True:
            self._tell()
            time.sleep(1.0)

    def _tell(self) -> Any:
        with self._telling:
            latest = self._figures()
            self._meter.actor(self._kind, latest)
            return self._ledger.report.remote(self._who, {"node": self._node, **latest})

    def begin(self, places: Sequence[Place]) -> dict[Place, int]:
        """Note rows that run together; gives those that must not."""
        suspects: dict[Place, int] = ray.get(self._ledger.begin.remote(self._who, places))
        self._count(len(places) - len(suspects))
        return suspects

    def begin_alone(self, place: Place) -> None:
        """Note a row that runs alone."""
        ray.get(self._ledger.begin_alone.remote(self._who, place))
        self._count(1)

    def end(self, places: Sequence[Place]) -> None:
        """Note rows that are done."""
        self._ledger.end.remote(self._who, places)
        if places and not self._count(-len(places)):
            ray.get(self._tell())

    def _count(self, change: int) -> int:
        with self._counting:
            self._under_way += change
            return self._under_way

    def keep_trace(self, trace: bytes) -> None:
        """Hand over a profile; returns once it is safe from this actor's end."""
        ray.get(self._ledger.keep_trace.remote(trace))


class PreprocessActor:
    """`PreprocessStage` inside Ray: a block of manifest rows in, tables of requests out as they fill."""

    def __init__(self, options: PreprocessOptions, block_bytes: int, block_rows: int, ledger: Any) -> None:
        spare_torch()
        self._stage = PreprocessStage(options)
        self._block_bytes, self._block_rows = block_bytes, block_rows
        self._figures = {"busy_s": 0.0, "rows": 0, "bytes": 0}
        self._desk = _Desk(ledger, "preprocess", lambda: dict(self._figures))

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        table = unpacked(table)
        places = _places(table, UnitColumn.FILE, UnitColumn.ROW)
        suspects = self._desk.begin(places)
        together, alone = _part_ways(table, places, suspects)
        left = [place for place in places if place not in suspects]
        for requests in self._tables(together):
            # A table may wait long to be taken, and nothing is under way until then: a watchdog that looks for rows
            # that hang must not find these.
            self._desk.end(left)
            left = left[requests.num_rows :]
            yield requests
            if left:
                self._desk.begin(left)
        for place, row in alone:
            if suspects[place] >= MAX_LONE_DEATHS:
                yield self._stage.crashed(row, _gave_up("preprocessing", suspects[place]))
                continue
            self._desk.begin_alone(place)
            for requests in self._tables(row):
                self._desk.end([place])
                yield requests

    def _tables(self, rows: pa.Table) -> Iterator[pa.Table]:
        """The stage's tables, with what they took added to the figures."""
        tables = self._stage.tables(rows, self._block_bytes, self._block_rows)
        while True:
            started = time.perf_counter()
            one = next(tables, None)
            self._figures["busy_s"] += time.perf_counter() - started
            if one is None:
                return
            self._figures["rows"] += one.num_rows
            self._figures["bytes"] += one.nbytes
            yield one


class EngineActor:
    """`GenerateStage` inside Ray: many threads each bring a table of requests and wait for its answers."""

    def __init__(self, options: GenerateOptions, ledger: Any, profile_steps: int | None = None) -> None:
        logging.basicConfig(level=logging.INFO)
        self._profile_steps = profile_steps
        self._stage = self.make_stage(options)
        self._company = Company()
        description = self._stage.describe()
        self._desk = _Desk(ledger, "engine", lambda: {"describe": description, **self._stage.stats()})

    def make_stage(self, options: GenerateOptions) -> GenerateStage:
        """The stage; tests put one in its place that dies or hangs when asked."""
        if self._profile_steps is None:
            return GenerateStage(options)
        profiler = StepProfiler(self._profile_steps, lambda trace: self._desk.keep_trace(trace))
        return GenerateStage(options, profiler.wrap)

    def __call__(self, table: pa.Table) -> pa.Table:
        places = _places(table, MANIFEST_FILE, MANIFEST_ROW)
        suspects = self._desk.begin(places)
        together, alone = _part_ways(table, places, suspects)
        with self._company.together():
            done = [self._stage(together)]
        self._desk.end([place for place in places if place not in suspects])
        for place, row in alone:
            if suspects[place] >= MAX_LONE_DEATHS:
                done.append(self._stage.crashed(row, _gave_up("the engine", suspects[place])))
                continue
            with self._company.alone():
                self._desk.begin_alone(place)
                done.append(self._stage(row))
                self._desk.end([place])
        return pa.concat_tables(done)


ENGINE_ACTOR: type = EngineActor
"""The engine stage's class; the scale benchmark puts one in its place that does nothing."""


def _places(table: pa.Table, file: str, row: str) -> list[Place]:
    return list(zip(table.column(file).to_pylist(), table.column(row).to_pylist(), strict=True))


def _part_ways(
    table: pa.Table, places: Sequence[Place], suspects: Mapping[Place, int]
) -> tuple[pa.Table, list[tuple[Place, pa.Table]]]:
    """The rows that may run together, and the others one by one."""
    if not suspects:
        return table, []
    alone = [(place, table.slice(index, 1)) for index, place in enumerate(places) if place in suspects]
    return table.filter(pa.array([place not in suspects for place in places])), alone


def _gave_up(what: str, deaths: int) -> EngineCrash:
    return EngineCrash(f"{what} died {deaths} times with nothing but this row under way; look at the row's media")


def run_flow(flow: Flow, spec: ManifestSpec, work: Sequence[Work], ledger: Any) -> Iterator[pa.Table]:
    """Start the actors and give the finished rows (schema.result_schema), table by table, in no order."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = flow.sizes.block_bytes
    place = flow.placement
    dataset = ray.data.read_datasource(
        ManifestSource(spec, work, flow.stages.columns),
        override_num_blocks=max(1, len(work)),
        num_cpus=READ_CPUS,
        # A read gives an actor work for long, and each reader is a process of its own to start.
        concurrency=max(1, place.preprocess_pool[1] // 2),
    )
    dataset = dataset.map_batches(
        PreprocessActor,
        fn_constructor_args=(flow.stages.preprocess, int(flow.block_mb * 1024**2), flow.sizes.rows_per_block, ledger),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=place.preprocess_pool[0],
            max_size=place.preprocess_pool[1],
            initial_size=place.preprocess_actors,
            max_tasks_in_flight_per_actor=2,
        ),
        num_cpus=place.preprocess_cpus,
        **beside_gpus(place),
        runtime_env={"env_vars": ONE_THREAD},
    )
    fixed, in_flight = place.engine_pool[0] == place.engine_pool[1], flow.sizes.blocks_in_flight
    generate = flow.stages.generate
    if place.gpus_per_engine:
        num_devices = max(1, int(place.gpus_per_engine))
        generate = replace(generate, engine=replace(generate.engine, num_devices=num_devices))
    else:
        generate = replace(generate, engine=replace(generate.engine, num_threads=place.engine_threads))
    # map_batches itself refuses whole tables (batch_size None) beside GPUs; this is the same without that check.
    dataset = dataset.map_batches_internal(
        ENGINE_ACTOR,
        fn_constructor_args=(generate, ledger, *([flow.profile_steps] if flow.profile_steps else [])),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=place.engine_pool[0],
            max_size=place.engine_pool[1],
            initial_size=place.engine_actors,
            max_concurrent_calls_per_actor=in_flight,
            # Ray lets a pool grow once twice as much waits as runs.
            max_tasks_in_flight_per_actor=in_flight + (2 if fixed else in_flight),
            enable_true_multi_threading=True,
        ),
        num_cpus=place.engine_reserved_cpus,
        num_gpus=place.gpus_per_engine or None,
    )
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=4)
    except Exception as error:
        raise _job_error(error) from error


def beside_gpus(place: Placement) -> dict[str, Any]:
    """Where preprocessing actors go: to the nodes of the engines, whose object store their tables then need not leave,
    and to the others once those are full."""
    if not place.first_nodes:
        return {}
    return {
        "label_selector": {"ray.io/node-id": f"in({','.join(place.first_nodes)})"},
        "fallback_strategy": [{"label_selector": {}}],
    }


def _job_error(error: BaseException) -> JobError:
    """What Ray raised, as one line: our own error where an actor raised one, else the innermost cause."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = getattr(cause, "cause", None) or cause.__cause__
    ours = next((link for link in reversed(chain) if isinstance(link, JobError)), None)
    if ours is not None:
        return type(ours)(str(ours).splitlines()[0])  # Ray adds lines of its own
    innermost = next((link for link in reversed(chain) if str(link).strip()), error)
    lines = [line for line in str(innermost).splitlines() if line.strip()] or [""]
    return ClusterError(
        f"Ray gave up: {type(innermost).__name__}: {lines[-1].strip()}; log.txt in the run folder has more"
    )


class RunningFlow:
    """A flow under way: its tables as they come, and how to end it before its time."""

    def __init__(self, flow: Flow, spec: ManifestSpec, work: Sequence[Work], ledger: Any) -> None:
        self._ledger = ledger
        self._threads_before = set(threading.enumerate())
        self.tables = with_ticks(run_flow(flow, spec, work, ledger), seconds=1.0)

    def stop(self) -> None:
        """Free what the flow holds on the cluster, also when Ray's executor waits for something that never comes."""
        with contextlib.suppress(ValueError):  # it is just running: then its thread ends it
            self.tables.close()
        # Ray's executor is a thread of that name; nothing public leads to it while the iterator is stuck.
        executors = [
            thread
            for thread in threading.enumerate()
            if thread not in self._threads_before and thread.name.startswith("StreamingExecutor")
        ]
        closers = [
            threading.Thread(target=executor.shutdown, kwargs={"force": True}, daemon=True)  # type: ignore[attr-defined]
            for executor in executors
        ]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(_STOP_S)
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            for handle in ray.get(self._ledger.abandon.remote(), timeout=_STOP_S):
                ray.kill(handle, no_restart=True)


def start_ledger() -> Any:
    """The ledger of this run; it ends with the run. Beside the driver no other node's loss takes it along."""
    return ray.remote(Ledger).options(num_cpus=0, **beside_the_driver()).remote()


def reports(ledger: Any) -> list[dict[str, Any]]:
    """What every actor last said of itself; empty when the ledger does not answer."""
    try:
        found: list[dict[str, Any]] = ray.get(ledger.reports.remote(), timeout=10)
    except (ray.exceptions.RayError, TimeoutError):
        return []
    return found


def working_s(ledger: Any) -> float:
    """Seconds since rows began to flow; 0 before, and when the ledger does not answer."""
    try:
        seconds: float = ray.get(ledger.working_s.remote(), timeout=10)
    except (ray.exceptions.RayError, TimeoutError):
        return 0.0
    return seconds


def break_stall(ledger: Any, seconds: float, *, tell: bool) -> list[str]:
    """Kill the actors that have rows under way and have stood still for so long; their rows run again, alone.

    Gives a line for each actor on what it is doing, where one was killed or where they are asked for.
    """
    actors = ray.get(ledger.under_way.remote())
    if not tell and all(still < seconds for *_, still in actors):
        return []
    told = []
    for who, kind, handle, (file, row), age, still in actors:
        stuck = still >= seconds
        doing = f"stood still for {still:.0f} s; killed" if stuck else "is working; left alone"
        told.append(f"{kind} actor {who[:8]}: row {row} of manifest file {file} since {age:.0f} s; it {doing}")
        if stuck:
            ray.get(ledger.killed.remote(who))
            ray.kill(handle, no_restart=False)
    return told or ["no actor has a row: the rows wait for places on the cluster"]


def with_ticks(tables: Iterator[pa.Table], *, seconds: float) -> Generator[pa.Table | None, None, None]:
    """The tables, and None whenever so long has passed without one, so that the caller can look after the clock.

    When the caller stops early, so does the flow, after the table that is on its way.
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
