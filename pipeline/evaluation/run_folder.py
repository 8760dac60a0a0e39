"""A run folder scored: writes scores.parquet and metrics.json into it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import to_json

from pipeline import storage
from pipeline.errors import ConfigError, OutputError
from pipeline.evaluation.comparison import compare_folders
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.settings import ScoringSettings
from pipeline.evaluation.slices import DERIVED_SLICES
from pipeline.results.reader import RunReader
from pipeline.results.run_folder import RunFolder
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW


def score_folder(
    folder: str,
    settings: ScoringSettings,
    *,
    baseline: str | None = None,
    canaries: Mapping[str, Any] | None = None,
    storage_options: storage.StorageOptions = None,
) -> dict[str, Any]:
    """Scores a run folder, compares it with a scored `baseline` folder, and returns the metrics.

    Streams over the rows: memory does not grow with their number. Raises ConfigError, OutputError.
    """
    reader, scorer, records = RunReader(folder, storage_options), Scorer(settings), RunFolder(folder, storage_options)
    missing = [name for name in settings.columns if reader.columns and name not in reader.columns]
    if missing:
        what, them = ("column", "it") if len(missing) == 1 else ("columns", "them")
        asked = ", ".join(f"{name} ({settings.columns[name]})" for name in missing)
        raise ConfigError(
            f"{folder} has no {what} {asked}; its columns: {', '.join(reader.columns)}; correct the setting, or run "
            f"again with {them} in input.keep"
        )
    columns = {*settings.columns, *DERIVED_SLICES, "media", "id", "text", "status", MANIFEST_FILE, MANIFEST_ROW}
    scorer.learn(reader.batches(columns))
    try:
        _write_scores(records.file("scores.parquet"), scorer, reader, columns, storage_options)
        metrics = scorer.metrics()
        if canaries is not None:
            metrics["canaries"] = canaries
        storage.publish(records.file("metrics.json"), _as_json(metrics), storage_options)
        if baseline is not None:
            metrics["baseline"] = compare_folders(
                folder, baseline, storage_options=storage_options, num_samples=settings.num_samples, seed=settings.seed
            )
            if metrics["baseline"] is None:
                raise OutputError(
                    f"{baseline} has no scores.parquet: score it first, "
                    f"as in `python -m jobs.evaluate --config CONFIG --run.path {baseline}`"
                )
            storage.publish(records.file("metrics.json"), _as_json(metrics), storage_options)
    except OSError as error:
        raise OutputError(f"can't write the scores into {folder}: {error}") from error
    return metrics


def _as_json(metrics: Mapping[str, Any]) -> bytes:
    return to_json(metrics, indent=2, inf_nan_mode="null")


def _write_scores(
    path: str, scorer: Scorer, reader: RunReader, columns: set[str], storage_options: storage.StorageOptions
) -> None:
    """Streams the score rows through a temporary file on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "scores.parquet"
        with pq.ParquetWriter(temporary, scorer.schema, compression="zstd") as writer:
            for batch in reader.batches(columns):
                writer.write_table(pa.Table.from_batches([scorer.score(batch)]), row_group_size=1 << 20)
        storage.publish_file(temporary, path, storage_options)
