"""The caption job with stages that take a twentieth of a second for each row, so that it is at work for a while.

python -m tests.faults.slow_job [arguments of jobs.caption]
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from jobs.benchmark.fake_engine import FakeGenerateStage
from jobs.caption import main
from pipeline.execution import dataset
from pipeline.execution.actors import EngineActor, PreprocessActor, unpack


class SlowEcho(FakeGenerateStage):
    """Answers each row with its id."""

    def __call__(self, table: pa.Table) -> pa.Table:
        time.sleep(0.05 * table.num_rows)
        return self.rows(table, {"text": table.column("id").to_pylist()})


class SlowEchoActor(EngineActor):
    """The real actor around the stage above."""

    def make_stage(self, options: Any) -> Any:
        return SlowEcho(options.kept)


class SlowPreprocessActor(PreprocessActor):
    """The real actor, slowed down: it is still at work when a node is lost."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self._slowly = threading.Lock()

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        with self._slowly:
            time.sleep(0.05 * unpack(block).num_rows)
        yield from super().__call__(block)


if __name__ == "__main__":
    dataset.ENGINE_ACTOR = SlowEchoActor
    dataset.PREPROCESS_ACTOR = SlowPreprocessActor
    sys.exit(main())
