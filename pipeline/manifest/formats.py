"""The list of manifest formats, and reading by format. To add a format, write a ManifestFormat and list it here.

The config's `input.format` names the same formats.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from pipeline import storage
from pipeline.errors import ManifestError, first_line
from pipeline.manifest.csv_files import CsvFormat
from pipeline.manifest.files import MEDIA, ManifestFormat, ManifestSpec, WorkUnit
from pipeline.manifest.json_lines import JsonLinesFormat
from pipeline.manifest.parquet import ParquetFormat
from pipeline.manifest.partitions import append_partitions

FORMATS: Mapping[str, ManifestFormat] = {
    format.name: format for format in (ParquetFormat(), JsonLinesFormat(), CsvFormat())
}
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".avif", ".avifs", ".bmp", ".dib",
    ".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga",
    ".icb", ".vda", ".vst", ".ico",
)  # fmt: skip
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".f4v", ".ismv", ".psp", ".3gp", ".3g2", ".mj2", ".mkv", ".mk3d", ".webm", ".avi", ".mpg",
    ".mpeg", ".vob", ".ts", ".mts", ".m2t", ".m2ts", ".flv", ".ogg", ".ogv", ".asf", ".wmv", ".mxf", ".ivf",
)  # fmt: skip
REFUSED_SUFFIXES = (".heic", ".heif", ".hif", ".svg", ".pdf")
"""Of images that are not decoded: in a folder of media they are rows, whose errors name what they are."""


def format_of(path: str) -> str | None:
    """A name in FORMATS, or MEDIA, by the path's suffix; None for anything else."""
    name = storage.name(path).lower()
    for format in FORMATS.values():
        if name.endswith(format.suffixes):
            return None if name.startswith("_") else format.name
    return MEDIA if name.endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES + REFUSED_SUFFIXES) else None


def read_units(
    spec: ManifestSpec, units: Sequence[WorkUnit], *, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """A table for each of several units: exactly its rows, in order, in one pass over each file.

    Tables have the named columns, or all of the manifest's, in the manifest's types; JSONL and CSV rows also
    `schema.MANIFEST_ERROR`, as Parquet's do where a row can't be read. The units come in manifest order. Neighbouring
    units share one look at their row group, which pays off for large row groups and for the scattered rows of a retry.
    Raises ManifestError.
    """
    names = list(dict.fromkeys(spec.schema.names if columns is None else columns))
    missing = [name for name in names if name not in spec.schema.names]
    if missing:
        raise ManifestError(
            f"the manifest has no column {', '.join(missing)}; its columns: {', '.join(spec.schema.names) or 'none'}"
        )
    in_files = [name for name in names if name not in spec.partitions]
    format = FORMATS["parquet" if spec.format == MEDIA else spec.format]
    for _, group in itertools.groupby(units, key=lambda unit: unit.file):
        of_file = list(group)
        assert all(a.stop <= b.start for a, b in itertools.pairwise(of_file)), "units out of order"
        try:
            for unit, table in zip(of_file, format.read(spec, of_file, in_files), strict=True):
                assert not table.num_columns or table.num_rows == unit.num_rows, (table.num_rows, unit)
                yield append_partitions(table, spec, unit, names)
        except OSError as error:
            rows = f"{of_file[0].start} to {of_file[-1].stop}"
            raise ManifestError(f"can't read rows {rows} of {of_file[0].path}: {first_line(error)}") from error
