"""Imports run one way, and heavy packages live where they belong.

jobs      caption  plan  evaluate  report  benchmark         the only home of `import ray`
stages    preprocess  generate  work  survey  forecast
steps     manifest  media  patches  messages  prompt | engine | results  lease  metrics  report
ground    config  storage  placement  feeding  model_cache  model_files  model_identity  row_set  roofline
base      errors  schema  conversation  credentials
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = (
    {"errors", "schema", "conversation", "credentials"},
    {
        "config",
        "storage",
        "placement",
        "feeding",
        "model_cache",
        "model_files",
        "model_identity",
        "row_set",
        "roofline",
    },
    {"manifest", "media", "patches", "messages", "prompt", "engine", "results", "lease", "metrics", "report"},
    {"preprocess", "generate", "work", "survey", "forecast"},
)
# Neighbours that may be imported all the same, with the reason.
ALLOWED_NEIGHBOURS = {
    ("schema", "conversation"): "a receipt names a medium's kind",
    ("config", "schema"): "below",
    ("model_cache", "storage"): "checkpoints lie in buckets too",
    ("model_identity", "storage"): "and may be changed there",
    ("placement", "config"): "what is asked for is a part of the config",
    ("feeding", "config"): "the same",
    ("feeding", "placement"): "sizes are those of a placement's actors",
    (
        "media",
        "patches",
    ): "a medium is decoded, resized and patchified in one pass, inside the process that can be killed",
    ("survey", "preprocess"): "the plan asks what the run will do, of the run's own options",
    ("report", "metrics"): "a report shows scores with their intervals",
    ("report", "media"): "a report shows thumbnails",
    ("report", "results"): "a report reads a run folder",
}
HOMES = {
    "ray": ("jobs/",),
    "PIL": ("pipeline/media/", "pipeline/patches.py", "pipeline/report", "pipeline/demo/", "jobs/benchmark_vllm.py"),
    "av": ("pipeline/media/", "pipeline/demo/"),
    "torch": ("pipeline/engine/", "pipeline/patches.py", "pipeline/media/", "pipeline/demo/", "jobs/"),
    "pydantic": ("pipeline/config.py", "jobs/"),
}
ENGINE_MAY_IMPORT = {"torch", "transformers", "numpy", "pipeline.errors", "pipeline.engine"}


def modules(folder: str) -> Iterator[Path]:
    yield from sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, at its top or inside its functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if module in names)


def house_name(path: Path) -> str | None:
    """The module or package below pipeline that a file belongs to; None for the demo, which may use everything."""
    first = path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")
    return None if first in ("__init__", "demo") else first


def test_every_module_has_a_layer() -> None:
    known = set().union(*LAYERS)
    found = {name for path in modules("pipeline") if (name := house_name(path)) is not None}
    assert found <= known, f"say in LAYERS where these belong: {sorted(found - known)}"


def test_imports_point_down_and_never_to_a_neighbour() -> None:
    wrong = []
    for path in modules("pipeline"):
        name = house_name(path)
        if name is None:
            continue
        for imported in imports(path):
            parts = imported.split(".")
            if parts[0] == "jobs":
                wrong.append(f"{path.name} imports {imported}")
            if parts[0] != "pipeline" or len(parts) < 2 or parts[1] in (name, "demo"):
                continue
            other = parts[1]
            if layer_of(other) >= layer_of(name) and (name, other) not in ALLOWED_NEIGHBOURS:
                wrong.append(f"{path.relative_to(ROOT)} imports {imported}")
    assert not wrong, "\n".join(sorted(set(wrong)))


@pytest.mark.parametrize("package", sorted(HOMES))
def test_heavy_package_stays_in_its_homes(package: str) -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for folder in ("pipeline", "jobs")
        for path in modules(folder)
        if any(name.split(".")[0] == package for name in imports(path))
        and not str(path.relative_to(ROOT)).startswith(HOMES[package])
    ]
    assert not wrong, f"{package} is imported by {wrong}; it belongs into {HOMES[package]}"


def test_engine_needs_torch_transformers_and_numpy_alone() -> None:
    allowed_roots = {name for name in ENGINE_MAY_IMPORT if "." not in name} | {
        "flash_attn",
        "flash_attn_interface",
        "triton",
    }
    for path in modules("pipeline/engine"):
        for name in imports(path):
            root = name.split(".")[0]
            if root == "pipeline":
                assert name.startswith(("pipeline.errors", "pipeline.engine")), f"{path.name} imports {name}"
            else:
                assert root in allowed_roots or root in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "ray", "transformers", "PIL", "av", "pyarrow", "pandas")
    code = f"import sys, pipeline; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_an_actor_s_process_loads_codecs_models_and_tokenizers_only_where_it_needs_them() -> None:
    heavy = ("torch", "transformers", "PIL", "av")
    code = f"import sys, jobs.flow; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_no_file_is_named_for_nothing() -> None:
    names = {path.stem for folder in ("pipeline", "jobs", "tests") for path in modules(folder)}
    assert not names & {"utils", "common", "helpers", "base"}
