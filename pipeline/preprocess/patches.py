"""RGB uint8 frames to Qwen2-VL patches: smart_resize, resize, patchify, and the exact map to pixel values.

Knows arrays and integers; not files, codecs, prompts or engines. Values stay uint8 all the way to the model's
device: transformers normalises each pixel by a function of (channel, byte) alone, so 3 x 256 numbers
(`pixel_table`) hold the whole of it, and a look-up on the device is bit-equal in any dtype.

Shapes: H, W resized height and width in pixels; gh, gw = H / 14, W / 14; t temporal steps; N = t * gh * gw patches.

The patch order is what everybody gets wrong. Patches that the model merges into one visual token stand next to
each other (merge_size 2), so a row of the grid is not a run of patches:

    raster order          ours (and transformers')
     0  1  2  3            0  1 | 4  5
     4  5  6  7            2  3 | 6  7
     8  9 10 11           ------+------
    12 13 14 15            8  9 |12 13
                          10 11 |14 15
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.errors import AspectRatioError, UnsupportedMedia

Uint8Array: TypeAlias = npt.NDArray[np.uint8]
Resize: TypeAlias = Literal["torch", "pil"]

PATCH_SIZE = 14
TEMPORAL_PATCH_SIZE = 2
MERGE_SIZE = 2
FACTOR = PATCH_SIZE * MERGE_SIZE
MAX_ASPECT_RATIO = 200
# One temporal half of a patch, and a whole one, in bytes: channels x 14 x 14 (x 2).
IMAGE_PATCH_BYTES = 3 * PATCH_SIZE * PATCH_SIZE
VIDEO_PATCH_BYTES = IMAGE_PATCH_BYTES * TEMPORAL_PATCH_SIZE

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

# Frames are resized this many pixels at a time, so that a long video never has a second whole copy in memory.
_RESIZE_CHUNK_PIXELS = 16 * 1024 * 1024


def smart_resize(height: int, width: int, *, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size (height, width) in pixels at which the model sees a medium: multiples of 28, area within bounds.

    Equal to transformers' function of the same name, banker's rounding and all, except that a side which it
    rounds to 0 (possible only where `min_pixels` is 0) is an error here.
    Raises AspectRatioError above 200:1 and UnsupportedMedia for an empty side.
    """
    if height < 1 or width < 1:
        raise UnsupportedMedia(f"the medium is {width}x{height} pixels; both sides must be at least 1")
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise AspectRatioError(
            f"{width}x{height} pixels is {ratio:.0f}:1; the model takes at most {MAX_ASPECT_RATIO}:1: "
            "crop or pad the medium"
        )
    resized_height = round(height / FACTOR) * FACTOR
    resized_width = round(width / FACTOR) * FACTOR
    if resized_height * resized_width > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        resized_height = max(FACTOR, math.floor(height / beta / FACTOR) * FACTOR)
        resized_width = max(FACTOR, math.floor(width / beta / FACTOR) * FACTOR)
    elif resized_height * resized_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        resized_height = math.ceil(height * beta / FACTOR) * FACTOR
        resized_width = math.ceil(width * beta / FACTOR) * FACTOR
    if not resized_height or not resized_width:
        raise UnsupportedMedia(
            f"{width}x{height} pixels rounds to {resized_width}x{resized_height} at min_pixels {min_pixels}; "
            f"set min_pixels to at least {FACTOR * FACTOR}"
        )
    return resized_height, resized_width


def video_max_pixels(*, num_frames: int, min_pixels: int, max_pixels: int, total_pixels: int) -> int:
    """The most pixels a frame may have, so that `num_frames` of them stay within `total_pixels`.

    The rule of transformers' `cap_pixels_per_frame` and of qwen-vl-utils: an even share of the total, but never
    less than 1.05 times `min_pixels`.
    """
    return max(min(max_pixels, total_pixels * TEMPORAL_PATCH_SIZE // num_frames), int(min_pixels * 1.05))


def resize_frames(frames: Uint8Array, height: int, width: int, *, resize: Resize = "torch") -> Uint8Array:
    """Resize RGB frames [T, h, w, 3] to [T, height, width, 3], bicubic with antialiasing, in uint8.

    `torch` is bit-equal to transformers' torchvision processor, `pil` to its PIL processor. Frames that have the
    size already are handed back as they are; read-only arrays are not copied.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    if resize == "pil":
        return _resize_pil(frames, height, width)
    return _resize_torch(frames, height, width)


def _resize_torch(frames: Uint8Array, height: int, width: int) -> Uint8Array:
    num_frames, source_height, source_width, _ = frames.shape
    chunk = max(1, _RESIZE_CHUNK_PIXELS // (source_height * source_width))
    if num_frames <= chunk:
        return _interpolate(frames, height, width)
    resized = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    for start in range(0, num_frames, chunk):
        resized[start : start + chunk] = _interpolate(frames[start : start + chunk], height, width)
    return resized


def _interpolate(frames: Uint8Array, height: int, width: int) -> Uint8Array:
    import torch
    from torch.nn.functional import interpolate

    if not frames.flags.writeable:
        frames = np.asarray(_Writeable(frames))
    # The permuted view has channels-last strides: the same values as a contiguous copy, 1.3 to 4 times faster.
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    resized = interpolate(tensor, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    out: Uint8Array = resized.permute(0, 2, 3, 1).numpy()
    return out


class _Writeable:
    """The same memory as a read-only array, for torch, which warns of such arrays; nobody writes to it here."""

    def __init__(self, array: Uint8Array) -> None:
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
        self._owner = array  # numpy keeps this object, and so the memory


def _resize_pil(frames: Uint8Array, height: int, width: int) -> Uint8Array:
    from PIL import Image

    resized = np.empty((len(frames), height, width, 3), dtype=np.uint8)
    for index, frame in enumerate(frames):
        resized[index] = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    return resized


def patchify_image(image: Uint8Array, out: Uint8Array | None = None) -> Uint8Array:
    """Patches [gh * gw, 588] of one resized image [H, W, 3]; in each patch channel, row, column.

    The two temporal halves of a still image's patch are equal, so only one is kept: 588 bytes a patch.
    """
    height, width, _ = image.shape
    grid_h, grid_w = height // PATCH_SIZE, width // PATCH_SIZE
    blocks = image.reshape(
        grid_h // MERGE_SIZE, MERGE_SIZE, PATCH_SIZE, grid_w // MERGE_SIZE, MERGE_SIZE, PATCH_SIZE, 3
    )  # bh, mh, ph, bw, mw, pw, c
    return _gather(blocks.transpose(0, 3, 1, 4, 6, 2, 5), (grid_h * grid_w, IMAGE_PATCH_BYTES), out)


def patchify_video(frames: Uint8Array, out: Uint8Array | None = None) -> Uint8Array:
    """Patches [t * gh * gw, 1176] of resized frames [T, H, W, 3]; in each patch channel, time, row, column.

    An odd frame at the end is repeated, as transformers does; a single frame makes one temporal step.
    """
    if len(frames) % TEMPORAL_PATCH_SIZE:
        frames = np.concatenate([frames, frames[-1:]])
    num_frames, height, width, _ = frames.shape
    steps, grid_h, grid_w = num_frames // TEMPORAL_PATCH_SIZE, height // PATCH_SIZE, width // PATCH_SIZE
    blocks = frames.reshape(
        steps,
        TEMPORAL_PATCH_SIZE,
        grid_h // MERGE_SIZE,
        MERGE_SIZE,
        PATCH_SIZE,
        grid_w // MERGE_SIZE,
        MERGE_SIZE,
        PATCH_SIZE,
        3,
    )  # t, tp, bh, mh, ph, bw, mw, pw, c
    return _gather(blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7), (steps * grid_h * grid_w, VIDEO_PATCH_BYTES), out)


def _gather(view: Uint8Array, shape: tuple[int, int], out: Uint8Array | None) -> Uint8Array:
    if out is None:
        out = np.empty(shape, dtype=np.uint8)
    assert out.shape == shape, (out.shape, shape)
    out.reshape(view.shape)[...] = view
    return out


def grid_thw(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(t, gh, gw) of `num_frames` frames (1 for an image) at a resized height and width in pixels."""
    return math.ceil(num_frames / TEMPORAL_PATCH_SIZE), height // PATCH_SIZE, width // PATCH_SIZE


def num_visual_tokens(grid: Sequence[int]) -> int:
    """Tokens that a medium takes in the prompt: one for each 2 x 2 patches."""
    t, grid_h, grid_w = grid
    return t * grid_h * grid_w // MERGE_SIZE**2


def pixel_table(
    mean: Sequence[float] = IMAGE_MEAN, std: Sequence[float] = IMAGE_STD, *, resize: Resize = "torch"
) -> npt.NDArray[np.float32]:
    """Normalised value [3, 256] of each (channel, byte), bit-equal to transformers in float32.

    Its two processors round in a different order: the torchvision one folds the 1/255 into mean and std, the PIL
    one multiplies in float64 first. In bfloat16 both give the same values.
    """
    byte = np.arange(256)
    mean32, std32 = np.array(mean, dtype=np.float32)[:, None], np.array(std, dtype=np.float32)[:, None]
    if resize == "pil":
        rescaled = (byte.astype(np.float64) * (1 / 255)).astype(np.float32)
        table: npt.NDArray[np.float32] = (rescaled[None] - mean32) / std32
        return table
    scale = np.float32(255.0)
    table = (byte.astype(np.float32)[None] - mean32 * scale) / (std32 * scale)
    return table
