"""Measure the engine against its peers: one seeded workload, random weights, one process for each engine.

    python -m jobs.benchmark engine                                     shape small on this machine
    python -m jobs.benchmark engine --shape 2b --side 1024 --tokens 100 --images 1024
    python -m jobs.benchmark engine --shape qwen3-vl-8b --rows video --images 64 --peers none

Shapes are those of the published checkpoints, Qwen2-VL's with plain sizes, and of models that a CPU runs: small
(Qwen2-VL), tiny, tiny-2.5 and tiny-3. Needs torch, transformers and numpy alone. The media are random patches, made
and hashed before the clock starts, as the job's stages do: this measures engines, not image decoding. Each engine has
answered one row and run one full-size pass before. Output lengths are fixed for each row, so every engine does the
same work.

    images_per_s          rows / seconds from the first request to the last completion; one image a row, unless --rows
    passes                seconds of each kind of pass, on a GPU the device's own, and the share of their bound
    mfu                   arithmetic of the workload / seconds / what a large matrix product reaches here
    peak_memory_gb        on a GPU without the key-value cache; on a CPU all that the process used
    cpu_seconds           processor time of the run: on a busy machine a fairer measure than the clock
    share_of_limit        the same against the workload's own bound: on a GPU the decode's memory traffic too

With --repeats N the run in the middle counts. With --rounds N all engines run N times in turns, and each ratio is the
median of its rounds: on a machine whose speed drifts the only fair comparison. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from jobs.benchmark.measure import command_line, in_own_process, peak_mb, print_result
from jobs.benchmark.model import SHAPES, family_of, make_model
from jobs.benchmark.passes import PassTimes, print_shares, shares, trace_steps
from jobs.benchmark.torchvision import define_missing_operators
from jobs.benchmark.workload import (
    ROWS,
    bound_seconds,
    draw_requests,
    make_requests,
    measure_ceilings,
    total_flops,
)
from pipeline.checkpoint.families.qwen2_vl import QWEN2_VL
from pipeline.engine import Completion, Engine, EngineOptions, Request
from pipeline.engine.settings import EngineSettings
from pipeline.planning.roofline import ModelShape

PARTS = (
    "gpu",
    "attention",
    "vision_attention",
    "prefill_attention",
    "attention_ms",
    "kernels",
    "cuda_graphs",
    "replaced",
    "max_running",
    "cache_tokens",
)
SETTINGS = [field.name for field in fields(EngineSettings) if field.name not in ("kind", "batch_size")]
REPORTED = (
    *("output_tokens_per_s", "seconds", "all_seconds", "cpu_seconds", "first_completion_s", "start_up_s", "warm_up_s"),
    *("peak_memory_gb", "cache_gb", "mfu", "share_of_limit", "ceilings", "stats", "engine"),
)
# `model.generate` is slow, so it gets fewer rows of the same workload.
PEER_IMAGES_ON_GPU = 128


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    print(
        f"shape {args.shape}, {args.dtype}, {args.images} rows ({args.rows}), device {args.device}, "
        f"torch {torch.__version__}"
    )
    peers = args.peers.split(",")
    sizes = args.batch_sizes.split(",") if "reference" in peers else []
    variants = ["ours", *(f"reference-{size}" for size in sizes)]
    if "vllm" in peers and _has_vllm(args):
        variants.append("vllm")
    rounds = [_measure_round(variants, args) for _ in range(args.rounds)]
    if not all(rounds):
        return 1
    rates = [each["ours"]["images_per_s"] for each in rounds]
    vllm = [each["vllm"]["images_per_s"] if "vllm" in each else None for each in rounds]
    best = [
        max((each[name]["images_per_s"] for name in each if name.startswith("reference")), default=None)
        for each in rounds
    ]
    first = rounds[0]
    ours, references = first["ours"], {size: first.get(f"reference-{size}") for size in sizes}
    # Greedy tokens of one row alone, where that was run; bfloat16 may differ at near-ties.
    truth = references.get("1") or next(filter(None, references.values()), None)
    print_result(
        "engine",
        shape=args.shape,
        device=args.device,
        dtype=args.dtype,
        rows=args.rows,
        images=args.images,
        ours_images_per_s=rates,
        peer_images=min(args.images, args.peer_images),
        reference_images_per_s={size: each and each["images_per_s"] for size, each in references.items()},
        reference_cpu_seconds={size: each and each["cpu_seconds"] for size, each in references.items()},
        vllm_images_per_s=vllm,
        vllm_start_up_s=first["vllm"]["start_up_s"] if "vllm" in first else None,
        ratio_to_vllm=_median_ratio(rates, vllm),
        ratio_to_best_reference=_median_ratio(rates, best),
        mismatched_rows=truth and sum(ours["tokens"][i] != truth["tokens"][i] for i in truth["tokens"]),
        passes={kind: asdict(share) for kind, share in ours["passes"].items()},
        **{name: ours[name] for name in REPORTED},
    )
    return 0


def _measure_round(variants: Sequence[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each engine once, one after the other; without those that fail, and empty where ours does."""
    fewer = argparse.Namespace(**{**vars(args), "images": min(args.images, args.peer_images)})
    found: dict[str, dict[str, Any]] = {}
    for variant in variants:
        result = _measure_in_own_process(variant, fewer if variant.startswith("reference") else args)
        if result is not None:
            found[variant] = result
        elif variant == "ours":
            return {}
    return found


def _median_ratio(rates: Sequence[float], others: Sequence[float | None]) -> float | None:
    """Of rates measured in the same rounds."""
    ratios = [rate / other for rate, other in zip(rates, others, strict=True) if other]
    return statistics.median(ratios) if ratios else None


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, with the defaults of their device."""
    parser = command_line("engine", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--peers", help="of: reference, vllm; or none. Default: both; on a GPU reference")
    parser.add_argument("--batch-sizes", help="of the reference engine. Default: 1,8,32; on a GPU 32")
    parser.add_argument("--peer-images", type=int, help="rows for the reference engine at most. Default: on a GPU 128")
    parser.add_argument("--rows", choices=ROWS, default="image", help="what each row holds")
    parser.add_argument("--images", type=int, help="number of rows. Default: 64; on a GPU 1024")
    parser.add_argument("--side", type=int, help="square images of this side instead of 240 to 640")
    parser.add_argument("--tokens", type=int, help="output tokens of every row instead of 16 to 128")
    parser.add_argument("--max-pixels", type=int, help="of an image. Default: 200704 unless --side or mixed rows")
    parser.add_argument("--repeats", type=int, default=1, help="runs of our engine; the median counts")
    parser.add_argument("--rounds", type=int, default=1, help="runs of all engines in turns")
    parser.add_argument(
        "--trace", type=Path, metavar="FOLDER", help="after the runs, trace passes with prompts and decode passes"
    )
    parser.add_argument("--threads", type=int, help="torch threads on a CPU")
    for name in SETTINGS:
        parser.add_argument(f"--engine.{name}", metavar="VALUE", type=_value, help="as in a job's config")
    args = parser.parse_args(argv)
    on_gpu = args.device.startswith("cuda")
    defaults = {
        "peers": "reference" if on_gpu else "reference,vllm",
        "batch_sizes": "32" if on_gpu else "1,8,32",
        "images": 1024 if on_gpu else 64,
        "max_pixels": None if args.side or args.rows == "mixed" else 256 * 28 * 28,
    }
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.peer_images is None:
        args.peer_images = PEER_IMAGES_ON_GPU if on_gpu else args.images
    try:
        _options(args)
    except ValueError as error:
        parser.error(f"--engine.{error}")
    return args


def _value(text: str) -> Any:
    """A number, true, false or null; any other text is itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _options(args: argparse.Namespace) -> EngineOptions:
    given = {name: vars(args)[f"engine.{name}"] for name in SETTINGS}
    return EngineOptions("random", **{name: value for name, value in given.items() if value is not None})


def _has_vllm(args: argparse.Namespace) -> bool:
    from jobs.benchmark.vllm import HOW_TO, importable

    if args.rows != "image" or family_of(SHAPES[args.shape]) is not QWEN2_VL:
        print("vllm           not measured: it is compared on Qwen2-VL and rows of one image")
        return False
    if reason := importable():
        print(f"vllm           not measured: {reason}\n{HOW_TO}")
    return reason is None


def _measure_in_own_process(variant: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """Measure one engine and print a line about it; None where it fails."""
    try:
        result = in_own_process(measure, variant, args)
    except Exception as error:  # one engine may fail or be killed for memory: the others are measured all the same
        print(f"{variant:14} failed: {error}", flush=True)
        return None
    print(
        f"{variant:14} {result['images_per_s']:7.2f} {'images' if args.rows == 'image' else 'rows'}/s "
        f"{result['output_tokens_per_s']:8.1f} tokens/s   "
        f"cpu {result['cpu_seconds']:7.1f} s   first {result['first_completion_s']:6.1f} s   "
        f"start-up {result['start_up_s']:5.1f} s (warm-up {result.get('warm_up_s', 0.0):.1f} s)   "
        f"peak {result['peak_memory_gb']:5.2f} GB (cache {result.get('cache_gb', 0.0):.2f} GB)   "
        f"MFU {result['mfu']:5.1%}   of limit {result['share_of_limit']:5.1%}",
        flush=True,
    )
    if "engine" in result:
        print(f"  parts    {parts(result['engine'])}", flush=True)
    if "passes" in result:
        print_shares(result["passes"], args.images)
    return result


def parts(described: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {described[name]}" for name in PARTS if name in described)


def measure(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """One engine in this process: load, warm up, run the workload."""
    define_missing_operators()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, on_gpu = torch.device(args.device), args.device.startswith("cuda")
    shape = SHAPES[args.shape]
    ceilings = measure_ceilings(device, getattr(torch, args.dtype))
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    requests = _requests(args, args.images)
    run = run_vllm if variant == "vllm" else run_engine
    measured = run(variant, shape, requests, args)
    seconds = measured["seconds"]
    bounds = bound_seconds(shape, requests, ceilings, running=measured.get("max_running", 256), on_gpu=on_gpu)
    if "pass_seconds" in measured:
        times, counts = measured["pass_seconds"], measured["pass_counts"]
        measured["passes"] = shares(times, counts, bounds, total=seconds)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else peak_mb() * 1024**2 / 1e9
    return {
        "images_per_s": len(requests) / seconds,
        "peak_memory_gb": peak - (measured.get("cache_gb", 0.0) if on_gpu else 0.0),
        "output_tokens_per_s": sum(request.sampling.max_tokens for request in requests) / seconds,
        "mfu": total_flops(shape, requests) / seconds / ceilings.flops,
        "share_of_limit": sum(bounds.values()) / seconds,
        "ceilings": ceilings._asdict(),
        **measured,
    }


def _requests(args: argparse.Namespace, count: int, **changes: Any) -> list[Request]:
    settings = {name: getattr(args, name) for name in ("rows", "side", "tokens", "max_pixels")}
    return make_requests(count, **{"family": family_of(SHAPES[args.shape]), **settings, **changes})


def run_engine(
    variant: str, shape: ModelShape, requests: Sequence[Request], args: argparse.Namespace
) -> dict[str, Any]:
    """One of our own engines. All requests are there from the start, as in a batch job."""
    from pipeline.engine.engine import NativeEngine

    started = time.perf_counter()
    engine = make_engine(variant, make_model(shape, args.device, getattr(torch, args.dtype)), args)
    engine.generate(first_row(shape))
    start_up = time.perf_counter() - started
    described = engine.describe()
    engine.generate(_full_pass(args, described))
    for request in requests:
        for medium in request.media:
            _ = medium.content_key  # kept by the medium; in a job the stage's threads compute it
    passes = PassTimes(engine) if isinstance(engine, NativeEngine) else None
    runs = []
    for _ in range(args.repeats if passes else 1):
        runs.append(run_once(engine, requests))
        if passes:
            runs[-1] |= {"pass_seconds": passes.seconds(), "pass_counts": passes.counts()}
            passes.reset()
    median = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
    if args.trace and isinstance(engine, NativeEngine):
        # A profiler may fail or hang on a new machine: the number is then on the screen already.
        print(f"  measured {len(requests) / median['seconds']:.2f} rows/s; tracing", flush=True)
        try:
            trace_steps(engine, requests, args.trace)
        except Exception as error:
            print(f"  measured, but not traced: {type(error).__name__}: {error}", flush=True)
    return {
        **median,
        "all_seconds": [run["seconds"] for run in runs],
        "start_up_s": start_up,
        "warm_up_s": described.get("warm_up_s", 0.0),
        "cache_gb": described.get("cache_bytes", 0) / 1e9,
        "max_running": described.get("max_running", 256),
        "engine": described,
    }


def run_once(engine: Engine, requests: Sequence[Request]) -> dict[str, Any]:
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
    errors = [completion.error for completion in done if completion.error is not None]
    assert not errors, f"{len(errors)} of {len(done)} rows failed, the first with {errors[0]}"
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "first_completion_s": first,
        "stats": {name: value - before.get(name, 0.0) for name, value in engine.stats().items()},
        "tokens": {completion.request_id: list(completion.token_ids) for completion in done},
    }


def first_row(shape: ModelShape) -> list[Request]:
    """What an engine answers before its start-up counts as done."""
    return make_requests(1, family=family_of(shape), side=224, tokens=3)


def _full_pass(args: argparse.Namespace, described: dict[str, Any]) -> list[Request]:
    """Rows of the workload's kind, but not its own, that fill one prefill pass or one static batch: the first pass of
    its size allocates memory and loads kernels. On a CPU a static batch has nothing to gain from it."""
    if "batch_size" in described:
        return _requests(args, described["batch_size"], tokens=3, seed=1) if args.device.startswith("cuda") else []
    rows: list[Request] = []
    family = family_of(SHAPES[args.shape])
    drawn = draw_requests(family=family, rows=args.rows, side=args.side, tokens=3, max_pixels=args.max_pixels, seed=1)
    while sum(len(row.input_ids) for row in rows) < described["max_batch_tokens"]:
        rows.append(next(drawn))
    return rows


def run_vllm(variant: str, shape: ModelShape, requests: Sequence[Request], args: argparse.Namespace) -> dict[str, Any]:
    """vLLM, where it is installed. Its start-up includes reading the weights from a file, as it always does."""
    from jobs.benchmark import vllm

    started = time.perf_counter()
    dtype, on_gpu = args.dtype, args.device.startswith("cuda")
    llm = vllm.load(make_model(shape, "cpu", getattr(torch, dtype)), requests, on_gpu=on_gpu, dtype=dtype)
    vllm.run(llm, *vllm.prompts(first_row(shape)))
    start_up = time.perf_counter() - started
    vllm.run(llm, *vllm.prompts(_full_pass(args, {"max_batch_tokens": 16384 if on_gpu else 2048})))
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

    return NativeEngine(from_model(model), _options(args))
