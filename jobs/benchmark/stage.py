"""Preprocessing through Ray against the same function in plain loops: what does moving the rows cost?

    python -m jobs.benchmark stage [--images 6000] [--actors 2]

Photographs of 1024 x 1024 pixels; an engine actor that answers at once. The loops run in as many processes as Ray has
actors, side by side, so that both sides have the same cores. Start-up is left out of both: of Ray's side by running a
quarter of the images too, and taking the difference. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_DISTINCT = 24


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.benchmark stage", description=__doc__)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--block-mb", type=float, default=128.0, help="resources.block_mb")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        few = args.images // 4
        manifest = _write_manifest(Path(folder), args.images)
        loop = _loops(manifest, args.actors)
        seconds = [
            _through_ray(manifest, Path(folder, f"out{images}"), images, args.actors, args.block_mb)
            for images in (few, args.images)
        ]
        ray = (args.images - few) / (seconds[1] - seconds[0])
    print(f"plain loops  {loop:8.1f} images/s in {args.actors} processes")
    print(f"through Ray  {ray:8.1f} images/s in {args.actors} actors")
    print(f"ratio        {ray / loop:8.2f}")
    result = {"benchmark": "stage", "images": args.images, "actors": args.actors}
    print(json.dumps({**result, "loop_images_per_s": loop, "ray_images_per_s": ray, "ratio": ray / loop}))
    return 0


def _write_manifest(folder: Path, images: int) -> Path:
    from jobs.benchmark.media import make_photo

    names = []
    for number in range(_DISTINCT):
        names.append(f"{number}.jpg")
        (folder / names[-1]).write_bytes(make_photo(1024 + 4 * number, 1024))
    path = folder / "manifest.parquet"
    pq.write_table(pa.table({"image": [names[n % _DISTINCT] for n in range(images)], "prompt": ["?"] * images}), path)
    return path


def _words(manifest: Path, output: Path) -> dict[str, str]:
    return {
        "input.path": str(manifest),
        "output.path": str(output),
        "model.path": "demo",
        "media.max_pixels": "1073296",
    }


def _loops(manifest: Path, processes: int) -> float:
    """Images/s of the stage in so many processes at once, each over all rows."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    queue = context.Queue()
    workers = [context.Process(target=_loop, args=(manifest, barrier, queue)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    rates: list[float] = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    return sum(rates)


def _loop(manifest: Path, barrier: Any, queue: Any) -> None:
    import torch

    from pipeline.config import CaptionConfig, load_config
    from pipeline.execution.stages import open_stages
    from pipeline.manifest.work import read_work
    from pipeline.preprocess.stage import PreprocessStage

    torch.set_num_threads(1)
    config = load_config(CaptionConfig, None, _words(manifest, manifest.parent / "loop"))
    opened = open_stages(config)
    stages, spec, work = opened.stages, opened.manifest.spec, opened.whole_manifest()
    stage = PreprocessStage(stages.preprocess)
    first, *rest = work
    stage(read_work(spec, first, stages.columns))
    barrier.wait()
    started, rows = time.perf_counter(), 0
    for one in rest:
        for table in stage.tables(read_work(spec, one, stages.columns), 8 << 20, 1 << 62):
            rows += table.num_rows
    queue.put(rows / (time.perf_counter() - started))
    stage.close()


def _through_ray(manifest: Path, output: Path, images: int, actors: int, block_mb: float) -> float:
    """Seconds of a whole run over so many images."""
    from jobs.benchmark.stand_in import AnswerAtOnce
    from jobs.caption import main as caption
    from pipeline.execution import dataset

    dataset.ENGINE_ACTOR = AnswerAtOnce
    words = {
        **_words(manifest, output),
        "input.limit": str(images),
        "output.report": "false",
        "resources.num_cpus": str(actors),
        "resources.preprocess_actors": str(actors),
        "resources.preprocess_cpus": "0.8",
        "resources.engine_cpus": "0.1",
        "resources.block_mb": str(block_mb),
    }
    code = caption([word for name, value in words.items() for word in (f"--{name}", value)])
    assert code == 0
    return float(json.loads((output / "run.json").read_text())["throughput"]["seconds"])
