"""Run a job, kill it as soon as it has finished some rows, and run it again: python -m jobs.benchmark.gpu.interrupted

    python -m jobs.benchmark.gpu.interrupted RUN_FOLDER jobs.caption --config configs/demo.yaml --output.path RUN_FOLDER

What follows the folder is a module and its arguments. The job is killed with its whole process group, as a machine that
goes away would end it. Exits with the second run's code, or 2 if the first one was done before it could be killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    run_folder, *words = sys.argv[1:] if argv is None else argv
    command = [sys.executable, "-m", *words]
    started = time.monotonic()
    job = subprocess.Popen(command, start_new_session=True)
    while job.poll() is None and not _finished_rows(Path(run_folder)):
        time.sleep(0.02)
    if job.poll() is not None:
        print(f"error: the job ended with exit code {job.returncode} before it could be killed", file=sys.stderr)
        return 2
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    rows = _finished_rows(Path(run_folder))
    print(f"killed after {time.monotonic() - started:.1f} s with {rows} files of finished rows", flush=True)
    return subprocess.run(command).returncode


def _finished_rows(run_folder: Path) -> int:
    return len(list((run_folder / "__run" / "fragments").glob("*.parquet")))


if __name__ == "__main__":
    sys.exit(main())
