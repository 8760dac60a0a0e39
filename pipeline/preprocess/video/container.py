"""A video file opened safely: formats, the stream to show, limits, and FFmpeg's exceptions as ours.

Every exception of FFmpeg ends here, as a MediaError. Knows containers; not which frames are shown, nor decoding.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import av
from av.stream import Disposition

from pipeline.errors import (
    DecompressionBomb,
    MediaError,
    MediaMemoryError,
    NoVideoStream,
    TruncatedMedia,
    UnsupportedMedia,
    first_line,
)
from pipeline.preprocess.image import Encoded, claimed_format, looks_like
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.size import check_source_size

# Containers that hold their own frames. Playlists, concat scripts, image patterns and devices, which open further
# files or hosts, are not among them; and with no protocol allowed, nothing else can be opened either.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif,apng,ivf,mxf"
_OPEN_OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
_READ_BYTES = 256 * 1024


def open_container(file: Any, *, buffer_size: int = _READ_BYTES) -> av.container.InputContainer:
    """The container in a file, read `buffer_size` bytes at a time; nothing else can be opened through it."""
    return av.open(file, options=_OPEN_OPTIONS, metadata_errors="replace", buffer_size=buffer_size)


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The stream to show. Raises NoVideoStream."""
    attached = Disposition.attached_pic | Disposition.timed_thumbnails
    num_pictures = 0
    for stream in container.streams.video:
        if stream.disposition & attached:
            num_pictures += 1
        elif stream.codec_context is not None:
            return stream
    kinds = [stream.type for stream in container.streams]
    found = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "none"
    raise NoVideoStream(
        f"the file has no video stream that can be decoded; its streams: {found}"
        + (f" ({num_pictures} of them an attached picture)" if num_pictures else "")
    )


def stated_rate(stream: av.VideoStream) -> float:
    """Frames a second, as the container says; 0 where it does not."""
    return float(stream.average_rate or stream.guessed_rate or 0)


def check_frame_size(width: int, height: int, options: MediaOptions) -> None:
    """Refuse frames of a shape that is not decoded. Raises DecompressionBomb, AspectRatioError."""
    if width and height:  # else known only once a frame has been decoded
        check_source_size("video", width, height, options)


def check_num_frames(count: int, options: MediaOptions) -> None:
    """Raises DecompressionBomb for a file with more frames than `max_video_frames`."""
    if count > options.max_video_frames:
        raise DecompressionBomb(f"the video has more than {options.max_video_frames:,} frames (media.max_video_frames)")


def check_duration(seconds: float, end_s: float | None, options: MediaOptions) -> None:
    """Raises DecompressionBomb for a video longer than `max_video_s`, unless its row ends it before."""
    if seconds > options.max_video_s and (end_s is None or end_s > options.max_video_s):
        raise DecompressionBomb(
            f"the video is longer than {options.max_video_s:g} s (max_video_s); "
            "set start_s and end_s to show a part of it"
        )


class MemoryFile(io.RawIOBase):
    """Bytes as a file that FFmpeg can read, without a copy of the whole."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._view = memoryview(data)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        end = len(self._view) if size < 0 else self._position + size
        part = bytes(self._view[self._position : end])
        self._position += len(part)
        return part

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._view)}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position


@contextlib.contextmanager
def ffmpeg_errors(data: Encoded) -> Iterator[None]:
    """Turn what FFmpeg raises in the body into MediaErrors; `data` is looked at for what the file may be."""
    try:
        yield
    except (av.error.FFmpegError, MemoryError, UnicodeDecodeError, OSError, ValueError, EOFError) as error:
        raise _translated(error, data) from error


def _translated(error: Exception, data: Encoded) -> MediaError:
    size = f"{len(data):,} bytes"
    if isinstance(error, MemoryError):
        return MediaMemoryError(f"the video's frames don't fit into memory ({size} encoded)")
    if not len(data):
        return TruncatedMedia("the medium has 0 bytes")
    if (kind := claimed_format(data)) not in (None, "GIF"):  # which may be a video
        return UnsupportedMedia(
            f"found an image ({kind}, {size}), expected a video: put it into the column of images, or, in a folder, "
            "give it the extension of its format"
        )
    if bytes(data[4:8]) == b"ftyp" and not _has_box(data, b"moov"):
        return TruncatedMedia(f"the MP4 file has no index (moov box) in its {size}: it ends too early")
    if isinstance(error, av.error.EOFError):
        return TruncatedMedia(f"the video ends too early ({size})")
    reason = (isinstance(error, av.error.FFmpegError) and error.strerror) or first_line(error)
    return UnsupportedMedia(
        f"not a video that can be decoded: {looks_like(data)} ({reason}); expected one of {FORMATS}"
    )


def _has_box(data: Encoded, name: bytes) -> bool:
    """Whether an MP4 file has this box at its top level."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if bytes(data[at + 4 : at + 8]) == name:
            return True
        if size < 8:
            return False
        at += size
    return False
