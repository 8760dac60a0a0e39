"""Images of more than 8 bits a channel to 8 bits, by the depth that they really use.

Cameras and scanners store 10, 12 or 14 bits in files of 16: 0 to 4095 must not come out as 0 to 15. The depth is the
file's own (TIFF's BitsPerSample and MaxSampleValue, PNG's sBIT); where the file states none and looks too dark, the
note says what was assumed. Pillow keeps only the high byte of 16-bit colour, so FFmpeg decodes what needs the low one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.errors import UnsupportedMedia

Values: TypeAlias = npt.NDArray[np.integer[Any]]
"""As the file has them: 16 bits, or more."""
_BITS_PER_SAMPLE, _ORIENTATION, _MAX_SAMPLE_VALUE = 258, 274, 281
# A file of 16 bits whose values all fit into so many may hold pixels of less depth.
_DARK_BITS = 14


class _Sliceable(Protocol):
    def __getitem__(self, part: slice, /) -> bytes | memoryview: ...


def deep_pixels(image: Image.Image, data: _Sliceable) -> tuple[Image.Image, str | None] | None:
    """(the loaded image in 8 bits, a note on what was assumed), or None for an image of 8 bits.

    Raises UnsupportedMedia for integers that are neither 8 nor 16 bits.
    """
    if image.mode.startswith("I"):
        values, transparent = np.asarray(image), image.info.get("transparency")
        low, high = int(values.min()), int(values.max())
        bits = _stated_bits(image, data, values)
        if low < 0 or (high > 65535 and bits is None):
            raise UnsupportedMedia(f"the image holds integers from {low} to {high}; convert it to 8 or 16 bits")
        grey = _scaled(values, bits)
        if transparent is not None:
            grey[values == transparent] = 255
        return _turned_as(image, Image.fromarray(grey).convert("RGB")), _note(bits, high)
    if not _is_16_bit_colour(image, data):
        return None
    brightest = int(np.asarray(image)[..., : len(image.getbands()) - ("A" in image.getbands())].max())
    if brightest >= 1 << (_DARK_BITS - 8) and image.info.get("transparency") is None:
        return image, None
    colours = _all_bits(image, data)
    if colours is None:
        return image, _note(None, brightest << 8)
    bits = _stated_bits(image, data, colours[..., :3])
    pixels = _scaled(colours, bits)
    if colours.shape[2] == 4:
        pixels[..., 3] = colours[..., 3] >> 8
    return _turned_as(image, Image.fromarray(pixels)), _note(bits, int(colours[..., :3].max()))


def _turned_as(image: Image.Image, deep: Image.Image) -> Image.Image:
    """`deep` with the other image's EXIF orientation."""
    with contextlib.suppress(Exception):  # whatever a broken EXIF block makes Pillow raise
        deep.getexif()[_ORIENTATION] = image.getexif()[_ORIENTATION]
    return deep


def _scaled(values: Values, bits: int | None) -> npt.NDArray[np.uint8]:
    if bits is None or bits == 16:
        return (values >> 8).astype(np.uint8)
    if bits > 16:
        return _rounded(values.astype(np.int64), bits)
    return _rounded(np.arange(1 << 16), bits)[values]  # a table: large images have room for little more than themselves


def _rounded(values: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.uint8]:
    return np.minimum((values * 255 + ((1 << bits) - 1) // 2) // ((1 << bits) - 1), 255).astype(np.uint8)


def _note(bits: int | None, high: int) -> str | None:
    if bits is not None and bits != 16:
        return f"shown as {bits} bits a channel, as the file states"
    if bits is None and 0 < high < 1 << _DARK_BITS:
        return f"no value is above {high} of 65,535 and the file does not state its depth: shown as 16 bits, dark"
    return None


def _stated_bits(image: Image.Image, data: _Sliceable, values: Values) -> int | None:
    """The depth by the file, if all values fit into it."""
    bits: int | None = None
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]  # of TiffImageFile
        stored = max(_numbers(tags.get(_BITS_PER_SAMPLE)), default=16)
        largest = max(_numbers(tags.get(_MAX_SAMPLE_VALUE)), default=0)
        if 0 < largest < (1 << stored) - 1:
            bits = largest.bit_length()
        elif stored < 16:
            bits = stored
    elif image.format == "PNG":
        bits = max((bits for name, body in _png_chunks(data) if name == b"sBIT" for bits in body[:3]), default=None)
        # By the standard, values of less depth fill all 16 bits; many writers leave them as they are.
        if bits is None or not 0 < bits < 16 or _fills_16_bits(values, bits):
            return None
    return bits if bits is not None and int(values.max()) < 1 << bits else None


def _fills_16_bits(values: Values, bits: int) -> bool:
    low = values & ((1 << (16 - bits)) - 1)
    top = values >> bits if bits >= 8 else low
    return int(values.max()) >= 1 << bits or not low.any() or bool((low == top).all())


def _numbers(tag: object) -> list[int]:
    values = tag if isinstance(tag, tuple) else (tag,)
    return [int(value) for value in values if isinstance(value, int | float)]


def _is_16_bit_colour(image: Image.Image, data: _Sliceable) -> bool:
    if image.format == "PNG":
        return bytes(data[24:25]) == b"\x10"
    return image.format == "TIFF" and 16 in _numbers(image.tag_v2.get(_BITS_PER_SAMPLE))  # type: ignore[attr-defined]


def _png_chunks(data: _Sliceable) -> Iterator[tuple[bytes, bytes]]:
    """Name and body of the short chunks before the pixels."""
    at = 8
    while len(head := bytes(data[at : at + 8])) == 8 and head[4:] != b"IDAT":
        size = int.from_bytes(head[:4], "big")
        if size <= 8:
            yield head[4:], bytes(data[at + 8 : at + 8 + size])
        at += size + 12


def _all_bits(image: Image.Image, data: _Sliceable) -> Values | None:
    """Values [H, W, 3 or 4] of a 16-bit colour image by FFmpeg, or None where it can't decode the file."""
    try:
        decoder = av.VideoCodecContext.create("png" if image.format == "PNG" else "tiff", "r")
        decoder.thread_count = 1
        (frame,) = decoder.decode(av.Packet(bytes(data[:])))
        bands = {"rgb48": 3, "rgba64": 4, "ya16": 4}[frame.format.name[:-2]]
        values = frame.to_ndarray(format="rgb48le" if bands == 3 else "rgba64le")
    except (av.error.FFmpegError, ValueError, KeyError):
        return None
    return values if values.shape[:2] == (image.height, image.width) else None
