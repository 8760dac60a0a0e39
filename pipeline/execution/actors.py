"""The two stages as Ray actors: they run a stage, and report which rows are inside.

Knows Ray and the stages' interfaces; not how actors are placed, nor what a stage does.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import CheckpointError, DeviceLost, EngineCrash
from pipeline.execution.profile import profiled
from pipeline.execution.supervision import MAX_LONE_DEATHS, ActorReporter, ReadWriteLock, RowKey
from pipeline.generate import GenerateOptions, GenerateStage
from pipeline.preprocess.stage import PreprocessOptions, PreprocessStage
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW, UnitColumn

log = logging.getLogger(__name__)
_LARGE = {pa.binary(): pa.large_binary(), pa.string(): pa.large_string()}
UNITS_AT_ONCE = 8
"""Units inside a preprocessing actor: one whose rows are begun, and others that wait for slow fetches."""


def pack(table: pa.Table) -> pa.Table:
    """A table as one row of lists, without a copy of columns in one piece. Ray merges and cuts what tasks hand over to
    blocks of one size in bytes; a row it leaves alone, and hands on at once (see `dataset.run_dataset`)."""
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        if column.nbytes >= 1 << 31 and column.type in _LARGE:  # more than one piece of this type can hold
            column = column.cast(_LARGE[column.type])
        ends = pa.array([0, table.num_rows], pa.int64())
        values = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        columns[name] = pa.LargeListArray.from_arrays(ends, values)
    return pa.table(columns)


def unpack(block: pa.Table) -> pa.Table:
    """The table again, without a copy."""
    assert block.num_rows == 1, f"{block.num_rows} tables in a block"
    return pa.table({name: block.column(name).chunk(0).flatten() for name in block.column_names})


class PreprocessActor:
    """`PreprocessStage` inside Ray: a unit of manifest rows in, tables of requests out as they fill.

    A unit whose last rows wait for slow fetches leaves the core to the next one. Which rows are in which table depends
    on time, but Ray, which runs a unit again after its actor died, counts on the same tables as before: the Supervisor
    knows what has left, and that leaves again as it was.
    """

    def __init__(self, options: PreprocessOptions, max_bytes: int, max_rows: int, supervisor: Any) -> None:
        """Tables of requests hold at most `max_rows` rows, and about `max_bytes` bytes of patches."""
        self._stage = PreprocessStage(options)
        self._max_bytes, self._max_rows = max_bytes, max_rows
        self._stats: Counter[str] = Counter()
        self._turn, self._lock = threading.Lock(), ReadWriteLock()
        self._reporter = ActorReporter(supervisor, "preprocess", lambda: {**self._stats, **self._stage.stats()})

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        table = unpack(block)
        keys = row_keys(table, UnitColumn.FILE, UnitColumn.ROW)
        with contextlib.ExitStack() as turn:
            turn.enter_context(self._turn)
            suspects = self._reporter.begin(keys)
            together, alone = _separate(table, keys, suspects)
            with self._lock.together():
                left = {key for key in keys if key not in suspects}
                for requests in self._tables(together, keys[0], turn.close):
                    # A table may wait long to be taken. Its rows and those behind it are not in progress then, so that
                    # a watchdog that looks for rows that hang does not find them.
                    self._reporter.end(list(left))
                    left -= set(row_keys(requests, MANIFEST_FILE, MANIFEST_ROW))
                    yield pack(requests)
                    if left:
                        self._reporter.begin(list(left))
        for key, row in alone:
            if suspects[key] >= MAX_LONE_DEATHS:
                yield pack(self._stage.crashed(row, _gave_up("preprocessing", suspects[key])))
                continue
            with self._lock.alone():
                self._reporter.begin_alone(key)
                requests = self._stage(row)
                self._count(requests)
                self._reporter.end([key])
            yield pack(requests)

    def _tables(self, rows: pa.Table, unit: RowKey, when_begun: Callable[[], object]) -> Iterator[pa.Table]:
        """The stage's tables: first those that have left before, then the others, which are noted."""
        for numbers in self._reporter.handed_over(unit):
            had_left = pc.is_in(rows.column(UnitColumn.ROW), value_set=pa.array(numbers))
            requests, rows = self._stage(rows.filter(had_left)), rows.filter(pc.invert(had_left))
            self._count(requests)
            yield requests
        for requests in self._stage.tables(rows, self._max_bytes, self._max_rows, when_begun=when_begun):
            self._count(requests)
            self._reporter.hand_over(unit, requests.column(MANIFEST_ROW).to_numpy())
            yield requests

    def _count(self, requests: pa.Table) -> None:
        self._stats.update(rows=requests.num_rows, bytes=requests.nbytes)


class EngineActor:
    """`GenerateStage` inside Ray: many threads each bring a table of requests and wait for its answers."""

    def __init__(self, options: GenerateOptions, supervisor: Any, profile_steps: int | None = None) -> None:
        """`profile_steps`: engine steps to trace."""
        logging.basicConfig(level=logging.INFO)
        self._profile_steps = profile_steps
        self._stats: Callable[[], dict[str, Any]] = lambda: {"loading": "starting"}
        self._reporter = ActorReporter(supervisor, "engine", lambda: self._stats())
        self._stage = self.make_stage(options)
        self._lock = ReadWriteLock()
        description = self._stage.describe()
        if "dtype" in description:  # an engine that answers without a model has none
            _check_dtype(description, self._reporter.first_dtype(description["dtype"]))
        self._stats = lambda: {"describe": description, **self._stage.stats()}
        self._reporter.send()

    def make_stage(self, options: GenerateOptions) -> GenerateStage:
        """The stage. Tests override this with stages that die or hang on demand."""
        if (steps := self._profile_steps) is None:
            return GenerateStage(options, report=self._report_loading)
        trace = functools.partial(profiled, num_steps=steps, deliver=self._reporter.keep_trace)
        return GenerateStage(options, trace, self._report_loading)

    def _report_loading(self, state: str) -> None:
        self._stats = lambda: {"loading": state}

    def __call__(self, block: pa.Table) -> pa.Table:
        try:
            return pack(self._answer(unpack(block)))
        except DeviceLost:
            # Ray starts another process in its place, and the Supervisor has these rows run again. An exception would
            # be sent to the driver and end the job; `ray.actor.exit_actor` would mean that no other is wanted.
            log.exception("the engine's process ends")
            os._exit(1)

    def _answer(self, table: pa.Table) -> pa.Table:
        keys = row_keys(table, MANIFEST_FILE, MANIFEST_ROW)
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


def _check_dtype(engine: Mapping[str, Any], first: str) -> None:
    """Raise CheckpointError where an engine, by its description, computes in another dtype than the run's first: the
    rows of one run are answered in one."""
    if engine["dtype"] != first:
        raise CheckpointError(
            f"an engine on {engine.get('gpu') or 'a CPU'} would compute in {engine['dtype']} "
            f"({engine.get('dtype_reason')}), the run's first engine computes in {first}: set model.dtype to one of "
            f"them, or start the same command again, which goes on in {first} on every machine"
        )


def row_keys(table: pa.Table, file: str, row: str) -> list[RowKey]:
    """Where each row stands in the manifest, from these two columns."""
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
    return EngineCrash(
        f"{stage} died {deaths} times with only this row in progress; look at the row's media, "
        "and in log.txt for `memory`"
    )
