"""A few rows preprocessed on the cluster before a large job begins: how long do they take, how large do they get?

Knows Ray and the preprocessing stage; not what is chosen from the rate (pipeline/execution/feeding.py).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence

import ray

from pipeline.execution.dataset import ONE_THREAD, beside_gpus
from pipeline.execution.feeding import PreprocessRate
from pipeline.execution.placement import Placement
from pipeline.execution.stages import Stages
from pipeline.manifest import ManifestSpec
from pipeline.manifest.work import Work, read_work
from pipeline.preprocess.prompt import spare_torch
from pipeline.preprocess.stage import PreprocessStage

log = logging.getLogger(__name__)

_SECONDS = 2.0
_PATIENCE_S = 30.0
"""Seconds in all, start-up included, after which the job begins without a rate."""
_SAMPLES = 3
_ROWS_AT_ONCE = 4
_MOST_ROWS = 64


def measure(stages: Stages, placement: Placement, spec: ManifestSpec, work: Sequence[Work]) -> PreprocessRate | None:
    """The rate on rows from the beginning, the middle and the end of the work, measured as a task in a worker like
    those of the actors, which Ray can make one of them afterwards. None when that failed or took too long."""
    sample = [work[len(work) * number // _SAMPLES] for number in range(min(_SAMPLES, len(work)))]
    task = ray.remote(_measure).options(
        num_cpus=placement.preprocess_cpus,
        max_retries=0,  # a row may kill it, which costs the actors' own run of that row nothing
        runtime_env={"env_vars": ONE_THREAD},
        **beside_gpus(placement),
    )
    found = task.remote(stages, spec, sample)
    try:
        rate: PreprocessRate | None = ray.get(found, timeout=_PATIENCE_S)
    except (ray.exceptions.RayError, TimeoutError):
        log.warning("preprocessing could not be measured", exc_info=True)
        ray.cancel(found, force=True)
        return None
    return rate


def _measure(stages: Stages, spec: ManifestSpec, sample: Sequence[Work]) -> PreprocessRate | None:
    spare_torch()
    stage = PreprocessStage(stages.preprocess)
    try:
        # Each place's rows as one stream, so that fetches run ahead of decoding as they will in the job.
        waiting = deque(stage.tables(read_work(spec, one, stages.columns), 1 << 62, _ROWS_AT_ONCE) for one in sample)
        next(waiting[0])  # the decoder's process starts with the first rows
        rows, num_bytes, seconds, started = 0, 0, 0.0, time.perf_counter()
        while waiting and rows < _MOST_ROWS and seconds < _SECONDS:
            requests = next(waiting[0], None)
            seconds = time.perf_counter() - started
            if requests is None:
                waiting.popleft()
                continue
            rows += requests.num_rows
            num_bytes += requests.nbytes
            waiting.rotate(-1)
    finally:
        stage.close()
    return PreprocessRate(rows / seconds, num_bytes / rows) if rows else None
