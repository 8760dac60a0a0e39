"""Time, bottleneck, object store and suggested settings from a sample."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from pipeline.conversation import MediumKind, MediumSettings
from pipeline.errors import AccessDenied, MediaNotFound, PromptTooLong
from pipeline.planning.advice import advise
from pipeline.planning.forecast import (
    EFFICIENCY,
    Engines,
    Measured,
    Times,
    from_data_sheet,
    from_probe,
    object_store,
)
from pipeline.planning.roofline import SHAPES, Gpu, RowWork, find_gpu, row_seconds
from pipeline.planning.sample import CORE_FACTOR, Range, Sample, SampledRow, describe, kind_of
from pipeline.planning.survey import add_costs
from pipeline.preprocess.header import MediumHeader
from pipeline.preprocess.size import ShownSize
from tests.options import media_options


def medium(kind: MediumKind, width: int, height: int, num_shown: int = 1, num_decoded: int = 1) -> MediumHeader:
    options = media_options()
    size = ShownSize(kind, height, width, num_shown, MediumSettings(), options)
    return MediumHeader(kind, width, height, size, num_bytes=200_000, num_decoded=num_decoded)


PHOTO = medium("image", 1024, 1024)
CLIP = medium("video", 1280, 720, 60, 2700)


def row(*media: MediumHeader, **facts: object) -> SampledRow:
    found = SampledRow("0:0", (0, 0), kind_of([one.kind for one in media]), max_tokens=100)
    found.num_visual_tokens = sum(one.size.num_visual_tokens for one in media)
    found.num_prompt_tokens = found.num_visual_tokens + 25
    add_costs(found, media)
    return replace(found, **facts)  # type: ignore[arg-type]


BAD = SampledRow("0:0", (0, 0), error=MediaNotFound("gone"))


def whole(rows: list[SampledRow], num_rows: int | None = None) -> Sample:
    """A manifest of `num_rows` that consists of these rows, repeated."""
    return Sample(rows, num_rows or len(rows), is_whole=True)


def gpu(name: str) -> Gpu:
    found = find_gpu(name)
    assert found is not None
    return found


def times_of(sample: Sample, model: str, name: str, engines: Engines, output_share: float | None = None) -> Times:
    share = {} if output_share is None else {"output_share": Range.exactly(output_share)}
    rows = describe(sample)
    return from_data_sheet(
        sample, rows, SHAPES[model], gpu(name), engines, max_running=256, cache_tokens=10**6, **share
    )


def test_time_by_data_sheet_is_the_bound_over_the_stated_share_of_it() -> None:
    times = times_of(whole([row(PHOTO)] * 10, 1000), "2b", "H200", Engines(1, 1), output_share=1)
    bound = 10 * row_seconds(SHAPES["2b"], gpu("H200"), RowWork([(1, 74, 74)], 1394, 100), running=256) * 100
    assert times.seconds.low == pytest.approx(bound / EFFICIENCY.high)
    assert times.seconds.high == pytest.approx(bound / EFFICIENCY.low)
    assert times.seconds.low < times.seconds.value < times.seconds.high
    assert sum(times.shares.values()) == pytest.approx(1) and times.shares["vision"] > 0.6
    assert "not a measurement" in times.basis and times.cost is None
    # 1.05 MP of JPEG and 1.07 MP shown: 9.5 ms of a core, as measured.
    assert 1 / times.preprocess_rows_per_s_per_core.value == pytest.approx(9.5e-3, rel=0.02)
    cores = times.engine_rows_per_s.high * 9.5e-3 * CORE_FACTOR.high
    assert times.cores_per_engine.high == pytest.approx(cores, rel=0.02)


def test_more_gpus_take_less_time_at_the_same_cost_and_the_gpus_of_one_engine_take_turns() -> None:
    def times(engines: Engines) -> tuple[float, float]:
        found = times_of(whole([row(PHOTO)] * 10, 100_000), "7b", "H100", engines)
        assert found.cost is not None
        return found.seconds.value, found.cost.value

    one, eight, pair = times(Engines(1, 1, None, 3.0)), times(Engines(8, 1, None, 3.0)), times(Engines(1, 2, None, 3.0))
    assert one[0] == pytest.approx(8 * eight[0]) and one[1] == pytest.approx(eight[1])
    assert pair[0] == pytest.approx(one[0]) and pair[1] == pytest.approx(2 * one[1])


def test_few_cores_make_preprocessing_the_bottleneck_and_many_cores_the_engine() -> None:
    def at(cores: float | None) -> tuple[str, float]:
        times = times_of(whole([row(CLIP)] * 10, 10_000), "2b", "H200", Engines(1, 1, cores))
        return times.bottleneck, times.seconds.value

    few, many, unlimited = at(1), at(500), at(None)
    assert few[0].startswith("preprocessing: 1 core, ")
    assert many[0].startswith("the engine")
    assert re.fullmatch(r"the engine, as long as preprocessing has at least \d+ cores \(.*\)", unlimited[0])
    assert few[1] > 3 * many[1] and many[1] == unlimited[1]


def test_long_answers_move_the_work_to_decoding() -> None:
    def decode_share(max_tokens: int) -> float:
        sample = whole([row(num_prompt_tokens=50, max_tokens=max_tokens)])
        return times_of(sample, "2b", "L4", Engines(1, 1)).shares["decode"]

    assert decode_share(8) < 0.1 < 0.9 < decode_share(2000)


def test_a_probe_is_scaled_to_the_manifest_with_the_spread_of_its_pieces() -> None:
    sample = whole([row(PHOTO)] * 8 + [BAD] * 2, 10_000)
    pre = [Measured(16, 0.16), Measured(16, 0.32)]
    engine = [Measured(8, 0.8), Measured(8, 1.6)]
    times = from_probe(sample, pre, engine, Engines(1, 0), hardware="here", num_shared_cores=2)
    in_a_loop = 8_000 * 0.15 + 10_000 * 0.015 / 2  # rows that fail cost no engine
    assert times.seconds.value == pytest.approx(in_a_loop / 0.75)
    assert 0 < times.seconds.low < in_a_loop < times.seconds.high
    assert "measured here" in times.basis and "share" in times.bottleneck
    on_gpu = from_probe(sample, pre, engine, Engines(2, 1, 16, 2.0), hardware="gpu")
    assert on_gpu.seconds.value == pytest.approx(8_000 * 0.15 / 2 / 0.75)
    assert on_gpu.cost is not None and on_gpu.cost.value == pytest.approx(2 * 2.0 * on_gpu.seconds.value / 3600)


def test_the_object_store_holds_no_more_than_all_patches() -> None:
    few, many = describe(whole([row(PHOTO)] * 2)), describe(whole([row(PHOTO)] * 2, 1_000_000))
    small, large = (object_store(rows, block_bytes=128e6, blocks_in_flight=32, num_engines=1) for rows in (few, many))
    assert small.bytes_per_engine == 2 * 5476 * 588
    assert large.bytes_per_engine == 36 * (128e6 + 5476 * 588)


def test_suggested_settings_are_those_that_would_help() -> None:
    long = row(CLIP, CLIP, CLIP, CLIP, error=PromptTooLong("long"), num_prompt_tokens=63_505, max_tokens=500)
    denied = SampledRow("0:0", (0, 0), error=AccessDenied("x is outside"))
    short = row(medium("video", 1280, 720, 4, 900))
    sample = whole([short] * 8 + [long, denied])
    rows, times = describe(sample), times_of(sample, "2b", "H200", Engines(1, 1))
    advice = advise(sample, rows, times, Engines(1, 1), Engines(1, 2), max_length=32_768, rows_per_unit=8)
    settings = [one.setting for one in advice]
    assert f"--media.max_visual_tokens {32_768 - 500 - (63_505 - long.num_visual_tokens)}" in settings
    assert "--resources.gpus_per_engine 2" in settings
    assert "--input.allow [PLACE, ...]" in settings
    assert "--run.max_error_fraction 0.4" in settings
    assert "--media.video_frames keyframes" in settings
    assert any(setting.startswith("--resources.preprocess_actors ") for setting in settings)
    text = whole([row()] * 4)
    nothing = advise(text, describe(text), None, Engines(1, 0), Engines(1, 0), max_length=32_768, rows_per_unit=8)
    assert list(nothing) == []


@pytest.mark.parametrize("num_bad", [5, 9, 10])
def test_where_most_rows_fail_no_cap_is_suggested_but_to_fix_them(num_bad: int) -> None:
    sample = whole([row(PHOTO)] * (10 - num_bad) + [BAD] * num_bad)
    rows = describe(sample)
    (advice,) = advise(sample, rows, None, Engines(1, 0), Engines(1, 0), max_length=32_768, rows_per_unit=8)
    assert advice.setting == "" and advice.why == f"{10 * num_bad}% of the rows will fail: fix them before the run"


def test_no_more_preprocessing_actors_are_suggested_than_the_rows_can_keep_busy() -> None:
    def suggested(num_rows: int, cpus: float | None = None) -> list[str]:
        sample, engines = whole([row(CLIP)] * 4, num_rows), Engines(64, 1, cpus)
        rows, times = describe(sample), times_of(sample, "2b", "H200", engines)
        advice = advise(sample, rows, times, engines, engines, max_length=32_768, rows_per_unit=8)
        return [f"{one.setting}: {one.why}" for one in advice if "preprocess_actors" in one.setting]

    assert suggested(56) == ["--resources.preprocess_actors 7: one core each; more would find no rows to work on"]
    assert suggested(56, cpus=7) == []
    (many,) = suggested(1_000_000)
    assert many.endswith(": one core each, so that no GPU waits")
