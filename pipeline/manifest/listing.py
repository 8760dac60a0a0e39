"""A folder of media as a manifest: its names, listed into a Parquet file once and kept for every later run.

Media that came later are taken up on demand, into one more listing file each time, so that rows keep their places.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import ManifestError
from pipeline.manifest.files import IMAGE_SUFFIXES, SUFFIXES, Manifest, ManifestFile, kind_of, relative
from pipeline.manifest.parquet import read_footer
from pipeline.storage import FileInfo, StorageOptions

LISTING_SCHEMA = pa.schema([("id", pa.string()), ("image", pa.string()), ("video", pa.string())])
_LISTING_SOURCE = b"listed_path"
_LISTING_BASE = b"listed_base"
_LISTING_GROUP_ROWS = 10_000


def write_listing(path: str, base: str, media: Sequence[FileInfo], listing_path: str, options: StorageOptions) -> None:
    """List the media, by their names below `base`."""
    names = [relative(info.path, base) for info in media]
    is_image = [name.lower().endswith(IMAGE_SUFFIXES) for name in names]
    columns = {
        "id": names,
        "image": [name if image else None for name, image in zip(names, is_image, strict=True)],
        "video": [None if image else name for name, image in zip(names, is_image, strict=True)],
    }
    metadata = {_LISTING_SOURCE: path.encode(), _LISTING_BASE: base.encode()}
    table = pa.table(columns, schema=LISTING_SCHEMA.with_metadata(metadata))
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=_LISTING_GROUP_ROWS, compression="zstd")
    storage.make_dir(storage.parent(listing_path), options)
    storage.publish(listing_path, sink.getvalue(), options)


def open_listing(path: str, listing_path: str, listing_options: StorageOptions) -> Manifest | None:
    """The listing and its supplements as a manifest; None where the path is by now a manifest of another kind."""
    files, base = [], ""
    for one in _listings(listing_path, listing_options):
        info = storage.file_info(one, listing_options)
        footer = read_footer(info, listing_options)
        metadata = footer.schema.to_arrow_schema().metadata or {}
        source = metadata.get(_LISTING_SOURCE, b"").decode()
        if source.rstrip("/") != path.rstrip("/"):
            if kind_of(path) in SUFFIXES:
                return None  # the caller's comparison of fingerprints says what changed
            raise ManifestError(
                f"{one} lists the media of {source}, but input.path is {path}: "
                "take another output.path, or set input.path back"
            )
        files.append(ManifestFile(one, footer.num_rows, info.size, info.version))
        base = metadata[_LISTING_BASE].decode()
    return Manifest(path, "media", tuple(files), LISTING_SCHEMA, base, listing_options)


def supplement_listing(
    listed: Manifest, media: Sequence[FileInfo], listing_path: str, listing_options: StorageOptions
) -> Manifest:
    """The manifest with those of the media that it does not list yet, in one more listing behind the others."""
    known: set[str] = set()
    for file in listed.files:
        with storage.open_input(file.path, listing_options, random_access=True) as source:
            known.update(pq.read_table(source, columns=["id"]).column("id").to_pylist())
    new = [info for info in media if relative(info.path, listed.base) not in known]
    if not new:
        return listed
    write_listing(listed.path, listed.base, new, _supplement(listing_path, len(listed.files)), listing_options)
    found = open_listing(listed.path, listing_path, listing_options)
    assert found is not None
    return found


def _listings(listing_path: str, options: StorageOptions) -> Iterator[str]:
    yield listing_path
    for number in itertools.count(1):
        path = _supplement(listing_path, number)
        if not storage.exists(path, options):
            return
        yield path


def _supplement(listing_path: str, number: int) -> str:
    return f"{listing_path.removesuffix('.parquet')}-{number:03d}.parquet"
