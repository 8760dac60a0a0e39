"""Preprocessing through Ray against the same function in plain loops: what does moving the rows cost?

    python -m jobs.benchmark stage [--images 6000] [--actors 2]

Photographs of 1024 x 1024 pixels, and an engine actor that answers at once. The loops run in as many processes as Ray
has actors, side by side, so that both have the same cores. Start-up is left out of both: for Ray, a run over a quarter
of the images is subtracted. Last line: JSON.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Barrier

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.benchmark.job import run_caption, stages_and_rows
from jobs.benchmark.measure import command_line, print_result

_DISTINCT = 24


def main(argv: Sequence[str]) -> int:
    parser = command_line("stage", __doc__)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--block-mb", type=float, default=128.0, help="resources.block_mb")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        few = args.images // 4
        manifest = _write_manifest(Path(folder), args.images)
        loop = _loop_rates(manifest, args.actors)
        seconds = [_ray_seconds(manifest, images, args.actors, args.block_mb) for images in (few, args.images)]
    ray = (args.images - few) / (seconds[1] - seconds[0])
    print(f"plain loops  {loop:8.1f} images/s in {args.actors} processes")
    print(f"through Ray  {ray:8.1f} images/s in {args.actors} actors")
    print(f"ratio        {ray / loop:8.2f}")
    counts = {"images": args.images, "actors": args.actors}
    print_result("stage", **counts, loop_images_per_s=loop, ray_images_per_s=ray, ratio=ray / loop)
    return 0


def _write_manifest(folder: Path, images: int) -> Path:
    from jobs.benchmark.media import make_photo  # imports PIL and av

    names = [f"{number}.jpg" for number in range(_DISTINCT)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(make_photo(1024 + 4 * number, 1024))
    path = folder / "manifest.parquet"
    pq.write_table(pa.table({"image": [names[n % _DISTINCT] for n in range(images)], "prompt": ["?"] * images}), path)
    return path


def _settings(manifest: Path, output: str) -> dict[str, object]:
    paths = {"input.path": manifest, "output.path": manifest.parent / output}
    return {**paths, "model.path": "demo", "media.max_pixels": 1_073_296}


def _loop_rates(manifest: Path, processes: int) -> float:
    """Images/s of the stage in so many processes at once, each over all rows."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(processes, mp_context=context) as pool:
        barrier = manager.Barrier(processes)
        return sum(pool.map(_loop_rate, [manifest] * processes, [barrier] * processes))


def _loop_rate(manifest: Path, barrier: Barrier) -> float:
    import torch

    from pipeline.preprocess.stage import PreprocessStage

    torch.set_num_threads(1)
    stages, tables = stages_and_rows(_settings(manifest, "loop"), rows_per_table=32)
    stage = PreprocessStage(stages.preprocess)
    stage(next(tables))
    barrier.wait()
    started, rows = time.perf_counter(), 0
    for table in tables:
        rows += sum(requests.num_rows for requests in stage.tables(table, 8 << 20, 1 << 62))
    seconds = time.perf_counter() - started
    stage.close()
    return rows / seconds


def _ray_seconds(manifest: Path, images: int, actors: int, block_mb: float) -> float:
    """Seconds of a whole run over so many images."""
    from jobs.benchmark.fake_engine import FakeEngineActor
    from pipeline.execution import dataset

    dataset.ENGINE_ACTOR = FakeEngineActor
    record = run_caption(
        {
            **_settings(manifest, f"out{images}"),
            "input.limit": images,
            "output.report": "false",
            "resources.num_cpus": actors,
            "resources.preprocess_actors": actors,
            "resources.preprocess_cpus": 0.8,
            "resources.engine_cpus": 0.1,
            "resources.block_mb": block_mb,
        }
    )
    return float(record["throughput"]["seconds"])
