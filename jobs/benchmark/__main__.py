"""Measure the pipeline and its parts: python -m jobs.benchmark NAME [options]

    preprocess   JPEG and video bytes to patches, against transformers' processors       (no Ray)
    engine       images/s of the engine, against model.generate and vLLM                 (no Ray)
    stage        preprocessing through Ray, against plain loops
    pipeline     the whole job on the demo dataset, against its stages in a plain loop
    feed         the whole job with a model of real size on JPEG files, against its engine alone
    soak         the engine for minutes under bursts, preemptions, aborts and failing passes    (no Ray)
    scale        planning and resuming 100 million rows; the job with an engine that answers at once
    kernels      registers, shared memory and spills of every Triton kernel, compiled    (no Ray, no GPU)
    dense        products by plain and by packed weights on a CPU                        (no Ray)
    attention    attention on a CPU: torch's own, and ours for its vector instructions    (no Ray)
    report       scoring and reporting a million result rows                              (no Ray)

Each prints a table for people, and as its last line JSON. `python -m jobs.benchmark NAME --help` lists its options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.cli import run_command

BENCHMARKS = (
    "preprocess",
    "engine",
    "stage",
    "pipeline",
    "feed",
    "soak",
    "scale",
    "kernels",
    "dense",
    "attention",
    "report",
)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command({name: f"jobs.benchmark.{name}" for name in BENCHMARKS}, argv, about=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
