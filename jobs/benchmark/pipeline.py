"""The whole job against its own stages in a plain loop, on the demo dataset: what do Ray and the run folder cost?

    python -m jobs.benchmark pipeline [--rows-per-task 600]

The loop runs preprocessing and the engine in one process on the same cores, one after the other, 128 rows at a time.
Both rates leave start-up out, but include the time in which the stages fill up at first and drain at the end. A job of
a few seconds therefore says little. Last line: JSON.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs.benchmark.job import run_caption, stages_and_rows
from jobs.benchmark.measure import command_line, in_own_process, print_result

_CONFIG = "configs/demo.yaml"


def main(argv: Sequence[str]) -> int:
    parser = command_line("pipeline", __doc__)
    parser.add_argument("--rows-per-task", type=int, default=600)
    args = parser.parse_args(argv)
    from pipeline.demo.manifest import write_demo_world  # imports PIL and av

    with tempfile.TemporaryDirectory() as folder:
        manifest = write_demo_world(Path(folder, "demo"), rows_per_task=args.rows_per_task)
        settings = {"input.path": manifest, "output.path": f"{folder}/out"}
        record = in_own_process(run_caption, settings, config=_CONFIG)
        loop = _loop_rate({**settings, "output.path": f"{folder}/loop"})
    rows, job = record["counts"]["rows"], record["throughput"]["rows_per_s"]
    print(f"whole job    {job:8.1f} rows/s")
    print(f"plain loop   {loop:8.1f} rows/s")
    print(f"ratio        {job / loop:8.2f}")
    print_result("pipeline", rows=rows, job_rows_per_s=job, loop_rows_per_s=loop, ratio=job / loop)
    return 0


def _loop_rate(settings: Mapping[str, object]) -> float:
    """Rows/s of the two stages in this process, table by table, after one table to warm up."""
    from pipeline.generate import GenerateStage
    from pipeline.preprocess.stage import PreprocessStage

    stages, tables = stages_and_rows(settings, config=_CONFIG, rows_per_table=128)
    preprocess, generate = PreprocessStage(stages.preprocess), GenerateStage(stages.generate)
    generate(preprocess(next(tables)))
    started = time.perf_counter()
    rows: int = sum(generate(preprocess(table)).num_rows for table in tables)
    seconds = time.perf_counter() - started
    preprocess.close()
    generate.close()
    return rows / seconds
