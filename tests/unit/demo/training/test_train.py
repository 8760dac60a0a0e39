"""The recipe runs, resumes and writes a folder that loads; packing changes nothing that a question sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from pipeline.demo.tasks import TASKS, Example, example
from pipeline.demo.training import recipe
from pipeline.demo.training.batches import Batch, pack, training_batches
from pipeline.demo.training.optimiser import orthogonalise
from pipeline.demo.training.samples import make_sample, make_samples
from pipeline.demo.training.tokens import special_token_ids
from pipeline.demo.training.train import main, prepare
from pipeline.preprocess.prompt import ChatTokenizer

OPTIONS = ["--processes", "1", "--check-examples", "0", "--final-examples", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe")
    prepare(path)
    return path


def test_two_steps_and_one_more_write_a_loadable_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    output = tmp_path / "checkpoint"
    main(["--output", str(output), "--steps", "2", *OPTIONS])
    main(["--output", str(output), "--steps", "3", "--resume", *OPTIONS])
    assert torch.load(tmp_path / "checkpoint.training" / "state.pt")["step"] == 3
    model: Any = AutoModelForImageTextToText.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert sum(path.stat().st_size for path in output.iterdir()) < 8_000_000
    assert "3 steps" in (output / "README.md").read_text()
    ChatTokenizer(str(output))


def test_questions_packed_side_by_side_see_what_each_would_see_alone(folder: Path) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    tokenizer = ChatTokenizer(str(folder))
    ids, size = special_token_ids(folder)
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(recipe.model_config(size, ids)).eval()
    made = example("describe_image", "train", 0, 0)
    asked = [made, Example("count", made.media, "How many objects are there?", "Two.")]
    groups = [make_samples(asked, tokenizer, vision_id=True)]
    groups += [[make_sample(example(task, "train", 0, 1), tokenizer, vision_id=True)] for task in TASKS]
    together = _losses(model, pack(groups, prefix_length=14))
    alone = torch.cat([_losses(model, pack([[sample]], prefix_length=14)) for group in groups for sample in group])
    assert torch.allclose(together.sort().values, alone.sort().values, atol=1e-5)


def test_parts_of_a_batch_make_up_the_whole(folder: Path) -> None:
    tokenizer = ChatTokenizer(str(folder))
    whole = next(training_batches(tokenizer, seed=0))
    parts = [next(training_batches(tokenizer, seed=0, part=part, parts=2)) for part in range(2)]
    assert len(whole.targets) == sum(len(part.targets) for part in parts)
    assert torch.equal(whole.targets.sort().values, torch.cat([part.targets for part in parts]).sort().values)


def test_orthogonal_updates_have_directions_of_one_length() -> None:
    torch.manual_seed(0)
    for shape in ((8, 32), (32, 8), (16, 16)):
        matrix = torch.randn(shape) @ torch.diag(torch.logspace(0, -1, shape[1]))
        lengths = torch.linalg.svdvals(orthogonalise(matrix))
        assert lengths.min() > 0.3 and lengths.max() < 1.3


@torch.no_grad()
def _losses(model: Any, batch: Batch) -> torch.Tensor:
    """The loss at every target, in the batch's order."""
    hidden = model.model(
        input_ids=batch.input_ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        pixel_values=batch.pixel_values,
        image_grid_thw=batch.image_grid_thw,
        pixel_values_videos=batch.pixel_values_videos,
        video_grid_thw=batch.video_grid_thw,
    ).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[batch.target_places])
    return cross_entropy(logits, batch.targets, reduction="none")
