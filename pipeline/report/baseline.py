"""A run beside another run over the same rows, apart from their scores: answers that agree, speed, settings.

Holds 16 bytes a row of each run. Knows two run folders; not pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.evaluation.comparison import same_manifest
from pipeline.manifest.files import MEDIA
from pipeline.report.facts import Speed, at, setting_differences, speed, text_at
from pipeline.results.reader import Ints, RunReader, row_keys
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW


@dataclass(frozen=True)
class Baseline:
    """The other run's side of the page."""

    name: str
    num_rows: int
    other_manifest: bool
    """Whether the rows are of another manifest, so that their ids pair them and not their places."""
    num_shared: int
    """Rows that both runs have."""
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
    by_id = not same_manifest(reader, other)
    (own_keys, own_answers), (other_keys, other_answers) = (_answers(one, by_id=by_id) for one in (reader, other))
    _, mine, theirs = np.intersect1d(own_keys, other_keys, assume_unique=True, return_indices=True)
    numbers = other.find(set(keys.values()))
    rows = other.fetch(numbers.values())
    return Baseline(
        name=other.name,
        num_rows=other.num_rows,
        other_manifest=by_id and not _same_media(reader.run, other.run),
        num_shared=len(mine),
        num_same=int((own_answers[mine] == other_answers[theirs]).sum()),
        speed=speed(other.run, price_per_gpu_hour=price_per_gpu_hour),
        settings=tuple(setting_differences(at(reader.run, "config") or {}, at(other.run, "config") or {})),
        texts={
            key: str(rows[numbers[theirs]].get("text") or rows[numbers[theirs]].get("error_message") or "")
            for key, theirs in keys.items()
            if theirs in numbers
        },
    )


def _same_media(run: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether both runs are over one folder of media. Each lists it anew, and a row's id is its medium's name there."""
    folders = [(at(one, "manifest.fingerprint.format"), text_at(one, "manifest.path")) for one in (run, other)]
    return folders[0] == folders[1] and folders[0][0] == MEDIA


def _answers(reader: RunReader, *, by_id: bool) -> tuple[Ints, Ints]:
    """What pairs the rows (their keys, or hashes of ids that no other row has), and a hash of each row's text; an error
    row's text is its error type."""
    found, hashes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for batch in reader.batches(("id", MANIFEST_FILE, MANIFEST_ROW, "text", "error_type")):
        batch = batch.filter(batch.column("id").is_valid()) if by_id else batch
        texts, errors = (_hashes(batch, name) for name in ("text", "error_type"))
        found.append(_hashes(batch, "id") if by_id else row_keys(batch))
        hashes.append(texts ^ (errors << 1))
    keys, answers = np.concatenate(found), np.concatenate(hashes)
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    return keys[first[counts == 1]], answers[first[counts == 1]]


def _hashes(batch: pa.RecordBatch, name: str) -> Ints:
    import pandas as pd  # only for its vectorised hash of strings

    texts = batch.column(name).fill_null("").to_numpy(zero_copy_only=False)
    hashes: Ints = pd.util.hash_array(texts).astype(np.int64)
    return hashes
