"""Qwen2.5-VL and Qwen3-VL as their transformers processors see media and write prompts.

Their values of whole images and clips are in golden/. Here their methods are called, which run without torchvision.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as reference_resize
from transformers.video_utils import VideoMetadata

from pipeline.checkpoint.families import FAMILIES
from pipeline.checkpoint.families.family import Family
from pipeline.checkpoint.families.qwen2_5_vl import QWEN2_5_VL
from pipeline.checkpoint.families.qwen2_vl import QWEN2_VL
from pipeline.checkpoint.families.qwen3_vl import QWEN3_VL
from pipeline.checkpoint.processor import read_processor
from pipeline.conversation import MediumPart, MediumSettings, Message, Text
from pipeline.demo import CHECKPOINT
from pipeline.engine.pixels import pixel_table
from pipeline.errors import AspectRatioError, CheckpointError, ConfigError, ReservedTokenError, SettingError
from pipeline.preprocess.fetch.ranged import RangedFile
from pipeline.preprocess.fetch.source import RangedSource
from pipeline.preprocess.frame_list import pack_frames
from pipeline.preprocess.header import read_header
from pipeline.preprocess.patches import patchify_video
from pipeline.preprocess.prompt import ChatTokenizer, MediumTokens
from pipeline.preprocess.receipt import SeenMedium
from pipeline.preprocess.size import ShownSize, fit_row, num_visual_tokens, video_smart_resize
from pipeline.preprocess.video.timing import Timeline, prompt_seconds
from tests.decoding import see_medium
from tests.options import media_options
from tests.unit.preprocess.conftest import encode_image, encode_video, picture
from tests.unit.preprocess.golden import cases
from tests.unit.preprocess.test_prompt import as_transformers, published

QWEN3 = media_options(QWEN3_VL)
FACTOR, LEAST, MOST = QWEN3_VL.factor, QWEN3_VL.video_min_pixels, QWEN3_VL.video_max_pixels
IMAGE, VIDEO = MediumPart("image", b""), MediumPart("video", b"")

# ---------------------------------------------------------------------------------------------------------------------
# Processor files


def write_processor(folder: Path, model_type: str, **files: Any) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def test_the_published_processor_files_give_the_published_facts(tmp_path: Path) -> None:
    shape = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3}
    image = {**shape, "image_std": [0.5] * 3, "size": {"longest_edge": 16777216, "shortest_edge": 65536}}
    video = {**shape, "size": {"longest_edge": 25165824, "shortest_edge": 4096}}
    path = write_processor(tmp_path, "qwen3_vl", preprocessor_config=image, video_preprocessor_config=video)
    assert read_processor(path) == QWEN3_VL
    wide = {**video, "size": {"longest_edge": 1_000_000, "shortest_edge": 4096}}
    write_processor(tmp_path, "qwen3_vl", processor_config={"image_processor": image, "video_processor": wide})
    assert read_processor(path) == replace(QWEN3_VL, video_max_pixels=1_000_000)
    assert media_options(read_processor(path)).video_total_pixels == 1_000_000
    published = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2}
    both = {"processor_config": {}, "preprocessor_config": published, "video_preprocessor_config": {}}
    path = write_processor(tmp_path, "qwen2_5_vl", **both)
    assert read_processor(path) == replace(QWEN2_5_VL, max_pixels=12845056)
    same = replace(QWEN2_5_VL, model_type="qwen2_vl", title="Qwen2-VL", sampling=QWEN2_VL.sampling)
    assert same == QWEN2_VL == FAMILIES["qwen2_vl"]


@pytest.mark.parametrize(
    ("video", "said"),
    [({"patch_size": 14}, "patch_size 14; Qwen3-VL has 16"), ({"image_mean": [0.4] * 3}, "its images have .0.5, 0.5")],
)
def test_videos_that_are_cut_or_normalized_otherwise_are_refused(
    tmp_path: Path, video: dict[str, Any], said: str
) -> None:
    path = write_processor(tmp_path, "qwen3_vl", preprocessor_config={}, video_preprocessor_config=video)
    with pytest.raises(CheckpointError, match=said):
        read_processor(path)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def test_a_videos_size_equals_transformers_over_all_its_frames() -> None:
    rng = random.Random(5)
    for _ in range(3000):
        num_frames = rng.choice([2, 3, 4, 5, 9, 64, 768, rng.randint(2, 800)])
        height, width = (round(2 ** rng.uniform(0, 12)) for _ in range(2))
        bounds = rng.choice([(LEAST, MOST), (128 * 1024, 768 * 1024), (4096, 60_000), (10**6, 10**7)])
        limits = {"factor": FACTOR, "min_pixels": bounds[0], "max_pixels": bounds[1]}
        try:
            expected = reference_resize(num_frames, height, width, **limits)
        except ValueError:
            with pytest.raises(AspectRatioError):
                video_smart_resize(num_frames, height, width, **limits)
            continue
        assert video_smart_resize(num_frames, height, width, **limits) == expected, (num_frames, height, width, bounds)


def test_bounds_of_a_frame_apply_only_where_they_are_set() -> None:
    def size(num_frames: int = 8, **options: Any) -> tuple[int, int]:
        row = MediumSettings(**options.pop("row", {}))
        return ShownSize("video", 720, 1280, num_frames, row, replace(QWEN3, **options)).resized

    assert size() == (704, 1280) == reference_resize(8, 720, 1280, factor=FACTOR, min_pixels=LEAST, max_pixels=MOST)
    assert math.prod(size(768)) <= MOST / 768
    assert math.prod(size(768, row={"total_pixels": 4 * MOST})) > MOST / 768
    assert math.prod(size(video_total_pixels=10**6)) <= 10**6 / 8
    for limits in ({"video_max_pixels": 100_000}, {"row": {"max_pixels": 100_000}}):
        assert 80_000 < math.prod(size(**limits)) <= 100_000
    for limits in ({"video_min_pixels": 2 * 10**6}, {"row": {"min_pixels": 2 * 10**6}}):
        assert math.prod(size(**limits)) >= 2 * 10**6
        assert math.prod(size(768, **limits)) >= 2 * 10**6  # as Qwen2-VL's frames, whose floor also wins over a total


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=4),
    st.integers(1, 4000),
)
@settings(max_examples=150, deadline=None)
def test_a_row_of_videos_fits_its_budget_or_is_refused(media: list[tuple[int, int, int]], budget: int) -> None:
    try:
        sizes = [
            SimpleNamespace(size=ShownSize("video", height, width, count, MediumSettings(), QWEN3))
            for count, height, width in media
            if max(height, width) <= 200 * min(height, width)
        ]
        least = sum(math.ceil(one.size.num_frames / 2) for one in sizes)
        fit_row(sizes, budget)
    except SettingError:
        # Long media keep sides of a whole token: they need more than one token for each step.
        assert any(max(h, w) > 2 * min(h, w) for _, h, w in media) or budget < 2 * least
        return
    assert sum(one.size.num_visual_tokens for one in sizes) <= budget


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_the_tokens_that_the_documentation_states_are_computed(family: Family) -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    stated = next(line for line in page.splitlines() if f"`{family.model_type}`" in line and line.startswith("|"))
    options = media_options(family, max_pixels=max(family.max_pixels, 16384 * 28 * 28))
    image = ShownSize("image", 1024, 1024, 1, MediumSettings(), options)
    frames = timeline(1800, 30.0).choose(MediumSettings(), options).frames
    video = ShownSize("video", 720, 1280, len(frames), MediumSettings(), options)
    assert stated.endswith(f"| {image.num_visual_tokens:,} | {video.num_visual_tokens:,} |")


# ---------------------------------------------------------------------------------------------------------------------
# Frames


def reference_frames(total: int, rate: float, min_frames: int = 4, max_frames: int = 768, **asked: Any) -> list[int]:
    of_class = SimpleNamespace(fps=2, min_frames=min_frames, max_frames=max_frames)
    metadata = VideoMetadata(total_num_frames=total, fps=rate)
    indices: list[int] = Qwen3VLVideoProcessor.sample_frames(of_class, metadata, **asked).tolist()
    return indices


def timeline(total: int, rate: float) -> Timeline:
    return Timeline(np.arange(total) / rate, rate, 0.0)


def test_sampled_frames_are_those_of_qwen3_vls_processor() -> None:
    rng = random.Random(6)
    rates = [24.0, 25.0, 30.0, 60.0, 30000 / 1001, 24000 / 1001, 15.0, 12.5, 10.0, 7.77, 1.0]
    for _ in range(600):
        total = rng.choice([1, 2, 3, rng.randint(2, 60), rng.randint(2, 3000), rng.randint(2, 40_000)])
        rate, fps = rng.choice(rates), rng.choice([2.0, 2.0, 1.0, 0.5, 3.7, 30.0, 0.01])
        asked = {"num_frames": rng.randint(2, 90)} if rng.random() < 0.3 else {"fps": fps}
        choice = timeline(total, rate).choose(MediumSettings(**asked), QWEN3)
        assert choice.frames == reference_frames(total, rate, **asked), (total, rate, asked)
        metadata = VideoMetadata(total_num_frames=total, fps=rate, frames_indices=choice.frames)
        assert choice.seconds_per_step(len(choice.frames)) == 2 / metadata.sampled_fps
    by_job = replace(QWEN3, fps=4.0, min_frames=7, max_frames=33)
    limits: dict[str, Any] = {"fps": 4.0, "min_frames": 7, "max_frames": 33}
    for total in (5, 20, 500):
        assert timeline(total, 25.0).choose(MediumSettings(), by_job).frames == reference_frames(total, 25.0, **limits)
    assert timeline(5, 25.0).choose(MediumSettings(), replace(QWEN3, num_frames=9)).frames == reference_frames(
        5, 25.0, num_frames=9
    )
    qwens, old = replace(QWEN3, frame_sampling="qwen"), media_options(frame_sampling="qwen")
    assert timeline(100, 25.0).choose(MediumSettings(), qwens) == timeline(100, 25.0).choose(MediumSettings(), old)


def test_a_segment_is_sampled_from_its_first_frame_to_its_last() -> None:
    choice = timeline(100, 10.0).choose(MediumSettings(start_s=2.0, end_s=5.0), QWEN3)
    assert choice.frames == [20 + index for index in reference_frames(30, 10.0)]
    assert choice.frames[0] == 20 and choice.frames[-1] == 49
    assert choice.seconds_per_step(6) == 2 / (6 / 30 * 10.0)


def test_a_variable_rate_is_sampled_evenly_in_time_from_the_first_frame_to_the_last() -> None:
    uneven = Timeline(np.array([0.0, 0.1, 0.2, 0.3, 5.0, 8.0]), None, 2.0)
    choice = uneven.choose(MediumSettings(num_frames=5), QWEN3)
    assert choice.frames == [0, 3, 3, 4, 5]  # at 0, 2, 4, 6 and 8 seconds
    assert choice.seconds_per_step(5) == 2 / (5 / 10.0)
    assert uneven.choose(MediumSettings(num_frames=3, start_s=0.15, end_s=6.0), QWEN3).frames == [2, 3, 4]
    assert [uneven.counted_second(frame) for frame in (3, 4)] == [0.3, 5.0]


# ---------------------------------------------------------------------------------------------------------------------
# Prompts

# What Qwen3-VL-Instruct's template writes: media are numbered where asked, and shown in a user's turns alone; there is
# no system prompt by default, and a later one is left out.
INSTRUCT = """
{%- set number = namespace(image=0, video=0) %}
{%- for message in messages %}{% if loop.first or message.role != 'system' %}<|im_start|>{{ message.role }}
{% for part in message.content %}
{%- if part.type == 'text' %}{{ part.text }}
{%- elif message.role == 'user' %}
{%- if part.type == 'image' %}{% set number.image = number.image + 1 %}
{%- else %}{% set number.video = number.video + 1 %}{% endif %}
{%- if add_vision_id %}{{ {'image': 'Picture ', 'video': 'Video '}[part.type] ~ number[part.type] ~ ': ' }}{% endif %}
{{- '<|vision_start|><|' ~ part.type ~ '_pad|><|vision_end|>' }}
{%- endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}<|im_start|>assistant
{{ '' }}"""
# The end is that of its successors. Qwen3-VL-Thinking's always opens thoughts.
TEMPLATE = """
{%- for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% else %}<think>
{% endif %}"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer with Qwen3's tags and a template like its successors'."""
    shutil.copy(CHECKPOINT / "tokenizer.json", tmp_path)
    config = json.loads((CHECKPOINT / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = config.get("added_tokens_decoder", {}) | {
        str(90_000 + number): {"content": content, "special": False, "normalized": False}
        for number, content in enumerate(["<think>", "</think>", "<tool_call>", "invoice"])
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def reference_expansion(kind: str, grid: tuple[int, int, int], frames: list[int], rate: float) -> str:
    video = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    processor: Any = SimpleNamespace(
        image_processor=video,
        video_processor=video,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        _calculate_timestamps=lambda *args: Qwen3VLProcessor._calculate_timestamps(processor, *args),
    )
    name = f"{kind}_grid_thw"
    metadata = VideoMetadata(total_num_frames=0, fps=rate, frames_indices=list(frames))
    replaced = getattr(Qwen3VLProcessor, f"replace_{kind}_token")
    text: str = replaced(processor, {name: [np.array(grid)], "video_metadata": [metadata]}, 0)
    return text


def medium_tokens(seen: SeenMedium) -> MediumTokens:
    return MediumTokens(seen.receipt.kind, num_visual_tokens(seen.receipt.grid_thw), seen.prompt_seconds)


@pytest.mark.parametrize(
    ("rate", "num_frames", "row"),
    [
        (Fraction(30000, 1001), 50, {}),
        (10, 33, {"fps": 3.3}),
        (25, 40, {"start_s": 0.5, "end_s": 1.3, "fps": 6.0}),
        (10, 1, {}),
    ],
)
def test_a_video_becomes_the_tokens_of_qwen3_vls_processor(
    folder: Path, rate: int | Fraction, num_frames: int, row: dict[str, Any]
) -> None:
    data, photo = encode_video(num_frames, rate=rate), encode_image_of(40, 70)
    seen = see_medium("video", data, MediumSettings(**row), QWEN3, source="")
    image = see_medium("image", photo, MediumSettings(), QWEN3, source="")
    first, end = (13, 33) if "start_s" in row else (0, num_frames)
    asked = {"fps": row["fps"]} if "fps" in row else {}
    frames = [first + index for index in reference_frames(end - first, float(rate), **asked)]
    assert seen.receipt.timestamps == pytest.approx([frame / float(rate) for frame in frames], abs=1e-3)
    assert seen.receipt.grid_thw[0] == math.ceil(len(frames) / 2)

    tokenizer = ChatTokenizer(str(folder))
    prompt = tokenizer.render([Message("user", (IMAGE, Text("a"), VIDEO, Text("What happens?")))])
    expected = prompt.text.replace("<|image_pad|>", reference_expansion("image", image.receipt.grid_thw, [], 0))
    clip = reference_expansion("video", seen.receipt.grid_thw, frames, float(rate))
    expected = expected.replace("<|video_pad|>", clip, 1)
    # The outer marks of the template stay, as in transformers from 5.10 on.
    assert "<|vision_start|><" + f"{seen.prompt_seconds[0]:.1f} seconds><|vision_start|><|video_pad|>" in expected
    ids = tokenizer.expand(prompt, [medium_tokens(image), medium_tokens(seen)])
    assert ids.tolist() == tokenizer.encode(expected).tolist()

    header = read_header("video", open_file(data), MediumSettings(**row), QWEN3)
    assert (header.prompt_seconds, header.size.grid_thw) == (seen.prompt_seconds, seen.receipt.grid_thw)
    old = see_medium("video", data, MediumSettings(**row), media_options(), source="")
    assert old.prompt_seconds == () and read_header("video", open_file(data), MediumSettings(), media_options()).kind


def encode_image_of(width: int, height: int) -> bytes:
    return encode_image(Image.fromarray(picture(width, height)))


def open_file(data: bytes) -> RangedFile:
    return RangedFile(RangedSource(len(data), lambda start, stop: data[start:stop]), seconds=20.0)


def test_one_frame_is_shown_as_two_equal_ones_and_the_receipt_says_so() -> None:
    for data in (encode_video(1), pack_frames([encode_image_of(64, 48)])):
        seen = see_medium("video", data, MediumSettings(), QWEN3, source="")
        assert seen.receipt.note == "one frame, shown as two equal ones"
        assert seen.prompt_seconds == (0.0,) and seen.receipt.grid_thw[0] == 1
        halves = seen.patches.reshape(len(seen.patches), 3, 2, 256)
        assert np.array_equal(halves[:, :, 0], halves[:, :, 1])
        assert see_medium("video", data, MediumSettings(), media_options(), source="").receipt.note is None


def test_seconds_per_step_are_those_of_the_frames_that_are_shown() -> None:
    qwen25 = media_options(QWEN2_5_VL)
    seen = see_medium("video", encode_video(43, rate=10), MediumSettings(), qwen25, source="")
    metadata = VideoMetadata(total_num_frames=43, fps=10.0, frames_indices=list(range(8)))
    assert len(seen.receipt.timestamps or ()) == 8 and seen.seconds_per_step == 2 / metadata.sampled_fps
    listed = pack_frames([encode_image_of(64, 48)] * 3)
    assert see_medium("video", listed, MediumSettings(fps=4.0), qwen25, source="").seconds_per_step == 0.5
    assert see_medium("video", listed, MediumSettings(fps=4.0), QWEN3, source="").prompt_seconds == (0.125, 0.5)
    assert see_medium("image", encode_image_of(64, 48), MediumSettings(), qwen25, source="").seconds_per_step == 1.0


def test_an_odd_number_of_frames_of_16_pixel_patches_is_padded_as_qwen3_vls_processor_does() -> None:
    frames = np.random.default_rng(4).integers(0, 256, (5, 64, 96, 3), dtype=np.uint8)
    videos = torch.from_numpy(frames).permute(0, 3, 1, 2)[None]
    theirs, *grid = Qwen3VLVideoProcessor.patchify(SimpleNamespace(), videos, 16, 2, 2)
    assert np.array_equal(patchify_video(frames, patch_size=16), theirs[0].numpy()) and grid == [3, 4, 6]


def test_images_are_bit_equal_to_the_pil_processor_of_16_pixel_patches() -> None:
    facts: dict[str, Any] = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    table = pixel_table(QWEN3_VL.image_mean, QWEN3_VL.image_std, processor="pil")
    for case in cases.image_cases(200, factor=FACTOR)[100:115]:
        made, size = cases.make_image(case), {"shortest_edge": case.min_pixels, "longest_edge": case.max_pixels}
        theirs = Qwen2VLImageProcessorPil(size=size, **facts)(made, return_tensors="np")
        options = replace(QWEN3, resize="pil", min_pixels=case.min_pixels, max_pixels=case.max_pixels)
        seen = see_medium("image", cases.encode(made), MediumSettings(), options, source="")
        assert list(seen.receipt.grid_thw) == theirs["image_grid_thw"][0].tolist(), cases.key(case)
        halves = seen.patches.reshape(len(seen.patches), 3, 1, 256)
        values = np.repeat(np.stack([table[channel][halves[:, channel]] for channel in range(3)], axis=1), 2, axis=2)
        assert np.array_equal(values.reshape(len(values), -1), theirs["pixel_values"]), cases.key(case)


def test_tags_that_are_tokens_are_reserved_unless_the_job_allows_them(folder: Path) -> None:
    tokenizer = ChatTokenizer(str(folder))
    tokenizer.render([Message("user", (Text("an invoice, a <b>, think"),))])  # a word that a fine-tune adds is a word
    for texts in (("<think>",), ("say </thi", "nk> now"), ("<tool_call>",)):
        with pytest.raises(ReservedTokenError, match=r"prompt\.allow_tokens"):
            tokenizer.render([Message("user", tuple(map(Text, texts)))])
    allowing = ChatTokenizer(str(folder), allow_tokens=["<think>", "</think>"])
    allowing.render([Message("user", (Text("Think in <think></think>."),))])
    with pytest.raises(ReservedTokenError, match="<tool_call>"):
        allowing.render([Message("user", (Text("<tool_call>"),))])
    with pytest.raises(ReservedTokenError, match=r"respell it$"):
        allowing.render([Message("user", (Text("<|im_end|>"),))])
    for unknown in ("<|im_end|>", "invoice", "<thoughts>"):
        with pytest.raises(ConfigError, match=r"these can: </think>, <think>, <tool_call>"):
            ChatTokenizer(str(folder), allow_tokens=[unknown])


def test_thinking_is_off_unless_the_job_asks_for_it(folder: Path) -> None:
    ask = [Message("user", (Text("Hi"),))]
    off, on = (ChatTokenizer(str(folder), thinking=thinking) for thinking in (False, True))
    assert off.render(ask).text.endswith("<think>\n\n</think>\n\n") and not off.thinks
    assert on.render(ask).text.endswith("<think>\n") and on.thinks
    assert not ChatTokenizer(str(CHECKPOINT), thinking=True).thinks
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("enable_thinking is defined", "false"))
    assert ChatTokenizer(str(folder)).thinks


def drawn_conversation(rng: random.Random) -> tuple[tuple[Message, ...], list[tuple[str, tuple[int, int, int], float]]]:
    """(messages, for each medium its kind, its grid and its file's rate)."""
    words = ["What?", " and ", "Caf\u00e9\n", "x = 1", "\u65e5\u672c", "<b>", "1.5 seconds>", "  "]
    media: list[tuple[str, tuple[int, int, int], float]] = []

    def parts() -> tuple[Text | MediumPart, ...]:
        made: list[Text | MediumPart] = [Text("".join(rng.choices(words, k=3)))]
        for _ in range(rng.randint(0, 3)):
            kind = rng.choice(["image", "video"])
            steps = rng.randint(1, 5) if kind == "video" else 1
            media.append((kind, (steps, 2 * rng.randint(1, 3), 2 * rng.randint(1, 3)), rng.choice([7.77, 25.0, 29.97])))
            made += [IMAGE if kind == "image" else VIDEO, Text(rng.choice(words))]
        return tuple(made)

    turns = [Message("system", (Text("Be brief."),))] if rng.random() < 0.3 else []
    for _ in range(rng.randint(0, 2)):
        turns += [Message("user", parts()), Message("assistant", (Text(rng.choice(words)),))]
    return (*turns, Message("user", parts())), media


@pytest.mark.slow
@pytest.mark.parametrize("family", [QWEN2_5_VL, QWEN3_VL], ids=lambda family: family.model_type)
def test_prompts_and_ids_of_drawn_conversations_are_those_of_transformers(tmp_path: Path, family: Family) -> None:
    from transformers import AutoTokenizer

    for file in Path(published()).iterdir():
        shutil.copy(file, tmp_path)
    if family is QWEN3_VL:
        (tmp_path / "chat_template.json").unlink()
        (tmp_path / "chat_template.jinja").write_text(INSTRUCT)
    ours, oracle = ChatTokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    template = (
        INSTRUCT if family is QWEN3_VL else json.loads((tmp_path / "chat_template.json").read_text())["chat_template"]
    )
    rng = random.Random(8)
    for _ in range(100):
        messages, media = drawn_conversation(rng)
        add_vision_id = rng.random() < 0.5
        prompt = ours.render(messages, add_vision_id=add_vision_id)
        rendered = oracle.apply_chat_template(
            as_transformers(messages),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            add_vision_id=add_vision_id,
        )
        assert prompt.text == rendered
        expected, tokens = "", []
        for kind, grid, rate in media:
            frames = sorted(rng.sample(range(3000), 2 * grid[0] - rng.randint(0, 1)))
            before, _, rendered = rendered.partition(f"<|{kind}_pad|>")
            seconds = prompt_seconds([frame / rate for frame in frames], family) if kind == "video" else ()
            tokens.append(MediumTokens(kind, math.prod(grid) // 4, seconds))  # type: ignore[arg-type]
            replaced = f"<|{kind}_pad|>" * (math.prod(grid) // 4)
            if family is QWEN3_VL:
                replaced = reference_expansion(kind, grid, frames, rate)
            expected += before + replaced
        assert ours.expand(prompt, tokens).tolist() == oracle(expected + rendered)["input_ids"]
