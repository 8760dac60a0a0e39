"""What every kind of image comes to, and what becomes of files that are no good."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin

from pipeline.errors import AspectRatioError, DecompressionBomb, MediaError, TruncatedMedia, UnsupportedMedia
from pipeline.preprocess.image import OpenImage
from tests.options import media_options
from tests.unit.preprocess.conftest import decode_image, encode_image, encode_video, picture


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "GIF", "ICO", "JPEG"])
def test_every_format_is_decoded_to_its_rgb_pixels(kind: str) -> None:
    image = Image.fromarray(picture(64, 48))
    lossless: dict[str, Any] = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(kind, {})
    if kind == "GIF":
        image = image.quantize(32)
    if kind == "ICO":
        lossless = {"sizes": [(64, 48)]}
    pixels = decode_image(encode_image(image, kind, **lossless))
    assert pixels.shape == (48, 64, 3) and pixels.dtype == np.uint8
    difference = np.abs(pixels.astype(int) - np.asarray(image.convert("RGB")).astype(int))
    assert difference.mean() < (20 if kind in ("JPEG", "AVIF") else 0.01)


def test_a_jpeg_has_exactly_the_pixels_of_pillow(photos: Path) -> None:
    data = (photos / "rocket.jpg").read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(decode_image(data), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(orientation: int) -> None:
    upright = picture(40, 24)
    # How a camera stores the picture, for each value of the tag.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode_image(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(decode_image(data), upright)


def test_an_unreadable_exif_block_leaves_the_picture_as_stored() -> None:
    pixels = picture(40, 24)
    data = encode_image(Image.fromarray(pixels), "PNG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff" + b"\x99" * 40)
    assert np.array_equal(decode_image(data), pixels)


def test_hidden_colours_under_transparency_become_white() -> None:
    pixels = np.zeros((20, 30, 4), dtype=np.uint8)
    pixels[..., 0] = 200  # red that nobody is meant to see
    pixels[:, 15:, 3] = 255
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        seen = decode_image(encode_image(Image.fromarray(pixels), kind, **options))
        assert (seen[:, :15] == 255).all() and (seen[:, 15:] == (200, 0, 0)).all()


def test_palette_transparency_and_grey_transparency_become_white() -> None:
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    seen = decode_image(encode_image(palette, "PNG", transparency=0))
    assert seen.tolist() == [[[255, 255, 255], [0, 255, 0]], [[0, 255, 0], [255, 255, 255]]]
    grey = Image.fromarray(np.array([[40, 90]], dtype=np.uint8))
    seen = decode_image(encode_image(grey, "PNG", transparency=40))
    assert seen.tolist() == [[[255, 255, 255], [90, 90, 90]]]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 64 * 16).astype(np.uint16).reshape(16, 64)
    for kind in ("PNG", "TIFF"):
        seen = decode_image(encode_image(Image.fromarray(values), kind))
        assert np.array_equal(seen[..., 0], values >> 8) and np.array_equal(seen[..., 0], seen[..., 2])
    pgm = b"P5 64 16 65535\n" + values.astype(">u2").tobytes()
    assert np.abs(decode_image(pgm)[..., 0].astype(int) - (values >> 8)).max() <= 1


def test_sixteen_bit_colour_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 8 * 4 * 3).astype(">u2").reshape(4, 8, 3)
    raw = b"".join(b"\x00" + row.tobytes() for row in values)
    data = png(8, 4, raw, bit_depth=16, colour_type=2)
    assert np.array_equal(decode_image(data), (values >> 8).astype(np.uint8))


TWELVE_BITS = np.linspace(0, 4095, 64 * 16).astype(np.uint16).reshape(16, 64)
AS_EIGHT_BITS = (TWELVE_BITS * (255 / 4095) + 0.5).astype(np.uint8)


def decoded(data: bytes) -> tuple[Any, str | None]:
    image = OpenImage(data, media_options())
    return image.decode(), image.note


def grey_16(values: Any, *chunks: tuple[bytes, bytes]) -> bytes:
    raw = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], raw, bit_depth=16, colour_type=0, chunks=chunks)


def colour_16(values: Any, *chunks: tuple[bytes, bytes]) -> bytes:
    raw = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in np.stack([values] * 3, axis=-1))
    return png(values.shape[1], values.shape[0], raw, bit_depth=16, colour_type=2, chunks=chunks)


def test_twelve_bits_in_a_file_of_sixteen_are_scaled_where_the_file_states_them() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[281] = 4095  # MaxSampleValue
    grey = Image.fromarray(TWELVE_BITS)
    for data in (
        encode_image(grey, "TIFF", tiffinfo=tags),
        grey_16(TWELVE_BITS, (b"sBIT", b"\x0c")),
        colour_16(TWELVE_BITS, (b"sBIT", b"\x0c\x0c\x0c")),
        colour_tiff(TWELVE_BITS, largest=4095),
    ):
        pixels, note = decoded(data)
        assert np.abs(pixels.astype(int) - AS_EIGHT_BITS[..., None]).max() <= 1
        assert note == "shown as 12 bits a channel, as the file states"


def test_twelve_bits_that_fill_sixteen_are_shown_as_sixteen() -> None:
    for values in (TWELVE_BITS << 4, TWELVE_BITS << 4 | TWELVE_BITS >> 8, (TWELVE_BITS >> 6) << 4):
        for data in (grey_16(values, (b"sBIT", b"\x0c")), colour_16(values, (b"sBIT", b"\x0c" * 3))):
            pixels, note = decoded(data)
            assert np.array_equal(pixels[..., 0], values >> 8)
            assert note is None or "does not state its depth" in note


def test_a_dark_file_of_sixteen_bits_that_states_no_depth_is_noted() -> None:
    for data in (grey_16(TWELVE_BITS), encode_image(Image.fromarray(TWELVE_BITS), "TIFF"), colour_16(TWELVE_BITS)):
        pixels, note = decoded(data)
        assert np.array_equal(pixels[..., 0], TWELVE_BITS >> 8)
        assert note == "no value is above 4095 of 65,535 and the file does not state its depth: shown as 16 bits, dark"
    assert decoded(grey_16(TWELVE_BITS << 4))[1] is None


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_orientation_of_deep_pictures_is_applied(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode_image(Image.fromarray(TWELVE_BITS), kind, exif=exif)).shape == (64, 16, 3)


def test_the_largest_value_of_a_netpbm_file_is_its_white() -> None:
    pgm = b"P5 64 16 4095\n" + TWELVE_BITS.astype(">u2").tobytes()
    assert np.abs(decode_image(pgm)[..., 0].astype(int) - AS_EIGHT_BITS).max() <= 1


def test_transparency_of_sixteen_bits_becomes_white() -> None:
    values = np.array([[300, 60000, 301]], dtype=np.uint16)
    assert decode_image(grey_16(values, (b"tRNS", struct.pack(">H", 300))))[0, :, 0].tolist() == [255, 234, 1]
    seen = decode_image(colour_16(values, (b"tRNS", struct.pack(">HHH", 300, 300, 300))))
    assert seen[0].tolist() == [[255] * 3, [234] * 3, [1] * 3]


def colour_tiff(values: Any, *, largest: int) -> bytes:
    """An uncompressed RGB TIFF of 16 bits, which Pillow can't write."""
    height, width = values.shape
    pixels = np.stack([values] * 3, axis=-1).astype("<u2").tobytes()
    entries = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 256),
        (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(pixels)), (281, 3, 3, 210),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\x00" + struct.pack("<I", 8) + directory + bytes(4)
    return (head.ljust(200, b"\x00") + struct.pack("<5H", 16, 16, 16, 0, 0) + struct.pack("<3H", *[largest] * 3)).ljust(
        256, b"\x00"
    ) + pixels


def test_floating_point_pixels_are_refused_because_their_range_is_unknown() -> None:
    with pytest.raises(UnsupportedMedia, match="floating-point"):
        decode_image(encode_image(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"))


def test_cmyk_is_converted_as_pillow_does() -> None:
    cmyk = Image.fromarray(picture(32, 32)).convert("CMYK")
    for kind in ("TIFF", "JPEG"):
        data = encode_image(cmyk, kind)
        with Image.open(io.BytesIO(data)) as image:
            assert image.mode == "CMYK"
            assert np.array_equal(decode_image(data), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    first, second = Image.new("RGB", (32, 32), (200, 30, 30)), Image.new("RGB", (32, 32), (30, 30, 200))
    seen = decode_image(encode_image(first, kind, save_all=True, append_images=[second]))
    assert np.abs(seen.astype(int) - (200, 30, 30)).max() < 12


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 600)])
def test_sides_of_one_pixel_and_a_ratio_of_exactly_200_are_decode_image(size: tuple[int, int]) -> None:
    assert decode_image(encode_image(Image.new("RGB", size))).shape == (size[1], size[0], 3)


def test_a_ratio_above_200_is_an_error_with_both_numbers() -> None:
    with pytest.raises(AspectRatioError, match=r"1x201 pixels is 201:1; the model takes at most 200:1"):
        decode_image(encode_image(Image.new("RGB", (1, 201))))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_file_is_an_error_never_a_grey_picture(kind: str, share: float) -> None:
    image = Image.fromarray(picture(160, 120))
    data = encode_image(image.quantize() if kind == "GIF" else image, kind)
    with pytest.raises(MediaError) as caught:
        decode_image(data[: int(len(data) * share)])
    assert type(caught.value) in (TruncatedMedia, UnsupportedMedia)
    if kind in ("PNG", "JPEG", "BMP"):
        assert type(caught.value) is TruncatedMedia


def test_zero_bytes_are_said_to_be_zero_bytes() -> None:
    with pytest.raises(TruncatedMedia, match="0 bytes"):
        decode_image(b"")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "HTML"),
        (b"\n  <html>", "HTML"),
        (b'<?xml version="1.0"?><svg></svg>', "SVG"),
        (b'{"error": "expired"}', "JSON"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PostScript"),
        (b"%PDF-1.7\n", "PDF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", "HEIC"),
        (b"\x00\x00\x00\x18ftypmsf1\x00\x00\x00\x00", "HEIC"),
        (b"\x00\x00\x00\x18ftypcrx \x00\x00\x00\x00", "not an image .*: a Canon CR3 raw image"),
        (b"\x00\x00\x00\x18ftypM4A \x00\x00\x00\x00", "not an image .*: an M4A audio file"),
        (b"\x00\x00\x00\x18ftypisom\x00\x00\x00\x00", "found a video .*MP4 file of brand isom"),
        (b"\x00\x00\x00\x18ftypavif\x00\x00\x00\x00", "the signature of AVIF, but the rest can't be read"),
        (b"\x89abcdefg", "89 61 62"),
        (b"abc\x00defg", "a file beginning 61 62 63 00"),
        (b"this is no picture\n" * 40, r'a text file beginning "this is " \(760 bytes\); expected JPEG'),
        ("\ufeffgr\u00fcn\n".encode() + "\u00e4".encode() * 300, 'a text file beginning "gr\u00fcn'),
    ],
)
def test_what_is_no_image_is_named(data: bytes, said: str) -> None:
    with pytest.raises(UnsupportedMedia, match=said):
        decode_image(data)


def test_huge_dimensions_in_the_header_are_refused_before_any_memory_is_taken() -> None:
    data = png(60_000, 50_000, b"", bit_depth=8, colour_type=2)
    with pytest.raises(DecompressionBomb, match=r"60000x50000 = 3,000,000,000 pixels; at most 178,956,970"):
        decode_image(data)
    with pytest.raises(DecompressionBomb, match="max_image_pixels"):
        decode_image(encode_image(Image.new("1", (110, 100))), media_options(max_image_pixels=10_000))


def test_a_limit_above_pillows_own_is_honoured() -> None:
    # 200 Mpx of one bit each: Pillow by itself refuses from 179 Mpx on. Read no further than the header here.
    data = png(20_000, 10_000, b"", bit_depth=1, colour_type=0)
    assert OpenImage(data, media_options(max_image_pixels=200_000_000)).width == 20_000


def test_a_png_whose_text_unpacks_to_gigabytes_is_a_bomb() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * (80 * 1024 * 1024), zip=True)
    data = encode_image(Image.new("RGB", (8, 8)), pnginfo=info)
    assert len(data) < 200_000
    with pytest.raises(DecompressionBomb, match="metadata"):
        decode_image(data)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_a_png_with_megabytes_of_compressed_metadata_is_decoded(kind: str) -> None:
    body = np.random.default_rng(0).integers(32, 120, 2 << 20, dtype=np.uint8).tobytes()
    info = PngImagePlugin.PngInfo()
    options: dict[str, Any] = {"icc_profile": body} if kind == "iCCP" else {"pnginfo": info}
    if kind == "zTXt":
        info.add_text("workflow", body.decode(), zip=True)
    if kind == "iTXt":
        info.add_itxt("workflow", body.decode(), zip=True)
    assert np.array_equal(decode_image(encode_image(Image.fromarray(picture(80, 40)), **options)), picture(80, 40))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_truncated_image_can_be_accepted_with_a_note(kind: str) -> None:
    data = encode_image(Image.fromarray(picture(160, 120)), kind)
    options = media_options(truncated_images="accept")
    whole, cut = OpenImage(data, options), OpenImage(data[:-40], options)
    pixels = cut.decode()
    assert np.array_equal(whole.decode()[:50], pixels[:50]) and whole.note is None
    assert cut.note is not None and "ends too early" in cut.note and "what is missing is grey or black" in cut.note
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    with pytest.raises(TruncatedMedia):
        decode_image(data[:-40])


def png(
    width: int,
    height: int,
    raw: bytes,
    *,
    bit_depth: int,
    colour_type: int,
    chunks: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """A PNG with these dimensions in its header, whatever its pixels are."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunk(*each) for each in chunks)
    return head + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_a_file_that_only_begins_as_a_png_is_called_damaged() -> None:
    with pytest.raises(
        UnsupportedMedia,
        match=r"has the signature of PNG, but the rest can't be read \(80 bytes in all\): it is damaged",
    ):
        decode_image(b"\x89PNG\r\n\x1a\n" + bytes(72))


@pytest.mark.parametrize(
    ("container", "codec", "named"),
    [
        ("mp4", "libx264", "an MP4 file of brand isom"),
        ("matroska", "libx264", "a Matroska or WebM file"),
        ("avi", "mpeg4", "an AVI file"),
    ],
)
def test_a_video_among_the_images_is_pointed_to_the_column_of_videos(container: str, codec: str, named: str) -> None:
    with pytest.raises(
        UnsupportedMedia, match=rf"found a video \({named}, [\d,]+ bytes\), expected an image: .*column of videos"
    ):
        decode_image(encode_video(3, container=container, codec=codec))


def tiff_tags(big: bool, samples: int, sample_format: int) -> bytes:
    """A TIFF of 64-bit samples: its header and tags, in either form."""
    entry = "<HHQQ" if big else "<HHII"
    entries = [
        (256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 1, 64), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8),
        (277, 3, 1, samples), (339, 3, 1, sample_format),
    ]  # fmt: skip
    head = b"II+\0" + struct.pack("<HHQ", 8, 0, 16) if big else b"II*\0" + struct.pack("<I", 8)
    count = struct.pack("<Q" if big else "<H", len(entries))
    return head + count + b"".join(struct.pack(entry, *each) for each in entries) + bytes(600)


@pytest.mark.parametrize("big", [False, True])
def test_floating_point_pixels_that_pillow_has_no_mode_for_are_named_too(big: bool) -> None:
    with pytest.raises(UnsupportedMedia, match="floating-point pixels, which have no defined range"):
        decode_image(tiff_tags(big, samples=3, sample_format=3))


@pytest.mark.parametrize(
    "data", [tiff_tags(False, samples=3, sample_format=1), b"II*\0", b"II+\0", b"MM\0+" + bytes(40)]
)
def test_any_other_tiff_that_pillow_does_not_open_may_be_damaged_or_a_variant(data: bytes) -> None:
    with pytest.raises(
        UnsupportedMedia, match=r"it is damaged, or a variant of TIFF .* convert it to RGB of 8 or 16 bits"
    ):
        decode_image(data)


def test_a_tiff_whose_data_the_decoder_refuses_says_what_it_is() -> None:
    data = bytearray(encode_image(Image.fromarray(picture(64, 64)), "TIFF", compression="tiff_adobe_deflate"))
    data[8:400] = b"\xff" * 392  # Pillow writes the pixels behind the header
    with pytest.raises(
        UnsupportedMedia, match=r"data of this TIFF with compression tiff_adobe_deflate \(decoder error -2"
    ):
        decode_image(bytes(data))
