"""Videos that are cut short or damaged: what is there is shown, and the note says what is missing."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from pipeline.conversation import MediumSettings
from pipeline.errors import SettingError, UnsupportedMedia
from pipeline.preprocess.video import frames
from pipeline.preprocess.video.stated import stated_seconds
from tests.unit.preprocess.conftest import VideoFrames, decode_video, encode_video, picture

CONTAINERS: dict[str, dict[str, Any]] = {
    "mp4": {},
    "matroska": {"container": "matroska"},
    "avi": {"container": "avi", "codec": "mpeg4"},
    "flv": {"container": "flv"},
    "mxf": {"container": "mxf", "codec": "mpeg2video", "rate": 25},
    "ivf": {"container": "ivf", "codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8", "g": "10"}},
    "fragmented": {"container_options": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}},
}


@functools.cache
def clip(name: str) -> bytes:
    moving = np.stack([np.roll(picture(96, 64, seed=1), 3 * n, axis=1) for n in range(60)])
    return encode_video(moving, **{"rate": 10, "options": {"g": "10"}, **CONTAINERS[name]})


def shown(data: bytes, **settings: Any) -> VideoFrames:
    return decode_video(data, MediumSettings(**settings))


def index_first(data: bytes) -> bytes:
    """An MP4 file with its index moved before its frames, as files are written for the web."""
    boxes: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        boxes[data[at + 4 : at + 8]] = data[at : at + size]
        at += size
    moov = bytearray(boxes[b"moov"])
    at = moov.index(b"stco") + 8
    for number in range(int.from_bytes(moov[at : at + 4], "big")):
        place = slice(at + 4 + 4 * number, at + 8 + 4 * number)
        moov[place] = (int.from_bytes(moov[place], "big") + len(moov)).to_bytes(4, "big")
    rest = b"".join(box for name, box in boxes.items() if name not in (b"ftyp", b"moov"))
    return boxes[b"ftyp"] + bytes(moov) + rest


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_file_that_was_cut_short_is_shown_and_noted(name: str) -> None:
    data = index_first(clip("mp4")) if name == "mp4" else clip(name)
    assert shown(data).note is None
    video = shown(data[: len(data) * 2 // 3])
    assert len(video.frames) >= 2
    assert video.note is not None and ("cut short" in video.note or "incomplete" in video.note)
    if name in ("mp4", "avi", "ivf"):
        assert "states 60 frames and holds" in video.note
    elif name == "matroska":
        assert "states 6 s and holds" in video.note


def test_a_segment_past_the_end_of_a_cut_file_names_the_cut() -> None:
    data = clip("matroska")
    with pytest.raises(SettingError, match=r"past the end of the video.*states 6 s and holds"):
        shown(data[: len(data) // 2], start_s=5.0)


def test_sound_that_outlasts_the_picture_is_no_damage() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="flv") as target:
        film: Any = target.add_stream("flv", rate=10)
        film.width, film.height, film.pix_fmt = 96, 64, "yuv420p"
        sound: Any = target.add_stream("aac", rate=16000)
        for _ in range(20):
            target.mux(film.encode(av.VideoFrame.from_ndarray(picture(96, 64), format="rgb24")))
        target.mux(film.encode(None))
        for _ in range(80):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            target.mux(sound.encode(frame))
        target.mux(sound.encode(None))
    whole = file.getvalue()
    with av.open(io.BytesIO(whole)) as container:
        assert (container.duration or 0) > 4.5e6  # of which two seconds have pictures
    assert shown(whole).note is None
    assert "cut short" in (shown(whole[: len(whole) * 9 // 10]).note or "")


@pytest.mark.parametrize("name", ["mp4", "matroska", "fragmented", "avi", "flv", "mxf"])
def test_damage_in_the_middle_is_noted_as_far_as_it_was_decoded(name: str) -> None:
    data = bytearray(clip(name))
    with av.open(io.BytesIO(bytes(data))) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    damaged = next(number for number, packet in enumerate(packets) if number >= 20 and packet.is_keyframe)
    start, size = packets[damaged].pos, packets[damaged].size
    assert start is not None
    data[start + size // 4 : start + size] = np.random.default_rng(0).bytes(size - size // 4)
    rate = CONTAINERS[name].get("rate", 10)
    for settings in ({"fps": rate}, {"fps": rate, "start_s": (damaged + 2) / rate}):
        assert "damaged" in (shown(bytes(data), **settings).note or "")
    assert shown(bytes(data), fps=rate, end_s=(damaged - 6) / rate).note is None


def sound_tag(at_ms: int) -> bytes:
    """A piece of sound as FLV holds it."""
    body = b"\x2f" + bytes(64)
    tag = b"\x08" + len(body).to_bytes(3, "big") + at_ms.to_bytes(3, "big") + bytes(4) + body
    return tag + len(tag).to_bytes(4, "big")


def test_a_stream_that_appears_inside_the_file_is_named_as_damage() -> None:
    video = shown(encode_video(200, container="flv", options={"g": "10"}) + sound_tag(19_900))
    assert len(video.frames) == 40 and "damaged after 200 frames (streams appear inside it)" in (video.note or "")


def test_a_file_without_frames_whose_streams_are_damaged_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Damaged:
        """A container whose first read raises what PyAV raises for streams that it has not seen before."""

        def __init__(self, container: Any) -> None:
            self.streams, self.format = container.streams, container.format

        def demux(self, stream: Any) -> Iterator[Any]:
            yield from ()
            raise IndexError("list index out of range")

    opened = frames.open_container
    monkeypatch.setattr(frames, "open_container", lambda file: Damaged(opened(file)))
    with pytest.raises(UnsupportedMedia, match="damaged: streams appear inside"):
        shown(clip("flv"))


def test_a_stream_states_its_length_itself_or_in_matroskas_tag_or_the_file_does() -> None:
    container: Any = SimpleNamespace(duration=7_500_000)

    def stated(duration: int | None, **metadata: str) -> tuple[float, bool]:
        stream: Any = SimpleNamespace(duration=duration, time_base=Fraction(1, 90), metadata=metadata)
        return stated_seconds(container, stream)

    assert stated(180, DURATION="00:00:09.0") == (2.0, True)
    assert stated(None, DURATION="01:02:03.500000000") == (3723.5, True)
    assert stated(None) == stated(None, DURATION="unknown") == (7.5, False)
    container.duration = None
    assert stated(None) == (0.0, False)
