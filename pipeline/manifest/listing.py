"""A folder of media as a manifest: its names, listed into a Parquet file once and kept for every later run.

Media that came later are added on demand, into one more listing file each time, so that rows keep their row keys.
"""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ManifestError
from pipeline.manifest.files import MEDIA, Manifest, ManifestFile, relative
from pipeline.manifest.formats import FORMATS, VIDEO_SUFFIXES, format_of
from pipeline.manifest.parquet import notes_metadata, notes_of, read_footer
from pipeline.storage import FileInfo, StorageOptions

LISTING_SCHEMA = pa.schema([("id", pa.string()), ("image", pa.string()), ("video", pa.string())])
_SOURCE_KEY = b"listed_path"
_BASE_KEY = b"listed_base"
_LOOKS_LIKE_URI = re.compile(r"(data|file):|[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_ROWS_PER_GROUP = 10_000


def write_listing(
    path: str,
    base: str,
    media: Sequence[FileInfo],
    notes: Sequence[str],
    listing_path: str,
    options: StorageOptions,
) -> None:
    """List the media, by their names below `base`; `notes` are kept for later runs."""
    names = [_media_name(info.path, base) for info in media]
    is_video = [info.path.lower().endswith(VIDEO_SUFFIXES) for info in media]
    metadata = {_SOURCE_KEY: path.encode(), _BASE_KEY: base.encode(), **notes_metadata(notes)}
    columns = {
        "id": [_row_id(info.path, base) for info in media],
        "image": [None if video else name for name, video in zip(names, is_video, strict=True)],
        "video": [name if video else None for name, video in zip(names, is_video, strict=True)],
    }
    table = pa.table(columns, schema=LISTING_SCHEMA.with_metadata(metadata))
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=_ROWS_PER_GROUP, compression="zstd")
    storage.make_dir(storage.parent(listing_path), options)
    storage.publish(listing_path, sink.getvalue(), options)


def _row_id(path: str, base: str) -> str:
    return storage.escaped(relative(path, base))


def _media_name(path: str, base: str) -> str:
    """How a row names a medium: relative to the base, or a URI where its name would be taken for something else."""
    name = relative(path, base)
    if storage.escaped(name) == name and not name.startswith("/") and not _LOOKS_LIKE_URI.match(name):
        return name
    return path if storage.is_remote(path) else f"file://{quote(os.fsencode(path))}"


def open_listing(path: str, listing_path: str, options: StorageOptions) -> Manifest | None:
    """The listing and its supplements as a manifest; None where the path is now a data file, not a folder of media."""
    files: list[ManifestFile] = []
    base, notes = "", tuple[str, ...]()
    for one in listings(listing_path, options):
        info = storage.file_info(one, options)
        footer, digest = read_footer(info, options)
        metadata = footer.schema.to_arrow_schema().metadata or {}
        source = metadata.get(_SOURCE_KEY, b"").decode()
        if source.rstrip("/") != path.rstrip("/"):
            if format_of(path) in FORMATS:
                return None  # the caller's comparison of fingerprints says what changed
            raise ManifestError(
                f"{one} lists the media of {source}, but input.path is {path}: "
                "choose another output.path, or set input.path back"
            )
        files.append(ManifestFile(one, footer.num_rows, info.size, info.version, digest=digest))
        base, notes = metadata[_BASE_KEY].decode(), notes_of(metadata)
    return Manifest(path, MEDIA, tuple(files), LISTING_SCHEMA, base, options, notes=notes)


def supplement_listing(
    listed: Manifest, media: Sequence[FileInfo], notes: Sequence[str], listing_path: str, options: StorageOptions
) -> Manifest:
    """The manifest with the media that it does not list yet, in one more listing behind the others."""
    known: set[str | None] = set()  # by the media's names, since two ids may be alike once they are escaped
    for file in listed.files:
        with storage.open_input(file.path, options, random_access=True) as source:
            table = pq.read_table(source, columns=["image", "video"])
            known.update(*(column.to_pylist() for column in table.columns))
    new = [info for info in media if _media_name(info.path, listed.base) not in known]
    if not new:
        return listed
    write_listing(listed.path, listed.base, new, notes, _supplement(listing_path, len(listed.files)), options)
    found = open_listing(listed.path, listing_path, options)
    assert found is not None
    return found


def listings(listing_path: str, options: StorageOptions) -> Iterator[str]:
    """Paths of the listing and its supplements, in order."""
    yield listing_path
    supplements = (_supplement(listing_path, number) for number in itertools.count(1))
    yield from itertools.takewhile(lambda path: storage.exists(path, options), supplements)


def _supplement(listing_path: str, number: int) -> str:
    return f"{listing_path.removesuffix('.parquet')}-{number:03d}.parquet"
