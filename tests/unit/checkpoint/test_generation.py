"""What a checkpoint's makers sample with, by its own file and its family, and what a greedy job says of it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.families import FAMILIES
from pipeline.checkpoint.families.family import Family, Sampling
from pipeline.checkpoint.families.qwen2_5_vl import QWEN2_5_VL
from pipeline.checkpoint.families.qwen2_vl import QWEN2_VL
from pipeline.checkpoint.families.qwen3_vl import QWEN3_VL
from pipeline.checkpoint.generation import greedy_note, published_sampling
from pipeline.engine.settings import SamplingParams

QWEN3_FILE = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.0}
CARD = Sampling(temperature=0.7, top_k=20, top_p=0.8, presence_penalty=1.5)


@pytest.mark.parametrize(
    ("family", "thinks", "stated", "expected"),
    [
        (QWEN3_VL, False, None, CARD),
        (QWEN3_VL, False, QWEN3_FILE, CARD),  # the file can't say anything of presence
        (QWEN3_VL, True, {**QWEN3_FILE, "temperature": 0.6}, Sampling(temperature=0.6, top_k=20, top_p=0.8)),
        (QWEN3_VL, False, {"do_sample": False, "eos_token_id": [1]}, Sampling(presence_penalty=1.5)),
        (QWEN2_5_VL, False, {"do_sample": True, "temperature": 1e-6}, Sampling(repetition_penalty=1.05)),
        (QWEN2_5_VL, False, {"temperature": 0.1, "top_k": 1, "repetition_penalty": 1.0}, Sampling()),
        (QWEN2_VL, False, {"do_sample": True, "temperature": 0.01, "top_p": 0.001, "top_k": 1}, Sampling()),
    ],
)
def test_the_checkpoint_s_own_file_wins_over_its_family(
    tmp_path: Path, family: Family, thinks: bool, stated: dict[str, Any] | None, expected: Sampling
) -> None:
    if stated is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert published_sampling(str(tmp_path), family, thinks=thinks) == expected


def test_a_job_that_chooses_by_default_says_what_the_makers_do() -> None:
    def note(published: Sampling, **job: Any) -> str | None:
        return greedy_note(asdict(published), asdict(SamplingParams(**job)))

    card = "--sampling.temperature 0.7 --sampling.top_k 20 --sampling.top_p 0.8 --sampling.presence_penalty 1.5"
    assert str(note(CARD)).endswith(f" by {card} --sampling.seed 0")
    assert str(note(CARD, seed=7, max_tokens=9)).endswith(f" by {card}")
    assert str(note(Sampling(repetition_penalty=1.05))).endswith(" by --sampling.repetition_penalty 1.05")
    assert note(Sampling()) is note(CARD, temperature=0.2) is note(CARD, presence_penalty=1.0) is None


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_the_documentation_states_the_families_sampling(family: Family) -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    table = page.split("## How tokens are chosen")[1].split("\n## ")[0]
    for title, sampling in ((family.title, family.sampling), (f"{family.title}-Thinking", family.thinking_sampling)):
        row = next((line for line in table.splitlines() if line.startswith(f"| {title} |")), "")
        stated = {name: float(value) for name, value in re.findall(r"`(\w+) ([\d.]+)`", row)}
        assert Sampling(**{"temperature": 0.0, **stated}) == sampling  # type: ignore[arg-type]
