"""The demo manifest: its columns, its two forms, its files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import av
import pyarrow.parquet as pq
from PIL import Image

from pipeline.demo.manifest import write_demo_world
from pipeline.demo.tasks import TASKS


def test_the_manifest_asks_each_task_in_both_forms_where_both_can_say_it(tmp_path: Path) -> None:
    rows = pq.read_table(write_demo_world(tmp_path, rows_per_task=4, seed=5)).to_pylist()
    assert Counter(row["task"] for row in rows) == dict.fromkeys(TASKS, 4)
    assert len({row["id"] for row in rows}) == len(rows)
    for task in TASKS:
        forms = {row["messages"] is None for row in rows if row["task"] == task}
        assert forms == ({False} if task == "image_and_video" else {True, False})
    assert all(row["reference"].endswith(".") for row in rows)


def test_media_paths_are_relative_and_decode(tmp_path: Path) -> None:
    rows = pq.read_table(write_demo_world(tmp_path, rows_per_task=2, seed=5)).to_pylist()
    images, videos = [], []
    for row in rows:
        images += [row["image"], *(row["images"] or [])]
        videos.append(row["video"])
        for part in json.loads(row["messages"])[0]["content"] if row["messages"] else []:
            {"image": images, "video": videos, "text": []}[part["type"]].append(part.get("path"))
    images, videos = [path for path in images if path], [path for path in videos if path]
    assert len(images) == 2 * 6 and len(videos) == 2 * 2
    for path in images:
        Image.open(tmp_path / path).load()
    for path in videos:
        with av.open(str(tmp_path / path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert sum(1 for _ in container.decode(stream)) == stream.frames


def test_the_same_seed_writes_the_same_world(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_demo_world(tmp_path / name, rows_per_task=1, seed=seed)
    a, b, c = (
        {path.name: path.read_bytes() for path in sorted((tmp_path / name / "media").iterdir())} for name in "abc"
    )
    assert a == b
    assert a != c
