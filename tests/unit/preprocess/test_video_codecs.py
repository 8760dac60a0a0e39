"""Frames of drawn segments against decoding the whole file, for every codec and container that PyAV can write."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest

from pipeline.conversation import MediumSettings
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.video.frames import OpenVideo
from tests.options import media_options
from tests.unit.preprocess.conftest import encode_video, picture

OPTIONS = media_options()
X265 = "log-level=none:pools=none:frame-threads=1"

CODECS: dict[str, dict[str, Any]] = {
    "av1": {"codec": "libsvtav1", "options": {"preset": "12", "g": "16", "svtav1-params": "lp=1"}},
    "av1 low delay": {
        "codec": "libsvtav1",
        "container": "matroska",
        "options": {"preset": "12", "g": "16", "svtav1-params": "pred-struct=1:lp=1"},
    },
    "av1 open gop": {"codec": "libsvtav1", "options": {"preset": "12", "g": "16", "svtav1-params": "irefresh-type=1"}},
    "av1 ivf": {"codec": "libsvtav1", "container": "ivf", "options": {"preset": "12", "g": "16"}},
    "h264": {"options": {"bf": "3", "g": "12"}},
    "h264 open gop": {"options": {"bf": "3", "g": "12", "x264-params": "open-gop=1"}},
    "h264 intra refresh": {"options": {"g": "12", "x264-params": "intra-refresh=1:bframes=0"}},
    "h264 ten bit": {"pix_fmt": "yuv420p10le", "options": {"bf": "3", "g": "12"}},
    "h264 interlaced": {"container": "mpegts", "options": {"bf": "2", "g": "12", "flags": "+ildct+ilme"}},
    "h264 avi": {"container": "avi", "options": {"bf": "3", "g": "12"}},
    "h264 avi without b-frames": {"container": "avi", "options": {"bf": "0", "g": "12"}},
    "h264 asf": {"container": "asf", "options": {"bf": "3", "g": "12"}},
    "h264 mxf": {"container": "mxf", "rate": 25, "options": {"bf": "3", "g": "12"}},
    "h264 flv": {"container": "flv", "options": {"bf": "3", "g": "12"}},
    "h264 mpeg": {"container": "mpeg", "rate": 25, "options": {"bf": "3", "g": "12"}},
    "hevc": {"codec": "libx265", "options": {"x265-params": f"keyint=12:bframes=3:{X265}"}},
    "hevc open gop": {"codec": "libx265", "options": {"x265-params": f"keyint=12:bframes=4:open-gop=1:{X265}"}},
    "hevc mkv": {"codec": "libx265", "container": "matroska", "options": {"x265-params": f"keyint=9:{X265}"}},
    "vp8": {"codec": "libvpx", "container": "webm", "options": {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "9"}},
    "vp9": {"codec": "libvpx-vp9", "container": "webm", "options": {"g": "12", "lag-in-frames": "9", "cpu-used": "8"}},
    "vp9 ivf": {"codec": "libvpx-vp9", "container": "ivf", "options": {"g": "12", "lag-in-frames": "9"}},
    "mpeg4": {"codec": "mpeg4", "container": "avi", "options": {"bf": "2", "g": "12"}},
    "mpeg4 mp4": {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}},
    "mpeg2": {"codec": "mpeg2video", "container": "mpegts", "rate": 25, "options": {"bf": "2", "g": "12"}},
    "mpeg2 mxf": {"codec": "mpeg2video", "container": "mxf", "rate": 25, "options": {"bf": "2", "g": "12"}},
    "mpeg2 avi": {"codec": "mpeg2video", "container": "avi", "rate": 25, "options": {"bf": "2", "g": "12"}},
    "mpeg1": {"codec": "mpeg1video", "container": "mpeg", "rate": 25, "options": {"bf": "2", "g": "12"}},
    "mjpeg": {"codec": "mjpeg", "container": "mov", "pix_fmt": "yuvj420p"},
    "prores": {"codec": "prores_ks", "container": "mov", "pix_fmt": "yuv422p10le"},
    "dnxhd": {
        "codec": "dnxhd",
        "container": "mov",
        "pix_fmt": "yuv422p",
        "size": (256, 128),
        "options": {"profile": "dnxhr_sq"},
    },
    "ffv1": {"codec": "ffv1", "container": "matroska", "options": {"g": "12"}},
    "huffyuv": {"codec": "huffyuv", "container": "avi", "pix_fmt": "yuv422p"},
    "utvideo": {"codec": "utvideo", "container": "avi"},
    "qtrle": {"codec": "qtrle", "container": "mov", "pix_fmt": "rgb24", "options": {"g": "12"}},
    "png": {"codec": "png", "container": "mov", "pix_fmt": "rgb24"},
    "raw": {"codec": "rawvideo", "container": "avi"},
    "wmv2": {"codec": "wmv2", "container": "asf", "options": {"g": "12"}},
    "msmpeg4": {"codec": "msmpeg4", "container": "avi", "options": {"g": "12"}},
    "flv": {"codec": "flv", "container": "flv", "options": {"g": "12"}},
    "h263": {"codec": "h263p", "container": "avi", "size": (176, 144), "options": {"g": "12"}},
    "snow": {"codec": "snow", "container": "avi", "options": {"g": "12"}},
    "svq1": {"codec": "svq1", "container": "mov", "pix_fmt": "yuv410p", "options": {"g": "12"}},
    "cinepak": {"codec": "cinepak", "container": "avi", "pix_fmt": "rgb24", "options": {"g": "12"}},
    "gif": {"codec": "gif", "container": "gif", "pix_fmt": "rgb8"},
    "apng": {"codec": "apng", "container": "apng", "pix_fmt": "rgb24"},
}


def moving(num_frames: int, size: tuple[int, int] = (96, 64)) -> npt.NDArray[np.uint8]:
    whole = picture(*size, seed=1)
    return np.stack([np.roll(whole, (n, 2 * n), axis=(0, 1)) for n in range(num_frames)])


def assert_frames_are_those_of_a_full_decode(
    name: str, num_frames: int, segments: list[dict[str, float]], options: MediaOptions = OPTIONS
) -> None:
    asked = {"rate": 10, **CODECS[name]}
    if asked.get("codec", "libx264") not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg can't write {asked['codec']}")
    data = encode_video(moving(num_frames, asked.get("size", (96, 64))), **asked)
    with av.open(io.BytesIO(data)) as container:
        whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for segment in segments:
        video = OpenVideo(data, MediumSettings(**segment), options)  # type: ignore[arg-type]
        frames = [pixels for _, pixels in video.frames()]
        assert len(frames) == video.num_frames, (segment, video.note)
        wrong = [
            index
            for index, pixels in zip(video.frame_indices, frames, strict=True)
            if not np.array_equal(pixels, whole[index])
        ]
        assert not wrong and (video.note or "").startswith("keyframes") == (options.video_frames == "keyframes"), (
            f"{segment}: frames {wrong} of {video.frame_indices} are wrong; note {video.note}"
        )


@pytest.mark.parametrize("name", ["av1", "h264 avi"])
def test_a_segment_shows_the_frames_of_a_full_decode(name: str) -> None:
    assert_frames_are_those_of_a_full_decode(name, 40, [{"start_s": 1.3, "fps": 5.0}, {"start_s": 2.1, "end_s": 3.0}])


def test_keyframes_of_a_file_without_presentation_times_are_shown() -> None:
    options = media_options(video_frames="keyframes")
    assert_frames_are_those_of_a_full_decode("h264 avi", 40, [{}, {"start_s": 1.0, "fps": 4.0}], options)


@pytest.mark.slow
@pytest.mark.parametrize("name", CODECS)
def test_drawn_segments_show_the_frames_of_a_full_decode(name: str) -> None:
    rng = np.random.default_rng(len(name))
    num_frames = 60
    seconds = num_frames / CODECS[name].get("rate", 10)
    segments: list[dict[str, float]] = [{}, {"num_frames": 20}]
    for _ in range(20):
        start, end = np.sort(rng.uniform(0, seconds - 0.1, 2)).round(2).tolist()
        segments.append({"start_s": start, "end_s": end + 0.1, "fps": float(rng.choice([1, 3, 5, 10]))})
    assert_frames_are_those_of_a_full_decode(name, num_frames, segments)
