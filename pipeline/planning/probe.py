"""Both stages on this machine for half a minute, without Ray: how fast are they on these rows?

Rows are preprocessed for a part of the time and then answered in waves that double, so that the engine reaches the
batch sizes of a run. Knows the stages; not what the forecast makes of their pace.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.execution.stages import Stages
from pipeline.generate import GenerateStage
from pipeline.planning.forecast import Measured
from pipeline.preprocess.stage import PreprocessStage
from pipeline.schema import Status

_PREPROCESS_SHARE = 0.3
_WARM_UP_ROWS = 2
_FIRST_WAVE = 4
_MAX_REQUEST_BYTES = 512 * 1024**2


def probe(stages: Stages, tables: Iterator[pa.Table], *, seconds: float) -> tuple[list[Measured], list[Measured]]:
    """(preprocessing, engine), piece by piece, from manifest rows; about so many seconds after the warm-up.

    Rows that fail are among those preprocessed, and never reach the engine.
    """
    print("probe: loading the model and warming up ...", file=sys.stderr)
    preprocess, generate = PreprocessStage(stages.preprocess), GenerateStage(stages.generate)
    try:
        first = next(tables)
        generate(preprocess(first.slice(0, _WARM_UP_ROWS)))
        print(f"probe: running both stages for {seconds:.0f} s ...", file=sys.stderr)
        preprocessed, requests = _preprocess(preprocess, first, tables, seconds * _PREPROCESS_SHARE)
        return preprocessed, _generate(generate, requests, seconds * (1 - _PREPROCESS_SHARE))
    finally:
        preprocess.close()
        generate.close()


def _preprocess(
    stage: PreprocessStage, table: pa.Table | None, tables: Iterator[pa.Table], seconds: float
) -> tuple[list[Measured], pa.Table]:
    measured: list[Measured] = []
    requests: list[pa.Table] = []
    until = time.perf_counter() + seconds
    while table is not None:
        started = time.perf_counter()
        requests.append(stage(table))
        measured.append(Measured(table.num_rows, time.perf_counter() - started))
        enough = time.perf_counter() > until or sum(one.nbytes for one in requests) > _MAX_REQUEST_BYTES
        table = None if enough else next(tables, None)
    return measured, pa.concat_tables(requests)


def _generate(stage: GenerateStage, requests: pa.Table, seconds: float) -> list[Measured]:
    requests = requests.filter(pc.equal(requests.column("status"), Status.OK.value))
    measured: list[Measured] = []
    until = time.perf_counter() + seconds
    done, wave = 0, _FIRST_WAVE
    while done < requests.num_rows and wave:
        started = time.perf_counter()
        part = requests.slice(done, wave)
        answers = stage(part)
        ended = time.perf_counter()
        tokens = pc.sum(answers.column("num_output_tokens")).as_py() or 0
        measured.append(Measured(part.num_rows, ended - started, tokens))
        done += part.num_rows
        rows_in_time = int(part.num_rows * (until - ended) / max(ended - started, 1e-9))
        wave = max(1, min(2 * wave, rows_in_time)) if ended < until else 0
    return measured
