"""Memory on a GPU: passes that really run out of it, a cache too small for all rows, and no growth from run to run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.engine import EngineOptions, Medium, Request, SamplingParams
from pipeline.engine.attention.fastest import hopper_kernels
from pipeline.engine.attention.packed import pack
from pipeline.engine.device import is_out_of_memory
from pipeline.engine.engine import NativeEngine
from pipeline.engine.sequence import patch_bytes
from pipeline.engine.weights import from_model
from tests.unit.engine.tiny import IMAGE_PAD, VISION_END, VISION_START, make_model, mixed_requests, tokens_of

pytestmark = pytest.mark.gpu

SPARE = 24 * 2**20
"""Bytes left for passes: enough for one image of these tests, too few for all of them."""


def engine() -> NativeEngine:
    options = EngineOptions("tiny", attention="sdpa", gpu_memory_fraction=0.02)
    return NativeEngine(from_model(make_model().cuda()), options)


def images(count: int, first_id: int = 0) -> list[Request]:
    """Rows of an image of 280x280 each."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(first_id, first_id + count):
        patches = rng.integers(0, 256, (400, patch_bytes("image", 14)), dtype=np.uint8)
        ids = [1, VISION_START, *[IMAGE_PAD] * 100, VISION_END, *rng.integers(8, 200, 4)]
        sampling = SamplingParams(max_tokens=6, ignore_eos=True)
        rows.append(
            Request(number, np.asarray(ids, dtype=np.int32), (Medium("image", (1, 20, 20), patches),), sampling)
        )
    return rows


@pytest.fixture
def no_limit() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_passes_that_run_out_of_memory_are_split_and_every_row_gets_its_answer(no_limit: None) -> None:
    requests = images(48)
    expected = tokens_of(engine().generate(requests))
    tight = engine()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + SPARE) / total)
    assert tokens_of(tight.generate(requests)) == expected
    assert tight.stats()["out_of_memory"] > 0
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert tokens_of(tight.generate(requests)) == expected
    assert tight.is_usable()


def test_a_kernel_of_another_package_that_gets_no_memory_is_known_to_have_run_out_of_it(no_limit: None) -> None:
    device = torch.device("cuda")
    if not (kernels := hopper_kernels(device)):
        pytest.skip("FlashAttention 3 needs a Hopper GPU and the package fa3-fwd")
    (attend,) = kernels.values()
    lengths = [5476] * 20
    qkv = torch.zeros(sum(lengths), 3, 16, 128, device=device, dtype=torch.bfloat16).unbind(1)
    frames = pack(lengths, device)
    attend(*qkv, frames, frames, False)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + SPARE) / total)
    with pytest.raises(RuntimeError) as raised:
        attend(*qkv, frames, frames, False)
    assert is_out_of_memory(raised.value), raised.value


def test_rows_that_do_not_fit_the_cache_together_give_the_answers_that_they_give_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampling = SamplingParams(max_tokens=150, ignore_eos=True)  # rows start small and outgrow the cache
    requests = [Request(i, np.arange(8 + i, 13 + i, dtype=np.int32), (), sampling) for i in range(40)]
    roomy = engine()
    expected = tokens_of(roomy.generate(requests))
    per_token = roomy.cache.num_bytes / roomy.cache.num_tokens
    monkeypatch.setattr(NativeEngine, "_bytes_for_cache", lambda *_: int(1200 * per_token))
    small = engine()
    assert tokens_of(small.generate(requests)) == expected
    assert small.stats()["preemptions"] > 0
    small.scheduler.check_integrity()


def test_memory_does_not_grow_from_run_to_run() -> None:
    lasting = engine()

    def used_after(seed: int) -> tuple[int, int]:
        lasting.generate(mixed_requests(60, seed=seed) + images(20, first_id=100))
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    used_after(1)
    before: Any = used_after(2)
    after = [used_after(seed) for seed in range(3, 8)]
    assert max(allocated for allocated, _ in after) <= before[0] + 2**20
    assert max(reserved for _, reserved in after) <= before[1] + 64 * 2**20
