"""The committed checkpoint: complete, small, loadable by transformers alone, and right."""

from __future__ import annotations

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
from pipeline.demo.training.batches import media_inputs
from pipeline.demo.training.evaluate import score, transformers_options
from pipeline.demo.training.samples import TokenizedExample, see_media, tokenize_example
from pipeline.demo.training.train import prepare
from pipeline.engine import Engine, Request, SamplingParams
from pipeline.engine.reference import ReferenceEngine
from pipeline.engine.weights import from_model
from pipeline.preprocess.prompt import ChatTokenizer

FILES = {
    "prompts.json",
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
def engine(model: Any) -> Engine:
    return ReferenceEngine(from_model(model), transformers_options(CHECKPOINT))


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(str(CHECKPOINT))


def test_its_files_are_there_and_small() -> None:
    assert {path.name for path in CHECKPOINT.iterdir()} == FILES
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 8_000_000


def test_the_recipe_starts_from_its_settings(tmp_path: Path) -> None:
    prepare(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == FILES - {
        "README.md",
        "prompts.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    for name in written - {"tokenizer.json", "tokenizer_config.json"}:
        assert (tmp_path / name).read_text() == (CHECKPOINT / name).read_text()


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
def test_it_answers_held_out_questions(engine: Engine, tokenizer: ChatTokenizer, task: str) -> None:
    right, mistakes = score(engine, tokenizer, task, 10, seed=7)
    assert right >= 9, mistakes


@pytest.mark.parametrize("task", TASKS)
def test_generate_with_transformers_own_positions_gives_the_same_answers(
    engine: Engine, model: Any, tokenizer: ChatTokenizer, task: str
) -> None:
    samples = [tokenize_example(example(task, "held-out", 7, index), tokenizer, vision_id=True) for index in range(2)]
    requests = [Request(index, one.prompt_ids, one.media, SamplingParams(48)) for index, one in enumerate(samples)]
    for sample, expected in zip(samples, engine.generate(requests), strict=True):
        model.model.rope_deltas = None
        out = model.generate(**_inputs(sample, tokenizer), max_new_tokens=48)
        assert tuple(out[0, len(sample.prompt_ids) :].tolist()) == expected.token_ids


def test_transformers_and_the_trained_rule_agree_on_positions(model: Any, tokenizer: ChatTokenizer) -> None:
    for task in TASKS:
        for index in range(20):
            made = example(task, "held-out", 0, index)
            sample = tokenize_example(made, tokenizer, vision_id=True, media=see_media(made.media, codec=False))
            if not sample.media:
                continue
            inputs = _inputs(sample, tokenizer)
            theirs, _ = model.model.get_rope_index(
                inputs["input_ids"],
                inputs["mm_token_type_ids"],
                inputs.get("image_grid_thw"),
                inputs.get("video_grid_thw"),
            )
            assert np.array_equal(theirs[:, 0].numpy(), sample.positions[:, : theirs.shape[2]])


def _inputs(sample: TokenizedExample, tokenizer: ChatTokenizer) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(sample.prompt_ids.astype(np.int64))[None]
    kinds = (ids == tokenizer.image_pad_id).int() + 2 * (ids == tokenizer.video_pad_id).int()
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
    return {**text, **media_inputs(sample.media)}
