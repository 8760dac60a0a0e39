"""Imports point one way, and heavy packages live where they belong. The floors are those of docs/architecture.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A room (a file or folder of pipeline/) imports from the floors below its own, and from itself.
FLOORS = (
    {"errors"},
    {"conversation", "storage"},
    {"engine"},
    {"checkpoint"},
    {"schema", "config_values"},
    {"config", "manifest", "preprocess"},
    {"config_file", "generate", "results", "demo"},
    {"execution", "evaluation"},
    {"planning"},
    {"report"},
    {"jobs"},
)
HOMES = {
    "ray": ("pipeline/execution/", "jobs/benchmark/"),
    "PIL": ("pipeline/preprocess/", "pipeline/report/", "pipeline/demo/", "jobs/benchmark/"),
    "av": ("pipeline/preprocess/", "pipeline/demo/", "jobs/benchmark/"),
    "torch": ("pipeline/engine/", "pipeline/preprocess/", "pipeline/demo/", "pipeline/execution/profile.py", "jobs/"),
    "pydantic": (
        "pipeline/config.py",
        "pipeline/config_values.py",
        "pipeline/config_file.py",
        "pipeline/planning/",
        "pipeline/evaluation/",
        "jobs/",
    ),
}
ENGINE_MAY_IMPORT = {"torch", "transformers", "numpy", "flash_attn", "flash_attn_interface", "triton", "peft"}


def files() -> Iterator[Path]:
    for folder in ("pipeline", "jobs"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """The dotted name of a file: `pipeline.engine.attention` for that folder's `__init__.py`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in files()}


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, at its top or inside its functions; a module's own name where one is meant."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in whole if name in MODULES]
            yield from modules
            if len(modules) < len(whole):
                yield node.module


def room_of(module: str) -> str | None:
    """The room that a module lies in; None for one that is not ours."""
    parts = module.split(".")
    if parts[0] == "jobs":
        return "jobs"
    return parts[1] if parts[0] == "pipeline" and len(parts) > 1 else None


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def test_every_room_has_a_floor() -> None:
    rooms = {room for module in MODULES if (room := room_of(module)) is not None}
    assert rooms == set().union(*FLOORS)


def test_a_room_imports_from_the_floors_below_it() -> None:
    wrong = []
    for module, path in MODULES.items():
        room = room_of(module)
        for imported in imports(path):
            other = room_of(imported)
            if room and other and other != room and floor_of(other) >= floor_of(room):
                wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_no_file_imports_itself_through_others() -> None:
    below = {module: {name for name in imports(path) if name in MODULES} for module, path in MODULES.items()}
    finished: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " imports ".join([*way[way.index(module) :], module])
        if module in finished:
            return
        for name in sorted(below[module]):
            visit(name, (*way, module))
        finished.add(module)

    for module in sorted(below):
        visit(module, ())


@pytest.mark.parametrize("package", sorted(HOMES))
def test_heavy_package_stays_in_its_homes(package: str) -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in files()
        if any(name.split(".")[0] == package for name in imports(path))
        and not str(path.relative_to(ROOT)).startswith(HOMES[package])
    ]
    assert not wrong, f"{package} is imported by {wrong}; it belongs into {HOMES[package]}"


def test_engine_needs_torch_transformers_and_numpy_alone() -> None:
    for module, path in MODULES.items():
        if room_of(module) != "engine":
            continue
        for name in imports(path):
            if name.split(".")[0] == "pipeline":
                assert name.startswith(("pipeline.errors", "pipeline.engine")), f"{module} imports {name}"
            else:
                root = name.split(".")[0]
                assert root in ENGINE_MAY_IMPORT or root in sys.stdlib_module_names, f"{module} imports {name}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("pipeline", "torch ray transformers PIL av pyarrow pandas"),
        ("pipeline.execution.dataset", "torch transformers PIL av"),
        ("jobs.plan", "torch ray transformers"),
    ],
)
def test_importing_a_module_loads_nothing_that_it_may_not_need(module: str, heavy: str) -> None:
    code = f"import sys, {module}; print([name for name in {heavy.split()} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_no_file_is_named_for_nothing() -> None:
    names = {path.stem for folder in ("pipeline", "jobs", "tests") for path in (ROOT / folder).rglob("*.py")}
    assert not names & {"utils", "common", "helpers", "base"}


FAMILY = re.compile(r"qwen[23](?!.vl.batch)", re.IGNORECASE)  # the project has one's name
NAMES_FAMILIES = {
    "pipeline/checkpoint/families/": "what differs outside the forward pass",
    "pipeline/engine/models/": "what differs in the forward pass",
    "pipeline/demo/": "the demo checkpoint is of one family",
    "pipeline/planning/roofline.py": "sizes of published checkpoints by their names",
}


def test_no_code_names_a_model_family_but_its_own_files() -> None:
    found: list[str] = []
    for file in sorted(ROOT.glob("pipeline/**/*.py")):
        path = file.relative_to(ROOT).as_posix()
        if path.startswith(tuple(NAMES_FAMILIES)):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            words = [getattr(node, name, None) for name in ("id", "attr", "name", "module", "arg")]
            words += [node.value] if isinstance(node, ast.Constant) and id(node) not in prose else []
            found += [
                f"{path}:{getattr(node, 'lineno', 0)}: {word}"
                for word in words
                if isinstance(word, str) and FAMILY.search(word)
            ]
    assert not found, found
