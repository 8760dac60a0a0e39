"""From a path to the manifest that it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.errors import ManifestError, first_line
from pipeline.manifest.files import MEDIA, Manifest, ManifestFile, relative
from pipeline.manifest.formats import FORMATS, IMAGE_SUFFIXES, VIDEO_SUFFIXES, format_of
from pipeline.manifest.listing import open_listing, supplement_listing, write_listing
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
    is there already is used again, so that a resumed job sees the rows of its first run. With `new_media` the folder is
    listed again, and media that the listing lacks are added behind it. Raises ManifestError.
    """
    accepted = ("auto", *FORMATS, MEDIA)
    if format not in accepted:
        raise ManifestError(f"input.format is {format!r}; allowed: {', '.join(accepted)}")
    # Readers may run in other folders or processes.
    path, listing_path = storage.absolute(path), storage.absolute(listing_path)
    try:
        if format in ("auto", MEDIA) and storage.exists(listing_path, listing_options):
            listed = open_listing(path, listing_path, listing_options)
            if listed is not None and new_media:
                _, _, media = _find(path, MEDIA, storage_options)
                listed = supplement_listing(listed, media, listing_path, listing_options)
            if listed is not None:
                return listed
        base, kind, files = _find(path, format, storage_options)
        if kind != MEDIA:
            return FORMATS[kind].open(path, base, files, storage_options)
        write_listing(path, base, files, listing_path, listing_options)
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
        base, kind, found = _find(path, format, storage_options)
    except (OSError, ManifestError):
        return None  # open_manifest reports what is wrong
    then = {name: (size, version) for (name, size, _), version in zip(fingerprint["files"], versions, strict=True)}
    now = {relative(info.path, base): (info.size, info.version) for info in found}
    if kind != fingerprint["format"] or now != then:
        return None
    rows = {name: num_rows for name, _, num_rows in fingerprint["files"]}
    files = [ManifestFile(info.path, rows[relative(info.path, base)], info.size, info.version) for info in found]
    return Manifest(path, kind, tuple(files), pa.schema([]), base, storage_options)


def _find(path: str, format: str, options: StorageOptions) -> tuple[str, str, list[FileInfo]]:
    """The folder that relative paths refer to, the manifest's format and its files."""
    if not path:
        raise ManifestError("input.path is empty; expected a Parquet, JSONL or CSV file, or a folder or glob of them")
    if storage.is_dir(path, options):
        base = path if path.endswith("://") or path == "/" else path.rstrip("/")
        found = storage.list_files(base, options)
    elif storage.exists(path, options):  # before the glob: brackets are allowed in file names
        base, found = storage.parent(path), [storage.file_info(path, options)]
        if format in FORMATS:  # forced, whatever the file's name
            return base, format, found
    elif storage.is_glob(path):
        base, found = storage.glob_base(path), storage.glob(path, options)
        if not found:
            raise ManifestError(f"no file matches {path}; input.path takes a file, a folder or a glob of files")
    else:
        raise ManifestError(
            f"no file or folder at {path}; set input.path to a Parquet, JSONL or CSV file, or to a folder"
        )
    kind, chosen = _choose(path, base, found, format)
    if not chosen:
        raise _nothing_to_read(path, found, format)
    return base, kind, chosen


def _choose(path: str, base: str, found: list[FileInfo], format: str) -> tuple[str, list[FileInfo]]:
    """The manifest's format, and its files among those found."""
    by_format: dict[str | None, list[FileInfo]] = {}
    for info in found:
        by_format.setdefault(format_of(info.path), []).append(info)
    if format != "auto":
        return format, by_format.get(format, [])
    data = {name: by_format[name] for name in FORMATS if name in by_format}
    if MEDIA in by_format:
        direct = {name: [info for info in data[name] if "/" not in relative(info.path, base)] for name in data}
        data = {name: infos for name, infos in direct.items() if infos}
    if len(data) > 1:
        counts = ", ".join(f"{len(infos)} {name} (such as {infos[0].path})" for name, infos in data.items())
        raise ManifestError(f"{path} holds manifests of several formats: {counts}; set input.path to one file or glob")
    return next(iter(data.items()), (MEDIA, by_format.get(MEDIA, [])))


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
