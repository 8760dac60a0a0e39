"""Actors fit the cluster, whatever its size, and leave room for reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ResourcesConfig
from pipeline.errors import ResourceError
from pipeline.placement import READ_CPUS, place


@given(st.integers(1, 512), st.integers(0, 16))
def test_the_chosen_actors_always_leave_room_for_a_read(cpus: int, gpus: int) -> None:
    placement = place(ResourcesConfig(), cpus=cpus, gpus=gpus if cpus >= 2 * gpus else 0)
    assert placement.reserved_cpus <= cpus - READ_CPUS
    assert placement.preprocess_actors >= 1
    assert placement.preprocess_cpus > 0
    assert placement.engine_actors >= 1


def test_each_gpu_gets_an_engine_and_the_cpus_go_to_preprocessing() -> None:
    placement = place(ResourcesConfig(), cpus=64, gpus=4)
    assert (placement.engine_actors, placement.gpus_per_engine, placement.engine_cpus) == (4, 1.0, 1.0)
    assert placement.preprocess_actors == 53


def test_without_a_gpu_one_engine_takes_all_threads() -> None:
    placement = place(ResourcesConfig(), cpus=2, gpus=0)
    assert (placement.engine_actors, placement.gpus_per_engine, placement.engine_threads) == (1, 0.0, 2)


def test_asking_for_too_many_cpus_says_what_to_lower() -> None:
    with pytest.raises(ResourceError, match=r"reserve 2 of the cluster's 2 CPUs.*lower resources\.preprocess_actors"):
        place(ResourcesConfig(preprocess_actors=1, preprocess_cpus=1, engine_cpus=1), cpus=2, gpus=0)


def test_asking_for_more_gpus_than_there_are_says_so() -> None:
    with pytest.raises(ResourceError, match="8 engine actors with 1 GPUs each need 8 GPUs; the cluster has 4"):
        place(ResourcesConfig(engine_actors=8), cpus=64, gpus=4)
