"""Canaries: rows run once more, each alone, show whether an answer depends on the rows that shared its batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.results.reader import RunReader
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW, Status

_COMPARED = ("text", "finish_reason", "num_output_tokens", "status", "error_type")
_MAX_SHOWN = 10


def compare_canaries(batched: RunReader, alone: RunReader) -> dict[str, Any]:
    """Whether rows run alone got the answers that they got in the mixed batch; plain values for metrics.json."""
    columns = (*_COMPARED, "id", MANIFEST_FILE, MANIFEST_ROW)
    expected = {
        (row[MANIFEST_FILE], row[MANIFEST_ROW]): row for batch in alone.batches(columns) for row in batch.to_pylist()
    }
    differing, num_compared = [], 0
    for batch in batched.batches(columns):
        for row in batch.to_pylist():
            other = expected.pop((row[MANIFEST_FILE], row[MANIFEST_ROW]), None)
            if other is None:
                continue
            num_compared += 1
            if any(row[name] != other[name] for name in _COMPARED):
                differing.append({"id": row["id"], "alone": _answer(other), "batched": _answer(row)})
        if not expected:
            break
    num_same = num_compared - len(differing)
    sentence = f"{num_same:,} of {num_compared:,} rows gave the same answer alone as in the mixed batch."
    if differing:
        sentence += " Answers depend on the rows in a batch: expect differences between runs in rows as close as these."
    elif num_compared:
        sentence += " No difference was found in these rows."
    return {"num_rows": num_compared, "num_same": num_same, "differing": differing[:_MAX_SHOWN], "sentence": sentence}


def _answer(row: Mapping[str, Any]) -> str:
    text = row["text"] if row["status"] == Status.OK else row["error_type"]
    return f"{(text or '')[:300]} ({row['num_output_tokens'] or 0} tokens, {row['finish_reason'] or row['status']})"
