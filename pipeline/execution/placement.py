"""How many actors of which size a job starts on a cluster.

The fewest actors are reserved together (`reservation.py`), so that no order in which Ray starts them can starve one.
What is decided here: an engine gets a GPU and a core to drive it, or half of its node's CPUs where it computes on them;
preprocessing gets the rest, less a tenth that is left to reads and to Ray, which reserve nothing. What cannot fit is
refused with the numbers. Ray's own autoscaling covers pools with a range (`resources.preprocess_actors: 2,16`). Plain
arithmetic: knows no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import ResourcesConfig
from pipeline.config_values import PoolSize
from pipeline.errors import ResourceError, counted

_FOR_ACTORS = 0.9
"""Share of a node's CPUs for actors whose size is chosen here."""
_ENGINE_CORES = 1.0
"""Cores that are left to drive an engine on a GPU, where the node has enough."""
_STORE_FRACTION = 0.25
"""Share of the object store that the tables inside the engines may fill where the config leaves it open."""
_MIN_BLOCKS = 4


@dataclass(frozen=True)
class Node:
    node_id: str
    cpus: float
    gpus: float
    store_bytes: float = 0.0
    """Its object store."""


@dataclass(frozen=True)
class Placement:
    """Actors of the two stages and what each reserves."""

    preprocess_actors: int
    """Actors to start with."""
    preprocess_cpus: float
    engine_actors: int
    """Actors to start with."""
    engine_cpus: float
    """CPUs left to each engine. One on a GPU does not reserve them itself, so that an engine that starts later needs no
    more than its GPU."""
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


def place(resources: ResourcesConfig, nodes: Sequence[Node], *, may_wait: bool = False) -> Placement:
    """Actors for a cluster of these nodes; what the config leaves open is chosen here.

    Raises ResourceError when what the config asks for does not fit. For a pool with a range (for every pool, with
    `may_wait`) that is only noted: the cluster may be about to grow.
    """
    nodes = [node for node in nodes if node.cpus > 0 or node.gpus > 0]
    gpus = resources.gpus_per_engine
    if gpus is None:
        gpus = 1.0 if any(node.gpus >= 1 for node in nodes) else 0.0
    engine_actors, engines, notes = _count_engines(resources.engine_actors, nodes, gpus, may_wait)
    engine_cpus, free = _share_cpus(resources, nodes, engines, gpus)
    pool = resources.preprocess_actors
    least = pool.min_size if pool else 1
    preprocess_cpus = resources.preprocess_cpus or _largest_size(least, free)
    fit = _fit(free, preprocess_cpus)
    if fit < least or min(free, default=0.0) < 0:
        total = sum(node.cpus for node in nodes)
        if not may_wait and (pool is None or pool.min_size == pool.max_size or min(free, default=0.0) < 0):
            raise ResourceError(
                f"{least} preprocessing actors with {preprocess_cpus:g} CPUs and {engine_actors} engine actors with "
                f"{engine_cpus:g} need {least * preprocess_cpus + engine_actors * engine_cpus:g} of the cluster's "
                f"{total:g} CPUs, each actor's on one node: lower resources.preprocess_actors, preprocess_cpus, "
                "engine_actors or engine_cpus"
            )
        notes += (
            f"{fit} of at least {least} preprocessing actors fit the cluster's {total:g} CPUs now: "
            "the others start when nodes come",
        )
    pool, engine_pool = pool or PoolSize(fit, fit), resources.engine_actors or PoolSize(engine_actors, engine_actors)
    is_mixed = gpus > 0 and not all(engines)
    placement = Placement(
        preprocess_actors=min(max(fit, pool.min_size), pool.max_size),
        preprocess_cpus=preprocess_cpus,
        engine_actors=engine_actors,
        engine_cpus=engine_cpus,
        gpus_per_engine=gpus,
        engine_threads=1 if gpus else max([1, *(int(node.cpus) // max(engines) for node in nodes)]),
        preprocess_pool=(pool.min_size, pool.max_size),
        engine_pool=(engine_pool.min_size, engine_pool.max_size),
        first_nodes=tuple(node.node_id for node, count in zip(nodes, engines, strict=True) if is_mixed and count),
        notes=notes,
        fits=not notes,
    )
    store = store_share(nodes, placement)
    placement = replace(placement, blocks_in_flight=_blocks_in_flight(resources, placement, store))
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


def _count_engines(
    pool: PoolSize | None, nodes: Sequence[Node], gpus: float, may_wait: bool
) -> tuple[int, list[int], tuple[str, ...]]:
    """Engines to start with, the most of them on each node, and a note on those that must wait for new nodes."""
    if not gpus:
        pool = pool or PoolSize(1, 1)
        count = min(max(pool.min_size, len(nodes)), pool.max_size)
        engines = [0] * len(nodes)
        for _ in range(count if nodes else 0):  # where each gets most CPUs
            engines[max(range(len(nodes)), key=lambda node: nodes[node].cpus / (engines[node] + 1))] += 1
        return count, engines, ()
    engines = [_engines_that_fit(node, gpus) for node in nodes]
    fit, total = sum(engines), sum(node.gpus for node in nodes)
    largest = max((node.gpus for node in nodes), default=0.0)
    if fit >= (pool.min_size if pool else 1):
        count = min(fit, pool.max_size) if pool else fit
        return count, [min(here, count) for here in engines], ()
    if pool is None or (pool.min_size == pool.max_size and not may_wait):
        wanted = pool.min_size if pool else 1
        each = counted(gpus, "GPU", form="g")
        raise ResourceError(
            f"{wanted} engine actors with {each} each need {wanted * gpus:g} GPUs, an engine's on one node; the "
            f"cluster has {total:g}, its largest node {largest:g}, which is room for {fit}: lower "
            f'resources.engine_actors or resources.gpus_per_engine, or write "1,{wanted}" if the cluster will grow'
        )
    note = (
        f"{fit} of at least {pool.min_size} engines fit the cluster's {total:g} GPUs now: "
        f"the others start when nodes with {gpus:g} free GPUs come"
    )
    return pool.min_size, engines, (note,)


def _engines_that_fit(node: Node, gpus: float) -> int:
    """An engine's GPUs are on one node, and a share of a GPU on one GPU."""
    if not gpus:
        return 1
    if gpus >= 1:
        return int(node.gpus // gpus)
    return int(node.gpus) * int(1 / gpus + 1e-9)


def _share_cpus(
    resources: ResourcesConfig, nodes: Sequence[Node], engines: Sequence[int], gpus: float
) -> tuple[float, list[float]]:
    """CPUs of an engine, and those that the engines leave to preprocessing on each node."""
    chosen = resources.engine_cpus is None and resources.preprocess_cpus is None
    cpus = [node.cpus * (_FOR_ACTORS if chosen else 1) for node in nodes]
    if resources.engine_cpus is not None:
        kept = [count * resources.engine_cpus for count in engines]
        engine_cpus = resources.engine_cpus
    else:
        most = _ENGINE_CORES if gpus else math.inf
        kept = [
            min(node.cpus * _FOR_ACTORS / 2, count * most) if count else 0.0
            for node, count in zip(nodes, engines, strict=True)
        ]
        shares = [held / count for held, count in zip(kept, engines, strict=True) if count]
        engine_cpus = math.floor(100 * min(shares, default=_ENGINE_CORES)) / 100  # so that the sums stay below
    return engine_cpus, [here - held for here, held in zip(cpus, kept, strict=True)]


def _largest_size(count: int, free: Sequence[float]) -> float:
    """CPUs of an actor: one, or the most with which so many fit."""
    return next((size / 100 for size in range(100, 0, -1) if _fit(free, size / 100) >= count), 1.0)


def _fit(free: Sequence[float], size: float) -> int:
    """How many actors of a size fit the nodes."""
    return sum(max(0, math.floor(cpus / size + 1e-9)) for cpus in free)


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
