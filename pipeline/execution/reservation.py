"""A job's share of the cluster, reserved as a whole before its first actor starts.

Ray starts actors one by one as resources become free: two jobs on one full cluster could each hold half of what they
need and wait for ever. A placement group is reserved all or nothing, and here holds the fewest actors that the job is
content with; those that a pool adds later start where one has ended, else outside, wherever there is room. A job whose
fewest actors do not fit the cluster as it is (it may be about to grow) reserves nothing and starts with what fits.
Knows Ray's placement groups; not what the actors do.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.errors import RestartNeeded
from pipeline.execution.cluster import live_nodes
from pipeline.execution.placement import Placement

_PATIENCE_S = 5.0
_REMIND_S = 60.0
_BUNDLE_UNITS = 1000
_SETTLED_S = 20.0
"""Seconds after which Ray's view of the cluster shows an actor in the bundle that it was sent to."""
_RESTART_S = 2.0
"""Seconds after which a bundle is no longer empty that an actor has left to be restarted."""


@dataclass
class Share:
    """Where the actors of a stage start: each in a bundle of its own, and outside where there is none left."""

    group: PlacementGroup | None
    bundles: range
    """Those of the group that are this stage's."""
    outside: Mapping[str, Any]
    """Ray's options for an actor outside the group."""
    taken: dict[int, float] = field(default_factory=dict)
    """When an actor was sent to each bundle, on the monotonic clock."""

    def options(self) -> dict[str, Any]:
        """Ray's options for the next actor."""
        index = self._free_bundle()
        if index is None:
            return dict(self.outside)
        self.taken[index] = time.monotonic()
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, index)}

    def _free_bundle(self) -> int | None:
        """A bundle without an actor: one that none was sent to, or whose actor has ended, as Ray ends the oldest
        actors of a pool that shrinks."""
        if self.group is None:
            return None
        if unused := [index for index in self.bundles if index not in self.taken]:
            return unused[0]
        sent_by = time.monotonic() - _SETTLED_S
        empty = self._empty([index for index in self.bundles if self.taken[index] < sent_by])
        if empty:
            time.sleep(_RESTART_S)
        return next(iter(self._empty(empty)), None)

    def _empty(self, bundles: Sequence[int]) -> list[int]:
        """Those without an actor now: Ray gives every bundle so much of a resource, and some of that to each actor."""
        assert self.group is not None
        free = ray.available_resources() if bundles else {}
        name = f"bundle_group_%d_{self.group.id.hex()}"
        return [index for index in bundles if free.get(name % index) == _BUNDLE_UNITS]


@dataclass(frozen=True)
class Reservation:
    """What a job holds of the cluster."""

    placement: Placement
    group: PlacementGroup | None = None

    def engines(self) -> Share:
        """For the engines' actors, which have the first bundles."""
        return Share(self.group, range(self.placement.engine_pool[0]), {})

    def preprocessing(self) -> Share:
        """For the preprocessing actors: outside the group they go to the engines' nodes first, whose object store their
        tables then need not leave."""
        first, nodes = self.placement.engine_pool[0], ",".join(self.placement.first_nodes)
        near = {"label_selector": {"ray.io/node-id": f"in({nodes})"}, "fallback_strategy": [{"label_selector": {}}]}
        return Share(self.group, range(first, first + self.placement.preprocess_pool[0]), near if nodes else {})


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
