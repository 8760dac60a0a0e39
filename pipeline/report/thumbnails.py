"""Small JPEGs of the media that a report shows, made in a process of their own.

Media are strangers' files: a codec that crashes, hangs or swallows memory must cost one picture, not the report. So a
child process with limited memory decodes them, and is replaced when it does not answer. Only local files and bytes
are read, never the network. Where no picture can be made, a word says why. Knows files and codecs; not pages.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import multiprocessing
import os
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage

_SIDE = 240
_QUALITY = 72
_STRIP_FRAMES = 4
_MAX_PIXELS = 200_000_000
_MAX_BYTES = 512 * 2**20
_MEMORY_BYTES = 4 * 2**30
_WAIT_S = 20.0
_START_S = 60.0
_MAX_RESTARTS = 3
_MAX_ROW_GROUP_BYTES = 256 * 2**20
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "AVIF", "ICO", "JPEG2000", "TGA")
_MEDIA_COLUMNS = ("image", "images", "video", "videos")


@dataclass(frozen=True)
class Thumbnail:
    """The pictures of one medium: one of an image, the first few shown of a video; or why there is none."""

    pictures: tuple[bytes, ...] = ()
    missing: str | None = None


class ThumbnailMaker:
    """Makes thumbnails until its time or its bytes are used up. A context manager: it owns a process."""

    def __init__(self, run: Mapping[str, Any], *, max_bytes: int = 2_400_000, max_seconds: float = 180.0) -> None:
        self._bytes_left = max_bytes
        self._max_seconds = max_seconds
        self._seconds = 0.0
        self._restarts = 0
        self._process: Any = None
        self._pipe: Any = None
        self._warm: set[str] = set()
        manifest = run.get("manifest") or {}
        self._manifest_path = str(manifest.get("path") or "")
        files = (manifest.get("fingerprint") or {}).get("files") or []
        self._manifest_files = [str(entry[0]) for entry in files if entry]
        config = (run.get("config") or {}).get("input") or {}
        self._columns: Mapping[str, str] = config.get("columns") or {}

    def __enter__(self) -> ThumbnailMaker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def thumbnails(self, row: Mapping[str, Any], most: int = 4) -> list[Thumbnail]:
        """One for each of the first media of a result row."""
        media: Sequence[Mapping[str, Any]] = row.get("media") or ()
        embedded: list[bytes | str] | None = None
        found = []
        for number, receipt in enumerate(media[:most]):
            source: bytes | str = receipt.get("source") or ""
            if source == "bytes":
                if embedded is None:
                    embedded = self._embedded(row)
                source = embedded[number] if len(embedded) == len(media) else b""
            found.append(self._thumbnail(str(receipt.get("kind")), source))
        return found

    def _thumbnail(self, kind: str, source: bytes | str) -> Thumbnail:
        if self._bytes_left <= 0:
            return Thumbnail(missing="left out to keep the page small")
        if self._seconds > self._max_seconds:
            return Thumbnail(missing="left out to save time")
        if not source:
            return Thumbnail(missing="inside the manifest, which can't be read from here")
        if isinstance(source, str) and source.startswith("data:"):
            source = _data_url(source)
        if isinstance(source, str):
            path = self._local_path(source)
            if path is None:
                return Thumbnail(missing="not on this machine")
            source = path
        started = time.monotonic()
        answer = self._ask(kind, source)
        self._seconds += time.monotonic() - started
        if isinstance(answer, str):
            return Thumbnail(missing=answer)
        self._bytes_left -= sum(len(picture) * 4 // 3 for picture in answer)
        return Thumbnail(tuple(answer))

    def _local_path(self, source: str) -> str | None:
        """The file on this machine's disk, relative to the manifest as the run had it; None where there is none."""
        if storage.is_remote(source) or source.startswith(("http:", "https:")):
            return None
        path = storage.local_path(source)
        if source.startswith("file://"):
            path = urllib.parse.unquote(path)
        candidates = [path] if os.path.isabs(path) else [os.path.join(self._base(), path)]
        for candidate in candidates:
            if os.path.isfile(candidate) and os.path.getsize(candidate) <= _MAX_BYTES:
                return candidate
        return None

    def _base(self) -> str:
        path = self._manifest_path
        if storage.is_remote(path):
            return os.curdir
        local = storage.local_path(path)
        return local if os.path.isdir(local) else os.path.dirname(local) or os.curdir

    def _embedded(self, row: Mapping[str, Any]) -> list[bytes | str]:
        """The row's media out of a local Parquet manifest; empty where they can't be had."""
        number, index = row.get("manifest_file"), row.get("manifest_row")
        if number is None or index is None or storage.is_remote(self._manifest_path):
            return []
        try:
            name = self._manifest_files[number]
            path = name if os.path.isabs(name) else os.path.join(self._base(), name)
            values = _manifest_row(path, index, [self._columns.get(column, column) for column in _MEDIA_COLUMNS])
        except (IndexError, OSError, pa.ArrowException):
            return []
        media: list[bytes | str] = []
        for value in values:
            for item in value if isinstance(value, list) else [value]:
                content = (item.get("bytes") or item.get("path")) if isinstance(item, dict) else item
                if isinstance(content, bytes | str) and content:
                    media.append(content)
        return media

    def _ask(self, kind: str, source: bytes | str) -> list[bytes] | str:
        if self._restarts > _MAX_RESTARTS:
            return "left out after several crashes of the decoder"
        try:
            if self._process is None:
                self._start()
            self._pipe.send((kind, source))
            # The first of a kind loads its codecs, which takes long on a busy machine.
            if self._pipe.poll(_WAIT_S if kind in self._warm else _START_S):
                answer: list[bytes] | str = self._pipe.recv()
                self._warm.add(kind)
                return answer
            reason = "decoding took too long"
        except (OSError, EOFError):
            reason = "the decoder crashed"
        self._stop()
        self._restarts += 1
        return reason

    def _start(self) -> None:
        # Spawned, not forked: the parent may hold Ray's or torch's threads.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(_START_S):
            raise EOFError
        self._pipe.recv()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None
            self._warm.clear()


def _data_url(url: str) -> bytes:
    header, _, body = url.partition(",")
    try:
        return base64.b64decode(body) if header.endswith(";base64") else urllib.parse.unquote_to_bytes(body)
    except (binascii.Error, ValueError):
        return b""


def _manifest_row(path: str, index: int, columns: Sequence[str]) -> list[Any]:
    """One row's values, streamed: the row group may hold gigabytes of other rows' images."""
    with pq.ParquetFile(path) as file:
        present = [name for name in columns if name in file.schema_arrow.names]
        start = 0
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            if index < start + metadata.num_rows:
                if metadata.total_byte_size > _MAX_ROW_GROUP_BYTES:
                    return []
                for batch in file.iter_batches(16, row_groups=[group], columns=present):
                    if index < start + len(batch):
                        return list(batch.slice(index - start, 1).to_pylist()[0].values())
                    start += len(batch)
            start += metadata.num_rows
    return []


# ---------------------------------------------------------------------------------------------------------------------
# In the child process


def _serve(pipe: Any) -> None:
    """Answers (kind, source) with JPEGs or a reason, until the parent goes."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    pipe.send("ready")
    while True:
        try:
            kind, source = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer: list[bytes] | str = _video(source) if kind == "video" else [_image(source)]
        except ImportError as error:
            answer = f"no decoder here ({error.name})"
        except MemoryError:
            answer = "too large to decode"
        except Exception as error:  # whatever a codec raises costs this one picture
            answer = f"can't be decoded ({type(error).__name__})"
        pipe.send(answer)


def _image(source: bytes | str) -> bytes:
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = _MAX_PIXELS
    Image.init()
    formats = [name for name in _IMAGE_FORMATS if name in Image.OPEN]
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
        if image.width * image.height > _MAX_PIXELS:
            raise MemoryError
        image.draft("RGB", (2 * _SIDE, 2 * _SIDE))
        return _jpeg(ImageOps.exif_transpose(image))


def _video(source: bytes | str) -> list[bytes]:
    from PIL import Image

    from pipeline.conversation import MediumSettings
    from pipeline.errors import SettingError
    from pipeline.preprocess.limits import MediaOptions
    from pipeline.preprocess.video.frames import OpenVideo

    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    options = MediaOptions(min_frames=_STRIP_FRAMES, max_frames=_STRIP_FRAMES)
    try:
        frames = OpenVideo(data, MediumSettings(num_frames=_STRIP_FRAMES), options).frames()
        return [_jpeg(Image.fromarray(frame)) for _, frame in frames]
    except SettingError:  # fewer frames than the strip
        frames = OpenVideo(data, MediumSettings(), options).frames()
        return [_jpeg(Image.fromarray(frame)) for _, frame in frames]


def _jpeg(image: Any) -> bytes:
    from PIL import Image

    if image.mode not in ("RGB", "L"):
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB")
    image.thumbnail((_SIDE, _SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=_QUALITY, optimize=True)
    return data.getvalue()
