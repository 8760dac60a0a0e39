"""Small JPEGs of the media that a report shows.

Media may be hostile, so the decoder process of the preprocessing stage decodes them: a codec that crashes, hangs or
takes too much memory costs one picture. Only local files and bytes are read, never the network. Where no picture
can be made, a reason is given. Knows where media lie; not codecs or pages.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.checkpoint.families import DEFAULT_FAMILY
from pipeline.config import InputConfig, MediaConfig
from pipeline.conversation import MediumKind
from pipeline.errors import FetchError, JobError, RowError
from pipeline.execution.stages import fetch_options, media_options
from pipeline.manifest.files import ManifestSpec, WorkUnit
from pipeline.manifest.formats import read_units
from pipeline.preprocess.fetch.source import Fetcher
from pipeline.preprocess.limits import MIB
from pipeline.preprocess.messages.columns import MEDIA_COLUMNS
from pipeline.preprocess.sandbox.client import MediaWorker
from pipeline.report.facts import at, items_at, text_at

_MAX_SIDE = 240
_MAX_MEDIUM_BYTES = 512 * MIB
_MAX_SECONDS = 180.0


@dataclass(frozen=True)
class Thumbnail:
    """JPEGs of one medium: one of an image, a few frames of a video; or why there are none."""

    pictures: tuple[bytes, ...] = ()
    missing: str | None = None


class ThumbnailMaker:
    """Makes thumbnails of a run's media until its time or its bytes are used up. A context manager."""

    def __init__(self, run: Mapping[str, Any], *, max_bytes: int = 2_400_000) -> None:
        self._bytes_left = max_bytes
        self._seconds_left = _MAX_SECONDS
        path = text_at(run, "manifest.path") or ""
        self._base = "" if storage.is_remote(path) else storage.local_path(path)
        if not os.path.isdir(self._base):  # brackets are allowed in names
            is_glob = storage.is_glob(self._base) and not os.path.exists(self._base)
            self._base = storage.glob_base(self._base) if is_glob else os.path.dirname(self._base)
        self._files = [] if storage.is_remote(path) else items_at(run, "manifest.fingerprint.files")
        columns = at(run, "config.input.columns")
        self._columns = [at(columns, name) or name for names in MEDIA_COLUMNS.values() for name in names]
        # Paths as the run's manifest has them; results are the user's own, so any file on this machine may be shown.
        paths = InputConfig(path=self._base or os.curdir, allow=["*"])
        self._media = MediaConfig(resize="pil", timeout_s=20.0, max_bytes=_MAX_MEDIUM_BYTES)
        self._fetcher = Fetcher(fetch_options(paths, self._media, paths.path))

    def __enter__(self) -> ThumbnailMaker:
        return self

    def __exit__(self, *exception: object) -> None:
        if "_worker" in vars(self):
            self._worker.close()

    @cached_property
    def _worker(self) -> MediaWorker:
        return MediaWorker(media_options(self._media, DEFAULT_FAMILY))

    def thumbnails(self, row: Mapping[str, Any], max_media: int = 4) -> list[Thumbnail]:
        """One for each of the first media of a result row."""
        started = time.monotonic()
        media: Sequence[Mapping[str, Any]] = row.get("media") or ()
        sources: list[bytes | str] = [receipt.get("source") or "" for receipt in media]
        embedded = self._embedded(row) if media and self._used_up is None else []
        if len(embedded) == len(sources):  # a path beside the bytes may lead elsewhere, or nowhere
            sources = [own if isinstance(own, bytes) else name for own, name in zip(embedded, sources, strict=True)]
        found = [
            self._thumbnail(receipt.get("kind") or "image", source)
            for receipt, source in zip(media[:max_media], sources, strict=False)
        ]
        self._seconds_left -= time.monotonic() - started
        return found

    @property
    def _used_up(self) -> str | None:
        """Why no more thumbnails are made, if that is so."""
        if self._bytes_left <= 0:
            return "left out to keep the page small"
        return "left out to save time" if self._seconds_left < 0 else None

    def _thumbnail(self, kind: MediumKind, source: bytes | str) -> Thumbnail:
        if (reason := self._used_up) is not None:
            return Thumbnail(missing=reason)
        if source in ("bytes", "", b""):
            return Thumbnail(missing="inside the manifest, which can't be read from here")
        if isinstance(source, str) and storage.is_remote(source) and not source.startswith("data:"):
            return Thumbnail(missing="not on this machine")
        try:
            pictures = self._worker.thumbnails(kind, self._fetcher.fetch(source), max_side=_MAX_SIDE)
        except FetchError:
            return Thumbnail(missing="not on this machine")
        except (RowError, JobError) as error:
            return Thumbnail(missing=f"can't be decoded ({type(error).__name__})")
        self._bytes_left -= sum(len(picture) * 4 // 3 for picture in pictures)
        return Thumbnail(tuple(pictures))

    def _embedded(self, row: Mapping[str, Any]) -> list[bytes | str]:
        """The row's media as a local Parquet manifest holds them; empty if they can't be read."""
        try:
            path = os.path.join(self._base, self._files[row["manifest_file"]][0])
            schema = pq.read_schema(path)
            unit = WorkUnit(row["manifest_file"], path, row["manifest_row"], row["manifest_row"] + 1)
            columns = [name for name in self._columns if name in schema.names]
            (table,) = read_units(ManifestSpec("parquet", schema), [unit], columns=columns)
            (values,) = table.to_pylist()
        except (IndexError, OSError, JobError, pa.ArrowException, ValueError):
            return []
        media = [item for value in values.values() for item in (value if isinstance(value, list) else [value])]
        contents = [(item.get("bytes") or item.get("path")) if isinstance(item, dict) else item for item in media]
        return [content for content in contents if content]
