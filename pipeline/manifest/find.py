"""From a path to the manifest that it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.errors import ManifestError
from pipeline.manifest.files import (
    IMAGE_SUFFIXES,
    SUFFIXES,
    VIDEO_SUFFIXES,
    Manifest,
    ManifestFile,
    ManifestFormat,
    first_line,
    kind_of,
    relative,
)
from pipeline.manifest.listing import open_listing, supplement_listing, write_listing
from pipeline.manifest.parquet import open_parquet
from pipeline.manifest.text import open_text
from pipeline.storage import FileInfo, StorageOptions


def open_manifest(
    path: str,
    *,
    format: str = "auto",
    storage_options: StorageOptions = None,
    listing_path: str,
    listing_options: StorageOptions = None,
    new_media: bool = False,
) -> Manifest:
    """Find the manifest's files and count their rows. Reads metadata only; text files are read once, to count.

    A folder of media is listed into a Parquet file at `listing_path` (reached with `listing_options`); a listing that
    is there already is used again, so that a resumed job sees the rows of its first run; with `new_media` the folder is
    listed again, and media that the listing lacks follow behind it. Raises ManifestError.
    """
    accepted = ("auto", *SUFFIXES, "media")
    if format not in accepted:
        raise ManifestError(f"input.format is {format!r}; allowed: {', '.join(accepted)}")
    # Readers may run in other folders or processes.
    path, listing_path = storage.absolute(path), storage.absolute(listing_path)
    try:
        if format in ("auto", "media") and storage.exists(listing_path, listing_options):
            listed = open_listing(path, listing_path, listing_options)
            if listed is not None and new_media:
                _, chosen = _choose(path, *_find(path, storage_options), "media")
                listed = supplement_listing(listed, chosen, listing_path, listing_options)
            if listed is not None:
                return listed
        base, found = _find(path, storage_options)
        kind, chosen = _choose(path, base, found, format)
        if kind == "media":
            write_listing(path, base, chosen, listing_path, listing_options)
            written = open_listing(path, listing_path, listing_options)
            assert written is not None
            return written
        if kind == "parquet":
            return open_parquet(path, base, chosen, storage_options)
        return open_text(path, base, chosen, kind, storage_options)
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
    if fingerprint["format"] == "media" or None in versions:
        return None
    path = storage.absolute(path)
    try:
        base, found = _find(path, storage_options)
        kind, chosen = _choose(path, base, found, format)
    except (OSError, ManifestError):
        return None  # opening it says what is wrong
    then = {name: (size, version) for (name, size, _), version in zip(fingerprint["files"], versions, strict=True)}
    names = [relative(info.path, base) for info in chosen]
    now = {name: (info.size, info.version) for name, info in zip(names, chosen, strict=True)}
    if kind != fingerprint["format"] or now != then:
        return None
    rows = {name: count for name, _, count in fingerprint["files"]}
    files = [
        ManifestFile(info.path, rows[name], info.size, info.version) for name, info in zip(names, chosen, strict=True)
    ]
    return Manifest(path, kind, tuple(files), pa.schema([]), base, storage_options)


def _find(path: str, options: StorageOptions) -> tuple[str, list[FileInfo]]:
    """The folder that relative paths refer to, and the files that may be meant."""
    if not path:
        raise ManifestError("input.path is empty; expected a Parquet, JSONL or CSV file, or a folder or glob of them")
    if storage.is_dir(path, options):
        base = path if path.endswith("://") or path == "/" else path.rstrip("/")
        return base, storage.list_files(base, options)
    if storage.exists(path, options):  # before the glob: brackets are allowed in file names
        return storage.parent(path), [storage.file_info(path, options)]
    if storage.is_glob(path):
        found = storage.glob(path, options)
        if not found:
            raise ManifestError(f"no file matches {path}; input.path takes a file, a folder or a glob of files")
        return storage.glob_base(path), found
    raise ManifestError(f"no file or folder at {path}; set input.path to a Parquet, JSONL or CSV file, or to a folder")


def _choose(path: str, base: str, found: list[FileInfo], format: str) -> tuple[ManifestFormat, list[FileInfo]]:
    """The manifest's format and its files among those found."""
    single = len(found) == 1 and found[0].path == path
    by_kind: dict[str, list[FileInfo]] = {}
    for info in found:
        by_kind.setdefault("data" if single and format in SUFFIXES else kind_of(info.path), []).append(info)
    if format != "auto":
        kind: ManifestFormat = format  # type: ignore[assignment]
        chosen = by_kind.get("data") or by_kind.get(kind, [])  # a single file's format may be forced on it
    else:
        kinds = [name for name in SUFFIXES if name in by_kind]
        if "media" in by_kind and kinds:
            for name in kinds:
                by_kind[name] = [info for info in by_kind[name] if "/" not in relative(info.path, base)]
            kinds = [name for name in kinds if by_kind[name]]
        if len(kinds) > 1:
            counts = ", ".join(f"{len(by_kind[name])} {name} (such as {by_kind[name][0].path})" for name in kinds)
            raise ManifestError(
                f"{path} holds manifests of several formats: {counts}; set input.path to one file or glob"
            )
        kind = kinds[0] if kinds else "media"  # type: ignore[assignment]
        chosen = by_kind.get(kind, [])
    if not chosen:
        wanted = ", ".join(s for suffixes in SUFFIXES.values() for s in suffixes) + ", or images and videos"
        if format != "auto":
            wanted = ", ".join(SUFFIXES.get(format, IMAGE_SUFFIXES + VIDEO_SUFFIXES))
        elif single:
            wanted += "; a file of another name needs input.format"
        names = ", ".join(storage.name(info.path) for info in found[:5])
        seen = f"{len(found)} files ({names}{', ...' if len(found) > 5 else ''})" if found else "no files"
        raise ManifestError(f"nothing to read at {path}: found {seen}; expected {wanted}")
    return kind, chosen
