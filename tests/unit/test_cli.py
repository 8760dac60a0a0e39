"""The console command: it names its jobs, runs the one that is asked for, and imports nothing else."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jobs import cli
from jobs.benchmark.__main__ import BENCHMARKS
from jobs.benchmark.__main__ import main as benchmark

ROOT = Path(__file__).resolve().parents[2]


def test_the_project_installs_the_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"qwen2-vl-batch": "jobs.cli:main"}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"\n    {name} " in printed for name in cli.COMMANDS)


def test_help_imports_no_job() -> None:
    code = "import sys; from jobs import cli; cli.main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert not loaded & {"pipeline", "ray", "torch", "numpy", "pyarrow", "pydantic", *cli.COMMANDS.values()}


def test_an_unknown_command_is_an_error_that_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["captoin", "--help"]) == 2
    assert "found 'captoin'; expected one of caption, plan, evaluate, report, submit, benchmark" in (
        capsys.readouterr().err
    )
    assert benchmark(["speed"]) == 2
    assert f"found 'speed'; expected one of {', '.join(BENCHMARKS)}" in capsys.readouterr().err


@pytest.mark.parametrize("module", [*cli.COMMANDS.values(), *(f"jobs.benchmark.{name}" for name in BENCHMARKS)])
def test_every_command_is_a_module_with_a_main(module: str) -> None:
    assert callable(importlib.import_module(module).main)


@pytest.mark.parametrize("name", ["caption", "benchmark"])
def test_a_command_gets_the_arguments_after_its_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    assert f"python -m jobs.{name}" in capsys.readouterr().out
