"""A decoder process that hangs, crashes or outgrows its memory costs one typed error; the other media are decoded."""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from pipeline.checkpoint.families.qwen3_vl import QWEN3_VL
from pipeline.conversation import MediumSettings
from pipeline.errors import (
    DecoderCrash,
    MediaMemoryError,
    MediaTimeout,
    MediaTooLarge,
    RowError,
    SettingError,
    TruncatedMedia,
    UnsupportedMedia,
)
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.receipt import SeenMedium
from pipeline.preprocess.sandbox.client import MediaWorker, MediumFile
from tests.decoding import see_medium
from tests.options import media_options
from tests.unit.preprocess.conftest import encode_image, encode_video, level, picture

SETTINGS = MediumSettings()
# Stands for codecs with faults: the decoder hangs, crashes or grows as the first bytes of a file say.
FAULTS = """
import gc, os, signal, sys, time
from multiprocessing.connection import Connection
import pipeline.preprocess.image as image

class FaultyImage(image.OpenImage):
    def __init__(self, data, options):
        fault = bytes(data[:16])
        if fault.startswith(b"HANG"):
            while True:
                time.sleep(60)
        if fault.startswith(b"SPIN"):
            while True:
                pass
        if fault.startswith(b"STALL"):
            (connection,) = (one for one in gc.get_objects() if isinstance(one, Connection))
            os.write(connection.fileno(), (1000).to_bytes(4, "big") + b"[{")  # the beginning of an answer
            time.sleep(3600)
        if fault.startswith(b"CRASH"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault.startswith(b"EXIT"):
            os._exit(3)
        if fault.startswith(b"GROW"):
            grown = []
            while True:
                grown.append(b"x" * (8 << 20))
                time.sleep(0.001)
        if fault.startswith(b"BUG"):
            raise ZeroDivisionError("a mistake")
        super().__init__(data, options)

image.OpenImage = FaultyImage
"""

Make = Callable[[MediaOptions], MediaWorker]


def image(width: int = 64, height: int = 48, seed: int = 0) -> MediumFile:
    return MediumFile(
        "image", encode_image(Image.fromarray(picture(width, height, seed))), SETTINGS, f"{width}x{height}.png"
    )


def faulty(fault: bytes) -> MediumFile:
    return MediumFile("image", fault, SETTINGS, "faulty")


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MediaWorker]:
    """A worker whose decoder has the faults above. Starting it takes seconds, so all tests share it."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "sitecustomize.py").write_text(FAULTS)
    sys.path.insert(0, str(folder))
    with MediaWorker(media_options()) as worker:
        sys.path.remove(str(folder))
        yield worker


@pytest.fixture
def make_worker(one_worker: MediaWorker) -> Make:
    """That worker, with other options and a new decoder."""

    def make(options: MediaOptions) -> MediaWorker:
        one_worker._decoder.options = options  # for the next decoder
        see_media(one_worker, [faulty(b"EXIT")])
        return one_worker

    return make


@pytest.fixture
def worker(make_worker: Make) -> MediaWorker:
    return make_worker(media_options())


def see_media(worker: MediaWorker, media: list[MediumFile]) -> list[SeenMedium | RowError]:
    """The results for one row."""
    return worker.see_rows([media])[0]


def seen(result: SeenMedium | RowError) -> SeenMedium:
    assert isinstance(result, SeenMedium), repr(result)
    return result


def test_the_worker_gives_what_the_function_gives(make_worker: Make) -> None:
    options = media_options(QWEN3_VL)  # whose prompts take times unrounded
    clip = encode_video(20, rate=Fraction(30000, 1001))
    row = [image(), MediumFile("video", clip, MediumSettings(fps=7.0), "clip.mp4"), image(300, 20)]
    for result, (kind, data, settings, source) in zip(see_media(make_worker(options), row), row, strict=True):
        alone = see_medium(kind, data, settings, options, source=source)
        assert np.array_equal(seen(result).patches, alone.patches)
        assert replace(seen(result), patches=alone.patches) == alone
        assert bool(alone.prompt_seconds) == (kind == "video")


def test_a_bad_medium_is_its_own_error_and_the_others_are_seen(worker: MediaWorker) -> None:
    row = [
        image(),
        faulty(b""),
        faulty(b"<html>"),
        MediumFile("image", image().data, MediumSettings(max_pixels=9), "x"),
    ]
    results = see_media(worker, row)
    assert [type(result) for result in results] == [SeenMedium, TruncatedMedia, UnsupportedMedia, SettingError]
    assert str(results[3]) == "max_pixels is 9; expected at least 784, one visual token"
    assert see_media(worker, []) == []


def test_a_data_uri_is_shortened_in_the_receipt(worker: MediaWorker) -> None:
    uri = "data:image/png;base64," + "A" * 5000
    (result,) = see_media(worker, [image()._replace(source=uri)])
    assert seen(result).receipt.source == "data:image/png;base64,AAAAAAAAAAAAAAAAAA... (5,022 characters)"


def test_several_rows_at_once_give_what_each_row_gives(make_worker: Make) -> None:
    rows = [[image(200, 100, seed), image(90, 90, seed)] for seed in range(3)]
    worker = make_worker(media_options(max_visual_tokens=12))
    together = worker.see_rows([*rows, []])
    assert together[3] == []
    for row, results in zip(rows, together[:3], strict=True):
        for one, other in zip(see_media(worker, row), results, strict=True):
            assert np.array_equal(seen(one).patches, seen(other).patches) and seen(one).receipt == seen(other).receipt


@pytest.mark.parametrize("word", [b"HANG", b"SPIN", b"STALL"])
def test_a_hang_is_killed_at_its_deadline_and_the_rest_of_the_row_is_seen(make_worker: Make, word: bytes) -> None:
    worker = make_worker(media_options(timeout_s=4.0))
    see_media(worker, [image()])  # the start of the process is not measured
    begun = time.monotonic()
    before, hung, after = see_media(worker, [image(seed=1), faulty(word), image(seed=2)])
    assert time.monotonic() - begun < 60
    assert isinstance(hung, MediaTimeout)
    assert str(hung) == f"decoding took longer than 4 s and was stopped (media.timeout_s) (image of {len(word)} bytes)"
    assert np.array_equal(seen(before).patches, see_medium(*image(seed=1)[:3], media_options(), source="").patches)
    assert np.array_equal(seen(after).patches, see_medium(*image(seed=2)[:3], media_options(), source="").patches)


def test_a_crash_in_a_codec_is_one_error_and_names_the_signal(make_worker: Make) -> None:
    worker = make_worker(media_options())
    results = worker.see_rows([[image()], [faulty(b"CRASH")], [faulty(b"EXIT"), image()], [faulty(b"BUG")]])
    crashed, left, mistaken = results[1][0], results[2][0], results[3][0]
    assert isinstance(crashed, DecoderCrash) and "SIGSEGV" in str(crashed)
    assert isinstance(left, DecoderCrash) and "exit code 3" in str(left)
    assert isinstance(mistaken, DecoderCrash) and "ZeroDivisionError: a mistake" in str(mistaken)
    assert isinstance(results[0][0], SeenMedium) and isinstance(results[2][1], SeenMedium)


def test_a_new_decoder_is_there_in_a_moment(make_worker: Make) -> None:
    worker = make_worker(media_options())
    see_media(worker, [image()])
    begun = time.monotonic()
    for _ in range(5):
        see_media(worker, [faulty(b"CRASH"), image()])
    assert time.monotonic() - begun < 10  # importing the codecs anew takes seconds each time


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
def test_outgrowing_the_memory_limit_is_an_error_with_the_numbers(make_worker: Make) -> None:
    worker = make_worker(media_options(memory_limit_mb=200))
    grown, fine = see_media(worker, [faulty(b"GROW"), image()])
    assert isinstance(grown, MediaMemoryError) and isinstance(fine, SeenMedium)
    assert "at most 200 are allowed (media.memory_limit_mb)" in str(grown)


def test_a_decoder_killed_between_rows_is_replaced(worker: MediaWorker) -> None:
    see_media(worker, [image()])
    killed = worker.decoder_pid
    os.kill(killed, signal.SIGKILL)
    results = [see_media(worker, [image()])[0] for _ in range(2)]
    assert isinstance(results[-1], SeenMedium) and worker.decoder_pid != killed


def test_a_medium_that_is_too_large_never_reaches_the_decoder(make_worker: Make) -> None:
    (result,) = see_media(make_worker(media_options(max_bytes=100)), [faulty(b"x" * 101)])
    assert isinstance(result, MediaTooLarge) and "101 bytes; at most 100" in str(result)


def test_patches_that_are_still_held_are_not_overwritten(worker: MediaWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker._outputs, "_unused", worker._outputs._unused[:5])
    media = [image(700, 500, seed) for seed in range(8)] + [image(seed=seed) for seed in range(8)]
    held = [seen(see_media(worker, [medium])[0]).patches for medium in media]
    for medium, patches in zip(media, held, strict=True):
        assert np.array_equal(patches, see_medium(*medium[:3], media_options(), source="").patches)
    assert len(worker._outputs._unused) == 1


def test_memory_of_patches_that_nobody_holds_is_used_again(worker: MediaWorker) -> None:
    gc.collect()
    before = sum(segment.size > 0 for segment in worker._outputs.segments)
    for seed in range(20):
        see_media(worker, [image(700, 500, seed)])
    assert sum(segment.size > 0 for segment in worker._outputs.segments) <= before + 1


def test_patches_outlive_the_worker() -> None:
    with MediaWorker(media_options()) as worker:
        (result,) = see_media(worker, [image(700, 500)])
    expected = see_medium(*image(700, 500)[:3], media_options(), source="").patches
    assert np.array_equal(seen(result).patches, expected)


def test_thumbnails_are_small_upright_jpegs(worker: MediaWorker) -> None:
    stored = np.zeros((600, 900, 3), dtype=np.uint8)
    stored[:300, :450] = (200, 60, 30)  # top left, which the orientation turns to the top right
    exif = Image.Exif()
    exif[0x0112] = 6
    (small,) = worker.thumbnails("image", encode_image(Image.fromarray(stored), "JPEG", exif=exif), max_side=120)
    with Image.open(io.BytesIO(small)) as shown:
        assert (shown.format, shown.size) == ("JPEG", (80, 120))
        pixels = np.asarray(shown).astype(int)
    assert np.abs(pixels[:55, 45:] - (200, 60, 30)).max() < 30 and pixels[65:, :].max() < 30
    strip = worker.thumbnails("video", encode_video(20), max_side=48)
    assert [Image.open(io.BytesIO(frame)).size for frame in strip] == [(48, 32)] * 4
    assert [level(np.asarray(Image.open(io.BytesIO(frame)))) for frame in strip] == [0, 5, 10, 15]
    assert len(worker.thumbnails("video", encode_video(3), max_side=48)) == 2


def test_a_thumbnail_that_cannot_be_made_is_a_typed_error_and_the_next_is_made(make_worker: Make) -> None:
    worker = make_worker(media_options(timeout_s=4.0, max_bytes=10_000))
    for data, error in ((b"HANG", MediaTimeout), (b"CRASH", DecoderCrash), (b"%PDF", UnsupportedMedia)):
        with pytest.raises(error):
            worker.thumbnails("image", data, max_side=64)
    with pytest.raises(MediaTooLarge):
        worker.thumbnails("image", b"x" * 10_001, max_side=64)
    assert worker.thumbnails("image", image().data, max_side=64)


def test_a_request_that_cannot_be_written_takes_no_output(worker: MediaWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(worker._input, "reserve", full)
        for _ in range(100):  # more often than there are outputs
            with pytest.raises(OSError, match="Cannot allocate"):
                see_media(worker, [image()])
    seen(see_media(worker, [image()])[0])


def test_threads_may_share_a_worker(worker: MediaWorker) -> None:
    wrong: list[int] = []

    def look(seed: int) -> None:
        expected = see_medium(*image(seed=seed)[:3], media_options(), source="").patches
        for _ in range(5):
            if not np.array_equal(seen(see_media(worker, [image(seed=seed)])[0]).patches, expected):
                wrong.append(seed)

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_rows_media_shrink_together_to_the_budget_and_say_so(make_worker: Make) -> None:
    worker = make_worker(media_options(max_visual_tokens=60))
    row = [image(560, 280), image(280, 280), MediumFile("video", encode_video(12), SETTINGS, "clip.mp4")]
    results = [seen(result) for result in see_media(worker, row)]
    tokens = [result.patches.shape[0] // 4 for result in results]
    assert sum(tokens) <= 60 and min(tokens) >= 1
    assert tokens[0] > tokens[1]
    assert all(result.receipt.note and "max_visual_tokens is 60" in result.receipt.note for result in results)
    (small,) = see_media(worker, [image(56, 56)])
    assert seen(small).receipt.note is None


def test_a_budget_that_cannot_be_met_is_an_error_with_the_least_number(make_worker: Make) -> None:
    results = see_media(make_worker(media_options(max_visual_tokens=3)), [image(seed=seed) for seed in range(4)])
    assert {type(result) for result in results} == {SettingError}
    assert "need at least 4 visual tokens; max_visual_tokens is 3" in str(results[0])


def test_the_decoder_dies_with_its_actor() -> None:
    program = (
        "import os, sys, time\n"
        "from tests.options import media_options\n"
        "from pipeline.preprocess.sandbox.client import MediaWorker, MediumFile\n"
        "from pipeline.conversation import MediumSettings\n"
        "worker = MediaWorker(media_options())\n"
        "worker.see_rows([[MediumFile('image', b'x', MediumSettings(), 'x')]])\n"
        "print(worker._decoder._fork_server.pid, worker.decoder_pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    actor = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert actor.stdout is not None
    fork_server, decoder = map(int, actor.stdout.readline().split())
    actor.kill()
    actor.wait()
    actor.stdout.close()
    until = time.monotonic() + 20
    while time.monotonic() < until and (_alive(fork_server) or _alive(decoder)):
        time.sleep(0.1)
    assert not _alive(fork_server) and not _alive(decoder)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
