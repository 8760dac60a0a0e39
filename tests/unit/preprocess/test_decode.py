"""One medium from its bytes to patches: sizes, settings, budgets and what the receipt says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.conversation import MediumSettings
from pipeline.errors import SettingError, TruncatedMedia
from pipeline.preprocess.decode import OpenMedium
from pipeline.preprocess.fetch.ranged import RangedFile
from pipeline.preprocess.fetch.source import Fetcher, RangedSource
from pipeline.preprocess.frame_list import pack_frames
from pipeline.preprocess.header import read_listed_header
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.patches import patchify_video, resize_frames
from pipeline.preprocess.receipt import SeenMedium, source_name
from pipeline.preprocess.size import fit_row, smart_resize
from tests.decoding import new_buffer, see_medium
from tests.options import fetch_options, media_options
from tests.unit.preprocess.conftest import decode_video, encode_image, encode_video, picture


def see(kind: Any, data: bytes, options: MediaOptions | None = None, **settings: Any) -> SeenMedium:
    return see_medium(kind, data, MediumSettings(**settings), options or media_options(), source="here")


def photo(width: int, height: int) -> bytes:
    return encode_image(Image.fromarray(picture(width, height)))


def test_the_receipt_of_an_image_says_what_was_seen() -> None:
    seen = see("image", photo(640, 480))
    receipt = seen.receipt
    assert (receipt.kind, receipt.source) == ("image", "here")
    assert (receipt.source_width, receipt.source_height) == (640, 480)
    assert (receipt.resized_width, receipt.resized_height) == (644, 476)
    assert receipt.grid_thw == (1, 34, 46) and seen.patches.shape == (34 * 46, 588)
    assert receipt.timestamps is None and receipt.note is None


def test_the_receipt_of_a_turned_photo_has_its_upright_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    receipt = see("image", encode_image(Image.fromarray(picture(640, 480)), "JPEG", exif=exif)).receipt
    assert (receipt.source_width, receipt.source_height) == (480, 640)
    assert (receipt.resized_width, receipt.resized_height) == (476, 644) and receipt.grid_thw == (1, 46, 34)


def test_a_videos_patches_are_those_of_its_frames_resized_together() -> None:
    data = encode_video(np.stack([np.roll(picture(96, 64), 3 * n, axis=1) for n in range(21)]), rate=10)
    for options in (media_options(), media_options(resize="pil")):
        seen = see("video", data, options, num_frames=7)
        frames = decode_video(data, MediumSettings(num_frames=7), options)
        height, width = smart_resize(
            64, 96, factor=28, min_pixels=options.video_min_pixels, max_pixels=options.video_max_pixels
        )
        expected = patchify_video(resize_frames(frames.frames, height, width, resize=options.resize), patch_size=14)
        assert np.array_equal(seen.patches, expected)
        assert seen.receipt.timestamps == frames.timestamps and seen.receipt.grid_thw[0] == 4


def test_a_one_frame_video_is_a_video_of_one_step() -> None:
    seen = see("video", encode_video(1))
    assert seen.receipt.grid_thw[0] == 1 and seen.receipt.timestamps == (0.0,)
    halves = seen.patches.reshape(-1, 3, 2, 196)
    assert np.array_equal(halves[:, :, 0], halves[:, :, 1])


def test_a_rows_settings_win_over_the_jobs() -> None:
    tokens = {
        name: see("image", photo(560, 560), **settings).patches.shape[0] // 4
        for name, settings in {
            "as it is": {},
            "less": {"max_pixels": 28 * 28 * 100},
            "more": {"min_pixels": 28 * 28 * 900},
            "tiny": {"max_pixels": 784},
        }.items()
    }
    assert tokens == {"as it is": 400, "less": 100, "more": 900, "tiny": 1}
    video = see("video", encode_video(20, size=(560, 560)), max_pixels=28 * 28 * 16)
    assert video.patches.shape[0] // 4 == 16 * video.receipt.grid_thw[0]


def test_the_size_that_a_part_sets_wins_over_all_bounds() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode_image(Image.fromarray(picture(640, 480)), "JPEG", exif=exif)
    for kind, data in (("image", photo(640, 480)), ("image", turned), ("video", encode_video(8, size=(640, 480)))):
        receipt = see(kind, data, resized_height=430, resized_width=60).receipt  # rounded to multiples of 28
        assert (receipt.resized_width, receipt.resized_height) == (56, 420)
    seen = see("video", encode_video(20), media_options(max_visual_tokens=20), resized_height=560, resized_width=560)
    assert np.prod(seen.receipt.grid_thw) / 4 <= 20 and "shrunk" in (seen.receipt.note or "")


def test_a_list_of_frames_is_a_video_of_these_frames(tmp_path: Path) -> None:
    pictures = [picture(96, 64, seed) for seed in range(5)]
    for number, pixels in enumerate(pictures[:-1]):
        (tmp_path / f"{number}.png").write_bytes(encode_image(Image.fromarray(pixels)))
    source = ("0.png", "1.png", "2.png", str(tmp_path / "3.png"), encode_image(Image.fromarray(pictures[4])))
    data = Fetcher(fetch_options(str(tmp_path))).fetch(source)
    seen = see("video", data, fps=4.0)
    receipt = seen.receipt
    assert receipt.timestamps == (0.0, 0.25, 0.5, 0.75, 1.0) and receipt.grid_thw[0] == 3 and receipt.note is None
    expected = patchify_video(
        resize_frames(np.stack(pictures), receipt.resized_height, receipt.resized_width), patch_size=14
    )
    assert np.array_equal(seen.patches, expected)
    assert source_name(source) == "5 frames: 0.png"
    first = RangedFile(RangedSource(len(source[4]), lambda start, stop: bytes(source[4][start:stop])), seconds=9.0)
    header = read_listed_header(first, 5, MediumSettings(), media_options())
    assert header.size.grid_thw == receipt.grid_thw and header.size.resized == (
        receipt.resized_height,
        receipt.resized_width,
    )
    with pytest.raises(SettingError, match="num_frames can't be applied to a video given as a list"):
        see("video", data, num_frames=4)
    other = pack_frames([encode_image(Image.fromarray(picture(*size))) for size in ((96, 64), (48, 48))])
    assert see("video", other).receipt.note == "some frames are not 96x64 pixels and were scaled to it"
    with pytest.raises(TruncatedMedia):
        see("video", pack_frames([photo(64, 64)[:-30]]))


def test_a_videos_own_cap_and_numbers_of_frames_are_applied() -> None:
    data = encode_video(40, size=(560, 560))
    steps, grid_h, grid_w = see("video", data, fps=10.0, total_pixels=4_000_000).receipt.grid_thw
    assert (steps, grid_h, grid_w) == (20, 30, 30)
    assert len(see("video", data, fps=10.0, max_frames=7).receipt.timestamps or ()) == 6
    assert len(see("video", data, fps=0.1, min_frames=10).receipt.timestamps or ()) == 10
    of_job = media_options(num_frames=16)
    assert len(see("video", data, of_job, max_frames=6).receipt.timestamps or ()) == 6


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("image", {"max_pixels": 783}, "max_pixels is 783; expected at least 784"),
        ("video", {"min_pixels": 0}, "min_pixels is 0; expected at least 784"),
    ],
)
def test_settings_that_cannot_be_applied_are_errors(kind: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        see(kind, photo(64, 64) if kind == "image" else encode_video(4), **settings)


def test_a_long_video_is_shrunk_by_the_total_pixel_cap() -> None:
    data = encode_video(40, size=(560, 560))
    free, capped = (
        see("video", data, media_options(video_total_pixels=total), fps=10.0) for total in (10**9, 4_000_000)
    )
    assert free.receipt.grid_thw == (20, 40, 40)
    steps, grid_h, grid_w = capped.receipt.grid_thw
    assert steps == 20 and grid_h == grid_w == 30 and grid_h * grid_w * 196 <= 4_000_000 * 2 / 40 * 1.05 * 1.05


@pytest.mark.parametrize(
    "settings", [MediumSettings(min_pixels=2**62), MediumSettings(resized_height=2**40, resized_width=2**40)]
)
def test_a_size_that_no_model_reads_is_refused_before_it_takes_memory(settings: MediumSettings) -> None:
    options = media_options(max_pixels=2**90)
    medium = OpenMedium("image", photo(560, 560), settings, options)
    with pytest.raises(
        SettingError, match=r"^the row's media would take [\d,]+ visual tokens, more than any model reads; lower"
    ):
        fit_row([medium], None)
    fit_row([medium], 300)
    assert medium.size.num_visual_tokens <= 300


def test_a_budget_shrinks_media_by_the_same_share_and_leaves_fitting_rows_alone() -> None:
    def row() -> list[OpenMedium]:
        return [
            OpenMedium("image", photo(560, 560), MediumSettings(), media_options()),
            OpenMedium("image", photo(1120, 560), MediumSettings(), media_options()),
        ]

    media = row()
    assert [medium.size.num_visual_tokens for medium in media] == [400, 800]
    fit_row(media, 1200)
    assert [medium.see(source="", allocate=new_buffer).receipt.note for medium in media] == [None, None]
    media = row()
    fit_row(media, 300)
    first, second = (medium.size.num_visual_tokens for medium in media)
    assert first + second <= 300 and 1.5 < second / first < 2.7
    note = media[0].see(source="", allocate=new_buffer).receipt.note
    assert note == f"shrunk from 400 to {first} visual tokens: the row's media wanted 1200, max_visual_tokens is 300"


def test_patches_are_written_where_the_caller_says() -> None:
    buffers: list[Any] = []

    def allocate(num_bytes: int) -> Any:
        buffers.append(np.zeros(num_bytes, dtype=np.uint8))
        return buffers[-1]

    for kind, data in (("image", photo(64, 64)), ("video", encode_video(6))):
        seen = OpenMedium(kind, data, MediumSettings(), media_options()).see(source="", allocate=allocate)
        assert np.shares_memory(seen.patches, buffers[-1]) and seen.patches.nbytes == buffers[-1].nbytes
    assert len(buffers) == 2
