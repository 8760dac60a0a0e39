"""The fewest actors fit the cluster, whatever its nodes and wherever Ray puts them."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import CaptionConfig, ResourcesConfig
from pipeline.config_file import load_config
from pipeline.config_values import PoolSize
from pipeline.errors import ConfigError, ResourceError
from pipeline.execution.placement import Node, Placement, place, place_again
from pipeline.execution.reservation import bundles


def one(cpus: float, gpus: float = 0) -> list[Node]:
    return [Node("a", cpus, gpus)]


def several(*shapes: tuple[float, float]) -> list[Node]:
    return [Node(name, *shape) for name, shape in zip(itertools.islice(names(), len(shapes)), shapes, strict=True)]


def names() -> itertools.chain[str]:
    return itertools.chain("abcdefghijklmnopqrstuvwxyz")


@given(st.integers(1, 512), st.integers(0, 16))
def test_on_one_machine_every_stage_has_an_actor_and_none_needs_more_than_there_is(cpus: int, gpus: int) -> None:
    placement = place(ResourcesConfig(), one(cpus, gpus if cpus >= 2 * gpus else 0))
    assert sum(bundle.get("CPU", 0) for bundle in bundles(placement)) <= 0.9 * cpus + 1e-9
    assert placement.preprocess_actors >= 1
    assert placement.preprocess_cpus > 0
    assert placement.engine_actors >= 1


def reserve_all(placement: Placement, nodes: list[Node], rng: random.Random) -> dict[str, list[str]]:
    """Reserve as Ray may: GPUs first, then what needs most CPUs, each on any node with room."""
    free = {node.node_id: {"CPU": node.cpus, "GPU": node.gpus} for node in nodes}
    where: dict[str, list[str]] = {"preprocess": [], "engine": []}
    engines = placement.engine_pool[0]
    kinds = ["engine"] * engines + ["preprocess"] * placement.preprocess_pool[0]
    wanted = sorted(
        zip(bundles(placement), kinds, strict=True), key=lambda each: (-each[0].get("GPU", 0), -each[0].get("CPU", 0))
    )
    for bundle, kind in wanted:
        room = [name for name in free if all(free[name][each] >= bundle[each] - 1e-9 for each in bundle)]
        assert room, f"no room for {kind} with {placement} on {nodes}"
        # Beside GPUs, bundles are packed: on nodes that are in use while they have room.
        used = [name for name in room if placement.gpus_per_engine and name in where["engine"]]
        name = rng.choice(used if kind == "preprocess" and used else room)
        for each, amount in bundle.items():
            free[name][each] -= amount
        where[kind].append(name)
    return where


shapes = st.tuples(st.sampled_from([1, 2, 4, 8, 13, 64, 192]), st.sampled_from([0, 0, 1, 2, 8]))


@given(st.lists(shapes, min_size=1, max_size=8), st.integers(0, 2**32))
def test_wherever_ray_reserves_them_every_actor_finds_room(found: list[tuple[float, float]], seed: int) -> None:
    nodes = several(*found)
    placement = place(ResourcesConfig(), nodes)
    where = reserve_all(placement, nodes, random.Random(seed))
    gpus = sum(node.gpus for node in nodes)
    assert len(where["engine"]) == (gpus or 1)


@given(st.lists(shapes, min_size=2, max_size=8), st.integers(1, 4), st.integers(0, 2**32))
def test_a_fixed_number_of_preprocessing_actors_is_kept(
    found: list[tuple[float, float]], actors: int, seed: int
) -> None:
    nodes = several(*found)
    placement = place(ResourcesConfig(preprocess_actors=PoolSize(actors, actors)), nodes)
    assert placement.preprocess_actors == actors
    reserve_all(placement, nodes, random.Random(seed))


def test_each_gpu_gets_an_engine_and_the_cpus_go_to_preprocessing() -> None:
    placement = place(ResourcesConfig(), one(64, 4))
    assert (placement.engine_actors, placement.gpus_per_engine, placement.engine_cpus) == (4, 1.0, 1.0)
    assert placement.preprocess_actors == 53


def test_without_a_gpu_one_engine_takes_all_threads() -> None:
    placement = place(ResourcesConfig(), one(2))
    assert (placement.engine_actors, placement.gpus_per_engine, placement.engine_threads) == (1, 0.0, 2)


def test_preprocessing_goes_beside_the_gpus_first_and_never_takes_the_engines_cores() -> None:
    nodes = several((16, 4), (32, 0))
    placement = place(ResourcesConfig(), nodes)
    assert placement.first_nodes == ("a",)
    where = reserve_all(placement, nodes, random.Random(0))
    assert where["engine"] == ["a"] * 4
    assert where["preprocess"].count("a") == 12  # 16 less one core for each engine
    assert len(where["preprocess"]) == 10 + 28  # of nine tenths of the CPUs


def test_nodes_of_one_kind_need_no_preference() -> None:
    assert place(ResourcesConfig(), several((16, 1), (16, 1))).first_nodes == ()
    assert place(ResourcesConfig(), several((16, 0), (16, 0))).first_nodes == ()


def test_an_engine_s_gpus_lie_on_one_node() -> None:
    placement = place(ResourcesConfig(gpus_per_engine=4), several((64, 8), (64, 6), (64, 2)))
    assert placement.engine_actors == 3
    with pytest.raises(
        ResourceError, match=r"1 engine actors .* an engine's on one node; the cluster has 4, its largest node 2"
    ):
        place(ResourcesConfig(gpus_per_engine=4), several((64, 2), (64, 2)))
    with pytest.raises(
        ResourceError, match=r"an engine's on one node; the cluster has 8, its largest node 6, which is room for 1"
    ):
        place(ResourcesConfig(gpus_per_engine=4, engine_actors=2), several((64, 6), (64, 2)))


def test_engines_may_share_a_gpu_but_never_lie_across_two() -> None:
    assert place(ResourcesConfig(gpus_per_engine=0.4), one(64, 3)).engine_actors == 6


def test_asking_for_too_many_cpus_says_what_to_lower() -> None:
    with pytest.raises(ResourceError, match=r"need 3 of the cluster's 2 CPUs.*lower resources\.preprocess_actors"):
        place(ResourcesConfig(preprocess_actors=2, preprocess_cpus=1, engine_cpus=1), one(2))
    with pytest.raises(ResourceError, match=r"1 engine actors with 6 need 7 of the cluster's 8 CPUs.*on one node"):
        place(ResourcesConfig(preprocess_actors=1, preprocess_cpus=1, engine_cpus=6), several((4, 0), (4, 0)))


@pytest.mark.parametrize(
    ("nodes", "preprocess", "engine"),
    [(one(2), (1, 1), 1), (several((4, 0), (4, 0)), (12, 0.5), 2), (one(1), (2, 0.25), 0.5)],
)
def test_actors_may_take_every_cpu_since_reads_reserve_none(
    nodes: list[Node], preprocess: tuple[int, float], engine: float
) -> None:
    actors, cpus = preprocess
    asked = ResourcesConfig(preprocess_actors=PoolSize(actors, actors), preprocess_cpus=cpus, engine_cpus=engine)
    reserve_all(place(asked, nodes), nodes, random.Random(0))


def test_asking_for_more_gpus_than_there_are_says_so() -> None:
    with pytest.raises(ResourceError, match=r"8 engine actors with 1 GPU each need 8 GPUs, .* the cluster has 4"):
        place(ResourcesConfig(engine_actors=8), one(64, 4))


def test_a_pool_that_may_grow_waits_for_nodes_that_are_not_there_yet() -> None:
    asked = ResourcesConfig(engine_actors="2,8", gpus_per_engine=1, preprocess_actors="1,64")
    placement = place(asked, one(4))
    assert (placement.engine_actors, placement.engine_pool) == (2, (2, 8))
    assert placement.preprocess_pool == (1, 64)
    assert 1 <= placement.preprocess_actors <= 3
    assert placement.notes == (
        "0 of at least 2 engines fit the cluster's 0 GPUs now: the others start when nodes with 1 free GPUs come",
    )
    empty = place(asked, [Node("head", 0, 0)])
    assert len(empty.notes) == 2
    assert "preprocessing actors fit the cluster's 0 CPUs now" in empty.notes[1]


def test_a_pool_starts_with_what_fits_between_its_bounds() -> None:
    placement = place(ResourcesConfig(engine_actors="1,3", preprocess_actors="2,1000"), one(64, 4))
    assert (placement.engine_actors, placement.preprocess_actors) == (3, 54)


def test_after_a_loss_what_was_asked_for_becomes_the_most_there_will_be() -> None:
    asked = ResourcesConfig(engine_actors=2, preprocess_actors=4, preprocess_cpus=1)
    first = place(asked, several((8, 1), (8, 1)))
    again = place_again(asked, vars(first), one(8, 1))
    assert (again.engine_actors, again.engine_pool, again.preprocess_actors) == (1, (1, 2), 4)
    without = place_again(asked, vars(first), one(2))
    assert (without.gpus_per_engine, without.engine_pool) == (1.0, (1, 2))  # it waits, and never falls back to the CPU
    assert "the others start when nodes with 1 free GPUs come" in without.notes[0]
    small = ResourcesConfig(engine_actors=1, preprocess_actors=1, engine_cpus=1.9, preprocess_cpus=0.9)
    reserve_all(place_again(small, vars(place(small, several((2, 0), (2, 0)))), one(2)), one(2), random.Random(0))


def test_tables_that_were_asked_to_be_in_flight_are_compared_with_the_object_store() -> None:
    nodes = [Node("a", 16, 2, store_bytes=4e9)]
    assert place(ResourcesConfig(), nodes).notes == ()
    assert place(ResourcesConfig(block_mb=16), nodes).notes == ()
    assert place(ResourcesConfig(), nodes).blocks_in_flight == 4, "a quarter of an engine's share of the store"
    assert place(ResourcesConfig(), [Node("a", 16, 2, store_bytes=4e12)]).blocks_in_flight == 64
    (note,) = place(ResourcesConfig(block_mb=256, blocks_in_flight=16), nodes).notes
    assert note.startswith("16 tables of 256 MB inside an engine take up to 4.3 GB, and its share of the node's object")
    assert "store is 2.0 GB" in note


@pytest.mark.parametrize(
    ("text", "expected"), [("4", PoolSize(4, 4)), ("2,16", PoolSize(2, 16)), (" 1 , 8 ", PoolSize(1, 8))]
)
def test_a_pool_is_written_as_a_number_or_as_fewest_and_most(text: str, expected: PoolSize) -> None:
    words = {"input.path": "x", "model.path": "demo", "output.path": "y", "resources.engine_actors": text}
    config = load_config(CaptionConfig, None, words)
    assert config.resources.engine_actors == expected
    written = config.model_dump(mode="json")["resources"]["engine_actors"]
    assert ResourcesConfig(engine_actors=written) == ResourcesConfig(engine_actors=expected)


@pytest.mark.parametrize("text", ["0", "-1", "8,2", "1,2,3", "many", ""])
def test_anything_else_is_refused(text: str) -> None:
    words = {"input.path": "x", "model.path": "demo", "output.path": "y", "resources.preprocess_actors": text}
    with pytest.raises(ConfigError, match=r"resources.preprocess_actors: found .* allowed: a number from 1 on, or few"):
        load_config(CaptionConfig, None, words)
