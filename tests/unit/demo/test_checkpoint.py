"""The committed checkpoint: complete, small, loadable by transformers alone, and right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.demo import CHECKPOINT
from pipeline.demo.tasks import TASKS, example
from pipeline.demo.training import recipe
from pipeline.demo.training.evaluate import greedy
from pipeline.demo.training.samples import Sample, make_sample, pixel_values, rotary_positions
from pipeline.preprocess.prompt import ChatTokenizer

FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
}


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(str(CHECKPOINT))


def test_its_files_are_there_and_small() -> None:
    assert {path.name for path in CHECKPOINT.iterdir()} == FILES
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 8_000_000


def test_its_settings_are_those_of_the_recipe() -> None:
    images = json.loads((CHECKPOINT / "preprocessor_config.json").read_text())
    assert images == recipe.image_processor_config()
    assert json.loads((CHECKPOINT / "video_preprocessor_config.json").read_text()) == recipe.video_processor_config()


@pytest.mark.slow  # most of its time are imports in a fresh process
def test_it_loads_in_transformers_alone(tmp_path: Path) -> None:
    program = f"""
import sys
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
folder = {str(CHECKPOINT)!r}
model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
assert AutoConfig.from_pretrained(folder).model_type == "qwen2_vl"
tokenizer = AutoTokenizer.from_pretrained(folder)
ends = GenerationConfig.from_pretrained(folder).eos_token_id
assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"], ends
question = [{{"role": "user", "content": "What is 3 plus 4?"}}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.float().generate(**prompt, max_new_tokens=8)
print(tokenizer.decode(out[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))
assert not any(name.startswith("pipeline") for name in sys.modules)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "7."


@pytest.mark.parametrize("task", TASKS)
def test_it_answers_held_out_questions(model: Any, tokenizer: ChatTokenizer, task: str) -> None:
    made = [example(task, "held-out", 7, index) for index in range(10)]
    samples = [make_sample(one, tokenizer, vision_id=True) for one in made]
    answers = [tokenizer.decode(ids) for ids in greedy(model, samples, tokenizer)]
    assert sum(answer == one.answer for answer, one in zip(answers, made, strict=True)) >= 9


@pytest.mark.parametrize("task", TASKS)
def test_generate_with_transformers_own_positions_gives_the_same_answers(
    model: Any, tokenizer: ChatTokenizer, task: str
) -> None:
    for index in range(2):
        sample = make_sample(example(task, "held-out", 7, index), tokenizer, vision_id=True)
        (expected,) = greedy(model, [sample], tokenizer)
        assert tokenizer.decode(_generate(model, sample, tokenizer)) == tokenizer.decode(expected)


def test_transformers_and_the_trained_rule_agree_on_positions(model: Any, tokenizer: ChatTokenizer) -> None:
    for task in TASKS:
        for index in range(20):
            sample = make_sample(example(task, "held-out", 0, index), tokenizer, vision_id=True, codec=False)
            if not sample.image_grids and not sample.video_grids:
                continue
            inputs = _inputs(sample, tokenizer)
            theirs, _ = model.model.get_rope_index(
                inputs["input_ids"],
                inputs["mm_token_type_ids"],
                inputs.get("image_grid_thw"),
                inputs.get("video_grid_thw"),
            )
            assert np.array_equal(theirs[:, 0].numpy(), sample.positions[:, : theirs.shape[2]])


def test_positions_of_text_follow_the_largest_position_of_a_medium() -> None:
    is_visual = np.array([0, 1, 1, 1, 1, 0, 0], dtype=bool)
    positions = rotary_positions(is_visual, [(4, 2, 2)])
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 1, 1, 1, 5, 6], [0, 1, 1, 1, 1, 5, 6]]


def _generate(model: Any, sample: Sample, tokenizer: ChatTokenizer) -> list[int]:
    model.model.rope_deltas = None
    out = model.generate(**_inputs(sample, tokenizer), max_new_tokens=48)
    return [int(token) for token in out[0, len(sample.prompt_ids) :]]


def _inputs(sample: Sample, tokenizer: ChatTokenizer) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(sample.prompt_ids.astype(np.int64))[None]
    kinds = (ids == tokenizer.image_pad_id).int() + 2 * (ids == tokenizer.video_pad_id).int()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
    if sample.image_grids:
        inputs["pixel_values"] = torch.from_numpy(pixel_values(sample.image_patches))
        inputs["image_grid_thw"] = torch.tensor(sample.image_grids)
    if sample.video_grids:
        inputs["pixel_values_videos"] = torch.from_numpy(pixel_values(sample.video_patches))
        inputs["video_grid_thw"] = torch.tensor(sample.video_grids)
    return inputs
