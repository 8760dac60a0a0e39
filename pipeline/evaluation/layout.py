"""A published dataset's columns as questions: prompt, media, options and right answers, by config and without code.

    {question, options, answer: 1, image}  -->  {prompt: "...\nA. cat\nB. dog", choices, reference: ["B"], images}

The result is a manifest in our own column names, written as Parquet files, so that a run over it resumes like any
other. Templates are plain format strings over columns, and a line whose columns are all empty is left out.
Knows rows and columns; not media, models or scores.
"""

from __future__ import annotations

import itertools
import json
import re
import string
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, Field

from pipeline import storage
from pipeline.config import InputConfig, Section
from pipeline.errors import ManifestError
from pipeline.evaluation.columns import answer_texts, as_list, option_texts
from pipeline.evaluation.metrics.choice import LETTERS
from pipeline.manifest.files import Manifest
from pipeline.manifest.find import open_manifest
from pipeline.manifest.formats import read_units

_ROWS_PER_BATCH = 64
_ROWS_PER_FILE = 20_000
_ROWS_PER_GROUP = 200  # small, because rows hold images and readers take a few rows at a time
_IMAGE_MARK = re.compile(r"<image (\d+)>")
# MMBench's files went through pandas, which writes nan where a row has no hint or only two options.
_EMPTY_TEXTS = ("", "nan")

MEDIUM = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])


def _columns_of(template: str) -> list[str]:
    """Columns a template names. Raises ValueError for anything but `{name}`."""
    names = []
    for _, name, specification, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name or specification or conversion or any(mark in name for mark in ".[]"):
            raise ValueError(f"{template!r} has a field that is not a plain column name; allowed: {{name}}")
        names.append(name)
    return names


def _template(text: str) -> str:
    _columns_of(text)
    return text


Template = Annotated[str, AfterValidator(_template)]


class Layout(Section):
    """How one published dataset names its columns."""

    prompt: Template
    """The question: a format string over the dataset's columns; `{choices}` stands for the lettered options."""
    prompts: dict[str, Template] = Field(default_factory=dict)
    """Other prompts for the rows of some tasks."""
    images: list[str] = Field(default_factory=list)
    """Columns with images, in order; nulls are skipped. With `image_marks`, the n-th column is `<image n>`."""
    image_marks: bool = False
    """Whether `<image 1>` in the prompt marks the position of an image in the text (MMMU)."""
    video: Template | None = None
    """The video's path: a format string over the dataset's columns, as in `videos/{videoID}.mp4`."""
    choices: list[str] = Field(default_factory=list)
    """One column with a list of options (or the text of one), or several columns with an option each."""
    choice: str = "{letter}. {text}"
    """How an option is written in the prompt; `{text}` alone if the dataset's options already have letters."""
    answer: str = "answer"
    """Column with the right answer or answers."""
    answer_is: Literal["text", "letter", "index"] = "text"
    """What the answer column holds; a letter or an index (from 0) of an option becomes a letter as the reference."""
    task: str | None = None
    """Column that names the row's task."""
    id: str | None = None
    """Column with the row's id."""
    keep: list[str] = Field(default_factory=list)
    """Further columns for slices."""

    @property
    def columns(self) -> list[str]:
        """The dataset's columns that are read."""
        templates = (self.prompt, *self.prompts.values(), self.video or "")
        named = [name for template in templates for name in _columns_of(template)]
        if "choices" not in self.choices:  # in a template it is the lettered options, not a column
            named = [name for name in named if name != "choices"]
        named += [*self.images, *self.choices, self.answer, *self.keep, self.task or "", self.id or ""]
        return [name for name in dict.fromkeys(named) if name]


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The template with its columns' values; lines whose columns are all empty are left out."""
    lines = []
    for line in template.split("\n"):
        texts = {name: _text(values.get(name)) for name in _columns_of(line)}
        if texts and not any(texts.values()):
            continue
        fields = string.Formatter().parse(line)
        filled = "".join(literal + (texts[name] if name else "") for literal, name, _, _ in fields)
        lines.append(filled.strip() if texts else filled)
    return "\n".join(lines).strip()


def _text(value: Any) -> str:
    """The value as prompt text; empty for null and for the texts by which published datasets mean it."""
    text = "" if value is None else str(value)
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
    prompt = fill(layout.prompts.get(task or "", layout.prompt), {**row, "choices": lettered})
    images = [_medium(row.get(name), base) for name in layout.images]
    messages = None
    if layout.image_marks:
        messages, images = _interleave(prompt, images)
    return {
        "id": _text(row.get(layout.id)) or None if layout.id else None,
        "prompt": prompt,
        "messages": messages,
        "images": [image for image in images if image is not None],
        "video": _absolute(fill(layout.video, row), base) if layout.video else None,
        "choices": choices,
        "reference": _references(layout, row, choices),
        "task": task,
        **{name: _text(row.get(name)) for name in layout.keep},
    }


def _choices(layout: Layout, row: Mapping[str, Any]) -> list[str]:
    if len(layout.choices) == 1:
        choices = option_texts(row.get(layout.choices[0]))
    else:
        choices = option_texts([_text(row.get(name)) for name in layout.choices])
    if len(choices) > len(LETTERS):
        raise ManifestError(f"a row has {len(choices)} options; expected at most {len(LETTERS)}: one for each letter")
    return choices


def _references(layout: Layout, row: Mapping[str, Any], choices: Sequence[str]) -> list[str]:
    value = row.get(layout.answer)
    if value is None:
        return []
    text = str(value).strip()
    letters = list(LETTERS[: len(choices)])
    if layout.answer_is == "index":
        if text.isdecimal() and int(text) < len(letters):
            return [letters[int(text)]]
        expected = "a number from 0 on"
    elif layout.answer_is == "letter" and choices:
        letter = text.strip("().").upper()
        if letter in letters:
            return [letter]
        expected = "the letter"
    else:
        return answer_texts(as_list(value))
    raise ManifestError(f"column {layout.answer} holds {value!r}; expected {expected} of one of {len(choices)} options")


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


def _schema(layout: Layout) -> pa.Schema:
    strings = pa.list_(pa.string())
    columns = {
        "id": pa.string(),
        "prompt": pa.string(),
        "messages": pa.string() if layout.image_marks else None,
        "images": pa.list_(MEDIUM) if layout.images else None,
        "video": pa.string() if layout.video else None,
        "choices": strings if layout.choices else None,
        "reference": strings,
        "task": pa.string() if layout.task else None,
        **dict.fromkeys(layout.keep, pa.string()),
    }
    return pa.schema([(name, kind) for name, kind in columns.items() if kind is not None])


def prepare_manifest(
    layout: Layout, source: InputConfig, target: str, storage_options: storage.StorageOptions = None
) -> InputConfig:
    """Writes the dataset's rows as a manifest folder, unless it is there already, and returns the input that reads it.

    The source is a Parquet file, or a folder or glob of them. A video's path is relative to the source's folder.
    Raises ManifestError.
    """
    options = source.storage_options
    dataset = open_manifest(source.path, format="parquet", storage_options=options, listing_path=target)
    made_of = {"layout": layout.model_dump(mode="json"), "source": dataset.fingerprint(), "limit": source.limit}
    marker = storage.join(target, "_layout.json")
    try:
        found = json.loads(storage.read_bytes(marker, storage_options))
    except (FileNotFoundError, ValueError):
        _write(itertools.islice(_rows(layout, dataset), source.limit), _schema(layout), target, storage_options)
        storage.publish(marker, json.dumps(made_of, indent=2).encode(), storage_options)
    else:
        if found != made_of:
            raise ManifestError(
                f"{target} holds a manifest of another layout or source; delete it, or set evaluate.manifest_path"
            )
    update: dict[str, Any] = {"path": target, "format": "parquet", "columns": {}, "keep": [], "limit": None}
    return source.model_copy(update={**update, "allow": [*source.allow, dataset.base]})


def _write(
    rows: Iterator[dict[str, Any]], schema: pa.Schema, target: str, storage_options: storage.StorageOptions
) -> None:
    """Writes the rows as Parquet files, one after the other through this machine's disk."""
    storage.make_dir(target, storage_options)
    for number in itertools.count():
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "rows.parquet"
            num_rows = _write_file(local, schema, itertools.islice(rows, _ROWS_PER_FILE))
            if num_rows or number == 0:  # a dataset without rows becomes a manifest without rows
                storage.publish_file(local, storage.join(target, f"rows-{number:05d}.parquet"), storage_options)
        if num_rows < _ROWS_PER_FILE:
            break


def _write_file(path: Path, schema: pa.Schema, rows: Iterator[dict[str, Any]]) -> int:
    num_rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(itertools.islice(rows, _ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            num_rows += len(group)
    return num_rows


def _rows(layout: Layout, dataset: Manifest) -> Iterator[dict[str, Any]]:
    for number, file in enumerate(dataset.files):
        starts = range(0, file.num_rows, _ROWS_PER_BATCH)
        units = [dataset.unit(number, start, min(start + _ROWS_PER_BATCH, file.num_rows)) for start in starts]
        for table in read_units(dataset.spec, units, columns=layout.columns):
            for row in table.to_pylist():
                yield manifest_row(layout, row, dataset.base)
