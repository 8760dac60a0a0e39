"""The recipe runs, resumes and writes a folder that loads; packing changes nothing that a question sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from pipeline.demo.tasks import TASKS, Example, example
from pipeline.demo.training.batches import Batch, Group, pack, training_batches
from pipeline.demo.training.samples import see_media, tokenize_example
from pipeline.demo.training.train import main, new_model, prepare
from pipeline.preprocess.prompt import ChatTokenizer

OPTIONS = ["--processes", "1", "--check-examples", "0", "--final-examples", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe")
    prepare(path)
    return path


@pytest.mark.slow
def test_two_steps_and_one_more_write_a_loadable_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    output = tmp_path / "checkpoint"
    main(["--output", str(output), "--steps", "2", *OPTIONS])
    main(["--output", str(output), "--steps", "3", "--resume", *OPTIONS])
    assert torch.load(tmp_path / "checkpoint.training" / "state.pt")["step"] == 3
    model: Any = AutoModelForImageTextToText.from_pretrained(output)
    assert model.dtype == torch.float32  # the size shows that the weights are stored in bfloat16
    assert sum(path.stat().st_size for path in output.iterdir()) < 8_000_000
    assert "3 steps" in (output / "README.md").read_text()
    ChatTokenizer(str(output))


def test_questions_packed_side_by_side_see_what_each_would_see_alone(folder: Path) -> None:
    tokenizer = ChatTokenizer(str(folder))
    model = new_model(folder, seed=0).eval()
    made = example("describe_image", "train", 0, 0)
    asked = [made, Example("count", made.media, "How many objects are there?", "Two.")]
    media = see_media(made.media)
    groups = [Group([tokenize_example(one, tokenizer, vision_id=True, media=media) for one in asked])]
    groups += [Group([tokenize_example(example(task, "train", 0, 1), tokenizer, vision_id=True)]) for task in TASKS]
    batch = pack(groups)
    assert len(batch.inputs["input_ids"]) < len(groups)
    alone = torch.cat([_losses(model, pack([Group([sample])])) for group in groups for sample in group.samples])
    assert torch.allclose(_losses(model, batch).sort().values, alone.sort().values, atol=1e-5)


def test_parts_of_a_batch_make_up_the_whole(folder: Path) -> None:
    tokenizer = ChatTokenizer(str(folder))
    whole = next(training_batches(tokenizer, seed=0))
    parts = [next(training_batches(tokenizer, seed=0, part=part, parts=2)) for part in range(2)]
    assert len(whole.targets) == sum(len(part.targets) for part in parts)
    assert torch.equal(whole.targets.sort().values, torch.cat([part.targets for part in parts]).sort().values)


@torch.no_grad()
def _losses(model: Any, batch: Batch) -> torch.Tensor:
    """The loss at every target, in the batch's order."""
    hidden = model.model(**batch.inputs).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[batch.before_targets])
    return cross_entropy(logits, batch.targets, reduction="none")
