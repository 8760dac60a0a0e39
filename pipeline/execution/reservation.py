"""A job's share of the cluster, reserved as a whole before its first actor starts.

Ray starts actors one by one as resources become free: two jobs on one full cluster could each hold half of what they
need and wait for ever. A placement group is reserved all or nothing, and here holds the fewest actors that the job is
content with; those that a pool adds later start outside it, wherever there is room. A job whose fewest actors do not
fit the cluster as it is (it may be about to grow) reserves nothing and starts with what fits.
Knows Ray's placement groups; not what the actors do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.errors import RestartNeeded
from pipeline.execution.cluster import live_nodes
from pipeline.execution.placement import Placement

_PATIENCE_S = 5.0
_REMIND_S = 60.0


@dataclass
class Share:
    """Where the actors of a stage start: one after the other in the bundles [next, stop) of the group, then outside."""

    group: PlacementGroup | None
    next: int
    stop: int
    outside: Mapping[str, Any]
    """Ray's options for an actor outside the group."""

    def options(self) -> dict[str, Any]:
        """Ray's options for the next actor."""
        if self.group is None or self.next >= self.stop:
            return dict(self.outside)
        self.next += 1
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, self.next - 1)}


@dataclass(frozen=True)
class Reservation:
    """What a job holds of the cluster."""

    placement: Placement
    group: PlacementGroup | None = None

    def engines(self) -> Share:
        """For the engines' actors, which have the first bundles."""
        return Share(self.group, 0, self.placement.engine_pool[0], {})

    def preprocessing(self) -> Share:
        """For the preprocessing actors: outside the group they go to the engines' nodes first, whose object store their
        tables then need not leave."""
        first, nodes = self.placement.engine_pool[0], ",".join(self.placement.first_nodes)
        near = {"label_selector": {"ray.io/node-id": f"in({nodes})"}, "fallback_strategy": [{"label_selector": {}}]}
        return Share(self.group, first, first + self.placement.preprocess_pool[0], near if nodes else {})


def bundles(placement: Placement) -> list[dict[str, float]]:
    """What is reserved for each of the fewest actors: the engines, with the cores to drive their GPUs, then
    preprocessing."""
    needs = {"GPU": placement.gpus_per_engine, "CPU": placement.engine_cpus}
    engine = {kind: amount for kind, amount in needs.items() if amount}
    preprocessing = {"CPU": placement.preprocess_cpus}
    return [engine] * placement.engine_pool[0] + [preprocessing] * placement.preprocess_pool[0]


@contextlib.contextmanager
def reserve(placement: Placement, say: Callable[[str], None]) -> Iterator[Reservation]:
    """Hold the fewest actors' share of the cluster, once all of it is free. `say` prints a line while that takes.
    Raises RestartNeeded where a node is lost meanwhile: the share may no longer fit what is left."""
    if not placement.fits:
        yield Reservation(placement)
        return
    # Engines that share no GPUs' node are to be on different ones; beside GPUs, preprocessing is to be near.
    strategy = "PACK" if placement.gpus_per_engine else "SPREAD"
    group = placement_group(bundles(placement), strategy=strategy)
    try:
        nodes, patience = _nodes(), _PATIENCE_S
        while not group.wait(patience):
            if left := len(nodes - _nodes()):
                raise RestartNeeded(
                    f"{left} of the cluster's {len(nodes)} nodes left while the job waited for its share; the same "
                    "command resumes"
                )
            say(waiting_line(placement, ray.cluster_resources(), ray.available_resources()))
            patience = _REMIND_S
        yield Reservation(placement, group)
    finally:
        remove_placement_group(group)


def _nodes() -> set[str]:
    return {node.node_id for node in live_nodes()}


def waiting_line(placement: Placement, total: Mapping[str, float], free: Mapping[str, float]) -> str:
    """Why a job does not start."""
    needed = bundles(placement)
    amounts = [
        f"{sum(bundle.get(kind, 0) for bundle in needed):g} {kind}s ({free.get(kind, 0):g} of the cluster's "
        f"{total.get(kind, 0):g} are free)"
        for kind in ("CPU", "GPU")
        if any(kind in bundle for bundle in needed)
    ]
    return (
        f"waiting for the cluster, whose resources others hold: {placement.engine_pool[0]} engine and "
        f"{placement.preprocess_pool[0]} preprocessing actors need {' and '.join(amounts)}; fewer actors start sooner "
        "(resources.engine_actors, resources.preprocess_actors)"
    )
