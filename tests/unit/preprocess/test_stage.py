"""The CPU stage: rows in order, errors beside answers, fetches ahead, whatever the block size."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.demo import CHECKPOINT
from pipeline.errors import CredentialError, MessageError
from pipeline.preprocess.fetch import ahead as fetch_ahead
from pipeline.preprocess.messages.columns import MessageOptions
from pipeline.preprocess.messages.row import conversation
from pipeline.preprocess.messages.values import ManifestRow
from pipeline.preprocess.patches import patchify_image, resize_frames
from pipeline.preprocess.stage import READ_AHEAD, PreprocessOptions, PreprocessStage
from pipeline.schema import SAMPLING_COLUMNS, MediumReceipt, UnitColumn, request_schema
from tests.options import fetch_options, media_options

KEPT = pa.schema([("asked", pa.string())])


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


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PreprocessStage]:
    options = PreprocessOptions(
        model_path=str(CHECKPOINT),
        revision=None,
        messages=MessageOptions(settings=frozenset(SAMPLING_COLUMNS), allow_missing_media=True),
        add_vision_id=False,
        thinking=False,
        allow_tokens=(),
        media=media_options(min_pixels=28 * 28, max_pixels=112 * 112),
        fetch=fetch_options(str(tmp_path_factory.mktemp("media"))),
        sampling={"max_tokens": 5, "temperature": 0.0},
        kept=KEPT,
        kept_from={"asked": "prompt"},
    )
    made = PreprocessStage(options)
    yield made
    made.close()


def test_patches_and_ids_are_those_of_the_steps_by_hand(stage: PreprocessStage) -> None:
    data = png(100, 60)
    (row,) = stage(unit([{"image": {"bytes": data, "path": "cats/1.png"}, "prompt": "What?"}])).to_pylist()
    assert row["media"][0]["source"] == "cats/1.png"
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    expected = patchify_image(resize_frames(pixels[None], 56, 112)[0], patch_size=14)
    assert row["media"][0]["grid_thw"] == [1, 4, 8]
    assert np.array_equal(np.frombuffer(row["patches"], np.uint8).reshape(-1, 588), expected)
    assert row["num_visual_tokens"] == 8
    assert row["asked"] == "What?", "a kept column has its name in the results"
    assert row["num_prompt_tokens"] == len(row["input_ids"])
    assert json.loads(row["sampling"])["max_tokens"] == 5


@pytest.mark.parametrize(
    ("block_bytes", "block_rows", "expected_tables"),
    [
        (1, 100, 14),
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
    assert table.schema.equals(request_schema(KEPT))
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


class HangingFetches:
    """Fetches of sources that begin with `slow` hang until they are released. Counts the most at once."""

    def __init__(self, stage: PreprocessStage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.released, self.lock, self.now, self.most = threading.Event(), threading.Lock(), 0, 0
        self.data = png(56, 56)
        monkeypatch.setattr(stage._fetcher, "fetch", self.fetch)

    def fetch(self, source: Any) -> bytes:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        if str(source).startswith("slow"):
            assert self.released.wait(30)
        with self.lock:
            self.now -= 1
        return self.data


def places(table: pa.Table) -> list[int]:
    return [row - 100 for row in table.column("manifest_row").to_pylist()]


def test_rows_that_are_here_pass_slow_ones_and_more_fetches_are_under_way(
    stage: PreprocessStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetches = HangingFetches(stage, monkeypatch)
    rows = [{"image": f"{'slow' if n % 2 else 'fast'} {n}", "prompt": "?"} for n in range(80)]
    begun: list[bool] = []
    tables = stage.tables(unit(rows), 1 << 40, 10, when_begun=lambda: begun.append(True), patience_s=None)
    fast = [place for _ in range(4) for place in places(next(tables))]
    assert sorted(fast) == list(range(0, 80, 2))
    deadline = time.monotonic() + 30
    while fetches.now < 40 and time.monotonic() < deadline:  # their threads may still be starting
        time.sleep(0.001)
    assert fetches.now == 40 > READ_AHEAD and begun == [True]
    fetches.released.set()
    slow = [place for table in tables for place in places(table)]
    assert sorted(slow) == list(range(1, 80, 2))
    assert fetches.most <= 40 + READ_AHEAD


def test_finished_rows_do_not_wait_for_the_last_slow_one(
    stage: PreprocessStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetches = HangingFetches(stage, monkeypatch)
    rows = [{"image": name, "prompt": "?"} for name in ("fast 0", "slow 1", "fast 2")]
    tables = stage.tables(unit(rows), 1 << 40, 100, patience_s=0.05)
    assert places(next(tables)) == [0, 2]
    fetches.released.set()
    assert [places(table) for table in tables] == [[1]]
    assert stage.stats()["fetch_wait_s"] >= 0.04


def test_fetches_ahead_are_limited_by_number_and_by_bytes(
    stage: PreprocessStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetches = HangingFetches(stage, monkeypatch)
    for limit in ("_at_most", "_MAX_BYTES"):
        fetches.released.clear()
        with monkeypatch.context() as patch:
            if limit == "_at_most":
                patch.setattr(stage._pool, limit, 20)
            else:
                patch.setattr(fetch_ahead, limit, 20 * len(fetches.data))
                patch.setattr(stage._pool, "_mean_bytes", float(len(fetches.data)))
            rows = [{"image": f"{'fast' if n % 2 else 'slow'} {n}", "prompt": "?"} for n in range(100)]
            tables = stage.tables(unit(rows), 1 << 40, 1, patience_s=None)
            taken = [place for _ in range(19) for place in places(next(tables))]
            assert set(taken) <= set(range(1, 42, 2)), "not begun while 20 slow ones are under way"
            fetches.released.set()
            assert sorted(taken + [place for table in tables for place in places(table)]) == list(range(100))


def test_a_unit_that_is_given_up_leaves_no_fetch_behind(
    stage: PreprocessStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetches = HangingFetches(stage, monkeypatch)
    tables = stage.tables(unit([{"image": f"fast {n}", "prompt": "?"} for n in range(40)]), 1 << 40, 1)
    next(tables)
    tables.close()
    fetches.released.set()
    assert (stage._pool._num_ahead, stage._pool._num_units, stage._pool._num_waiting) == (0, 0, 0)


def test_large_rows_are_looked_at_one_by_one(stage: PreprocessStage, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[int] = []
    see_rows = stage._worker.see_rows
    monkeypatch.setattr(stage._worker, "see_rows", lambda rows: (handed.append(len(rows)), see_rows(rows))[1])
    monkeypatch.setattr(stage, "_row_bytes", float("inf"))  # as at the start
    rows = [{"image": png(112, 112), "prompt": "?"} for _ in range(9)]  # 37,632 bytes of patches each
    tables = list(stage.tables(unit(rows), 100_000, 100))
    assert [table.num_rows for table in tables] == [3, 3, 3]
    assert handed[0] == 1 and max(handed) <= 2, "at most a row more than a table holds is decoded ahead of it"


class Fault(BaseException):
    """What a panic of a library in Rust looks like: no Exception."""


@pytest.mark.parametrize("where", ["conversation", "render", "fetch", "see_rows", "expand", "as_dict"])
def test_a_fault_of_the_code_is_the_error_of_the_row_that_meets_it(
    stage: PreprocessStage, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def meets(*values: Any, **others: Any) -> bool:
        return "poison" in repr((values, others))

    def faulty(do: Any) -> Any:
        def call(*values: Any, **others: Any) -> Any:
            if meets(*(dict(value) if isinstance(value, ManifestRow) else value for value in values), **others):
                raise Fault(f"of {where}")
            return do(*values, **others)

        return call

    if where == "conversation":
        monkeypatch.setattr("pipeline.preprocess.stage.conversation", faulty(conversation))
    elif where == "fetch":
        monkeypatch.setattr(stage._fetcher, "fetch", faulty(stage._fetcher.fetch))
    elif where == "see_rows":
        monkeypatch.setattr(stage._worker, "see_rows", faulty(stage._worker.see_rows))
    elif where == "as_dict":
        monkeypatch.setattr(MediumReceipt, "as_dict", faulty(MediumReceipt.as_dict))
    else:
        monkeypatch.setattr(stage._tokenizer, where, faulty(getattr(stage._tokenizer, where)))
    url = "data:image/png;base64," + base64.b64encode(png(56, 56)).decode()
    rows = [{"image": url, "prompt": f"{n}"} for n in range(9)]
    rows[3] = {"image": url.replace("image/png", "image/poison"), "prompt": "poison"}
    table = stage(unit(rows))
    assert table.column("status").to_pylist() == ["ok"] * 3 + ["error"] + ["ok"] * 5
    row = table.slice(3, 1).to_pylist()[0]
    assert (row["error_type"], row["error_stage"], row["patches"]) == ("InternalError", "preprocess", None)
    assert f"Fault: of {where}; not foreseen" in row["error_message"]
    assert "Traceback (most recent call last)" in row["error_message"]


def test_an_error_that_concerns_all_rows_ends_the_job(stage: PreprocessStage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Any) -> bytes:
        raise CredentialError("the token has expired")

    monkeypatch.setattr(stage._fetcher, "fetch", refuse)
    with pytest.raises(CredentialError, match="expired"):
        stage(unit([{"image": "a.png"}]))


def test_an_error_message_that_is_no_valid_text_is_escaped(
    stage: PreprocessStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*values: Any) -> Any:
        raise MessageError("found \ud83d" + "x" * 100_000)

    monkeypatch.setattr("pipeline.preprocess.stage.conversation", refuse)
    (row,) = stage(unit([{"prompt": "?"}])).to_pylist()
    assert row["error_message"].startswith("found \\ud83dxxx")
    assert len(row["error_message"]) < 10_000
