"""`make submit` against a real head node with token authentication: logs, exit code, stop and resume, metrics."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.demo.manifest import write_demo_world
from pipeline.results.run_record import code_commit
from tests.integration.late_pictures import late_pictures
from tests.integration.ray_head import ROOT, RayHead, ray_head
from tests.integration.test_watching import queried, samples

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

WAIT_S = 600.0
AFTER_S = 60.0
MAYBE_ABSENT = {"preemptions", "out_of_memory", "starved_seconds", "fetch_wait_seconds"}
"""Counters of what need not happen."""


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head() as one:
        yield one


def submitting(head: RayHead, *words: str, **environment: str) -> subprocess.Popen[str]:
    # -o: the virtual environment is as it should be, or this test would not run.
    command = ["make", "-s", "-o", ".venv/.installed", "submit", f"PY={sys.executable}", f"ADDRESS={head.address}"]
    return subprocess.Popen(
        [*command, "CONFIG=configs/demo.yaml", f"ARGS={' '.join(words)}"],
        cwd=ROOT,
        env={**head.environment, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ray_job(head: RayHead, *words: str) -> str:
    done = subprocess.run(
        ["ray", "job", *words, "--address", head.address],
        env={**head.environment, "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def world(folder: Path, rows_per_task: int) -> int:
    """A demo world and one row that fails; gives the number of rows."""
    manifest = write_demo_world(folder, rows_per_task=rows_per_task)
    table = pq.read_table(manifest)
    bad = {**dict.fromkeys(table.schema.names), "prompt": "<|image_pad|>", "task": "text"}
    rows = [*table.to_pylist(), bad]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), manifest)
    return len(rows)


def results(output: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(output.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


def places(output: Path) -> Sequence[int]:
    return [row["manifest_row"] for row in results(output)]


def test_the_demo_runs_as_a_job_with_its_logs_exit_code_and_metrics(head: RayHead, tmp_path: Path) -> None:
    num_rows = world(tmp_path / "world", 6)
    output = tmp_path / "out"
    job = submitting(head, "--input.path", str(tmp_path / "world"), "--output.path", str(output))
    scraped: set[str] = set()
    needed = {name for name in queried() if not any(rare in name for rare in MAYBE_ABSENT)}
    end = time.monotonic() + WAIT_S
    # What its processes told last they hand over as they end, which is a little before or after the job's own end.
    while time.monotonic() < end and not (job.poll() is not None and needed <= scraped):
        if job.poll() is not None:
            end = min(end, time.monotonic() + AFTER_S)
        with contextlib.suppress(OSError):  # the endpoint comes up after the dashboard
            scraped |= {name.partition("{")[0] for name in samples(head.metrics_url)}
        time.sleep(1.0)
    printed = job.communicate(timeout=WAIT_S)[0]
    assert job.returncode == 0, printed
    assert re.search(rf"rows +{num_rows} of {num_rows} \(1 error\)", printed)
    assert "1 ReservedTokenError" in printed
    assert "\x1b" not in printed, "no terminal, no colours"
    assert places(output) == list(range(num_rows))
    assert all(row["text"] == row["reference"] for row in results(output) if row["status"] == "ok")
    submission = re.search(r"submitted (raysubmit_\w+) to", printed)
    assert submission is not None
    assert "1 ReservedTokenError" in ray_job(head, "logs", submission[1])
    assert needed <= scraped
    assert json.loads((output / "__run" / "run.json").read_text())["versions"].get("commit") == code_commit(ROOT)
    (sent,) = (path for path in head.session.glob("runtime_resources/working_dir_files/*") if path.is_dir())
    assert {path.name for path in sent.iterdir()} >= {"pipeline", "jobs", "configs", "constraints.txt"}
    assert not {path.name for path in sent.iterdir()} & {"tests", "docs", "out", ".venv", ".git", "data"}
    code = [path for path in sent.rglob("*") if path.is_file() and not {"checkpoint", "__pycache__"} & {*path.parts}]
    assert 50 < len(code) < 500 and sum(path.stat().st_size for path in code) < 2_000_000


def test_a_stopped_job_goes_on_when_it_is_submitted_again(head: RayHead, tmp_path: Path) -> None:
    manifest = write_demo_world(tmp_path / "world", rows_per_task=4)
    table = pq.read_table(manifest)
    picture = next(row["image"] for row in table.to_pylist() if row["image"])
    released = threading.Event()
    with late_pictures((manifest.parent / picture).read_bytes(), lambda path: released.wait()) as url:
        stop_and_go_on(head, manifest, f"{url}/held.png", released, tmp_path / "out")


def stop_and_go_on(head: RayHead, manifest: Path, held: str, released: threading.Event, output: Path) -> None:
    """Stop a job in its middle, and submit it again once the picture of its last row is released."""
    table = pq.read_table(manifest)
    rows = table.to_pylist()
    # The last row keeps the job from its end for as long as it takes to stop it.
    rows.append({**rows[0], "id": "held", "image": held})
    num_rows = len(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), manifest)
    places_of = ("--input.path", str(manifest.parent), "--output.path", str(output))
    words = (*places_of, "--input.allow_private_hosts", "true", "--input.fetch_timeout_s", str(WAIT_S))
    soon = ("--output.rows_per_fragment", "1", "--resources.block_mb", "0.01")
    job = submitting(head, *words, *soon)
    assert job.stdout is not None
    submission = re.findall(r"submitted (raysubmit_\w+) to", job.stdout.readline())[0]
    end = time.monotonic() + WAIT_S
    while len(list(output.glob("__run/fragments/*.parquet"))) < 3 and job.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    ray_job(head, "stop", submission)
    printed = job.stdout.read()
    job.wait()
    released.set()
    assert "was stopped; submit it again to resume" in printed
    assert re.search(rf"stopped with \d+ of {num_rows} rows done; the same command resumes", printed), printed
    assert job.returncode == 2, "make's own, for our 130"
    before = json.loads((output / "__run" / "run.json").read_text())
    assert before["state"] == "interrupted" and 0 < before["counts"]["done"] < num_rows
    assert not (output / "_SUCCESS").exists() and not (output / "__run" / ".lease").exists()
    again = submitting(head, *words)
    printed = again.communicate(timeout=WAIT_S)[0]
    assert again.returncode == 0, printed
    assert places(output) == list(range(num_rows))
    after = json.loads((output / "__run" / "run.json").read_text())
    assert after["num_runs"] == 2
    assert after["counts"]["this_run"] == num_rows - before["counts"]["done"]


def test_a_job_s_own_error_is_read_in_the_logs_and_passed_on(head: RayHead, tmp_path: Path) -> None:
    # A relative path is taken from here, since the head node is this machine.
    words = ["--address", head.address, "--config", "configs/demo.yaml", "--input.path", "out/nowhere"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.submit", *words, "--output.path", str(tmp_path / "out")],
        cwd=ROOT,
        env=head.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(rf"^error: .*{re.escape(str(ROOT / 'out' / 'nowhere'))}", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize(
    ("token", "expected"), [("wrong", "Invalid authentication token"), ("", "Missing authentication token")]
)
def test_a_wrong_or_missing_token_is_our_error(head: RayHead, tmp_path: Path, token: str, expected: str) -> None:
    environment = {name: value for name, value in head.environment.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.submit", "--address", head.address, "--config", "configs/demo.yaml"],
        cwd=ROOT,
        env={**environment, "HOME": str(tmp_path), **({"RAY_AUTH_TOKEN": token} if token else {})},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert expected in done.stderr and "ray get-auth-token" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_driver_that_joins_directly_is_told_of_the_token_that_it_lacks(head: RayHead, tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({"prompt": "Say one."}) + "\n")
    words = ["--input.path", str(manifest), "--output.path", str(tmp_path / "out"), "--model.path", "demo"]
    command = [sys.executable, "-m", "jobs.caption", *words, "--resources.address", head.gcs_address]
    done = subprocess.run(command, cwd=ROOT, env=head.environment, capture_output=True, text=True)
    joining = f"joining the Ray cluster at {head.gcs_address} (resources.address)\n"
    assert (done.returncode, done.stdout) == (2, joining)
    assert re.search(
        rf"can't reach or start Ray \({re.escape(head.gcs_address)}\).*: Failed to connect .*", done.stderr
    )
    assert "if the cluster uses tokens, set RAY_AUTH_MODE=token" in done.stderr
    assert "InvalidAuthToken" in (tmp_path / "out" / "__run" / "log.txt").read_text()
    done = subprocess.run(
        command, cwd=ROOT, env={**head.environment, "RAY_AUTH_MODE": "token"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(results(tmp_path / "out")) == 1
