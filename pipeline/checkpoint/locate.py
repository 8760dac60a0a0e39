"""Where a checkpoint is, and whether it is one that this pipeline runs.

Knows folders, hub names and `config.json`; not weights, tokenizers or pixels.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.checkpoint.families import FAMILIES
from pipeline.checkpoint.families.family import Family
from pipeline.errors import CheckpointError, first_line

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "checkpoint"
"""What `model.path: demo` stands for: the checkpoint that pipeline/demo/training made, a standard Hugging Face one."""
_hub_faults: list[str] = []
"""Why this process could not reach the hub. It waits for it once; from then on only the cache is looked at."""


def resolve_model(path: str) -> str:
    """The folder, hub name or bucket prefix that the config's `model.path` stands for."""
    if path == DEMO:
        return str(DEMO_FOLDER)
    if path.startswith(("/", "./", "../", "~")) and not Path(path).expanduser().is_dir():
        raise CheckpointError(f"no model folder at {path}: set model.path to a checkpoint folder or a hub name")
    return str(Path(path).expanduser()) if path.startswith("~") else path


def check_model(model_path: str, *, revision: str | None = None, weights: bool = True) -> None:
    """Raise CheckpointError unless the folder or hub name holds a checkpoint that this pipeline runs, with its weights
    if asked."""
    read_family(model_path, revision=revision)
    if weights and Path(model_path).is_dir() and not any(Path(model_path).glob("*.safetensors")):
        raise CheckpointError(f"{model_path!r} has a config.json but no *.safetensors: the weights are missing")


def read_family(model_path: str, *, revision: str | None = None) -> Family:
    """The published facts of the checkpoint's family. Raises CheckpointError where this pipeline does not run it."""
    config = read_config(model_path, revision=revision)
    if config is None:
        if adapter := read_json(model_path, "adapter_config.json", revision):
            base = adapter.get("base_model_name_or_path") or "the checkpoint that it was trained on"
            raise CheckpointError(
                f"{model_path!r} is an adapter: set model.path to {base}, and model.adapter to {model_path}"
            )
        raise CheckpointError(
            f"can't find config.json in {model_path!r}{why_missing(model_path)}; "
            "set model.path to a folder with a Qwen-VL checkpoint or to a hub name that this machine can reach"
        )
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise CheckpointError(
            f"{model_path!r} is a checkpoint of model type {config.get('model_type')!r}; this pipeline runs "
            f"{', '.join(FAMILIES)}"
        )
    return family


def read_config(model_path: str, *, revision: str | None = None) -> dict[str, Any] | None:
    """The checkpoint's `config.json`; None where there is none."""
    return read_json(model_path, "config.json", revision)


def find_file(model_path: str, name: str, *, revision: str | None = None, setting: str = "model.path") -> Path | None:
    """One of the checkpoint's files, from its folder or through the hub's cache; None where it has none, or the hub
    can't be reached.

    Raises CheckpointError when the hub refuses: the repository is unknown, private or gated.
    """
    if Path(model_path).is_dir():
        file = Path(model_path, name)
        return file if file.is_file() else None
    from huggingface_hub import errors, hf_hub_download  # a second of imports, for hub names only

    try:
        with _hub_log_silenced():
            return Path(hf_hub_download(model_path, name, revision=revision, local_files_only=bool(_hub_faults)))
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
            _hub_faults.append(first_line(error.__cause__))
        return None
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model_path!r} is a gated repository: accept its terms on the hub and set HF_TOKEN, or set {setting} to "
            "a local folder"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"the hub has no {model_path!r}{f' at revision {revision!r}' if revision else ''}: set {setting} to a "
            "folder or to a hub name, and HF_TOKEN if it is private"
        ) from error


def why_missing(model_path: str) -> str:
    """What to add to "can't find FILE in CHECKPOINT" where the hub was not asked, or did not answer."""
    return "" if Path(model_path).is_dir() or not _hub_faults else f": the hub can't be reached ({_hub_faults[0]})"


@contextlib.contextmanager
def _hub_log_silenced() -> Iterator[None]:
    """The client logs every retry; what came of them is said in our own error."""
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    before = get_verbosity()
    set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        set_verbosity(before)


def read_json(
    model_path: str, name: str, revision: str | None, *, setting: str = "model.path"
) -> dict[str, Any] | None:
    """One of the checkpoint's JSON files; None where it has none."""
    found = find_file(model_path, name, revision=revision, setting=setting)
    if found is None:
        return None
    values = json.loads(found.read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values
