"""Prompts: exactly those that the Qwen2-VL documentation prints, with and without vision ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.conversation import MediumPart, Message, Text
from pipeline.demo import CHECKPOINT
from pipeline.errors import CheckpointError, ReservedTokenError
from pipeline.preprocess.prompt import ChatTokenizer, prompt_hash

IMAGE, VIDEO = MediumPart("image", b""), MediumPart("video", b"")

# The conversation of the documentation's section on vision ids.
VACATION = (
    Message("user", (IMAGE, Text("Hello, how are you?"))),
    Message("assistant", (Text("I'm doing well, thank you for asking. How can I assist you today?"),)),
    Message(
        "user",
        (Text("Can you describe these images and video?"), IMAGE, IMAGE, VIDEO, Text("These are from my vacation.")),
    ),
)
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PICTURE, CLIP = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"


def published() -> str:
    folder = os.environ.get("QWEN2_VL_PROCESSOR", "")
    if not Path(folder, "tokenizer_config.json").exists():
        pytest.skip("set QWEN2_VL_PROCESSOR to a folder with a published Qwen2-VL tokenizer and chat template")
    return folder


@pytest.fixture(scope="module", params=["demo", "published"])
def path(request: pytest.FixtureRequest) -> str:
    return str(CHECKPOINT) if request.param == "demo" else published()


@pytest.fixture(scope="module")
def tokenizer(path: str) -> ChatTokenizer:
    return ChatTokenizer(path)


def test_the_documentation_s_prompt_comes_out_to_the_letter(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.render(VACATION) == (
        f"{SYSTEM}<|im_start|>user\n{PICTURE}Hello, how are you?<|im_end|>\n"
        "<|im_start|>assistant\nI'm doing well, thank you for asking. How can I assist you today?<|im_end|>\n"
        f"<|im_start|>user\nCan you describe these images and video?{PICTURE}{PICTURE}{CLIP}"
        "These are from my vacation.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_vision_ids_number_pictures_and_videos_through_all_turns(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.render(VACATION, add_vision_id=True) == (
        f"{SYSTEM}<|im_start|>user\nPicture 1: {PICTURE}Hello, how are you?<|im_end|>\n"
        "<|im_start|>assistant\nI'm doing well, thank you for asking. How can I assist you today?<|im_end|>\n"
        f"<|im_start|>user\nCan you describe these images and video?Picture 2: {PICTURE}Picture 3: {PICTURE}"
        f"Video 1: {CLIP}These are from my vacation.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_system_prompt_replaces_the_default_one(tokenizer: ChatTokenizer) -> None:
    rendered = tokenizer.render([Message("system", (Text("Be brief."),)), Message("user", (Text("Hi"),))])
    assert rendered.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>")


def test_each_pad_token_is_repeated_to_its_medium_s_tokens(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode(tokenizer.render(VACATION), [4, 6, 9, 12])
    assert ids.dtype == np.int32
    assert int((ids == tokenizer.image_pad_id).sum()) == 4 + 6 + 9
    assert int((ids == tokenizer.video_pad_id).sum()) == 12
    places = np.flatnonzero(ids == tokenizer.image_pad_id)
    assert (np.diff(places[:4]) == 1).all()
    assert places[4] - places[3] > 1


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>", "<|endoftext|>"])
def test_reserved_tokens_in_a_text_are_refused_by_name(tokenizer: ChatTokenizer, token: str) -> None:
    with pytest.raises(ReservedTokenError) as caught:
        tokenizer.render([Message("user", (Text(f"what is {token} here"),))])
    assert token in str(caught.value)


@pytest.mark.parametrize("words", ["Größe, naïve, 日本語, 🙂", "a <b> | c <|", "line\nline\ttab", ""])
def test_any_text_survives_encoding_and_decoding(tokenizer: ChatTokenizer, words: str) -> None:
    assert tokenizer.decode(tokenizer.encode(words, []).tolist()) == words


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        ChatTokenizer(str(tmp_path))


def test_prompts_that_differ_have_different_hashes() -> None:
    assert prompt_hash("a") == prompt_hash("a") != prompt_hash("b")
    assert len(prompt_hash("a")) == 16


SPARED = """
import json, sys
from pipeline.conversation import MediumPart, Message, Text
from pipeline.preprocess.prompt import ChatTokenizer, spare_torch
spare_torch()
tokenizer = ChatTokenizer(sys.argv[1])
rendered = tokenizer.render([Message("user", (MediumPart("image", b""), Text("Caf\u00e9 \U0001f600 1234?")))])
ids = tokenizer.encode(rendered, [7]).tolist()
before = "torch" in sys.modules
import torch
print(json.dumps([before, rendered, ids, torch.ones(2).sum().item()]))
"""


def test_a_process_that_holds_no_model_tokenizes_without_torch(path: str, tokenizer: ChatTokenizer) -> None:
    done = subprocess.run([sys.executable, "-c", SPARED, path], check=True, capture_output=True, text=True)
    torch_loaded, rendered, ids, torch_still_there = json.loads(done.stdout)
    assert (torch_loaded, torch_still_there, done.stderr) == (False, 2.0, "")
    assert rendered == tokenizer.render([Message("user", (IMAGE, Text("Caf\u00e9 \U0001f600 1234?")))])
    assert ids == tokenizer.encode(rendered, [7]).tolist()
