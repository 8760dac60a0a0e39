"""The native engine against transformers: the same tokens in float32, whatever shares the batch.

Rows of two worlds (plain_generate.py), each row answered by plain `model.generate` alone; then the native engine, under
any budgets, arrival order and preemptions. The slow test takes 300 rows of each world at once. Rows that transformers
numbers otherwise than the model was trained are compared with the reference engine, which hands in our positions.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline.engine import Completion, EngineOptions, Request
from pipeline.engine.attention.sdpa import SdpaAttention
from pipeline.engine.engine import NativeEngine
from pipeline.engine.models.mrope import lay_out_prompt
from pipeline.engine.reference import ReferenceEngine
from pipeline.engine.weights import from_model
from tests.unit.engine.plain_generate import SMALLEST_MARGIN, World, demo_world, random_world
from tests.unit.engine.rounding import smallest_margin
from tests.unit.engine.tiny import IMAGE_PAD, VIDEO_PAD, tokens_of

make_world = cache(lambda make, num_rows: make(num_rows))


@pytest.fixture(scope="module", params=[(random_world, 120), (demo_world, 60)], ids=["random", "demo"])
def world(request: pytest.FixtureRequest) -> World:
    made: World = make_world(*request.param)
    return made


RANDOM = pytest.mark.parametrize("world", [(random_world, 120)], ids=["random"], indirect=True)


def native(world: World, *, overlap: bool = False, cache_tokens: int = 0, **options: Any) -> NativeEngine:
    if cache_tokens:
        options["cache_gb"] = (cache_tokens + 64) * world.cache_bytes / 1e9
    return NativeEngine(
        from_model(world.model),
        EngineOptions(model_path="tiny", image_processor=world.image_processor, **options),
        overlap=overlap,
    )


def reference(world: World, batch_size: int) -> ReferenceEngine:
    options = EngineOptions(model_path="tiny", image_processor=world.image_processor, batch_size=batch_size)
    return ReferenceEngine(from_model(world.model), options)


def test_rows_are_of_every_kind_and_answers_differ(world: World) -> None:
    """Guards the guards: a model that says the same to everything would hide every fault."""
    assert {len(request.media) for request in world.requests} >= {0, 1, 2, 3, 5}
    assert {medium.kind for request in world.requests for medium in request.media} == {"image", "video"}
    assert len({request.sampling.max_tokens for request in world.requests}) > 20
    assert len(set(world.expected)) > len(world.requests) // 4
    assert len({len(tokens) for tokens in world.expected}) > 10


@pytest.mark.parametrize("batch_size", [1, 16])
def test_the_reference_engine_gives_the_tokens_of_plain_generate(world: World, batch_size: int) -> None:
    assert tokens_of(reference(world, batch_size).generate(world.requests[:32])) == world.expected[:32]


@pytest.mark.parametrize(
    "options",
    [{}, {"overlap": True, "attention": "sdpa", "kernels": "eager"}],
    ids=["read at once", "read a pass late, by torch's operations alone"],
)
def test_the_native_engine_gives_the_tokens_of_plain_generate(world: World, options: dict[str, Any]) -> None:
    engine = native(world, **options)
    assert tokens_of(engine.generate(world.requests)) == world.expected
    assert engine.stats()["cache_use"] == 0


@pytest.mark.slow
@RANDOM
def test_rows_that_transformers_numbers_otherwise_give_the_tokens_of_trained_positions(world: World) -> None:
    rows = [request for request in world.odd_requests[:80] if smallest_margin(world.model, request) > SMALLEST_MARGIN]
    assert len(rows) > 60
    expected = tokens_of(reference(world, 1).generate(rows))
    engine = native(world, cache_tokens=512, max_batch_tokens=64)
    assert tokens_of(engine.generate(rows)) == expected


def run_in_any_order(engine: NativeEngine, requests: list[Request], rng: random.Random) -> list[Completion]:
    """Requests arrive in bursts, and sequences are preempted out of the blue."""
    pending = list(requests)
    rng.shuffle(pending)
    done: list[Completion] = []
    num_steps, most_steps = 0, 1000 + 100 * len(requests)
    preemptions_left = 20 + len(requests) // 4  # bounded, or tiny budgets would never catch up
    while pending or engine.has_unfinished():
        while pending and (rng.random() < 0.4 or not engine.has_unfinished()):
            engine.add(pending.pop())
        done += engine.step()
        num_steps += 1
        assert num_steps < most_steps, f"no progress: {engine.stats()}"
        if preemptions_left and rng.random() < 0.1:
            engine._collect()  # as after out of memory
            if engine.scheduler.running:
                preemptions_left -= 1
                engine.scheduler.preempt(rng.choice(list(engine.scheduler.running)))
        engine.scheduler.check_integrity()
    return sorted(done, key=lambda completion: completion.request_id)


def check_in_any_order(world: World, num_rows: int, seed: int, **options: Any) -> NativeEngine:
    rng = random.Random(seed)
    chosen = sorted(rng.sample(range(len(world.requests)), num_rows))
    engine = native(world, **options)
    done = run_in_any_order(engine, [world.requests[i] for i in chosen], rng)
    assert [completion.request_id for completion in done] == [world.requests[i].request_id for i in chosen]
    assert tokens_of(done) == [world.expected[i] for i in chosen]
    return engine


ANY_BUDGETS = {
    "seed": st.integers(0, 2**32),
    "max_running": st.integers(1, 40),
    "max_batch_tokens": st.integers(16, 400),
    "max_batch_patches": st.integers(4, 400),
    "cache_tokens": st.integers(512, 1024),
    "overlap": st.booleans(),
    "attention": st.sampled_from(["auto", "sdpa"]),
    "kernels": st.sampled_from(["auto", "eager"]),
}
"""The smallest cache holds the longest row and little more. `auto` is code for this CPU, where there is some."""


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**ANY_BUDGETS)
def test_budgets_arrivals_and_preemptions_change_no_token(world: World, seed: int, **options: Any) -> None:
    check_in_any_order(world, 16, seed, **options)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", [(random_world, 300), (demo_world, 300)], ids=["random", "demo"], indirect=True)
@settings(
    max_examples=4, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(**{**ANY_BUDGETS, "max_running": st.integers(8, 100), "max_batch_tokens": st.integers(100, 1000)})
def test_budgets_arrivals_and_preemptions_change_no_token_of_300_rows(world: World, seed: int, **options: Any) -> None:
    engine = check_in_any_order(world, 300, seed, **options)
    assert engine.stats()["preemptions"] > 10


@RANDOM
def test_a_full_cache_preempts_and_changes_no_token(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SdpaAttention, "block_size", 4)  # answers take more than the one that is reserved
    engine = native(world, cache_tokens=192, max_running=16, attention="sdpa")
    assert tokens_of(engine.generate(world.requests)) == world.expected
    assert engine.stats()["preemptions"] > 0


def test_equal_media_in_flight_are_encoded_once(world: World) -> None:
    engine = native(world)
    engine.generate(world.requests)
    different = {m.content_key: m.num_patches for request in world.requests for m in request.media}
    assert engine.stats()["patches"] == sum(different.values())
    assert sum(m.num_patches for r in world.requests for m in r.media) > sum(different.values())
    assert not engine.runner.visual_tokens


@RANDOM
def test_trained_positions_go_on_after_the_largest_so_far(world: World) -> None:
    """Where a video has more steps than its frame has columns, transformers 5.23 runs backwards; we don't."""
    for request in [*world.requests, *world.odd_requests]:
        layout = lay_out_prompt(request, image_token_id=IMAGE_PAD, video_token_id=VIDEO_PAD)
        for _, _, start, stop in layout.runs:
            if stop < len(request.input_ids):
                following = layout.positions[:, stop]
                assert (following == layout.positions[:, :stop].max() + 1).all()
            assert (layout.positions[:, start] == layout.positions[:, start - 1] + 1).all()
        assert layout.delta == layout.positions.max() + 1 - len(request.input_ids)
