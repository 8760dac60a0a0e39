"""Actors for the benchmark `feed`: the engine first answers rows of the job's sizes alone; preprocessing waits for it.

Both rates are then of one engine in one process. Preprocessing begins no row before the engine takes rows: in a short
job it would be done while the engine starts, and nobody would see whether it keeps up. Knows the job's actors, and a
folder with the manifest and the checkpoint; not what is made of the measurement.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.checkpoint.families import FAMILIES
from pipeline.checkpoint.families.family import Family
from pipeline.engine import Engine, Medium, Request, SamplingParams
from pipeline.execution.actors import EngineActor, PreprocessActor
from pipeline.generate import GenerateOptions, GenerateStage
from pipeline.preprocess.size import smart_resize
from pipeline.preprocess.stage import PreprocessOptions
from pipeline.schema import UnitColumn

MEASURED = "alone.json"
MIN_PIXELS, MAX_PIXELS = 56 * 56, 12_845_056
"""As published for Qwen2-VL; the demo checkpoint, whose tokenizer the job has, was trained on tiny images."""
_TEXT_TOKENS = 25
"""Of a row besides its image, with the prompt of `feed`."""
_WARM_UP_ROWS, _WARM_UP_ROWS_CUDNN = 32, 288
"""cuDNN plans its calls once it has seen 270 frames of 1024x1024, in the middle of the measurement."""
_WAIT_S = 0.02


class MeasuredEngineActor(EngineActor):
    """The engine actor; goes in the place of `dataset.ENGINE_ACTOR`."""

    def make_stage(self, options: GenerateOptions) -> GenerateStage:
        stage = super().make_stage(options)
        folder = Path(options.engine.model_path).parent
        written = folder / f"{MEASURED}.part"
        written.write_text(json.dumps(_measure(stage._engine, folder)))
        written.rename(folder / MEASURED)
        return stage


class WaitingPreprocessActor(PreprocessActor):
    """The preprocessing actor; goes in the place of `dataset.PREPROCESS_ACTOR`."""

    def __init__(self, options: PreprocessOptions, *args: Any) -> None:
        super().__init__(options, *args)
        folder = Path(options.model_path).parent
        self._measured = folder / MEASURED
        row = pq.read_table(folder / "manifest.parquet").slice(0, 1)
        for name in UnitColumn:
            row = row.append_column(name, pa.array([0]))
        self._stage(row)  # the decoder process starts: that belongs to the start-up
        self._stage._busy_s = 0.0

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        while not self._measured.exists():
            time.sleep(_WAIT_S)
        yield from super().__call__(block)


def _measure(engine: Engine, folder: Path) -> dict[str, Any]:
    """The engine's pace with all of the manifest's rows there from the start, as random patches."""
    from jobs.benchmark.engine import run_once  # imports torch

    started = time.perf_counter()
    rows = pq.read_table(folder / "manifest.parquet").to_pylist()
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    family, image_token = FAMILIES[config["model_type"]], config["image_token_id"]
    rng = np.random.default_rng(0)
    requests = [_request(number, row, family, image_token, rng) for number, row in enumerate(rows)]
    few = _WARM_UP_ROWS_CUDNN if engine.describe().get("vision_attention") == "cudnn" else _WARM_UP_ROWS
    short = [{**row, "max_tokens": 3} for row in rows[:few]]
    engine.generate([_request(number, row, family, image_token, rng) for number, row in enumerate(short)])
    for request in requests:
        _ = request.media[0].content_key  # kept by the medium; in a job the stage's threads compute it
    before = engine.stats()
    seconds = run_once(engine, requests)["seconds"]
    return {
        "stats": [before, engine.stats()],
        "images_per_s": len(requests) / seconds,
        "prompt_tokens": sum(len(request.input_ids) for request in requests),
        "all_seconds": time.perf_counter() - started,
    }


def _request(number: int, row: dict[str, Any], family: Family, image_token: int, rng: np.random.Generator) -> Request:
    bounds = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}
    height, width = smart_resize(row["height"], row["width"], factor=family.factor, **bounds)
    grid = (1, height // family.patch_size, width // family.patch_size)
    patches = rng.integers(0, 256, (grid[1] * grid[2], family.patch_bytes("image")), dtype=np.uint8)
    medium = Medium("image", grid, patches)
    text = list(range(_TEXT_TOKENS))
    ids = [*text[:12], *[image_token] * medium.num_visual_tokens, *text[12:]]
    sampling = SamplingParams(max_tokens=row["max_tokens"], ignore_eos=True)
    return Request(number, np.asarray(ids, dtype=np.int32), (medium,), sampling)
