"""Run folders for the report's tests: small real files with results, scores, pictures, and hostile strings."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.settings import ScoringSettings
from pipeline.results.reader import RunReader
from pipeline.schema import result_schema

HOSTILE = (
    "<script>document.title='pwned'</script>",
    '"><img src=x onerror="document.title=\'pwned\'">',
    "'><svg/onload=document.title='pwned'>",
    "{{ 7 * 7 }}{% raw %}",
    "</style><style>body{display:none}</style>",
    "javascript:document.title='pwned'",
    "\u202egnp.txt\u0000\u001b[31m",
    "\ud800 lone surrogate".encode("utf-8", "replace").decode(),
    "https://example.com/a.png?X-Amz-Signature=deadbeef",
)

KEPT = pa.schema([("prompt", pa.string()), ("reference", pa.string()), ("task", pa.string()), ("source", pa.string())])
RUN: dict[str, Any] = {
    "state": "finished",
    "config": {
        "input": {"path": "held_out.parquet", "storage_options": {"key": "AKIA-REAL", "endpoint_url": "http://minio"}},
        "prompt": {"template": None, "system": None},
        "sampling": {"temperature": 0.0, "max_tokens": 64, "seed": None},
        "model": {"path": "Qwen/Qwen2-VL-2B-Instruct"},
    },
    "manifest": {"path": "held_out.parquet", "fingerprint": {"num_rows": 60, "files": [["held_out.parquet", 9, 60]]}},
    "model": {"path": "Qwen/Qwen2-VL-2B-Instruct", "revision": "895c3a4"},
    "engine": {"kind": "native", "dtype": "bfloat16", "device": "cuda", "attention": "flash", "gpu": "NVIDIA H200",
               "kernels": "eager", "cuda_graphs": True, "replaced": {"kernels fused": "RuntimeError: no C compiler"}},
    "placement": {"engine_actors": 2, "gpus_per_engine": 1.0},
    "versions": {
        "qwen2-vl-batch": "0.1.0",
        "commit": "0123456789abcdef-dirty",
        "torch": "2.13.0",
        "transformers": "5.23.0",
    },
    "hardware": {"cpus": 16, "processor": "Some CPU", "system": "Linux"},
    "started": "2026-05-01T12:00:00+00:00",
    "finished": "2026-05-01T12:30:00+00:00",
    "throughput": {
        "rows_per_s": 41.5, "output_tokens_per_s": 1234.5, "seconds": 1800.0, "prompt_tokens": 90_000_000,
        "visual_tokens": 70_000_000, "output_tokens": 2_000_000,
    },
    "bottleneck": "preprocessing held the engine back for 26% of the time",
    "stages": [
        {"kind": "preprocess", "busy_s": 1500.0}, {"kind": "preprocess", "busy_s": 1400.0},
        {"kind": "engine", "busy_s": 1300.0, "idle_s": 500.0}, {"kind": "engine", "busy_s": 1350.0, "idle_s": 450.0},
    ],
}  # fmt: skip
TASKS = ("colour", "count", "caption", "video")


def make_image(path: Path, number: int) -> str:
    """A small picture that differs from its neighbours."""
    generator = random.Random(number)
    image = Image.new("RGB", (320, 200 + 40 * (number % 4)), (40 + 25 * (number % 8), 90, 200 - 20 * (number % 8)))
    draw = ImageDraw.Draw(image)
    for _ in range(5):
        x, y = generator.randrange(260), generator.randrange(150)
        draw.ellipse((x, y, x + 60, y + 60), fill=tuple(generator.randrange(256) for _ in range(3)))
    image.save(path)
    return str(path)


def medium(kind: str, source: str, width: int = 320, height: int = 240) -> dict[str, Any]:
    """A receipt."""
    return {
        "kind": kind, "source": source, "source_width": width, "source_height": height, "resized_width": 308,
        "resized_height": 252, "grid_thw": [2 if kind == "video" else 1, 18, 22],
        "timestamps": [0.0, 0.5, 1.0, 1.5] if kind == "video" else None, "note": None,
    }  # fmt: skip


def result_row(number: int, **changes: Any) -> dict[str, Any]:
    """An ordinary row; `changes` make it another."""
    task = TASKS[number % 4]
    row: dict[str, Any] = {
        "id": f"row-{number:04d}", "text": f"answer {number % 7}", "texts": None, "finish_reason": "stop",
        "num_output_tokens": 5 + number % 23, "logprobs": None, "generate_s": 0.1 + 0.01 * (number % 31),
        "status": "ok", "error_stage": None, "error_type": None, "error_message": None, "attempts": 1,
        "num_prompt_tokens": 120 + number % 50, "num_visual_tokens": 99, "media": [], "prompt_hash": "abc",
        "preprocess_s": 0.02, "prompt": f"What is shown in {task} {number}?", "reference": f"answer {number % 6}",
        "task": task, "source": "web" if number % 3 else "books", "manifest_file": 0, "manifest_row": number,
    }  # fmt: skip
    return {**row, **changes}


def error_row(number: int, kind: str, stage: str, message: str) -> dict[str, Any]:
    """A row that failed."""
    nothing = dict.fromkeys(
        ("text", "finish_reason", "num_output_tokens", "generate_s", "num_prompt_tokens", "num_visual_tokens", "media")
    )
    return result_row(
        number, status="error", error_stage=stage, error_type=kind, error_message=message, attempts=2, **nothing
    )


def write_run(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    run: Mapping[str, Any] | None = RUN,
    finished: bool = True,
    kept: pa.Schema = KEPT,
) -> Path:
    """A run folder of these rows: two parts, or two fragments of an unfinished run."""
    (folder / "__run").mkdir(parents=True, exist_ok=True)
    schema = result_schema(kept)
    if run is not None:
        (folder / "__run" / "run.json").write_text(json.dumps(run))
    half = -(-len(rows) // 2)
    if finished:
        paths = [folder / "part-00000.parquet", folder / "part-00001.parquet"]
        (folder / "_SUCCESS").touch()
    else:
        (folder / "__run" / "fragments").mkdir(exist_ok=True)
        paths = [folder / "__run" / "fragments" / f"1-{number}.parquet" for number in range(2)]
    for path, some in zip(paths, (rows[:half], rows[half:]), strict=True):
        pq.write_table(pa.Table.from_pylist(list(some), schema=schema), path, row_group_size=7)
    return folder


def write_scores(folder: Path, **settings: Any) -> dict[str, Any]:
    """Scores the run as the evaluation job does."""
    chosen: dict[str, Any] = {"references": "reference", "metrics": ("exact_match", "token_f1"), "task_column": "task"}
    scorer = Scorer(ScoringSettings(**(chosen | settings)))
    reader = RunReader(str(folder))
    scorer.learn(reader.batches())
    table = pa.Table.from_batches([scorer.score(batch) for batch in reader.batches()], schema=scorer.schema)
    pq.write_table(table, folder / "__run" / "scores.parquet")
    metrics = scorer.metrics()
    (folder / "__run" / "metrics.json").write_text(json.dumps(metrics))
    return metrics


def write_progress(folder: Path, num_lines: int = 200) -> None:
    """A progress file whose pace changes in the middle."""
    rows = np.cumsum(np.where(np.arange(num_lines) < num_lines // 2, 80, 120))
    lines = [
        json.dumps({"t": 1000.0 + 3 * line, "rows": int(count), "output_tokens": int(30 * count), "errors": line // 40})
        for line, count in enumerate(rows)
    ]
    (folder / "__run" / "progress.jsonl").write_text("\n".join(lines) + '\n{"t": 12')


def write_video(path: Path, num_frames: int = 12) -> str:
    """A clip whose colour changes."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=6)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for number in range(num_frames):
            picture = np.full((120, 160, 3), (20 * number, 128, 255 - 20 * number), np.uint8)
            picture[20:60, 8 * number : 8 * number + 40] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return str(path)


def rich_run(folder: Path, num_rows: int = 60) -> Path:
    """A run with everything a report can show: pictures, a video, errors of several kinds, hostile strings, scores."""
    media = folder.parent / f"{folder.name}-media"
    media.mkdir(parents=True, exist_ok=True)
    video = write_video(media / "clip.mp4")
    rows: list[dict[str, Any]] = []
    for number in range(num_rows):
        row = result_row(number)
        if row["task"] == "video":
            row["media"] = [medium("video", video, 160, 120)]
        elif row["task"] == "caption":
            row["media"] = [
                medium("image", make_image(media / f"{number}-{one}.jpg", number + one), 320, 240) for one in range(3)
            ]
        else:
            row["media"] = [medium("image", make_image(media / f"{number}.png", number), 320, 240)]
        rows.append(row)
    rows[3] |= {"text": "the same again and again " * 40, "finish_reason": "length", "num_output_tokens": 64}
    rows[5] |= {"text": "loop loop " * 60, "finish_reason": "repetition", "num_output_tokens": 60}
    rows[7] |= {"text": "", "generate_s": 9.5}
    rows[11] = error_row(11, "FetchTimeout", "fetch", "https://user:pw@host/a.png was silent for 30 s")
    rows[12] = error_row(12, "TruncatedMedia", "decode", "the file ends after 512 of 2,048 bytes")
    rows[13] = error_row(13, "TruncatedMedia", "decode", "the file ends early")
    for offset, text in enumerate(HOSTILE):
        rows[20 + offset] |= {
            "text": text, "id": text, "prompt": text, "task": text if offset < 3 else "colour",
            "source": text, "num_output_tokens": 100 + offset,
        }  # fmt: skip
        if rows[20 + offset]["media"]:
            rows[20 + offset]["media"] = [medium("image", text)]
    rows[30] = error_row(30, HOSTILE[0], HOSTILE[1], HOSTILE[2])
    write_run(folder, rows, run={**RUN, "counts": {"rows": num_rows}, HOSTILE[0]: {HOSTILE[1]: HOSTILE[2]}})
    write_scores(folder, slices=("source", "media_kind", "resolution_bucket"))
    write_progress(folder)
    return folder
