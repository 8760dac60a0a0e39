"""Every benchmark runs, on a small scale, and ends with a line of JSON."""

from __future__ import annotations

import json
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
    "scale": ["--rows", "100000", "--flow", "20"],
    "report": ["--rows", "300"],
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_ends_with_its_results_as_json(name: str) -> None:
    command = [sys.executable, "-m", "jobs.benchmark", name, *SMALL[name]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == name
    if name == "engine":
        assert result["mismatched_rows"] == 0
        assert all(rate for rate in result["reference_images_per_s"].values())
