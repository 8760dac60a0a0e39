"""The demo tokenizer and chat template are of the family's form."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.conversation import MediumPart, Message, Text
from pipeline.demo.tasks import TASKS, example
from pipeline.demo.training.tokens import SPECIAL_TOKENS, special_token_ids, write_tokenizer
from pipeline.preprocess.prompt import ChatTokenizer

# A folder with the processor files of a published checkpoint, where there is one.
PUBLISHED = os.environ.get("QWEN2_VL_PROCESSOR")

IMAGE, VIDEO = {"type": "image"}, {"type": "video"}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": [IMAGE, {"type": "text", "text": "Describe the image."}]}],
    [{"role": "user", "content": [{"type": "text", "text": " What \n is this? "}, VIDEO]}],
    [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": [IMAGE, IMAGE, VIDEO, {"type": "text", "text": "Compare."}]},
        {"role": "assistant", "content": "They differ."},
        {"role": "user", "content": [{"type": "text", "text": "And"}, IMAGE, VIDEO, {"type": "text", "text": "?"}]},
    ],
    [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"image": "a.png"}, {"image_url": "b.png"}, {"video": "c.mp4"}, {"text": "Hi"}]},
        {"role": "user", "content": []},
    ],
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.mark.skipif(PUBLISHED is None, reason="QWEN2_VL_PROCESSOR names no folder with a published processor")
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("vision_id", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_template_renders_as_the_published_one(
    folder: Path, conversation: list[dict[str, Any]], vision_id: bool, prompt: bool
) -> None:
    assert PUBLISHED is not None
    published = json.loads((Path(PUBLISHED) / "chat_template.json").read_text())["chat_template"]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ours, theirs = (
        tokenizer.apply_chat_template(
            conversation,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=prompt,
            add_vision_id=vision_id,
        )
        for template in (None, published)
    )
    assert ours == theirs


def test_the_prompt_of_the_documentation(folder: Path) -> None:
    message = Message("user", (MediumPart("image", b""), MediumPart("video", b""), Text("What is it?")))
    tokenizer = ChatTokenizer(str(folder))
    assert tokenizer.render([message], add_vision_id=True).text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "Picture 1: <|vision_start|><|image_pad|><|vision_end|>Video 1: <|vision_start|><|video_pad|><|vision_end|>"
        "What is it?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_any_text_survives_the_tokenizer(folder: Path) -> None:
    tokenizer = ChatTokenizer(str(folder))
    for text in ("Zürich, 東京, 🦜\n\ttabs  and spaces", "It's 2024-05-06."):
        assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_words_of_this_world_are_single_tokens(folder: Path) -> None:
    tokenizer = ChatTokenizer(str(folder))
    for task in TASKS:
        for index in range(20):
            answer = example(task, "held-out", 0, index).answer
            assert len(tokenizer.encode(answer)) <= len(answer.replace(",", " ,").replace(".", " .").split()) + 2


def test_special_tokens_are_those_of_the_family(folder: Path) -> None:
    ids, size = special_token_ids(folder)
    assert list(ids) == list(SPECIAL_TOKENS) and max(ids.values()) < size < 700
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.decode([ids["<|im_end|>"]], skip_special_tokens=True) == ""
