"""The engine benchmark's rows, and the least time that they can take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from jobs.benchmark.model import SHAPES
from jobs.benchmark.workload import (
    ROWS,
    TIME_TOKENS,
    Ceilings,
    Rows,
    bound_seconds,
    make_requests,
    measure_ceilings,
    row_work,
)
from pipeline.checkpoint.families import FAMILIES
from pipeline.engine.models.mrope import PositionRule
from pipeline.engine.scheduling.admission import AdmissionRules
from pipeline.planning.roofline import row_flops

RULES = AdmissionRules(4096, 4, 7, max_context=32768)
QWEN3_VL = FAMILIES["qwen3_vl"]
QWEN3_RULES = replace(RULES, positions=PositionRule(separate_steps=True), patch_size=16)


@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_every_kind_are_admitted_and_the_same_each_time(rows: Rows) -> None:
    requests, again = (make_requests(12, rows=rows, max_pixels=56 * 56) for _ in range(2))
    for request, other in zip(requests, again, strict=True):
        RULES.admit(request)
        assert request.input_ids.tolist() == other.input_ids.tolist()
        assert [medium.content_key for medium in request.media] == [medium.content_key for medium in other.media]
        kinds = {medium.kind for medium in request.media}
        assert kinds == {"image": {"image"}, "video": {"video"}, "text": set()}.get(rows, kinds)
    if rows == "mixed":
        assert {tuple(medium.kind for medium in request.media)[:1] for request in requests} == {
            *{(), ("image",), ("video",)}
        }
        assert max(len(request.media) for request in requests) > 1


def test_the_longest_clip_fits_the_context() -> None:
    (request,) = make_requests(1, rows="video", side=700, tokens=256)
    RULES.admit(request)
    assert request.num_visual_tokens > 5000
    (request,) = make_requests(1, family=QWEN3_VL, rows="video", side=700, tokens=256)
    QWEN3_RULES.admit(request)
    assert request.num_visual_tokens > 5000


@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_qwen3_have_its_patches_and_a_time_before_each_step_of_a_video(rows: Rows) -> None:
    for request in make_requests(12, family=QWEN3_VL, rows=rows, max_pixels=64 * 64):
        QWEN3_RULES.admit(request)
        others = len(request.input_ids) - request.num_visual_tokens
        steps = [medium.grid_thw[0] for medium in request.media if medium.kind == "video"]
        images = len(request.media) - len(steps)
        text = others - sum(steps) * (TIME_TOKENS + 2) - 2 * images
        assert text == 25 if request.media else 100 <= text <= 2000


def test_the_bound_of_a_gpu_counts_the_memory_traffic_of_decoding() -> None:
    shape, requests = SHAPES["2b"], make_requests(2, side=56, tokens=100)
    ceilings = Ceilings(800e12, 4e12)
    on_cpu = bound_seconds(shape, requests, ceilings, running=256, on_gpu=False)
    on_gpu = bound_seconds(shape, requests, ceilings, running=256, on_gpu=True)
    parts = [sum(part) / 800e12 for part in zip(*(row_flops(shape, row_work(row)) for row in requests), strict=True)]
    assert [on_cpu[kind] for kind in ("vision", "prefill", "decode")] == pytest.approx(parts)
    assert on_gpu | {"decode": 0} == on_cpu | {"decode": 0}
    # Both rows share the reading of 3.1 GB of weights, a hundred times.
    assert on_gpu["decode"] == pytest.approx(100 * 2 * (shape.body + shape.head) / 4e12, rel=0.01)
    alone = bound_seconds(shape, requests, ceilings, running=1, on_gpu=True)
    assert alone["decode"] == pytest.approx(2 * on_gpu["decode"], rel=0.01)


def test_ceilings_are_measured_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.benchmark.workload.best_seconds", lambda function, device: 1e-3)
    found = measure_ceilings(torch.device("cpu"), torch.float32)
    assert found == Ceilings(2 * 2048 * 1024 * 1024 / 1e-3, 2 * 2**26 / 1e-3)
