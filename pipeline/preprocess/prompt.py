"""Messages to token ids, by the checkpoint's own tokenizer and chat template.

Knows text, the chat template and how many visual tokens each medium takes; not pixels, files or models.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.conversation import Message, Text
from pipeline.errors import CheckpointError, ReservedTokenError


def spare_torch() -> None:
    """Let transformers believe that there is no torch, in a process that needs its tokenizers and will never hold a
    model: they then cost it 0.8 s and 20 MB in place of 2 s and 200 MB. torch itself stays importable.

    Does nothing where torch is loaded already.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    silent = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(silent)
    os.environ[silent] = "1"
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say that a module is not to be had
    try:
        import transformers

        assert not transformers.is_torch_available()  # it looks once and remembers
    finally:
        del sys.modules["torch"], os.environ[silent]
        if before is not None:
            os.environ[silent] = before


IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"


class ChatTokenizer:
    """A checkpoint's tokenizer and chat template, from a local folder or a hub name.

    Raises CheckpointError when either can't be loaded.
    """

    def __init__(self, model_path: str, *, revision: str | None = None) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model_path, revision=revision)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError and its own, by version
            raise CheckpointError(
                f"can't load a tokenizer from {model_path!r}: {_first_line(error)}; "
                "set model.path to a folder with a Qwen2-VL checkpoint or to a hub name"
            ) from error
        self._template = _chat_template(model_path, revision) or self._tokenizer.chat_template
        if not self._template:
            raise CheckpointError(f"{model_path!r} has no chat template: expected chat_template.json or .jinja in it")
        self.image_pad_id = self._token_id(IMAGE_PAD, model_path)
        self.video_pad_id = self._token_id(VIDEO_PAD, model_path)
        self._reserved = tuple(
            token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special
        )

    def _token_id(self, token: str, model_path: str) -> int:
        token_id = self._tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self._tokenizer.unk_token_id:
            raise CheckpointError(f"the tokenizer of {model_path!r} has no {token}: not a Qwen2-VL checkpoint")
        return int(token_id)

    def render(self, messages: Sequence[Message], *, add_vision_id: bool = False) -> str:
        """The prompt as text, one pad token for each medium, ready for the assistant's turn.

        Raises ReservedTokenError when a text holds a special token: it would move or fake a medium or a turn.
        """
        for message in messages:
            for part in message.parts:
                if isinstance(part, Text):
                    self._refuse_reserved(part.text)
        rendered = self._tokenizer.apply_chat_template(
            [_template_message(message) for message in messages],
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=True,
            add_vision_id=add_vision_id,
        )
        assert isinstance(rendered, str)
        return rendered

    def _refuse_reserved(self, text: str) -> None:
        if "<|" not in text:  # every special token of the family begins so; the long scan is for the rare rest
            return
        for token in self._reserved:
            if token in text:
                raise ReservedTokenError(
                    f"the text contains {token}, which only the pipeline may write: remove or respell it"
                )

    def encode(self, rendered: str, num_visual_tokens: Sequence[int]) -> npt.NDArray[np.int32]:
        """Token ids [length] of a rendered prompt, each medium's pad token repeated to its number of tokens."""
        ids = np.asarray(self._tokenizer(rendered, add_special_tokens=False)["input_ids"], dtype=np.int32)
        is_pad = (ids == self.image_pad_id) | (ids == self.video_pad_id)
        assert int(is_pad.sum()) == len(num_visual_tokens), (int(is_pad.sum()), len(num_visual_tokens))
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[is_pad] = num_visual_tokens
        return np.repeat(ids, repeats)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated ids, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


def prompt_hash(rendered: str) -> str:
    """Sixteen hex digits that tell two prompts apart; the same prompt gives the same digits everywhere."""
    return hashlib.sha256(rendered.encode()).hexdigest()[:16]


def _template_message(message: Message) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": part.kind} for part in message.parts
    ]
    return {"role": message.role, "content": content}


def _chat_template(model_path: str, revision: str | None) -> str | None:
    """The processor's own template, which knows media; the tokenizer's may know text only."""
    from transformers.utils import cached_file

    for name in ("chat_template.jinja", "chat_template.json"):
        found = cached_file(
            model_path,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found:
            text = Path(found).read_text(encoding="utf-8")
            return str(json.loads(text)["chat_template"]) if name.endswith(".json") else text
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
