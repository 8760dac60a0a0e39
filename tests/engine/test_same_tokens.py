"""The native engine against transformers: the same tokens in float32, whatever shares the batch.

Three links: plain `model.generate` on one row, as the model's page shows it; the reference engine, which
hands in its own positions; and the native engine under any budgets, arrival order and preemptions.
"""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.engine import Completion, EngineOptions, Request
from pipeline.engine.checkpoint import from_model
from pipeline.engine.engine import NativeEngine
from pipeline.engine.mrope import lay_out_prompt
from pipeline.engine.pixels import default_pixel_table
from pipeline.engine.reference import ReferenceEngine
from tests.engine.rounding import smallest_margin
from tests.engine.tiny import IMAGE_PAD, VIDEO_PAD, mixed_requests, tokens_of

NUM_ROWS = 300


def native(model: Any, *, overlap: bool = False, cache_tokens: int = 0, **options: Any) -> NativeEngine:
    if cache_tokens:
        options["cache_gb"] = (cache_tokens + 64) * 3 * 2 * 2 * 16 * 4 / 1e9  # layers, k and v, heads, dim, bytes
    return NativeEngine(from_model(model), EngineOptions(model_path="tiny", **options), overlap=overlap)


def reference(model: Any, batch_size: int = 1) -> ReferenceEngine:
    return ReferenceEngine(from_model(model), EngineOptions(model_path="tiny", batch_size=batch_size))


@pytest.fixture(scope="module")
def requests(tiny_model: Any) -> list[Request]:
    """Rows whose every token is decided clearly: at a near-tie, sums in another order may rightly choose otherwise."""
    clear = (request for request in mixed_requests(NUM_ROWS + 60) if smallest_margin(tiny_model, request) > 2e-3)
    return list(islice(clear, NUM_ROWS))


@pytest.fixture(scope="module")
def expected(tiny_model: Any, requests: list[Request]) -> list[tuple[int, ...]]:
    return tokens_of(reference(tiny_model).generate(requests))


def plain_generate(model: Any, request: Request) -> tuple[int, ...]:
    """One row through transformers alone: its positions, its end tokens, pixels spelled out."""
    table = default_pixel_table()
    ids = torch.tensor(request.input_ids.astype(np.int64))[None]
    kinds = (ids == IMAGE_PAD).long() + 2 * (ids == VIDEO_PAD).long()
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for kind, values, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        mine = [medium for medium in request.media if medium.kind == kind]
        if mine:
            inputs["mm_token_type_ids"] = kinds
            inputs[grid] = torch.tensor([medium.grid_thw for medium in mine])
            pixels = []
            for medium in mine:
                steps = medium.patches.reshape(len(medium.patches), 3, -1, 196)
                halves = np.broadcast_to(steps, (len(steps), 3, 2, 196))
                channel = np.arange(3)[None, :, None, None]
                pixels.append(table[channel, halves].reshape(len(steps), 1176))
            inputs[values] = torch.from_numpy(np.concatenate(pixels))
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=request.sampling.max_tokens, do_sample=False)
    return tuple(out[0, ids.shape[1] :].tolist())


def test_reference_engine_gives_the_tokens_of_plain_generate(
    tiny_model: Any, requests: list[Request], expected: list[tuple[int, ...]]
) -> None:
    """On rows where transformers' positions are the trained ones."""
    checked = 0
    for request, tokens in zip(requests, expected, strict=True):
        if any(m.grid_thw[0] > max(m.grid_thw[1:]) // 2 for m in request.media) or checked == 60:
            continue
        assert plain_generate(tiny_model, request) == tokens
        checked += 1
    assert checked == 60


def test_answers_differ_from_row_to_row(expected: list[tuple[int, ...]]) -> None:
    """Guards the guards: a model that says the same to everything would hide every fault."""
    assert len({tokens[:2] for tokens in expected}) > NUM_ROWS // 4


def test_static_batches_of_the_reference_engine_give_the_same_tokens(
    tiny_model: Any, requests: list[Request], expected: list[tuple[int, ...]]
) -> None:
    assert tokens_of(reference(tiny_model, 16).generate(requests[:96])) == expected[:96]


@pytest.mark.parametrize("overlap", [False, True], ids=["read at once", "read a pass late"])
def test_native_engine_gives_the_same_tokens_with_default_budgets(
    tiny_model: Any, requests: list[Request], expected: list[tuple[int, ...]], overlap: bool
) -> None:
    engine = native(tiny_model, overlap=overlap)
    assert tokens_of(engine.generate(requests)) == expected
    assert engine.stats()["cache_use"] == 0


def run_in_any_order(engine: NativeEngine, requests: list[Request], rng: random.Random) -> list[Completion]:
    """Requests arrive in bursts, and sequences are preempted out of the blue."""
    pending = list(requests)
    rng.shuffle(pending)
    done: list[Completion] = []
    num_steps = 0
    preemptions_left = 20  # bounded, or tiny budgets would never catch up
    while pending or engine.has_unfinished():
        while pending and (rng.random() < 0.4 or not engine.has_unfinished()):
            engine.add(pending.pop())
        done += engine.step()
        num_steps += 1
        assert num_steps < 5000, f"no progress: {engine.stats()}"
        if preemptions_left and not engine._in_flight and engine.scheduler.running and rng.random() < 0.1:
            preemptions_left -= 1
            engine.scheduler.preempt(rng.choice(list(engine.scheduler.running)))
        engine.scheduler.check_integrity()
    return sorted(done, key=lambda completion: completion.request_id)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    max_running=st.integers(1, 40),
    max_batch_tokens=st.integers(16, 400),
    max_batch_patches=st.integers(4, 400),
    cache_tokens=st.integers(256, 1024),
    overlap=st.booleans(),
)
def test_budgets_arrivals_and_preemptions_change_no_token(
    tiny_model: Any,
    requests: list[Request],
    expected: list[tuple[int, ...]],
    seed: int,
    max_running: int,
    max_batch_tokens: int,
    max_batch_patches: int,
    cache_tokens: int,
    overlap: bool,
) -> None:
    rng = random.Random(seed)
    chosen = sorted(rng.sample(range(NUM_ROWS), 16))
    engine = native(
        tiny_model,
        overlap=overlap,
        cache_tokens=cache_tokens,
        max_running=max_running,
        max_batch_tokens=max_batch_tokens,
        max_batch_patches=max_batch_patches,
    )
    done = run_in_any_order(engine, [requests[i] for i in chosen], rng)
    assert tokens_of(done) == [expected[i] for i in chosen]


def test_a_full_cache_preempts_and_changes_no_token(
    tiny_model: Any, requests: list[Request], expected: list[tuple[int, ...]]
) -> None:
    engine = native(tiny_model, cache_tokens=192, max_running=16)
    assert tokens_of(engine.generate(requests[:100])) == expected[:100]
    assert engine.stats()["preemptions"] > 0


def test_equal_media_in_flight_are_encoded_once(tiny_model: Any, requests: list[Request]) -> None:
    engine = native(tiny_model)
    engine.generate(requests)
    different = {m.content_key: m.num_patches for request in requests for m in request.media}
    assert engine.stats()["patches"] == sum(different.values())
    assert sum(m.num_patches for r in requests for m in r.media) > sum(different.values())
    assert not engine.runner.visual_tokens


def test_trained_positions_go_on_after_the_largest_so_far(requests: list[Request]) -> None:
    """Where a video has more steps than its frame has columns, transformers 5.23 runs backwards; we don't."""
    for request in requests:
        layout = lay_out_prompt(request, image_token_id=IMAGE_PAD, video_token_id=VIDEO_PAD)
        for start, stop in layout.spans:
            if stop < len(request.input_ids):
                following = layout.positions[:, stop]
                assert (following == layout.positions[:, :stop].max() + 1).all()
            assert (layout.positions[:, start] == layout.positions[:, start - 1] + 1).all()
        assert layout.delta == layout.positions.max() + 1 - len(request.input_ids)
