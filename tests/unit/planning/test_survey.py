"""A plan's rows against the run's, without Ray: tests/integration/test_plan.py does it for whole manifests."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.checkpoint.families.qwen3_vl import QWEN3_VL
from pipeline.demo import CHECKPOINT
from pipeline.planning.survey import Survey
from pipeline.preprocess.messages.columns import MessageOptions
from pipeline.preprocess.stage import PreprocessOptions, PreprocessStage
from pipeline.schema import UnitColumn
from tests.options import fetch_options, media_options
from tests.unit.preprocess.conftest import encode_video


def test_the_prompt_of_timed_steps_is_as_long_as_the_runs(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(encode_video(50, rate=Fraction(30000, 1001)))
    table = pa.table(
        {
            "video": ["clip.mp4", None], "prompt": ["What happens?", "Hello."],
            UnitColumn.FILE: pa.array([0, 0], pa.int32()), UnitColumn.ROW: [0, 1], UnitColumn.ATTEMPTS: [1, 1],
        }
    )  # fmt: skip
    options = PreprocessOptions(
        model_path=str(CHECKPOINT),
        revision=None,
        messages=MessageOptions(allow_missing_media=True),
        add_vision_id=False,
        thinking=False,
        allow_tokens=(),
        media=media_options(QWEN3_VL, resize="pil", max_visual_tokens=90, fps=5.0),
        fetch=fetch_options(str(tmp_path)),
        sampling={"max_tokens": 5},
        kept=pa.schema([]),
    )
    stage = PreprocessStage(options)
    run = stage(table).to_pylist()
    stage.close()
    planned = Survey(options, max_context=4096).rows(table)
    assert [row["error_message"] for row in run] == [None, None]
    for name in ("num_prompt_tokens", "num_visual_tokens"):
        assert [getattr(row, name) for row in planned] == [row[name] for row in run]
    clip, text = run
    t, h, w = clip["media"][0]["grid_thw"]
    assert t == 4 and clip["num_visual_tokens"] == t * h * w // 4 <= 90
    # Each step has its marks and its time; the template's own marks stay around the whole.
    assert clip["num_prompt_tokens"] - clip["num_visual_tokens"] > text["num_prompt_tokens"] + 4 * 2 + 4 * 3
    patches = np.frombuffer(clip["patches"], np.uint8)
    assert patches.size == t * h * w * 1536
    assert clip["seconds_per_step"] == [2 / (8 / 50 * (30000 / 1001))] and text["seconds_per_step"] == []
