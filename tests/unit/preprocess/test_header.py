"""Sizes, frames and tokens by the header equal those of the decoded medium, and only a part of the file is read."""

from __future__ import annotations

import functools
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pipeline.preprocess.header as header_module
from pipeline.conversation import MediumKind, MediumSettings
from pipeline.errors import (
    AspectRatioError,
    DecompressionBomb,
    FetchError,
    FetchTimeout,
    MediaError,
    NoVideoStream,
    RowError,
    SettingError,
    TruncatedMedia,
    UnsupportedMedia,
)
from pipeline.preprocess.fetch.ranged import RangedFile
from pipeline.preprocess.fetch.source import RangedSource
from pipeline.preprocess.header import MediumHeader, read_header
from pipeline.preprocess.limits import MediaOptions
from tests.decoding import see_medium
from tests.options import media_options
from tests.unit.preprocess.conftest import decode_image, decode_video, encode_image, encode_video, picture

OPTIONS = media_options()


def ranged(data: bytes) -> RangedFile:
    return RangedFile(RangedSource(len(data), lambda start, stop: data[start:stop]), seconds=20.0)


def header(kind: MediumKind, data: bytes, options: MediaOptions = OPTIONS, **settings: Any) -> MediumHeader:
    return read_header(kind, ranged(data), MediumSettings(**settings), options)


def assert_as_decoded(kind: MediumKind, data: bytes, options: MediaOptions = OPTIONS, **settings: Any) -> MediumHeader:
    """The header's size and counts against the pixels, frames and patches that decoding gives."""
    found, asked = header(kind, data, options, **settings), MediumSettings(**settings)
    frames = decode_image(data, options)[None] if kind == "image" else decode_video(data, asked, options).frames
    assert len(frames) == found.size.num_frames
    assert frames.shape[1:3] in ((found.height, found.width), (found.width, found.height))  # turned upright
    seen = see_medium(kind, data, asked, options, source="")
    assert len(seen.patches) == np.prod(found.size.grid_thw) == 4 * found.size.num_visual_tokens
    return found


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_an_image_header_gives_the_size_of_the_decoded_image(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}
    found = assert_as_decoded("image", encode_image(Image.fromarray(picture(517, 213)), kind, **options))
    assert (found.width, found.height) == (517, 213)


@pytest.mark.parametrize(
    "settings", [{}, {"max_pixels": 20_000}, {"min_pixels": 400_000}, {"min_pixels": 30_000, "max_pixels": 40_000}]
)
def test_a_rows_own_pixel_bounds_are_applied(settings: dict[str, int]) -> None:
    assert_as_decoded("image", encode_image(Image.fromarray(picture(300, 200))), **settings)


CLIPS: dict[str, dict[str, Any]] = {
    "mp4": {},
    "b-frames": {"options": {"bf": "3", "g": "12"}},
    "odd rate": {"rate": 30},
    "rotated": {"rotation": 90},
    "avi": {"codec": "mpeg4", "container": "avi"},
    "matroska": {"container": "matroska"},
    "webm": {"codec": "libvpx", "container": "webm"},
    "mpegts": {"container": "mpegts"},
    "fragmented": {"container_options": {"movflags": "frag_keyframe+empty_moov"}, "options": {"g": "10"}},
}


@functools.cache
def clip(name: str) -> bytes:
    return encode_video(75, size=(160, 96), **CLIPS[name])


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"fps": 5.0}, {"num_frames": 6}, {"start_s": 1.0, "end_s": 2.5}, {"start_s": 2.0, "fps": 3.0}],
    ids=str,
)
def test_a_video_header_gives_the_number_of_decoded_frames(name: str, settings: dict[str, Any]) -> None:
    data = clip(name)
    assert assert_as_decoded("video", data, **settings).is_exact


def test_a_variable_rate_is_read_from_the_index() -> None:
    from fractions import Fraction

    times = [n * n for n in range(40)]  # ever slower
    data = encode_video(40, times=times, time_base=Fraction(1, 100), options={"bf": "0"})
    for settings in ({}, {"fps": 1.0}, {"start_s": 2.0, "end_s": 12.0}):
        assert_as_decoded("video", data, **settings)


@pytest.mark.parametrize("name", ["matroska", "mpegts"])
def test_a_large_file_without_an_index_is_estimated_from_its_stated_duration_and_rate(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header_module, "_COUNTED_BYTES", 0)
    data = clip(name)
    found = header("video", data)
    assert not found.is_exact
    seen = see_medium("video", data, MediumSettings(), media_options(), source="").receipt
    assert found.size.num_visual_tokens == pytest.approx(np.prod(seen.grid_thw) / 4, rel=0.1)


@pytest.mark.parametrize("codec", ["libx264", "libvpx"])
def test_a_large_recording_that_states_no_duration_is_estimated_from_its_beginning(
    codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header_module, "_COUNTED_BYTES", 0)
    monkeypatch.setattr(header_module, "_BEGINNING_BYTES", 80_000)
    frames = np.random.default_rng(0).integers(0, 256, (60, 64, 96, 3), dtype=np.uint8)
    options = {"g": "10", "deadline": "realtime"} if codec == "libvpx" else {"g": "10"}
    data = encode_video(
        frames, codec=codec, container="matroska", options=options, container_options={"live": "1"}, rate=10
    )
    assert len(data) > 160_000
    file = ranged(data)
    found = read_header("video", file, MediumSettings(), OPTIONS)
    assert not found.is_exact and found.size.num_frames == pytest.approx(12, abs=2)
    assert file.bytes_read < len(data)


def test_keyframes_and_decoded_frames_are_counted() -> None:
    data = encode_video(100, options={"g": "10", "keyint_min": "10", "sc_threshold": "0", "bf": "0"})
    exact = assert_as_decoded("video", data, fps=1.0)
    assert exact.size.num_frames == 10 and exact.num_decoded == 10  # each wanted frame is a keyframe
    keys = assert_as_decoded("video", data, media_options(video_frames="keyframes"), fps=5.0)
    assert keys.num_decoded == keys.size.num_frames == 10
    between = header("video", data, num_frames=4)
    assert between.num_decoded == 1 + 6 + 1 + 6  # frames 0, 25, 50, 75


def test_headers_of_real_media_equal_what_decoding_gives(photos: Path, clips: Path) -> None:
    for path in [photos / "rocket.jpg", photos / "coffee.png", photos / "retina.jpg"]:
        assert_as_decoded("image", path.read_bytes())
    for path in sorted(clips.glob("*.mp4")):
        assert_as_decoded("video", path.read_bytes())


def test_only_a_part_of_a_large_file_is_read() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)
    photo = ranged(encode_image(Image.fromarray(noise)))
    read_header("image", photo, MediumSettings(), media_options())
    assert len(photo) > 5_000_000 and photo.bytes_read <= 65536
    frames = np.random.default_rng(0).integers(0, 256, (60, 240, 320, 3), dtype=np.uint8)
    film = ranged(encode_video(frames, options={"preset": "ultrafast", "crf": "10", "g": "10"}))
    read_header("video", film, MediumSettings(), media_options())
    assert len(film) > 4_000_000 and film.bytes_read < len(film) / 10


def test_a_header_raises_the_same_error_as_decoding() -> None:
    cases: list[tuple[MediumKind, bytes, type[RowError]]] = [
        ("image", b"", TruncatedMedia),
        ("image", b"<html>gone</html>", UnsupportedMedia),
        ("image", encode_image(Image.new("RGB", (3000, 10))), AspectRatioError),
        ("video", b"", MediaError),
        ("video", b"nonsense" * 100, UnsupportedMedia),
        ("video", encode_video(20)[:900], TruncatedMedia),
        ("video", encode_image(Image.new("RGB", (9, 9)), "JPEG"), MediaError),
    ]
    for kind, data, expected in cases:
        with pytest.raises(expected) as raised:
            header(kind, data)
        with pytest.raises(type(raised.value)):
            see_medium(kind, data, MediumSettings(), media_options(), source="")
    with pytest.raises(SettingError):
        header("image", encode_image(Image.new("RGB", (9, 9))), max_pixels=9)
    with pytest.raises(SettingError):
        header("video", encode_video(20), start_s=9.0)
    with pytest.raises(DecompressionBomb):
        header("image", encode_image(Image.new("RGB", (400, 400))), media_options(max_image_pixels=1000))
    for options in (media_options(max_video_frames=10), media_options(max_video_s=1.0)):
        with pytest.raises(DecompressionBomb):
            header("video", encode_video(75), options)


def test_a_file_of_sound_alone_has_no_video() -> None:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as target:
        stream: Any = target.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    with pytest.raises(NoVideoStream):
        header("video", file.getvalue())


def of_several_blocks(name: str) -> tuple[MediumKind, bytes]:
    """A medium whose header is more than 2 KiB long."""
    if name in CLIPS:
        return "video", clip(name)
    return "image", encode_image(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)), name
    )


@pytest.mark.parametrize("name", ["WEBP", "mp4", "avi", "matroska", "mpegts"])
@pytest.mark.parametrize("num_answered", [0, 1, 2])
def test_the_error_of_a_read_is_raised_through_the_parser(
    name: str, num_answered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.preprocess.fetch.ranged.FIRST_BYTES", 1024)
    kind, data = of_several_blocks(name)
    reads: list[int] = []

    def read(start: int, stop: int) -> bytes:
        reads.append(start)
        if len(reads) > num_answered:
            raise FetchTimeout("no answer from the bucket")
        return data[start:stop]

    file = RangedFile(RangedSource(len(data), read), seconds=9)
    with pytest.raises(FetchTimeout, match="no answer from the bucket"):
        read_header(kind, file, MediumSettings(), media_options())


@pytest.mark.parametrize("name", ["WEBP", "mp4"])
def test_a_slow_source_raises_fetch_timeout(name: str) -> None:
    kind, data = of_several_blocks(name)

    def slow(start: int, stop: int) -> bytes:
        time.sleep(0.2)
        return data[start:stop]

    with pytest.raises(FetchTimeout, match="not read within"):
        read_header(kind, RangedFile(RangedSource(len(data), slow), seconds=0.1), MediumSettings(), media_options())


def test_a_header_that_is_too_large_or_ends_early_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.preprocess.fetch.ranged._MAX_HEADER_BYTES", 128 * 1024)
    with pytest.raises(UnsupportedMedia, match="takes more than"):
        RangedFile(RangedSource(900_000, lambda start, stop: bytes(stop - start)), seconds=9).read()
    with pytest.raises(FetchError, match="ends at byte 100 of 9,000"):
        RangedFile(RangedSource(9000, lambda start, stop: bytes(100)), seconds=9).read()


def test_a_ranged_file_reads_like_the_bytes_themselves() -> None:
    data = np.random.default_rng(0).integers(0, 256, 700_000, dtype=np.uint8).tobytes()
    file, plain = ranged(data), io.BytesIO(data)
    rng = np.random.default_rng(1)
    for _ in range(200):
        if rng.random() < 0.5:
            position = int(rng.integers(0, 710_000))
            assert file.seek(position) == plain.seek(position)
        size = int(rng.integers(0, 90_000))
        assert file.read(size) == plain.read(size)
        assert file.tell() == plain.tell()
    assert file[10:20] == data[10:20] and file[699_990:] == data[699_990:] and len(file) == len(data)
    assert file.bytes_read <= len(data)  # nothing twice
