"""Every benchmark runs, on a small scale, and ends with a line of JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmark.__main__ import BENCHMARKS

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "preprocess": ["--rounds", "1", "--only", "640"],
    "engine": ["--images", "2", "--tokens", "2", "--side", "56", "--batch-sizes", "1,2", "--threads", "1"],
    "stage": ["--images", "64", "--actors", "1"],
    "pipeline": ["--rows-per-task", "20"],
    "feed": ["--shape", "tiny", "--large", "3", "--small", "5", "--side", "112", "--tokens", "4", "--actors", "1"],
    "soak": ["--seconds", "20", "--cache-tokens", "4000", "--fail-every", "100"],
    "scale": ["--rows", "100000", "--flow", "20"],
    "report": ["--rows", "300"],
    "dense": ["--rows", "2", "--mlp-rows", "600", "--rounds", "1", "--dtype", "float32"],
    "attention": ["--dtype", "float32", "--scale", "0.05", "--rounds", "1"],
    "kernels": ["--shapes", "2b", "--architectures", "90"],
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_ends_with_its_results_as_json(name: str) -> None:
    command = [sys.executable, "-m", "jobs.benchmark", name, *SMALL[name]]
    # The unit tests of kernels set it, where both run in one process.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == name
    if name == "engine":
        assert result["mismatched_rows"] == 0
        assert all(rate for rate in result["reference_images_per_s"].values())
    if name == "soak":
        assert result["passed"] and result["rows"]["answered"] > 0
        assert result["preemptions"] > 0 and result["failed_passes"] > 0
    if name == "feed":
        for kind, rows in (("large", 3), ("small", 5)):
            found = result[kind]
            assert found["rows"] == rows and found["output_tokens"] == rows * 4
            assert found["prompt_tokens"][0] == found["prompt_tokens"][1]  # both ran rows of the same sizes
            assert all(min(of.values()) > 0 for of in found["steps"].values())


def test_measuring_on_a_gpu_machine_as_a_dry_run_without_one(tmp_path: Path) -> None:
    stages = ["facts", "kernels", "bench_tiny", "job_tiny", "soak", "job"]
    folders = ["--site", str(tmp_path / "site"), "--packages", str(tmp_path)]  # and none that was packed here
    command = [sys.executable, "-m", "jobs.benchmark.gpu.run", "--only", *stages, *folders, "--total", "1100"]
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary in done.stdout
    assert [line.split(",")[0] for line in summary.splitlines() if line[0] != " "][1:-1] == [f"{n}: ok" for n in stages]
    for shown in (
        "matmul bf16",
        "vision: sdpa math",
        "ours",
        "  decode",
        "  decode.json: ",
        "large  job ",
        "small  job ",
        "killed after ",
        "text               10 of 10   exact",
    ):
        assert f"\n    {shown}" in summary
    assert "WRONG" not in summary and "FAILED" not in summary
    resumed = re.search(r"this run +(\d+) rows", summary)
    assert resumed and 0 < int(resumed[1]) < 70, "the killed job's rows were computed again"
