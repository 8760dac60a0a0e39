"""The caption job with stages that die or hang on marked rows, for the fault tests.

    python tests/faults/job.py STAGES [caption's words ...]

STAGES is `real` (the job as it is) or `marked`: an engine in place of the real one that answers with a digest of what
it was given, at about 40 rows/s, and both stages obey rows whose prompt is `kill preprocessing`, `kill the engine` or
`hang in the engine`, every time that they meet one. It saves each engine actor the import of torch and transformers,
most of what a run of a few dozen rows costs. `run` is the same, for processes that are forked with the imports done.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from jobs.benchmark.fake_engine import FakeGenerateStage
from jobs.caption import main
from pipeline.execution import actors, dataset
from pipeline.schema import UnitColumn

KILL_PREPROCESSING = "kill preprocessing"
KILL_ENGINE = "kill the engine"
HANG_ENGINE = "hang in the engine"


class MarkedPreprocessActor(actors.PreprocessActor):
    """The real actor around a stage that dies at the row that says so."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        tables = self._stage.tables

        def tables_or_death(table: pa.Table, *sizes: int, **options: Any) -> Iterator[pa.Table]:
            assert UnitColumn.ROW in table.column_names
            if KILL_PREPROCESSING in table.column("prompt").to_pylist():
                os._exit(1)
            yield from tables(table, *sizes, **options)

        self._stage.tables = tables_or_death  # type: ignore[method-assign]


class DigestStage(FakeGenerateStage):
    """Answers each row with a digest of its tokens and patches, one row after the other."""

    def __init__(self, kept: pa.Schema) -> None:
        super().__init__(kept)
        self._one_at_a_time = threading.Lock()

    def __call__(self, table: pa.Table) -> pa.Table:
        prompts = table.column("prompt").to_pylist()
        if KILL_ENGINE in prompts:
            os._exit(1)
        if HANG_ENGINE in prompts:
            time.sleep(3600)
        texts: list[str | None] = []
        for ids, patches, status in zip(*(table.column(n) for n in ("input_ids", "patches", "status")), strict=True):
            with self._one_at_a_time:
                time.sleep(0.025)
                given = b"".join(buffer for value in (ids, patches) for buffer in _bytes(value))
                texts.append(hashlib.sha256(given).hexdigest()[:12] if status.as_py() == "ok" else None)
        return self.rows(table, {"text": texts})


def _bytes(value: Any) -> list[bytes]:
    return [] if not value.is_valid else [str(value.as_py()).encode()]


class MarkedEngineActor(actors.EngineActor):
    """The real actor around the stage above."""

    def make_stage(self, options: Any) -> Any:
        return DigestStage(options.kept)


def job(stages: str, words: Sequence[str]) -> int:
    """Run the job; returns its exit code."""
    if stages == "marked":
        dataset.PREPROCESS_ACTOR = MarkedPreprocessActor
        dataset.ENGINE_ACTOR = MarkedEngineActor
    return main(words)


def run(stages: str, words: Sequence[str], log: str) -> None:
    """The job as the whole of a process; what it prints goes to the file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(job(stages, words))


if __name__ == "__main__":
    sys.exit(job(sys.argv[1], sys.argv[2:]))
