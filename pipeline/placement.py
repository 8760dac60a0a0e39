"""How many actors of which size a job starts on a cluster, so that no reservation can starve another.

Ray Data runs reads beside the actors. Were the actors to reserve every CPU, no read could ever start and the job
would wait in silence; so a share is left to the reads whatever the cluster's size, and what cannot fit is refused
with the numbers. Plain arithmetic: knows no Ray.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config import ResourcesConfig
from pipeline.errors import ResourceError

READ_CPUS = 0.1
"""CPUs that one read task reserves: it mostly waits for a disk or a bucket."""


@dataclass(frozen=True)
class Placement:
    """Actors of the two stages and what each reserves."""

    preprocess_actors: int
    preprocess_cpus: float
    engine_actors: int
    engine_cpus: float
    gpus_per_engine: float
    engine_threads: int
    """Threads that an engine on the CPU computes with."""

    @property
    def reserved_cpus(self) -> float:
        """CPUs that the actors hold for the whole job."""
        return self.preprocess_actors * self.preprocess_cpus + self.engine_actors * self.engine_cpus


def place(resources: ResourcesConfig, *, cpus: float, gpus: float) -> Placement:
    """Actors for a cluster of so many CPUs and GPUs; what the config leaves open is chosen here.

    Raises ResourceError when what the config asks for leaves nothing for reads, or more GPUs than there are.
    """
    for_actors = cpus - max(2 * READ_CPUS, 0.1 * cpus)
    gpus_per_engine = resources.gpus_per_engine
    if gpus_per_engine is None:
        gpus_per_engine = 1.0 if gpus >= 1 else 0.0
    engine_actors = resources.engine_actors or max(1, int(gpus // gpus_per_engine) if gpus_per_engine else 1)
    if engine_actors * gpus_per_engine > gpus:
        raise ResourceError(
            f"{engine_actors} engine actors with {gpus_per_engine:g} GPUs each need "
            f"{engine_actors * gpus_per_engine:g} GPUs; the cluster has {gpus:g}: "
            "lower resources.engine_actors or resources.gpus_per_engine"
        )
    engine_cpus = resources.engine_cpus
    if engine_cpus is None:
        # An engine on a GPU needs a core to drive it; one on the CPU shares the cores with preprocessing.
        share = for_actors / 2 / engine_actors
        engine_cpus = _round_down(min(1.0, share) if gpus_per_engine else share)
    left = for_actors - engine_actors * engine_cpus
    preprocess_cpus = resources.preprocess_cpus
    preprocess_actors = resources.preprocess_actors
    if preprocess_actors is None:
        preprocess_actors = max(1, math.floor(left / (preprocess_cpus or 1.0)))
    if preprocess_cpus is None:
        preprocess_cpus = _round_down(min(1.0, left / preprocess_actors))
    placement = Placement(
        preprocess_actors=preprocess_actors,
        preprocess_cpus=preprocess_cpus,
        engine_actors=engine_actors,
        engine_cpus=engine_cpus,
        gpus_per_engine=gpus_per_engine,
        engine_threads=max(1, int(cpus) // engine_actors),
    )
    if preprocess_cpus <= 0 or placement.reserved_cpus > cpus - READ_CPUS:
        raise ResourceError(
            f"{preprocess_actors} preprocessing actors with {preprocess_cpus:g} CPUs and {engine_actors} engine actors "
            f"with {engine_cpus:g} reserve {placement.reserved_cpus:g} of the cluster's {cpus:g} CPUs and leave none "
            "for reads: lower resources.preprocess_actors, preprocess_cpus, engine_actors or engine_cpus"
        )
    return placement


def _round_down(cpus: float) -> float:
    """Ray counts CPUs in ten-thousandths; two digits keep the sums exact enough to stay below the whole."""
    return math.floor(cpus * 100) / 100
