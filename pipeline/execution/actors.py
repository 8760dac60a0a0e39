"""The two stages as Ray actors: they run a stage, and report which rows are inside.

Knows Ray and the stages' interfaces; not how actors are placed, nor what a stage does.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.errors import DeviceLost, EngineCrash
from pipeline.execution.profile import StepProfiler
from pipeline.execution.supervision import MAX_LONE_DEATHS, ActorReporter, ReadWriteLock, RowKey
from pipeline.generate import GenerateOptions, GenerateStage
from pipeline.preprocess.stage import PreprocessOptions, PreprocessStage
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW, UnitColumn

log = logging.getLogger(__name__)
_UNIT = "unit"


def pack(unit: pa.Table) -> pa.Table:
    """A unit's rows as one cell. Ray cuts the outputs of tasks to one size in all stages of a dataset; that size suits
    tables of requests, while a unit of embedded images may be far larger and must stay whole."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, unit.schema) as stream:
        stream.write_table(unit)
    rows = sink.getvalue()
    ends = pa.array([0, rows.size], pa.int64()).buffers()[1]
    return pa.table({_UNIT: pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, rows])})


def unpack(table: pa.Table) -> pa.Table:
    """The unit's rows again, without a copy."""
    (cell,) = table.column(_UNIT)
    return pa.ipc.open_stream(cell.as_buffer()).read_all()


class PreprocessActor:
    """`PreprocessStage` inside Ray: a unit of manifest rows in, tables of requests out as they fill."""

    def __init__(self, options: PreprocessOptions, max_bytes: int, max_rows: int, supervisor: Any) -> None:
        """Tables of requests hold at most `max_rows` rows, and about `max_bytes` bytes of patches."""
        self._stage = PreprocessStage(options)
        self._max_bytes, self._max_rows = max_bytes, max_rows
        self._stats = {"busy_s": 0.0, "rows": 0, "bytes": 0}
        self._reporter = ActorReporter(supervisor, "preprocess", lambda: dict(self._stats))

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        table = unpack(table)
        keys = _row_keys(table, UnitColumn.FILE, UnitColumn.ROW)
        suspects = self._reporter.begin(keys)
        together, alone = _separate(table, keys, suspects)
        left = [key for key in keys if key not in suspects]
        for requests in self._tables(together):
            # A table may wait long to be taken. Its rows and those behind it are not in progress then, so that a
            # watchdog that looks for rows that hang does not find them.
            self._reporter.end(left)
            left = left[requests.num_rows :]
            yield requests
            if left:
                self._reporter.begin(left)
        for key, row in alone:
            if suspects[key] >= MAX_LONE_DEATHS:
                yield self._stage.crashed(row, _gave_up("preprocessing", suspects[key]))
                continue
            self._reporter.begin_alone(key)
            for requests in self._tables(row):
                self._reporter.end([key])
                yield requests

    def _tables(self, rows: pa.Table) -> Iterator[pa.Table]:
        """The stage's tables; counts them and the time that they took."""
        tables = self._stage.tables(rows, self._max_bytes, self._max_rows)
        while True:
            started = time.perf_counter()
            requests = next(tables, None)
            self._stats["busy_s"] += time.perf_counter() - started
            if requests is None:
                return
            self._stats["rows"] += requests.num_rows
            self._stats["bytes"] += requests.nbytes
            yield requests


class EngineActor:
    """`GenerateStage` inside Ray: many threads each bring a table of requests and wait for its answers."""

    def __init__(self, options: GenerateOptions, supervisor: Any, profile_steps: int | None = None) -> None:
        """`profile_steps`: engine steps to trace."""
        logging.basicConfig(level=logging.INFO)
        self._profile_steps = profile_steps
        self._stage = self.make_stage(options)
        self._lock = ReadWriteLock()
        description = self._stage.describe()
        self._reporter = ActorReporter(supervisor, "engine", lambda: {"describe": description, **self._stage.stats()})

    def make_stage(self, options: GenerateOptions) -> GenerateStage:
        """The stage. Tests override this with stages that die or hang on demand."""
        if self._profile_steps is None:
            return GenerateStage(options)
        profiler = StepProfiler(self._profile_steps, lambda trace: self._reporter.keep_trace(trace))
        return GenerateStage(options, profiler.wrap)

    def __call__(self, table: pa.Table) -> pa.Table:
        try:
            return self._answer(table)
        except DeviceLost:
            # Ray starts another process in its place, and the Supervisor has these rows run again. An exception would
            # be sent to the driver and end the job; `ray.actor.exit_actor` would mean that no other is wanted.
            log.exception("the engine's process ends")
            os._exit(1)

    def _answer(self, table: pa.Table) -> pa.Table:
        keys = _row_keys(table, MANIFEST_FILE, MANIFEST_ROW)
        suspects = self._reporter.begin(keys)
        together, alone = _separate(table, keys, suspects)
        with self._lock.together():
            done = [self._stage(together)]
        self._reporter.end([key for key in keys if key not in suspects])
        for key, row in alone:
            if suspects[key] >= MAX_LONE_DEATHS:
                done.append(self._stage.crashed(row, _gave_up("the engine", suspects[key])))
                continue
            with self._lock.alone():
                self._reporter.begin_alone(key)
                done.append(self._stage(row))
                self._reporter.end([key])
        return pa.concat_tables(done)


def _row_keys(table: pa.Table, file: str, row: str) -> list[RowKey]:
    return list(zip(table.column(file).to_pylist(), table.column(row).to_pylist(), strict=True))


def _separate(
    table: pa.Table, keys: Sequence[RowKey], suspects: Mapping[RowKey, int]
) -> tuple[pa.Table, list[tuple[RowKey, pa.Table]]]:
    """The rows that may run together, and the suspects one by one."""
    if not suspects:
        return table, []
    alone = [(key, table.slice(index, 1)) for index, key in enumerate(keys) if key in suspects]
    return table.filter(pa.array([key not in suspects for key in keys])), alone


def _gave_up(stage: str, deaths: int) -> EngineCrash:
    return EngineCrash(f"{stage} died {deaths} times with only this row in progress; look at the row's media")
