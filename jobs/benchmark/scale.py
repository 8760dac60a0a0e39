"""What does a large manifest cost: planning and resuming 100 million rows, and rows past a do-nothing engine?

    python -m jobs.benchmark scale [--rows 100000000] [--flow 2000,20000,200000]

Part one simulates a manifest of 10,000 files whose footers are known, writes real fragments for one half of its rows,
of which one in a hundred failed, and times what a resumed job does before its first row: reading which rows are
finished, and planning the rest. Part two runs the whole job with an engine that answers every row at once, and watches
the driver's memory and the object store. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.manifest.files import Manifest, ManifestFile
from pipeline.manifest.row_set import RowNumbering
from pipeline.manifest.work import plan_work
from pipeline.results.finished import read_finished
from pipeline.results.run_folder import RunFolder

_FILES = 10_000
_ROWS_PER_FRAGMENT = 10_000
_FAILED_EVERY = 100


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.benchmark scale", description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--flow", default="2000,20000,200000", help="row counts for part two; empty: leave it out")
    parser.add_argument("--flow-rows", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.flow_rows:
        print(json.dumps(_flow(args.flow_rows)))
        return 0
    plan = _plan(args.rows)
    print(f"{args.rows:,} rows in {_FILES:,} files, one half finished:")
    print(f"  read finished rows {plan['read_finished_s']:7.1f} s")
    print(f"  plan the rest      {plan['plan_s']:7.1f} s, {plan['units']:,} units")
    print(f"  peak memory        {plan['peak_mb']:7.0f} MB")
    flows = []
    for rows in [int(count) for count in args.flow.split(",") if count]:
        command = [sys.executable, "-m", "jobs.benchmark", "scale", "--flow-rows", str(rows)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        flows.append(json.loads(done.stdout.splitlines()[-1]))
        one = flows[-1]
        print(f"  {rows:>8,} rows: {one['rows_per_s']:8.1f} rows/s, {one['driver_mb']:6.0f} MB in the driver, ", end="")
        print(f"{one['store_mb']:6.1f} MB in the object store")
    print(json.dumps({"benchmark": "scale", "plan": plan, "flow": flows}))
    return 0


def _plan(rows: int) -> dict[str, Any]:
    per_file = rows // _FILES
    files = tuple(ManifestFile(f"s3://bucket/{n:05d}.parquet", per_file, per_file * 200, None) for n in range(_FILES))
    manifest = Manifest("s3://bucket", "parquet", files, pa.schema([("image", pa.string())]), "s3://bucket")
    numbering = RowNumbering([per_file] * _FILES)
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(path)
        _write_half(folder, numbering)
        started = time.perf_counter()
        finished = read_finished(folder, numbering)
        read_s = time.perf_counter() - started
        assert len(finished.done) == numbering.num_rows // 2
        assert len(finished.failed) == len(range(0, numbering.num_rows // 2, _FAILED_EVERY))
        started = time.perf_counter()
        units = planned = 0
        for work in plan_work(manifest, numbering, finished.done, actors=256, min_rows=8, max_rows=2048):
            units, planned = units + 1, planned + work.num_rows
        plan_s = time.perf_counter() - started
        assert planned == numbering.num_rows - numbering.num_rows // 2
    return {"rows": rows, "read_finished_s": read_s, "plan_s": plan_s, "units": units, "peak_mb": _peak_mb()}


def _write_half(folder: RunFolder, numbering: RowNumbering) -> None:
    """Fragments for the first half of the rows, in the columns that a resumed job looks at."""
    folder.prepare()
    half = numbering.num_rows // 2
    for number, start in enumerate(range(0, half, _ROWS_PER_FRAGMENT)):
        indices = np.arange(start, min(start + _ROWS_PER_FRAGMENT, half))
        files = np.searchsorted(numbering.first, indices, side="right") - 1
        failed = pa.array(indices % _FAILED_EVERY == 0)
        table = pa.table(
            {
                "manifest_file": pa.array(files.astype(np.int32)),
                "manifest_row": pa.array(indices - numbering.first[files]),
                "status": pc.if_else(failed, "error", "ok"),
                "error_type": pc.if_else(failed, "FetchError", None),
                "attempts": pa.array(np.ones(len(indices), np.int32)),
            }
        )
        pq.write_table(table, folder.file("fragments", f"{number:06d}.parquet"))


def _flow(rows: int) -> dict[str, Any]:
    """The job over text rows, with an engine actor that answers at once."""
    from jobs.benchmark.stand_in import AnswerAtOnce
    from jobs.caption import main as caption
    from pipeline.demo import CHECKPOINT
    from pipeline.execution import dataset

    dataset.ENGINE_ACTOR = AnswerAtOnce
    with tempfile.TemporaryDirectory() as path:
        manifest = Path(path, "manifest.parquet")
        pq.write_table(pa.table({"prompt": [f"Say {n}." for n in range(rows)]}), manifest)
        output = Path(path, "out")
        words = ["--input.path", str(manifest), "--output.path", str(output), "--model.path", str(CHECKPOINT)]
        store = _SharedMemory()
        started = time.perf_counter()
        code = caption([*words, "--resources.num_cpus", str(os.cpu_count() or 1)])
        assert code == 0
        seconds = time.perf_counter() - started
        record = json.loads((output / "run.json").read_text())
    return {
        "rows": rows,
        "rows_per_s": record["throughput"]["rows_per_s"],
        "seconds": seconds,
        "driver_mb": _peak_mb(),
        "store_mb": store.peak_mb,
    }


class _SharedMemory:
    """Watches how much of this machine's shared memory, where the object store lies, comes into use."""

    def __init__(self) -> None:
        self._before = shutil.disk_usage("/dev/shm").used
        self.peak_mb = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak_mb = max(self.peak_mb, (shutil.disk_usage("/dev/shm").used - self._before) / 1024**2)
            time.sleep(0.1)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
