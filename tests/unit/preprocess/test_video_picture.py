"""Decoded frames as a player shows them: display matrices, transparency, high dynamic range."""

from __future__ import annotations

import av
import numpy as np
import numpy.typing as npt
import pytest

from pipeline.conversation import MediumSettings
from pipeline.preprocess.video.picture import rgb_pixels
from tests.unit.preprocess.conftest import decode_video, encode_video, picture

ONE, W = 1 << 16, 1 << 30
STILL = np.zeros((64, 96, 3), dtype=np.uint8)
STILL[:32, :48] = 220  # top left is bright
STILL[:32, 48:] = 90


def shown_through(a: int, b: int, c: int, d: int) -> tuple[npt.NDArray[np.uint8], str | None]:
    data = encode_video(np.stack([STILL] * 2), matrix=[a, b, 0, c, d, 0, 0, 0, W])
    video = decode_video(data, MediumSettings())
    return video.frames[0], video.note


@pytest.mark.parametrize(
    ("matrix", "upright"),
    {
        "as stored": ((ONE, 0, 0, ONE), STILL),
        "flipped across": ((-ONE, 0, 0, ONE), STILL[:, ::-1]),
        "flipped down": ((ONE, 0, 0, -ONE), STILL[::-1]),
        "half a turn": ((-ONE, 0, 0, -ONE), STILL[::-1, ::-1]),
        "a turn to the left": ((0, -ONE, ONE, 0), np.rot90(STILL, 1)),
        "a turn to the right": ((0, ONE, -ONE, 0), np.rot90(STILL, -1)),
        "transposed": ((0, ONE, ONE, 0), STILL.transpose(1, 0, 2)),
        "transposed and turned": ((0, -ONE, -ONE, 0), np.rot90(STILL.transpose(1, 0, 2), 2)),
    }.values(),
)
def test_right_angled_display_matrices_are_applied(
    matrix: tuple[int, int, int, int], upright: npt.NDArray[np.uint8]
) -> None:
    pixels, note = shown_through(*matrix)
    assert pixels.shape == upright.shape and note is None
    assert np.abs(pixels.astype(int) - upright).mean() < 6


@pytest.mark.parametrize("matrix", [(46340, -46340, 46340, 46340), (ONE, 0, 0, 2 * ONE), (ONE, 9000, 0, ONE)])
def test_any_other_display_matrix_is_noted(matrix: tuple[int, int, int, int]) -> None:
    _, note = shown_through(*matrix)
    assert note is not None and "display matrix (" in note


@pytest.mark.parametrize(
    ("codec", "container", "pix_fmt"),
    [
        ("libvpx-vp9", "webm", "yuva420p"),
        ("libvpx", "webm", "yuva420p"),
        ("png", "mov", "rgba"),
        ("prores_ks", "mov", "yuva444p10le"),
        ("ffv1", "matroska", "bgra"),
    ],
)
def test_transparent_frames_are_laid_on_white(codec: str, container: str, pix_fmt: str) -> None:
    frames = np.zeros((6, 64, 96, 4), dtype=np.uint8)
    frames[:, :, 48:] = (200, 40, 40, 255)
    options = {"auto-alt-ref": "0"} if codec.startswith("libvpx") else {}
    data = encode_video(frames, codec=codec, container=container, pix_fmt=pix_fmt, options=options)
    video = decode_video(data, MediumSettings(num_frames=4))
    assert video.note is None
    assert (video.frames[:, :, :40] > 250).all()
    assert np.abs(video.frames[:, :, 56:].astype(int) - (200, 40, 40)).mean() < 8


def grey_ramp(trc: int) -> av.VideoFrame:
    """A frame of ten bits whose luma rises from black on the left to the brightest on the right."""
    values = np.full((96, 64), 512, dtype=np.uint16)  # three planes below each other, chroma neutral
    values[:64] = np.linspace(64, 940, 64)
    frame = av.VideoFrame.from_ndarray(values, format="yuv420p10le")
    frame.color_trc, frame.color_primaries, frame.colorspace, frame.color_range = trc, 9, 9, 1
    return frame


def red_and_green() -> av.VideoFrame:
    """PQ frame, left half BT.709's red and right half its green, at half of reference white."""
    light = np.zeros((64, 64, 3))
    light[:, :32] = np.array([0.6274, 0.0691, 0.0164]) * 0.5 * 203 / 10000  # in BT.2020's primaries
    light[:, 32:] = np.array([0.3293, 0.9195, 0.0880]) * 0.5 * 203 / 10000
    power = light ** (2610 / 16384)
    codes = ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    frame = av.VideoFrame.from_ndarray((codes * 65535).astype(np.uint16), format="rgb48le")
    frame.color_trc, frame.color_primaries = 16, 9
    return frame


def test_high_dynamic_range_is_shown_in_standard_range_and_noted() -> None:
    standard, notes = rgb_pixels(grey_ramp(1))
    assert notes == []
    for trc, name, white in ((16, "PQ", 0.58), (18, "HLG", 0.75)):
        pixels, notes = rgb_pixels(grey_ramp(trc))
        line = pixels[32, :, 1].astype(int)
        assert len(notes) == 1 and f"HDR ({name})" in notes[0]
        assert (np.diff(line) >= 0).all() and line[0] < 5 and line[-1] > 250
        # The signal level of reference white (ITU-R BT.2408) comes out near white, not as the grey that the codes say.
        at = int(white * 63)
        assert abs(line[at] - 245) < 10 and standard[32, at, 1] < 200
    colour = rgb_pixels(red_and_green())[0][8, [8, 56]].astype(int)
    assert np.abs(colour - [(188, 0, 0), (0, 188, 0)]).max() < 6
    data = encode_video(
        np.stack([picture(96, 64)] * 3),
        pix_fmt="yuv420p10le",
        color={"color_trc": 16, "color_primaries": 9, "colorspace": 9},
    )
    assert "HDR (PQ)" in (decode_video(data, MediumSettings()).note or "")
