"""Run a job, kill it as soon as it has finished some rows, and run it again: python -m jobs.benchmark.gpu.interrupted

    python -m jobs.benchmark.gpu.interrupted RUN_FOLDER jobs.caption --config configs/demo.yaml --output.path RUN_FOLDER

What follows the folder is a module and its arguments. The job is killed with the processes that it started, Ray's among
them, as a machine that goes away would end it; so it must start a Ray of its own. Exits with the second run's code, or
2 if the first one was done before it could be killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

WAIT_S = 20.0
"""For the processes of a killed job."""


def main(argv: Sequence[str] | None = None) -> int:
    run_folder, *words = sys.argv[1:] if argv is None else argv
    command = [sys.executable, "-m", *words]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the job ends with us
    started = time.monotonic()
    job = subprocess.Popen(command, start_new_session=True)
    try:
        while job.poll() is None and not _finished_files(Path(run_folder)):
            time.sleep(0.02)
    finally:
        _kill_group(job)
    if job.returncode != -signal.SIGKILL:
        print(f"error: the job ended with exit code {job.returncode} before it could be killed", file=sys.stderr)
        return 2
    files = _finished_files(Path(run_folder))
    print(f"killed after {time.monotonic() - started:.1f} s with {files} files of finished rows", flush=True)
    return subprocess.run(command).returncode


def _kill_group(job: subprocess.Popen[bytes]) -> None:
    """Kill a job and what it started, and wait until all of that is gone: a GPU's memory is free then."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    until = time.monotonic() + WAIT_S
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < until:
            os.killpg(job.pid, 0)
            time.sleep(0.05)


def _finished_files(run_folder: Path) -> int:
    return len(list((run_folder / "__run" / "fragments").glob("*.parquet")))


if __name__ == "__main__":
    sys.exit(main())
