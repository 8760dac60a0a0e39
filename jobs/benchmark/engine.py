"""Measure the engine against its peers: one seeded workload, random weights, one process for each engine.

    python -m jobs.benchmark engine                                     shape small on this machine
    python -m jobs.benchmark engine --shape 2b --side 1024 --tokens 100 --device cuda --images 512

Needs torch, transformers and numpy alone. The media are random patches, made before the clock starts: this
measures engines, not image decoding. Output lengths are fixed for each row, so every engine does the same work.

    images_per_s          images / seconds from the first request to the last completion
    mfu                   arithmetic of the workload / seconds / what a large matrix product reaches here
    cpu_seconds           processor time of the run: on a busy machine a fairer measure than the clock
    share_of_limit        the same against the workload's own bound: on a GPU the decode's memory traffic too

The last line is JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from jobs.benchmark.measure import command_line, in_own_process, peak_mb, print_result
from pipeline.engine import PATCH_BYTES, Completion, Engine, EngineOptions, Medium, Request, SamplingParams
from pipeline.planning.roofline import SHAPES as PUBLISHED
from pipeline.planning.roofline import ModelShape, decode_bytes, decode_flops, prefill_flops, vision_flops
from pipeline.preprocess.size import smart_resize

# What large bfloat16 products reach on an H200, and its memory bandwidth.
GPU_FLOPS, GPU_BYTES_PER_S = 790e12, 4.3e12
IMAGE_PAD, VISION_START, VISION_END, VIDEO_PAD = 4, 5, 6, 7


# A Qwen2-VL that a CPU runs in seconds, beside those of the published checkpoints.
SHAPES = {"small": ModelShape(768, 12, 12, 2, 3072, 4096, True, 512, 8, 8), **PUBLISHED}
REPORTED = (
    *("output_tokens_per_s", "cpu_seconds", "first_completion_s", "start_up_s", "warm_up_s", "peak_memory_gb"),
    *("mfu", "share_of_limit", "stats", "engine"),
)


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    args = _parse(argv)
    print(f"shape {args.shape}, {args.dtype}, {args.images} images, device {args.device}, torch {torch.__version__}")
    ours = _measure_in_own_process("ours", args)
    if ours is None:
        return 1
    peers = args.peers.split(",")
    sizes = args.batch_sizes.split(",") if "reference" in peers else []
    reference = {size: _measure_in_own_process(f"reference-{size}", args) for size in sizes}
    finished = {size: result for size, result in reference.items() if result}
    best = max((result["images_per_s"] for result in finished.values()), default=None)
    # Greedy tokens of one row alone, where that was run; bfloat16 may differ at near-ties.
    truth = finished.get("1") or next(iter(finished.values()), None)
    vllm = _measure_in_own_process("vllm", args) if "vllm" in peers and _has_vllm() else None
    print_result(
        "engine",
        shape=args.shape,
        device=args.device,
        dtype=args.dtype,
        images=args.images,
        ours_images_per_s=ours["images_per_s"],
        reference_images_per_s={size: result and result["images_per_s"] for size, result in reference.items()},
        reference_cpu_seconds={size: result and result["cpu_seconds"] for size, result in reference.items()},
        vllm_images_per_s=vllm and vllm["images_per_s"],
        vllm_start_up_s=vllm and vllm["start_up_s"],
        ratio_to_vllm=vllm and ours["images_per_s"] / vllm["images_per_s"],
        ratio_to_best_reference=best and ours["images_per_s"] / best,
        mismatched_rows=truth and sum(ours["tokens"][i] != truth["tokens"][i] for i in ours["tokens"]),
        **{name: ours[name] for name in REPORTED},
    )
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_line("engine", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--peers", default="reference,vllm", help="of: reference, vllm; or none")
    parser.add_argument("--batch-sizes", default="1,8,32", help="of the reference engine")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--side", type=int, help="square images of this side instead of 240 to 640")
    parser.add_argument("--tokens", type=int, help="output tokens of every row instead of 16 to 128")
    parser.add_argument("--max-pixels", type=int)
    parser.add_argument("--threads", type=int, help="torch threads on a CPU")
    args = parser.parse_args(argv)
    if args.max_pixels is None and args.side is None:
        args.max_pixels = 256 * 28 * 28
    return args


def _has_vllm() -> bool:
    from jobs.benchmark.vllm import importable

    reason = importable()
    if reason:
        print(f"vllm           not measured: {reason}")
    return reason is None


def _measure_in_own_process(variant: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """Measure one engine and print a line about it; None where it fails."""
    try:
        result = in_own_process(measure, variant, args)
    except Exception as error:  # one engine may fail or be killed for memory: the others are measured all the same
        print(f"{variant:14} failed: {type(error).__name__}: {error}", flush=True)
        return None
    print(
        f"{variant:14} {result['images_per_s']:7.2f} images/s {result['output_tokens_per_s']:8.1f} tokens/s   "
        f"cpu {result['cpu_seconds']:7.1f} s   first {result['first_completion_s']:6.1f} s   "
        f"start-up {result['start_up_s']:5.1f} s (warm-up {result.get('warm_up_s', 0.0):.1f} s)   "
        f"peak {result['peak_memory_gb']:5.2f} GB   "
        f"MFU {result['mfu']:5.1%}   of limit {result['share_of_limit']:5.1%}",
        flush=True,
    )
    return result


def measure(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """One engine in this process: load, warm up on one row, run the workload."""
    if args.threads:
        torch.set_num_threads(args.threads)
    shape, dtype = SHAPES[args.shape], getattr(torch, args.dtype)
    requests = make_requests(args.images, side=args.side, tokens=args.tokens, max_pixels=args.max_pixels)
    run = run_vllm if variant == "vllm" else run_engine
    measured = run(variant, shape, requests, make_requests(1, side=224, tokens=3, max_pixels=None), args)
    on_gpu = args.device.startswith("cuda")
    flops_per_s = GPU_FLOPS if on_gpu else measure_flops(dtype)
    flops, seconds = sum(count_flops(shape, requests)), measured["seconds"]
    return {
        "images_per_s": len(requests) / seconds,
        "output_tokens_per_s": sum(request.sampling.max_tokens for request in requests) / seconds,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else peak_mb() * 1024**2 / 1e9,
        "mfu": flops / seconds / flops_per_s,
        "share_of_limit": bound_seconds(shape, requests, flops_per_s, on_gpu=on_gpu) / seconds,
        **measured,
    }


def run_engine(
    variant: str, shape: ModelShape, requests: Sequence[Request], warm: Sequence[Request], args: argparse.Namespace
) -> dict[str, Any]:
    """One of our own engines. All requests are there from the start, as in a batch job."""
    started = time.perf_counter()
    engine = make_engine(variant, make_model(shape, args.device, getattr(torch, args.dtype)), args)
    engine.generate(warm)
    start_up = time.perf_counter() - started
    before = engine.stats()
    started, cpu_started = time.perf_counter(), time.process_time()
    for request in requests:
        engine.add(request)
    done: list[Completion] = []
    first = None
    while engine.has_unfinished():
        done += engine.step()
        if done and first is None:
            first = time.perf_counter() - started
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    assert all(completion.error is None for completion in done), done[0].error
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "first_completion_s": first,
        "start_up_s": start_up,
        "warm_up_s": engine.describe().get("warm_up_s", 0.0),
        "stats": {name: value - before.get(name, 0.0) for name, value in engine.stats().items()},
        "engine": engine.describe(),
        "tokens": {completion.request_id: list(completion.token_ids) for completion in done},
    }


def run_vllm(
    variant: str, shape: ModelShape, requests: Sequence[Request], warm: Sequence[Request], args: argparse.Namespace
) -> dict[str, Any]:
    """vLLM, where it is installed. Its start-up includes reading the weights from a file, as it always does."""
    from jobs.benchmark import vllm

    started = time.perf_counter()
    dtype, on_gpu = args.dtype, args.device.startswith("cuda")
    llm = vllm.load(make_model(shape, "cpu", getattr(torch, dtype)), requests, on_gpu=on_gpu, dtype=dtype)
    vllm.run(llm, *vllm.prompts(warm))
    start_up = time.perf_counter() - started
    inputs, sampling = vllm.prompts(requests)
    started, cpu_started = time.perf_counter(), time.process_time()
    first, lengths = vllm.run(llm, inputs, sampling)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    wanted = {request.request_id: request.sampling.max_tokens for request in requests}
    assert lengths == wanted, f"vLLM gave {lengths}, asked for {wanted}"
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "first_completion_s": first, "start_up_s": start_up}


def make_engine(variant: str, model: Any, args: argparse.Namespace) -> Engine:
    """`ours`, or `reference-N` for `model.generate` in batches of N."""
    from pipeline.engine.weights import from_model

    kind, _, batch_size = variant.partition("-")
    if kind == "reference":
        from pipeline.engine.reference import ReferenceEngine

        options = EngineOptions("random", kind="transformers", batch_size=int(batch_size))
        return ReferenceEngine(from_model(model), options)
    from pipeline.engine.engine import NativeEngine

    return NativeEngine(from_model(model), EngineOptions("random", attention=args.attention))


def make_model(shape: ModelShape, device: str, dtype: torch.dtype) -> Any:
    """Random weights, the same in every process."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    third = shape.head_dim // 8
    sections = [shape.head_dim // 2 - 6 * third // 2, 3 * third // 2, 3 * third // 2]
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "depth": shape.vision_layers,
            "embed_dim": shape.vision_width,
            "num_heads": shape.vision_heads,
            "hidden_size": shape.hidden,
        },
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen2VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)


def make_requests(num_images: int, *, side: int | None, tokens: int | None, max_pixels: int | None) -> list[Request]:
    """Images of 240 to 640 pixels a side and 16 to 128 output tokens, or the side and tokens asked for."""
    rng = np.random.default_rng(0)
    requests = []
    for request_id in range(num_images):
        height, width = (side, side) if side else (int(x) for x in rng.integers(240, 641, 2))
        height, width = smart_resize(height, width, min_pixels=56 * 56, max_pixels=max_pixels or 12_845_056)
        grid = (1, height // 14, width // 14)
        patches = rng.integers(0, 256, (grid[1] * grid[2], PATCH_BYTES["image"]), dtype=np.uint8)
        medium = Medium("image", grid, patches)
        text = rng.integers(8, 4000, 25)
        ids = [*text[:12], VISION_START, *([IMAGE_PAD] * medium.num_visual_tokens), VISION_END, *text[12:]]
        sampling = SamplingParams(max_tokens=tokens or int(rng.integers(16, 129)), ignore_eos=True)
        requests.append(Request(request_id, np.asarray(ids, dtype=np.int32), (medium,), sampling))
    return requests


def count_flops(shape: ModelShape, requests: Sequence[Request]) -> tuple[float, float]:
    """Arithmetic of the workload: (vision and prefill, decode)."""
    before = decode = 0.0
    for request in requests:
        prompt = len(request.input_ids)
        before += sum(vision_flops(shape, medium.grid_thw) for medium in request.media) + prefill_flops(shape, prompt)
        decode += decode_flops(shape, prompt, request.sampling.max_tokens)
    return before, decode


def bound_seconds(shape: ModelShape, requests: Sequence[Request], flops_per_s: float, *, on_gpu: bool) -> float:
    """The least time the workload can take: arithmetic, and on a GPU the decode's memory traffic."""
    before, decode = count_flops(shape, requests)
    if not on_gpu:
        return (before + decode) / flops_per_s
    running = min(256, len(requests))
    traffic = sum(decode_bytes(shape, len(r.input_ids), r.sampling.max_tokens, running) for r in requests)
    return before / flops_per_s + max(decode / flops_per_s, traffic / GPU_BYTES_PER_S)


def measure_flops(dtype: torch.dtype) -> float:
    """What a large matrix product reaches on this CPU, in the kernel the engine would use."""
    from pipeline.engine.dense import needs_float32_matmul

    wide = torch.float32 if needs_float32_matmul(torch.device("cpu"), dtype) else dtype
    a, b = torch.randn(2048, 1024).to(wide), torch.randn(1024, 1024).to(wide)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * 2048 * 1024 * 1024 / best
