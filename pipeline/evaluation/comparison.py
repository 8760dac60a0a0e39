"""Two scored runs compared row by row, on the rows that both have.

Holds the scores of both runs' rows as arrays; ids only where they pair the rows, and text only for CIDEr-D, a batch at
a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from pipeline import storage
from pipeline.errors import OutputError
from pipeline.evaluation.columns import answered_texts, reference_lists
from pipeline.evaluation.interval import Floats, Ints
from pipeline.evaluation.metrics.cider import Cider
from pipeline.evaluation.metrics.registry import METRICS, corpus_score, counts_column, require
from pipeline.evaluation.paired import Comparison, compare, compare_corpora
from pipeline.evaluation.scoring import METRICS_VERSION
from pipeline.manifest.changes import same_rows
from pipeline.results.reader import RunReader, row_keys
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW

Mask = npt.NDArray[np.bool_]
RowScores = Callable[["Pairs", Mask], tuple[Floats, Floats]]

_BASELINE = " of the baseline"
_PLACE = [MANIFEST_FILE, MANIFEST_ROW]


def compare_folders(
    run: str, baseline: str, *, storage_options: storage.StorageOptions = None, num_samples: int = 1_000, seed: int = 0
) -> dict[str, Any] | None:
    """Paired comparison of two scored runs, as plain values for metrics.json; None if either has no scores.

    Rows are paired by row key, or by id if the manifests differ. Raises OutputError if the scores are of an older form.
    """
    mine, theirs = RunReader(run, storage_options), RunReader(baseline, storage_options)
    if not (mine.has_scores and theirs.has_scores):
        return None
    for reader in (mine, theirs):
        if (reader.metrics or {}).get("version") != METRICS_VERSION:
            raise OutputError(f"{reader.path} was scored by another version: score it again, with --run.path")
    by_id = not same_manifest(mine, theirs)
    columns = ["id"] * by_id + [*_PLACE, "task", "cluster", "metric", "score", *METRICS, *map(counts_column, METRICS)]
    batches = [reader.score_batches(columns) for reader in (mine, theirs)]

    def cider(pairs: Pairs, rows: Mask) -> tuple[Floats, Floats]:
        return shared_cider(pairs, rows, mine, theirs)

    same_references = _references(mine) == _references(theirs) and not by_id
    found = compare_runs(
        *batches, by_id=by_id, cider=cider, same_references=same_references, num_samples=num_samples, seed=seed
    )
    return {"run": storage.absolute(baseline), "paired_by": "id" if by_id else "place", **found}


def same_manifest(run: RunReader, other: RunReader) -> bool:
    """Whether both runs' row keys mean the same rows: by the manifests' fingerprints, and by the rows' ids where these
    can't tell, since runs of older versions have recorded no digests."""
    one, another = ((reader.run.get("manifest") or {}).get("fingerprint") for reader in (run, other))
    same = same_rows(one, another) if one and another else None
    if same is not None:
        return same
    (keys, ids), (other_keys, other_ids) = map(_ids, (run, other))
    _, mine, theirs = np.intersect1d(keys, other_keys, return_indices=True)
    return bool((ids[mine] == other_ids[theirs]).all())


def _ids(reader: RunReader) -> tuple[Ints, Ints]:
    """Row keys, and a hash of each row's id."""
    keys, hashes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for batch in reader.batches([*_PLACE, "id"]):
        ids = batch.column("id").fill_null("").to_numpy(zero_copy_only=False)
        keys.append(row_keys(batch))
        hashes.append(pd.util.hash_array(ids).astype(np.int64))
    return np.concatenate(keys), np.concatenate(hashes)


def _references(reader: RunReader) -> str:
    return str((reader.metrics or {})["columns"]["references"])


def compare_runs(
    candidate: Iterable[pa.RecordBatch],
    baseline: Iterable[pa.RecordBatch],
    *,
    by_id: bool = False,
    cider: RowScores | None = None,
    same_references: bool = True,
    num_examples: int = 8,
    num_samples: int = 1_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares two runs' score rows: by metric, and by task over each row's own metric; plain values for JSON.

    `won` and `lost` are the places in the candidate of the rows that gained and lost most, `won_baseline` and
    `lost_baseline` those in the baseline. `ambiguous_candidate` and `ambiguous_baseline` count the rows left out
    because their id is null or not unique. `cider` scores rows by one set of document frequencies; it is asked unless
    both runs scored the same rows with the same references, which gives the same frequencies. Raises ConfigError if
    scipy is missing.
    """
    require("scipy", "the comparison with a baseline")
    pairs = Pairs(_score_table(candidate, by_id), _score_table(baseline, by_id))
    rows = pairs.scored("cider")
    if cider and rows.any() and not (same_references and pairs.scored_by_both("cider")):
        pairs.replace("cider", rows, *cider(pairs, rows))
    metrics = [name for name in pairs.mine.table.columns if name in METRICS]

    def compared(name: str, rows: Mask) -> dict[str, Any]:
        found = pairs.compare(name, rows, num_samples, seed)
        return {**asdict(found), "metric": name, "verdict": found.verdict}

    tasks = {}
    for task, of_task in pairs.tasks():
        headed = {name: rows for name in metrics if (rows := of_task & pairs.headed(name)).any()}
        for name, rows in headed.items():
            tasks[f"{task}: {name}" if len(headed) > 1 else task] = compared(name, rows)
    gains = pd.Series(np.subtract(*pairs.columns("score")), pairs.table.index).sort_values(kind="stable")
    extremes = {"won": gains[gains > 0][::-1].index[:num_examples], "lost": gains[gains < 0].index[:num_examples]}
    return {
        "metrics": {name: compared(name, rows) for name in metrics if (rows := pairs.scored(name)).any()},
        "tasks": tasks,
        "only_candidate": pairs.mine.num_rows - len(pairs.table),
        "only_baseline": pairs.theirs.num_rows - len(pairs.table),
        "ambiguous_candidate": pairs.mine.num_ambiguous,
        "ambiguous_baseline": pairs.theirs.num_ambiguous,
        **{name: pairs.places(keys, "") for name, keys in extremes.items()},
        **{f"{name}_baseline": pairs.places(keys, _BASELINE) for name, keys in extremes.items()},
    }


@dataclass
class _ScoreTable:
    """A run's score rows, indexed by what pairs them, as one number."""

    table: pd.DataFrame
    """With two columns more: `place`, the row key, and `number`, the row's place in `counts`."""
    counts: dict[str, Floats]
    """[rows, statistics] of each corpus metric, by its name; NaN where a row is not scored by it."""
    num_ambiguous: int = 0
    """Rows that no id pairs: null, or not unique."""

    @property
    def num_rows(self) -> int:
        return len(self.table)


class Pairs:
    """The rows that two runs share."""

    def __init__(self, mine: _ScoreTable, theirs: _ScoreTable) -> None:
        self.mine, self.theirs = mine, theirs
        self.table = mine.table.join(theirs.table, how="inner", rsuffix=_BASELINE).sort_index()
        clusters = self.table["cluster"]
        numbers, _ = pd.factorize(clusters)
        alone = np.asarray(clusters.isna())
        numbers[alone] = numbers.max(initial=0) + 1 + np.arange(alone.sum())
        self.groups: Ints | None = None if alone.all() else numbers.astype(np.int64)
        """A number for each row, equal for rows of one cluster; None if there are no clusters."""

    def columns(self, name: str) -> tuple[Floats, Floats]:
        """The column of both runs."""
        mine, theirs = (self.table[column].to_numpy(np.float64) for column in (name, name + _BASELINE))
        return mine, theirs

    def scored(self, name: str) -> Mask:
        """Rows that both runs scored with the metric."""
        if not (name in self.mine.table and name in self.theirs.table):
            return np.zeros(len(self.table), bool)
        known: Mask = ~np.isnan(np.add(*self.columns(name)))
        return known

    def scored_by_both(self, name: str) -> bool:
        """Whether either run scored with the metric just the rows that they share."""
        num_rows = self.scored(name).sum()
        return all(one.table[name].notna().sum() == num_rows for one in (self.mine, self.theirs))

    def headed(self, name: str) -> Mask:
        """Those of them that the metric gives their score."""
        rows: Mask = self.scored(name) & np.asarray(
            (self.table["metric"] == name) & (self.table[f"metric{_BASELINE}"] == name)
        )
        return rows

    def places(self, keys: pd.Index, suffix: str) -> list[list[int]]:
        """File and row of some rows in one of the runs."""
        found: list[list[int]] = self.table.loc[keys, [name + suffix for name in _PLACE]].to_numpy().tolist()
        return found

    def tasks(self) -> Iterable[tuple[str, Mask]]:
        """Each task's rows."""
        tasks = self.table["task"].astype("category")
        return [(task, np.asarray(tasks == task)) for task in tasks.cat.categories]

    def replace(self, name: str, rows: Mask, mine: Floats, theirs: Floats) -> None:
        """Other scores for some rows, also where they are the rows' own score."""
        for suffix, scores in (("", mine), (_BASELINE, theirs)):
            is_own = np.asarray(self.table[f"metric{suffix}"] == name)[rows]
            self.table.loc[rows, name + suffix] = scores
            self.table.loc[rows, f"score{suffix}"] = np.where(is_own, scores, self.table.loc[rows, f"score{suffix}"])

    def compare(self, name: str, rows: Mask, num_samples: int, seed: int) -> Comparison:
        """The metric over some of the rows."""
        groups = None if self.groups is None else self.groups[rows]
        mine, theirs = (scores[rows] for scores in self.columns(name))
        if (corpus := corpus_score(name)) is None:
            return compare(mine, theirs, groups=groups, maximum=METRICS[name].maximum, seed=seed)
        numbers = self.table.loc[rows, ["number", f"number{_BASELINE}"]].to_numpy()
        return compare_corpora(
            self.mine.counts[name][numbers[:, 0]],
            self.theirs.counts[name][numbers[:, 1]],
            corpus.combine,
            mine - theirs,
            groups=groups,
            num_samples=num_samples,
            seed=seed,
        )


def _score_table(batches: Iterable[pa.RecordBatch], by_id: bool) -> _ScoreTable:
    """A run's score rows. A row that occurs twice, as in the fragments of an unfinished run, counts once."""
    tables = [pa.Table.from_batches([batch]) for batch in batches]
    if not tables:
        names = [*_PLACE, "task", "cluster", "metric", "score", "place", "number"]
        return _ScoreTable(pd.DataFrame({name: [] for name in names}), {})
    whole = pa.concat_tables(tables)
    counted = [name for name in METRICS if counts_column(name) in whole.column_names]
    counts = {name: _matrix(whole.column(counts_column(name)).combine_chunks()) for name in counted}
    plain = whole.drop_columns([*map(counts_column, counted), *(["id"] if "id" in whole.column_names else [])])
    table: pd.DataFrame = plain.to_pandas(categories=["task", "metric"])
    table["place"], table["number"] = row_keys(whole), np.arange(len(table))
    table.index = pd.Index(table["place"])
    if by_id:
        ids = whole.column("id").to_numpy()
        table.index = pd.Index(np.where(pd.isna(ids), 0, pd.util.hash_array(ids).astype(np.int64)))
    table = table[~table["place"].duplicated()]
    unique = ~table.index.duplicated(keep=False) & (table.index != 0) if by_id else np.ones(len(table), bool)
    return _ScoreTable(table[unique], counts, int((~unique).sum()))


def _matrix(lists: pa.ListArray) -> Floats:
    """Lists of one length as [rows, length], NaN for null."""
    known = np.asarray(lists.is_valid())
    values = lists.flatten().to_numpy()
    matrix = np.full((len(lists), len(values) // max(known.sum(), 1)), np.nan)
    matrix[known] = values.reshape(known.sum(), matrix.shape[1])
    return matrix


def shared_cider(pairs: Pairs, rows: Mask, mine: RunReader, theirs: RunReader) -> tuple[Floats, Floats]:
    """CIDEr-D of both runs' answers, by the document frequencies of these rows' references."""
    cider = Cider()

    def texts(reader: RunReader, suffix: str) -> Iterable[tuple[int, str | None, list[str]]]:
        """Number among the rows, answer (None if the row failed) and references."""
        wanted = pd.Index(pairs.table.loc[rows, f"place{suffix}"])
        name = _references(reader)
        for batch in reader.batches([*_PLACE, "text", "status", name]):
            numbers = wanted.get_indexer(row_keys(batch))
            batch, numbers = batch.filter(pa.array(numbers >= 0)), numbers[numbers >= 0]
            yield from zip(numbers.tolist(), answered_texts(batch), reference_lists(batch, name), strict=True)

    for _, _, references in texts(mine, ""):
        cider.add_references(references)
    scores = np.zeros((2, int(rows.sum())))
    for found, reader, suffix in ((scores[0], mine, ""), (scores[1], theirs, _BASELINE)):
        for number, text, references in texts(reader, suffix):
            found[number] = 0.0 if text is None else cider.score(text, references)
    return scores[0], scores[1]
