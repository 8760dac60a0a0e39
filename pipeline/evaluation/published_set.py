"""A published dataset's files as a manifest: the rows of one split that have an answer, asked as its layout says.

The rows are chosen first, from the columns other than images: rows whose answer is hidden cost no generation. Then they
are written as Parquet files, so that a run over them resumes like any other. Knows files and rows; not what a question
looks like, models or scores.
"""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config import InputConfig
from pipeline.errors import ManifestError, MessageError
from pipeline.evaluation.columns import plain_text
from pipeline.evaluation.layout import Layout, manifest_row
from pipeline.manifest.changes import same_rows
from pipeline.manifest.files import Manifest, relative
from pipeline.manifest.find import open_manifest
from pipeline.manifest.formats import VIDEO_SUFFIXES, read_units
from pipeline.manifest.parquet import notes_metadata
from pipeline.preprocess.messages.values import manifest_rows
from pipeline.storage import StorageOptions

_ROWS_PER_BATCH = 64
_ROWS_PER_FILE = 20_000
_ROWS_PER_GROUP = 200  # small, because rows hold images and readers take a few rows at a time
_FILE_NAME = re.compile(r"rows-\d{5}\.parquet")
_KNOWN_SPLIT = re.compile(r"(train(ing)?|val(id(ation)?)?|dev|test(ing|dev|mini)?|eval(uation)?)(_.*)?")
_SPLIT_ENDS = re.compile(r"[-.]|_?\d")
"""What follows the split in the name of a file: `validation-00000-of-00001.parquet`, `val2014.parquet`."""

MEDIUM = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])


def prepare_manifest(
    layout: Layout, source: InputConfig, target: str, storage_options: StorageOptions = None
) -> InputConfig:
    """Writes the dataset's rows as a manifest folder, unless it is there already, and returns the input that reads it.

    The source is a Parquet file, or a folder or glob of them. A video's path is relative to the source's folder.
    Raises ManifestError.
    """
    options = source.storage_options
    dataset = open_manifest(source.path, format="parquet", storage_options=options, listing_path=target)
    dataset = _of_split(layout, dataset)
    made_of = {"layout": layout.model_dump(mode="json"), "limit": source.limit}
    of_source = dataset.fingerprint()
    marker = storage.join(target, "_layout.json")
    try:
        found = json.loads(storage.read_bytes(marker, storage_options))
    except (FileNotFoundError, ValueError):
        found = None
    if found is not None and (
        {name: found.get(name) for name in made_of} != made_of or same_rows(found["source"], of_source) is False
    ):
        raise ManifestError(
            f"{target} holds a manifest of another layout or source; delete it, or set evaluate.manifest_path"
        )
    if found is None or found["missing_videos"]:  # which may be there by now, under another extension
        videos = _Videos(options)
        chosen = _choose_rows(layout, dataset, source.limit, videos)
        rows = _manifest_rows(layout, dataset, chosen.rows, videos)
        schema = _schema(layout).with_metadata(notes_metadata(chosen.notes(layout)))
        _write(rows, schema, target, storage_options)
        content = json.dumps(made_of | {"source": of_source, "missing_videos": chosen.num_missing_videos}, indent=2)
        storage.publish(marker, content.encode(), storage_options)
    update: dict[str, Any] = {"path": target, "format": "parquet", "columns": {}, "keep": {}, "limit": None}
    return source.model_copy(update={**update, "allow": [*source.allow, dataset.base]})


def _of_split(layout: Layout, dataset: Manifest) -> Manifest:
    """The dataset with the files of the layout's split. All of them where their names tell no split."""
    if layout.split_column:
        return dataset
    names = [_possible_splits(relative(file.path, dataset.base)) for file in dataset.files]
    known = {next(filter(_KNOWN_SPLIT.fullmatch, one), "") for one in names} - {""}
    shown = ", ".join(sorted(known))
    if layout.split is None:
        if len(known) > 1:
            raise ManifestError(f"{dataset.path} holds several splits: {shown}; set evaluate.layout.split to one")
        return dataset
    pattern = layout.split.lower()
    files = [
        file
        for file, one in zip(dataset.files, names, strict=True)
        if not known or any(fnmatchcase(name, pattern) for name in one)
    ]
    if not files:
        raise ManifestError(
            f"{dataset.path} has no file of the split {layout.split}; by the files' names it holds {shown}: "
            "set evaluate.layout.split"
        )
    return replace(dataset, files=tuple(files))


def _possible_splits(path: str) -> list[str]:
    """How a file's name begins, and the folders above it."""
    return [_SPLIT_ENDS.split(part)[0] for part in reversed(path.lower().split("/"))]


class _Videos:
    """Finds videos by their name without extension. Lists each folder once."""

    def __init__(self, options: StorageOptions) -> None:
        self._options = options
        self._folders: dict[str, dict[str, str]] = {}

    def find(self, path: str) -> str | None:
        """The video of this path, or of this name with another extension; None if there is none."""
        if path.startswith(("http://", "https://", "data:")):
            return path
        folder = storage.parent(path)
        if folder not in self._folders:
            self._folders[folder] = self._listed(folder)
        names = self._folders[folder]
        return names.get(storage.name(path)) or names.get(_stem(path))

    def _listed(self, folder: str) -> dict[str, str]:
        """Path by name and by name without extension; of several extensions the most usual."""
        try:
            found = [info.path for info in storage.list_files(folder, self._options, recursive=False)]
        except OSError as error:
            raise ManifestError(f"can't list the videos in {folder}: {error}") from error
        videos = [path for path in found if path.lower().endswith(VIDEO_SUFFIXES)]
        videos.sort(key=lambda path: VIDEO_SUFFIXES.index(_suffix(path)), reverse=True)
        return {_stem(path): path for path in videos} | {storage.name(path): path for path in videos}


def _suffix(path: str) -> str:
    """A video's extension in lower case; empty where it has none."""
    return next((suffix for suffix in VIDEO_SUFFIXES if path.lower().endswith(suffix)), "")


def _stem(path: str) -> str:
    name = storage.name(path)
    return name[: len(name) - len(_suffix(name))]


@dataclass
class _Chosen:
    """Which rows are asked, and what was seen while choosing them."""

    rows: dict[int, list[int]] = field(default_factory=dict)
    """Row numbers by the file's number."""
    num_rows: int = 0
    """Of the split, with or without an answer."""
    num_answered: int = 0
    num_missing_videos: int = 0
    ids: Counter[str | None] = field(default_factory=Counter)

    def notes(self, layout: Layout) -> list[str]:
        """What people should know; a sentence each."""
        notes = []
        if hidden := self.num_rows - self.num_answered:
            notes.append(
                f"{hidden:,} of {self.num_rows:,} rows have no answer in the column {layout.answer} and are left out"
            )
        if layout.id and (count := self.ids.pop(None, 0)):
            notes.append(f"{count:,} rows have no id: an empty column in {layout.id}")
        shared = {name: count for name, count in self.ids.items() if name is not None and count > 1}
        if shared:
            notes.append(f"{sum(shared.values()):,} rows share their id with another, such as {next(iter(shared))}")
        return notes


def _choose_rows(layout: Layout, dataset: Manifest, limit: int | None, videos: _Videos) -> _Chosen:
    """The first `limit` rows of the split that have an answer. Raises ManifestError if none has."""
    chosen, others, expected = _Chosen(), Counter[str](), ""
    every = {number: range(file.num_rows) for number, file in enumerate(dataset.files)}
    columns = [name for name in layout.columns if name not in layout.images]
    for file, number, row in _read(dataset, every, columns):
        if layout.split_column and layout.split:
            split = plain_text(row[layout.split_column])
            if not fnmatchcase(split.lower(), layout.split.lower()):
                others[split] += 1
                continue
        chosen.num_rows += 1
        try:
            made = manifest_row(layout, row, dataset.base)
        except (ManifestError, MessageError) as error:
            raise ManifestError(f"row {number} of {dataset.files[file].path}: {error}") from error
        if not made["reference"]:
            continue
        chosen.rows.setdefault(file, []).append(number)
        chosen.num_answered += 1
        chosen.ids[made["id"]] += 1
        if made["video"] and videos.find(made["video"]) is None:
            chosen.num_missing_videos += 1
            expected = expected or made["video"]
        if chosen.num_answered == limit:
            break
    if others and not chosen.num_rows:
        raise ManifestError(f"no row has the split {layout.split}: {layout.split_column} holds {', '.join(others)}")
    if chosen.num_rows and not chosen.num_answered:
        raise ManifestError(
            f"none of the {chosen.num_rows:,} rows has an answer in the column {layout.answer}, so none can be scored: "
            f"set input.path or evaluate.layout.split (now {layout.split or 'none'}) to rows that have"
        )
    if expected and chosen.num_missing_videos == chosen.num_answered:
        raise ManifestError(
            f"none of the videos of {chosen.num_answered:,} rows is there: no {expected} with any extension; "
            "unpack the dataset's videos there, or set evaluate.layout.video"
        )
    return chosen


def _manifest_rows(
    layout: Layout, dataset: Manifest, rows: Mapping[int, Sequence[int]], videos: _Videos
) -> Iterator[dict[str, Any]]:
    """The chosen rows, with the videos' real names. A video that is not there becomes its row's error."""
    for _, _, row in _read(dataset, rows, layout.columns):
        made = manifest_row(layout, row, dataset.base)
        if path := made["video"]:
            made["video"] = videos.find(path) or (path if _suffix(path) else f"{path}.mp4")
        yield made


def _read(
    dataset: Manifest, rows: Mapping[int, Sequence[int]], columns: Sequence[str]
) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    """(number of the file, number of the row in it, row) of these rows, which are ascending."""
    units = [
        dataset.unit(file, first, min(first + _ROWS_PER_BATCH, stop))
        for file, numbers in rows.items()
        for start, stop in _runs(numbers)
        for first in range(start, stop, _ROWS_PER_BATCH)
    ]
    for unit, table in zip(units, read_units(dataset.spec, units, columns=columns), strict=True):
        for number, row in enumerate(manifest_rows(table), unit.start):
            yield unit.file, number, row


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[start, stop) of each run of consecutive numbers."""
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        (_, first), *rest = run
        yield first, (rest[-1][1] if rest else first) + 1


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


def _write(rows: Iterator[dict[str, Any]], schema: pa.Schema, target: str, storage_options: StorageOptions) -> None:
    """Writes the rows as Parquet files, one after the other through this machine's disk."""
    storage.make_dir(target, storage_options)
    names = set()
    for number in itertools.count():
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "rows.parquet"
            num_rows = _write_file(local, schema, itertools.islice(rows, _ROWS_PER_FILE))
            if num_rows or number == 0:  # a dataset without rows becomes a manifest without rows
                names.add(f"rows-{number:05d}.parquet")
                storage.publish_file(local, storage.join(target, f"rows-{number:05d}.parquet"), storage_options)
        if num_rows < _ROWS_PER_FILE:
            break
    for info in storage.list_files(target, storage_options, recursive=False):
        name = storage.name(info.path)
        if _FILE_NAME.fullmatch(name) and name not in names:  # of an attempt that was cut off
            storage.delete(info.path, storage_options)


def _write_file(path: Path, schema: pa.Schema, rows: Iterator[dict[str, Any]]) -> int:
    num_rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(itertools.islice(rows, _ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            num_rows += len(group)
    return num_rows
