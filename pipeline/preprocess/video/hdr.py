"""Frames of high dynamic range (PQ, HLG) to 8-bit RGB in standard range.

    code values --EOTF--> light, 1.0 at reference white (203 cd/m2) --BT.2020 to BT.709, roll-off--> sRGB

What is darker than 0.75 of reference white keeps its brightness; what is brighter is compressed smoothly below 1.
Transfer functions: ITU-R BT.2100; reference white: ITU-R BT.2408. Knows frames; not where they come from.
"""

from __future__ import annotations

from functools import cache

import av
import numpy as np
import numpy.typing as npt

TRANSFERS = {16: "PQ", 18: "HLG"}
"""Transfer functions of high dynamic range, by their numbers in ITU-T H.273."""

_FloatArray = npt.NDArray[np.float32]
_REFERENCE_WHITE, _HLG_PEAK = 203.0, 1000.0
_KNEE = 0.75
_BT709 = 1
_BT2020_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)
_BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)
# Floats of so many pixels stay in the processor's cache.
_CHUNK_PIXELS = 64 * 1024


def standard_range(frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
    """RGB pixels [H, W, 3]."""
    codes = frame.to_ndarray(format="rgb48le")
    pixels = np.empty(codes.shape, dtype=np.uint8)
    table = _light_of_codes(TRANSFERS[frame.color_trc])
    rows = max(1, _CHUNK_PIXELS // frame.width)
    for start in range(0, frame.height, rows):
        light = table[codes[start : start + rows]]
        if TRANSFERS[frame.color_trc] == "HLG":  # so far the scene's light: a display of this peak makes more contrast
            light *= (_HLG_PEAK / _REFERENCE_WHITE) * (light @ _BT2020_LUMINANCE)[..., None] ** np.float32(0.2)
        if frame.color_primaries != _BT709:
            light = light @ _BT2020_TO_BT709.T
        brightest = np.maximum(light.max(axis=-1, keepdims=True), _KNEE)
        light *= (_KNEE + (1 - _KNEE) * np.tanh((brightest - _KNEE) / (1 - _KNEE))) / brightest
        pixels[start : start + rows] = _srgb()[(np.clip(light, 0, 1) * 65535 + 0.5).astype(np.uint16)]
    return pixels


@cache
def _light_of_codes(transfer: str) -> _FloatArray:
    """Light for each 16-bit code value: of the display for PQ, of the scene (1.0 at the peak) for HLG."""
    code = np.arange(65536) / 65535
    if transfer == "HLG":
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = code ** (1 / m2)
    light: _FloatArray = ((np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)).astype(np.float32)
    return light * np.float32(10000 / _REFERENCE_WHITE)


@cache
def _srgb() -> npt.NDArray[np.uint8]:
    """sRGB's 8-bit code for each 16-bit step of light."""
    light = np.arange(65536) / 65535
    code = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (code * 255 + 0.5).astype(np.uint8)
