"""Two scored runs compared row by row.

Holds the scores of both runs' rows as arrays; text is never loaded, ids only where they pair the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline import storage
from pipeline.evaluation.interval import compare
from pipeline.evaluation.metrics.registry import METRICS, require
from pipeline.results.reader import RunReader, row_keys
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW

_BASELINE = " of the baseline"


def compare_folders(
    run: str, baseline: str, *, storage_options: storage.StorageOptions = None, num_samples: int = 1_000, seed: int = 0
) -> dict[str, Any] | None:
    """Paired comparison of two scored runs, as plain values for metrics.json; None if either has no scores.

    Rows are paired by row key, or by id if the manifests differ.
    """
    mine, theirs = RunReader(run, storage_options), RunReader(baseline, storage_options)
    if not (mine.has_scores and theirs.has_scores):
        return None
    by_id = not _same_manifest(mine.run, theirs.run)
    columns = ["id"] * by_id + [MANIFEST_FILE, MANIFEST_ROW, "task", "score", *METRICS]
    batches = [reader.score_batches(columns) for reader in (mine, theirs)]
    found = compare_runs(*batches, by_id=by_id, num_samples=num_samples, seed=seed)
    return {"run": storage.absolute(baseline), "paired_by": "id" if by_id else "place", **found}


def _same_manifest(run: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether both runs' row keys mean the same rows; assumed if a run has recorded no fingerprint."""
    found = [(one.get("manifest") or {}).get("fingerprint") for one in (run, other)]
    return found[0] == found[1] or None in found


def compare_runs(
    candidate: Iterable[pa.RecordBatch],
    baseline: Iterable[pa.RecordBatch],
    *,
    by_id: bool = False,
    num_examples: int = 8,
    num_samples: int = 1_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares two runs' score rows: by metric, and by task over each row's own score; plain values for JSON.

    `won` and `lost` are the row keys of the rows that gained and lost most; `ambiguous_candidate` and
    `ambiguous_baseline` count the rows left out because their id is null or not unique.
    Raises ConfigError if scipy is missing.
    """
    require("scipy", "the comparison with a baseline")
    mine, num_ambiguous = _score_table(candidate, by_id)
    theirs, num_ambiguous_baseline = _score_table(baseline, by_id)
    both = mine.join(theirs, how="inner", rsuffix=_BASELINE).sort_index()
    pairs = {name: both[[name, name + _BASELINE]] for name in mine.columns if name in METRICS and name in theirs}
    scores = both[["score", f"score{_BASELINE}"]]
    gains = (scores.iloc[:, 0] - scores.iloc[:, 1]).sort_values(kind="stable")
    extremes = {"won": gains[gains > 0][::-1], "lost": gains[gains < 0]}
    return {
        "metrics": _compared(pairs.items(), num_samples, seed),
        "tasks": _compared(scores.groupby(both["task"], observed=True), num_samples, seed),
        "only_candidate": len(mine) - len(both),
        "only_baseline": len(theirs) - len(both),
        "ambiguous_candidate": num_ambiguous,
        "ambiguous_baseline": num_ambiguous_baseline,
        **{
            name: both.loc[rows.index[:num_examples], [MANIFEST_FILE, MANIFEST_ROW]].to_numpy().tolist()
            for name, rows in extremes.items()
        },
    }


def _compared(pairs: Iterable[tuple[Any, pd.DataFrame]], num_samples: int, seed: int) -> dict[str, Any]:
    """Comparisons by name of [rows, 2] scores; without rows that only one run has scored."""
    found = {}
    for name, scores in pairs:
        mine, theirs = scores.dropna().to_numpy(np.float64).T
        if len(mine):
            comparison = compare(mine, theirs, num_samples, seed)
            found[str(name)] = {**asdict(comparison), "verdict": comparison.verdict}
    return found


def _score_table(batches: Iterable[pa.RecordBatch], by_id: bool) -> tuple[pd.DataFrame, int]:
    """Score rows indexed by what pairs them, as one number; and how many rows no id pairs: null, or not unique.

    A row that occurs twice, as in the fragments of an unfinished run, counts once.
    """
    parts, keys, hashes = [], [], []
    for batch in batches:
        parts.append(batch.select([name for name in batch.schema.names if name not in ("id", "metric")]))
        keys.append(row_keys(batch))
        if by_id:
            ids = batch.column("id").to_numpy(zero_copy_only=False)
            hashes.append(np.where(pd.isna(ids), 0, pd.util.hash_array(ids).astype(np.int64)))
    if not parts:
        return pd.DataFrame({name: [] for name in (MANIFEST_FILE, MANIFEST_ROW, "task", "score")}), 0
    table: pd.DataFrame = pa.Table.from_batches(parts).to_pandas(categories=["task"])
    places = pd.Index(np.concatenate(keys))
    table.index = pd.Index(np.concatenate(hashes)) if by_id else places
    table = table[~places.duplicated()]
    unique = ~table.index.duplicated(keep=False) & (table.index != 0) if by_id else np.ones(len(table), bool)
    return table[unique], int((~unique).sum())
