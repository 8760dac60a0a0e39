"""The whole job against its own stages in a plain loop, on the demo world: what do Ray and the run folder cost?

    python -m jobs.benchmark pipeline [--rows-per-task 600]

The loop runs preprocessing and the engine in one process on the same cores, with nothing between them, 128 rows at a
time. Both rates leave start-up out, and count the filling of the stages at first and their emptying at the end; so a
job that is over in a few seconds says little. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import CaptionConfig, load_config
from pipeline.execution.stages import open_stages


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.benchmark pipeline", description=__doc__)
    parser.add_argument("--rows-per-task", type=int, default=600)
    args = parser.parse_args(argv)
    from pipeline.demo.manifest import write_demo_world

    with tempfile.TemporaryDirectory() as folder:
        world, output = Path(folder, "world"), Path(folder, "out")
        manifest = write_demo_world(world, rows_per_task=args.rows_per_task)
        words = {"input.path": str(manifest), "output.path": str(output)}
        command = [sys.executable, "-m", "jobs.caption", "--config", "configs/demo.yaml"]
        command += [word for name, value in words.items() for word in (f"--{name}", value)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        record = json.loads((output / "run.json").read_text())
        loop = _loop_rate(load_config(CaptionConfig, "configs/demo.yaml", {**words, "output.path": folder + "/loop"}))
    job = record["throughput"]["rows_per_s"]
    print(f"whole job    {job:8.1f} rows/s")
    print(f"plain loop   {loop:8.1f} rows/s")
    print(f"ratio        {job / loop:8.2f}")
    rows = record["counts"]["rows"]
    print(
        json.dumps(
            {"benchmark": "pipeline", "rows": rows, "job_rows_per_s": job, "loop_rows_per_s": loop, "ratio": job / loop}
        )
    )
    return 0


def _loop_rate(config: CaptionConfig) -> float:
    """Rows/s of the two stages in this process, block by block, after one block to warm up."""
    from pipeline.generate import GenerateStage
    from pipeline.manifest.work import read_work
    from pipeline.preprocess.stage import PreprocessStage

    opened = open_stages(config)
    stages, spec, work = opened.stages, opened.manifest.spec, opened.whole_manifest(rows_per_unit=128)
    preprocess, generate = PreprocessStage(stages.preprocess), GenerateStage(stages.generate)
    first, *rest = work
    generate(preprocess(read_work(spec, first, stages.columns)))
    started = time.perf_counter()
    rows: int = sum(generate(preprocess(read_work(spec, one, stages.columns))).num_rows for one in rest)
    seconds = time.perf_counter() - started
    preprocess.close()
    generate.close()
    return rows / seconds
