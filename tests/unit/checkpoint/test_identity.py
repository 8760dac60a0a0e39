"""A model's marks: any file that changes what it answers changes one, and finding out costs next to nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from pipeline.checkpoint.identity import model_changes, model_identity
from pipeline.demo import CHECKPOINT

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))


def test_a_copy_is_the_same_model_and_its_readme_no_part_of_it(model: Path) -> None:
    (model / "README.md").write_text("other words")
    os.utime(model / "config.json")
    assert model_identity(str(model)) == model_identity(str(CHECKPOINT))


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "config.json"])
def test_a_small_file_that_changes_is_named(model: Path, name: str) -> None:
    before = model_identity(str(model))
    (model / name).write_text((model / name).read_text() + " ")
    (line,) = model_changes(before, model_identity(str(model)))
    assert line.startswith(f"{name}: was ")


def test_other_weights_of_the_same_size_are_another_model(model: Path) -> None:
    before = model_identity(str(model))
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    for place in range(100_000, len(content), 1000):  # as training on changes weights everywhere
        content[place] ^= 1
    weights.write_bytes(content)
    (line,) = model_changes(before, model_identity(str(model)))
    assert line.startswith("model.safetensors: was 5,545,576 bytes")


def test_files_that_came_or_went_are_named(model: Path) -> None:
    before = model_identity(str(model))
    (model / "generation_config.json").unlink()
    (model / "added_tokens.json").write_text("{}")
    assert model_changes(before, model_identity(str(model))) == [
        "added_tokens.json is new",
        "generation_config.json is gone",
    ]
    assert model_changes({}, before) == []


def test_a_bucket_s_listing_is_enough() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/models/m/config.json": b"{}", "/models/m/a.safetensors": b"12", "/models/m/notes.md": b""})
    before = model_identity("memory://models/m")
    assert sorted(before) == ["a.safetensors", "config.json"]
    memory.pipe("/models/m/a.safetensors", b"123")
    (line,) = model_changes(before, model_identity("memory://models/m"))
    assert line.startswith("a.safetensors: was 2 bytes")
    memory.store.clear()


def test_a_hub_name_is_known_by_the_commit_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_identity("org/model") == model_identity("neither/folder/nor/name") == {}
    snapshot = tmp_path / "models--org--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--org--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    assert model_identity("org/model") == {"commit": "a" * 40}
    assert model_identity("org/model", revision="b" * 40) == {"commit": "b" * 40}


def test_no_model_library_is_loaded_for_it() -> None:
    code = (
        f"import sys; from pipeline.checkpoint.identity import model_identity; model_identity({str(CHECKPOINT)!r}); "
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"
