"""How a published set's columns become questions: prompt, media, options and right answers, by config and no code.

    {question, options, answer: 1, image}  -->  {prompt: "...\nA. cat\nB. dog", choices, reference: ["B"], images}

The result is a manifest in our own column names, written as Parquet part by part, so that a run over it resumes like
any other. Templates are plain format strings over columns, and a line whose columns are all empty is left out.
Knows rows and columns; not media, models or scores.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import string
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from pipeline import storage
from pipeline.config import Section
from pipeline.errors import ManifestError
from pipeline.evaluation.metrics.choice import LETTERS

_ROWS_PER_BATCH = 64
_ROWS_PER_FILE = 20_000
_ROWS_PER_GROUP = 200
_IMAGE_MARK = re.compile(r"<image (\d+)>")
# MMBench's files went through pandas, which left its mark where a row has no hint or only two options.
_EMPTY_TEXTS = ("", "nan")

MEDIUM = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])


class Layout(Section):
    """How one published set names its columns."""

    prompt: str
    """The question: a format string over the set's columns; `{choices}` stands for the lettered options."""
    prompts: dict[str, str] = Field(default_factory=dict)
    """Other prompts for the rows of some tasks."""
    images: list[str] = Field(default_factory=list)
    """Columns with images, in order; null ones are passed over. With `image_marks`, column n stands for `<image n>`."""
    image_marks: bool = False
    """Whether `<image 1>` in the prompt says where an image stands among the words (MMMU)."""
    video: str | None = None
    """The video's path: a format string over the set's columns, as in `videos/{videoID}.mp4`."""
    choices: list[str] = Field(default_factory=list)
    """One column with a list of options (or the text of one), or several columns with an option each."""
    choice: str = "{letter}. {text}"
    """How an option is written in the prompt; `{text}` alone where the set's options bring their letters."""
    answer: str = "answer"
    """Column with the right answer or answers."""
    answer_is: Literal["text", "letter", "index"] = "text"
    """What the answer column holds; a letter or an index (from 0) of an option becomes the reference's letter."""
    task: str | None = None
    """Column that names the row's task."""
    id: str | None = None
    """Column with the row's id."""
    keep: list[str] = Field(default_factory=list)
    """Further columns for slices."""

    @field_validator("prompt", "video")
    @classmethod
    def _is_a_template(cls, template: str | None) -> str | None:
        if template is not None:
            _columns_of(template)
        return template

    @field_validator("prompts")
    @classmethod
    def _are_templates(cls, prompts: dict[str, str]) -> dict[str, str]:
        for template in prompts.values():
            _columns_of(template)
        return prompts

    @property
    def columns(self) -> tuple[str, ...]:
        """The set's columns that are read."""
        named = [name for template in (self.prompt, *self.prompts.values()) for name in _columns_of(template)]
        named += _columns_of(self.video) if self.video else ()
        named += [*self.images, *self.choices, self.answer, *self.keep]
        named += [name for name in (self.task, self.id) if name]
        return tuple(dict.fromkeys(name for name in named if name != "choices" or "choices" in self.choices))


def _columns_of(template: str) -> tuple[str, ...]:
    """Columns a template names. Raises ValueError for anything but `{name}`."""
    names = []
    for _, name, specification, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name or specification or conversion or any(mark in name for mark in ".[]"):
            raise ValueError(f"{template!r} has a field that is not a plain column name; allowed: {{name}}")
        names.append(name)
    return tuple(dict.fromkeys(names))


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The template with its columns' values; lines whose columns are all empty are left out."""
    lines = []
    for line in template.split("\n"):
        names = _columns_of(line)
        texts = {name: _text(values.get(name)) for name in names}
        if names and not any(texts.values()):
            continue
        filled = "".join(
            literal + (texts[name] if name else "") for literal, name, _, _ in string.Formatter().parse(line)
        )
        lines.append(filled.strip() if names else filled)
    return "\n".join(lines).strip()


def _text(value: Any) -> str:
    """The value as prompt text; the ways in which published sets spell "nothing" are empty."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    text = str(value)
    return "" if text.strip().lower() in _EMPTY_TEXTS else text


def manifest_row(layout: Layout, row: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the set as a row of the manifest. Raises ManifestError where the row is not of the layout."""
    choices = _choices(layout, row)
    lettered = "\n".join(
        _plain_fill(layout.choice, {"letter": LETTERS[number], "text": text}) for number, text in enumerate(choices)
    )
    task = _text(row.get(layout.task)) if layout.task else None
    template = layout.prompts.get(task, layout.prompt) if task else layout.prompt
    prompt = fill(template, {**row, "choices": lettered})
    images = [_medium(row.get(name)) for name in layout.images]
    messages = None
    if layout.image_marks:
        messages, images = _interleaved(prompt, images)
    return {
        "id": _text(row.get(layout.id)) or None if layout.id else None,
        "prompt": prompt,
        "messages": messages,
        "images": [image for image in images if image is not None],
        "video": fill(layout.video, row) if layout.video else None,
        "choices": choices,
        "reference": _references(layout, row, choices),
        "task": task,
        **{name: _text(row.get(name)) for name in layout.keep},
    }


def _plain_fill(template: str, values: Mapping[str, str]) -> str:
    return template.replace("{letter}", values["letter"]).replace("{text}", values["text"])


def _choices(layout: Layout, row: Mapping[str, Any]) -> list[str]:
    if len(layout.choices) == 1:
        value = row.get(layout.choices[0])
        return [str(choice) for choice in _listed(value)]
    return [text for text in (_text(row.get(name)) for name in layout.choices) if text]


def _listed(value: Any) -> Sequence[Any]:
    """A list, or the text of one: MMMU writes its lists in Python's spelling."""
    if value is None:
        return []
    if isinstance(value, str):
        try:
            parsed = ast.literal_eval(value) if value.lstrip().startswith("[") else [value]
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [value]
        return parsed if isinstance(parsed, list) else [value]
    return list(value)


def _references(layout: Layout, row: Mapping[str, Any], choices: Sequence[str]) -> list[str]:
    value = row.get(layout.answer)
    if value is None:
        return []
    if layout.answer_is == "index":
        text = str(value).strip()
        if not text.isdecimal() or int(text) >= len(choices):
            raise ManifestError(
                f"column {layout.answer} holds {value!r}; expected the number, from 0, of one of {len(choices)} options"
            )
        return [LETTERS[int(text)]]
    if layout.answer_is == "letter" and choices:
        letter = str(value).strip().strip("().").upper()
        if letter not in LETTERS[: len(choices)]:
            raise ManifestError(f"column {layout.answer} holds {value!r}; expected a letter of {len(choices)} options")
        return [letter]
    return [str(item["answer"] if isinstance(item, Mapping) else item) for item in _listed(value) if item is not None]


def _medium(value: Any) -> dict[str, Any] | None:
    """An image column's value: the {bytes, path} struct, bytes, or a path."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        return {"bytes": content, "path": None if content else path} if content or path else None
    return {"bytes": value, "path": None} if isinstance(value, bytes) else {"bytes": None, "path": str(value)}


def _interleaved(prompt: str, images: Sequence[Any]) -> tuple[str, list[Any]]:
    """A user turn with the images where the prompt marks them, as JSON; and the images in that order.

    A later mention of the same image stays as words; images that are never mentioned come first.
    """
    numbers = [int(number) - 1 for number in _IMAGE_MARK.findall(prompt)]
    present = [number for number, image in enumerate(images) if image is not None]
    mentioned = [number for number in dict.fromkeys(numbers) if number in present]
    order = [number for number in present if number not in mentioned] + mentioned
    parts: list[dict[str, str]] = [{"type": "image"} for number in present if number not in mentioned]
    seen: set[int] = set()
    position = 0
    for mark in _IMAGE_MARK.finditer(prompt):
        number = int(mark[1]) - 1
        if number in mentioned and number not in seen:
            seen.add(number)
            parts += [{"type": "text", "text": prompt[position : mark.start()]}, {"type": "image"}]
            position = mark.end()
    parts.append({"type": "text", "text": prompt[position:]})
    parts = [part for part in parts if part["type"] == "image" or part["text"]]
    return json.dumps([{"role": "user", "content": parts}]), [images[number] for number in order]


def _schema(layout: Layout) -> pa.Schema:
    fields = [("id", pa.string()), ("prompt", pa.string())]
    if layout.image_marks:
        fields.append(("messages", pa.string()))
    if layout.images:
        fields.append(("images", pa.list_(MEDIUM)))
    if layout.video:
        fields.append(("video", pa.string()))
    if layout.choices:
        fields.append(("choices", pa.list_(pa.string())))
    fields.append(("reference", pa.list_(pa.string())))
    if layout.task:
        fields.append(("task", pa.string()))
    return pa.schema([*fields, *((name, pa.string()) for name in layout.keep)])


def prepare_manifest(
    layout: Layout,
    source: str,
    target: str,
    *,
    limit: int | None = None,
    source_options: storage.StorageOptions = None,
    storage_options: storage.StorageOptions = None,
) -> int:
    """Writes the set's rows as a manifest folder; an equal one that is there already is left alone. Returns its rows.

    `source` is a Parquet file or a folder of them. A video's path is taken relative to the source's folder. Raises
    ManifestError.
    """
    files = _source_files(source, source_options)
    asked = {
        "layout": layout.model_dump(mode="json"),
        "files": [[info.path, info.size] for info in files],
        "limit": limit,
    }
    mark = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    marker = storage.join(target, "_layout.json")
    try:
        done = json.loads(storage.read_bytes(marker, storage_options))
        if done.get("made_of") == mark:
            return int(done["num_rows"])
        raise ManifestError(
            f"{target} holds a manifest of another layout or source; take another output.path, or delete it"
        )
    except (FileNotFoundError, ValueError):
        pass
    base = source if storage.is_dir(source, source_options) else storage.parent(source)
    num_rows = _write(layout, files, base, target, limit, source_options, storage_options)
    note = json.dumps({"made_of": mark, "num_rows": num_rows, **asked}, indent=2)
    storage.publish(marker, note.encode(), storage_options)
    return num_rows


def _source_files(source: str, options: storage.StorageOptions) -> list[storage.FileInfo]:
    try:
        if storage.is_dir(source, options):
            found = [info for info in storage.list_files(source, options) if info.path.endswith(".parquet")]
        else:
            found = [storage.file_info(source, options)]
    except OSError as error:
        raise ManifestError(f"can't read the set {source}: {error}") from error
    if not found:
        raise ManifestError(f"{source} holds no Parquet file; expected a published set's data files")
    return found


def _write(
    layout: Layout,
    files: Sequence[storage.FileInfo],
    base: str,
    target: str,
    limit: int | None,
    source_options: storage.StorageOptions,
    storage_options: storage.StorageOptions,
) -> int:
    """Writes the manifest's files one after the other through this machine's disk; returns the rows."""
    schema = _schema(layout)
    storage.make_dir(target, storage_options)
    rows = _rows(layout, files, base, source_options)
    total, number = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        while limit is None or total < limit:
            local = Path(folder) / "rows.parquet"
            wanted = _ROWS_PER_FILE if limit is None else min(_ROWS_PER_FILE, limit - total)
            written = _write_file(local, schema, rows, wanted)
            if not written and number:
                break
            storage.publish_file(local, storage.join(target, f"rows-{number:05d}.parquet"), storage_options)
            total, number = total + written, number + 1
            if written < wanted:
                break
    return total


def _write_file(path: Path, schema: pa.Schema, rows: Iterator[dict[str, Any]], wanted: int) -> int:
    written = 0
    waiting: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        # Small row groups: they hold images, and readers take a few rows at a time.
        while written + len(waiting) < wanted:
            row = next(rows, None)
            if row is None:
                break
            waiting.append(row)
            if len(waiting) == _ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
                written, waiting = written + len(waiting), []
        if waiting:
            writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
    return written + len(waiting)


def _rows(
    layout: Layout, files: Sequence[storage.FileInfo], base: str, options: storage.StorageOptions
) -> Iterator[dict[str, Any]]:
    for info in files:
        try:
            with storage.open_input(info.path, options) as stream, pq.ParquetFile(stream) as file:
                names = file.schema_arrow.names
                missing = [name for name in layout.columns if name not in names]
                if missing:
                    raise ManifestError(
                        f"{info.path} has no column {', '.join(missing)}; found: {', '.join(names)}. "
                        "Is this the set that the layout is for?"
                    )
                for batch in file.iter_batches(_ROWS_PER_BATCH, columns=list(layout.columns)):
                    for row in batch.to_pylist():
                        yield _with_paths(manifest_row(layout, row), base)
        except (OSError, pa.ArrowException) as error:
            raise ManifestError(f"can't read {info.path}: {error}") from error


def _with_paths(row: dict[str, Any], base: str) -> dict[str, Any]:
    """Relative paths of media made absolute: the manifest lies elsewhere than the set."""
    for medium in row["images"]:
        if medium["path"]:
            medium["path"] = _absolute(medium["path"], base)
    if row["video"]:
        row["video"] = _absolute(row["video"], base)
    return row


def _absolute(path: str, base: str) -> str:
    if "://" in path or path.startswith(("/", "data:")):
        return path
    return storage.absolute(storage.join(base, path))
