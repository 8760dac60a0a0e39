"""Runs that are killed at random moments, and finished: every row once, the same answers, no stray files.

`make test-faults` runs these; FAULT_RUNS says how many (40). The last printed line is JSON: kills, rows, rows lost,
rows doubled.
"""

from __future__ import annotations

import http.server
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
RUNS = int(os.environ.get("FAULT_RUNS", "40"))
EXPECTED_ERRORS = {"UnsupportedMedia", "MediaNotFound", "MediaMemoryError", "FetchTimeout"}
VICTIMS = {"worker": "PreprocessActor", "engine": "EngineActor"}

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]


class SlowServer(http.server.BaseHTTPRequestHandler):
    """`/slow` answers after a while, `/hang` never does."""

    picture = b""

    def do_GET(self) -> None:
        time.sleep(20.0 if "hang" in self.path else 0.3)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.picture)))
        self.end_headers()
        self.wfile.write(self.picture)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


@pytest.fixture(scope="module")
def slow_server(photos: Path) -> Iterator[str]:
    SlowServer.picture = (photos / "rocket.jpg").read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def cluster() -> Iterator[str]:
    import ray

    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, photos: Path, slow_server: str) -> Path:
    """Good, slow, bad, hanging and memory-hungry rows."""
    folder = tmp_path_factory.mktemp("faults")
    shutil.copy(photos / "rocket.jpg", folder / "rocket.jpg")
    (folder / "page.png").write_text("<html>")
    Image.new("RGB", (9000, 9000)).save(folder / "huge.png")
    rows: list[dict[str, Any]] = []
    for number in range(60):
        rows.append({"prompt": f"Question {number}?"})
        if number % 6 == 0:
            rows.append({"image": "rocket.jpg", "prompt": "?"})
        if number % 10 == 0:
            rows.append({"image": f"{slow_server}/slow/{number}", "prompt": "?"})
    rows += [{"image": "page.png", "prompt": "?"}, {"image": "missing.png", "prompt": "?"}]
    rows += [{"image": "huge.png", "prompt": "?"}, {"image": f"{slow_server}/hang", "prompt": "?"}]
    random.Random(0).shuffle(rows)
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def start(manifest: Path, output: Path, cluster: str) -> subprocess.Popen[str]:
    words = {
        "input.path": str(manifest),
        "output.path": str(output),
        "model.path": "demo",
        "sampling.max_tokens": "12",
        "sampling.ignore_eos": "true",
        "input.allow_private_hosts": "true",
        "input.fetch_timeout_s": "2",
        "input.fetch_retries": "0",
        "media.memory_limit_mb": "200",
        "output.seconds_per_fragment": "0.5",
        "output.rows_per_part": "40",
        "resources.min_rows_per_unit": "4",
        "engine.max_running": "4",
    }
    command = [
        sys.executable,
        "-m",
        "jobs.caption",
        *(word for key, value in words.items() for word in (f"--{key}", value)),
    ]
    environment = {**os.environ, "RAY_ADDRESS": cluster}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def pids_of(name: str) -> list[int]:
    """Ray's workers that run an actor of this class."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if command.startswith("ray::") and name in command:
                found.append(int(entry.name))
    return found


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    printed, _ = process.communicate(timeout=300)
    return process.returncode, printed


def disturbed_run(manifest: Path, output: Path, cluster: str, rng: random.Random, usual_s: float) -> Counter[str]:
    """Run the job to its end, killing up to three times on the way."""
    kills: Counter[str] = Counter()
    process = start(manifest, output, cluster)
    for _ in range(rng.randint(1, 3)):
        time.sleep(rng.uniform(0.2, 0.8) * usual_s)
        if process.poll() is not None:
            break
        victim = rng.choice(["driver", *VICTIMS])
        if victim == "driver":
            process.kill()
            process.communicate()
            process = start(manifest, output, cluster)
        else:
            for pid in pids_of(VICTIMS[victim])[:1]:
                os.kill(pid, signal.SIGKILL)
        kills[victim] += 1
    code, printed = finish(process)
    for _ in range(2):  # the promise: run the same command until it says done
        if code == 0:
            break
        code, printed = finish(start(manifest, output, cluster))
    assert code == 0, printed
    return kills


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(output.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


def test_killed_runs_end_with_every_row_once_and_the_same_answers(
    manifest: Path, cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    code, printed = finish(start(manifest, tmp_path / "calm", cluster))
    assert code == 0, printed
    usual_s = time.monotonic() - started
    calm = rows_of(tmp_path / "calm")
    kinds = {row["error_type"] for row in calm if row["status"] == "error"}
    assert kinds == EXPECTED_ERRORS
    files = sorted(path.name for path in (tmp_path / "calm").iterdir())
    kills: Counter[str] = Counter()
    summary: Counter[str] = Counter()
    for seed in range(RUNS):
        output = tmp_path / f"run-{seed}"
        kills += disturbed_run(manifest, output, cluster, random.Random(seed), usual_s)
        rows = rows_of(output)
        places = Counter((row["manifest_file"], row["manifest_row"]) for row in rows)
        summary["rows"] += len(rows)
        summary["lost"] += len(calm) - len(places)
        summary["doubled"] += sum(count - 1 for count in places.values())
        assert [(row["id"], row["text"], row["error_type"]) for row in rows] == [
            (row["id"], row["text"], row["error_type"]) for row in calm
        ], f"seed {seed}"
        assert sorted(path.name for path in output.iterdir()) == files
        shutil.rmtree(output)
    with capsys.disabled():
        print()
        print(
            json.dumps(
                {"runs": RUNS, "kills": dict(kills), **{key: summary[key] for key in ("rows", "lost", "doubled")}}
            )
        )
    assert summary["lost"] == summary["doubled"] == 0
    assert sum(kills.values()) >= RUNS // 2
