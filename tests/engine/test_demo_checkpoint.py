"""The shipped demo checkpoint: the same tokens as transformers on rows of every kind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeline.demo
from pipeline.engine import EngineOptions, Request, load_engine
from tests.engine.tiny import (
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    mixed_requests,
    tokens_of,
)

FOLDER = Path(pipeline.demo.__file__).parent / "checkpoint"


def rows(count: int) -> list[Request]:
    """The tiny model's requests, with the demo checkpoint's ids for the special tokens."""
    config: dict[str, Any] = json.loads((FOLDER / "config.json").read_text())
    special = {
        IMAGE_PAD: config["image_token_id"],
        VIDEO_PAD: config["video_token_id"],
        VISION_START: config["vision_start_token_id"],
        VISION_END: config["vision_end_token_id"],
    }
    reserved = {value for name, value in config.items() if name.endswith("token_id")}
    words = [token for token in range(config["text_config"]["vocab_size"]) if token not in reserved]
    requests = []
    for request in mixed_requests(count, seed=12):
        ids = [special.get(int(i), words[int(i)]) for i in request.input_ids]
        requests.append(replace(request, input_ids=np.asarray(ids, dtype=np.int32)))
    return requests


def check(count: int) -> None:
    requests = rows(count)
    reference = load_engine(EngineOptions(str(FOLDER), kind="transformers", batch_size=1))
    expected = tokens_of(reference.generate(requests))
    budgets: list[dict[str, Any]] = [{}, {"max_running": 5, "max_batch_tokens": 48, "max_batch_patches": 64}]
    for options in budgets:
        assert tokens_of(load_engine(EngineOptions(str(FOLDER), **options)).generate(requests)) == expected


def test_the_demo_checkpoint_gives_the_tokens_of_transformers() -> None:
    check(16)


@pytest.mark.slow
def test_the_demo_checkpoint_gives_the_tokens_of_transformers_on_300_rows() -> None:
    check(300)
