"""Two scored runs compared row by row: `compare_folders`, and `compare_runs` for the score rows themselves.

Holds 16 bytes for each row and metric of either run; text is never loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline import storage
from pipeline.evaluation.interval import Comparison, compare
from pipeline.evaluation.metrics.registry import METRICS, require
from pipeline.results.reader import RunReader, row_keys
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW

_BASELINE = " of the baseline"


@dataclass(frozen=True)
class RunComparison:
    """Two runs' score rows, joined."""

    metrics: dict[str, Comparison]
    tasks: dict[str, Comparison]
    """By task, over each row's own score."""
    only_candidate: int
    only_baseline: int
    won: list[tuple[int, int]]
    """Row keys (manifest file, row) of the rows that gained most."""
    lost: list[tuple[int, int]]


def compare_folders(
    run: str, baseline: str, *, storage_options: storage.StorageOptions = None, num_samples: int = 1_000, seed: int = 0
) -> dict[str, Any] | None:
    """Paired comparison of two scored runs, as plain values for metrics.json; None if either has no scores.

    Rows are paired by their place in the manifest, or by id if the manifests differ.
    """
    mine, theirs = RunReader(run, storage_options), RunReader(baseline, storage_options)
    if not (mine.has_scores and theirs.has_scores):
        return None
    by_id = not _same_manifest(mine.run, theirs.run)
    result = compare_runs(mine.score_batches(), theirs.score_batches(), by_id=by_id, num_samples=num_samples, seed=seed)
    # In the order of the run's own metrics, whose first is the headline.
    order = dict.fromkeys([*((mine.metrics or {}).get("overall") or {}), *result.metrics])
    return {
        "run": storage.absolute(baseline),
        "paired_by": "id" if by_id else "place",
        "metrics": {name: _plain(result.metrics[name]) for name in order if name in result.metrics},
        "tasks": {task: _plain(one) for task, one in result.tasks.items()},
        "only_candidate": result.only_candidate,
        "only_baseline": result.only_baseline,
        "won": [list(row_key) for row_key in result.won],
        "lost": [list(row_key) for row_key in result.lost],
    }


def _plain(comparison: Comparison) -> dict[str, Any]:
    return {**asdict(comparison), "verdict": comparison.verdict}


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
) -> RunComparison:
    """Pairs the score rows of two runs by row key, or by id if their manifests differ. Raises ConfigError."""
    require("scipy", "the comparison with a baseline")
    mine, theirs = _score_table(candidate, by_id), _score_table(baseline, by_id)
    both = mine.join(theirs, how="inner", rsuffix=_BASELINE).sort_index()

    def compared(rows: pd.DataFrame, name: str) -> Comparison:
        pairs = rows[[name, name + _BASELINE]].dropna().to_numpy()
        return compare(pairs[:, 0], pairs[:, 1], num_samples, seed)

    metrics = {name: compared(both, name) for name in mine.columns if name in METRICS and name in theirs.columns}
    tasks = {str(task): compared(rows, "score") for task, rows in both.groupby("task", observed=True)}
    gains = (both["score"] - both[f"score{_BASELINE}"]).fillna(0.0).sort_values(kind="stable")
    lost, won = gains[gains < 0].head(num_examples), gains[gains > 0][::-1].head(num_examples)
    return RunComparison(
        metrics={name: one for name, one in metrics.items() if one.num_rows},
        tasks={task: one for task, one in tasks.items() if one.num_rows},
        only_candidate=len(mine) - len(both),
        only_baseline=len(theirs) - len(both),
        won=_row_keys(both.loc[won.index]),
        lost=_row_keys(both.loc[lost.index]),
    )


def _row_keys(rows: pd.DataFrame) -> list[tuple[int, int]]:
    return [(int(file), int(row)) for file, row in rows[[MANIFEST_FILE, MANIFEST_ROW]].to_numpy()]


def _score_table(batches: Iterable[pa.RecordBatch], by_id: bool) -> pd.DataFrame:
    """Score rows by what pairs them, as one number; a row that occurs twice counts once."""
    columns = [MANIFEST_FILE, MANIFEST_ROW, "task", "score"]
    parts, keys = [], []
    for batch in batches:
        parts.append(batch.select([*columns, *(name for name in batch.schema.names if name in METRICS)]))
        ids = batch.column("id").to_numpy(zero_copy_only=False)
        keys.append(pd.util.hash_array(ids).astype(np.int64) if by_id else row_keys(batch))
    if not parts:
        return pd.DataFrame({name: [] for name in columns})
    table: pd.DataFrame = pa.Table.from_batches(parts).to_pandas(categories=["task"])
    table.index = pd.Index(np.concatenate(keys))
    return table[~table.index.duplicated()]
