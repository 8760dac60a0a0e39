"""The prompts that a checkpoint was trained on."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.checkpoint.prompts import untrained_prompt
from pipeline.demo import CHECKPOINT
from pipeline.demo.tasks import PLAIN_PROMPTS


def test_a_prompt_that_the_checkpoint_does_not_know_is_named_with_those_that_it_knows() -> None:
    said = untrained_prompt(str(CHECKPOINT), "Describe this image in detail.")
    assert said is not None and "'Describe this image in detail.'" in said and "'Describe the image.'" in said
    assert all(untrained_prompt(str(CHECKPOINT), prompt) is None for prompt in (*PLAIN_PROMPTS, None))


def test_a_checkpoint_without_such_a_list_takes_any_prompt(tmp_path: Path) -> None:
    assert untrained_prompt(str(tmp_path), "Anything?") is None


def test_the_demo_checkpoint_lists_the_prompts_of_its_tasks() -> None:
    assert json.loads((Path(CHECKPOINT) / "prompts.json").read_text())["templates"] == list(PLAIN_PROMPTS)
