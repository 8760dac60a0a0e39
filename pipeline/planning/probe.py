"""Both stages on this machine for half a minute, without Ray: how fast are they on these rows?

Rows are preprocessed for a part of the time and then answered in waves that double, so that the engine comes to the
batches that it has in a run. Knows the stages; not what is made of their pace.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.execution.stages import Stages
from pipeline.planning.forecast import Measured
from pipeline.schema import Status

_PREPROCESS_SHARE = 0.3
_WARM_ROWS = 2
_FIRST_WAVE = 4
_MOST_BYTES = 512 * 1024**2


def probe(stages: Stages, tables: Iterator[pa.Table], *, seconds: float) -> tuple[list[Measured], list[Measured]]:
    """(preprocessing, engine), piece by piece, from manifest rows; about so many seconds after the warm-up.

    Rows that fail are among those preprocessed, and never come to the engine.
    """
    from pipeline.generate import GenerateStage
    from pipeline.preprocess.stage import PreprocessStage

    print("probe: loading the model and warming up ...", file=sys.stderr)
    preprocess_stage, generate_stage = PreprocessStage(stages.preprocess), GenerateStage(stages.generate)
    try:
        first = next(tables)
        generate_stage(preprocess_stage(first.slice(0, _WARM_ROWS)))
        print(f"probe: running both stages for {seconds:.0f} s ...", file=sys.stderr)
        preprocess, requests = _preprocess(preprocess_stage, first, tables, seconds * _PREPROCESS_SHARE)
        engine = _generate(generate_stage, requests, seconds * (1 - _PREPROCESS_SHARE))
    finally:
        preprocess_stage.close()
        generate_stage.close()
    return preprocess, engine


def _preprocess(
    stage: Any, first: pa.Table, tables: Iterator[pa.Table], seconds: float
) -> tuple[list[Measured], pa.Table]:
    measured: list[Measured] = []
    requests: list[pa.Table] = []
    started = time.perf_counter()
    table: pa.Table | None = first
    while table is not None:
        begun = time.perf_counter()
        requests.append(stage(table))
        measured.append(Measured(table.num_rows, time.perf_counter() - begun))
        enough = time.perf_counter() - started > seconds or sum(one.nbytes for one in requests) > _MOST_BYTES
        table = None if enough else next(tables, None)
    return measured, pa.concat_tables(requests)


def _generate(stage: Any, requests: pa.Table, seconds: float) -> list[Measured]:
    requests = requests.filter(pc.equal(requests.column("status"), Status.OK.value))
    measured: list[Measured] = []
    started, done, wave = time.perf_counter(), 0, _FIRST_WAVE
    while done < requests.num_rows:
        begun = time.perf_counter()
        part = requests.slice(done, wave)
        answers = stage(part)
        tokens = pc.sum(answers.column("num_output_tokens")).as_py() or 0
        measured.append(Measured(part.num_rows, time.perf_counter() - begun, tokens))
        done += part.num_rows
        left = seconds - (time.perf_counter() - started)
        pace = part.num_rows / max(measured[-1].seconds, 1e-9)
        if left <= 0:
            break
        wave = max(1, min(2 * wave, int(pace * left)))
    return measured
