"""The caption job with tiny random checkpoints of the newer families, against transformers over the same rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.caption import main
from jobs.command_line import parse_arguments
from pipeline.checkpoint.families import FAMILIES
from pipeline.config import CaptionConfig
from pipeline.config_file import load_config
from pipeline.demo import CHECKPOINT
from pipeline.execution.stages import open_stages
from pipeline.generate import GenerateStage
from pipeline.manifest.work import read_work
from pipeline.preprocess.stage import PreprocessStage
from tests.unit.engine.tiny import make_config, make_model
from tests.unit.preprocess.conftest import encode_video, picture


def make_checkpoint(folder: Path, model_type: str) -> Path:
    """Random weights around the demo checkpoint's tokenizer and template, with the family's published bounds."""
    tokens = json.loads((CHECKPOINT / "config.json").read_text())
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    text = {"vocab_size": tokens["text_config"]["vocab_size"], "eos_token_id": tokens["eos_token_id"]}
    text |= dict.fromkeys(("bos_token_id", "pad_token_id"), tokens["pad_token_id"])
    config = make_config(model_type, text_config=text, **{name: tokens[name] for name in names})
    make_model(config=config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(CHECKPOINT / name, folder)
    family = FAMILIES[model_type]
    shared = {"patch_size": family.patch_size, "image_mean": family.image_mean, "image_std": family.image_std}
    low, high = family.factor**2 * 4, family.factor**2 * 64
    image = {**shared, "size": {"shortest_edge": low, "longest_edge": high}}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": image, "video_processor": image}))
    return folder


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_a_job_gives_the_answers_of_transformers_and_records_the_family(tmp_path: Path, model_type: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", model_type)
    Image.fromarray(picture(90, 130)).save(tmp_path / "photo.png")
    moving = np.stack([np.roll(picture(96, 64), 4 * number, axis=1) for number in range(40)])
    (tmp_path / "clip.mp4").write_bytes(encode_video(moving, rate=10))
    rows: list[dict[str, Any]] = [
        {"image": "photo.png", "prompt": "What is this?"},
        {"video": "clip.mp4", "prompt": "What happens?"},
        {"image": "photo.png", "video": "clip.mp4", "prompt": "Compare."},
        {"prompt": "Hello."},
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    words = ["--input.path", str(manifest), "--input.allow_missing_media", "true", "--model.path", str(checkpoint)]
    words += ["--model.dtype", "float32", "--media.fps", "2.5", "--sampling.max_tokens", "12"]
    out = tmp_path / "out"
    assert main([*words, "--output.path", str(out)]) == 0

    record = json.loads((out / "__run" / "run.json").read_text())
    assert (record["model"]["family"], record["model"]["thinks"]) == (model_type, False)
    prompts = {"qwen2_5_vl": "one run", "qwen3_vl": "timed steps in the template's marks"}
    assert record["model"]["video_prompt"] == prompts[model_type]
    results = [row for part in sorted(out.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    assert [row["error_message"] for row in results] == [None] * 4
    patch = FAMILIES[model_type].patch_size
    medium = results[0]["media"][0]
    assert medium["grid_thw"] == [1, medium["resized_height"] // patch, medium["resized_width"] // patch]
    assert len({row["text"] for row in results}) > 1

    paths, overrides = parse_arguments(
        [*words, "--output.path", str(tmp_path / "other"), "--engine.kind", "transformers"]
    )
    opened = open_stages(load_config(CaptionConfig, paths, overrides))
    (unit,) = opened.whole_manifest()
    preprocess = PreprocessStage(opened.stages.preprocess)
    requests = preprocess(read_work(opened.manifest.spec, unit, opened.stages.columns))
    preprocess.close()
    # 10 of 40 frames at 10 a second.
    assert requests["seconds_per_step"].to_pylist() == [[1.0], [2 / (10 / 40 * 10)], [1.0, 2 / (10 / 40 * 10)], []]
    generate = GenerateStage(opened.stages.generate)
    expected: pa.Table = generate(requests)
    generate.close()
    assert [row["text"] for row in results] == expected["text"].to_pylist()
