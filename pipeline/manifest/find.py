"""From a path to the manifest that it means."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.errors import ManifestError, first_line
from pipeline.manifest.changes import recorded_files
from pipeline.manifest.files import MEDIA, CsvDialect, Manifest, ManifestFile, relative
from pipeline.manifest.formats import FORMATS, IMAGE_SUFFIXES, REFUSED_SUFFIXES, VIDEO_SUFFIXES, format_of
from pipeline.manifest.listing import open_listing, supplement_listing, write_listing
from pipeline.manifest.partitions import with_partitions
from pipeline.schema import PART_FILE, READER_COLUMNS, RECORDS_FOLDER
from pipeline.storage import FileInfo, StorageOptions

_MAX_NAMES = 12


def open_manifest(
    path: str,
    *,
    format: str = "auto",
    storage_options: StorageOptions = None,
    listing_path: str,
    listing_options: StorageOptions = None,
    new_media: bool = False,
    csv: CsvDialect | None = None,
    is_asked: Callable[[Sequence[str]], bool] = lambda columns: True,
) -> Manifest:
    """Find the manifest's files and count their rows. Reads metadata only; text files are read once, to count.

    A folder of media is listed into a Parquet file at `listing_path` (reached with `listing_options`); a listing that
    is there already is used again, so that a resumed job sees the rows of its first run. With `new_media` the folder is
    listed again, and media that the listing lacks are added behind it. Data files beside media are the manifest where
    `is_asked` says that rows can be asked from their columns. Raises ManifestError.
    """
    # Readers may run in other folders or processes.
    path, listing_path = storage.absolute(path), storage.absolute(listing_path)
    try:
        if format in ("auto", MEDIA) and storage.exists(listing_path, listing_options):
            listed = open_listing(path, listing_path, listing_options)
            if listed is not None and new_media:
                found = _find(path, MEDIA, storage_options)
                listed = supplement_listing(listed, found.files, found.notes, listing_path, listing_options)
            if listed is not None:
                return listed
        found = _find(path, format, storage_options)
        if found.kind != MEDIA:
            opened = FORMATS[found.kind].open(path, found.base, found.files, storage_options, csv or CsvDialect())
            if not found.beside_media or is_asked(opened.schema.names):
                opened = with_partitions(replace(opened, notes=(*found.notes, *opened.notes)))
                _refuse_reader_columns(opened)
                return opened
            found = _find(path, MEDIA, storage_options, aside=opened.files)
            found = replace(found, notes=(*found.notes, _no_manifest(opened)))
        write_listing(path, found.base, found.files, found.notes, listing_path, listing_options)
        written = open_listing(path, listing_path, listing_options)
        assert written is not None
        return written
    except OSError as error:
        raise ManifestError(f"can't read the manifest {path}: {first_line(error)}") from error


def recorded_manifest(
    path: str,
    recorded: Mapping[str, Any],
    *,
    format: str = "auto",
    storage_options: StorageOptions = None,
) -> Manifest | None:
    """The manifest with an earlier run's row counts, where a listing shows the very files of that run.

    `recorded` holds that run's `fingerprint` and file `versions`. No file is opened, so the schema is empty: enough to
    compare and to count, not to read. None where anything differs or is not known, and for folders of media, whose
    listing is quick to open.
    """
    fingerprint, versions = recorded["fingerprint"], recorded.get("versions") or [None]
    if fingerprint["format"] == MEDIA or None in versions:
        return None
    path = storage.absolute(path)
    try:
        found = _find(path, format, storage_options)
    except (OSError, ManifestError):
        return None  # open_manifest reports what is wrong
    known = recorded_files(fingerprint)
    then = {name: (file.size, version) for (name, file), version in zip(known.items(), versions, strict=True)}
    names = [relative(info.path, found.base) for info in found.files]
    now = {name: (info.size, info.version) for name, info in zip(names, found.files, strict=True)}
    if found.kind != fingerprint["format"] or now != then:
        return None
    files = [
        ManifestFile(info.path, known[name].num_rows, info.size, info.version, digest=known[name].digest)
        for name, info in zip(names, found.files, strict=True)
    ]
    return Manifest(path, found.kind, tuple(files), pa.schema([]), found.base, storage_options)


@dataclass(frozen=True)
class _Found:
    """What a path leads to."""

    base: str
    """The folder that relative paths refer to."""
    kind: str
    """The manifest's format."""
    files: list[FileInfo]
    notes: tuple[str, ...] = ()
    """What lies there too and was left alone."""
    beside_media: bool = False
    """Whether these are data files among images and videos, and may be no manifest."""


def _find(path: str, format: str, options: StorageOptions, *, aside: Sequence[ManifestFile] = ()) -> _Found:
    """What to read at the path. Files that are `aside` have a note of their own."""
    if not path:
        raise ManifestError("input.path is empty; expected a Parquet, JSONL or CSV file, or a folder or glob of them")
    if storage.escaped(path) != path:
        raise ManifestError(f"input.path {storage.escaped(path)} is not UTF-8: rename the folder, or link to it")
    if storage.is_dir(path, options):
        base = path if path.endswith("://") or path == "/" else path.rstrip("/")
        found = storage.list_files(base, options, dangling=True)
    elif storage.exists(path, options):  # before the glob: brackets are allowed in file names
        base, found = storage.parent(path), [storage.file_info(path, options)]
        if format in FORMATS:  # forced, whatever the file's name
            return _Found(base, format, found)
    elif storage.is_glob(path):
        base, found = storage.glob_base(path), storage.glob(path, options, dangling=True)
        if not found:
            raise ManifestError(f"no file matches {path}; input.path takes a file, a folder or a glob of files")
    else:
        raise ManifestError(
            f"no file or folder at {path}; set input.path to a Parquet, JSONL or CSV file, or to a folder"
        )
    found, notes = _without_runs(base, found, options)
    kind, chosen = _choose(path, base, found, format)
    if not chosen:
        raise _nothing_to_read(path, found, format)
    if kind == MEDIA:
        notes += _left_alone(found, (*chosen, *aside))
    elif odd := [escaped for info in chosen if (escaped := storage.escaped(info.path)) != info.path]:
        raise ManifestError(f"the name {odd[0]} is not UTF-8; rename the file")
    beside_media = format == "auto" and kind != MEDIA and _has_media(found)
    return _Found(base, kind, chosen, notes, beside_media)


def _without_runs(
    base: str, found: Sequence[FileInfo], options: StorageOptions
) -> tuple[list[FileInfo], tuple[str, ...]]:
    """The files that are not this package's own: a job may write below the folder that it reads."""

    def has_records(folder: str) -> bool:
        return storage.exists(storage.join(folder, RECORDS_FOLDER, "run.json"), options)

    top = f"{base.rstrip('/')}/"
    # A listing of the whole folder shows the records, a glob perhaps nothing but the parts.
    records = {info.path.partition(f"/{RECORDS_FOLDER}/")[0] for info in found if f"/{RECORDS_FOLDER}/" in info.path}
    parts = {storage.parent(info.path) for info in found if PART_FILE.fullmatch(storage.name(info.path))}
    parts |= {storage.parent(folder) for folder in parts if "=" in storage.name(folder)}
    runs = tuple(f"{folder}/" for folder in {*records, *parts} if folder.startswith(top) and has_records(folder))
    kept = [info for info in found if not info.path.startswith((*runs, f"{top}{RECORDS_FOLDER}/"))]
    names = ", ".join(sorted(relative(folder, base).rstrip("/") for folder in runs)[:_MAX_NAMES])
    more = f" and {len(runs) - _MAX_NAMES} more" if len(runs) > _MAX_NAMES else ""
    return kept, (f"left alone: the results of earlier runs in {names}{more}",) if runs else ()


def _left_alone(found: Sequence[FileInfo], known: Sequence[FileInfo | ManifestFile]) -> tuple[str, ...]:
    """How many files of a folder of media are no media, by extension."""
    media = {info.path for info in known}
    names = [storage.name(info.path) for info in found if info.path not in media]
    counts = Counter(storage.escaped(os.path.splitext(name)[1].lower()) or "without extension" for name in names)
    if not counts:
        return ()
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common(_MAX_NAMES))
    more = f", and {len(counts) - _MAX_NAMES} more kinds" if len(counts) > _MAX_NAMES else ""
    what = "file that is neither image nor video" if len(names) == 1 else "files that are neither images nor videos"
    return (f"left alone: {len(names):,} {what} ({kinds}{more})",)


def _choose(path: str, base: str, found: list[FileInfo], format: str) -> tuple[str, list[FileInfo]]:
    """The manifest's format, and its files among those found."""
    by_format: dict[str | None, list[FileInfo]] = {}
    for info in found:
        by_format.setdefault(format_of(info.path), []).append(info)
    if format != "auto":
        return format, by_format.get(format, [])
    data = {name: by_format[name] for name in FORMATS if name in by_format}
    if _has_media(found):
        direct = {name: [info for info in data[name] if "/" not in relative(info.path, base)] for name in data}
        data = {name: infos for name, infos in direct.items() if infos}
    if len(data) > 1:
        counts = ", ".join(f"{len(infos)} {name} (such as {infos[0].path})" for name, infos in data.items())
        raise ManifestError(
            f"{path} holds manifests of several formats: {counts}; set input.path to one file or glob"
            + ("; input.format media takes the images and videos" if MEDIA in by_format else "")
        )
    return next(iter(data.items()), (MEDIA, by_format.get(MEDIA, [])))


def _has_media(found: Sequence[FileInfo]) -> bool:
    """Whether there are images or videos. Beside data files, a document says little."""
    names = (info.path for info in found if format_of(info.path) == MEDIA)
    return any(not storage.name(name).lower().endswith(REFUSED_SUFFIXES) for name in names)


def _refuse_reader_columns(opened: Manifest) -> None:
    names = [name for name in opened.schema.names if name in READER_COLUMNS]
    if names:
        raise ManifestError(
            f"{opened.path} has columns with names that the job reserves for itself: {', '.join(names)}; rename them"
        )


def _no_manifest(opened: Manifest) -> str:
    names = ", ".join(relative(file.path, opened.base) for file in opened.files[:_MAX_NAMES])
    more = f" and {len(opened.files) - _MAX_NAMES} more" if len(opened.files) > _MAX_NAMES else ""
    return (
        f"left alone: {names}{more}, without a column for media, prompts or messages (its columns: "
        f"{', '.join(opened.schema.names) or 'none'}); the images and videos beside it are the rows. If it is the "
        "manifest, name its columns with input.columns"
    )


def _nothing_to_read(path: str, found: list[FileInfo], format: str) -> ManifestError:
    if format == "auto":
        suffixes = [suffix for known in FORMATS.values() for suffix in known.suffixes]
        wanted = ", ".join(suffixes) + ", or images and videos"
        if found and found[0].path == path:
            wanted += "; a file of another name needs input.format"
    else:
        wanted = ", ".join(FORMATS[format].suffixes if format in FORMATS else IMAGE_SUFFIXES + VIDEO_SUFFIXES)
    names = ", ".join(storage.name(info.path) for info in found[:5])
    seen = f"{len(found)} files ({names}{', ...' if len(found) > 5 else ''})" if found else "no files"
    return ManifestError(f"nothing to read at {path}: found {seen}; expected {wanted}")
