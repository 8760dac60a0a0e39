"""A folder of media files and the manifest that asks about them: what the demo job reads.

    python -m pipeline.demo.manifest --output FOLDER [--rows-per-task 10] [--seed 0]

Columns: id, task, reference (the one right answer), and the question in whichever of the job's forms fits: `prompt`
with `image`, `images` or `video`, or else `messages`. Paths are relative to the manifest. Every row comes from a seed
that training never saw. Knows scenes and files; not the job.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.demo.clips import encode_clip
from pipeline.demo.scenes import Picture, draw_clip, draw_picture
from pipeline.demo.tasks import TASKS, Example, Scene, example

MANIFEST_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("reference", pa.string()),
        ("prompt", pa.string()),
        ("image", pa.string()),
        ("images", pa.list_(pa.string())),
        ("video", pa.string()),
        ("messages", pa.string()),
    ]
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows-per-task", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    manifest = write_demo_world(args.output, rows_per_task=args.rows_per_task, seed=args.seed)
    print(f"{manifest}: {args.rows_per_task * len(TASKS)} rows, {', '.join(TASKS)}")


def write_demo_world(folder: Path, *, rows_per_task: int = 10, seed: int = 0) -> Path:
    """Write the media and `manifest.parquet` into `folder`; returns the manifest's path. Tasks take turns."""
    (folder / "media").mkdir(parents=True, exist_ok=True)
    rows = [
        _row(example(task, "held-out", seed, index), f"{task}-{index:04d}", index, folder)
        for index in range(rows_per_task)
        for task in TASKS
    ]
    manifest = folder / "manifest.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA), manifest)
    return manifest


def _row(made: Example, row_id: str, index: int, folder: Path) -> dict[str, Any]:
    paths = [_write_medium(scene, f"{row_id}-{place}", folder) for place, scene in enumerate(made.media)]
    kinds = ["image" if isinstance(scene, Picture) else "video" for scene in made.media]
    row: dict[str, Any] = {"id": row_id, "task": made.task, "reference": made.answer}
    if len(set(kinds)) > 1 or index % 2:  # only messages hold the order of a picture and a clip; else take turns
        return row | {"messages": json.dumps(_messages(kinds, paths, made.question))}
    row["prompt"] = made.question
    if len(paths) > 1:
        row["images"] = paths
    elif paths:
        row[kinds[0]] = paths[0]
    return row


def _messages(kinds: Sequence[str], paths: Sequence[str], question: str) -> list[dict[str, Any]]:
    content: list[dict[str, str]] = [{"type": kind, "path": path} for kind, path in zip(kinds, paths, strict=True)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def _write_medium(scene: Scene, name: str, folder: Path) -> str:
    """Write one medium; returns its path relative to `folder`."""
    if isinstance(scene, Picture):
        path = f"media/{name}.png"
        Image.fromarray(draw_picture(scene)).save(folder / path)
    else:
        path = f"media/{name}.mp4"
        (folder / path).write_bytes(encode_clip(draw_clip(scene), scene.fps))
    return path


if __name__ == "__main__":
    main()
