"""How much travels between the stages at once, chosen from what preprocessing was measured to do.

A table that is handed on, a unit that is read and the tables inside an engine are sized in time and in the engine's
places, not in rows: rows of a dataset may take a millisecond (a question) or a minute (a long video). What the config
states is left as stated. Plain arithmetic: knows no Ray, and not how anything was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import ResourcesConfig
from pipeline.execution.placement import Placement, default_blocks_in_flight

_BLOCK_S = 2.0
"""Seconds of an actor's work in one table. Each costs Ray some 20 ms, so this keeps the cost near one percent, and no
row waits longer than this for its neighbours before the engine has it."""
_UNIT_S = 30.0
"""Seconds of an actor's work in one unit: what is done again when the actor dies in its middle. (In a job of so many
rows that this would give more units than the driver should hold, they are larger; see `work.plan_work`.)"""
_MOST_ROWS_PER_UNIT = 1024
_ROWS_PER_PLACE = 2.0
"""Rows inside an engine for each that it can run: one running, one waiting to take its place."""
_ENOUGH_BYTES = 0.75
"""Share of a usual table's bytes from which one is handed on, so that those of lighter rows need not wait."""
_SPARE_BLOCKS = 2
_MOST_BLOCKS = 128
_STORE_SHARE = 0.25
"""Share of the object store that the tables inside an engine may fill."""
_ENOUGH_ACTORS = 1.5
"""Preprocessing actors to start with, for each that kept an engine busy before: rows may get dearer."""
_JUDGED_FROM_ROWS = 200
MUCH_STARVED = 0.1
"""Share of an engine's time without enough rows from which preprocessing is what holds the job back."""


@dataclass(frozen=True)
class PreprocessRate:
    """What one preprocessing actor was measured to do."""

    rows_per_s: float
    bytes_per_row: float
    """Of a request row, nearly all of them patches."""


@dataclass(frozen=True)
class Sizes:
    """What a flow reads, hands on and holds at once."""

    min_rows_per_unit: int
    max_rows_per_unit: int
    rows_per_block: int
    """Rows of one table between the stages, at most."""
    block_bytes: int
    """Bytes from which Ray hands a table on by itself: it puts smaller ones together, and cuts those that are half as
    large again."""
    blocks_in_flight: int
    """Tables inside each engine."""


def choose_sizes(
    resources: ResourcesConfig,
    placement: Placement,
    rate: PreprocessRate | None,
    *,
    max_running: int,
    store_bytes: float = 0.0,
) -> Sizes:
    """Sizes for an engine of so many places; `store_bytes` is its share of its node's object store, 0 if unknown.

    Without a rate: the config's sizes, or fixed ones that suit images of ordinary size.
    """
    asked = resources.model_fields_set
    rows_per_unit, least_rows = resources.max_rows_per_unit, resources.min_rows_per_unit
    block_bytes = int(resources.block_mb * 1024**2)
    in_flight = resources.blocks_in_flight or default_blocks_in_flight(placement.gpus_per_engine)
    if rate is None:
        return Sizes(least_rows, rows_per_unit, rows_per_unit, block_bytes, in_flight)
    if "max_rows_per_unit" not in asked:
        rows_per_unit = _between(1, rate.rows_per_s * _UNIT_S, _MOST_ROWS_PER_UNIT)
    if "min_rows_per_unit" not in asked:
        least_rows = min(least_rows, rows_per_unit)
    # More rows than the engine has places would come back only after several rounds of answers.
    rows_per_block = _between(1, rate.rows_per_s * _BLOCK_S, min(rows_per_unit, max_running))
    if rate.bytes_per_row:
        rows_per_block = _between(1, block_bytes / rate.bytes_per_row, rows_per_block)
    usual_bytes = rows_per_block * rate.bytes_per_row
    if resources.blocks_in_flight is None:
        in_flight = math.ceil(_ROWS_PER_PLACE * max_running / rows_per_block) + _SPARE_BLOCKS
        if store_bytes and usual_bytes:
            in_flight = min(in_flight, int(_STORE_SHARE * store_bytes / usual_bytes))
        in_flight = _between(_SPARE_BLOCKS, in_flight, _MOST_BLOCKS)
    return Sizes(
        least_rows, rows_per_unit, rows_per_block, _between(1, _ENOUGH_BYTES * usual_bytes, block_bytes), in_flight
    )


def rate_of(stages: Sequence[Mapping[str, Any]]) -> PreprocessRate | None:
    """The rate that a run's preprocessing actors told of themselves; None when they did too little to judge by."""
    told = [stage for stage in stages if stage.get("kind") == "preprocess"]
    rows, busy_s, num_bytes = (sum(float(stage.get(name, 0)) for stage in told) for name in ("rows", "busy_s", "bytes"))
    if rows < _JUDGED_FROM_ROWS or busy_s <= 0:
        return None
    return PreprocessRate(rows / busy_s, num_bytes / rows)


def starved_share(stages: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of the engines' time for which they had too few rows; None before there is anything to say.

    An engine is held back while it has no row at all, and, by the share of its free places, while it steps with
    places free and no row waiting for one: a few rows at a time keep an engine busy and far below what it can do.
    """
    engines = [stage for stage in stages if stage.get("kind") == "engine"]
    busy, idle, unfilled = (
        sum(float(stage.get(name, 0)) for stage in engines) for name in ("busy_s", "idle_s", "unfilled_s")
    )
    return (idle + unfilled) / (busy + idle) if busy + idle >= 1.0 else None


def enough_actors(last: Mapping[str, Any], placement: Placement) -> int | None:
    """Preprocessing actors that keep this placement's engines busy, by a run's record (run.json) in which they did.

    None where the record does not tell: too few rows, engines that waited, or engines of another kind.
    """
    stages = last.get("stages") or []
    before, throughput = last.get("placement") or {}, last.get("throughput") or {}
    same = all(
        before.get(name) == getattr(placement, name) for name in ("gpus_per_engine", "engine_threads", "engine_cpus")
    )
    engines = sum(stage.get("kind") == "engine" for stage in stages)
    rate, starved = rate_of(stages), starved_share(stages)
    if not same or rate is None or starved is None or starved > MUCH_STARVED:
        return None
    rows_per_s = float(throughput.get("rows_per_s", 0.0)) / engines * placement.engine_actors
    wanted: float = _ENOUGH_ACTORS * rows_per_s / rate.rows_per_s
    return max(1, math.ceil(wanted))


def start_with(resources: ResourcesConfig, placement: Placement, actors: int | None) -> Placement:
    """The placement with so many preprocessing actors at first, where fewer than fit were found to be enough; Ray lets
    the pool grow to what fits. A number that the config states stays."""
    asked = resources.preprocess_actors
    least, most = (1, placement.preprocess_pool[1]) if asked is None else (asked.least, asked.most)
    if actors is None or least == most or actors >= placement.preprocess_actors:
        return placement
    start = max(actors, least)
    return replace(placement, preprocess_actors=start, preprocess_pool=(start if asked is None else least, most))


def _between(least: int, value: float, most: int) -> int:
    return max(least, min(int(value), most))
