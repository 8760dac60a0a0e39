"""Files with random damage: each gives a result or a typed error, and the process that decodes them stays sound."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipeline.conversation import MediumSettings
from pipeline.errors import FetchError, MediaError, RowError
from pipeline.preprocess.limits import MIB
from pipeline.preprocess.receipt import SeenMedium
from pipeline.preprocess.sandbox.client import MediaWorker, MediumFile
from pipeline.preprocess.sandbox.process import private_bytes
from tests.options import media_options
from tests.unit.preprocess.conftest import encode_image, encode_video, picture

ROWS_AT_ONCE = 16


def seeds() -> dict[str, bytes]:
    """One good file of each kind."""
    image = Image.fromarray(picture(120, 90))
    animated = encode_image(image, "WEBP", save_all=True, append_images=[Image.fromarray(picture(120, 90, 1))])
    moving = np.stack([np.roll(picture(96, 64), 4 * number, axis=1) for number in range(24)])
    with_times = {"x264-params": "keyint=8:bframes=2"}
    return {
        "jpeg": encode_image(image, "JPEG", quality=80),
        "progressive jpeg": encode_image(image, "JPEG", progressive=True),
        "png": encode_image(image, "PNG"),
        "palette png": encode_image(image.quantize(16), "PNG", transparency=2),
        "webp": encode_image(image, "WEBP"),
        "animated webp": animated,
        "gif": encode_image(image.quantize(16), "GIF"),
        "tiff": encode_image(image, "TIFF", compression="tiff_lzw"),
        "avif": encode_image(image, "AVIF"),
        "mp4": encode_video(moving, options=with_times),
        "webm": encode_video(moving, codec="libvpx", container="webm", options={"deadline": "realtime"}),
    }


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The file with some bytes changed, moved, doubled or gone; headers are hit as often as the rest."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if len(out) < 16:
            break
        at = rng.randrange(min(len(out), 200) if rng.random() < 0.5 else len(out))
        match rng.randrange(6):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.choice([0, 255, 127, 128, 1])
            case 2:
                out[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00"])
            case 3:
                del out[at : at + rng.randrange(1, 40)]
            case 4:
                out[at:at] = out[at : at + rng.randrange(1, 200)]
            case _:
                out = out[: max(8, at)] if rng.random() < 0.3 else out
    return bytes(out)


def survive(worker: MediaWorker, count: int, seed: int) -> Counter[str]:
    """Feed `count` damaged files to the worker; how often each outcome came."""
    rng, good = random.Random(seed), seeds()
    outcomes: Counter[str] = Counter()
    rows: list[list[MediumFile]] = []
    for number in range(count):
        name = list(good)[number % len(good)]
        kind = "video" if name in ("mp4", "webm") else "image"
        rows.append([MediumFile(kind, damaged(good[name], rng), MediumSettings(), f"{name} {number}")])
    for start in range(0, count, ROWS_AT_ONCE):
        for results in worker.see_rows(rows[start : start + ROWS_AT_ONCE]):
            (result,) = results
            assert isinstance(result, SeenMedium | RowError)
            assert not isinstance(result, RowError) or isinstance(result, MediaError | FetchError), repr(result)
            assert isinstance(result, SeenMedium) or len(str(result)) > 10
            outcomes[type(result).__name__] += 1
            assert "unforeseen" not in str(result), result
    assert private_bytes(worker.decoder_pid) < 1500 * MIB
    return outcomes


def test_damaged_files_give_a_result_or_a_typed_error() -> None:
    with MediaWorker(media_options(timeout_s=20.0, memory_limit_mb=1500)) as worker:
        outcomes = survive(worker, 176, seed=1)
        assert outcomes["SeenMedium"] > 20 and len(outcomes) >= 3, outcomes
        assert outcomes["MediaTimeout"] == 0, outcomes
        good = encode_image(Image.fromarray(picture(64, 64)))
        assert isinstance(worker.see_rows([[MediumFile("image", good, MediumSettings(), "good")]])[0][0], SeenMedium)


@pytest.mark.slow
def test_two_thousand_damaged_files_give_a_result_or_a_typed_error() -> None:
    with MediaWorker(media_options(timeout_s=20.0, memory_limit_mb=1500)) as worker:
        outcomes = survive(worker, 2000, seed=2)
    print(dict(outcomes))
    assert sum(outcomes.values()) == 2000 and outcomes["SeenMedium"] > 200, outcomes
