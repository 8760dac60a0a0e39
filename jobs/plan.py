"""Say what a job will need before anything is spent: rows, errors, tokens, memory, cores, time and cost.

    python -m jobs.plan --config configs/caption.yaml --input.path PHOTOS --gpu H200 --price-per-gpu-hour 3.5
    python -m jobs.plan --config configs/caption.yaml --input.path PHOTOS --probe

Takes the config of the caption job. Looks at a sample of rows, and reads only headers of their media: nothing is
decoded and nothing written. Time follows from the data sheet of the GPU that is named, or, with --probe, from running
both stages here for half a minute.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence

from rich.console import Console

from jobs.command_line import EXIT_NO_ANSWER, FLAGS, run_job
from pipeline.errors import TooManyErrors
from pipeline.planning.page import print_plan
from pipeline.planning.plan import PlanConfig, make_plan

PLAN_FLAGS = {
    **FLAGS,
    "--json": ("plan.format", "json"),
    "--probe": ("plan.probe", "true"),
    "--gpu": ("plan.gpu", None),
    "--price-per-gpu-hour": ("plan.price_per_gpu_hour", None),
    "--sample": ("plan.sample", None),
}


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(PlanConfig, run, argv, name="plan", about=__doc__ or "", flags=PLAN_FLAGS)


def run(config: PlanConfig) -> int:
    """Look, forecast, print. Raises JobError; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    plan = make_plan(config)
    if config.plan.format == "json":
        print(json.dumps(dataclasses.asdict(plan)))
    else:
        print_plan(Console(highlight=False), plan, currency=config.plan.currency)
    num_rows, num_bad = plan.rows.num_rows, plan.rows.num_bad.value
    if num_bad > config.plan.max_error_fraction * num_rows:
        return TooManyErrors.exit_code
    return EXIT_NO_ANSWER if num_bad >= num_rows > 0 else 0


if __name__ == "__main__":
    sys.exit(main())
