"""Every Triton kernel compiled for the GPUs it is meant for: no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
# The unit tests interpret kernels; these compile them, in a process of their own.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

EXACT = """
from jobs.benchmark.kernels import compile_for, launches
from pipeline.planning.roofline import SHAPES

for launch in launches(SHAPES["2b"]):
    if launch.name in ("rotate", "add_rms_norm"):
        print(launch.name, "fma" in compile_for(launch, 90).asm["ptx"])
"""


def run(*arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_every_kernel_compiles_without_spilling_registers() -> None:
    printed = json.loads(run("-m", "jobs.benchmark", "kernels", "--shapes", "2b,7b,72b,qwen3-vl-8b")[-1])
    assert printed["spilled"] == 0
    names = {
        "add_layer_norm",
        "norm_heads",
        "add_rms_norm",
        "rotate",
        "quick_gelu",
        "silu_times_up",
        "attend",
        "combine",
    }
    architectures = (80, 89, 90, 100)
    found = {(each["kernel"], each["architecture"]) for each in printed["kernels"]}
    assert found == {(name, architecture) for name in names for architecture in architectures}
    assert all(0 < each["registers"] < 255 for each in printed["kernels"])


@pytest.mark.slow
def test_kernels_that_promise_equality_have_no_fused_multiply_add() -> None:
    lines = run("-c", EXACT)
    assert len(lines) == 4 and all(line.endswith(" False") for line in lines), lines
