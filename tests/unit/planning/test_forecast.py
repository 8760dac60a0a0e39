"""A plan's arithmetic: totals and their ranges, kinds, errors, time, bottleneck, advice."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from pipeline.planning.forecast import (
    CORE_RANGE,
    EFFICIENCY_RANGE,
    Engines,
    Measured,
    MediumFacts,
    RowFacts,
    Sample,
    advise,
    describe,
    from_data_sheet,
    from_probe,
    histogram,
    kind_of,
    object_store,
)
from pipeline.planning.roofline import SHAPES, Gpu, RowWork, find_gpu, row_seconds

PHOTO = MediumFacts("image", (1, 74, 74), 1024 * 1024, 1, 1, 200_000)
CLIP = MediumFacts("video", (30, 46, 46), 1280 * 720, 900, 60, 9_000_000)


def row(media: tuple[MediumFacts, ...] = (PHOTO,), **facts: object) -> RowFacts:
    visual = sum(medium.num_patches // 4 for medium in media)
    values = {
        "id": "0:0",
        "place": (0, 0),
        "kind": kind_of([medium.kind for medium in media]),
        "media": media,
        "num_prompt_tokens": visual + 25,
        "num_visual_tokens": visual,
        "max_tokens": 100,
    }
    return RowFacts(**{**values, **facts})  # type: ignore[arg-type]


BAD = row((), error_type="MediaNotFound", error_message="gone", num_prompt_tokens=0)


def gpu(name: str) -> Gpu:
    found = find_gpu(name)
    assert found is not None
    return found


def test_a_whole_manifest_gives_exact_figures_without_a_range() -> None:
    rows = describe(Sample([[row()] * 3, [row(()), BAD]], 5, is_whole=True))
    total = rows.visual_tokens.total
    assert total.low == total.value == total.high == 3 * 1369
    assert rows.visual_tokens.mean.value == 3 * 1369 / 4  # the bad row has no tokens to count
    assert {kind: count.value for kind, count in rows.kinds.items()} == {"text": 2, "one image": 3}
    assert rows.num_bad.value == 1 and rows.bad[0].example_message == "gone"
    assert rows.patch_bytes.total.value == 3 * 5476 * 588
    assert rows.media_bytes.value == 600_000


def test_ranges_of_a_sample_hold_the_truth_about_as_often_as_they_say() -> None:
    dice = random.Random(0)
    manifest = [
        row(num_visual_tokens=dice.choice((0, 100, 400, 2000)), num_prompt_tokens=10)
        if dice.random() < 0.9
        else replace(BAD, place=(0, 1))
        for _ in range(20_000)
    ]
    truth = sum(one.num_visual_tokens for one in manifest)
    bad = sum(not one.is_ok for one in manifest)
    held = held_bad = 0
    for seed in range(60):
        draws = random.Random(seed)
        starts = [draws.randrange(0, 20_000 - 8) for _ in range(64)]
        rows = describe(Sample([manifest[start : start + 8] for start in starts], 20_000, is_whole=False, seed=seed))
        held += rows.visual_tokens.total.low <= truth <= rows.visual_tokens.total.high
        held_bad += rows.num_bad.low <= bad <= rows.num_bad.high
    assert held >= 52 and held_bad >= 52  # 57 of 60 are expected


def test_neighbours_that_are_alike_widen_the_range() -> None:
    alike = [[row(num_visual_tokens=value)] * 16 for value in (0, 1000) * 16]
    mixed = [[row(num_visual_tokens=value) for value in (0, 1000) * 8] for _ in range(32)]

    def width(runs: list[list[RowFacts]]) -> float:
        total = describe(Sample(runs, 100_000, is_whole=False)).visual_tokens.total
        return total.high - total.low

    assert width(alike) > 10 * width(mixed)


def test_a_sample_without_errors_does_not_promise_that_there_are_none() -> None:
    rows = describe(Sample([[row()] * 16] * 8, 1_000_000, is_whole=False))
    assert rows.num_bad.value == 0 and 10_000 < rows.num_bad.high < 50_000


def test_kinds_of_rows() -> None:
    found = [kind_of(media) for media in ([], ["image"], ["image"] * 2, ["video"], ["video"] * 2, ["image", "video"])]
    assert found == ["text", "one image", "several images", "video", "several videos", "images and videos"]


def test_histogram_bins_hold_every_row_once() -> None:
    values = [0, 1, 5, 7, 8, 1369, 1369]
    bins = histogram(values)
    assert sum(count for _, _, count in bins) == len(values)
    assert bins[0] == (0, 0, 1) and bins[-1] == (1024, 2047, 2) and (4, 7, 2) in bins and (16, 31, 0) in bins


def test_time_by_data_sheet_is_the_bound_over_the_stated_share_of_it() -> None:
    sample = Sample([[row()] * 10], 1000, is_whole=True)
    h200 = gpu("H200")
    times = from_data_sheet(
        sample, SHAPES["2b"], h200, Engines(1, 1), max_running=256, cache_tokens=10**6, output_share=(1, 1, 1)
    )
    bound = 10 * row_seconds(SHAPES["2b"], RowWork(((1, 74, 74),), 1394, 100), h200, running=256) * 100
    assert times.seconds.low == pytest.approx(bound / EFFICIENCY_RANGE[1])
    assert times.seconds.high == pytest.approx(bound / EFFICIENCY_RANGE[0])
    assert times.seconds.low < times.seconds.value < times.seconds.high
    assert sum(times.shares.values()) == pytest.approx(1) and times.shares["vision"] > 0.6
    assert "not a measurement" in times.basis and times.cost is None
    # 1.05 MP of JPEG and 1.07 MP shown: 9.5 ms of a core, as measured.
    assert 1 / times.preprocess_rows_per_s_per_core.value == pytest.approx(9.5e-3, rel=0.02)
    assert times.cores_per_engine.high == pytest.approx(times.engine_rows_per_s.high * 9.5e-3 * CORE_RANGE[1], rel=0.02)


def test_more_gpus_take_less_time_at_the_same_cost_and_sharded_ones_take_turns() -> None:
    sample = Sample([[row()] * 10], 100_000, is_whole=True)

    def times(engines: Engines) -> tuple[float, float]:
        found = from_data_sheet(sample, SHAPES["7b"], gpu("H100"), engines, max_running=256, cache_tokens=500_000)
        assert found.cost is not None
        return found.seconds.value, found.cost.value

    one, eight, pair = times(Engines(1, 1, None, 3.0)), times(Engines(8, 1, None, 3.0)), times(Engines(1, 2, None, 3.0))
    assert one[0] == pytest.approx(8 * eight[0]) and one[1] == pytest.approx(eight[1])
    assert pair[0] == pytest.approx(one[0]) and pair[1] == pytest.approx(2 * one[1])


def test_the_bottleneck_is_preprocessing_where_cores_are_few_and_the_engine_where_they_are_many() -> None:
    sample = Sample([[row((CLIP,))] * 10], 10_000, is_whole=True)

    def at(cores: float | None) -> tuple[str, float]:
        times = from_data_sheet(
            sample, SHAPES["2b"], gpu("H200"), Engines(1, 1, cores), max_running=256, cache_tokens=10**6
        )
        return times.bottleneck, times.seconds.value

    few, many, free = at(1), at(500), at(None)
    assert few[0].startswith("preprocessing") and many[0].startswith("the engine") and free[0].startswith("the engine")
    assert few[1] > 3 * many[1] and many[1] == free[1]


def test_long_answers_move_the_work_to_decoding() -> None:
    def decode_share(max_tokens: int) -> float:
        sample = Sample([[row((), num_prompt_tokens=50, max_tokens=max_tokens)]], 1, is_whole=True)
        times = from_data_sheet(sample, SHAPES["2b"], gpu("L4"), Engines(1, 1), max_running=64, cache_tokens=10**5)
        return times.shares["decode"]

    assert decode_share(8) < 0.1 < 0.9 < decode_share(2000)


def test_a_probe_is_scaled_to_the_manifest_with_the_spread_of_its_pieces() -> None:
    sample = Sample([[row()] * 8, [BAD] * 2], 10_000, is_whole=True)
    pre = [Measured(16, 0.16), Measured(16, 0.32)]
    engine = [Measured(8, 0.8), Measured(8, 1.6)]
    times = from_probe(sample, pre, engine, Engines(1, 0), hardware="here", shares_cores=True, num_cpus=2)
    in_a_loop = 8_000 * 0.15 + 10_000 * 0.015 / 2  # rows that fail cost no engine
    assert times.seconds.value == pytest.approx(in_a_loop / 0.75)
    assert times.seconds.low < in_a_loop < times.seconds.high
    assert "measured here" in times.basis and "share" in times.bottleneck
    on_gpu = from_probe(sample, pre, engine, Engines(2, 1, None, 2.0), hardware="gpu", shares_cores=False, num_cpus=16)
    assert on_gpu.seconds.value == pytest.approx(8_000 * 0.15 / 2 / 0.75)
    assert on_gpu.cost is not None and on_gpu.cost.value == pytest.approx(2 * 2.0 * on_gpu.seconds.value / 3600)


def test_the_store_holds_no_more_than_there_is() -> None:
    few = describe(Sample([[row()] * 2], 2, is_whole=True))
    many = describe(Sample([[row()] * 2], 1_000_000, is_whole=True))
    small, large = (object_store(rows, block_bytes=128e6, blocks_in_flight=32, num_engines=1) for rows in (few, many))
    assert small.bytes_per_engine == 2 * PHOTO.patch_bytes
    assert large.bytes_per_engine == 36 * (128e6 + PHOTO.patch_bytes)


def test_advice_names_settings_that_would_help() -> None:
    long = row((CLIP,) * 4, error_type="PromptTooLong", error_message="long", num_prompt_tokens=63_505, max_tokens=500)
    denied = row((), error_type="AccessDenied", error_message="x is outside")
    short = row((replace(CLIP, grid_thw=(8, 20, 20), num_shown=16),))
    sample = Sample([[short] * 8 + [long, denied]], 10, is_whole=True)
    rows = describe(sample)
    engines = Engines(1, 1)
    times = from_data_sheet(sample, SHAPES["2b"], gpu("H200"), engines, max_running=256, cache_tokens=10**6)
    settings = [one.setting for one in advise(sample, rows, times, engines, longest=32_768, gpus_needed=2)]
    visual = long.num_visual_tokens
    assert f"--media.max_visual_tokens {32_768 - 500 - (63_505 - visual)}" in settings
    assert "--resources.gpus_per_engine 2" in settings
    assert "--input.allow PLACE,..." in settings
    assert "--run.max_error_fraction 0.4" in settings
    assert "--media.video_frames keyframes" in settings
    assert any(setting.startswith("--resources.preprocess_actors ") for setting in settings)
    fine = Sample([[row(())] * 4], 4, is_whole=True)
    assert advise(fine, describe(fine), None, Engines(1, 0), longest=32_768, gpus_needed=None) == []


def test_a_manifest_without_rows_has_a_plan_too() -> None:
    rows = describe(Sample([], 0, is_whole=True))
    assert rows.num_rows == 0 and rows.visual_tokens.total.value == 0 and rows.bad == ()
