"""What a job reserves of a cluster before its actors start, and what it says while it waits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from ray import PlacementGroupID

from pipeline.config import ResourcesConfig
from pipeline.config_values import PoolSize
from pipeline.errors import RestartNeeded
from pipeline.execution import reservation
from pipeline.execution.placement import Node, place
from pipeline.execution.reservation import Reservation, bundles, reserve, waiting_line

GPU_NODE, CPU_NODE = Node("a", cpus=8, gpus=2), Node("b", cpus=8, gpus=0)


class FakeGroup:
    """A placement group that is ready after so many waits."""

    id = PlacementGroupID(bytes(range(18)))

    def __init__(self, waits: int) -> None:
        self.waits = waits

    def wait(self, seconds: float) -> bool:
        self.waits -= 1
        return self.waits < 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []

    def group(wanted: list[dict[str, float]], *, strategy: str) -> FakeGroup:
        made.append((wanted, strategy))
        return FakeGroup(waits=2)

    monkeypatch.setattr(reservation, "placement_group", group)
    monkeypatch.setattr(reservation, "remove_placement_group", lambda group: made.append("removed"))
    monkeypatch.setattr(reservation.ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 2.0})
    monkeypatch.setattr(reservation.ray, "available_resources", lambda: {"CPU": 3.5})
    monkeypatch.setattr(reservation, "live_nodes", lambda: [GPU_NODE, CPU_NODE])
    return made


def start(options: Mapping[str, Any]) -> int | None:
    """The bundle that an actor with these options starts in."""
    found = options.get("scheduling_strategy")
    return None if found is None else int(found.placement_group_bundle_index)


def test_all_that_the_job_needs_is_reserved_at_once_and_given_back(calls: list[Any]) -> None:
    placement = place(ResourcesConfig(preprocess_actors=PoolSize(3, 3)), [GPU_NODE, CPU_NODE])
    said: list[str] = []
    with reserve(placement, said.append) as held:
        cpus = {"CPU": placement.preprocess_cpus}
        engine = {"GPU": 1.0, "CPU": placement.engine_cpus}
        assert calls == [([engine, engine, cpus, cpus, cpus], "PACK")]
        engines, preprocessing = held.engines(), held.preprocessing()
        assert [start(engines.options()) for _ in range(2)] == [0, 1]
        assert [start(preprocessing.options()) for _ in range(3)] == [2, 3, 4]
    assert calls[1:] == ["removed"]
    assert len(said) == 2 and said[0] == waiting_line(placement, {"CPU": 16, "GPU": 2}, {"CPU": 3.5})
    assert "2 engine and 3 preprocessing actors need " in said[0]
    assert "CPUs (3.5 of the cluster's 16 are free) and 2 GPUs (0 of the cluster's 2 are free);" in said[0]


def test_engines_on_the_cpu_are_spread_with_their_cpus() -> None:
    placement = place(ResourcesConfig(engine_actors=PoolSize(2, 2)), [CPU_NODE, replace(CPU_NODE, node_id="c")])
    assert bundles(placement) == [{"CPU": 3.6}] * 2 + [{"CPU": 1.0}] * 6


def test_actors_beyond_the_fewest_start_outside_near_the_engines(calls: list[Any]) -> None:
    resources = ResourcesConfig(preprocess_actors=PoolSize(2, 6))
    with reserve(place(resources, [GPU_NODE, CPU_NODE]), print) as held:
        preprocessing = held.preprocessing()
        found = [preprocessing.options() for _ in range(4)]
    assert [start(options) for options in found] == [2, 3, None, None]
    assert found[3]["label_selector"] == {"ray.io/node-id": "in(a)"}


def test_a_bundle_whose_actor_has_ended_is_used_again(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(reservation.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(reservation.time, "sleep", lambda seconds: None)
    with reserve(place(ResourcesConfig(preprocess_actors=PoolSize(2, 6)), [GPU_NODE, CPU_NODE]), print) as held:
        preprocessing = held.preprocessing()
        empty = {f"bundle_group_3_{FakeGroup.id.hex()}": 1000.0, f"bundle_group_2_{FakeGroup.id.hex()}": 999.999}
        monkeypatch.setattr(reservation.ray, "available_resources", lambda: empty)
        found = [start(preprocessing.options()) for _ in range(3)]
        assert found == [2, 3, None], "an actor that was sent a moment ago may not be there yet"
        now[0] += 60
        assert [start(preprocessing.options()) for _ in range(2)] == [3, None]
        now[0] += 60
        monkeypatch.setattr(reservation.time, "sleep", lambda seconds: empty.clear())
        assert start(preprocessing.options()) is None, "the actor was restarting"
        assert start(held.engines().options()) == 0


def test_a_job_that_the_cluster_is_too_small_for_reserves_nothing(calls: list[Any]) -> None:
    placement = place(ResourcesConfig(engine_actors=PoolSize(4, 8)), [GPU_NODE])
    assert placement.notes and not placement.fits
    with reserve(placement, print) as held:
        assert held == Reservation(placement) and held.engines().options() == {}
    assert calls == []


def test_a_node_that_leaves_while_the_job_waits_ends_the_wait(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [[GPU_NODE, CPU_NODE], [GPU_NODE, CPU_NODE], [GPU_NODE]]
    monkeypatch.setattr(reservation, "live_nodes", lambda: nodes.pop(0))
    placement = place(ResourcesConfig(preprocess_actors=PoolSize(3, 3)), [GPU_NODE, CPU_NODE])
    with pytest.raises(RestartNeeded, match="1 of the cluster's 2 nodes left"), reserve(placement, print):
        raise AssertionError("the share is not there")
    assert calls[-1] == "removed"
