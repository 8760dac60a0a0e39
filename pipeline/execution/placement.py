"""How many actors of which size a job starts on a cluster, so that no reservation can starve another.

Ray Data runs read tasks beside the actors, and Ray starts actors wherever there is room, in no order that can be relied
on. Sizes are therefore chosen such that every order works: a share of each node is left to reads; an engine on a GPU
reserves only its GPU (the cores that it needs are left out of the count of preprocessing actors), so that no CPU actor
can keep it waiting; and on a cluster of GPU nodes and CPU nodes no GPU node can take more preprocessing actors than
were counted for it. What cannot fit is refused with the numbers. Ray's own autoscaling covers pools with a range
(`resources.preprocess_actors: 2,16`). Plain arithmetic: knows no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import PoolSize, ResourcesConfig
from pipeline.errors import ResourceError

READ_CPUS = 0.1
"""CPUs left to each node's read tasks, which mostly wait for a disk or a bucket. They reserve none: on a cluster that
other jobs fill they would wait for ever."""
_MAX_GROWTH = 1.5
"""Preprocessing actors reserve up to this much more than one core, to keep their number on GPU nodes down."""
_ENGINE_CORES = 1.0
"""Cores that are left to drive an engine on a GPU, where the node has enough."""
_STORE_FRACTION = 0.25
"""Share of the object store that the tables inside the engines may fill where the config leaves it open."""
_MIN_BLOCKS = 4


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    node_id: str
    cpus: float
    gpus: float
    store_bytes: float = 0.0
    """Its object store."""

    @property
    def for_actors(self) -> float:
        """CPUs for actors whose size is chosen here; the rest is for reads."""
        return max(0.0, self.cpus - max(2 * READ_CPUS, 0.1 * self.cpus))

    @property
    def at_most(self) -> float:
        """CPUs for actors whose size the config sets."""
        return max(0.0, self.cpus - READ_CPUS)


@dataclass(frozen=True)
class Placement:
    """Actors of the two stages and what each reserves."""

    preprocess_actors: int
    """Actors to start with."""
    preprocess_cpus: float
    engine_actors: int
    """Actors to start with."""
    engine_cpus: float
    """CPUs left to each engine; on a CPU it reserves them, on a GPU it reserves only the GPU."""
    gpus_per_engine: float
    engine_threads: int
    """Threads that an engine on the CPU computes with."""
    preprocess_pool: tuple[int, int]
    """Fewest and most preprocessing actors."""
    engine_pool: tuple[int, int]
    """Fewest and most engine actors."""
    first_nodes: tuple[str, ...] = ()
    """Nodes that preprocessing actors go to while they have room: those with GPUs, where there are others too."""
    blocks_in_flight: int = 16
    """Tables of requests inside each engine actor at once."""
    notes: tuple[str, ...] = ()
    """Sentences on what does not fit yet."""
    fits: bool = True
    """Whether the fewest actors fit the cluster's nodes, were they free."""

    @property
    def engine_reserved_cpus(self) -> float:
        """CPUs that Ray reserves for an engine."""
        return 0.0 if self.gpus_per_engine else self.engine_cpus

    @property
    def reserved_cpus(self) -> float:
        """CPUs that the actors hold for the whole job."""
        return self.preprocess_actors * self.preprocess_cpus + self.engine_actors * self.engine_reserved_cpus


def place(resources: ResourcesConfig, nodes: Sequence[Node], *, may_wait: bool = False) -> Placement:
    """Actors for a cluster of these nodes; what the config leaves open is chosen here.

    Raises ResourceError when what the config asks for does not fit. For a pool with a range (for every pool, with
    `may_wait`) that is only noted: the cluster may be about to grow.
    """
    nodes = [node for node in nodes if node.cpus > 0 or node.gpus > 0]
    gpus_per_engine = resources.gpus_per_engine
    if gpus_per_engine is None:
        gpus_per_engine = 1.0 if any(node.gpus >= 1 for node in nodes) else 0.0
    if gpus_per_engine:
        placement = _on_gpus(resources, nodes, gpus_per_engine, may_wait)
    else:
        placement = _on_cpus(resources, nodes, may_wait)
    store = store_share(nodes, placement)
    blocks_in_flight = _blocks_in_flight(resources, placement, store)
    placement = replace(placement, blocks_in_flight=blocks_in_flight, fits=not placement.notes)
    return replace(placement, notes=(*placement.notes, *_store_notes(resources, placement, store)))


def place_again(resources: ResourcesConfig, before: Mapping[str, Any], nodes: Sequence[Node]) -> Placement:
    """Actors for what is left of a cluster, by the placement in run.json: engines of the same kind, and at most as
    many actors as before."""
    changes = {
        "gpus_per_engine": before["gpus_per_engine"],
        "engine_actors": PoolSize(1, before["engine_pool"][1]),
        "preprocess_actors": PoolSize(1, before["preprocess_pool"][1]),
    }
    try:
        return place(resources.model_copy(update=changes), nodes)
    except ResourceError:
        # The sizes in the config no longer fit: smaller actors, or a wait for new nodes, are better than none.
        changes |= {"preprocess_cpus": None, "engine_cpus": None}
        return place(resources.model_copy(update=changes), nodes, may_wait=True)


def _on_gpus(resources: ResourcesConfig, nodes: Sequence[Node], gpus_per_engine: float, may_wait: bool) -> Placement:
    engine_pool, preprocess_pool = resources.engine_actors, resources.preprocess_actors
    engines = [_engines_that_fit(node, gpus_per_engine) for node in nodes]
    engine_actors, notes = _count_engines(nodes, sum(engines), gpus_per_engine, engine_pool, may_wait)
    engines = [min(fits, engine_actors) for fits in engines]
    engine_cpus = resources.engine_cpus
    if engine_cpus is None:
        shares = [node.for_actors / 2 / count for node, count in zip(nodes, engines, strict=True) if count]
        engine_cpus = _round_down(min([_ENGINE_CORES, *shares]))
    free = [
        (node.for_actors if resources.engine_cpus is None else node.at_most) - count * engine_cpus
        for node, count in zip(nodes, engines, strict=True)
    ]
    preprocess_cpus, counts = _slots(resources.preprocess_cpus, preprocess_pool, free)
    notes += _check_cpus(nodes, preprocess_pool, preprocess_cpus, sum(counts), engine_actors, engine_cpus, may_wait)
    if len(nodes) > 1 and resources.preprocess_cpus is None:
        grown = max(
            [
                # The smallest size of which one more than was counted does not fit a GPU node.
                min(_round_up(node.cpus / (count + 1)), _MAX_GROWTH * preprocess_cpus)
                for node, engines_here, count in zip(nodes, engines, counts, strict=True)
                if engines_here
            ],
            default=preprocess_cpus,
        )
        fewer = [min(count, math.floor(node.at_most / grown)) for node, count in zip(nodes, counts, strict=True)]
        if grown > preprocess_cpus and sum(fewer) >= _min_size(preprocess_pool):
            preprocess_cpus, counts = grown, fewer
    pool, actors = _pool(preprocess_pool, sum(counts))
    mixed = any(engines) and not all(engines)
    return Placement(
        preprocess_actors=actors,
        preprocess_cpus=preprocess_cpus,
        engine_actors=engine_actors,
        engine_cpus=engine_cpus,
        gpus_per_engine=gpus_per_engine,
        engine_threads=1,
        preprocess_pool=(pool.min_size, pool.max_size),
        engine_pool=(engine_pool.min_size, engine_pool.max_size) if engine_pool else (engine_actors, engine_actors),
        first_nodes=tuple(node.node_id for node, count in zip(nodes, engines, strict=True) if count) if mixed else (),
        notes=notes,
    )


def _engines_that_fit(node: Node, gpus_per_engine: float) -> int:
    """An engine's GPUs are on one node, and a share of a GPU on one GPU."""
    if not gpus_per_engine:
        return 1
    if gpus_per_engine >= 1:
        return int(node.gpus // gpus_per_engine)
    return int(node.gpus) * int(1 / gpus_per_engine + 1e-9)


def _count_engines(
    nodes: Sequence[Node], fit: int, gpus_per_engine: float, pool: PoolSize | None, may_wait: bool
) -> tuple[int, tuple[str, ...]]:
    """Engines to start with, and a note on those that must wait for new nodes."""
    largest = max((node.gpus for node in nodes), default=0.0)
    total = sum(node.gpus for node in nodes)
    if pool is None:
        if not fit:
            raise ResourceError(
                f"an engine with {gpus_per_engine:g} GPUs needs them on one node; the largest node has {largest:g}: "
                "lower resources.gpus_per_engine"
            )
        return fit, ()
    if fit >= pool.min_size:
        return min(fit, pool.max_size), ()
    if pool.min_size == pool.max_size and not may_wait:
        if pool.min_size * gpus_per_engine > total:
            raise ResourceError(
                f"{pool.min_size} engine actors with {gpus_per_engine:g} GPUs each need "
                f"{pool.min_size * gpus_per_engine:g} GPUs; the cluster has {total:g}: lower resources.engine_actors "
                f'or resources.gpus_per_engine, or write "1,{pool.max_size}" if the cluster will grow'
            )
        raise ResourceError(
            f"{pool.min_size} engine actors with {gpus_per_engine:g} GPUs each do not fit: an engine's GPUs are on one "
            f"node, and of this cluster's nodes (the largest has {largest:g}) only {fit} can hold one: "
            "lower resources.engine_actors or resources.gpus_per_engine"
        )
    note = (
        f"{fit} of at least {pool.min_size} engines fit the cluster's {total:g} GPUs now: "
        f"the others start when nodes with {gpus_per_engine:g} free GPUs come"
    )
    return pool.min_size, (note,)


def _on_cpus(resources: ResourcesConfig, nodes: Sequence[Node], may_wait: bool) -> Placement:
    engine_pool, preprocess_pool = resources.engine_actors, resources.preprocess_actors
    engine_pool = engine_pool or PoolSize(1, 1)
    engine_actors = min(max(engine_pool.min_size, len(nodes)), engine_pool.max_size)
    largest = max((node.cpus for node in nodes), default=1.0)
    engine_cpus, preprocess_cpus = resources.engine_cpus, resources.preprocess_cpus
    ours = engine_cpus is None and preprocess_cpus is None
    free = [node.for_actors if ours else node.at_most for node in nodes]
    if len(nodes) == 1:
        engine_cpus = engine_cpus or _round_down(nodes[0].for_actors / 2 / engine_actors)
        preprocess_cpus, counts = _slots(preprocess_cpus, preprocess_pool, [free[0] - engine_actors * engine_cpus])
        fit = sum(counts)
    else:
        # One size for all actors: wherever Ray puts the first ones, the others still fit.
        wanted = engine_actors + _min_size(preprocess_pool)
        given = max(engine_cpus or 0, preprocess_cpus or 0) or None
        size, counts = _slots(given, PoolSize(wanted, wanted), free)
        engine_cpus, preprocess_cpus = engine_cpus or size, preprocess_cpus or size
        spare = sum(counts) - engine_actors
        fit = min(spare, max(_min_size(preprocess_pool), sum(counts) // 2))
    notes = _check_cpus(nodes, preprocess_pool, preprocess_cpus, fit, engine_actors, engine_cpus, may_wait)
    pool, actors = _pool(preprocess_pool, fit)
    return Placement(
        preprocess_actors=actors,
        preprocess_cpus=preprocess_cpus,
        engine_actors=engine_actors,
        engine_cpus=engine_cpus,
        gpus_per_engine=0.0,
        engine_threads=max(1, int(largest) // math.ceil(engine_actors / max(1, len(nodes)))),
        preprocess_pool=(pool.min_size, pool.max_size),
        engine_pool=(engine_pool.min_size, engine_pool.max_size),
        notes=notes,
    )


def _slots(size: float | None, pool: PoolSize | None, free: Sequence[float]) -> tuple[float, list[int]]:
    """CPUs of an actor and how many fit each node: one CPU, or the largest size of which as many as wanted fit."""
    if size is None:
        choices = (hundredths / 100 for hundredths in range(100, 0, -1))
        size = next((choice for choice in choices if sum(_fit(free, choice)) >= _min_size(pool)), 1.0)
    return size, _fit(free, size)


def _fit(free: Sequence[float], size: float) -> list[int]:
    return [max(0, math.floor(cpus / size + 1e-9)) for cpus in free]


def _min_size(pool: PoolSize | None) -> int:
    return pool.min_size if pool else 1


def _pool(asked: PoolSize | None, fit: int) -> tuple[PoolSize, int]:
    """The pool, and the actors to start with."""
    if asked is None:
        return PoolSize(fit, fit), fit
    return asked, min(max(fit, asked.min_size), asked.max_size)


def _check_cpus(
    nodes: Sequence[Node],
    pool: PoolSize | None,
    size: float,
    fit: int,
    engine_actors: int,
    engine_cpus: float,
    may_wait: bool,
) -> tuple[str, ...]:
    """Refuse a fixed number of preprocessing actors that does not fit; only note it for a range."""
    min_size, total = _min_size(pool), sum(node.cpus for node in nodes)
    if fit >= min_size and size > 0:
        return ()
    if may_wait or (pool is not None and pool.min_size < pool.max_size and size > 0):
        return (
            f"{fit} of at least {min_size} preprocessing actors fit the cluster's {total:g} CPUs now: "
            "the others start when nodes come",
        )
    raise ResourceError(
        f"{min_size} preprocessing actors with {size:g} CPUs and {engine_actors} engine actors with {engine_cpus:g} "
        f"need {min_size * size + engine_actors * engine_cpus:g} of the cluster's {total:g} CPUs and leave none for "
        "reads: lower resources.preprocess_actors, preprocess_cpus, engine_actors or engine_cpus"
    )


def _blocks_in_flight(resources: ResourcesConfig, placement: Placement, store: float) -> int:
    """Tables inside an engine: as asked, or enough to keep it busy within its share of the object store."""
    if resources.blocks_in_flight is not None:
        return resources.blocks_in_flight
    wanted = default_blocks_in_flight(placement.gpus_per_engine)
    if store:
        wanted = min(wanted, int(_STORE_FRACTION * store / (resources.block_mb * 1024**2)))
    return max(_MIN_BLOCKS, wanted)


def _store_notes(resources: ResourcesConfig, placement: Placement, store: float) -> tuple[str, ...]:
    """Whether the tables in flight fit the object store of the node that has the smallest share."""
    need = placement.blocks_in_flight * resources.block_mb * 1024**2
    if not store or need <= store:
        return ()
    return (
        f"{placement.blocks_in_flight} tables of {resources.block_mb:g} MB inside an engine take up to "
        f"{need / 1e9:.1f} GB, and its share of the node's object store is {store / 1e9:.1f} GB: Ray will hold rows "
        "back or spill to disk; lower resources.blocks_in_flight or block_mb, or start Ray with a larger object store",
    )


def store_share(nodes: Sequence[Node], placement: Placement) -> float:
    """Bytes of object store for each engine, on the node that has the smallest share; 0 where none is known."""
    stores = [
        node.store_bytes / max(1, min(_engines_that_fit(node, placement.gpus_per_engine), placement.engine_actors))
        for node in nodes
        if node.store_bytes and (not placement.gpus_per_engine or node.gpus)
    ]
    return min(stores, default=0.0)


def default_blocks_in_flight(gpus_per_engine: float) -> int:
    """Tables inside an engine at once, where the config leaves it open."""
    return 64 if gpus_per_engine else 16


def _round_down(cpus: float) -> float:
    """Ray counts CPUs in ten-thousandths; two digits keep the sums exact enough to stay below the whole."""
    return math.floor(cpus * 100) / 100


def _round_up(cpus: float) -> float:
    """To just above, in the digits that Ray counts."""
    return math.floor(cpus * 10_000 + 1) / 10_000
