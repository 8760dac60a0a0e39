"""The demo checkpoint's tokenizer and chat template: the family's form, with a vocabulary of this world's words.

Knows text; not scenes' drawings, models or training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.demo.tasks import TASKS, example
from pipeline.preprocess.prompt import (
    END_OF_TEXT,
    IMAGE_PAD,
    TURN_END,
    TURN_START,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    qwen2_tokenizer,
)

SPECIAL_TOKENS = (
    END_OF_TEXT,
    TURN_START,
    TURN_END,
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE_PAD,
    VIDEO_PAD,
)
_EXAMPLES_A_TASK = 1000

# Renders as the published template of Qwen2-VL does: pictures and videos are numbered over the whole conversation,
# and a conversation that does not open with a system message gets the default one.
CHAT_TEMPLATE = """\
{%- set seen = namespace(pictures=0, videos=0) -%}
{%- for message in messages -%}
    {%- if loop.first and message['role'] != 'system' -%}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
                {%- set seen.pictures = seen.pictures + 1 -%}
                {%- if add_vision_id -%}
                    {{- 'Picture ' ~ seen.pictures ~ ': ' -}}
                {%- endif -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part['type'] == 'video' or 'video' in part -%}
                {%- set seen.videos = seen.videos + 1 -%}
                {%- if add_vision_id -%}
                    {{- 'Video ' ~ seen.videos ~ ': ' -}}
                {%- endif -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def write_tokenizer(folder: Path) -> None:
    """Tokenizer files and `chat_template.jinja`, trained on the questions and answers of this world.

    Byte-level like the published one, so that any text can be encoded; only its words are few.
    """
    from transformers import Qwen2Tokenizer

    vocabulary, merges = _byte_pairs()
    tokenizer: Any = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=None,
        bos_token=None,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def special_token_ids(tokenizer_folder: Path) -> tuple[dict[str, int], int]:
    """Ids of the special tokens, and the size of the vocabulary, of a written tokenizer."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL_TOKENS}
    assert len(set(ids.values())) == len(ids), ids
    return ids, len(tokenizer)


def _byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, by the family's own splitting rule."""
    import json

    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = qwen2_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=700, min_frequency=2, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def _corpus() -> list[str]:
    frame = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "Picture 1: ", "Video 1: "] * 100
    examples = (example(task, "train", 0, index) for task in TASKS for index in range(_EXAMPLES_A_TASK))
    return frame + [text for made in examples for text in (made.question, made.answer)]
