"""Figures of a whole manifest from a sample of its rows: totals and their ranges, kinds, errors, histograms."""

from __future__ import annotations

import random

from pipeline.errors import MediaNotFound
from pipeline.planning.sample import CORE_FACTOR, Range, Sample, SampledRow, describe, histogram, kind_of


def row(visual_tokens: int = 1369, number: int = 0, kind: str = "one image", **facts: object) -> SampledRow:
    values = {"num_prompt_tokens": visual_tokens + 25, "num_visual_tokens": visual_tokens, "max_tokens": 100}
    return SampledRow("0:0", (0, number), kind, **{**values, **facts})  # type: ignore[arg-type]


def bad_row(number: int = 0) -> SampledRow:
    return SampledRow("0:0", (0, number), error=MediaNotFound("gone"))


def test_ranges_combine_their_extremes_and_dividing_by_zero_gives_zero() -> None:
    one, two = Range(2, 1, 4), Range(10, 5, 20)
    assert one + two == Range(12, 6, 24) and one * two == Range(20, 5, 80)
    assert one * 3 == Range(6, 3, 12) and one / 2 == Range(1, 0.5, 2)
    assert two / one == Range(5, 1.25, 20)
    assert two / Range.exactly(0) == Range(0, 0, 0)
    assert one.at_least(Range(1, 3, 5)) == Range(2, 3, 5)


def test_a_whole_manifest_gives_exact_figures_without_a_range() -> None:
    image = row(patch_bytes=5476 * 588, media_bytes=200_000, core_s=9.5e-3)
    rows = describe(Sample([image, image, image, row(0, kind="text"), bad_row()], 5, is_whole=True))
    total = rows.visual_tokens.total
    assert total.low == total.value == total.high == 3 * 1369
    assert rows.visual_tokens.mean.value == 3 * 1369 / 4  # the bad row has no tokens to count
    assert {kind: count.value for kind, count in rows.kinds.items()} == {"text": 1, "one image": 3, "unreadable": 1}
    assert rows.num_bad.value == 1 and rows.bad[0].example_message == "gone"
    assert rows.patch_bytes.total.value == 3 * 5476 * 588
    assert rows.media_bytes.value == 600_000
    assert rows.core_s == Range.exactly(3 * 9.5e-3) * CORE_FACTOR


def test_ranges_of_a_sample_contain_the_truth_in_about_95_of_100_samples() -> None:
    rng = random.Random(0)
    manifest = [
        row(rng.choice((0, 100, 400, 2000)), number) if rng.random() < 0.9 else bad_row(number)
        for number in range(20_000)
    ]
    truth = sum(one.num_visual_tokens for one in manifest)
    bad = sum(not one.is_ok for one in manifest)
    contained = contained_bad = 0
    for seed in range(60):
        draws = random.Random(seed)
        starts = [draws.randrange(0, 20_000 - 8) for _ in range(64)]
        rows = describe(
            Sample([one for start in starts for one in manifest[start : start + 8]], 20_000, is_whole=False)
        )
        contained += rows.visual_tokens.total.low <= truth <= rows.visual_tokens.total.high
        contained_bad += rows.num_bad.low <= bad <= rows.num_bad.high
    assert contained >= 52 and contained_bad >= 52  # 57 of 60 are expected


def test_neighbours_that_are_alike_widen_the_range() -> None:
    alike = [row(1000 * (number // 16 % 2), number) for number in range(512)]
    mixed = [row(1000 * (number % 2), number) for number in range(512)]

    def width(rows: list[SampledRow]) -> float:
        total = describe(Sample(rows, 100_000, is_whole=False)).visual_tokens.total
        return total.high - total.low

    assert width(alike) > 10 * width(mixed)


def test_a_sample_without_errors_leaves_room_for_errors() -> None:
    rows = describe(Sample([row(number=number) for number in range(128)], 1_000_000, is_whole=False))
    assert rows.num_bad.value == 0 and 10_000 < rows.num_bad.high < 50_000


def test_kinds_of_rows() -> None:
    found = [kind_of(media) for media in ([], ["image"], ["image"] * 2, ["video"], ["video"] * 2, ["image", "video"])]
    assert found == ["text", "one image", "several images", "video", "several videos", "images and videos"]


def test_histogram_bins_hold_every_row_once() -> None:
    values = [0, 1, 5, 7, 8, 1369, 1369]
    bins = histogram(values)
    assert sum(count for _, _, count in bins) == len(values)
    assert bins[0] == (0, 0, 1) and bins[-1] == (1024, 2047, 2) and (4, 7, 2) in bins and (16, 31, 0) in bins


def test_a_manifest_without_rows_has_a_description() -> None:
    rows = describe(Sample([], 0, is_whole=True))
    assert rows.num_rows == 0 and rows.visual_tokens.total.value == 0 and rows.bad == ()
