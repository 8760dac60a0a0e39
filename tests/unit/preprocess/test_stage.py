"""The CPU stage: rows in order, errors beside answers, fetches ahead, whatever the block size."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.demo import CHECKPOINT
from pipeline.preprocess.columns import MessageOptions
from pipeline.preprocess.patches import patchify_image, resize_frames
from pipeline.preprocess.stage import PreprocessOptions, PreprocessStage
from pipeline.schema import UnitColumn, request_schema
from tests.options import fetch_options, media_options


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def unit(rows: list[dict[str, Any]]) -> pa.Table:
    table = pa.Table.from_pylist([{"image": None, "prompt": None, **row} for row in rows])
    count = len(rows)
    table = table.append_column(UnitColumn.FILE, pa.array([0] * count, pa.int32()))
    table = table.append_column(UnitColumn.ROW, pa.array(range(100, 100 + count), pa.int64()))
    return table.append_column(UnitColumn.ATTEMPTS, pa.array([1] * count, pa.int32()))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[PreprocessStage]:
    options = PreprocessOptions(
        model_path=str(CHECKPOINT),
        revision=None,
        messages=MessageOptions(),
        add_vision_id=False,
        media=media_options(min_pixels=28 * 28, max_pixels=112 * 112),
        fetch=fetch_options(str(tmp_path)),
        sampling={"max_tokens": 5, "temperature": 0.0},
        kept=pa.schema([]),
    )
    made = PreprocessStage(options)
    yield made
    made.close()


def test_patches_and_ids_are_those_of_the_steps_by_hand(stage: PreprocessStage) -> None:
    data = png(100, 60)
    (row,) = stage(unit([{"image": data, "prompt": "What?"}])).to_pylist()
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    expected = patchify_image(resize_frames(pixels[None], 56, 112)[0])
    assert row["media"][0]["grid_thw"] == [1, 4, 8]
    assert np.array_equal(np.frombuffer(row["patches"], np.uint8).reshape(-1, 588), expected)
    assert row["num_visual_tokens"] == 8
    assert row["num_prompt_tokens"] == len(row["input_ids"])
    assert json.loads(row["sampling"])["max_tokens"] == 5


@pytest.mark.parametrize(
    ("block_bytes", "block_rows", "expected_tables"),
    [
        (1, 100, 3),
        (70_000, 100, 2),
        (1 << 40, 100, 1),
        (1 << 40, 16, 2),
        (1 << 40, 11, 2),
        (1 << 40, 5, 5),
        (1 << 40, 1, 21),
    ],
)
def test_rows_keep_their_order_and_bad_ones_their_place(
    stage: PreprocessStage, block_bytes: int, block_rows: int, expected_tables: int
) -> None:
    rows = [{"image": png(56, 56, n) if n % 3 else b"junk", "prompt": f"{n}"} for n in range(20)] + [{"prompt": "text"}]
    tables = list(stage.tables(unit(rows), block_bytes, block_rows))
    table = pa.concat_tables(tables)
    assert table.schema.equals(request_schema(pa.schema([])))
    assert table.column("manifest_row").to_pylist() == list(range(100, 121))
    expected = ["error" if n % 3 == 0 else "ok" for n in range(20)] + ["ok"]
    assert table.column("status").to_pylist() == expected
    assert [ids is None for ids in table.column("input_ids").to_pylist()] == [status == "error" for status in expected]
    assert len(tables) == expected_tables


def test_fetches_overlap_each_other_and_the_decoding(stage: PreprocessStage, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, most = [0], [0]
    lock = threading.Lock()
    data = png(56, 56)

    def slow_fetch(source: Any) -> bytes:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        time.sleep(0.05)
        with lock:
            under_way[0] -= 1
        return data

    monkeypatch.setattr(stage._fetcher, "fetch", slow_fetch)
    table = stage(unit([{"image": f"{n}.png", "prompt": "?"} for n in range(40)]))
    assert table.column("status").to_pylist() == ["ok"] * 40
    assert most[0] >= 8
