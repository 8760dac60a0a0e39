"""Which frames of a video are shown, that they are the right pixels, and what becomes of broken files."""

from __future__ import annotations

import io
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipeline.conversation import MediumSettings
from pipeline.errors import (
    AspectRatioError,
    DecompressionBomb,
    MediaError,
    MediaTimeout,
    NoVideoStream,
    SettingError,
    TruncatedMedia,
    UnsupportedMedia,
)
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.video.frames import OpenVideo
from pipeline.preprocess.video.timing import evenly_spaced
from tests.options import media_options
from tests.unit.preprocess.conftest import VideoFrames, decode_video, encode_image, encode_video, level, picture

OPTIONS = media_options()
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}


def shown(data: bytes, options: MediaOptions = OPTIONS, **settings: Any) -> VideoFrames:
    return decode_video(data, MediumSettings(**settings), options)


def levels(video: VideoFrames) -> list[int]:
    return [level(frame) for frame in video.frames]


def every_frame(data: bytes) -> list[npt.NDArray[np.uint8]]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_constant_rate_file_shows_the_frames_that_transformers_samples() -> None:
    video = shown(encode_video(43, rate=10), fps=2.0)
    # 43 frames at 10 a second, 2 wanted a second: 8.6, so 8 of them, 43 / 8 frames apart.
    assert levels(video) == [int(number * 43 / 8) for number in range(8)]
    assert video.timestamps == tuple(int(number * 43 / 8) / 10 for number in range(8))
    assert video.note is None


@pytest.mark.parametrize("clip", ["bikes.mp4", "carphone_pristine.mp4"])
@pytest.mark.parametrize("settings", [{}, {"fps": 5.0}, {"num_frames": 7}, {"num_frames": 30}])
def test_real_clips_give_the_pixels_of_a_full_decode(clips: Path, clip: str, settings: dict[str, Any]) -> None:
    data = (clips / clip).read_bytes()
    whole = every_frame(data)
    opened = OpenVideo(data, MediumSettings(**settings), OPTIONS)
    frames = [pixels for _, pixels in opened.frames()]
    assert len(frames) == len(opened.frame_indices) == opened.num_frames
    for index, pixels in zip(opened.frame_indices, frames, strict=True):
        assert np.array_equal(pixels, whole[index]), f"frame {index} of {clip}"


@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [
        ("libx264", "mp4", {"bf": "3", "g": "12"}),
        ("libx264", "mp4", {"bf": "3", "g": "12", "flags": "-cgop", "x264-params": "open-gop=1"}),
        ("libx264", "matroska", {"bf": "2", "g": "7"}),
        ("libx264", "mpegts", {"bf": "2", "g": "10"}),
        ("libx265", "mp4", {"x265-params": "keyint=10:bframes=3:log-level=none"}),
        ("libvpx", "webm", {"g": "10", "auto-alt-ref": "1", "lag-in-frames": "10", "deadline": "realtime"}),
        ("libvpx-vp9", "webm", {"g": "10", "lag-in-frames": "10", "cpu-used": "8", "deadline": "realtime"}),
        ("mpeg4", "avi", {"bf": "2", "g": "12"}),
        ("mpeg2video", "mpeg", {"bf": "2", "g": "12"}),
        ("mjpeg", "avi", {}),
        ("flv", "flv", {"g": "10"}),
        ("wmv2", "asf", {"g": "10"}),
        ("gif", "gif", {}),
    ],
)
def test_every_container_and_codec_gives_the_pixels_of_a_full_decode(
    codec: str, container: str, options: dict[str, str]
) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg can't write {codec}")
    moving = np.stack([np.roll(picture(96, 64, seed=1), 2 * number, axis=1) for number in range(41)])
    pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(codec, "yuv420p")
    rate = 25 if codec == "mpeg2video" else 10
    data = encode_video(moving, codec=codec, container=container, options=options, pix_fmt=pix_fmt, rate=rate)
    whole = every_frame(data)
    for settings in (MediumSettings(num_frames=6), MediumSettings(num_frames=20), MediumSettings(fps=1.0)):
        opened = OpenVideo(data, settings, OPTIONS)
        frames = [pixels for _, pixels in opened.frames()]
        assert len(frames) == opened.num_frames, opened.note
        assert opened.note is None
        for index, pixels in zip(opened.frame_indices, frames, strict=True):
            assert np.array_equal(pixels, whole[index]), f"frame {index} of {len(whole)}"


@pytest.mark.slow
def test_packets_that_lead_to_no_wanted_frame_are_not_decoded() -> None:
    moving = np.stack([np.roll(picture(640, 480, seed=2), 5 * number, axis=1) for number in range(120)])
    data = encode_video(moving, rate=30, options={"g": "10", "preset": "ultrafast"})

    def seconds(settings: MediumSettings) -> float:
        begun = time.process_time()
        decode_video(data, settings, OPTIONS)
        return time.process_time() - begun

    seconds(MediumSettings(num_frames=4))
    few = min(seconds(MediumSettings(num_frames=4)) for _ in range(3))
    begun = time.process_time()
    every_frame(data)
    assert few < 0.5 * (time.process_time() - begun)


def test_a_variable_rate_file_is_sampled_by_time_not_by_number() -> None:
    # Ten frames in the first second, then one frame that stands for nine seconds, then the last.
    times = [*range(0, 1000, 100), 1000, 10_000]
    data = encode_video(
        12, times=times, time_base=Fraction(1, 1000), container="matroska", rate=10, options={"bf": "0", "g": "3"}
    )
    video = shown(data, num_frames=10)
    # One frame about each second: the long one is on screen for nearly all of them.
    assert levels(video) == [0, *[10] * 9]
    assert video.timestamps == (0.0, *[1.0] * 9)


def test_timestamps_count_from_the_first_frame_wherever_the_file_begins() -> None:
    late = encode_video(
        20, times=list(range(5000, 7000, 100)), time_base=Fraction(1, 1000), container="matroska", rate=10
    )
    video = shown(late, num_frames=4)
    assert levels(video) == [0, 5, 10, 15] and video.timestamps == (0.0, 0.5, 1.0, 1.5)


def test_rounding_never_samples_past_the_end() -> None:
    for total in range(2, 120):
        for count in range(2, total + 1, 2):
            indices = evenly_spaced(total, count)
            assert len(indices) == count and indices[0] == 0 and indices[-1] < total
    assert len(shown(encode_video(75)).timestamps) == 14


def test_a_segment_is_sampled_like_a_video_of_its_own() -> None:
    video = shown(encode_video(40, rate=10), start_s=1.0, end_s=3.0, fps=2.0)
    assert levels(video) == [10, 15, 20, 25]
    assert video.timestamps == (1.0, 1.5, 2.0, 2.5)
    assert levels(shown(encode_video(40, rate=10), start_s=3.0, fps=2.0)) == [30, 32, 35, 37]


def test_qwens_rule_shows_the_first_and_the_last_frame_and_is_noted() -> None:
    options = media_options(frame_sampling="qwen")
    video = shown(encode_video(43, rate=10), options, fps=2.0)
    # 43 frames at 10 a second, 2 wanted a second: 8 of them, 6 frames apart.
    assert levels(video) == [0, 6, 12, 18, 24, 30, 36, 42]
    assert video.note == "frames sampled by the rule of qwen-vl-utils"
    # A segment has the frames at both its ends: 10 to 30.
    assert levels(shown(encode_video(43, rate=10), options, start_s=1.0, end_s=3.0, num_frames=6)) == [
        10, 14, 18, 22, 26, 30,
    ]  # fmt: skip
    assert len(shown(encode_video(43), media_options(frame_sampling="qwen", min_frames=5), fps=0.1).frames) == 6
    assert len(shown(encode_video(43), media_options(min_frames=5), fps=0.1).frames) == 4
    assert len(shown(encode_video(1), options).frames) == 1


def test_qwens_rule_counts_frames_whatever_their_times() -> None:
    times = [*range(0, 1000, 100), 1000, 10_000]
    data = encode_video(
        12, times=times, time_base=Fraction(1, 1000), container="matroska", rate=10, options={"bf": "0", "g": "3"}
    )
    assert levels(shown(data, media_options(frame_sampling="qwen"), num_frames=4)) == [0, 4, 7, 11]


def test_a_segment_between_two_frames_shows_the_one_on_screen() -> None:
    data = encode_video(
        4, times=[0, 3000, 6000, 9000], time_base=Fraction(1, 1000), container="matroska", rate=1, options={"bf": "0"}
    )
    video = shown(data, start_s=4.0, end_s=5.0)
    assert levels(video) == [1]


def test_a_segment_past_the_end_is_cut_and_says_so() -> None:
    video = shown(encode_video(20, rate=10), start_s=1.0, end_s=30.0, fps=2.0)
    assert max(levels(video)) < 20 and video.note == "end_s 30 is past the end of the video, 2 s"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_frames": 22}, "20 frames"),
        ({"start_s": 2.0}, "past the end of the video, which lasts 2 s"),
    ],
)
def test_settings_that_cannot_be_applied_are_errors(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        shown(encode_video(20, rate=10), **settings)


def test_the_jobs_num_frames_gives_way_to_a_short_video_and_says_so() -> None:
    video = shown(encode_video(7), media_options(num_frames=16))
    assert levels(video) == [0, 1, 2, 3, 4, 5] or len(video.frames) == 6
    assert video.note == "all 7 frames shown: num_frames is 16"


@pytest.mark.parametrize(("total", "expected"), [(1, 1), (2, 2), (3, 2), (5, 4), (7, 4)])
def test_very_short_videos_are_shown_whole_pairs(total: int, expected: int) -> None:
    assert len(shown(encode_video(total)).frames) == expected


def test_max_frames_bounds_a_dense_sampling() -> None:
    assert len(shown(encode_video(50), media_options(max_frames=9), fps=10.0).frames) == 8


def test_keyframe_mode_shows_the_nearest_keyframes_and_says_so() -> None:
    data = encode_video(40, options={"g": "10", "x264-params": "keyint=10:scenecut=0"})
    video = shown(data, media_options(video_frames="keyframes"), fps=2.0)
    assert levels(video) == [0, 10, 20, 30]
    assert video.note == "keyframes: 4 shown in place of 8 sampled frames"


def test_a_damaged_middle_shows_the_frame_before_and_says_so() -> None:
    data = bytearray(encode_video(30, options={"g": "6", "bf": "0", "x264-params": "scenecut=0"}))
    with av.open(io.BytesIO(bytes(data))) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    start, size = packets[15]
    data[start : start + size] = bytes(size)
    video = shown(bytes(data), num_frames=30)
    assert len(video.frames) >= 24 and video.note is not None


def test_a_file_cut_short_shows_what_is_there() -> None:
    data = encode_video(60, container="matroska", options={"g": "10"})
    video = shown(data[: len(data) * 2 // 3], fps=2.0)
    assert 2 <= len(video.frames) <= 10
    assert levels(video) == sorted(levels(video))


def test_an_mp4_cut_before_its_index_is_said_to_end_too_early() -> None:
    data = encode_video(30)
    with pytest.raises(TruncatedMedia, match="moov"):
        shown(data[: len(data) // 2])


def test_an_mp4_cut_after_its_index_shows_its_beginning_and_says_so() -> None:
    moving = np.stack([np.roll(picture(96, 64), 3 * number, axis=1) for number in range(40)])
    data = encode_video(moving, options={"g": "5", "bf": "0"}, container_options=FRAGMENTED)
    video = shown(data[: len(data) // 2], fps=5.0)
    assert 2 <= len(video.frames) < 20


def test_audio_alone_is_no_video() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.int16), format="s16", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(NoVideoStream, match="1 audio"):
        shown(file.getvalue())


def test_an_attached_picture_is_not_taken_for_the_video() -> None:
    data = encode_video(20, container="matroska")
    cover = encode_image(av.VideoFrame.from_ndarray(picture(32, 32), format="rgb24").to_image(), "JPEG")
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format="mp4") as target:
        picture_stream: Any = target.add_stream("mjpeg", rate=1)
        picture_stream.width = picture_stream.height = 32
        picture_stream.pix_fmt = "yuvj420p"
        picture_stream.disposition = av.stream.Disposition.attached_pic
        film: Any = target.add_stream_from_template(source.streams.video[0])
        packet = av.Packet(cover)
        packet.stream, packet.pts, packet.dts, packet.time_base = picture_stream, 0, 0, Fraction(1, 1)
        target.mux(packet)
        for each in source.demux(video=0):
            if each.size:
                each.stream = film
                target.mux(each)
    video = shown(file.getvalue(), num_frames=4)
    assert video.frames.shape == (4, 64, 96, 3)


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///SECRET\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile SECRET\n",
        b"ffconcat version 1.0\nfile 'http://127.0.0.1:9/SECRET'\n",
        b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        b'<Representation id="1" bandwidth="1"><BaseURL>SECRET</BaseURL></Representation></AdaptationSet></Period>'
        b"</MPD>",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
    ids=["hls", "concat", "concat-http", "dash", "sdp"],
)
def test_a_playlist_named_mp4_opens_no_other_file_or_host(data: bytes, tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(encode_video(20))
    hostile = data.replace(b"/SECRET", str(secret).encode()).replace(b"SECRET", str(secret).encode())
    with pytest.raises(UnsupportedMedia):
        shown(hostile)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_an_image_among_the_videos_is_pointed_to_the_column_of_images(kind: str) -> None:
    data = encode_image(Image.new("RGB", (40, 40)), kind)
    with pytest.raises(UnsupportedMedia) as caught:
        shown(data)
    assert str(caught.value) == (
        f"found an image ({kind}, {len(data):,} bytes), expected a video: put it into the column of images, or, in a "
        "folder, give it the extension of its format"
    )


def test_what_is_no_video_is_named_with_ffmpeg_s_reason() -> None:
    with pytest.raises(
        UnsupportedMedia,
        match=r'a text file beginning "this is " \(37 bytes\) \(Invalid data found [a-z ]+\); expected',
    ):
        shown(b"this is no video\n\nit is quite another")


def test_an_mp4_that_refers_to_another_file_does_not_open_it(tmp_path: Path) -> None:
    # A track whose data lie elsewhere: the dref box of a QuickTime reference film.
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(encode_video(20))
    data = secret.read_bytes().replace(b"url \x00\x00\x00\x01", b"url \x00\x00\x00\x00")
    try:
        video = shown(data)
    except MediaError:
        return
    assert len(video.frames) > 0  # read from its own bytes


def test_pictures_and_other_files_are_no_videos() -> None:
    for data in (b"", b"<html></html>", encode_image(av.VideoFrame(16, 16, "rgb24").to_image()), b"\x00" * 4096):
        with pytest.raises(MediaError):
            shown(data)


def test_too_many_frames_too_long_and_too_large_are_bombs_with_their_numbers() -> None:
    data = encode_video(40, rate=10)
    with pytest.raises(DecompressionBomb, match=r"more than 30 frames \(media\.max_video_frames\)"):
        shown(data, media_options(max_video_frames=30))
    with pytest.raises(DecompressionBomb, match=r"longer than 2 s \(max_video_s\)"):
        shown(data, media_options(max_video_s=2.0))
    assert len(shown(data, media_options(max_video_s=2.0), end_s=1.0).frames) > 0
    with pytest.raises(DecompressionBomb, match=r"96x64 = 6,144 pixels; at most 5,000"):
        shown(data, media_options(max_image_pixels=5000))


def test_a_film_that_would_take_too_long_names_the_settings_before_the_time_is_spent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipeline.preprocess.video import frames as module

    class Clock:
        """Each look at it is a tenth of a second later."""

        now = 0.0

        def process_time(self) -> float:
            self.now += 0.1
            return self.now

    data = encode_video(200, rate=10, options={"g": "20"})
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    with pytest.raises(MediaTimeout, match=r"num_frames or fps, set media\.video_frames: keyframes") as caught:
        shown(data, media_options(timeout_s=1.0), fps=4.0)
    assert "the 80 frames to show need" in str(caught.value) and clock.now < 0.5
    assert len(shown(data, media_options(timeout_s=10.0), fps=4.0).frames) == 80
    assert len(shown(data, media_options(timeout_s=1.0, video_frames="keyframes"), fps=4.0).frames) == 10


def test_a_ratio_above_200_is_an_error() -> None:
    tall = np.zeros((4, 1608, 8, 3), dtype=np.uint8)
    with pytest.raises(AspectRatioError, match="201:1"):
        shown(encode_video(tall))


def test_a_file_whose_frames_change_size_is_scaled_to_the_first() -> None:
    small, large = encode_video(10, size=(64, 48), container="mpegts"), encode_video(10, container="mpegts")
    try:
        video = shown(small + large, fps=2.0)
    except MediaError:
        return
    assert video.frames.shape[1:] == (48, 64, 3)
