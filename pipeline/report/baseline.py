"""What a report says of a second run over the same rows, beyond the scores: answers that agree, speed, settings.

Holds 16 bytes a row of each run. Knows two run folders; the comparison of scores is computed elsewhere and handed in.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from pipeline.report.facts import Speed, setting_differences, speed
from pipeline.results.reader import Ints, Position, RunReader, place_keys
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW


@dataclass(frozen=True)
class Agreement:
    """How many rows both runs have, and how many of those have the same text and status."""

    num_shared: int
    num_same: int


@dataclass(frozen=True)
class OtherRun:
    """The baseline's side of the page."""

    name: str
    path: str
    num_rows: int
    agreement: Agreement
    speed: Speed
    settings: tuple[tuple[str, str, str], ...]
    texts: dict[int, str]
    """Its answers of the rows that were asked for, by place key."""


def read_other_run(
    reader: RunReader, other: RunReader, places: Collection[int], *, price_per_gpu_hour: float | None
) -> OtherRun:
    """Reads what the page needs of the other run."""
    return OtherRun(
        name=other.name,
        path=other.path,
        num_rows=other.num_rows,
        agreement=_agreement(reader, other),
        speed=speed(other.run, price_per_gpu_hour=price_per_gpu_hour),
        settings=tuple(setting_differences(reader.run.get("config") or {}, other.run.get("config") or {})),
        texts=_texts(other, places),
    )


def _agreement(reader: RunReader, other: RunReader) -> Agreement:
    keys, answers = _answers(reader)
    other_keys, other_answers = _answers(other)
    _, mine, theirs = np.intersect1d(keys, other_keys, return_indices=True)
    return Agreement(len(mine), int((answers[mine] == other_answers[theirs]).sum()))


def _answers(reader: RunReader) -> tuple[Ints, Ints]:
    """Places, and a hash of each row's text; an error row's text is its error type."""
    import pandas as pd  # only for its vectorised hash of strings

    keys: list[Ints] = [np.zeros(0, np.int64)]
    hashes: list[Ints] = [np.zeros(0, np.int64)]
    for one in reader.batches((MANIFEST_FILE, MANIFEST_ROW, "text", "error_type")):
        keys.append(place_keys(one.batch))
        texts = one.batch.column("text").fill_null("").to_numpy(zero_copy_only=False)
        errors = one.batch.column("error_type").fill_null("").to_numpy(zero_copy_only=False)
        both = pd.util.hash_array(texts) ^ (pd.util.hash_array(errors) << np.uint64(1))
        hashes.append(both.astype(np.int64))
    return np.concatenate(keys), np.concatenate(hashes)


def _texts(other: RunReader, places: Collection[int]) -> dict[int, str]:
    wanted = np.array(sorted(places), np.int64)
    if not len(wanted):
        return {}
    found: dict[int, Position] = {}
    for one in other.batches((MANIFEST_FILE, MANIFEST_ROW)):
        keys = place_keys(one.batch)
        for index in np.flatnonzero(np.isin(keys, wanted)):
            found[int(keys[index])] = Position(one.file, int(one.rows[index]))
    rows = other.fetch(set(found.values()))
    return {
        key: str(rows[position].get("text") or rows[position].get("error_message") or "")
        for key, position in found.items()
    }
