"""Does preprocessing feed the engine? The whole job on JPEG files, against its engine alone.

    python -m jobs.benchmark feed --shape 2b                       on a GPU machine
    python -m jobs.benchmark feed --shape small --large 8 --small 16 --tokens 20 --actors 1

A checkpoint of random weights with the demo's tokenizer, and two jobs: large images of one size, and small ones of 240
to 640 pixels a side. In each, the engine answers random patches of the same sizes first, with all rows there from the
start; only then preprocessing begins, and the job's pace counts from its first row to its last. Last line: JSON.

    waited       seconds in which the engine had no row, and seconds of steps times the share of its places that were
                 free while no row was waiting; the end of the job, when the last rows are in it, is not counted
    cores        processor cores that prepare rows at the pace of the engine alone
    steps        passes of the job and of the engine alone, and the host's seconds in each kind of pass: more seconds
                 for as many passes mean that the engine's thread waits for others of its process
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jobs.benchmark.measure import command_line, in_own_process, print_result

# Whatever imports torch is imported where it is needed: the processes that draw images do without.
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SPECIAL_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_END_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PROMPT = "Describe the image."
_STEPS = ("passes", "seconds_vision", "seconds_prefill", "seconds_decode")


def main(argv: Sequence[str]) -> int:
    parser = command_line("feed", __doc__)
    parser.add_argument("--shape", default="small", help="as of the benchmark `engine`")
    parser.add_argument("--large", type=int, default=384, help="large images; 0 leaves that job out")
    parser.add_argument("--small", type=int, default=1536, help="small images; 0 leaves that job out")
    parser.add_argument("--side", type=int, default=1024, help="of large images")
    parser.add_argument("--tokens", type=int, default=100, help="output tokens of every row")
    parser.add_argument("--actors", type=int, help="resources.preprocess_actors. Default: the job's own")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    kinds = {
        "large": [(args.side, args.side)] * args.large,
        "small": [(int(height), int(width)) for height, width in rng.integers(240, 641, (args.small, 2))],
    }
    kinds = {kind: sizes for kind, sizes in kinds.items() if sizes}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(1) as background:
        folder = Path(temporary)
        checkpoint = background.submit(in_own_process, write_checkpoint, folder / "checkpoint", args.shape)
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            for kind, sizes in kinds.items():
                write_rows(folder / kind, sizes, args.tokens, pool)
        from jobs.benchmark.alone import MeasuredEngineActor, WaitingPreprocessActor
        from pipeline.config import ResourcesConfig
        from pipeline.execution import dataset
        from pipeline.execution.cluster import ray_cluster

        dataset.ENGINE_ACTOR, dataset.PREPROCESS_ACTOR = MeasuredEngineActor, WaitingPreprocessActor
        with ray_cluster(ResourcesConfig(address="local"), print):  # one for both jobs, begun beside the checkpoint
            checkpoint.result()
            for kind in kinds:
                found[kind] = _run_job(folder, kind, args.actors)
                print(_line(kind, found[kind]), flush=True)
    print_result("feed", shape=args.shape, cpus=os.cpu_count(), tokens=args.tokens, **found)
    return 0


def write_checkpoint(folder: Path, shape: str) -> None:
    """A model of random weights whose special tokens are those of the demo's tokenizer, and that tokenizer."""
    import torch

    from jobs.benchmark.model import SHAPES, family_of, make_model
    from pipeline.demo import CHECKPOINT

    model = make_model(SHAPES[shape], "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
    tokens = json.loads((CHECKPOINT / "config.json").read_text())
    for name in _SPECIAL_TOKENS:
        setattr(model.config, name, tokens[name])
    for name in _END_TOKENS:
        setattr(model.config.text_config, name, tokens[name])
        setattr(model.generation_config, name, tokens[name])
    model.save_pretrained(folder)
    for name in _FILES:
        shutil.copy(CHECKPOINT / name, folder)
    processor = {"patch_size": family_of(SHAPES[shape]).patch_size}  # the rest is as published, or the job's settings
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def write_rows(folder: Path, sizes: Sequence[tuple[int, int]], tokens: int, pool: Executor) -> None:
    """JPEG files of these heights and widths, their manifest, and a link to the checkpoint."""
    folder.mkdir()
    (folder / "checkpoint").symlink_to(folder.parent / "checkpoint")
    paths = [folder / f"{number}.jpg" for number in range(len(sizes))]
    list(pool.map(_write_image, paths, sizes, range(len(sizes)), chunksize=16))
    rows: dict[str, list[Any]] = {"image": [path.name for path in paths], "prompt": [_PROMPT] * len(sizes)}
    rows |= {"height": [size[0] for size in sizes], "width": [size[1] for size in sizes]}
    pq.write_table(pa.table({**rows, "max_tokens": [tokens] * len(sizes)}), folder / "manifest.parquet")


def _write_image(path: Path, size: tuple[int, int], seed: int) -> None:
    """Soft shapes with a little noise: about the bytes and the work of a photograph."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    pixels = np.asarray(soft.resize(size[::-1], Image.Resampling.BICUBIC)).astype(np.int16)
    pixels += rng.integers(-9, 10, pixels.shape, dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    path.write_bytes(file.getvalue())


def _run_job(folder: Path, kind: str, actors: int | None) -> dict[str, Any]:
    from jobs.benchmark.alone import MAX_PIXELS, MEASURED, MIN_PIXELS
    from jobs.benchmark.engine import parts
    from jobs.benchmark.job import run_caption

    settings: dict[str, object] = {
        "input.path": folder / kind / "manifest.parquet",
        "input.settings": "[max_tokens]",
        "output.path": folder / kind / "out",
        "output.report": "false",
        "model.path": folder / kind / "checkpoint",
        "model.dtype": "bfloat16",
        "sampling.ignore_eos": "true",
        "media.min_pixels": MIN_PIXELS,
        "media.max_pixels": MAX_PIXELS,
    }
    record = run_caption(settings | ({"resources.preprocess_actors": actors} if actors else {}))
    alone = json.loads((folder / kind / MEASURED).read_text())
    counts, pace = record["counts"], record["throughput"]
    if counts["failed"]:
        raise SystemExit(f"{counts['failed']} of {counts['rows']} rows failed: {record['errors']}")
    stages: list[dict[str, Any]] = record["stages"]
    (engine,) = (stage for stage in stages if stage["kind"] == "engine")
    busy = [stage["busy_s"] for stage in stages if stage["kind"] == "preprocess"]
    seconds = counts["rows"] / pace["rows_per_s"]
    return {
        "rows": counts["rows"],
        "job_rows_per_s": pace["rows_per_s"],
        "alone_rows_per_s": alone["images_per_s"],
        "ratio": pace["rows_per_s"] / alone["images_per_s"],
        "seconds": seconds,
        "engine_busy_s": engine["busy_s"],
        "idle_s": engine["idle_s"],
        "unfilled_s": engine["unfilled_s"],
        "actors": len(busy),
        "busy_share": sum(busy) / len(busy) / seconds,
        "cores": sum(busy) / counts["rows"] * alone["images_per_s"],
        "start_up_s": pace["seconds"] - seconds - alone["all_seconds"],
        "prompt_tokens": [pace["prompt_tokens"], alone["prompt_tokens"]],
        "output_tokens": pace["output_tokens"],
        "steps": {"job": _steps(alone["stats"][1], engine), "alone": _steps(*alone["stats"])},
        "engine": parts(record["engine"]),
    }


def _steps(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {name: round(after[name] - before[name], 3) for name in _STEPS}


def _line(kind: str, result: Mapping[str, Any]) -> str:
    return (
        f"{kind}  job {result['job_rows_per_s']:.2f} rows/s, engine alone {result['alone_rows_per_s']:.2f}, ratio "
        f"{result['ratio']:.3f}; engine waited {result['idle_s']:.2f} + {result['unfilled_s']:.2f} s, worked "
        f"{result['engine_busy_s']:.1f} of {result['seconds']:.1f} s; {result['actors']} preprocessing actors "
        f"{result['busy_share']:.0%} busy, {result['cores']:.2f} cores feed it; {result['output_tokens']} tokens; "
        f"start-up and end {result['start_up_s']:.1f} s\n  parts    {result['engine']}"
        + "".join(f"\n  steps    {name:5}  {steps}" for name, steps in result["steps"].items())
    )
