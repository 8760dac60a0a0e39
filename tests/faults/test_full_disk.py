"""A disk that is full in the middle of a run: a clear error, nothing half written, and the same command resumes."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = 64

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("ray_with_two_cpus")]

# A disk of its own, seen by this shell and what it starts alone, first too small and then not.
SCRIPT = """
set -u
mount -t tmpfs -o size=160k tmpfs "$OUT"
"$@" > "$TOLD/first.txt" 2>&1; echo $? > "$TOLD/first.code"
find "$OUT" -mindepth 1 > "$TOLD/files.txt"
for fragment in "$OUT"/__run/fragments/*.parquet; do cp "$fragment" "$TOLD/"; done
mount -o remount,size=64m "$OUT"
"$@" > "$TOLD/second.txt" 2>&1; echo $? > "$TOLD/second.code"
cp "$OUT"/part-*.parquet "$OUT/__run/run.json" "$TOLD/"
find "$OUT" -mindepth 1 -printf '%f\\n' > "$TOLD/files-after.txt"
"""


def can_mount(folder: Path) -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def test_a_full_disk_stops_the_job_in_order_and_it_goes_on_once_there_is_room(tmp_path: Path) -> None:
    import ray

    out, told = tmp_path / "out", tmp_path / "told"
    out.mkdir()
    told.mkdir()
    if not can_mount(out):
        pytest.skip("needs the right to mount a tmpfs in a namespace of its own: run as root")
    rng = random.Random(0)
    prompts = ["".join(rng.choices(string.ascii_letters, k=4000)) for _ in range(ROWS)]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    words = {
        "input.path": str(manifest),
        "input.keep": "prompt",
        "output.path": str(out),
        "output.report": "false",
        "output.rows_per_fragment": "4",
        "model.path": "demo",
        "resources.address": ray.get_runtime_context().gcs_address,
        "resources.min_rows_per_unit": "4",
        "resources.max_rows_per_unit": "4",
    }
    command = [sys.executable, str(ROOT / "tests/faults/job.py"), "marked"]
    command += [word for name, value in words.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "OUT": str(out), "TOLD": str(told)}
    subprocess.run(["unshare", "-m", "sh", "-c", SCRIPT, "sh", *command], cwd=ROOT, env=environment, check=True)

    first = (told / "first.txt").read_text()
    assert (told / "first.code").read_text().strip() == "2", first
    assert "No space left on device" in first
    assert "run the same command" in first
    assert "Traceback" not in first
    left = (told / "files.txt").read_text().split()
    assert not [name for name in left if name.endswith(".tmp")], left
    whole = [pq.read_table(path) for path in sorted(told.glob("*.parquet")) if not path.name.startswith("part-")]
    assert 0 < sum(table.num_rows for table in whole) < ROWS

    assert (told / "second.code").read_text().strip() == "0", (told / "second.txt").read_text()
    rows = pq.read_table(told / "part-00000.parquet").to_pylist()
    assert [row["prompt"] for row in rows] == prompts
    assert {row["status"] for row in rows} == {"ok"}
    record = json.loads((told / "run.json").read_text())
    assert record["counts"]["this_run"] == ROWS - sum(table.num_rows for table in whole)
    assert "_SUCCESS" in (told / "files-after.txt").read_text().split()
