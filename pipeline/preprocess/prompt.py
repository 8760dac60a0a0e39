"""Messages to token ids, by the checkpoint's own tokenizer and chat template.

Both are used without transformers, which would load torch into every preprocessing actor; the results equal those of
its `apply_chat_template`. Knows text, the chat template and how many visual tokens each medium takes; no pixels.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2
import numpy as np
import numpy.typing as npt
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from pipeline.checkpoint.locate import find_file
from pipeline.conversation import MediumKind, MediumPart, Message, Text
from pipeline.errors import CheckpointError, ConfigError, MessageError, ReservedTokenError, first_line

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_TAG = re.compile(r"<[^<>\s]+>")
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it, but with one pad token for each medium."""

    text: str
    ids: npt.NDArray[np.int32]


class MediumTokens(NamedTuple):
    """What a medium becomes in a prompt: a run of its pad token; with `prompt_seconds` a run for each temporal step,
    between vision marks and after its time."""

    kind: MediumKind
    num_visual_tokens: int
    prompt_seconds: Sequence[float] = ()


class ChatTokenizer:
    """A checkpoint's tokenizer and chat template, from a local folder or a hub name.

    Raises CheckpointError when either can't be loaded.
    """

    def __init__(
        self,
        model_path: str,
        *,
        revision: str | None = None,
        thinking: bool = False,
        allow_tokens: Collection[str] = (),
    ) -> None:
        """`thinking` goes to the template. `allow_tokens` are reserved ones, none of them special, that texts may write
        all the same; raises ConfigError for others."""
        find = functools.partial(find_file, model_path, revision=revision)
        try:
            config = _read_json(find("tokenizer_config.json"))
            self._tokenizer = _load_tokenizer(find("tokenizer.json"), find("vocab.json"), find("merges.txt"), config)
            template = _processor_template(find("chat_template.jinja"), find("chat_template.json"))
            template = template or _tokenizer_template(config)
            self._template = _compile(template) if template else None
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers raises nothing more precise
            raise CheckpointError(
                f"can't load a tokenizer from {model_path!r}: {first_line(error)}; "
                "set model.path to a folder with a Qwen-VL checkpoint or to a hub name"
            ) from error
        if self._template is None:
            raise CheckpointError(f"{model_path!r} has no chat template: expected chat_template.json or .jinja in it")
        tokens = {name: config.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
        self._named_tokens = {
            f"{name}_token": token["content"] if isinstance(token, dict) else token
            for name, token in tokens.items()
            if token is not None
        }
        self.image_pad_id = self._token_id(IMAGE_PAD, model_path)
        self.video_pad_id = self._token_id(VIDEO_PAD, model_path)
        self._thinking = thinking
        added = self._tokenizer.get_added_tokens_decoder().items()
        tags = {token.content for _, token in added if not token.special and _TAG.fullmatch(token.content)}
        self._tags = tags
        if unknown := sorted(set(allow_tokens) - tags):
            raise ConfigError(
                f"prompt.allow_tokens: texts can't be allowed to write {', '.join(unknown)}; of this checkpoint's "
                f"tokens these can: {', '.join(sorted(tags)) or 'none'}"
            )
        reserved = {
            token.content: token_id
            for token_id, token in added
            if token.special or token.content in tags.difference(allow_tokens)
        }
        self._reserved_ids = np.array(sorted(reserved.values()), dtype=np.int32)
        # In texts of this letter no reserved token is found, not even together with what stands before or after it.
        self._harmless = next(letter for letter in map(chr, range(0xE000, 0xF900)) if letter not in "".join(reserved))
        self._reserved_of_template = functools.lru_cache(maxsize=1024)(self._reserved_in)

    def _token_id(self, token: str, model_path: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise CheckpointError(f"the tokenizer of {model_path!r} has no {token}: not a Qwen-VL checkpoint")
        return int(token_id)

    def render(self, messages: Sequence[Message], *, add_vision_id: bool = False) -> Prompt:
        """The prompt, ready for the assistant's turn.

        Raises MessageError when a text is not valid Unicode or the template refuses the messages. Raises
        ReservedTokenError when there are reserved tokens in the prompt that the template did not write. They would move
        or fake a medium, a turn, or thoughts. One may be made of a text and what stands beside it, so the prompt's
        reserved tokens are compared with those of the same conversation with harmless texts.

        Reserved are special tokens, and added ones in the form of a tag (`<think>`, `<tool_call>`); words that a
        fine-tune adds to the vocabulary are not.
        """
        prompt = self._render(messages, add_vision_id)
        found = self._reserved(prompt)
        expected = self._reserved_of_template(tuple(map(self._without_texts, messages)), add_vision_id)
        if found != expected:
            token = self._tokenizer.id_to_token(next(iter(Counter(found) - Counter(expected) or found or expected)))
            raise ReservedTokenError(
                f"the text makes {token}, alone or with the text beside it, which only the chat template may write: "
                f"remove or respell it{', or name it in prompt.allow_tokens' if token in self._tags else ''}"
            )
        return prompt

    def _render(self, messages: Sequence[Message], add_vision_id: bool) -> Prompt:
        assert self._template is not None
        try:
            text = self._template.render(
                **self._named_tokens,
                messages=[_template_message(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                add_vision_id=add_vision_id,
                enable_thinking=self._thinking,
            )
        except jinja2.TemplateError as error:
            raise MessageError(f"the checkpoint's chat template refuses the messages: {first_line(error)}") from error
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MessageError(f"the text holds {text[error.start]!r}, half of a character: {error.reason}") from error
        return Prompt(text, self.encode(text))

    def _reserved_in(self, messages: Sequence[Message], add_vision_id: bool) -> list[int]:
        return self._reserved(self._render(messages, add_vision_id))

    def _reserved(self, prompt: Prompt) -> list[int]:
        return list(map(int, prompt.ids[np.isin(prompt.ids, self._reserved_ids)]))

    @property
    def thinks(self) -> bool:
        """Whether the template begins the answer with thoughts that the model is to go on with."""
        text = self._render([Message("user", (Text(self._harmless),))], add_vision_id=False).text
        return text.rfind("<think>") > text.rfind("</think>")

    def _without_texts(self, message: Message) -> Message:
        """The message with harmless texts; blank ones stay, for a template may leave them out."""
        parts = (
            MediumPart(part.kind, b"")
            if isinstance(part, MediumPart)
            else Text(self._harmless if part.text.strip() else part.text)
            for part in message.parts
        )
        return Message(message.role, tuple(parts))

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids [length] of a text, in which special tokens are such."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def expand(self, prompt: Prompt, media: Sequence[MediumTokens]) -> npt.NDArray[np.int32]:
        """Token ids [length] with the tokens of each medium in the place of its pad. Raises MessageError."""
        ids = prompt.ids
        places = np.flatnonzero((ids == self.image_pad_id) | (ids == self.video_pad_id))
        if len(places) != len(media):
            raise MessageError(
                f"the checkpoint's chat template makes {len(places)} places for {len(media)} media; "
                "it needs one that knows images and videos, such as that of the published checkpoint"
            )
        pieces = np.split(ids, np.stack([places, places + 1], axis=1).reshape(-1))
        pieces[1::2] = [self._medium_ids(medium, ids[place]) for medium, place in zip(media, places, strict=True)]
        return np.concatenate(pieces)

    def _medium_ids(self, medium: MediumTokens, pad_id: np.int32) -> npt.NDArray[np.int32]:
        """Token ids [length] of a medium.

        Around the whole, transformers 5.23 leaves the vision marks that the template writes, timed steps or not.
        """
        if pad_id != (self.image_pad_id if medium.kind == "image" else self.video_pad_id):
            raise MessageError("the checkpoint's chat template takes an image for a video, or a video for an image")
        if not medium.prompt_seconds:
            return np.full(medium.num_visual_tokens, pad_id, dtype=np.int32)
        step = np.full(medium.num_visual_tokens // len(medium.prompt_seconds) + 2, pad_id, dtype=np.int32)
        step[0], step[-1] = (int(self.encode(mark)[0]) for mark in (VISION_START, VISION_END))
        times = [self.encode(f"<{second:.1f} seconds>") for second in medium.prompt_seconds]
        return np.concatenate([part for time in times for part in (time, step)])

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


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def _read_json(file: Path | None) -> dict[str, Any]:
    values = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(values, dict), f"{file} is not a JSON object"
    return values


def qwen_tokenizer(model: BPE) -> Tokenizer:
    """The tokenizer around a vocabulary and its merges, as transformers' Qwen2Tokenizer builds it."""
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _load_tokenizer(whole: Path | None, vocab: Path | None, merges: Path | None, config: dict[str, Any]) -> Tokenizer:
    """From tokenizer.json, else from the vocabulary, merges and special tokens that Qwen2's tokenizer consists of."""
    if whole is not None:
        tokenizer = Tokenizer.from_file(str(whole))
    elif vocab is not None and merges is not None:
        tokenizer = qwen_tokenizer(BPE.from_file(str(vocab), str(merges)))
    else:
        raise FileNotFoundError("expected tokenizer.json, or vocab.json and merges.txt")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    added = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    tokenizer.add_tokens([AddedToken(**token) for _, token in added if tokenizer.token_to_id(token["content"]) is None])
    return tokenizer


def _processor_template(jinja: Path | None, json_file: Path | None) -> str | None:
    """The processor's own template, which knows media."""
    if jinja is not None:
        return jinja.read_text(encoding="utf-8")
    return _read_json(json_file).get("chat_template")


def _tokenizer_template(config: dict[str, Any]) -> str | None:
    """The tokenizer's template, which may know text only."""
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((one["template"] for one in template if one["name"] == "default"), None)
    return template


class _GenerationBlock(Extension):
    """`{% generation %}`, by which templates mark the assistant's words for training: nothing to do here."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _compile(template: str) -> jinja2.Template:
    """The template with the functions and filters that transformers gives to all chat templates."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(template)
