"""A published dataset's columns as questions: prompt, media, options and right answers, by config and without code.

    {question, options, answer: 1, image}  -->  {prompt: "...\nA. cat\nB. dog", choices, reference: ["B"], images}

The result is a row of a manifest in our own column names. Templates are plain format strings over columns, and a line
whose columns are all empty is left out. Knows rows and columns; not files, media, models or scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline import storage
from pipeline.config import Section
from pipeline.errors import ManifestError
from pipeline.evaluation.columns import answer_texts, option_texts, plain_text
from pipeline.evaluation.metrics.choice import LETTERS
from pipeline.preprocess.messages.columns import parse_template
from pipeline.schema import ROW_COLUMNS

_IMAGE_MARK = re.compile(r"<image (\d+)>")
# MMBench's files went through pandas, which writes nan where a row has no hint or only two options.
_EMPTY_TEXTS = ("", "nan")
_MADE_COLUMNS = ("prompt", "messages", "images", "video", "choices", "reference", "task")


def _columns_of(template: str) -> list[str]:
    """Columns a template names. Raises ValueError for anything but `{name}`."""
    return [name for _, name in parse_template(template) if name is not None]


def _template(text: str) -> str:
    _columns_of(text)
    return text


def _row_template(text: str) -> str:
    if not _columns_of(text):
        raise ValueError(f"{text!r} is the same for every row; write columns in braces, as in {{{text}}}")
    return text


Template = Annotated[str, AfterValidator(_template)]
RowTemplate = Annotated[str, AfterValidator(_row_template)]


class Layout(Section):
    """How one published dataset names its columns."""

    split: str | None = None
    """The split whose rows are asked: a name, or a pattern such as `test*`. A file's name begins with its split, as in
    `validation-00000-of-00001.parquet`, or a folder has the split's name. Required where there are several splits."""
    split_column: str | None = None
    """Column that holds each row's split, where file names do not tell it."""
    prompt: Template
    """The question: a format string over the dataset's columns; `{choices}` stands for the lettered options."""
    prompts: dict[str, Template] = Field(default_factory=dict)
    """Other prompts for the rows of some tasks."""
    images: list[str] = Field(default_factory=list)
    """Columns with images, in order; nulls are skipped. With `image_marks`, the n-th column is `<image n>`."""
    image_marks: bool = False
    """Whether `<image 1>` in the prompt marks the position of an image in the text (MMMU)."""
    video: Template | None = None
    """The video's path: a format string over the dataset's columns, as in `videos/{videoID}`. The extension is that of
    the file that is there: `.mp4`, `.MP4`, `.mkv` or another."""
    choices: list[str] = Field(default_factory=list)
    """One column with a list of options (or the text of one), or several columns with an option each."""
    choice: str = "{letter}. {text}"
    """How an option is written in the prompt; `{text}` alone if the dataset's options already have letters."""
    answer: str = "answer"
    """Column with the right answer or answers."""
    answer_is: Literal["text", "letter", "index"] = "text"
    """What the answer column holds; a letter or an index (from 0) of an option becomes a letter as the reference."""
    no_answer: list[str] = Field(default_factory=lambda: ["?", "nan"])
    """What the answer column holds, besides null and empty values, in rows whose answer is not published. Rows without
    an answer are left out."""
    task: str | None = None
    """Column that names the row's task."""
    id: RowTemplate | None = None
    """The row's id, unique in the dataset: a format string over columns, as in `{video}-{qid}`. Runs over different
    selections of the dataset are compared by it."""
    keep: list[str] = Field(default_factory=list)
    """Further columns for slices."""

    @field_validator("keep")
    @classmethod
    def _kept_names_are_free(cls, keep: list[str]) -> list[str]:
        if taken := sorted(set(keep) & {*_MADE_COLUMNS, *ROW_COLUMNS}):
            raise ValueError(f"{', '.join(taken)} would collide with the column of that name that the layout makes")
        return keep

    @model_validator(mode="after")
    def _names_a_split(self) -> Layout:
        if self.split_column and not self.split:
            raise ValueError("split_column needs split: the value of the rows to ask")
        return self

    @property
    def columns(self) -> list[str]:
        """The dataset's columns that are read."""
        templates = (self.prompt, *self.prompts.values(), self.video or "", self.id or "")
        named = [name for template in templates for name in _columns_of(template)]
        if "choices" not in self.choices:  # in a template it is the lettered options, not a column
            named = [name for name in named if name != "choices"]
        named += [*self.images, *self.choices, self.answer, *self.keep]
        named += [self.task or "", self.split_column or ""]
        return [name for name in dict.fromkeys(named) if name]


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The template with its columns' values; lines whose columns are all empty are left out."""
    lines = []
    for line in template.split("\n"):
        texts = {name: _text(values.get(name)) for name in _columns_of(line)}
        if texts and not any(texts.values()):
            continue
        filled = "".join(literal + (texts[name] if name else "") for literal, name in parse_template(line))
        lines.append(filled.strip() if texts else filled)
    return "\n".join(lines).strip()


def _text(value: Any) -> str:
    """The value as prompt text; empty for null and for the texts by which published datasets mean it."""
    text = plain_text(value)
    return "" if text.strip().lower() in _EMPTY_TEXTS else text


def manifest_row(layout: Layout, row: Mapping[str, Any], base: str | None = None) -> dict[str, Any]:
    """One row of the dataset as a row of the manifest, with media paths relative to `base` made absolute.

    Raises ManifestError if the row does not fit the layout.
    """
    choices = _choices(layout, row)
    lettered = "\n".join(
        layout.choice.replace("{letter}", letter).replace("{text}", text)
        for letter, text in zip(LETTERS, choices, strict=False)
        if text
    )
    task = _text(row.get(layout.task)) if layout.task else None
    values = {name: row.get(name) for name in layout.columns if name not in layout.images}
    prompt = fill(layout.prompts.get(task or "", layout.prompt), {**values, "choices": lettered})
    images = [_medium(row.get(name), base) for name in layout.images]
    messages = None
    if layout.image_marks:
        messages, images = _interleave(prompt, images)
    return {
        "id": _row_id(layout, row),
        "prompt": prompt,
        "messages": messages,
        "images": [image for image in images if image is not None],
        "video": _absolute(fill(layout.video, row), base) or None if layout.video else None,
        "choices": choices,
        "reference": _references(layout, row, choices),
        "task": task,
        **{name: _text(row.get(name)) or None for name in layout.keep},
    }


def _row_id(layout: Layout, row: Mapping[str, Any]) -> str | None:
    """None if the layout has no id, or one of its columns is empty."""
    if not layout.id or not all(_text(row.get(name)) for name in _columns_of(layout.id)):
        return None
    return fill(layout.id, row)


def _choices(layout: Layout, row: Mapping[str, Any]) -> list[str]:
    if len(layout.choices) == 1:
        choices = option_texts(row.get(layout.choices[0]))
    else:
        choices = option_texts([_text(row.get(name)) for name in layout.choices])
    if len(choices) > len(LETTERS):
        raise ManifestError(f"a row has {len(choices)} options; expected at most {len(LETTERS)}: one for each letter")
    return choices


def _references(layout: Layout, row: Mapping[str, Any], choices: Sequence[str]) -> list[str]:
    """The right answers as letters or texts; empty if the row has none."""
    value = row.get(layout.answer)
    text = plain_text(value).strip()
    if text in ("", *layout.no_answer):
        return []
    if layout.answer_is == "text" or (layout.answer_is == "letter" and not choices):
        return answer_texts(value)
    letters = dict(zip(LETTERS, choices, strict=False))
    if layout.answer_is == "index":
        letter, expected = (
            LETTERS[int(text)] if text.isdecimal() and int(text) < len(letters) else "",
            "number, from 0,",
        )
    else:
        letter, expected = text.strip("().").upper(), "letter"
    if not letters.get(letter, "").strip():
        raise ManifestError(
            f"column {layout.answer} holds {value!r}; expected the {expected} of one of {len(choices)} options; "
            "a value that stands for no answer belongs in evaluate.layout.no_answer"
        )
    return [letter]


def _medium(value: Any, base: str | None) -> dict[str, Any] | None:
    """An image column's value: the {bytes, path} struct, bytes, or a path."""
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
    else:
        content, path = (value, None) if isinstance(value, bytes) else (None, value)
    if content:
        return {"bytes": content, "path": None}
    return {"bytes": None, "path": _absolute(str(path), base)} if path else None


def _absolute(path: str, base: str | None) -> str:
    if not base or not path or "://" in path or path.startswith(("/", "data:")):
        return path
    return storage.absolute(storage.join(base, path))


def _interleave(prompt: str, images: Sequence[Any]) -> tuple[str, list[Any]]:
    """A user turn with the images where the prompt marks them, as JSON; and the images in that order.

    A later mark of the same image remains text; images without a mark come first.
    """
    text, *rest = _IMAGE_MARK.split(prompt)
    parts: list[dict[str, str]] = []
    marked: list[int] = []
    for number, following in zip(rest[::2], rest[1::2], strict=True):
        index = int(number) - 1
        if index in marked or not 0 <= index < len(images) or images[index] is None:
            text += f"<image {number}>{following}"
            continue
        marked.append(index)
        parts += [{"type": "text", "text": text}, {"type": "image"}]
        text = following
    parts.append({"type": "text", "text": text})
    unmarked = [index for index, image in enumerate(images) if image is not None and index not in marked]
    parts = [{"type": "image"} for _ in unmarked] + [part for part in parts if part.get("text") != ""]
    return json.dumps([{"role": "user", "content": parts}]), [images[index] for index in unmarked + marked]
