"""The demo checkpoint's tokenizer: of the family's form, with a small vocabulary.

Knows text; not scenes' drawings, models or training.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.demo import CHECKPOINT
from pipeline.demo.tasks import TASKS, example
from pipeline.preprocess.prompt import (
    END_OF_TEXT,
    IMAGE_PAD,
    TURN_END,
    TURN_START,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
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


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer files with a vocabulary that is learned from the demo's questions and answers.

    The special tokens, the rule that splits text into words and the chat template are the checkpoint's. It encodes
    bytes, as the published one does, so that any text can be encoded. The template renders as the published one: it
    numbers pictures and videos over the whole conversation, and adds a system message where there is none.
    """
    from transformers import AutoTokenizer

    published_form: Any = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer = published_form.train_new_from_iterator(_corpus(), vocab_size=700, min_frequency=2, show_progress=False)
    tokenizer.save_pretrained(folder)


def special_token_ids(tokenizer_folder: Path) -> tuple[dict[str, int], int]:
    """Ids of the special tokens, and the size of the vocabulary, of a written tokenizer."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL_TOKENS}
    assert len(set(ids.values())) == len(ids), ids
    return ids, len(tokenizer)


def _corpus() -> Iterator[list[str]]:
    yield ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "Picture 1: ", "Video 1: "] * 100
    for task in TASKS:
        examples = [example(task, "train", 0, index) for index in range(_EXAMPLES_A_TASK)]
        yield [text for one in examples for text in (one.question, one.answer)]
