"""The Dockerfile, as far as it can be checked without Docker: its instructions, its files, its versions."""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = ROOT / "configs" / "cluster" / "Dockerfile"
IGNORE = DOCKERFILE.with_name("Dockerfile.dockerignore")
INSTRUCTIONS = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "CMD", "LABEL", "EXPOSE", "ENTRYPOINT"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of every line, comments left out and continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in joined.splitlines()]


def arguments(name: str) -> list[str]:
    return [value for instruction, value in instructions() if instruction == name]


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage, beginning with its FROM."""
    found: list[list[tuple[str, str]]] = []
    for instruction, value in instructions():
        if instruction == "FROM":
            found.append([])
        if found:
            found[-1].append((instruction, value))
    return found


def build_args() -> dict[str, str]:
    return {name: value.strip('"') for name, _, value in (one.partition("=") for one in arguments("ARG"))}


def pins() -> dict[str, str]:
    """constraints.txt, by the package's plain name."""
    lines = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    return {plain(name): version for name, version in lines}


def plain(requirement: str) -> str:
    """A requirement's package in the spelling that pip compares by: no extras, no versions."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~ ;]", requirement)[0]).lower()


def copied() -> Iterator[tuple[str, str]]:
    """(source, destination) of the COPYs from the project."""
    for value in arguments("COPY"):
        if not value.startswith("--from="):
            *sources, destination = value.split()
            yield from ((source, destination) for source in sources)


def test_every_line_is_an_instruction_and_the_last_stage_runs_as_its_own_user() -> None:
    assert {instruction for instruction, _ in instructions()} <= INSTRUCTIONS
    last = stages()[-1]
    assert [value for instruction, value in last if instruction == "USER"] == ["ray"]
    after = [instruction for instruction, _ in last][[one for one, _ in last].index("USER") + 1 :]
    assert "RUN" not in after
    created = " ".join(value for instruction, value in last if instruction == "RUN")
    assert "useradd --create-home --uid 1000" in created
    assert "HOME=/home/ray" in " ".join(arguments("ENV"))  # `ray up` looks for it


def test_arguments_are_defined_and_images_have_versions() -> None:
    known = build_args()
    assert set(re.findall(r"\$\{(\w+)\}", DOCKERFILE.read_text())) <= set(known)
    for value in arguments("FROM"):
        image = value.split(" AS ")[0].replace("${CUDA}", known["CUDA"])
        assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-(base|devel)-ubuntu24\.04", image)


def test_cuda_is_the_one_that_torch_is_made_for() -> None:
    of_torch = pins()["nvidia-cuda-runtime"]
    assert build_args()["CUDA"].split(".")[:2] == of_torch.split(".")[:2]


def test_stages_are_named_before_they_are_copied_from() -> None:
    named: set[str] = set()
    for stage in stages():
        for instruction, value in stage:
            if instruction == "COPY" and value.startswith("--from="):
                assert value.removeprefix("--from=").split()[0] in named
        if " AS " in stage[0][1]:
            named.add(stage[0][1].partition(" AS ")[2])
    assert named == {"flash-attn"}


def test_what_is_copied_is_in_the_project_and_not_left_out_by_the_ignore_file() -> None:
    rules = [line for line in IGNORE.read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    taken = {rule[1:] for rule in rules if rule.startswith("!")}
    for source, _ in copied():
        assert (ROOT / source).exists(), source
        assert source in taken, f"{IGNORE.name} leaves out {source}"
    for left_out in (".git", ".venv", "out", "tests"):
        assert left_out not in taken
        assert any(fnmatch.fnmatch(left_out, rule) for rule in rules)


def test_shell_commands_are_well_formed() -> None:
    for command in arguments("RUN"):
        subprocess.run(["bash", "-n", "-c", command], check=True, capture_output=True, timeout=30)


def test_everything_that_pip_installs_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    seen: set[str] = set()
    for command in arguments("RUN"):
        for words in (shlex.split(one) for one in re.split(r"&&|;(?![0-9])", command) if " pip " in f" {one} "):
            assert "-c" in words, f"no constraints: {words}"
            for word in _requirements(words):
                extras = re.search(r"\[(.*)\]", word)
                if word.startswith("."):
                    seen |= {plain(one) for one in project["dependencies"]}
                    for extra in extras[1].split(",") if extras else []:
                        seen |= {plain(one) for one in project["optional-dependencies"][extra]}
                else:
                    seen.add(plain(word))
    assert {"torch", "flash-attn", "ray", "s3fs", "gcsfs", "transformers"} <= seen
    assert seen <= set(pins()), f"add to constraints.txt: {sorted(seen - set(pins()))}"


def _requirements(words: list[str]) -> list[str]:
    """What a pip command installs: its words without options and their values."""
    found: list[str] = []
    rest = words[words.index("pip") + 2 :]
    while rest:
        word = rest.pop(0)
        if word in ("-c", "-w", "--find-links"):
            rest.pop(0)
        elif not word.startswith("-"):
            found.append(word)
    return found


def test_pins_satisfy_what_the_project_asks_for() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    known = pins()
    wrong = [
        f"{requirement} and {known[plain(requirement.name)]}"
        for requirement in map(Requirement, asked)
        if plain(requirement.name) in known and known[plain(requirement.name)] not in requirement.specifier
    ]
    assert wrong == []


def test_tools_that_ray_and_kuberay_look_for_are_there() -> None:
    installed = " ".join(value for instruction, value in stages()[-1] if instruction == "RUN")
    for package in ("wget", "rsync", "openssh-client", "gcc", "python3-dev"):
        assert f" {package} " in installed, package
    assert "/etc/profile.d/" in installed


@pytest.mark.slow
def test_the_copied_files_make_the_whole_package(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="pip install setuptools")
    image = tmp_path / "app"
    image.mkdir()
    for source, destination in copied():
        if destination == "/build/":
            continue
        target = image / destination / (source if destination == "./" else "")
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, target)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    done = subprocess.run([*build, str(image)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"jobs/caption.py", "pipeline/report/page.html.j2", "pipeline/demo/checkpoint/model.safetensors"} <= names
