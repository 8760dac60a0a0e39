"""What does a large manifest cost: planning and resuming 100 million rows, and rows past an engine that does nothing?

    python -m jobs.benchmark scale [--rows 100000000] [--flow 2000,20000,200000]

Part one simulates a manifest of 10,000 files whose footers are known, writes real fragments for half of its rows, of
which one in a hundred failed, and times what a resumed job does before its first row: reading which rows are finished,
and planning the rest. Part two runs the whole job with an engine that answers every row at once, and watches the
driver's memory and the object store. Last line: JSON.
"""

from __future__ import annotations

import os
import shutil
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

from jobs.benchmark.job import run_caption
from jobs.benchmark.measure import command_line, in_own_process, peak_mb, print_result
from pipeline.manifest.files import Manifest, ManifestFile
from pipeline.manifest.row_set import RowNumbering
from pipeline.manifest.work import plan_work
from pipeline.results.finished import read_finished
from pipeline.results.run_folder import RunFolder

_FILES = 10_000
_ROWS_PER_FRAGMENT = 10_000
_FAILED_EVERY = 100


def main(argv: Sequence[str]) -> int:
    parser = command_line("scale", __doc__)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--flow", default="2000,20000,200000", help="row counts for part two; empty: leave it out")
    args = parser.parse_args(argv)
    plan = _plan(args.rows)
    print(f"{args.rows:,} rows in {_FILES:,} files, one half finished:")
    print(f"  read finished rows {plan['read_finished_s']:7.1f} s")
    print(f"  plan the rest      {plan['plan_s']:7.1f} s, {plan['units']:,} units")
    print(f"  peak memory        {plan['peak_mb']:7.0f} MB", flush=True)
    runs = []
    for rows in filter(None, args.flow.split(",")):
        run = in_own_process(_run_job, int(rows))
        print(f"  {run['rows']:>8,} rows: {run['rows_per_s']:8.1f} rows/s, ", end="")
        print(f"{run['driver_mb']:6.0f} MB in the driver, {run['store_mb']:6.1f} MB in the object store")
        runs.append(run)
    print_result("scale", plan=plan, flow=runs)
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
    half = numbering.num_rows // 2
    assert len(finished.done) == half
    assert len(finished.failed) == len(range(0, half, _FAILED_EVERY))
    started = time.perf_counter()
    units = [
        work.num_rows for work in plan_work(manifest, numbering, finished.done, actors=256, min_rows=8, max_rows=2048)
    ]
    plan_s = time.perf_counter() - started
    assert sum(units) == numbering.num_rows - half
    return {"rows": rows, "read_finished_s": read_s, "plan_s": plan_s, "units": len(units), "peak_mb": peak_mb()}


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


def _run_job(rows: int) -> dict[str, Any]:
    """The job over text rows, with an engine actor that answers at once."""
    from jobs.benchmark.fake_engine import FakeEngineActor
    from pipeline.execution import dataset

    dataset.ENGINE_ACTOR = FakeEngineActor
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder, "manifest.parquet")
        pq.write_table(pa.table({"prompt": [f"Say {n}." for n in range(rows)]}), manifest)
        settings = {"input.path": manifest, "output.path": f"{folder}/out", "model.path": "demo"}
        store = _SharedMemory()
        started = time.perf_counter()
        record = run_caption({**settings, "resources.num_cpus": os.cpu_count() or 1})
        seconds = time.perf_counter() - started
    rate = record["throughput"]["rows_per_s"]
    memory = {"driver_mb": peak_mb(), "store_mb": store.peak_mb}
    return {"rows": rows, "rows_per_s": rate, "seconds": seconds, **memory}


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
