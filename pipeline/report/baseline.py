"""A run beside another run over the same rows, apart from their scores: answers that agree, speed, settings.

Holds 16 bytes a row of each run. Knows two run folders; not pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.comparison import same_manifest
from pipeline.report.facts import Speed, at, setting_differences, speed
from pipeline.results.reader import Ints, RunReader, row_keys
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW


@dataclass(frozen=True)
class Baseline:
    """The other run's side of the page."""

    name: str
    num_rows: int
    num_shared: int | None
    """Rows that both runs have; None where their manifests differ."""
    num_same: int
    """Those of them with the same text and status."""
    speed: Speed
    settings: tuple[tuple[str, str, str], ...]
    """(name, baseline, this run) of the settings that differ."""
    texts: dict[int, str]
    """Its answers to the rows that were asked for, by this run's row keys."""


def read_baseline(
    reader: RunReader, other: RunReader, keys: Mapping[int, int], *, price_per_gpu_hour: float | None
) -> Baseline:
    """Reads what the page shows of the other run. `keys` are those of its rows by this run's."""
    num_shared, num_same = None, 0
    if same_manifest(reader.run, other.run):
        own_keys, own_answers = _answers(reader)
        other_keys, other_answers = _answers(other)
        _, mine, theirs = np.intersect1d(own_keys, other_keys, return_indices=True)
        num_shared, num_same = len(mine), int((own_answers[mine] == other_answers[theirs]).sum())
    numbers = other.find(set(keys.values()))
    rows = other.fetch(numbers.values())
    return Baseline(
        name=other.name,
        num_rows=other.num_rows,
        num_shared=num_shared,
        num_same=num_same,
        speed=speed(other.run, price_per_gpu_hour=price_per_gpu_hour),
        settings=tuple(setting_differences(at(reader.run, "config") or {}, at(other.run, "config") or {})),
        texts={
            key: str(rows[numbers[theirs]].get("text") or rows[numbers[theirs]].get("error_message") or "")
            for key, theirs in keys.items()
            if theirs in numbers
        },
    )


def _answers(reader: RunReader) -> tuple[Ints, Ints]:
    """Row keys, and a hash of each row's text; an error row's text is its error type."""
    import pandas as pd  # only for its vectorised hash of strings

    keys, hashes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for batch in reader.batches((MANIFEST_FILE, MANIFEST_ROW, "text", "error_type")):
        texts, errors = (
            pd.util.hash_array(batch.column(name).fill_null("").to_numpy(zero_copy_only=False))
            for name in ("text", "error_type")
        )
        keys.append(row_keys(batch))
        hashes.append((texts ^ (errors << np.uint64(1))).astype(np.int64))
    return np.concatenate(keys), np.concatenate(hashes)
