"""The values of a slice: groups of rows whose scores are shown separately.

A slice is a column of the result rows, or is derived from the receipts of the row's media. Knows record batches.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.evaluation.columns import text_column

DERIVED_SLICES = ("media_kind", "num_media", "resolution_bucket")
"""Derived from the receipts, unless the user has a column of that name."""
OTHER = "(other)"
"""All values beyond the largest number of values that are shown."""

# In the order in which they are listed.
_KINDS = ("text only", "one image", "several images", "one video", "several videos", "images and videos")
_RESOLUTIONS = ("no media", "below 0.25 MP", "0.25 to 1 MP", "1 to 4 MP", "4 MP and more")


def slice_values(batch: pa.RecordBatch, name: str) -> list[str]:
    """Each row's value as text; `(none)` for null."""
    if name in DERIVED_SLICES and name not in batch.schema.names:
        return _derived_values(batch.column("media"), name)
    values: list[str] = text_column(batch, name).fill_null("(none)").to_pylist()
    return values


def _derived_values(media: pa.ListArray, name: str) -> list[str]:
    counts = np.asarray(pc.fill_null(pc.list_value_length(media), 0), np.int64)
    if name == "num_media":
        return [str(count) for count in counts]
    flat, rows = media.flatten(), np.repeat(np.arange(len(media)), counts)
    if name == "media_kind":
        is_video = np.asarray(pc.fill_null(pc.equal(pc.struct_field(flat, "kind"), "video"), False))
        videos = np.bincount(rows[is_video], minlength=len(media))
        images = counts - videos
        conditions = [counts == 0, (images > 0) & (videos > 0), videos > 1, videos == 1, images > 1]
        return [_KINDS[code] for code in np.select(conditions, [0, 5, 4, 3, 2], 1)]
    width, height = (
        np.asarray(pc.fill_null(pc.struct_field(flat, f"source_{side}"), 0), np.float64) for side in ("width", "height")
    )
    largest = np.zeros(len(media))
    np.maximum.at(largest, rows, width * height / 1e6)
    codes = np.where(counts == 0, 0, 1 + np.searchsorted([0.25, 1.0, 4.0], largest, side="right"))
    return [_RESOLUTIONS[code] for code in codes]


def slice_order(value: str) -> tuple[int, float, str]:
    """Sort key: kinds and resolutions in their own order and numbers by size, then other texts, `(other)` last."""
    for known in (_RESOLUTIONS, _KINDS):
        if value in known:
            return (0, known.index(value), value)
    try:
        return (0, float(value), value)
    except ValueError:
        return (2 if value == OTHER else 1, 0.0, value)
