"""The inputs of the golden values: images, clips and sampling questions that any machine makes alike, from seeds.

Imported by the script that asks transformers' torchvision processors, and by the test that asks ours.
"""

from __future__ import annotations

import io
import random
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

MODES = ("RGB", "RGB", "RGB", "L", "RGBA", "LA", "P", "P-transparent", "1")


@dataclass(frozen=True)
class ImageCase:
    """One image and the bounds it is seen with."""

    seed: int
    mode: str
    width: int
    height: int
    min_pixels: int
    max_pixels: int


@dataclass(frozen=True)
class VideoCase:
    """One clip and the bounds it is seen with."""

    seed: int
    num_frames: int
    width: int
    height: int
    min_pixels: int
    max_pixels: int
    max_video_tokens: int | None = None
    """Of all frames, where the bounds are those of a frame."""


@dataclass(frozen=True)
class SamplingCase:
    """A question to `sample_frames`."""

    total: int
    source_fps: float
    fps: float | None
    num_frames: int | None


def image_cases(count: int = 320, *, factor: int = 28) -> list[ImageCase]:
    """Sizes from 1 pixel to some hundred, all modes, wide and narrow bounds."""
    rng = random.Random(20)
    edges = [(1, 1), (1, 200), (200, 1), (27, 27), (28, 28), (14, 42), (13, 520), (640, 480), (644, 476), (1036, 31)]
    cases = []
    for seed in range(count):
        width, height = edges[seed] if seed < len(edges) else (rng.randint(5, 420), rng.randint(5, 420))
        if max(width, height) > 200 * min(width, height):
            height = width
        max_pixels = rng.choice([16, 100, 256, 16384]) * factor**2
        min_pixels = rng.choice([4, 1, 16]) * factor**2
        cases.append(ImageCase(seed, MODES[seed % len(MODES)], width, height, min_pixels, max_pixels))
    return cases


def video_cases(count: int = 60) -> list[VideoCase]:
    """Short clips, even and odd, some of which the total-pixel cap makes smaller."""
    rng = random.Random(21)
    return [
        VideoCase(
            seed,
            num_frames=rng.choice([1, 2, 3, 4, 5, 6, 8]),
            width=rng.randint(16, 240),
            height=rng.randint(16, 240),
            min_pixels=rng.choice([28 * 28 * 4, 28 * 28 * 20]),
            max_pixels=rng.choice([28 * 28 * 24, 28 * 28 * 64]),
            max_video_tokens=rng.choice([128_000, 100, 60]),
        )
        for seed in range(count)
    ]


def total_cases(count: int = 60) -> list[VideoCase]:
    """Short clips, even and odd, with bounds on all frames together."""
    rng = random.Random(23)
    return [
        VideoCase(
            seed,
            num_frames=rng.choice([2, 3, 4, 5, 6, 7, 9]),
            width=rng.randint(12, 240),
            height=rng.randint(12, 240),
            min_pixels=rng.choice([4096, 32 * 32 * 60]),
            max_pixels=rng.choice([32 * 32 * 60, 32 * 32 * 200, 25_165_824]),
        )
        for seed in range(count)
    ]


def sampling_cases(count: int = 400) -> list[SamplingCase]:
    """Totals from 2 frames to a minute, ordinary and odd rates.

    Not longer: transformers' places are rounded in float32, in an order that depends on the processor's vector width.
    """
    rng = random.Random(22)
    rates = [24.0, 25.0, 30.0, 60.0, 30000 / 1001, 24000 / 1001, 15.0, 12.5, 10.0, 7.77, 120.0, 1.0]
    cases = []
    for number in range(count):
        total = rng.choice([rng.randint(2, 40), rng.randint(2, 400), rng.randint(2, 1500)])
        if number % 3 == 0:
            cases.append(SamplingCase(total, rng.choice(rates), None, rng.randint(2, min(total, 800))))
        else:
            fps = rng.choice([2.0, 2.0, 1.0, 0.5, 4.0, 3.7, 30.0, 0.01])
            cases.append(SamplingCase(total, rng.choice(rates), fps, None))
    return cases


def make_image(case: ImageCase) -> Image.Image:
    """A picture with smooth parts, edges and noise, in the case's mode."""
    rgb = _pixels(case.seed, case.height, case.width)
    image = Image.fromarray(rgb)
    if case.mode in ("RGBA", "LA"):
        alpha = np.random.default_rng(case.seed + 7).integers(0, 256, (case.height, case.width), dtype=np.uint8)
        image.putalpha(Image.fromarray(alpha))
        return image if case.mode == "RGBA" else image.convert("LA")
    if case.mode == "P-transparent":
        image = image.quantize(16, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        image.info["transparency"] = 3
        return image
    if case.mode == "P":
        return image.quantize(64, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    return image.convert(case.mode) if case.mode != "RGB" else image


def encode(image: Image.Image) -> bytes:
    """PNG bytes: every mode above survives it unchanged."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def make_video(case: VideoCase) -> npt.NDArray[np.uint8]:
    """Frames [T, H, W, 3] of a picture that moves and fades."""
    still = _pixels(case.seed, case.height, case.width).astype(np.int32)
    frames = [np.roll(still, 3 * number, axis=1) * (20 - number) // 20 for number in range(case.num_frames)]
    return np.stack(frames).astype(np.uint8)


def _pixels(seed: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    # Integers throughout: floating-point functions differ between machines in their last digit.
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    planes = []
    for _ in range(3):
        slope_y, slope_x, period = (int(value) for value in rng.integers(1, 9, 3))
        smooth = rows * slope_y + columns * slope_x
        stripes = 90 * ((rows // (3 * period) + columns // (2 * period)) % 2)
        planes.append((smooth + stripes + rng.integers(0, 25, (height, width))) % 256)
    return np.stack(planes, axis=-1).astype(np.uint8)


def key(case: Any) -> str:
    """The case as text, so that a golden value names its question."""
    return ",".join(f"{name}={value}" for name, value in asdict(case).items() if name != "max_video_tokens" or value)
