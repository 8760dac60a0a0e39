"""An encoded image to RGB pixels, by Pillow.

Knows codecs; not files, resizing or patches. Every exception of Pillow ends here, as a MediaError.

What is decoded how: EXIF orientation is applied; transparency is laid on white, as transformers does; channels of more
than 8 bits are scaled (deep.py); CMYK is converted by Pillow without a colour profile; of an
animation the first frame is taken. Formats are limited to those a browser or camera writes: Pillow's others include
one that starts Ghostscript.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Protocol, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from pipeline.errors import (
    DecompressionBomb,
    MediaError,
    MediaMemoryError,
    TruncatedMedia,
    UnsupportedMedia,
    first_line,
)
from pipeline.preprocess.deep import deep_pixels
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.size import check_source_size

# Our own limit, `max_image_pixels`, is checked on the header before any pixel is decoded; Pillow's fixed one would
# overrule a larger setting and warn below it.
Image.MAX_IMAGE_PIXELS = None
# Pillow refuses a PNG with a compressed text or colour profile above 1 MiB; drawing programs write their whole scene
# there. All texts together stay below its other limit, 64 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "TGA", "ICO")

_TRUNCATED = re.compile(r"truncated|unexpected end|end of file|no more data|not enough image data", re.IGNORECASE)
_UNDECODABLE = re.compile(r"^(de|en)coder error -?\d+|data stream", re.IGNORECASE)
_BOMB = re.compile(r"too large|too much memory|decompress", re.IGNORECASE)

# Pillow has no exception of its own for broken files: its parsers raise whatever their arithmetic stumbles on.
_PILLOW_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError,
    AssertionError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip

_HEIC_BRANDS = ("heic", "heix", "heim", "heis", "hevc", "hevx", "hevm", "hevs", "mif1", "mif2", "msf1")
_BRANDS = {
    **dict.fromkeys(_HEIC_BRANDS, "an HEIC image"),
    **dict.fromkeys(("avif", "avis"), "an AVIF image"),
    "crx": "a Canon CR3 raw image",
    "M4A": "an M4A audio file",
}
"""What has the container of MP4 files, but is no video."""
_SHOWN_CHARS = 8
_DESCRIPTIONS = (
    ((b"<!doctype html", b"<html", b"<head", b"<body"), "HTML, likely an error page"),
    ((b"<?xml", b"<svg"), "SVG or XML"),
    ((b"{", b"["), "text that looks like JSON"),
    ((b"#extm3u",), "an HLS playlist"),
    ((b"ffconcat",), "an FFmpeg concat script"),
    ((b"version https://git-lfs",), "a Git LFS pointer; fetch the real file with git lfs pull"),
    ((b"%pdf",), "a PDF"),
    ((b"%!ps",), "PostScript"),
    ((b"pk\x03\x04",), "a ZIP archive"),
    ((b"\x1f\x8b",), "gzip data"),
)
"""(how files begin, in lower case; what they are)"""
_BEGINNINGS = (
    (b"\x89PNG", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"GIF8", "GIF"), (b"BM", "BMP"),
    (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"),
)  # fmt: skip
"""(how images begin, their format)"""


_FLOATS = "the image holds floating-point pixels, which have no defined range: convert it to 8 or 16 bits"
_FLOAT_SAMPLES = 3
"""TIFF's number for them in the tag SampleFormat."""


class Encoded(Protocol):
    """A medium's file as it can be looked at: bytes, or a file of which only the parts asked for are read."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> bytes | memoryview: ...


class OpenImage:
    """An image whose header has been read and checked, and whose pixels have not been decoded.

    Raises MediaError subclasses: UnsupportedMedia, TruncatedMedia, DecompressionBomb, AspectRatioError.
    """

    def __init__(self, data: Encoded, options: MediaOptions) -> None:
        self._data = data
        self._accepts_truncated = options.truncated_images == "accept"
        self.note: str | None = None
        """What was assumed of the pixels; complete once they have been decoded."""
        with _pillow_errors(data):
            self._image = self._open()
        self.width, self.height = self._image.size
        """Pixels as stored, before EXIF orientation."""
        if not self.width or not self.height:
            raise UnsupportedMedia(f"the image is {self.width}x{self.height} pixels; both sides must be at least 1")
        check_source_size("image", self.width, self.height, options)

    def decode(self, *, min_side: int | None = None) -> npt.NDArray[np.uint8]:
        """RGB pixels [H, W, 3], upright. The array may be read-only.

        With `min_side`, a JPEG may come out smaller by a power of two, as long as both sides keep so many pixels.
        """
        try:
            return self._decode(min_side)
        except TruncatedMedia as error:
            if not self._accepts_truncated:
                raise
            with _pillow_errors(self._data):
                self._image = self._open()
            ImageFile.LOAD_TRUNCATED_IMAGES = True
            try:
                pixels = self._decode(min_side)
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = False
            self.note = "; ".join(filter(None, (self.note, f"{error}: what is missing is grey or black")))
            return pixels

    def _open(self) -> Image.Image:
        return Image.open(_file(self._data), formats=FORMATS)

    def _decode(self, min_side: int | None) -> npt.NDArray[np.uint8]:
        with _pillow_errors(self._data, self._image):
            image = self._image
            if min_side is not None:
                image.draft("RGB", (min_side, min_side))
            image.load()
            deep = deep_pixels(image, self._data)
            if deep is not None:
                image, self.note = deep
            return np.asarray(_to_upright_rgb(image))


def _to_upright_rgb(image: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # whatever a broken EXIF block makes Pillow raise; browsers show such images as stored
        pass
    if image.mode == "F":
        raise UnsupportedMedia(_FLOATS)
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        return on_white(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def on_white(image: Image.Image) -> Image.Image:
    """An RGBA image laid on white, as RGB."""
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _file(data: Encoded) -> IO[bytes]:
    return io.BytesIO(data) if isinstance(data, bytes | memoryview) else cast(IO[bytes], data)


@contextlib.contextmanager
def _pillow_errors(data: Encoded, image: Image.Image | None = None) -> Iterator[None]:
    """Ignore Pillow's warnings of odd metadata, and turn its exceptions into MediaErrors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise _not_an_image(data) from error
    except MemoryError as error:
        raise MediaMemoryError(f"the image's pixels don't fit into memory ({len(data):,} bytes encoded)") from error
    except _PILLOW_ERRORS as error:
        message = first_line(error)
        if _TRUNCATED.search(message) or isinstance(error, EOFError):
            raise TruncatedMedia(f"the image ends too early: {message} ({len(data):,} bytes)") from error
        if _BOMB.search(message):
            raise DecompressionBomb(f"the image's metadata unpacks to more than is allowed: {message}") from error
        if _UNDECODABLE.search(message):
            message = (
                f"the decoder refuses the data of this {claimed_format(data) or 'image'}{_compression(image)} "
                f"({message}): they are damaged or of a kind that it does not know; save it again, as PNG for example"
            )
        raise UnsupportedMedia(f"the image can't be decoded: {message}") from error


def _compression(image: Image.Image | None) -> str:
    """How a TIFF is compressed, for a message."""
    tags: Mapping[int, object] = getattr(image, "tag_v2", {})
    if image is None or not tags:
        return ""
    number = tags.get(TiffImagePlugin.COMPRESSION, 1)
    name = TiffImagePlugin.COMPRESSION_INFO.get(number) if isinstance(number, int) else None
    return f" with compression {name or number}"


def _not_an_image(data: Encoded) -> MediaError:
    """The error for bytes that no allowed format claims, naming what they look like."""
    if not len(data):
        return TruncatedMedia("the medium has 0 bytes")
    if kind := claimed_format(data):
        if kind == "TIFF" and _has_float_samples(data):
            return UnsupportedMedia(_FLOATS)
        variant, way_out = "", ""
        if kind == "TIFF":
            variant = ", or a variant of TIFF that Pillow doesn't read"
            way_out = ", or convert it to RGB of 8 or 16 bits"
        return UnsupportedMedia(
            f"the file has the signature of {kind}, but the rest can't be read ({len(data):,} bytes in all): "
            f"it is damaged{variant}; get it again{way_out}"
        )
    if video := _claimed_video(data):
        return UnsupportedMedia(
            f"found a video ({video}, {len(data):,} bytes), expected an image: put it into the column of videos, or, "
            "in a folder, give it the extension of its format"
        )
    return UnsupportedMedia(f"not an image that can be decoded: {looks_like(data)}; expected {', '.join(FORMATS)}")


def _has_float_samples(data: Encoded) -> bool:
    """Whether a TIFF that Pillow does not open says that its samples are floating-point numbers."""
    file = _file(data)
    file.seek(0)
    head = file.read(8)
    with contextlib.suppress(*_PILLOW_ERRORS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tags = TiffImagePlugin.ImageFileDirectory_v2(head + file.read(8) if head[2:3] == b"+" else head)
        file.seek(tags.next)
        tags.load(file)
        return _FLOAT_SAMPLES in tags[TiffImagePlugin.SAMPLEFORMAT]
    return False


def claimed_format(data: Encoded) -> str | None:
    """The format of an image by its first bytes, whatever the rest is."""
    head = bytes(data[:16])
    if head[4:8] == b"ftyp" and _brand(head) in ("avif", "avis"):
        return "AVIF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    return next((kind for beginning, kind in _BEGINNINGS if head.startswith(beginning)), None)


def _claimed_video(data: Encoded) -> str | None:
    """What a video is by its first bytes."""
    head = bytes(data[:16])
    if head[4:8] == b"ftyp" and (brand := _brand(head)) not in _BRANDS:
        return f"an MP4 file of brand {brand}"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "an AVI file"
    return "a Matroska or WebM file" if head.startswith(b"\x1aE\xdf\xa3") else None


def _brand(head: bytes) -> str:
    return head[8:12].decode("latin-1").strip()


def looks_like(data: Encoded) -> str:
    """A guess at what bytes are, for error messages."""
    head = bytes(data[:512])
    found = _claimed_video(data) or _known(head) or _text_in(head) or f"a file beginning {head[:8].hex(' ')}"
    return f"{found} ({len(data):,} bytes)"


def _known(head: bytes) -> str | None:
    if head[4:8] == b"ftyp":
        brand = _brand(head)
        return f"{_BRANDS[brand]} of brand {brand}" if brand in _BRANDS else None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((description for beginnings, description in _DESCRIPTIONS if text.startswith(beginnings)), None)


def _text_in(head: bytes) -> str | None:
    """The beginning of a text file; None where it is not text."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head).lstrip("\ufeff")  # head may end within a character
    except UnicodeDecodeError:
        return None
    if not all(char.isprintable() or char in "\t\r\n\f" for char in text):
        return None
    return f"a text file beginning {json.dumps(text[:_SHOWN_CHARS], ensure_ascii=False)}"
