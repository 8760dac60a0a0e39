"""Measuring on a GPU machine: packing what it lacks, and stages that stop no other."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jobs.benchmark.__main__ import BENCHMARKS
from jobs.benchmark.gpu import prepare, run

ROOT = Path(__file__).resolve().parents[3]


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_stage_shows_the_lines_that_it_names(tmp_path: Path) -> None:
    stage = run.Stage("one", 10, (python("print('x 1\\ny 2')"), python("print('x 3')")), "x ")
    line, shown = run.run_stage(stage, tmp_path / "one.log", os.environ, 10)
    assert line.startswith("one: ok, ") and shown == ["x 1", "x 3"]
    assert "y 2" in (tmp_path / "one.log").read_text()


def test_a_stage_that_fails_shows_the_end_of_its_log_and_runs_no_more_commands(tmp_path: Path) -> None:
    stage = run.Stage("bad", 10, (python("raise SystemExit('no such GPU')"), python("print('x 1')")), "x ")
    line, shown = run.run_stage(stage, tmp_path / "bad.log", os.environ, 10)
    assert line.startswith("bad: exit code 1, ") and shown[-1] == "no such GPU"


def test_a_stage_at_its_limit_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    child = "import time; print('child', flush=True); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    line, _ = run.run_stage(run.Stage("slow", 60, (python(code),)), tmp_path / "slow.log", os.environ, 1.0)
    assert line.startswith("slow: STOPPED at its limit of 1 s")
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert child not in listed


def test_stages_that_share_a_log_each_show_their_own_part(tmp_path: Path) -> None:
    log = tmp_path / "facts.log"
    for number in (1, 2):
        stage = run.Stage("job", 10, (python(f"print('x {number}')"),), "x ", log="facts")
        assert run.run_stage(stage, log, os.environ, 10)[1] == [f"x {number}"]
    assert log.read_text().count("x ") >= 2


@pytest.mark.parametrize("on_gpu", [False, True])
def test_every_stage_runs_a_module_that_is_there_with_options_that_it_has(on_gpu: bool, tmp_path: Path) -> None:
    stages = run.stages(on_gpu, tmp_path)
    assert len({stage.log or stage.name for stage in stages}) <= 7  # eight files with the summary
    assert stages[0].name == "facts" and sum(stage.limit_s for stage in stages[:4]) < 540
    for stage in stages:
        for command in stage.commands:
            assert command[:2] == (sys.executable, "-m")
            assert importlib.util.find_spec(command[2]) is not None
            if command[2:4] == ("jobs.benchmark", "engine"):
                from jobs.benchmark.engine import parse

                assert parse(command[4:]).images <= 256
            elif command[2] == "jobs.benchmark":
                assert command[3] in BENCHMARKS
    (shown,) = {stage.shown for stage in stages if stage.name.startswith("bench")}
    printed = [
        "ours    1.0 images/s",
        "  measured 1.0 rows/s; tracing",
        "  parts    attention",
        "  decode   0.04 s",
        "reference-32   0.1",
        "$ python",
    ]
    assert run.shown_lines(run.Stage("bench", 1, (), shown), printed) == printed[:5]


def test_what_is_packed_is_found_by_the_stages(tmp_path: Path) -> None:
    built, packages, site = tmp_path / "built", tmp_path / ".gpu", tmp_path / "site"
    packages.mkdir()
    server = built / "job" / prepare.EXECUTABLES[0]
    server.parent.mkdir(parents=True)
    server.write_text("server")
    server.chmod(0o755)
    (built / "job" / "__pycache__").mkdir()
    (built / "job" / "__pycache__" / "x.pyc").write_text("x")
    (built / "fa3").mkdir()
    (built / "fa3" / "fa3_fwd_interface.py").write_text("")
    for name in ("job", "fa3"):
        prepare.pack(built / name, packages / f"{name}.tar.xz")
    environment = run.unpack(packages, site)
    assert environment == run.unpack(packages, site)  # once on a machine
    assert environment["PYTHONPATH"].split(os.pathsep)[-1] == str(site / "fa3")
    assert os.access(site / "job" / prepare.EXECUTABLES[0], os.X_OK)
    assert not (site / "job" / "__pycache__").exists()
    jobs = [stage for stage in run.stages(True, site) if stage.name.startswith("job")]
    for job in jobs:  # the engine's actor needs FlashAttention 3 as much as Ray
        assert {str(site / "fa3"), str(site / "job")} <= set(job.environment["PYTHONPATH"].split(os.pathsep))
    assert run.unpack(tmp_path / "nothing", site / "new") == {}


def test_the_packed_versions_are_those_of_the_tests() -> None:
    found = prepare.pinned(prepare.JOB_PACKAGES, (ROOT / "constraints.txt").read_text())
    assert len(found) == len(prepare.JOB_PACKAGES) and all("==" in line for line in found)
    with pytest.raises(SystemExit, match=r"constraints.txt has no nothing"):
        prepare.pinned(["nothing"], "ray==1")


@pytest.mark.slow
def test_prepare_fetches_wheels_and_refuses_what_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip takes its wheels from a folder here."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    name, _, version = prepare.FLASH_ATTENTION_3.partition("==")
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(wheels / f"{stem}-py3-none-manylinux_2_34_x86_64.whl", "w") as wheel:
        wheel.writestr("fa3_fwd_interface.py", "flash_attn_varlen_func = None")
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-manylinux_2_34_x86_64\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.chdir(ROOT)
    folder = tmp_path / ".gpu"
    folder.mkdir()
    (folder / "job.tar.xz").write_text("of an earlier call")
    assert prepare.main(["engine", "--folder", str(folder)]) == 0
    assert [path.name for path in folder.iterdir()] == ["fa3.tar.xz"]
    assert (
        Path(run.unpack(folder, tmp_path / "site")["PYTHONPATH"].split(os.pathsep)[-1]) / "fa3_fwd_interface.py"
    ).exists()
    assert prepare.main(["engine", "--folder", str(folder), "--limit-mib", "0.1"]) == 1
    assert "that is above the limit of 0.1 MiB" in capsys.readouterr().err
